"""What a mirror is asked to carry: rsync's options as values, and what follows for one entry."""

from collections.abc import Callable

from msgspec import Struct, field
from msgspec.structs import replace

from bisync.core.chmod import Chmod
from bisync.core.node import Attributes, Content, Kind, Node

_PERMISSIONS = 0o777
_SETGID = 0o2000


class Remembered(Struct, frozen=True):
    """What the destination remembers of the source of one of its nodes."""

    handle: bytes
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int
    version: int  # of the destination's node, when both were equal
    digest: bytes | None


class Seen(Struct):
    """One entry of the source, as a walk met it."""

    key: int
    parent: int  # key of its directory
    name: bytes
    content: Content
    attributes: Attributes
    ino: int
    ctime_ns: int
    group: int | None = None  # the first key of its hard-link group
    handle: bytes = b""  # read when it is needed
    listed: bool = True  # of a directory: everything in it was seen

    @property
    def kind(self) -> Kind:
        return self.content.kind

    @property
    def is_dir(self) -> bool:
        return self.content.kind is Kind.DIR


class Held(Struct, frozen=True):
    """One node of the destination."""

    node: Node
    memory: Remembered | None = None

    @property
    def is_dir(self) -> bool:
        return self.node.kind is Kind.DIR


Digest = Callable[[Seen], bytes | None]
"""Reads a file of the source; ``None`` if that cannot be done now."""


