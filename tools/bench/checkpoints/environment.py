"""Where the benchmark runs: the peers' environment, fresh directories, and what the machine is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent


def peers_python(place: Path) -> Path:
    """An environment with ours in it and the peers besides, made on the first use: the same torch and Ray for all."""
    python = place / "bin" / "python"
    wanted, mark = HERE / "peers.txt", place / "peers.txt"
    if mark.exists() and mark.read_text() == wanted.read_text():
        return python
    print(f"installing the peers into {place}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    ours = place / "lib" / version / "site-packages" / "zz_ours.pth"
    ours.write_text(sysconfig.get_paths()["purelib"] + "\n")
    command = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", "-r", wanted]
    subprocess.run(command, check=True)
    mark.write_text(wanted.read_text())
    return python


def child() -> dict[str, str]:
    """The environment of child processes: our code, one thread, and nothing of a stack that is not the benchmark's."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ORC_", "RAY_"))}
    paths = [str(ROOT), str(HERE), str(HERE.parent)]
    return inherited | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }


@contextmanager
def fresh_directory(on: Path) -> Iterator[Path]:
    on.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="orcb-", dir=on))
    os.sync()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def settle() -> None:
    """What earlier ones wrote is not this one's to pay."""
    os.sync()


def drop_page_cache() -> bool:
    """Whether that could be done: it takes root."""
    os.sync()
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return True
    return False


class MemoryWatch:
    """The most memory that processes and shared memory take together, above what they took at the beginning: anonymous
    pages and tmpfs of the whole machine, looked at every 20 ms."""

    def __enter__(self) -> MemoryWatch:
        self._began = self.peak_bytes = _taken()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def extra_bytes(self) -> int:
        return self.peak_bytes - self._began

    def _look(self) -> None:
        while not self._is_over.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, _taken())


def _taken() -> int:
    found = {}
    with open("/proc/meminfo") as file:
        for line in file:
            name, _, rest = line.partition(":")
            found[name] = int(rest.split()[0]) << 10
    return found["AnonPages"] + found["Shmem"]


_BEGAN = time.monotonic()


def tell(what: str) -> None:
    """A line of progress: written over on a terminal, one below the other in a file."""
    end = "\n" if not sys.stderr.isatty() else ""
    start = "" if end else "\r\033[K"
    print(f"{start}[{time.monotonic() - _BEGAN:5.0f} s] {what}", end=end, file=sys.stderr, flush=True)
