"""Nothing secret in clear: not in logs, not in the database, not in a stored configuration.

A value is secret when its key looks like one (`password`, `api_key`, `hf_token` …), when it is the password of a URL,
or when it came from an environment variable whose name looks like a secret.
"""

from __future__ import annotations

import json
import logging
import re
import traceback
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "***"
"""What stands where a secret was."""

MIN_SEARCHED_CHARACTERS = 4
"""Shorter secrets are not looked for in free text: they would hit ordinary words."""

_SECRET_ANYWHERE = re.compile(
    r"password|passwd|passphrase|secret|credential|api_?key|access_?key|private_?key|signing_?key|encryption_?key|auth_?key"
    r"|webhook_?url|routing_?key|integration_?key"
)
_SECRET_LAST = {"pwd", "auth", "bearer", "webhook"}
_SECTIONS = {"webhook"}
"""`webhook: https://…` is a secret, `webhook: {url: …, on: failure}` has one inside."""
_SECRET_WHOLE = {"pass", "pgpass", "db_pass", "key_pass"}
_TEXT_TOKENS = {
    *("pad", "bos", "eos", "unk", "mask", "cls", "sep", "start", "end", "stop", "special", "image", "audio", "video"),
    *("sos", "oov", "per", "max", "min", "num", "n", "next", "last", "first", "begin", "decoder", "prompt"),
}
"""`pad_token` and the like belong to a tokenizer."""

# The scheme's length is bounded, or a megabyte of letters without `://` would take hours.
_URL_PASSWORD = re.compile(r"(?P<start>[A-Za-z][A-Za-z0-9+.\-]{0,30}://[^\s/:@'\"]*:)(?P<password>[^\s/'\"]+)(?=@)")
_NAMED_PASSWORD = re.compile(
    r"(?P<start>\b(?:password|passwd|sslpassword|api_key|apikey|access_token|token|secret)=)(?P<password>[^\s&;'\"]+)",
    re.IGNORECASE,
)


def looks_secret(name: str) -> bool:
    """Whether a key or an environment variable of that name probably holds a secret."""
    last = name.rsplit(".", 1)[-1]
    word = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", last).lower().replace("-", "_")
    parts = word.split("_")
    if _SECRET_ANYWHERE.search(word) or parts[-1] in _SECRET_LAST or word in _SECRET_WHOLE:
        return True
    return parts[-1] == "token" and not (len(parts) > 1 and parts[-2] in _TEXT_TOKENS)


def redact_url(url: str) -> str:
    """`postgresql://u:pw@h/db` -> `postgresql://u:***@h/db`; also in queries and in libpq's key=value form."""
    hide = lambda found: found["start"] + (found["password"] if _is_placeholder(found["password"]) else HIDDEN)  # noqa: E731
    return _NAMED_PASSWORD.sub(hide, _URL_PASSWORD.sub(hide, url))


def url_passwords(text: str) -> list[str]:
    """The passwords that `redact_url` hides, as written and decoded."""
    found = [match["password"] for pattern in (_URL_PASSWORD, _NAMED_PASSWORD) for match in pattern.finditer(text)]
    return [form for password in found if not _is_placeholder(password) for form in {password, unquote(password)}]


def redact_text(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without the given secrets (also where they are quoted or escaped) and without passwords in URLs."""
    for form in _spellings(secrets):
        text = text.replace(form, HIDDEN)
    return redact_url(text)


def redact(values: Mapping[str, Any], secrets: Iterable[str] = ()) -> dict[str, Any]:
    """A copy of a nested mapping in which everything secret is `***`."""
    return {str(key): redact_value(str(key), value, tuple(secrets)) for key, value in values.items()}


def redact_value(key: str, value: Any, secrets: Iterable[str] = ()) -> Any:
    """The value as it may be shown under that key."""
    if looks_secret(key) and not (key in _SECTIONS and isinstance(value, Mapping)):
        return _hide_all(value, numbers=not key.lower().endswith("token"))
    if isinstance(value, Mapping):
        return redact(value, secrets)
    if isinstance(value, list | tuple):
        return [redact_value("", item, secrets) for item in value]
    return redact_text(value, secrets) if isinstance(value, str) else value


def _hide_all(value: Any, *, numbers: bool) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _hide_all(item, numbers=numbers) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hide_all(item, numbers=numbers) for item in value]
    if value is None or isinstance(value, bool) or value == "":
        return value
    if isinstance(value, int | float):
        return HIDDEN if numbers else value
    return value if _is_placeholder(str(value)) else HIDDEN


def _is_placeholder(text: str) -> bool:
    """Already hidden, or only the name of an environment variable."""
    return text == HIDDEN or re.fullmatch(r"\$\{oc\.env:[A-Za-z_]\w*\}", text) is not None


def _spellings(secrets: Iterable[str]) -> list[str]:
    forms = set()
    for secret in secrets:
        if len(secret) >= MIN_SEARCHED_CHARACTERS:
            forms |= {secret, quote(secret, safe=""), json.dumps(secret)[1:-1], repr(secret)[1:-1]}
    return sorted(forms, key=len, reverse=True)


class SecretFilter(logging.Filter):
    """Takes secrets out of every record that passes: message, arguments, traceback, extra fields.

    Put it on handlers (a logger's filters do not see what its children log).
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._secrets = tuple(secrets)

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact_text(record.getMessage(), self._secrets), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        if record.exc_text:
            # A handler after this one would format exc_info again, with the secret.
            record.exc_text, record.exc_info = redact_text(record.exc_text, self._secrets), None
        for name, value in list(record.__dict__.items()):
            if name in ("msg", "args", "exc_text", "exc_info"):
                continue
            if isinstance(value, str | list | tuple | Mapping) and value:
                record.__dict__[name] = redact_value(name, value, self._secrets)
        return True
