"""What a control group (a container, a service) may use and does use, where that is less than the host has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

_NO_LIMIT = 1 << 60
"""Version 1 writes a huge number of bytes for none."""


class ControlGroup:
    """The groups around this process, versions 1 and 2. Of several limits the tightest counts, with the use of the
    group that has it. Everything is None where there is no limit."""

    def __init__(self, root: Path = Path("/")) -> None:
        base = root / "sys/fs/cgroup"
        paths = _paths(_read(root / "proc/self/cgroup"))
        if (base / "cgroup.controllers").exists():
            self._memory = _Memory(_around(base, paths.get("", "/")), "memory.max", "memory.current", "inactive_file")
            self._cpu: _Cpu = _Cpu2(_around(base, paths.get("", "/")))
        else:
            self._memory = _Memory(
                _around(base / "memory", paths.get("memory", "/")),
                "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
            )  # fmt: skip
            self._cpu = _Cpu1(_around(base / "cpu", paths.get("cpu", "/")), base)

    def memory(self) -> tuple[int, int] | None:
        """Bytes used and bytes allowed. Cached pages of files that nobody uses count as free, as elsewhere."""
        return self._memory.read()

    def cpu(self) -> tuple[float, float] | None:
        """Seconds of CPU time used so far, and how many CPUs are allowed."""
        return self._cpu.read()


class _Memory:
    def __init__(self, groups: Iterable[Path], limit: str, usage: str, cache: str) -> None:
        self._limit, self._usage, self._cache = limit, usage, cache
        limits = [(allowed, group) for group in groups if (allowed := _number(_read(group / limit))) is not None]
        self._group = min((each for each in limits if each[0] < _NO_LIMIT), default=(0, None))[1]

    def read(self) -> tuple[int, int] | None:
        if self._group is None:
            return None
        limit, used = (_number(_read(self._group / name)) for name in (self._limit, self._usage))
        if limit is None or used is None or limit >= _NO_LIMIT:
            return None
        cached = _number(_field(_read(self._group / "memory.stat"), self._cache)) or 0
        return max(used - cached, 0), limit


class _Cpu:
    """One version's way to say it."""

    def __init__(self, groups: Iterable[Path]) -> None:
        limits = [(cpus, group) for group in groups if (cpus := self.allowed(group)) is not None]
        self._group = min(limits, default=(0.0, None))[1]

    def read(self) -> tuple[float, float] | None:
        if self._group is None:
            return None
        cpus, used = self.allowed(self._group), self.used(self._group)
        return None if cpus is None or used is None else (used, cpus)

    def allowed(self, group: Path) -> float | None:
        raise NotImplementedError

    def used(self, group: Path) -> float | None:
        raise NotImplementedError


class _Cpu2(_Cpu):
    def allowed(self, group: Path) -> float | None:
        return _quota(_read(group / "cpu.max"))

    def used(self, group: Path) -> float | None:
        microseconds = _number(_field(_read(group / "cpu.stat"), "usage_usec"))
        return None if microseconds is None else microseconds / 1e6


class _Cpu1(_Cpu):
    def __init__(self, groups: Iterable[Path], base: Path) -> None:
        self._base = base
        super().__init__(groups)

    def allowed(self, group: Path) -> float | None:
        return _quota(f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}")

    def used(self, group: Path) -> float | None:
        nanoseconds = _number(_read(self._base / "cpuacct" / group.relative_to(self._base / "cpu") / "cpuacct.usage"))
        return None if nanoseconds is None else nanoseconds / 1e9


def _paths(text: str) -> dict[str, str]:
    """Controller -> path, of /proc/self/cgroup; version 2 has one path, under ''."""
    lines = [line.split(":", 2) for line in text.splitlines()]
    return {name: line[2] for line in lines if len(line) == 3 for name in line[1].split(",")}


def _around(base: Path, path: str) -> Iterator[Path]:
    """The group and those that contain it, as far as they can be seen: in a container often only the outermost."""
    group = base / path.strip("/")
    yield from (each for each in (group, *group.parents) if each.is_relative_to(base) and each.is_dir())


def _quota(text: str) -> float | None:
    """CPUs of `quota period`, both in microseconds; `max` or -1 is no limit."""
    words = text.split()
    if len(words) != 2 or not all(word.isdecimal() for word in words) or int(words[1]) == 0:
        return None
    return int(words[0]) / int(words[1])


def _field(text: str, name: str) -> str:
    lines = (line.split() for line in text.splitlines())
    return next((words[1] for words in lines if len(words) == 2 and words[0] == name), "")


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
