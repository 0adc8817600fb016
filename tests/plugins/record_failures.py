"""Causes failures on this machine, two gloo ranks each, and writes down what every rank left behind.

    python -m tests.plugins.record_failures [WAY …]

The ranks are started as `orc run --local` starts them; of the tracking there are only spool files. One YAML per way
goes to tests/data/failures/, where `expect` is kept if the file is there, and empty otherwise: a person fills it in,
not the code that it judges. Names of this machine are replaced. Needs root for two of the ways.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from orchestrator.config import Settings
from orchestrator.execution import local
from orchestrator.execution.run_logs import with_log
from orchestrator.execution.worker import Plan, log_path
from orchestrator.failures.classify import Evidence, RanksFailed
from orchestrator.records import RunTicket
from tests.plugins import broken_training
from tests.plugins.s3_server import S3Server

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
DATA = ROOT / "tests" / "data" / "failures"
OURS = {
    "defect_of_ours": {"checkpoints": {"a_setting_that_the_driver_should_not_send": 1}},
    "wrong_signature": {"train": "broken_training:wrong_signature"},
    "no_such_function": {"train": "broken_training:tarin"},
    "no_such_module": {"train": "broken_trainings:train"},
    "module_does_not_import": {"train": "module_with_a_wrong_import:train"},
}
"""Ways that need another plan instead of a function."""
_REFUSALS = {
    "denied": ("403 Forbidden", "AccessDenied", "Access Denied"),
    "internal": ("500 Internal Server Error", "InternalError", "We encountered an internal error. Please try again."),
    "slow": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
}
"""By bucket; as the S3 API reference words them."""
_CLONE_NEWNS, _MS_PRIVATE_RECURSIVE = 0x20000, (1 << 18) | (1 << 14)


class RefusingServer(S3Server):
    """Buckets whose name says how every request ends; the others are moto's."""

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        refusal = _REFUSALS.get(environ["PATH_INFO"].strip("/").partition("/")[0])
        if refusal is None:
            return super()._answer(environ, start_response)
        status, code, message = refusal
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]


def main(names: list[str]) -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    server = RefusingServer()
    with _small_disk() as small_disk:
        for name in names or [*broken_training.WAYS, *OURS]:
            with tempfile.TemporaryDirectory(prefix="orc-failure-") as folder:
                began = time.monotonic()
                cfg = {"way": name, "folder": folder, "small_disk": small_disk, "s3": f"127.0.0.1:{server.port}"}
                evidence = record(cfg, OURS.get(name, {}), Path(folder))
                write(name, evidence, folder)
                said = "; ".join(f"{e.rank}: {e.type}: {e.message[:80]!r}" for e in evidence) or "NOTHING FAILED"
                print(f"{name} ({time.monotonic() - began:.1f} s)  {said}", flush=True)
    server.close()


def record(cfg: dict[str, Any], other: dict[str, Any], folder: Path) -> list[Evidence]:
    """What both ranks left behind; empty if nothing failed."""
    ticket = RunTicket(run="20260101-000000-0badcafe", name="x", experiment="e", attempt=1, directory=f"{folder}/run")
    (folder / "module_with_a_wrong_import.py").write_text("from torch import a_name_that_is_not_there\n")
    settings = Settings()
    settings.resources.workers = 2
    raw: dict[str, Any] = {
        "ticket": ticket, "train": "broken_training:train", "user": cfg, "spool_directory": f"{folder}/spool",
        "spool_bytes": 1 << 24, "flush_timeout": 0.0, "seed": 1, "checkpoints": {}, "config_hash": "0",
        "code_paths": (str(folder), str(HERE.parent), str(ROOT)), "waits_for_record": False, "perf": False,
    }  # fmt: skip
    (folder / "ranks").mkdir()
    place = object.__new__(local.Locally)  # without its tracker, which needs a database
    place._closed = threading.Event()
    place._ranks = local.start_ranks(Plan(**{**raw, **other}), settings, {}, folder / "ranks")
    try:
        place._wait(())
    except RanksFailed as error:
        return [found if found.traceback else with_log(found, log_path(ticket, found.rank)) for found in error.evidence]
    finally:
        local._end(place._ranks)
    return []


def write(name: str, evidence: list[Evidence], folder: str) -> None:
    file = DATA / f"{name}.yaml"
    before = yaml.safe_load(file.read_text()) if file.exists() else {}
    ranks = [_plain(found, folder) for found in sorted(evidence, key=lambda each: each.rank)]
    first = min((rank["at"] for rank in ranks if rank.get("at")), default=0.0)
    for rank in ranks:
        if rank.get("at"):
            rank["at"] = round(1_790_000_000 + rank["at"] - first, 3)
    record = {
        "source": f"recorded: tests/plugins/broken_training.py {name}, torch {torch.__version__}",
        "expect": before.get("expect", {"kind": "", "rank": 1, "hint": "", "restart": False}),
        "ranks": ranks,
    }
    file.write_text(yaml.dump(record, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000))


def _plain(found: Evidence, folder: str) -> dict[str, Any]:
    said = {key: _told(value, folder) for key, value in asdict(found).items()}
    return {key: value for key, value in said.items() if value not in ("", None) or key == "message"}


def _told(value: Any, folder: str) -> Any:
    """Without what is of this machine only."""
    if not isinstance(value, str):
        return value
    for old, new in ((folder, "/scratch/run"), (str(HERE.parent), "/home/ada/project"), (str(ROOT), "/srv/platform"),
                     (sys.prefix, "/srv/venv"), (socket.gethostname(), "node-a")):  # fmt: skip
        value = value.replace(old, new)
    value = re.sub(r"/\S+?/lib/python3\.\d+/(?!site-packages)", "/usr/lib/python3.11/", value)
    return re.sub(r"\n *[~^]+(?=\n)", "", value)  # the markers under the lines of a traceback


@contextmanager
def _small_disk() -> Iterator[str]:
    """1 MB that only this process and its children see; "" where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0 or libc.mount(b"none", b"/", None, _MS_PRIVATE_RECURSIVE, None) != 0:
        yield ""
        return
    with tempfile.TemporaryDirectory(prefix="orc-small-") as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", folder], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)


class _Dumper(yaml.SafeDumper):
    pass


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    lines = "\n".join(line.rstrip() for line in value.expandtabs(4).splitlines())
    if "\n" not in lines:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value.strip())
    return dumper.represent_scalar("tag:yaml.org,2002:str", lines + "\n", style="|")


_Dumper.add_representer(str, _text)

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1:])
