"""Sends a notice once: Slack, a webhook, PagerDuty, e-mail. Who tries again, and when, is alerts/service.py's business.

Nothing is followed to another address, and no more than a few bytes of an answer are read. `TIMEOUT` bounds each wait
for the network, not the whole: a server that trickles is given up by the caller.
"""

from __future__ import annotations

import http.client
import json
import smtplib
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime, parsedate_to_datetime
from typing import Any

from orchestrator.alert_records import Notice, NotSent
from orchestrator.backends import notices
from orchestrator.config.redaction import redact_text

TIMEOUT = 10.0
MOST_ANSWER_BYTES = 2000
LONGEST_WAIT = 3600.0
"""Of what a server asks us to wait."""
_LATER = (408, 425, 429)
"""Client errors that another try may mend."""


def send(kind: str, options: Mapping[str, Any], notice: Notice, *, timeout: float = TIMEOUT) -> None:
    """Raises NotSent; its text holds no secret of `options`."""
    secrets = [value for value in options.values() if isinstance(value, str) and len(value) >= 8]
    try:
        _SENDERS[kind](options, notice, timeout)
    except NotSent as error:
        raise NotSent(redact_text(error.why, secrets)[:500], error.is_final, error.wait) from None
    except (OSError, ValueError, http.client.HTTPException) as error:  # no such name, an answer that is none …
        raise NotSent(redact_text(f"{type(error).__name__}: {error}", secrets)[:500]) from None


def _slack(options: Mapping[str, Any], notice: Notice, timeout: float) -> None:
    _post(options["webhook"], notices.slack(notice, options.get("channel", "")), notice, timeout)


def _webhook(options: Mapping[str, Any], notice: Notice, timeout: float) -> None:
    token = options.get("token", "")
    more = {"Authorization": f"Bearer {token}"} if token else {}
    _post(options["url"], notices.webhook(notice), notice, timeout, more)


def _pagerduty(options: Mapping[str, Any], notice: Notice, timeout: float) -> None:
    _post(options["url"], notices.pagerduty(notice, options["routing_key"]), notice, timeout)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _post(
    url: str, body: Mapping[str, Any], notice: Notice, timeout: float, headers: Mapping[str, str] | None = None
) -> None:
    if not url.startswith(("http://", "https://")):
        raise NotSent("its address is no URL", is_final=True)
    request = urllib.request.Request(
        url,
        data=json.dumps(body, allow_nan=False, ensure_ascii=False).encode(errors="replace"),
        headers={
            "Content-Type": "application/json; charset=utf-8",
            "User-Agent": notices.SOURCE,
            "Idempotency-Key": notice.key,
            **(headers or {}),
        },
        method="POST",
    )
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=timeout) as answer:
            answer.read(MOST_ANSWER_BYTES)
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(MOST_ANSWER_BYTES).decode(errors="replace").strip()
        what = f"HTTP {error.code}" + (f": {' '.join(said.split())[:200]}" if said else "")
        raise NotSent(what, error.code < 500 and error.code not in _LATER, _asked_wait(error.headers)) from error
    except urllib.error.URLError as error:
        raise NotSent(f"no connection: {error.reason}") from error


def _asked_wait(headers: Any) -> float:
    """Of `Retry-After`: seconds or a date."""
    given = (headers.get("Retry-After") or "").strip() if headers is not None else ""
    if given.isdecimal():
        seconds = float(given)
    else:
        try:
            seconds = (parsedate_to_datetime(given) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT)


def _email(options: Mapping[str, Any], notice: Notice, timeout: float) -> None:
    try:
        _mail(options, notice, timeout)
    except smtplib.SMTPRecipientsRefused as error:
        codes = [code for code, _ in error.recipients.values()]
        raise NotSent(f"no recipient was taken: {_first(error.recipients)}", min(codes, default=500) >= 500) from error
    except smtplib.SMTPResponseException as error:
        said = error.smtp_error.decode(errors="replace") if isinstance(error.smtp_error, bytes) else error.smtp_error
        raise NotSent(f"SMTP {error.smtp_code}: {said}", error.smtp_code >= 500) from error
    except smtplib.SMTPException as error:
        raise NotSent(f"{type(error).__name__}: {error}") from error


def _first(recipients: Mapping[str, tuple[int, Any]]) -> str:
    code, said = next(iter(recipients.values()), (0, ""))
    return f"{code} {said.decode(errors='replace') if isinstance(said, bytes) else said}"


def _mail(options: Mapping[str, Any], notice: Notice, timeout: float) -> None:
    host, port, encryption = options["host"], int(options["port"]), options.get("encryption", "auto")
    context = ssl.create_default_context()
    server: smtplib.SMTP
    if encryption == "tls":
        server = smtplib.SMTP_SSL(host, port, timeout=timeout, context=context)
    else:
        server = smtplib.SMTP(host, port, timeout=timeout)
    with server:
        server.ehlo()
        if encryption == "starttls" or (encryption == "auto" and server.has_extn("starttls")):
            server.starttls(context=context)
            server.ehlo()
        if options.get("user"):
            if not isinstance(server.sock, ssl.SSLSocket) and encryption != "none":
                raise NotSent(
                    "the mail server offers no encryption, and a password is not sent in clear "
                    "(alerts.email.encryption=none does it all the same)",
                    is_final=True,
                )
            server.login(options["user"], options.get("password", ""))
        message = letter(options, notice)
        refused = server.send_message(message)
    if refused:
        raise NotSent(f"some recipients were not taken: {_first(refused)}", is_final=True)


def letter(options: Mapping[str, Any], notice: Notice) -> EmailMessage:
    """The mail. The same notice has the same Message-ID, by which mailboxes know what they have."""
    subject, text = notices.mail(notice)
    message = EmailMessage()
    message["Subject"] = subject
    message["From"] = options.get("sender") or f"orc@{socket.getfqdn()}"
    message["To"] = ", ".join(options["to"])
    message["Date"] = format_datetime(datetime.fromtimestamp(notice.at, UTC))
    message["Message-ID"] = f"<{_id(notice.key)}@{notices.SOURCE}>"
    if notice.subject != notice.key:
        message["References"] = f"<{_id(notice.subject)}@{notices.SOURCE}>"  # one thread for a firing and its end
    message["Auto-Submitted"] = "auto-generated"
    message["X-Orc-Kind"] = notice.kind
    message.set_content(text)
    return message


def _id(key: str) -> str:
    """As much of a key as may stand in a Message-ID; what may not is written as its number."""
    return "".join(each if each.isascii() and (each.isalnum() or each in "-_.") else f"={ord(each):x}" for each in key)


_SENDERS = {"slack": _slack, "webhook": _webhook, "pagerduty": _pagerduty, "email": _email}
