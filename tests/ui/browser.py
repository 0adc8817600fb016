"""A headless Chromium, driven over its DevTools protocol: open a page, wait for a text, set a cookie."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


class TextMissing(AssertionError):
    """A page did not show what it should within its time; says what it showed."""

    def __init__(self, url: str, wanted: str, shown: str) -> None:
        super().__init__(url, wanted, shown)

    def __str__(self) -> str:
        url, wanted, shown = self.args
        return f"{url} never showed {wanted!r}. It shows:\n{shown[:4000]}"


class Browser:
    """One browser with a profile of its own. `with Browser() as browser: browser.text(url, wanted="…")`."""

    def __init__(self) -> None:
        program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
        if program is None:
            raise FileNotFoundError(f"none of {', '.join(PROGRAMS)} is installed; apt-get install chromium")
        self._profile = Path(tempfile.mkdtemp(prefix="orcb-"))
        command = [program, "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={self._profile}"]
        command += [
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--no-proxy-server",
            "--window-size=1400,1000",
        ]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to run as root with it
        self._process = subprocess.Popen(
            [*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def text(self, url: str, *, wanted: str, cookies: dict[str, str] | None = None, timeout: float = 60) -> str:
        """The visible text of a page, as soon as it contains `wanted`."""
        return asyncio.run(self._text(url, wanted, cookies or {}, timeout))

    async def _text(self, url: str, wanted: str, cookies: dict[str, str], timeout: float) -> str:
        deadline = time.monotonic() + timeout
        async with aiohttp.ClientSession() as session:
            async with session.put(f"http://127.0.0.1:{self._port(deadline)}/json/new?about:blank") as answer:
                target = json.loads(await answer.text())
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = _Page(socket)
                for name, value in cookies.items():
                    await page.call("Network.setCookie", name=name, value=value, url=url)
                await page.call("Page.navigate", url=url)
                shown = ""
                while wanted not in shown:
                    if time.monotonic() > deadline:
                        raise TextMissing(url, wanted, shown)
                    await asyncio.sleep(0.2)
                    expression = "document.title + '\\n' + (document.body ? document.body.innerText : '')"
                    answer = await page.call("Runtime.evaluate", expression=expression)
                    shown = answer["result"].get("value") or ""
                await page.call("Page.close")
                return shown

    def _port(self, deadline: float) -> int:
        file = self._profile / "DevToolsActivePort"
        while not (file.exists() and file.read_text().strip()):
            assert self._process.poll() is None, f"the browser ended with {self._process.returncode}"
            assert time.monotonic() < deadline, "the browser did not start"
            time.sleep(0.05)
        return int(file.read_text().split()[0])

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)


class _Page:
    """Calls to one page, answered in order."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)

    async def call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=30)
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
