"""Halts checkpoint saves at chosen points, in processes that Ray starts; see tests/plugins/halted_saves.py.

Python imports this file at its start where its directory is in PYTHONPATH. A process that then imports our slabs and is
a child of the raylet whose pid is in the file named like a point stops there: it says so in a file, and goes on when
the point's file is gone. The thread waits, the process can be killed and hears of its raylet's death as always.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

SLAB = "orchestrator.checkpoints.slab"


class Points:
    """What this process does at the points of a save."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._has_manifest = False
        self._raylet = str(os.getppid())
        """Of this process's start: one whose raylet died first stays where it is."""

    def of_slab(self, name: str) -> None:
        """Before a store that others see."""
        if name == "sealed":
            self._halt("seal")
        elif name == "writing":
            self._has_manifest = False  # it was another save's
            self._halt("first-file")
        elif name == "result" and self._has_manifest:
            self._halt("result")

    def of_file(self, call: str, path: str) -> None:
        """Before a change of a file."""
        if call != "replace":
            return
        if path.endswith("/MANIFEST.json"):
            self._halt("manifest")
            self._has_manifest = True
        elif "/optim/" in path:  # the model's file is there
            self._halt("second-file")

    def _halt(self, point: str) -> None:
        while self._is_meant(point):
            note = self._directory / f"{point}.{os.getpid()}.new"
            if not (reached := note.with_suffix(".reached")).exists():
                note.write_text("")
                note.rename(reached)
            time.sleep(0.01)

    def _is_meant(self, point: str) -> bool:
        try:
            return (self._directory / point).read_text() == self._raylet
        except FileNotFoundError:
            return False


class _Finder:
    """Finds the slabs' module as everybody does, and watches it once it is there."""

    def __init__(self, points: Points) -> None:
        self._points = points

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != SLAB:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        load = spec.loader.exec_module  # type: ignore[union-attr]

        def loaded(module: ModuleType) -> None:
            from orchestrator import disk

            load(module)
            module.watch(self._points.of_slab)
            disk.watch(self._points.of_file)

        spec.loader.exec_module = loaded  # type: ignore[union-attr,method-assign]
        return spec


if told := os.environ.get("ORCT_SAVE_POINTS"):
    sys.meta_path.insert(0, _Finder(Points(Path(told))))  # type: ignore[arg-type]
