"""The model: nodes (kind, content, attributes) and names ((parent, name) -> node)."""

from enum import IntEnum, unique
from typing import TypeAlias

from msgspec import Struct, field

NodeId: TypeAlias = int
"""A node's number: 64 bits, never reused on its replica."""

Place: TypeAlias = tuple[int, bytes]
"""(parent node, name): where a name is."""

ROOT: NodeId = 1
"""The root directory has this number on every replica and in every archive."""


@unique
class Kind(IntEnum):
    """What a node is. Stored as numbers; never renumber."""

    DIR = 1
    FILE = 2
    SYMLINK = 3
    FIFO = 4
    SOCKET = 5
    CHAR = 6
    BLOCK = 7


@unique
class Side(IntEnum):
    """One of the two endpoints of a session."""

    ALPHA = 0
    BETA = 1

    @property
    def other(self) -> "Side":
        return Side.BETA if self is Side.ALPHA else Side.ALPHA

    @property
    def label(self) -> str:
        return self.name.lower()


SIDES = (Side.ALPHA, Side.BETA)


class Content(Struct, frozen=True):
    """What a node holds, apart from its attributes.

    ``digest`` is the content digest of a regular file, or ``None`` where nobody has read
    it yet. A directory's content is its kind; its names are not part of it.
    """

    kind: Kind
    size: int = 0  # bytes, regular files only
    digest: bytes | None = None  # 32 bytes
    target: bytes = b""  # symlinks only
    rdev: int = 0  # devices only

    @property
    def known(self) -> bool:
        """Whether this value can be compared with another."""
        return self.kind is not Kind.FILE or self.digest is not None


DIRECTORY = Content(Kind.DIR)

XAttrs: TypeAlias = tuple[tuple[bytes, bytes], ...]
"""Extended attributes, sorted by name."""

ACL_NAMES = (b"system.posix_acl_access", b"system.posix_acl_default")


class Attributes(Struct, frozen=True):
    """Everything a node has beside content and names. ``None`` as a whole means unknown."""

    mode: int  # 12 permission bits
    uid: int
    gid: int
    mtime_ns: int  # since 1970 UTC
    xattrs: XAttrs = ()
    acl: XAttrs = ()  # POSIX ACLs as the kernel stores them; one unit with ``mode``


class Node(Struct, frozen=True):
    """One node as one replica last observed it."""

    id: NodeId
    content: Content
    attributes: Attributes
    ctime_ns: int = 0
    version: int = 0  # counts the times its content may have changed on its replica
    foreign: bool = False  # a directory that directly holds entries bisync leaves alone
    nlink: int = 1  # names the kernel counts, wherever they are

    @property
    def kind(self) -> Kind:
        return self.content.kind


class Agreed(Struct, frozen=True):
    """One node of the ancestor: content once, attributes as each side really holds them."""

    id: NodeId  # of the archive
    content: Content
    attributes: tuple[Attributes | None, Attributes | None]
    ids: tuple[NodeId | None, NodeId | None]  # each side's node number
    versions: tuple[int, int] = (-1, -1)  # each side's content version when agreed
    presumed: bool = False  # equal by size and mtime only; nobody read it


class Part(Struct):
    """The part of a tree that a cycle looks at. Not hashable: it grows while it is closed.

    ``names`` maps a place to its node, or to ``None`` where the place is known to be free.
    ``names_of`` has every name of each loaded node. ``gone`` are node numbers that no
    longer have a name; ``forgotten`` are those that a filter now hides. ``halfway`` are nodes
    that the engine itself put where they are, on a way that it could not finish.
    """

    nodes: dict[NodeId, Node] = field(default_factory=dict)
    names: dict[Place, NodeId | None] = field(default_factory=dict)
    names_of: dict[NodeId, frozenset[Place]] = field(default_factory=dict)
    forgotten: set[NodeId] = field(default_factory=set)
    halfway: dict[NodeId, Place] = field(default_factory=dict)


class AgreedPart(Struct):
    """The part of the ancestor that belongs to a closure."""

    nodes: dict[NodeId, Agreed] = field(default_factory=dict)
    names: dict[Place, NodeId | None] = field(default_factory=dict)
    names_of: dict[NodeId, frozenset[Place]] = field(default_factory=dict)
    by_side: tuple[dict[NodeId, NodeId | None], dict[NodeId, NodeId | None]] = field(
        default_factory=lambda: ({}, {})
    )
