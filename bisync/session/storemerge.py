"""A rollback store as the destination of a mirror: it is merged into, never made equal."""

import contextlib
import os
import stat
from collections.abc import Iterator

from bisync.core.ignore import Matcher
from bisync.core.node import Content
from bisync.core.path import STATE_DIR, STORE_DIR
from bisync.errors import UsageError
from bisync.fs import rollback
from bisync.fs.meta import kind_of
from bisync.fs.replica import Options, Replica
from bisync.fs.root import OPEN_DIR
from bisync.fs.store import Store
from bisync.fs.walk import ScanRules
from bisync.session.mirrorconfig import MirrorConfig, MirrorReport
from bisync.session.report import Listener, Met


def is_store(path: bytes) -> bool:
    """Whether a folder is a rollback store: marked as one, or directly under a root."""
    real = os.path.realpath(path)
    if not os.path.isdir(real):
        return False
    root, name = os.path.split(real)
    marker = root + b"/" + STATE_DIR + b"/replica"
    return os.path.lexists(real + b"/.store") or (name == STORE_DIR and os.path.lexists(marker))


def merge_into(
    sources: list[bytes], destination: bytes, config: MirrorConfig, listener: Listener, *, dry: bool
) -> MirrorReport:
    """Bring what the sources have and the store lacks; sizes and filters decide what is wanted.

    Nothing in the store is replaced, moved or deleted, whatever the options.

    Raises:
        UsageError: a source is not the inside of a folder, or a dry run was asked for.
    """
    if dry:
        raise UsageError("-n: a store is merged into; look with 'bisync rollback list'")
    report = MirrorReport()
    for text in sources:
        if not text.endswith(b"/"):
            raise UsageError(f"{os.fsdecode(text)}: give it with a slash behind it, as a store")

    def takes(path: bytes, info: os.stat_result) -> bool:
        is_dir = stat.S_ISDIR(info.st_mode)
        small = config.wish.max_size is None or info.st_size <= config.wish.max_size
        large = config.wish.min_size is None or info.st_size >= config.wish.min_size
        if config.filters.hides(path, is_dir=is_dir):
            return False
        if not stat.S_ISREG(info.st_mode):
            return config.wish.takes(Content(kind_of(info.st_mode)))
        return (small and large) or path.startswith(b".manifest/")

    with _store_at(os.path.realpath(destination)) as store:
        for text in sources:
            try:
                fd = os.open(text, OPEN_DIR & ~os.O_NOFOLLOW)
            except OSError as error:
                _met(report, listener, text, error.strerror or str(error))
                continue
            try:
                done = rollback.merge(store, fd, takes)
            finally:
                os.close(fd)
            report.created += done.entries
            report.bytes_sent += done.size
            report.literal_bytes += done.size
            for path, reason in done.refused:
                _met(report, listener, path, reason)
    report.finish()
    return report


def _met(report: MirrorReport, listener: Listener, path: bytes, reason: str) -> None:
    met = Met("beta", "problem", path, reason)
    if report.add(met):
        listener(met)


@contextlib.contextmanager
def _store_at(path: bytes) -> Iterator[Store]:
    """A store by its path; the engine of its root has no part in it meanwhile."""
    root, name = os.path.split(path)
    if os.path.lexists(root + b"/" + STATE_DIR + b"/replica"):
        replica = Replica(root, Options(rules=ScanRules(Matcher(()), name), store=name))
        try:
            yield replica.store
        finally:
            replica.close()
        return
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    store = Store(fd, name, os.urandom(4).hex())
    try:
        yield store
    finally:
        store.close()
        os.close(fd)
