"""After a crash, before the programs of a machine start: no file is half-written any more."""

import os

from bisync.core.ignore import Matcher
from bisync.core.path import STORE_DIR
from bisync.errors import EndpointError, UsageError
from bisync.fs.recovery import STORE_NAME, mend
from bisync.fs.replica import Options, Replica
from bisync.fs.torn import Mended
from bisync.fs.walk import ScanRules


def recover(
    root: str | bytes | os.PathLike[str],
    *,
    state_dir: str | None = None,
    store: bytes | None = None,
) -> Mended:
    """Make every file of a root that a crash left half-written its old or its new version.

    Every run does that first of all. This is for when no run comes before the programs that use
    the files. Nothing is read but those files.

    Args:
        root: the root.
        store: the rollback store's path below it; ``None``: that of the last run.

    Raises:
        UsageError: it is no root, or was never synchronised.
        EndpointError: its state cannot be read.
        RootLockedError: an engine works on it just now.
        HaltError: a program has such a file open for writing already.
    """
    name = STORE_DIR if store is None else store
    while True:
        options = Options(rules=ScanRules(Matcher(()), name), store=name, state_dir=state_dir)
        replica = Replica(os.fsencode(root), options)
        try:
            if replica.db is None:
                raise UsageError(f"{os.fsdecode(replica.path)}: it was never synchronised")
            if replica.damaged:
                text = f"{os.fsdecode(replica.path)}: its state cannot be read ({replica.damaged})"
                raise EndpointError(f"{text}; the next sync or mirror recovers what it can")
            used = replica.database.get(STORE_NAME)
            if store is None and used not in (None, name):
                store = name = bytes(used)
                continue
            replica.establish()
            return mend(replica)
        finally:
            replica.close()
