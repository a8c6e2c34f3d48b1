"""Directories whose files are one thing together, because somebody says so.

The files of a database server belong together like those of SQLite, but no name tells. Such a
directory is taken at one instant, decided on together and applied together.
"""

from dataclasses import dataclass

from bisync.core.path import valid_name
from bisync.errors import UsageError


@dataclass(frozen=True, slots=True)
class Declared:
    """A directory that is one thing, and what proves that its copy is of one instant.

    Without ``stamp`` a copy counts if no file changed while it was taken. With it the program that
    owns the directory can recover from files of several moments, if they were taken in its order:
    ``stamp`` first, ``last`` last, and if ``stamp`` did not change meanwhile.
    """

    path: bytes  # below the root
    stamp: bytes | None = None  # a file below it
    last: bytes | None = None  # a directory below it
    left_out: tuple[str, ...] = ()  # gitignore patterns below it, of what is no content

    def __post_init__(self) -> None:
        if not self.path or not all(map(valid_name, self.path.split(b"/"))):
            raise UsageError("a group is a directory below the root")

    @property
    def patterns(self) -> tuple[str, ...]:
        """What of it is left alone, as gitignore patterns below the root."""
        place = _escaped(self.path.decode("utf-8", "surrogateescape"))
        return tuple(f"/{place}/{pattern}" for pattern in self.left_out)


def postgresql(path: bytes) -> Declared:
    """The data directory of a PostgreSQL server.

    Recovery begins at the checkpoint that the control file names and needs the log from there on
    ("Continuous Archiving and Point-in-Time Recovery", PostgreSQL 15, section 26.3.3): so that file
    is taken first and the log last, and no checkpoint may end in between.
    """
    return Declared(
        path,
        stamp=b"global/pg_control",
        last=b"pg_wal",
        left_out=("postmaster.pid", "postmaster.opts", "pg_stat_tmp/*", "pgsql_tmp*"),
    )


def _escaped(text: str) -> str:
    return "".join("\\" + c if c in "\\*?[ !#" else c for c in text)
