"""Directories whose files are one thing together, because somebody says so.

The files of a database server belong together like those of SQLite, but no name tells. Such a
directory is taken at one instant, decided on together and applied together.
"""

from msgspec import Struct

from bisync.core.path import STATE_DIR, STORE_DIR, display, valid_name
from bisync.errors import UsageError

_LONGEST_S = 86400.0


class Hooks(Struct, frozen=True):
    """Commands of a person's that let a program hold still while its files are read.

    They are given to ``/bin/sh`` on the machine whose files are read, with the directory's path in
    ``BISYNC_GROUP``. Whatever happens, ``thaw`` is run after ``freeze``.
    """

    freeze: str = ""
    thaw: str = ""
    read_from: bytes | None = None  # a snapshot of the directory, there between the two
    limit_s: float = 30.0  # for each command, and for what is between them
    root: bytes | None = None  # the root whose files are meant; None: either

    def __post_init__(self) -> None:
        if not (self.freeze or self.read_from):
            raise UsageError("a group's thaw needs a freeze")
        if self.read_from is not None and not self.read_from.startswith(b"/"):
            raise UsageError("read-from: give a path from / on")
        if self.read_from is not None and self.root is None:
            raise UsageError("read-from needs root: of which of both roots it is a snapshot")
        if b"\0" in (self.read_from or b"") or "\0" in self.freeze + self.thaw:
            raise UsageError("a command or path cannot hold a NUL")
        if not 0 < self.limit_s <= _LONGEST_S:
            raise UsageError(f"limit: give up to {_LONGEST_S:.0f} seconds")


class Declared(Struct, frozen=True):
    """A directory that is one thing, and what proves that its copy is of one instant.

    Without ``stamp`` a copy counts if no file changed while it was taken. With it the program that
    owns the directory can recover from files of several moments, if they were taken in its order:
    ``stamp`` first, ``last`` last, and if ``stamp`` did not change meanwhile.
    """

    path: bytes  # below the root
    stamp: bytes | None = None  # a file below it
    last: bytes | None = None  # a directory below it
    left_out: tuple[str, ...] = ()  # gitignore patterns below it, of what is no content
    hooks: Hooks | None = None

    def __post_init__(self) -> None:
        if not self.path or not all(map(valid_name, self.path.split(b"/"))):
            raise UsageError("a group is a directory below the root")
        if self.path.split(b"/")[0] in (STATE_DIR, STORE_DIR):
            raise UsageError(f"{display(self.path)} is the engine's own")
        if self.last is not None and self.stamp is None:
            raise UsageError("an order needs a stamp: else all files of a group have to rest")
        for path in filter(None, (self.stamp, self.last)):
            if not all(map(valid_name, path.split(b"/"))):
                raise UsageError(f"{display(path)} is no path below the group's directory")

    @property
    def patterns(self) -> tuple[str, ...]:
        """What of it is left alone, as gitignore patterns below the root."""
        place = _escaped(self.path.decode("utf-8", "surrogateescape"))
        return tuple(_below(place, pattern) for pattern in self.left_out)


def postgresql(path: bytes, left_out: tuple[str, ...] = (), hooks: Hooks | None = None) -> Declared:
    """The data directory of a PostgreSQL server.

    Recovery begins at the checkpoint that the control file names and needs the log from there on
    ("Continuous Archiving and Point-in-Time Recovery", PostgreSQL 15, section 26.3.3): so that file
    is taken first and the log last, and no checkpoint may end in between.
    """
    return Declared(
        path,
        stamp=b"global/pg_control",
        last=b"pg_wal",
        left_out=("/postmaster.pid", "/postmaster.opts", "pg_stat_tmp/*", "pgsql_tmp*", *left_out),
        hooks=hooks,
    )


def _escaped(text: str) -> str:
    return "".join("\\" + c if c in "\\*?[ !#" else c for c in text)


def _below(place: str, pattern: str) -> str:
    """A pattern as a .gitignore in a directory would have it, for one above."""
    sign = "!" if pattern.startswith("!") else ""
    pattern = pattern[len(sign) :]
    if "/" in pattern.rstrip("/"):
        return f"{sign}/{place}/{pattern.lstrip('/')}"
    return f"{sign}/{place}/**/{pattern}"
