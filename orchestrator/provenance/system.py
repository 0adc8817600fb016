"""The machine and its software: Python, packages, CUDA, host, container. Each function asks one thing."""

from __future__ import annotations

import ast
import os
import platform
import re
import socket
import sys
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

from orchestrator.backends import nvml

IMAGE, IMAGE_DIGEST = "ORC_IMAGE", "ORC_IMAGE_DIGEST"
"""Environment variables that say which image a container was made from: nothing inside of it knows."""

_ID = re.compile(r"[0-9a-f]{64}")
_ENGINES = (("docker", "docker"), ("libpod", "podman"), ("containerd", "containerd"), ("crio", "cri-o"))


def python() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "executable": sys.executable,
        "platform": platform.platform(),
    }


def packages() -> dict[str, str]:
    """Every installed distribution: name -> version; of one that is there twice, what Python would import."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        said = distribution.metadata
        name, version = said["Name"], said["Version"]
        if name and version:  # a half-removed package has neither
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    return dict(sorted(found.items()))


def host() -> dict[str, Any]:
    """Name, CPUs that this process may use, memory in bytes (of the machine, or the container's limit if less)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit()
    return {"host": socket.gethostname(), "cpus": cpus, "memory_bytes": min(memory, limit) if limit else memory}


def memory_limit(root: Path = Path("/")) -> int | None:
    """What the control group allows; None without a limit."""
    for name in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(root / name).strip()
        if text.isdecimal() and int(text) < 1 << 60:  # cgroup 1 writes a huge number for none
            return int(text)
    return None


def cuda() -> dict[str, Any]:
    """CUDA that torch was built for, cuDNN if known without loading it, and the driver; initialises nothing."""
    torch = sys.modules.get("torch")
    built = getattr(getattr(torch, "version", None), "cuda", None) if torch else _built_cuda()
    cudnn = ""
    for name in ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu11"):
        try:
            cudnn = metadata.version(name)
            break
        except metadata.PackageNotFoundError:
            continue
    found = nvml.gpus()
    values = {
        "torch": built or "",
        "cudnn": cudnn,
        "driver": found.get("driver", ""),
        "driver_cuda": found.get("cuda", ""),
        "devices": found.get("devices", []),
    }
    return {name: value for name, value in values.items() if value}


def _built_cuda() -> str:
    """`torch.version.cuda`, read from the file: importing torch takes seconds."""
    spec = util.find_spec("torch")
    if spec is None or not spec.origin:
        return ""
    for statement in ast.parse((Path(spec.origin).parent / "version.py").read_text()).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        if any(getattr(target, "id", "") == "cuda" for target in targets) and isinstance(value, ast.Constant):
            return str(value.value or "")
    return ""


def container(environ: Mapping[str, str], root: Path = Path("/")) -> dict[str, str]:
    """What can be known from inside: engine, id, orchestrator, and the image if somebody told; empty outside.

    An image's digest is known only when ORC_IMAGE_DIGEST tells, or to podman, which writes its image's id.
    """
    podman = root / "run/.containerenv"
    told = dict(re.findall(r'^(\w+)="?(.*?)"?$', _read(podman), re.MULTILINE))
    cgroup, mounts = _read(root / "proc/self/cgroup"), _read(root / "proc/self/mountinfo")
    apptainer = environ.get("APPTAINER_CONTAINER") or environ.get("SINGULARITY_CONTAINER") or ""
    engine = ""
    if podman.exists():
        engine = "podman"
    elif (root / ".dockerenv").exists():
        engine = "docker"
    elif apptainer or (root / ".singularity.d").is_dir():
        engine = "apptainer"
    else:
        engine = next((name for word, name in _ENGINES if word in cgroup), "")
    values = {
        "engine": engine,
        "id": told.get("id", "") or _container_id(cgroup, mounts),
        "image": environ.get(IMAGE, "") or told.get("image", "") or apptainer,
        "image_id": told.get("imageid", ""),
        "image_digest": environ.get(IMAGE_DIGEST, ""),
        "kubernetes": environ.get("HOSTNAME", "pod") if "KUBERNETES_SERVICE_HOST" in environ else "",
    }
    return {name: value for name, value in values.items() if value}


def _container_id(cgroup: str, mounts: str) -> str:
    """64 hex digits: in the cgroup's path, or (cgroup 2 hides it) in that of the mounted /etc/hostname."""
    lines = [line for line in cgroup.splitlines() if any(word in line for word in ("docker", "kubepods", "libpod"))]
    lines += [line for line in mounts.splitlines() if re.search(r"/(containers|sandboxes)/", line) and " /etc/" in line]
    found = (_ID.search(line) for line in lines)
    return next((match.group() for match in found if match), "")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
