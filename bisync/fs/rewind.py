"""Make a kept version again of which the store has only what was written over.

A reverse delta leads from its base, the version that was written over it, one version back. The
base is live, or kept whole, or made in the same way from the next one: a chain runs backwards from
what is there. What the result is, its digest decides; a block that is not right is looked for
wherever the file may have it.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from msgspec import Struct, field

from bisync.core.path import TEMP_PREFIX, display
from bisync.fs.content import Chunk, chunks_of
from bisync.fs.copying import dress_like, write_chunk
from bisync.fs.store import Store, Version
from bisync.linux.filesystem import clone

if TYPE_CHECKING:
    from bisync.delta.blocks import Blocks

log = logging.getLogger(__name__)
_BUFFER = 1 << 20  # bytes
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Kept(Struct, frozen=True):
    """A version, and the store it is in."""

    version: Version
    store: Store


class Chain(Struct, frozen=True):
    """How a version is made: deltas, the newest first, and what the first of them is laid over.

    Attributes:
        base: its content digest; ``None`` if nobody knows it.
        kept: the base, where it is kept whole.
        found: whether the base is kept, or live; else only its blocks may be somewhere.
    """

    deltas: tuple[Kept, ...]
    base: str | None
    kept: Kept | None = None
    found: bool = True


def chain_of(version: Kept, kept: Callable[[str], Sequence[Kept]], live: Container[bytes]) -> Chain:
    """How to make a version.

    Args:
        kept: gives the versions with a digest that are in the stores.
        live: digests of the contents that are in the tree.
    """
    deltas = [version]
    while True:
        last = deltas[-1].version
        back = tuple(reversed(deltas))
        if last.base is None:
            return Chain(back, None, found=False)
        if bytes.fromhex(last.base) in live:
            return Chain(back, last.base)
        there = kept(last.base)
        whole = next((each for each in there if not each.version.delta), None)
        if whole is not None:
            return Chain(back, last.base, whole)
        # A file may have had the same content twice: only what was kept later leads on.
        later = [each for each in there if each.version.time_ns > last.time_ns]
        if not later:
            return Chain(back, last.base, found=False)
        deltas.append(min(later, key=lambda each: each.version.time_ns))


def lay_back(out: int, deltas: Iterable[Kept]) -> "Blocks | None":
    """Take a file, which holds a base, back by some deltas.

    Args:
        out: open for reading and writing.

    Returns:
        The list of what it ought to be then; ``None`` if a delta is gone or damaged.
    """
    from bisync.fs.overwriting import open_delta  # noqa: PLC0415 -- loads numpy

    last = None
    for kept in deltas:
        fd = open_version(kept.store, kept.version)
        if fd < 0:
            return None
        try:
            last = open_delta(fd)
            if last is None or last.about.digest != kept.version.digest:
                return None  # damaged; or another one has its name now
            for stretch in last.stretches:
                old = memoryview(os.pread(fd, stretch.old, stretch.at))
                write_chunk(out, Chunk(stretch.offset, len(old), old))
            os.ftruncate(out, last.about.size)
        finally:
            os.close(fd)
    return None if last is None else last.blocks


def copy_into(source: int, out: int) -> None:
    """Make an empty file what another one is; blocks are shared where they can be."""
    if not clone(source, out):
        size = os.fstat(source).st_size
        for chunk in chunks_of(source, size, bytearray(_BUFFER)):
            write_chunk(out, chunk)
        os.ftruncate(out, size)


def complete(out: int, wanted: "Blocks", sources: Iterable[int]) -> bool:
    """Whether a file is what a list says, after its wrong blocks were replaced from others.

    Args:
        out: open for reading and writing, of the right size.
        sources: open files that may have a block at its place.
    """
    from bisync.delta.blocks import differing  # noqa: PLC0415 -- loads numpy
    from bisync.delta.digest import BLOCK_SIZE, block_digest  # noqa: PLC0415
    from bisync.fs.bigfile import list_blocks  # noqa: PLC0415

    listed = list_blocks(out, wanted.size, wanted)
    if listed is None:
        return False
    wrong = list(differing(listed, wanted))
    for source in sources:
        left = []
        for block in wrong:
            data = os.pread(source, wanted.length(block), block * BLOCK_SIZE)
            if block_digest(data) == wanted.prove(block):
                os.pwrite(out, data, block * BLOCK_SIZE)
            else:
                left.append(block)
        wrong = left
        if not wrong:
            break
    return not wrong


def open_version(store: Store, version: Version) -> int:
    """A kept file, open for reading; -1 if it is gone."""
    try:
        fd, name = store.open_kept(version.kept)
    except OSError:
        return -1
    try:
        return os.open(name, _READ, dir_fd=fd)
    except OSError:
        return -1
    finally:
        os.close(fd)


class Bridged(Struct):
    """What was done before some versions go."""

    needed: set[bytes] = field(default_factory=set)  # these may not go: a delta leads to them
    renamed: dict[bytes, bytes] = field(default_factory=dict)  # deltas that lead past those now


def bridge(store: Store, doomed: set[bytes]) -> Bridged:
    """Before some versions go, let the deltas that stay lead past them.

    A delta whose base is made from one that goes is written anew, with what that one has and it
    has not; the former one goes with the others. What cannot be done keeps its base here.
    """
    done = Bridged()
    by_digest: dict[str, list[Version]] = {}
    there = present(store)
    for version in there:
        if version.digest is not None:
            by_digest.setdefault(version.digest, []).append(version)
    for version in there:
        if not version.delta or version.kept in doomed:
            continue
        passed: list[Version] = []
        while True:
            step = _next(passed[-1] if passed else version, by_digest, doomed)
            if step is None or step.kept not in doomed:
                break
            if not step.delta:
                done.needed.add(step.kept)
                break
            passed.append(step)
        if passed:
            try:
                done.renamed[version.kept] = _join(store, [version, *passed])
            except OSError as error:
                log.warning("deltas-not-joined kept=%s reason=%s", display(version.kept), error)
                done.needed.update(each.kept for each in passed)
    return done


def present(store: Store) -> list[Version]:
    """The versions that are there, each under the last line that was written for its name."""
    last = {version.kept: version for version in store.versions()}
    return [version for version in last.values() if is_there(store, version)]


def is_there(store: Store, version: Version) -> bool:
    """Whether a version that a manifest tells of is still in the store."""
    info = store.look_at(version.kept)
    if info is None:
        return False
    return version.kind != "file" or version.delta or info.st_size == version.size


def _next(
    version: Version, by_digest: dict[str, list[Version]], doomed: set[bytes]
) -> Version | None:
    """What a delta's base is, or is made from, in the store; if possible something that stays.

    Only what was kept later: what is older goes first, and must not be relied on.
    """
    later = [v for v in by_digest.get(version.base or "", []) if v.time_ns > version.time_ns]
    return min(later, key=lambda v: (v.kept in doomed, v.delta, v.time_ns), default=None)


def _join(store: Store, versions: list[Version]) -> bytes:
    """Write one delta for several, durably, where the first one is; it has the first one's date.

    Raises:
        OSError: one of them cannot be read, or there is no room.
    """
    from bisync.delta.reverse import joined  # noqa: PLC0415 -- loads numpy
    from bisync.fs.overwriting import open_delta  # noqa: PLC0415

    with contextlib.ExitStack() as stack:
        deltas = []
        for version in versions:
            fd = open_version(store, version)
            if fd < 0:
                raise FileNotFoundError(errno.ENOENT, "a delta is gone", version.kept)
            stack.callback(os.close, fd)
            delta = open_delta(fd)
            if delta is None or delta.about.digest != version.digest:
                raise OSError(errno.EIO, "a delta is damaged", version.kept)
            deltas.append((delta, partial(_bytes_of, fd)))
        folder, name = store.open_kept(versions[0].kept)
        stack.callback(os.close, folder)
        temp = TEMP_PREFIX + os.urandom(16).hex().encode()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(temp, flags, 0o600, dir_fd=folder), "wb") as file:
                joined(deltas, file.write)
                file.flush()
                dress_like(folder, name, file.fileno())
                os.fsync(file.fileno())
            return store.tell_anew(folder, temp, versions[0], deltas[-1][0].about.new_digest)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temp, dir_fd=folder)
            raise


def _bytes_of(fd: int, at: int, length: int) -> bytes:
    return os.pread(fd, length, at)
