"""The state database of one replica: SQLite in write-ahead mode, every commit durable."""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bisync.errors import EndpointError, NoSpaceError, StateFormatError

FORMAT = 4  # of state.db; a newer one is refused, an older one migrated
_CACHE_KIB = 24 * 1024  # bounds memory, whatever the size of the tree

_DEAD = frozenset({  # what a file system says when it can say nothing
    errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ESHUTDOWN,
    errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO, errno.EUCLEAN,
    errno.ENOMEM, errno.EMFILE, errno.ENFILE,
})  # fmt: skip

COMPANION = "substr(name, -4)=x'2d77616c' OR substr(name, -8)=x'2d6a6f75726e616c'"
"""A file name that ends in ``-wal`` or ``-journal``."""

SCHEMA = (
    """
CREATE TABLE IF NOT EXISTS meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS node(
    id INTEGER PRIMARY KEY, kind INTEGER NOT NULL, handle BLOB NOT NULL, ino INTEGER NOT NULL,
    size INTEGER NOT NULL, rdev INTEGER NOT NULL, digest BLOB, target BLOB NOT NULL,
    mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL, mtime INTEGER NOT NULL,
    ctime INTEGER NOT NULL, xattrs TEXT, version INTEGER NOT NULL, nlink INTEGER NOT NULL,
    foreigners INTEGER NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS node_handle ON node(handle);
CREATE TABLE IF NOT EXISTS name(
    parent INTEGER NOT NULL, name BLOB NOT NULL, node INTEGER NOT NULL, stamp BLOB NOT NULL,
    PRIMARY KEY(parent, name)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS name_node ON name(node);
CREATE INDEX IF NOT EXISTS name_companion ON name(parent, name) WHERE """
    + COMPANION
    + """;
CREATE TABLE IF NOT EXISTS mark(
    seq INTEGER PRIMARY KEY AUTOINCREMENT, node INTEGER NOT NULL, pair INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS forgotten(node INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS pair(
    id INTEGER PRIMARY KEY, peer TEXT NOT NULL UNIQUE, side INTEGER NOT NULL,
    location TEXT NOT NULL, identity TEXT NOT NULL, number INTEGER NOT NULL,
    nonce TEXT NOT NULL, predecessor TEXT NOT NULL, digest BLOB NOT NULL,
    entries INTEGER NOT NULL, next_key INTEGER NOT NULL, cursor INTEGER,
    incarnation TEXT NOT NULL, complete_ns INTEGER);
CREATE TABLE IF NOT EXISTS chain(
    pair INTEGER NOT NULL, number INTEGER NOT NULL, nonce TEXT NOT NULL,
    PRIMARY KEY(pair, number)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS agreed(
    pair INTEGER NOT NULL, key INTEGER NOT NULL, node0 INTEGER, node1 INTEGER,
    kind INTEGER NOT NULL, size INTEGER NOT NULL, rdev INTEGER NOT NULL, digest BLOB,
    target BLOB NOT NULL, attributes0 TEXT, attributes1 TEXT, version0 INTEGER NOT NULL,
    version1 INTEGER NOT NULL, presumed INTEGER NOT NULL, PRIMARY KEY(pair, key)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS agreed_node0 ON agreed(pair, node0);
CREATE INDEX IF NOT EXISTS agreed_node1 ON agreed(pair, node1);
CREATE TABLE IF NOT EXISTS agreed_name(
    pair INTEGER NOT NULL, parent INTEGER NOT NULL, name BLOB NOT NULL, key INTEGER NOT NULL,
    PRIMARY KEY(pair, parent, name)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS agreed_name_key ON agreed_name(pair, key);
CREATE TABLE IF NOT EXISTS prepared(
    pair INTEGER PRIMARY KEY, number INTEGER NOT NULL, nonce TEXT NOT NULL,
    predecessor TEXT NOT NULL, payload BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS result(
    seq INTEGER PRIMARY KEY AUTOINCREMENT, pair INTEGER NOT NULL, done INTEGER NOT NULL,
    payload TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS installed(node INTEGER PRIMARY KEY, version INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS thinned(
    path BLOB NOT NULL, kept BLOB NOT NULL, time_ns INTEGER NOT NULL, ino INTEGER NOT NULL,
    size INTEGER NOT NULL, mtime INTEGER NOT NULL, PRIMARY KEY(path, kept)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS thinned_time ON thinned(time_ns);
CREATE TABLE IF NOT EXISTS unflushed(node INTEGER PRIMARY KEY, boot TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS softened(node INTEGER PRIMARY KEY, mode INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS pending(pair INTEGER NOT NULL, node INTEGER NOT NULL,
    reason TEXT NOT NULL, PRIMARY KEY(pair, node)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS halfway(pair INTEGER NOT NULL, node INTEGER NOT NULL,
    parent INTEGER NOT NULL, name BLOB NOT NULL, PRIMARY KEY(pair, node)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS operation(
    seq INTEGER PRIMARY KEY, pair INTEGER NOT NULL, epoch INTEGER NOT NULL,
    time_ns INTEGER NOT NULL, key INTEGER NOT NULL, before TEXT, reason TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS operation_key ON operation(pair, key);
CREATE INDEX IF NOT EXISTS operation_time ON operation(time_ns);
CREATE TABLE IF NOT EXISTS source(id INTEGER PRIMARY KEY, base INTEGER NOT NULL,
    location TEXT NOT NULL, identity TEXT NOT NULL, UNIQUE(base, location));
CREATE TABLE IF NOT EXISTS memory(source INTEGER NOT NULL, handle BLOB NOT NULL,
    node INTEGER NOT NULL, ino INTEGER NOT NULL, size INTEGER NOT NULL, mtime INTEGER NOT NULL,
    ctime INTEGER NOT NULL, version INTEGER NOT NULL, digest BLOB,
    PRIMARY KEY(source, handle)) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS memory_node ON memory(source, node);
CREATE TABLE IF NOT EXISTS deletion(pair INTEGER NOT NULL, side INTEGER NOT NULL,
    time_ns INTEGER NOT NULL, count INTEGER NOT NULL, entries INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS displaced(path BLOB PRIMARY KEY, payload TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS conflict(
    id TEXT PRIMARY KEY, pair INTEGER NOT NULL, time_ns INTEGER NOT NULL,
    payload TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS hot(node INTEGER PRIMARY KEY, debt_s REAL NOT NULL,
    at_ns INTEGER NOT NULL, interval_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS choice(id TEXT PRIMARY KEY, take TEXT NOT NULL) WITHOUT ROWID;
"""
)


