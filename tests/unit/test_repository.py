"""The files around the code: what is declared, pinned, shipped and said."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirement_name(requirement: str) -> str:
    """`ray[default]==2.60.*` is `ray`."""
    return normal(re.split(r"[\s\[=<>~!;]", requirement, maxsplit=1)[0])


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {normal(name): version for name, version in (line.split("==") for line in lines)}


def direct() -> list[str]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    return [*PROJECT["project"]["dependencies"], *(requirement for extra in extras for requirement in extra)]


@pytest.mark.parametrize("requirement", direct())
def test_every_dependency_is_pinned(requirement: str) -> None:
    assert requirement_name(requirement) in pinned()


def test_every_dependency_has_its_reason() -> None:
    lines = [line.strip() for line in (ROOT / "pyproject.toml").read_text().splitlines()]
    declared = {requirement: [line for line in lines if f'"{requirement}"' in line] for requirement in direct()}
    assert [requirement for requirement, found in declared.items() if not any("# " in line for line in found)] == []


def test_versions_and_licence_agree() -> None:
    version = PROJECT["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = [int(number) for number in re.findall(r"^## (\d+)\. ", (ROOT / "DECISIONS.md").read_text(), re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert numbers


def test_the_wheel_takes_the_application_folders(tmp_path: Path) -> None:
    ours, others = (
        ("actors/tracker.py", "jobs/train.py"),
        ("actors/__pycache__/tracker.pyc", "cluster/.x", "tests/test_x.py"),
    )
    for name in ours + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    application_files = runpy.run_path(str(ROOT / "setup.py"))["application_files"]
    assert application_files(tmp_path) == [Path(name) for name in ours]


def test_documents_point_to_files_that_exist() -> None:
    missing = [
        f"{document.relative_to(ROOT)}: {target}"
        for document in documents()
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
        if not (document.parent / target).exists()
    ]
    assert missing == []


def documents() -> list[Path]:
    """Markdown files of the project itself."""
    folders = ("orchestrator", "actors", "jobs", "cluster", "tests")
    return sorted([*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*.md"))])


def test_make_targets_named_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pattern = re.compile(r"`(?:\w+=\S+ )?make ([a-z-]+)")
    named = {target for document in documents() for target in pattern.findall(document.read_text())}
    assert named - targets == set()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what tools/venv reads, in a directory of its own."""
    for name in ("pyproject.toml", "constraints.txt", "setup.py", "tools"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    return tmp_path


def run_tool(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True, timeout=60)


def fake_python(directory: Path, version: str) -> Path:
    """An interpreter that says it is `version` and can do nothing."""
    python = directory / "python3"
    python.parent.mkdir(exist_ok=True)
    python.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo \'Python {version}\'\n[ "$1" = --version ]\n')
    python.chmod(0o755)
    return python


def test_an_old_python_is_refused_in_one_sentence(checkout: Path) -> None:
    old = fake_python(checkout / "old", "3.9.2")
    refused = run_tool(checkout, "tools/venv", "demo", PYTHON=str(old))
    assert refused.returncode == 1
    assert "is no Python 3.11 or newer (Python 3.9.2)" in refused.stderr
    assert not (checkout / ".venv").exists()


def test_an_old_python3_on_the_path_is_named_with_what_to_do(checkout: Path) -> None:
    old = fake_python(checkout / "old", "3.9.2")
    for tool in ("sh", "dirname", "cat", "cksum", "head", "id", "sed", "grep", "tr"):
        found = shutil.which(tool)
        assert found
        (old.parent / tool).symlink_to(found)
    refused = run_tool(checkout, "tools/venv", "demo", PATH=str(old.parent))
    assert refused.returncode == 1
    assert "Python 3.11 or newer is needed, and here is Python 3.9.2." in refused.stderr
    assert "apt install python3.11" in refused.stderr


def test_an_installed_environment_is_left_alone(checkout: Path) -> None:
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/bin/false")
    (checkout / ".venv" / "installed").write_text(f"{stamp(checkout)}\ndemo\ntest\n")
    assert run_tool(checkout, "tools/venv", "demo,test").returncode == 0


@pytest.mark.parametrize("change", ["pyproject.toml", "constraints.txt", "setup.py"])
def test_an_environment_is_renewed_when_the_declared_packages_change(checkout: Path, change: str) -> None:
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/bin/false")
    (checkout / ".venv" / "installed").write_text(f"{stamp(checkout)}\ndemo\n")
    with (checkout / change).open("a") as file:
        file.write("# changed\n")
    renewed = run_tool(checkout, "tools/venv", "demo", PYTHON=str(fake_python(checkout / "old", "3.9.2")))
    assert renewed.returncode == 1
    assert "Python 3.11" in renewed.stderr


def stamp(checkout: Path) -> str:
    """The first line of .venv/installed, as tools/venv writes it."""
    shell = "{ pwd -P; echo .venv; cat pyproject.toml constraints.txt setup.py; } | cksum"
    return run_tool(checkout, "sh", "-c", shell).stdout.strip()


def test_a_missing_tool_is_named_with_the_command_that_installs_it(checkout: Path) -> None:
    tools = checkout / "bin"
    tools.mkdir()
    for tool in ("sh", "id"):
        found = shutil.which(tool)
        assert found
        (tools / tool).symlink_to(found)
    done = run_tool(checkout, "tools/needs", "strace", "chromium", PATH=str(tools))
    assert done.returncode == 1
    assert "MISSING: strace. Install it: apt-get install strace" in done.stderr
    assert "MISSING: Chromium. Install it: apt-get install chromium" in done.stderr
    assert "Nothing was tested." in done.stderr


def test_make_without_arguments_is_the_demo() -> None:
    first = next(line for line in (ROOT / "Makefile").read_text().splitlines() if re.match(r"^[a-z]+:", line))
    assert first == "demo:"


def test_no_registry_is_named() -> None:
    """Which registry packages come from is the business of the machine's pip configuration."""
    files = [ROOT / name for name in ("Makefile", ".ci/run", "constraints.txt", "pyproject.toml", "tools/venv")]
    pattern = re.compile(r"https?://|index-url|find-links", re.IGNORECASE)
    assert [str(file.relative_to(ROOT)) for file in files if pattern.search(file.read_text())] == []
