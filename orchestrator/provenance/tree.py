"""Which files belong to the source: git's answer inside a repository, else a walk that respects .gitignore files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from orchestrator.errors import OrchestratorError
from orchestrator.provenance.git import GitFailed, Listed, Repository
from orchestrator.provenance.ignore import IgnoreFile, is_ignored, parse

MOST_ENTRIES = 50_000
"""Names that a walk outside of git looks at; a directory with more of them is no project."""

SKIPPED_DIRECTORIES = frozenset({
    *("__pycache__", "node_modules", "site-packages", "__pypackages__", "lost+found"),
    *(".git", ".hg", ".svn", ".tox", ".nox", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"),
    *(".ipynb_checkpoints", ".ssh", ".aws", ".gnupg", ".kube", ".docker", ".azure", ".config", ".cache", ".local"),
})  # fmt: skip
"""Never source, whatever a .gitignore says; tracked files in them are taken all the same."""

_SECRET_NAMES = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pgpass", ".my.cnf", ".npmrc", ".pypirc", ".htpasswd"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk", "*.tfstate", "*.tfvars"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", ".git-credentials", ".dockercfg", ".databrickscfg", ".boto"),
    *(".s3cfg", "kubeconfig", "*.kubeconfig", "credentials", "*credentials*.json", "client_secret*.json"),
    *("service-account*.json", "service_account*.json", "secret.*", "secrets.*", ".secrets*", ".vault-token"),
    *("api_token", "auth_token", "ray_token"),
)
_NO_SECRETS = ("*.example", "*.sample", "*.template", "*.dist", "*.pub", "*.py")
_SECRET_DIRECTORIES = frozenset({".ssh", ".aws", ".gnupg", ".kube", ".docker", ".azure"})


class NotSource(OrchestratorError):
    """A directory that is not archived as a whole."""

    def __init__(self, directory: str, why: str) -> None:
        super().__init__(directory, why)
        self.directory, self.why = directory, why

    def __str__(self) -> str:
        return f"{self.directory} {self.why}; start the run in the project's own directory to have its source archived."


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The files of one root, in order."""

    root: Path
    prefix: str
    """What their names begin with in an archive; empty for the first root."""
    files: tuple[Listed, ...]


def is_secret_file(path: str) -> bool:
    """Whether a file of that name probably holds keys or passwords. Example: `conf/.env.local`, `id_ed25519`."""
    parts = PurePosixPath(path.lower()).parts
    if not parts:
        return False
    if _SECRET_DIRECTORIES.intersection(parts[:-1]):
        return True
    name = parts[-1]
    return not _matches(name, _NO_SECRETS) and _matches(name, _SECRET_NAMES)


def trees(
    code_paths: Sequence[Path], *, environ: Mapping[str, str], outside: Sequence[Path] = (), exclude: Sequence[str] = ()
) -> list[Tree]:
    """One for each root; code paths that lie in an earlier root, or belong to the interpreter, add none.

    `outside` are directories that are never source, such as those that hold the results of runs; `exclude` are
    patterns as in a .gitignore. Raises NotSource or GitFailed.
    """
    found: list[Tree] = []
    hidden = tuple(Path(os.path.realpath(path)) for path in outside)
    for path in dict.fromkeys(Path(os.path.realpath(path)) for path in code_paths):
        if not path.is_dir() or (found and _is_interpreters(path)) or any(path.is_relative_to(t.root) for t in found):
            continue
        root, files = _listed(path, environ, hidden)
        kept = _without(exclude, (f for f in files if not any((root / f.path).is_relative_to(h) for h in hidden)))
        found.append(Tree(root=root, prefix=_prefix(root, found), files=tuple(kept)))
    return found


def _prefix(root: Path, before: Sequence[Tree]) -> str:
    if not before:
        return ""
    taken = {tree.prefix for tree in before}
    name = f"@{root.name}/"
    return name if name not in taken else f"@{root.name}-{len(before)}/"


