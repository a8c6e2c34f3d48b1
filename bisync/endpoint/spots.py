"""Between a watcher, which knows directories, and the index, which knows nodes."""

from bisync.core.ignore import reserved
from bisync.core.node import Kind, NodeId
from bisync.fs.index import Index
from bisync.fs.replica import Replica
from bisync.watch.interface import Scope, Spot


def scope_of(replica: Replica, poll_s: float) -> Scope:
    """What of a root a watcher watches."""
    matcher, store = replica.options.rules.matcher, replica.options.store

    def skip(path: bytes) -> bool:
        if reserved(path, at_root=b"/" not in path) or path == store:
            return True
        return matcher.active and matcher.ignores(path, is_dir=True)

    return Scope(replica.root.path, skip, replica.folder.token_path, poll_s)


def directories_of(index: Index, spots: set[Spot]) -> set[NodeId]:
    """The directories that are meant, or the nearest above them that is known."""
    found = set[NodeId]()
    for spot in spots:
        node = index.by_handle(spot.handle) if spot.handle else None
        if node is None or node.kind is not Kind.DIR:
            found.add(index.nearest_directory(spot.path))
        elif spot.above:
            found |= {parent for parent, _ in index.places(node.id)} or {node.id}  # or the root
        else:
            found.add(node.id)
    return found
