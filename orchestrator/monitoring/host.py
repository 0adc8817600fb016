"""Reads this host, within the limits of the container around us if there is one, and single processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Container
from pathlib import Path

import psutil

from orchestrator.monitoring.cgroup import ControlGroup
from orchestrator.monitoring.samples import Reading

_SECTOR_BYTES = 512
"""Of /proc/diskstats, whatever the disk's own sectors are."""
_UNTOLD = (OSError, psutil.Error, NotImplementedError, RuntimeError, ValueError)
"""What psutil raises where a kernel or a sandbox does not tell."""


class Host:
    """`disk`: the directory whose disk is read. What cannot be told here is left out of the readings."""

    def __init__(self, disk: Path, root: Path = Path("/")) -> None:
        self._disk, self._root = disk, root
        self._group = ControlGroup(root)
        self._cpus = psutil.cpu_count() or 1
        self._processes: dict[int, psutil.Process] = {}

    def read(self, at: float) -> Reading:
        gauges: dict[str, float] = {}
        counters: dict[str, float] = {}
        for part in (self._read_cpu, self._read_memory, self._read_disk, self._read_network):
            with contextlib.suppress(*_UNTOLD):
                part(gauges, counters)
        return Reading(at=at, gauges=gauges, counters=counters)

    def process(self, pid: int, at: float) -> Reading | None:
        """Of one living process; None if there is none. CPU in percent of one CPU."""
        try:
            process = self._processes.get(pid) or self._processes.setdefault(pid, psutil.Process(pid))
            with process.oneshot():
                times, threads = process.cpu_times(), process.num_threads()
                rss = process.memory_info().rss
        except _UNTOLD:
            self._processes.pop(pid, None)
            return None
        gauges = {"system/process/rss_bytes": float(rss), "system/process/threads": float(threads)}
        with contextlib.suppress(*_UNTOLD):  # only of our own user's processes
            gauges["system/process/open_files"] = float(process.num_fds())
        busy = times.user + times.system
        return Reading(at=at, gauges=gauges, counters={"system/process/cpu_percent": 100 * busy})

    def forget_others(self, pids: Container[int]) -> None:
        """Other processes may get the numbers of those that ended."""
        self._processes = {pid: process for pid, process in self._processes.items() if pid in pids}

    def _read_cpu(self, gauges: dict[str, float], counters: dict[str, float]) -> None:
        gauges["system/load"] = os.getloadavg()[0]
        limited = self._group.cpu()
        if limited is not None and limited[1] < self._cpus:
            busy, cpus = limited
        else:
            times = psutil.cpu_times()  # `user` contains what guests used
            odd = (getattr(times, name, 0.0) for name in ("irq", "softirq", "steal"))
            busy, cpus = times.user + times.nice + times.system + sum(odd), self._cpus
        counters["system/cpu_percent"] = 100 * busy / cpus

    def _read_memory(self, gauges: dict[str, float], counters: dict[str, float]) -> None:
        memory = psutil.virtual_memory()
        used, total = memory.total - memory.available, memory.total
        limited = self._group.memory()
        if limited is not None and limited[1] < total:
            used, total = limited
        gauges["system/memory_used_bytes"] = float(used)
        gauges["system/memory_percent"] = 100 * used / total

    def _read_disk(self, gauges: dict[str, float], counters: dict[str, float]) -> None:
        usage = psutil.disk_usage(str(self._disk))
        gauges["system/disk_free_bytes"], gauges["system/disk_percent"] = float(usage.free), usage.percent
        device = os.stat(self._disk).st_dev
        moved = disk_bytes((self._root / "proc/diskstats").read_text(), os.major(device), os.minor(device))
        if moved is not None:
            counters["system/disk_read_bytes_per_second"] = float(moved[0])
            counters["system/disk_written_bytes_per_second"] = float(moved[1])

    def _read_network(self, gauges: dict[str, float], counters: dict[str, float]) -> None:
        cards = {name: count for name, count in psutil.net_io_counters(pernic=True).items() if name != "lo"}
        # What a bridge or a container's pair carries goes through a real card, too, and must not count twice.
        real = [name for name in cards if (self._root / "sys/class/net" / name / "device").exists()] or list(cards)
        if real:
            counters["system/network_received_bytes_per_second"] = float(sum(cards[name].bytes_recv for name in real))
            counters["system/network_sent_bytes_per_second"] = float(sum(cards[name].bytes_sent for name in real))


def disk_bytes(diskstats: str, major: int, minor: int) -> tuple[int, int] | None:
    """Bytes read and written so far, of /proc/diskstats; None for a file system without a disk of its own."""
    for line in diskstats.splitlines():
        words = line.split()
        if len(words) > 9 and words[:2] == [str(major), str(minor)]:
            return int(words[5]) * _SECTOR_BYTES, int(words[9]) * _SECTOR_BYTES
    return None
