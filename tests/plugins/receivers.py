"""Servers on the loopback that take what notifiers send, and remember it."""

from __future__ import annotations

import email
import json
import socketserver
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Received:
    path: str
    headers: Mapping[str, str]
    body: Any


@dataclass
class HttpReceiver:
    """Answers each POST with the next of `answers`, then with 200. A number is a status; an event is waited for before
    the answer, so a stalled server is one whose event nobody sets."""

    answers: list[int | threading.Event] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def __enter__(self) -> HttpReceiver:
        receiver = self

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with receiver.arrived:
                    receiver.received.append(Received(self.path, dict(self.headers), json.loads(body)))
                    answer = receiver.answers.pop(0) if receiver.answers else 200
                    receiver.arrived.notify_all()
                if isinstance(answer, threading.Event):
                    answer.wait()
                    answer = 200
                self.send_response(answer)
                if answer in (301, 302, 307):
                    self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(b"ok" if answer == 200 else b"no_service")

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def url(self, path: str = "/hook") -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}{path}"

    def wait_for(self, count: int, timeout: float = 20.0) -> list[Received]:
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.received) >= count, timeout), self.received
            return list(self.received)


@dataclass
class SmtpReceiver:
    """As much of RFC 5321 as a client needs. `refuse` is what it says to recipients instead of 250."""

    refuse: list[str] = field(default_factory=list)
    letters: list[tuple[str, list[str], Message]] = field(default_factory=list)
    """Sender and recipients of the envelope, and the letter."""

    def __enter__(self) -> SmtpReceiver:
        receiver = self

        class Talk(socketserver.StreamRequestHandler):
            def say(self, line: str) -> None:
                self.wfile.write(f"{line}\r\n".encode())

            def handle(self) -> None:
                sender, recipients = "", []
                self.say("220 here")
                while line := self.rfile.readline().decode().strip():
                    word = line.upper()
                    if word.startswith("EHLO"):
                        self.say("250-here")
                        self.say("250 8BITMIME")
                    elif word.startswith("MAIL FROM:"):
                        sender, recipients = line[10:].split(">")[0].strip("< "), []
                        self.say("250 ok")
                    elif word.startswith("RCPT TO:"):
                        said = receiver.refuse.pop(0) if receiver.refuse else "250 ok"
                        if said.startswith("250"):
                            recipients.append(line[8:].split(">")[0].strip("< "))
                        self.say(said)
                    elif word == "DATA":
                        self.say("354 go on")
                        content = b""
                        while (piece := self.rfile.readline()) not in (b".\r\n", b""):
                            content += piece[1:] if piece.startswith(b"..") else piece
                        receiver.letters.append((sender, recipients, email.message_from_bytes(content)))
                        self.say("250 taken")
                    elif word == "QUIT":
                        self.say("221 bye")
                        return
                    else:
                        self.say("250 ok")

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False
            allow_reuse_address = True

        self._server = Server(("127.0.0.1", 0), Talk)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return self._server.server_address[1]
