"""Where one rank runs. Each rank says it once, as a fact of its own; the store puts them together under `ranks`."""

from __future__ import annotations

import logging
import os
import socket
import sys
from typing import Any

from orchestrator.backends import nvml

logger = logging.getLogger(__name__)


def of_rank(rank: int, *, device: str = "", node: str = "") -> dict[str, Any]:
    """The data of the rank's provenance fact: host, pid, node, device, CUDA and driver. Never raises.

    `device` as torch writes it (`cuda:0`). To be called when torch is imported and the device is in use: asking for
    its name would initialise CUDA.
    """
    values: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "node": node, "device": device}
    if device.startswith("cuda"):
        try:
            torch = sys.modules["torch"]
            values["device_name"] = torch.cuda.get_device_name(device)
            values["cuda"] = torch.version.cuda
            values["cudnn"] = str(torch.backends.cudnn.version())
            values["driver"] = nvml.gpus().get("driver", "")
        except Exception:
            logger.warning("what the device %s is could not be asked", device, exc_info=True)
    return {"ranks": {str(rank): {name: value for name, value in values.items() if value}}}
