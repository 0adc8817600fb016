"""Can run directories be written there? Only local paths are looked at; a remote one answers when it is opened."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from orchestrator.config.names import did_you_mean
from orchestrator.config.redaction import redact_url
from orchestrator.errors import ConfigError

SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
BUCKETS = {"s3": "bucket", "gs": "bucket", "gcs": "bucket", "abfs": "container", "abfss": "container"}
"""Storages whose URL names one of these first."""
_KEY = "storage.url"


def storage_location(url: str) -> str:
    """The URL as it means the same everywhere: local paths absolute, `~` expanded; "" and remote URLs as they are."""
    if not url or _scheme(url) not in ("", "file"):
        return url
    path = unquote(urlsplit(url).path) if _scheme(url) else url
    return os.path.abspath(os.path.expanduser(path))


def check_storage(url: str) -> None:
    """Raises ConfigError for a scheme that nobody knows, a URL without its bucket or with a slash too few, and for a
    local path that cannot be created or written."""
    scheme = _scheme(url)
    if scheme and scheme not in SCHEMES:
        hint = did_you_mean(f"{scheme}://", [f"{known}://" for known in SCHEMES])
        raise ConfigError(
            _KEY,
            redact_url(url),
            f"there is no storage of the kind {scheme}://.",
            hint or f"Known: {', '.join(SCHEMES)}.",
        )
    if scheme in BUCKETS and not urlsplit(url).netloc:
        what = BUCKETS[scheme]
        raise ConfigError(_KEY, redact_url(url), f"it names no {what}.", f"Write {scheme}://{what}/path.")
    if (begins := url.partition(":/")[0].lower()) in SCHEMES and not scheme:
        why = f"{begins}: is followed by one slash, so this would be a local directory of that name."
        whole = f"{begins}:/{'/' * (begins == 'file')}{url.partition(':')[2]}"
        raise ConfigError(_KEY, redact_url(url), why, f"Write {whole}.")
    if not url or scheme not in ("", "file"):
        return
    path = Path(storage_location(url))
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise ConfigError(
            _KEY, url, f"{existing} is a file, so no directory can be made there.", "Choose another directory."
        )
    try:
        # Really write: root passes every check of permissions, and mounts, quotas and full disks have none.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        what = "cannot be written" if existing == path else f"cannot be created: {existing} cannot be written"
        why = f"{path} {what} ({(error.strerror or str(error)).lower()})."
        hint = "Choose a directory of yours, or have its owner let you write there."
        raise ConfigError(_KEY, url, why, hint) from error


def _scheme(url: str) -> str:
    return url.split("://", 1)[0].lower() if "://" in url else ""
