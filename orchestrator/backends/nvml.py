"""What NVIDIA's driver says about the GPUs of this host. Reads only, and makes no CUDA context."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """One GPU at one moment. None: it does not tell (an old one, or one that is divided)."""

    index: int
    """As nvidia-smi counts them, whatever CUDA_VISIBLE_DEVICES says."""
    at: float
    """Monotonic seconds."""
    utilization_percent: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    power_watts: float | None = None
    energy_joules: float | None = None
    """Since the driver was loaded."""
    temperature_celsius: float | None = None
    pids: frozenset[int] = frozenset()
    """Processes that compute on it, by the host's numbers."""


class Gpus:
    """The GPUs of this host, opened once. Made by `open_gpus`."""

    def __init__(self, library: Any) -> None:
        self._nvml = library
        self._handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())]

    def read(self, at: float) -> list[GpuReading]:
        """Never raises: what a GPU does not tell now is None."""
        return [self._one(index, handle, at) for index, handle in enumerate(self._handles)]

    def close(self) -> None:
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _one(self, index: int, handle: Any, at: float) -> GpuReading:
        nvml = self._nvml
        memory = self._asked(nvml.nvmlDeviceGetMemoryInfo, handle)
        utilization = self._asked(nvml.nvmlDeviceGetUtilizationRates, handle)
        milliwatts = self._asked(nvml.nvmlDeviceGetPowerUsage, handle)
        millijoules = self._asked(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        processes = self._asked(nvml.nvmlDeviceGetComputeRunningProcesses, handle)
        return GpuReading(
            index=index,
            at=at,
            utilization_percent=None if utilization is None else float(utilization.gpu),
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            power_watts=None if milliwatts is None else milliwatts / 1e3,
            energy_joules=None if millijoules is None else millijoules / 1e3,
            temperature_celsius=self._asked(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            pids=frozenset(process.pid for process in processes or ()),
        )

    def _asked(self, question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except self._nvml.NVMLError:
            return None


def open_gpus(library: Any = None) -> Gpus | None:
    """None where there is no driver or no GPU. `library`: pynvml, or what stands for it."""
    if library is None:
        import pynvml

        library = pynvml
    try:
        library.nvmlInit()
    except library.NVMLError:  # no driver, or no GPU given to this container
        return None
    try:
        opened = Gpus(library)
        if opened.read(0.0):
            return opened
    except library.NVMLError:
        pass
    with suppress(library.NVMLError):
        library.nvmlShutdown()
    return None


def gpus() -> dict[str, Any]:
    """driver, cuda (the newest version that the driver can run) and the devices' names; empty where there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, or no GPU given to this container
        return {}
    try:
        version = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return {
            "driver": _text(pynvml.nvmlSystemGetDriverVersion()),
            "cuda": f"{version // 1000}.{version % 1000 // 10}",
            "devices": [_text(pynvml.nvmlDeviceGetName(handle)) for handle in handles],
        }
    except pynvml.NVMLError:
        return {}
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
