"""The rollback store of a root, for people and programs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from bisync.core.ignore import Matcher
from bisync.core.path import STORE_DIR
from bisync.errors import UsageError
from bisync.fs import rollback
from bisync.fs.replica import Options, Replica
from bisync.fs.rollback import Day, Done
from bisync.fs.root import OPEN_DIR
from bisync.fs.store import Store
from bisync.fs.walk import ScanRules

Path = str | bytes | os.PathLike[str]


@contextmanager
def opened(
    root: Path, *, store: bytes = STORE_DIR, state_dir: str | None = None
) -> Iterator[Store]:
    """The store of a root; nobody else works on the root in the block.

    Raises:
        UsageError: it is no root, or was never synchronised.
        RootLockedError: an engine works on it just now.
    """
    options = Options(rules=ScanRules(Matcher(()), store), store=store, state_dir=state_dir)
    replica = Replica(os.fsencode(root), options)
    try:
        if replica.marker is None:
            raise UsageError(f"{os.fsdecode(replica.path)}: it was never synchronised")
        yield replica.store
    finally:
        replica.close()


def days(root: Path, *, store: bytes = STORE_DIR, state_dir: str | None = None) -> list[Day]:
    """The days of a root's store, the oldest first."""
    with opened(root, store=store, state_dir=state_dir) as found:
        return rollback.days(found)


def prune(
    root: Path,
    *,
    before: str | None = None,
    day: str | None = None,
    store: bytes = STORE_DIR,
    state_dir: str | None = None,
) -> Done:
    """Remove days before one (``YYYY-MM-DD``), or one day; locked ones refuse."""
    with opened(root, store=store, state_dir=state_dir) as found:
        if day is not None:
            wanted = os.fsencode(day)
            if wanted not in found.days():
                raise UsageError(f"{day}: the store has no such day")
            return rollback.prune(found, lambda name: name == wanted)
        limit = os.fsencode(before or "")
        return rollback.prune(found, lambda name: name < limit)


def lock(root: Path, *, on: bool, store: bytes = STORE_DIR, state_dir: str | None = None) -> Done:
    """Make past days immutable and today append-only, or undo that."""
    with opened(root, store=store, state_dir=state_dir) as found:
        return rollback.lock(found, on=on)


def merge(
    root: Path, other: Path, *, store: bytes = STORE_DIR, state_dir: str | None = None
) -> Done:
    """Bring what another store has and the root's own lacks.

    Raises:
        UsageError: ``other`` is no folder, or the store itself.
    """
    text = os.fsencode(other)
    try:
        fd = os.open(text, OPEN_DIR & ~os.O_NOFOLLOW)
    except OSError as error:
        raise UsageError(f"{os.fsdecode(text)}: {error.strerror}; give another store") from error
    try:
        with opened(root, store=store, state_dir=state_dir) as found:
            own = found.folder()
            try:
                same = os.path.samestat(os.fstat(own), os.fstat(fd))
            finally:
                os.close(own)
            if same:
                raise UsageError(f"{os.fsdecode(text)}: it is the root's own store")
            return rollback.merge(found, fd, lambda _path, _info: True)
    finally:
        os.close(fd)
