"""Bit rot: files whose content changed although nothing says that anybody wrote to them."""

import contextlib
import os
import random
import tempfile
from collections.abc import Iterator

from msgspec import Struct, field

from bisync.core.filters import Filters
from bisync.core.method import Apply
from bisync.core.node import Kind, NodeId
from bisync.core.past import Past
from bisync.core.path import STORE_DIR
from bisync.core.wish import Wish
from bisync.errors import BusyError, PathError, UsageError
from bisync.fs.archive import is_presumed
from bisync.fs.materialise import Builder, Origin
from bisync.session.history import Retrospect, looking_back
from bisync.session.mirror import mirror_at
from bisync.session.mirrorconfig import MirrorConfig
from bisync.session.mirrorplace import MirrorPlace
from bisync.session.report import Listener, Met, Progress


class Verified(Struct):
    """What a check found. Paths are below the root."""

    checked: int = 0
    size: int = 0  # bytes read
    unread: int = 0  # files whose content nobody knew; it is known now
    skipped: int = 0  # written since the last run, or being written
    rotten: list[bytes] = field(default_factory=list)
    repaired: list[bytes] = field(default_factory=list)
    lost: list[bytes] = field(default_factory=list)  # rotten, and intact nowhere
    problems: list[Met] = field(default_factory=list)


def verify(
    root: str | bytes | os.PathLike[str],
    peer: str | bytes | os.PathLike[str] | None = None,
    *,
    sample: float = 1.0,
    repair: bool = False,
    seed: int | None = None,
    state_dir: str | None = None,
    listener: Listener = lambda _event: None,
) -> Verified:
    """Read the files of a root and compare them with what is known of them.

    Args:
        root: the root.
        peer: another root of the pair, to repair from; those that are known and can be reached
            are asked in any case.
        sample: the share of the files to read, chosen at random.
        repair: bring intact content back from a peer or a store; the rotten one is kept.

    Raises:
        UsageError: it is no root, was never synchronised, or ``peer`` is no folder.
    """
    chance = random.Random(seed)  # noqa: S311 - a sample, no secret
    out = Verified()
    with looking_back(root, state_dir=state_dir) as past:
        if peer is not None:
            place = os.path.realpath(os.fsencode(peer))
            if not os.path.isdir(place):
                raise UsageError(f"{os.fsdecode(place)}: no directory; give a root of the pair")
            past.places.insert(1, Origin(place, STORE_DIR))
        rotten: list[tuple[bytes, Past]] = []
        for node in list(_files(past, chance, sample)):
            _check(past, node, out, rotten)
            listener(Progress("read", out.checked, out.size))
        past.replica.database.commit()
        if not repair:
            return out
        with tempfile.TemporaryDirectory(prefix="bisync-repair-") as text:
            folder = os.fsencode(text)
            intact = _intact(past, rotten, folder, out)
            top = past.path
            past.replica.close()
            for path, copy in intact:
                _put(top, path, copy, out, state_dir)
    return out


def _files(past: Retrospect, chance: random.Random, sample: float) -> Iterator[NodeId]:
    rows = past.replica.database.execute(
        "SELECT id FROM node WHERE kind=? ORDER BY id", (int(Kind.FILE),)
    ).fetchall()
    for (node,) in rows:
        if sample >= 1.0 or chance.random() < sample:
            yield node


def _check(past: Retrospect, node: NodeId, out: Verified, rotten: list[tuple[bytes, Past]]) -> None:
    index = past.replica.index
    row, path = index.node(node), index.path(node)
    if row is None or path is None:
        return
    try:
        version = past.replica.contents.look_at_content(node)
    except BusyError:
        out.skipped += 1
        return
    except PathError as error:
        if not past.replica.contents.is_as_observed(node):
            out.skipped += 1  # written to since: the next run sees to it
        else:
            out.problems.append(Met("", "problem", path, error.reason))
        return
    out.checked += 1
    out.size += version.size
    if row.content.digest is None:
        out.unread += 1
        past.replica.database.begin()
        index.set_digest(node, row.version, version.size, version.digest)
        if is_presumed(past.replica.database, node):
            index.mark(node)  # the next run compares it with what the other side has
    elif version.digest != row.content.digest:
        out.rotten.append(path)
        rotten.append((path, Past(frozenset(), row.content, row.attributes)))


def _intact(
    past: Retrospect, rotten: list[tuple[bytes, Past]], folder: bytes, out: Verified
) -> list[tuple[bytes, bytes]]:
    """Copies of the contents that are intact somewhere, as (path, copy)."""
    builder = Builder(past.places, {})
    found = []
    for number, (path, wanted) in enumerate(rotten):
        os.mkdir(folder + b"/%d" % number)
        copy = folder + b"/%d/" % number + path.rpartition(b"/")[2]
        builder.make([path], wanted, copy)
        if os.path.lexists(copy):
            found.append((path, copy))
    out.lost += builder.incomplete
    builder.finish()
    return found


def _put(top: bytes, path: bytes, copy: bytes, out: Verified, state_dir: str | None) -> None:
    root = os.geteuid() == 0
    wish = Wish(
        times=True, perms=True, owner=root, group=root, acls=True, xattrs=True, checksum=True,
        umask=0, user=os.geteuid(), user_group=os.getegid(),
    )  # fmt: skip
    try:
        config = MirrorConfig(
            wish=wish, filters=Filters(), state_dir=state_dir, apply=Apply.REPLACE
        )
        place = MirrorPlace(top, path.rpartition(b"/")[0])
        report = mirror_at([copy], place, config, lambda _event: None)
    except PathError as error:
        out.problems.append(Met("", "problem", path, error.reason))
        return
    if report.exit_code == 0:
        out.repaired.append(path)
    else:
        out.problems += report.met
    with contextlib.suppress(FileNotFoundError):
        os.unlink(copy)
