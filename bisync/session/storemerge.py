"""A rollback store as the destination of a mirror: it is merged into, never made equal."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator

from msgspec.structs import replace

from bisync.core.ignore import Matcher
from bisync.core.node import Content, Kind
from bisync.core.path import STATE_DIR, STORE_DIR, TEMP_PREFIX
from bisync.core.wish import Seen, Wish
from bisync.endpoint.interface import Tree
from bisync.errors import PathError, UsageError
from bisync.fs import rollback
from bisync.fs.apply import SMALL
from bisync.fs.content import Expected, read_version
from bisync.fs.copying import write_chunk
from bisync.fs.meta import apply_attributes, attributes_of, kind_of, read_xattrs
from bisync.fs.replica import Options, Replica
from bisync.fs.root import OPEN_DIR
from bisync.fs.store import Store
from bisync.fs.walk import ScanRules
from bisync.session.mirrorconfig import MirrorConfig, MirrorReport
from bisync.session.origin import Origin
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
    origin: Origin, destination: bytes, config: MirrorConfig, listener: Listener, *, dry: bool
) -> MirrorReport:
    """Bring what the sources have and the store lacks; sizes and filters decide what is wanted.

    Nothing in the store is replaced, moved or deleted, whatever the options.

    Raises:
        UsageError: a source is not the inside of a folder, or a dry run was asked for.
    """
    if dry:
        raise UsageError("-n: a store is merged into; look with 'bisync rollback list'")
    for text in origin.texts:
        if not text.endswith(b"/"):
            raise UsageError(f"{os.fsdecode(text)}: give it with a slash behind it, as a store")
    report = MirrorReport()
    problems: list[tuple[bytes, str]] = []

    def takes(path: bytes, kind: Kind, size: int) -> bool:
        if config.filters.hides(path, is_dir=kind is Kind.DIR):
            return False
        if kind is not Kind.FILE:
            return config.wish.takes(Content(kind))
        small = config.wish.max_size is None or size <= config.wish.max_size
        large = config.wish.min_size is None or size >= config.wish.min_size
        return (small and large) or path.startswith(b".manifest/")

    def takes_found(path: bytes, info: os.stat_result) -> bool:
        return takes(path, kind_of(info.st_mode), info.st_size)

    with _store_at(os.path.realpath(destination)) as store, contextlib.ExitStack() as stack:
        paths = origin.paths
        if not paths:
            paths = [stack.enter_context(_fetched(origin, destination, config, takes, problems))]
        for text in paths:
            try:
                fd = os.open(text, OPEN_DIR & ~os.O_NOFOLLOW)
            except OSError as error:
                _met(report, listener, text, error.strerror or str(error))
                continue
            try:
                done = rollback.merge(store, fd, takes_found)
            finally:
                os.close(fd)
            report.created += done.entries
            report.bytes_sent += done.size
            report.literal_bytes += done.size
            for path, reason in done.refused:
                _met(report, listener, path, reason)
        for path, reason in problems:
            _met(report, listener, path, reason)
    report.finish()
    return report


@contextlib.contextmanager
def _fetched(
    origin: Origin,
    store: bytes,
    config: MirrorConfig,
    takes: Callable[[bytes, Kind, int], bool],
    problems: list[tuple[bytes, str]],
) -> Iterator[bytes]:
    """What another machine's store has and this one seems to lack, in a folder of this machine.

    What is there already, byte by byte, need not come; a merge would find it the same.
    """
    wish = replace(
        config.wish, recursive=True, perms=True, times=True, owner=True, group=True, checksum=True
    )
    tree = origin.walk(replace(config, wish=wish))
    problems += tree.problems
    try:
        with tempfile.TemporaryDirectory(
            prefix=os.fsdecode(TEMP_PREFIX), dir=os.fsdecode(store)
        ) as name:
            folder = os.fsencode(name)
            todo: list[tuple[bytes, Seen]] = []
            hidden: set[int] = set()
            for listed in tree.listings:
                if listed.key in hidden:
                    hidden.update(seen.key for seen in listed.entries if seen.is_dir)
                    continue
                for seen in listed.entries:
                    path = listed.path + b"/" + seen.name if listed.path else seen.name
                    if not takes(path, seen.kind, seen.content.size):
                        hidden |= {seen.key} if seen.is_dir else set()
                    elif seen.is_dir:
                        os.mkdir(os.path.join(folder, path), 0o700)
                    elif not _has(os.path.join(store, path), seen, tree):
                        todo.append((path, seen))
            tree.expect(
                [
                    Expected(seen.key, seen.content.size, refuse_writer=False)
                    for _, seen in todo
                    if seen.kind is Kind.FILE and seen.content.size <= SMALL
                ]
            )
            for path, seen in todo:
                try:
                    _fetch(tree, seen, os.path.join(folder, path), config.wish)
                except PathError as error:
                    problems.append((path, error.reason))
                except OSError as error:
                    problems.append((path, error.strerror or str(error)))
            yield folder
    finally:
        tree.close()


def _has(path: bytes, seen: Seen, tree: Tree) -> bool:
    """Whether a store has an entry already."""
    try:
        info = os.lstat(path)
        if kind_of(info.st_mode) is not seen.kind:
            return False
        match seen.kind:
            case Kind.SYMLINK:
                return os.readlink(path) == seen.content.target
            case Kind.CHAR | Kind.BLOCK:
                return info.st_rdev == seen.content.rdev
            case Kind.FILE if info.st_size == seen.content.size:
                folder = os.open(os.path.dirname(path), OPEN_DIR)
                try:
                    mine = read_version(folder, os.path.basename(path)).digest
                finally:
                    os.close(folder)
                return mine == tree.digest(seen)
            case Kind.FIFO | Kind.SOCKET:
                return True
            case _:
                return False
    except (OSError, PathError):
        return False


def _fetch(tree: Tree, seen: Seen, path: bytes, wish: Wish) -> None:
    """One entry, with its attributes, in a folder that nobody else may enter."""
    content, fd = seen.content, -1
    match seen.kind:
        case Kind.SYMLINK:
            os.symlink(content.target, path)
        case Kind.FILE:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        case Kind.FIFO:
            os.mkfifo(path, 0o600)
        case Kind.SOCKET:
            os.mknod(path, stat.S_IFSOCK | 0o600)
        case Kind.CHAR | Kind.BLOCK:
            bits = stat.S_IFCHR if seen.kind is Kind.CHAR else stat.S_IFBLK
            os.mknod(path, bits | 0o600, content.rdev)
        case _:
            return
    at, name = fd, b""  # the file itself, or its name in its folder
    if fd < 0:
        at, name = os.open(os.path.dirname(path), OPEN_DIR), os.path.basename(path)
    try:
        if seen.kind is Kind.FILE:
            version = tree.supply(
                seen.key,
                lambda chunk: write_chunk(at, chunk),
                lambda: os.ftruncate(at, 0),
                refuse_writer=False,
            )
            os.ftruncate(at, version.size)
        info = os.fstat(at) if not name else os.lstat(path)
        now = attributes_of(info, *read_xattrs(at, name))
        theirs = seen.attributes
        wanted = replace(
            theirs,
            mode=wish.chmod.apply(theirs.mode, is_dir=False),
            xattrs=theirs.xattrs if wish.xattrs else (),
            acl=theirs.acl if wish.acls else (),
        )
        apply_attributes(at, name, seen.kind, now, wanted)
    finally:
        os.close(at)


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
