"""One object as a node: what it is now, and whether it is the one that was known."""

import os

from msgspec.structs import replace

from bisync.core.node import Content, Kind, Node
from bisync.fs.index import Index
from bisync.fs.meta import attributes_of, read_xattrs
from bisync.fs.root import Root
from bisync.linux.handle import is_guess


def observe(
    index: Index,
    fd: int,
    name: bytes,
    kind: Kind,
    info: os.stat_result,
    old: Node | None,
    *,
    proven: bool,
) -> Node:
    """What is at a name now.

    Args:
        old: the node that it was known as, if it was.
        proven: that node has this very name: what its times say did not change did not.
    """
    same = (
        proven
        and old is not None
        and old.content.size == (info.st_size if kind is Kind.FILE else 0)
        and old.attributes.mtime_ns == info.st_mtime_ns
        and old.ctime_ns == info.st_ctime_ns
    )
    if same and old is not None:
        xattrs, acl = old.attributes.xattrs, old.attributes.acl
    else:
        xattrs, acl = read_xattrs(fd, name)
    attributes = attributes_of(info, xattrs, acl)
    version = old.version if old is not None else 1
    foreign = old.foreign if old is not None else False
    match kind:
        case Kind.FILE if same and old is not None:
            content = old.content
        case Kind.FILE:
            content = Content(kind, size=info.st_size)
            version = version + 1 if old is not None else 1
        case Kind.SYMLINK:
            content = Content(kind, target=os.readlink(name, dir_fd=fd))
        case Kind.CHAR | Kind.BLOCK:
            content = Content(kind, rdev=info.st_rdev)
        case _:
            content = Content(kind)
    node = old.id if old is not None else index.new_node()
    nlink = 1 if kind is Kind.DIR else info.st_nlink
    return Node(node, content, attributes, info.st_ctime_ns, version, foreign, nlink)


def differs(old: Node, node: Node) -> bool:
    """Whether anything a pair could care about changed; a ctime alone is not that."""
    return replace(old, ctime_ns=0, nlink=0) != replace(node, ctime_ns=0, nlink=0)


def known_as(
    root: Root, index: Index, handle: bytes, kind: Kind, info: os.stat_result, here: int | None
) -> Node | None:
    """The node that an object was known as.

    A handle that had to be guessed (an inode number, perhaps a time of birth) may be another
    object's by now, or at the same time: then that one loses it.

    Args:
        here: the node that had this name.
    """
    old = index.by_handle(handle)
    if old is None or (old.kind is kind and (old.id == here or not is_guess(handle))):
        return old
    if old.kind is kind and not _is_another(root, index, handle, old, info):
        return old
    index.disown(old.id)
    return None


def _is_another(root: Root, index: Index, handle: bytes, old: Node, info: os.stat_result) -> bool:
    """Whether an object cannot be the one that is known under other names."""
    if old.kind is Kind.FILE:
        seen = (old.content.size, old.attributes.mtime_ns)
        if seen != (info.st_size, info.st_mtime_ns):
            return True
        if info.st_nlink > 1:
            return False  # it may well have several names
    for place in index.places(old.id):
        try:
            if root.handles.read(root.fd, index.place_path(place)) == handle:
                return True  # it is still there
        except OSError:
            continue
    return False
