"""Small files that go along with what they are for, so that nobody has to ask for them."""

from collections.abc import Sequence

from msgspec import Struct

from bisync.core.node import Kind, NodeId, Side
from bisync.errors import PathError, StaleError
from bisync.fs.archive import Archive
from bisync.fs.content import Chunk, ContentSource, Expected, Version
from bisync.fs.index import Index
from bisync.wire.frames import BULK

_MOST, _MOST_SIZE = 16, 64 << 10  # files, and bytes of them


class Inline(Struct, frozen=True):
    """A small file's version, and its bytes."""

    size: int
    digest: bytes
    writer: bool
    instant: bool
    data: bytes


def inline(source: ContentSource, files: Sequence[Expected]) -> dict[NodeId, Inline]:
    """Read a few small files, as they are now.

    What cannot be read at once, or has holes, is left out: it is asked for in its turn.
    """
    found: dict[NodeId, Inline] = {}
    if len(files) <= _MOST and sum(file.size for file in files) <= _MOST_SIZE:
        for file in files:
            data = bytearray()
            try:
                version = _read(source, file, data)
            except (PathError, OSError):
                continue
            if len(data) == version.size:
                found[file.node] = Inline(
                    version.size, version.digest, version.writer, version.instant, bytes(data)
                )
    return found


def _read(source: ContentSource, file: Expected, data: bytearray) -> Version:
    def take(chunk: Chunk) -> None:
        if chunk.data is None or len(data) + chunk.length > BULK:
            raise StaleError("not for this")
        data.extend(chunk.data)

    def restart() -> None:
        raise StaleError("it changes")

    return source.supply(file.node, take, restart, refuse_writer=file.refuse_writer)


def changed(
    source: ContentSource, index: Index, archive: Archive, due: list[NodeId]
) -> dict[NodeId, Inline]:
    """Those of a few nodes that are files whose content is news.

    What waits since an earlier run, has more names or a writer is left out.
    """
    if len(due) > _MOST:
        return {}
    sql = "SELECT node FROM pending WHERE pair=?"
    pending = {row[0] for row in index.db.execute(sql, (archive.pair,)).fetchall()}
    nodes = index.nodes(set(due) - pending)
    files = [
        Expected(node.id, node.content.size, refuse_writer=True)
        for node in nodes.values()
        if node.kind is Kind.FILE and node.nlink == 1
    ]
    side = next(side for side in Side if archive.column(side) == archive.state().column)
    keys = archive.by_side(side, nodes)
    agreed = archive.nodes(keys.values())
    known = {node: agreed[key].content.digest for node, key in keys.items() if key in agreed}
    found = inline(source, files)
    return {node: each for node, each in found.items() if known.get(node) != each.digest}
