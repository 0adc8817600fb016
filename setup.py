"""Puts the application (actors/, jobs/, cluster/) into the wheel as data of the one import package, `orchestrator`.

Everything else is in pyproject.toml. An editable install uses the folders of the checkout, so nothing is copied there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
FOLDERS = ("actors", "jobs", "cluster")
TARGET = Path("orchestrator") / "_application"


def application_files(root: Path = ROOT) -> list[Path]:
    """The files of the application, relative to `root`, without what Python and editors leave behind."""
    found = (path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file())
    relative = (path.relative_to(root) for path in found)
    return sorted(path for path in relative if not any(p.startswith((".", "__pycache__")) for p in path.parts))


class BuildWithApplication(build_py):
    """build_py that also copies the application beside the package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / TARGET
        shutil.rmtree(target, ignore_errors=True)  # a file deleted since the last build must not ship
        for source, copy in self._application():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, *(str(copy) for _, copy in self._application())]

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *(str(path) for path in application_files())]

    def _application(self) -> list[tuple[Path, Path]]:
        return [(ROOT / path, Path(self.build_lib) / TARGET / path) for path in application_files()]


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithApplication})