class StateDamagedError(EndpointError):
    """The database cannot be read: the caller sets it aside and starts without state."""


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn SQLite's errors into ours, and those of a disk that does not answer.

    ``StateDamagedError`` is only a suspicion: SQLite calls a schema that it failed to *read*
    malformed too. :func:`is_sound` settles it.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:
        code, text = getattr(error, "sqlite_errorname", ""), f"{what}: {error}"
        if code.startswith(("SQLITE_FULL", "SQLITE_READONLY")):
            raise NoSpaceError(text) from error
        if code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR")):
            raise StateDamagedError(text) from error
        raise EndpointError(text) from error
    except OSError as error:
        where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else what
        text = f"{where}: {error.strerror}"
        if no_space(error):
            raise NoSpaceError(text) from error
        if error.errno in _DEAD:
            raise EndpointError(text) from error
        raise


def is_sound(path: bytes) -> bool:
    """Whether a closed database can be read from end to end.

    Raises:
        EndpointError: the disk does not let us tell.
    """
    try:
        with translated(os.fsdecode(path)):
            connection = sqlite3.connect(os.fsdecode(path), isolation_level=None)
            try:
                found = connection.execute("PRAGMA quick_check(1)").fetchone()
                connection.execute("SELECT count(*) FROM meta").fetchone()
            finally:
                connection.close()
    except StateDamagedError:
        return False
    return bool(found[0] == "ok")


class Database:
    """One connection, used by one thread at a time."""

    def __init__(self, path: bytes | None) -> None:
        """Open or make the database; ``None`` keeps it in memory (a plan changes nothing)."""
        self.path = path
        name = ":memory:" if path is None else os.fsdecode(path)
        self.connection = sqlite3.connect(name, isolation_level=None, check_same_thread=False)
        self.connection.text_factory = str
        try:
            with self.errors():
                self._open()
        except BaseException:
            self.connection.close()
            raise

    def _open(self) -> None:
        run = self.connection.execute
        # One engine per root: without the shared-memory file a full disk is an error, not SIGBUS.
        run("PRAGMA locking_mode=EXCLUSIVE")
        (found,) = run("PRAGMA user_version").fetchone()
        if found > FORMAT:
            raise StateFormatError(
                f"{os.fsdecode(self.path or b'')}: written by a newer bisync (format {found}, "
                f"this one knows {FORMAT}); use that version, nothing was touched"
            )
        run("PRAGMA journal_mode=WAL")
        run("PRAGMA synchronous=FULL")
        run("PRAGMA temp_store=MEMORY")  # nothing of anybody's tree goes elsewhere
        run(f"PRAGMA cache_size=-{_CACHE_KIB}")
        run("PRAGMA wal_autocheckpoint=4000")
        if found < FORMAT:  # what an older format lacks is nothing but tables and indexes
            run("BEGIN IMMEDIATE")
            for statement in SCHEMA.split(";"):
                if statement.strip():
                    run(statement)
            run(f"PRAGMA user_version={FORMAT}")
            run("COMMIT")
        else:
            run("SELECT count(*) FROM meta").fetchone()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Translate SQLite's errors into ours."""
        with translated(os.fsdecode(self.path or b"the state")):
            yield

    def execute(self, sql: str, values: Any = ()) -> sqlite3.Cursor:
        """Run one statement."""
        try:
            return self.connection.execute(sql, values)
        except sqlite3.Error:
            with self.errors():
                raise

    def many(self, sql: str, rows: Any) -> None:
        """Run one statement for many rows."""
        with self.errors():
            self.connection.executemany(sql, rows)

    @property
    def in_transaction(self) -> bool:
        """Whether changes wait for a commit."""
        return self.connection.in_transaction

    def begin(self) -> None:
        """Start a transaction unless one is open."""
        if not self.connection.in_transaction:
            self.execute("BEGIN")

    def commit(self) -> None:
        """Make everything since :meth:`begin` durable."""
        if self.connection.in_transaction:
            self.execute("COMMIT")

    def rollback(self) -> None:
        """Forget everything since :meth:`begin`."""
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")

    def close(self) -> None:
        """Close; what was not committed is forgotten."""
        try:
            self.rollback()
            self.connection.close()
        except sqlite3.Error as error:
            raise EndpointError(f"{os.fsdecode(self.path or b'')}: {error}") from error

    def get(self, key: str) -> Any:
        """A value of the ``meta`` table, or ``None``."""
        row = self.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        return None if row is None else row[0]

    def put(self, key: str, value: Any) -> None:
        """Set a value of the ``meta`` table."""
        self.execute("INSERT OR REPLACE INTO meta VALUES(?, ?)", (key, value))


def no_space(error: OSError) -> bool:
    """Whether an error says that a side is full or read-only as a whole."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
