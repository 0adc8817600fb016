"""What a job leaves behind in a lane's process. Each case in a process of its own, with torch."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest

PROLOGUE = """
import json, logging, os, sys, threading, warnings
import numpy as np
import torch
from orchestrator.execution.lane_cleaning import Cleaning
"""
CASE = """
code = {directory!r}
if os.fork() == 0:  # of a process that has imported torch: each case finds it as new
    os.chdir(code)
    cleaning = Cleaning(growth=64 << 20)
    told = {{}}
{body}
    print(json.dumps({{{name!r}: told}}), flush=True)
    os._exit(0)
os.wait()
"""
BODIES = {
    "state": """
        fresh = torch.randn(3).tolist(), np.random.rand(), __import__("random").random()
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_grad_enabled(False)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("medium")
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.autograd.set_detect_anomaly(True)
        torch.set_autocast_enabled("cpu", True)
        torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        np.seterr(all="raise")
        os.environ["LEFT"] = "behind"
        removed = os.environ.pop("PATH")
        sys.path.insert(0, "/nowhere")
        os.chdir("/")
        os.umask(0o111)
        warnings.simplefilter("error")
        logging.getLogger().addHandler(logging.NullHandler())
        logging.getLogger().setLevel(logging.DEBUG)
        import resource
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        before = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        told["why"] = cleaning.clean([code])
        again = torch.randn(3).tolist(), np.random.rand(), __import__("random").random()
        told["same numbers"] = fresh == again
        told["state"] = [
            str(torch.get_default_dtype()), str(torch.ones(1).device), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
            torch.get_float32_matmul_precision(), torch.get_num_threads() > 1, torch.is_anomaly_enabled(),
            torch.is_autocast_enabled("cpu"), len(torch.nn.modules.module._global_forward_hooks),
            np.geterr()["divide"], "LEFT" in os.environ, os.environ["PATH"] == removed, "/nowhere" in sys.path,
            os.getcwd() == code, os.umask(0) == 0o111, ("error", None, Warning, None, 0) in warnings.filters,
            len(logging.getLogger().handlers), logging.getLogger().level,
            resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 64,
        ]
    """,
    "modules": """
        sys.path.insert(0, code)
        import mine.model, decimal
        import orchestrator.examples
        mine.model.counter += 1
        cleaning.clean([code])
        told["there"] = [name in sys.modules for name in ("mine", "mine.model", "decimal", "orchestrator.examples")]
        sys.path.insert(0, code)
        import mine.model
        told["counter"] = mine.model.counter
    """,
    "reasons": """
        told["first"] = cleaning.clean([])
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait, name="left-behind", daemon=True)
        thread.start()
        told["thread"] = cleaning.clean([])
        stop.set(); thread.join()
        kept = torch.ones(40 << 20, dtype=torch.float64)
        told["memory"] = cleaning.clean([])
        del kept
        told["last"] = cleaning.clean([])
    """,
    "processes": """
        import subprocess, psutil
        child = subprocess.Popen(["sleep", "1000"])
        told["why"] = cleaning.clean([])
        told["living"] = [p.pid for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    """,
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each body put into `told`, in a process of its own whose user's code lies in a directory of its own."""
    script = PROLOGUE
    for name, body in BODIES.items():
        directory = tmp_path_factory.mktemp(name)
        (directory / "mine").mkdir()
        (directory / "mine" / "__init__.py").write_text("")
        (directory / "mine" / "model.py").write_text("counter = 0\n")
        indented = textwrap.indent(textwrap.dedent(body), "    ")
        script += CASE.format(name=name, directory=str(directory), body=indented)
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=100, check=False
    )
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    assert found.keys() == BODIES.keys(), done.stderr
    return found


def test_state_that_a_train_function_changes_is_put_back(told: dict[str, Any]) -> None:
    found = told["state"]
    assert found["why"] == ""
    assert found["same numbers"]
    state = ["torch.float32", "cpu", True, False, False, "highest", False, False, False, 0, "warn", False, True, False]
    assert found["state"] == [*state, True, False, False, 0, 30, False]


def test_the_users_modules_are_made_anew_and_others_stay(told: dict[str, Any]) -> None:
    found = told["modules"]
    assert found == {"there": [False, False, True, True], "counter": 0}


def test_what_cannot_be_put_back_is_a_reason_to_end_the_process(told: dict[str, Any]) -> None:
    found = told["reasons"]
    assert found["first"] == found["last"] == ""
    assert found["thread"] == "1 threads of the job run on: left-behind"
    assert found["memory"].startswith("its memory has grown by 3")


def test_processes_that_the_job_left_are_ended(told: dict[str, Any]) -> None:
    found = told["processes"]
    assert found == {"why": "", "living": []}
