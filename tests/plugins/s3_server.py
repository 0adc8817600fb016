"""A server that speaks S3 on the loopback (moto's), and fails when it is told to."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from orchestrator.backends.storage import Storage


class S3Server:
    """Speaks S3 on the loopback. `fault` may be set any time: it is asked at each request by method and path."""

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.port = self._server.server_port
        self.fault: Callable[[str, str], str] = lambda method, path: ""
        self.faults: list[str] = []
        self.over = threading.Event()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def options(self) -> str:
        """What a URL needs after its `?`."""
        return f"scheme=http&endpoint_override=127.0.0.1:{self.port}&region=us-east-1"

    def bucket(self, title: str) -> str:
        """Makes one of its own for each title."""
        name = f"bucket-{hashlib.sha256(title.encode()).hexdigest()[:12]}"
        url = f"s3://key:secret@{name}/?{self.options}&allow_bucket_creation=true"
        Storage(url)._files._filesystem.create_dir(name)  # type: ignore[attr-defined]
        return name

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        environ["HTTP_HOST"] = "s3.amazonaws.com"  # moto chooses the service by it
        fault = self.fault(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if fault:
            self.faults.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        if fault == "stall":
            self.over.wait(300)
        if fault == "500":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        return self._moto(environ, start_response)

    def close(self) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