def _listed(directory: Path, environ: Mapping[str, str], hidden: Sequence[Path]) -> tuple[Path, list[Listed]]:
    """The root and what is in it: the whole repository, unless that is somebody's home."""
    repository = Repository.around(directory, environ)
    home = _home(environ)
    if repository is not None:
        if not _holds(repository.root, home):
            return repository.root, _plausible(repository.root, repository.files())
        # A home directory under git, or a container whose work directory is the home: only what was added on purpose.
        if repository.root == directory:
            return directory, [listed for listed in repository.files() if listed.is_tracked]
        repository = Repository(directory, environ)
        return directory, _plausible(directory, repository.files())
    if _holds(directory, home):
        raise NotSource(str(directory), "is or contains your home directory and is no git repository")
    return directory, list(_walk(directory, hidden))


def _holds(directory: Path, home: Path | None) -> bool:
    return directory == Path(directory.anchor) or (home is not None and home.is_relative_to(directory))


def _home(environ: Mapping[str, str]) -> Path | None:
    home = environ.get("HOME", "")
    return Path(os.path.realpath(home)) if home and home != "/" else None


def _plausible(root: Path, files: Iterable[Listed]) -> list[Listed]:
    """Untracked files in directories that are never source are left away."""
    environments: dict[str, bool] = {}
    return [f for f in files if f.is_tracked or not _in_skipped_directory(root, f.path, environments)]


def _in_skipped_directory(root: Path, path: str, environments: dict[str, bool]) -> bool:
    parts = path.split("/")[:-1]
    if SKIPPED_DIRECTORIES.intersection(parts):
        return True
    for count in range(1, len(parts) + 1):
        directory = "/".join(parts[:count])
        if directory not in environments:
            environments[directory] = _is_environment(root / directory)
        if environments[directory]:
            return True
    return False


def _is_environment(directory: Path) -> bool:
    """A virtual or conda environment."""
    return (directory / "pyvenv.cfg").exists() or (directory / "conda-meta").is_dir()


def _is_interpreters(path: Path) -> bool:
    """Whether a path is where Python, its packages or its commands are."""
    import sys
    import sysconfig

    places = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib", "scripts")}
    if sys.prefix != sys.base_prefix:
        places.add(sys.prefix)
    places.add(os.path.dirname(sys.executable))
    return any(path.is_relative_to(os.path.realpath(place)) for place in places if place) or any(
        part in ("site-packages", "dist-packages") for part in path.parts
    )


def _walk(root: Path, hidden: Sequence[Path]) -> Iterator[Listed]:
    """Files below `root` outside of git, by name, without following links. Raises NotSource when there are too many."""
    seen = 0
    waiting: list[tuple[str, tuple[IgnoreFile, ...]]] = [("", ())]
    while waiting:
        directory, rules = waiting.pop()
        try:
            entries = sorted(os.scandir(root / directory), key=lambda entry: entry.name)
        except OSError:
            continue  # not ours to read
        seen += len(entries)
        if seen > MOST_ENTRIES:
            raise NotSource(str(root), f"holds more than {MOST_ENTRIES:,} files and is no git repository")
        if any(entry.name == ".gitignore" for entry in entries):
            rules = (*rules, parse(_lines(root / directory / ".gitignore"), directory=directory))
        inner = []
        for entry in entries:
            path = f"{directory}/{entry.name}" if directory else entry.name
            if entry.is_dir(follow_symlinks=False):
                skipped = entry.name in SKIPPED_DIRECTORIES or _is_environment(root / path)
                if not (skipped or root / path in hidden or is_ignored(rules, path, is_directory=True)):
                    inner.append((path, rules))
            elif not is_ignored(rules, path, is_directory=False):
                yield Listed(path=path, is_tracked=False)
        waiting += reversed(inner)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _without(exclude: Sequence[str], files: Iterable[Listed]) -> Iterable[Listed]:
    if not exclude:
        return files
    from pathspec import GitIgnoreSpec

    spec = GitIgnoreSpec.from_lines(exclude)
    return (listed for listed in files if not spec.match_file(listed.path))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


__all__ = ["GitFailed", "Listed", "NotSource", "Tree", "is_secret_file", "trees"]
