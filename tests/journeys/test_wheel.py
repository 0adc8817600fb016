"""What ships: the wheel has one import package, and the application as data inside it. Installed, it runs a job."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.plugins.own_stack import OwnStack

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("orchestrator", "actors", "jobs", "cluster")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built in a copy: a build leaves its own files behind, and takes over what an older one left."""
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "_application"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    stale = source / "build" / "lib" / "orchestrator" / "_application" / "jobs" / "deleted.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    out = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
    done = subprocess.run(
        [sys.executable, *command, str(out), "."], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files as an installation has them."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_it_has_one_import_package(installed: Path) -> None:
    packages = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert packages == {"orchestrator"}


@pytest.mark.parametrize("folder", ["actors", "jobs", "cluster"])
def test_it_carries_the_application(installed: Path, folder: str) -> None:
    assert files(installed / "orchestrator" / "_application" / folder) == files(ROOT / folder)


def test_it_carries_the_library_with_its_data(installed: Path) -> None:
    wanted = {path for path in files(ROOT / "orchestrator") if path.endswith((".py", ".yaml", ".mako"))}
    assert wanted - files(installed / "orchestrator") == set()


def test_orc_is_its_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "orc = orchestrator.cli.main:main" in archive.read(entry_points).decode()


def test_the_installed_application_is_found_and_runs(installed: Path, tmp_path: Path) -> None:
    """Also from a directory with a `cluster/` of its own, which must stay the user's."""
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "__main__.py").write_text("raise SystemExit('this is the user\\'s own cluster')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "from orchestrator import application\n"
        "print(application.root())\n"
    )
    found = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    root = Path(found.stdout.strip())
    assert root == installed / "orchestrator" / "_application"
    command = [sys.executable, "-P", "-m", "cluster", "--help"]
    variables = {"PYTHONPATH": f"{root}:{installed}", "PATH": ""}
    helped = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
    assert helped.returncode == 0, helped.stdout + helped.stderr


TRAIN = """
import orchestrator
from cluster import WHOSE


def train(run, cfg):
    run.tags({"whose": WHOSE, "orchestrator": orchestrator.__file__})
    run.log({"value": 42.0}, step=1)
"""


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment in which the wheel is the one thing that was installed.

    What it depends on is seen through a path file: installing all of that again would take minutes. Path files of the
    other environment, such as an editable installation of ours, are not followed.
    """
    root = tmp_path_factory.mktemp("environment")
    root.parent.chmod(0o711)
    venv.create(root, with_pip=False, symlinks=True)
    (site,) = root.glob("lib/python*/site-packages")
    dependencies = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(dependencies)) + "\n")
    command = ["-m", "pip", "--python", str(root / "bin" / "python"), "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run([sys.executable, *command, str(wheel)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def test_the_installed_wheel_runs_a_job_of_somebodys_project(environment: Path, tmp_path: Path) -> None:
    """`orc up`, `orc submit`, `orc down` and nothing of the checkout."""
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "__init__.py").write_text("WHOSE = 'theirs'\n")
    (tmp_path / "mine.py").write_text(TRAIN)
    with OwnStack(environment / "bin") as stack:
        stack.orc("up", "ray.num_cpus=2")
        words = ("train=mine:train", "resources.workers=1", "--working-dir", str(tmp_path), "--json")
        job = json.loads(stack.orc("submit", *words))
        assert (job["status"], job["exit_code"]) == ("SUCCEEDED", 0)
        shown = json.loads(stack.orc("show", job["run"], "--json"))
        assert (shown["status"], shown["job"]) == ("FINISHED", job["job"])
        tags = shown["tags"]
        assert tags["whose"] == "theirs"
        assert Path(tags["orchestrator"]).is_relative_to(environment)


def files(folder: Path) -> set[str]:
    """Relative paths of the files in a folder, without what Python leaves behind."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)) for path in found}