class Wish(Struct, frozen=True, kw_only=True):
    """The options of one mirror run that decide about single entries."""

    recursive: bool = False
    links: bool = False
    perms: bool = False
    times: bool = False
    dir_times: bool = True  # with times
    owner: bool = False
    group: bool = False
    groups: frozenset[int] | None = None  # those a plain user may give; None: any
    acls: bool = False
    xattrs: bool = False
    devices: bool = False
    specials: bool = False
    hard_links: bool = False
    checksum: bool = False
    update: bool = False
    existing: bool = False
    ignore_existing: bool = False
    delete: bool = False
    force: bool = False
    max_size: int | None = None
    min_size: int | None = None
    modify_window_s: int = 0
    inplace: bool = False  # a file that is written to keeps its owner
    chmod: Chmod = field(default_factory=Chmod)
    umask: int = 0o022
    user: int = 0  # who runs it
    user_group: int = 0
    backup_suffix: bytes = b""  # what is displaced stays beside its old name, with this

    # -- content -------------------------------------------------------------

    def takes(self, content: Content) -> bool:
        """Whether entries of this kind are carried at all."""
        match content.kind:
            case Kind.SYMLINK:
                return self.links
            case Kind.CHAR | Kind.BLOCK:
                return self.devices
            case Kind.FIFO | Kind.SOCKET:
                return self.specials
            case _:
                return True

    def within_size(self, seen: Seen) -> bool:
        """Whether a file's content may be transferred."""
        size = seen.content.size
        if seen.kind is not Kind.FILE:
            return True
        return (self.max_size is None or size <= self.max_size) and (
            self.min_size is None or size >= self.min_size
        )

    def needs_content(
        self, seen: Seen, held: Held, read: Digest, read_held: Callable[[Held], bytes | None]
    ) -> bool:
        """Whether a node must get the content that the source has at its place."""
        mine, theirs = held.node.content, seen.content
        if self.ignore_existing:
            return False
        if mine.kind is not theirs.kind:
            return True
        if mine.kind is not Kind.FILE:
            return replace(mine, size=0) != replace(theirs, size=0)
        if self.keeps_newer(seen, held) or not self.within_size(seen):
            return False
        if mine.size != theirs.size:
            return True
        memory = held.memory
        if self.checksum:
            return read(seen) != read_held(held)
        if memory is not None and memory.ino == seen.ino:
            return self._differs_from_memory(seen, held, memory, read)
        return not self.same_time(seen.attributes.mtime_ns, held.node.attributes.mtime_ns)

    def _differs_from_memory(
        self, seen: Seen, held: Held, memory: Remembered, read: Digest
    ) -> bool:
        if held.node.version != memory.version:
            # Written to at the destination; who restored its times is found out all the same.
            return held.node.content.digest is None or held.node.content.digest != memory.digest
        now = (seen.content.size, seen.attributes.mtime_ns)
        if now != (memory.size, memory.mtime_ns):
            return True
        if seen.ctime_ns == memory.ctime_ns or memory.digest is None:
            return False
        return read(seen) != memory.digest

    def keeps_newer(self, seen: Seen, held: Held) -> bool:
        """Whether ``--update`` leaves the destination's newer file alone."""
        window = self.modify_window_s * 1_000_000_000
        newer = held.node.attributes.mtime_ns > seen.attributes.mtime_ns + window
        return self.update and newer and held.node.kind is seen.kind is Kind.FILE

    def same_time(self, a: int, b: int) -> bool:
        """Whether two modification times count as equal; rsync's ``--modify-window``."""
        if self.modify_window_s == 0:
            return a == b
        return abs(a // 1_000_000_000 - b // 1_000_000_000) <= self.modify_window_s

    # -- attributes ----------------------------------------------------------

    def attributes(
        self, seen: Seen, held: Held | None, parent: Attributes, *, copied: bool, now_ns: int
    ) -> Attributes:
        """What an entry of the destination should have.

        Args:
            held: what is there; ``None`` for a new entry.
            parent: of its directory at the destination, whose group a new entry may inherit.
            copied: its content is new.
            now_ns: the time of a file whose time is not carried.
        """
        theirs = seen.attributes
        mine = held.node.attributes if held is not None else self._fresh(seen, parent)
        mode, uid, gid, xattrs, acl = mine.mode, mine.uid, mine.gid, mine.xattrs, mine.acl
        kept = self.inplace and held is not None and held.node.kind is seen.kind is Kind.FILE
        if copied and not kept:  # a new object, as with rsync
            fresh = self._fresh(seen, parent)
            uid, gid, xattrs, acl = fresh.uid, fresh.gid, (), ()
        if seen.kind is Kind.SYMLINK:
            mode = theirs.mode
        elif self.perms:
            mode = self.chmod.apply(theirs.mode, is_dir=seen.is_dir)
        elif held is not None and held.node.kind is not seen.kind:
            mode = self._fresh(seen, parent).mode
        times = self.times and (self.dir_times or not seen.is_dir)
        mtime = theirs.mtime_ns if times else now_ns if copied else mine.mtime_ns
        if held is not None and not copied and times and self._keeps_time(seen, held):
            mtime = mine.mtime_ns
        if self.group and (self.groups is None or theirs.gid in self.groups):
            gid = theirs.gid
        return Attributes(
            mode,
            theirs.uid if self.owner else uid,
            gid,
            mtime,
            theirs.xattrs if self.xattrs else xattrs,
            theirs.acl if self.acls else acl,
        )

    def _keeps_time(self, seen: Seen, held: Held) -> bool:
        """Content and time of a newer or too large file stay; so do times that count as equal."""
        if seen.is_dir:
            return False
        skipped = self.keeps_newer(seen, held) or not self.within_size(seen)
        differs = held.node.content.size != seen.content.size
        close = self.modify_window_s > 0 and self.same_time(
            seen.attributes.mtime_ns, held.node.attributes.mtime_ns
        )
        return (skipped and (differs or self.update)) or close

    def _fresh(self, seen: Seen, parent: Attributes) -> Attributes:
        """What a new entry gets of which nothing was asked for."""
        mode = self.chmod.apply(seen.attributes.mode, is_dir=seen.is_dir)
        mode &= _PERMISSIONS & ~self.umask
        inherits = bool(parent.mode & _SETGID)
        if inherits and seen.is_dir:
            mode |= _SETGID
        if seen.kind is Kind.SYMLINK:
            mode = seen.attributes.mode
        gid = parent.gid if inherits else self.user_group
        return Attributes(mode, self.user, gid, seen.attributes.mtime_ns)
