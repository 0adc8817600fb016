"""What NVIDIA's driver says about the GPUs of this host. Reads only, and makes no CUDA context."""

from __future__ import annotations

from contextlib import suppress
from typing import Any


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
