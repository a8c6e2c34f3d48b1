"""The conflict list of a root, for people and programs: look, and choose."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from bisync.core.ignore import Matcher
from bisync.fs.conflicts import ConflictList, Quarrel, Take
from bisync.fs.replica import Options, Replica
from bisync.fs.walk import ScanRules


@contextmanager
def conflict_list(
    root: str | bytes | os.PathLike[str], state_dir: str | None = None
) -> Iterator[ConflictList]:
    """Open the conflict list of a root; what was chosen in the block is kept.

    Raises:
        UsageError: it is no root, or it was never synchronised.
        RootLockedError: an engine works on it just now.
    """
    options = Options(rules=ScanRules(Matcher(())), state_dir=state_dir)
    replica = Replica(os.fsencode(root), options)
    try:
        found = replica.conflicts
        replica.database.begin()
        yield found
        replica.database.commit()
    finally:
        replica.close()


def conflicts(
    root: str | bytes | os.PathLike[str], *, state_dir: str | None = None
) -> list[Quarrel]:
    """The conflicts of all pairs of a root, oldest first."""
    with conflict_list(root, state_dir) as found:
        return found.rows()


def resolve(
    root: str | bytes | os.PathLike[str],
    which: str,
    take: Take,
    *,
    state_dir: str | None = None,
) -> Quarrel:
    """Choose for one conflict; the pair's next run carries it out and takes it off the list.

    Args:
        root: a root of the pair.
        which: the conflict's id or its path below the root.
        take: ``LIVE`` and ``KEPT`` are as seen from ``root`` where the conflict waits.
    """
    with conflict_list(root, state_dir) as found:
        quarrel = found.find(which)
        found.choose(quarrel, take)
        return quarrel
