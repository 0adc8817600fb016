"""From readings of counters and gauges to what is recorded as `system/…`. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.backends.nvml import GpuReading

UNITS: Mapping[str, str] = {
    "system/cpu_percent": "%",
    "system/load": "",
    "system/memory_used_bytes": "bytes",
    "system/memory_percent": "%",
    "system/disk_free_bytes": "bytes",
    "system/disk_percent": "%",
    "system/disk_read_bytes_per_second": "bytes/s",
    "system/disk_written_bytes_per_second": "bytes/s",
    "system/network_received_bytes_per_second": "bytes/s",
    "system/network_sent_bytes_per_second": "bytes/s",
    "system/process/rss_bytes": "bytes",
    "system/process/cpu_percent": "%",
    "system/process/threads": "",
    "system/process/open_files": "",
    "system/gpu_N/utilization_percent": "%",
    "system/gpu_N/memory_used_bytes": "bytes",
    "system/gpu_N/memory_percent": "%",
    "system/gpu_N/power_watts": "W",
    "system/gpu_N/energy_joules": "J",
    "system/gpu_N/temperature_celsius": "°C",
}
"""Every key that is recorded, with its unit; N is the number of the GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a host or a process said at one moment. Example: Reading(at=1.0, gauges={"system/load": 0.5})."""

    at: float
    """Monotonic seconds."""
    gauges: Mapping[str, float] = field(default_factory=dict)
    """Recorded as they are."""
    counters: Mapping[str, float] = field(default_factory=dict)
    """Only grow; their growth per second is recorded, under the same key."""


def unit(key: str) -> str:
    """Example: unit("system/gpu_3/power_watts") == "W"."""
    return UNITS.get(re.sub(r"/gpu_\d+/", "/gpu_N/", key), "")


def values(now: Reading, before: Reading | None) -> dict[str, float]:
    """The gauges, and the rates of the counters since `before`. A counter that is new or began anew has none."""
    found = dict(now.gauges)
    seconds = 0.0 if before is None else now.at - before.at
    if before is None or seconds <= 0:
        return found
    for key, count in now.counters.items():
        growth = count - before.counters.get(key, float("inf"))
        if growth >= 0:
            found[key] = growth / seconds
    return found


def gpu_values(now: GpuReading, joules: float | None = None) -> dict[str, float]:
    """Of one GPU, with what a run used of it since the values before. What it cannot tell is left out."""
    prefix = f"system/gpu_{now.index}/"
    percent = None
    if now.memory_used_bytes is not None and now.memory_total_bytes:
        percent = 100 * now.memory_used_bytes / now.memory_total_bytes
    told = {
        "utilization_percent": now.utilization_percent,
        "memory_used_bytes": now.memory_used_bytes,
        "memory_percent": percent,
        "power_watts": now.power_watts,
        "energy_joules": joules,
        "temperature_celsius": now.temperature_celsius,
    }
    return {prefix + name: float(value) for name, value in told.items() if value is not None}


def energy(now: GpuReading, before: GpuReading) -> float | None:
    """Joules between two readings: by the GPU's own counter, else by its power at both ends."""
    seconds = now.at - before.at
    if seconds <= 0:
        return None
    if now.energy_joules is not None and before.energy_joules is not None and now.energy_joules >= before.energy_joules:
        return now.energy_joules - before.energy_joules
    if now.power_watts is not None and before.power_watts is not None:
        return (now.power_watts + before.power_watts) / 2 * seconds
    return None


def gpus_of(gpus: Sequence[GpuReading], pids: Collection[int]) -> list[GpuReading]:
    """Those that the processes use; all, where that cannot be told (the driver knows the host's pids, not a
    container's) or is not so yet."""
    return [gpu for gpu in gpus if gpu.pids.intersection(pids)] or list(gpus)
