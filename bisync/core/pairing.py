"""Which node of the destination is which entry of the source.

By place where the memory does not object, by the memory of file handles where a name is
new (a rename at the source), by succession where a name was taken over: the old object of
a name that is nowhere else is replaced, one that lives elsewhere moves there.
"""

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct, field

from bisync.core.node import ROOT, NodeId, Place
from bisync.core.wish import Held, Seen, Wish


class Target(Protocol):
    """Lookups in the destination's index and memory."""

    def listing(self, node: NodeId) -> dict[bytes, Held]:
        """What a directory holds."""
        ...

    def remembered(self, handle: bytes) -> Held | None:
        """The node that came from a source object, if it is still there."""
        ...

    def names(self, node: NodeId) -> frozenset[Place]:
        """All names of a node."""
        ...

    def held(self, node: NodeId) -> Held:
        """One node."""
        ...


class Source(Protocol):
    """What only the source can say."""

    def handle(self, seen: Seen) -> bytes:
        """The identity of an entry's object; empty if it cannot be told."""
        ...

    def directory_inodes(self) -> set[int]:
        """The inode numbers of all directories of the source."""
        ...


class Pairs(Struct):
    """What came of it."""

    seen: dict[int, Seen] = field(default_factory=dict)  # by key; of hard links the first
    held: dict[int, Held | None] = field(default_factory=dict)  # what each is at the destination
    places: dict[int, set[Place]] = field(default_factory=dict)  # wanted names, in keys
    key_of: dict[NodeId, int] = field(default_factory=dict)
    displaced: dict[Place, Held] = field(default_factory=dict)  # what sits where another goes
    extra: dict[Place, Held] = field(default_factory=dict)  # what no entry asked for, by its place
    extra_names: dict[Place, Held] = field(default_factory=dict)  # of nodes that have others
    shared: set[int] = field(default_factory=set)  # separate files that are one at the destination
    skipped: list[tuple[Seen, str]] = field(default_factory=list)
    blocked: list[tuple[Seen, str]] = field(default_factory=list)  # with all that is in them


class Pairing:
    """Pairs a source, one directory after the other, parents first."""

    def __init__(
        self,
        wish: Wish,
        target: Target,
        source: Source,
        base: NodeId,
        may_move: Callable[[Held], bool],
    ) -> None:
        """``may_move``: whether a node of the destination may leave its name at all."""
        self.may_move = may_move
        self.wish = wish
        self.target = target
        self.source = source
        self.result = Pairs(key_of={base: ROOT})
        self.local: dict[int, NodeId | None] = {ROOT: base}  # directories by key
        self._waiting: list[tuple[Seen, Held]] = []  # files whose name was taken over

    def directory(
        self, key: int, entries: list[Seen], passed: list[bytes], *, complete: bool
    ) -> list[Seen]:
        """Pair what a directory of the source holds.

        Args:
            passed: names of what is there, but of a kind that is not carried.
            complete: everything in it was seen, so what else the destination has is extra.

        Returns:
            The directories to go on with; not those that must not be made.
        """
        node = self.local[key]
        there = {} if node is None else self.target.listing(node)
        onwards = []
        for name in passed:
            there.pop(name, None)
        for seen in entries:
            held = there.pop(seen.name, None)
            if seen.group is not None:
                self._linked(seen, held)
            elif self._place(seen, held) and seen.is_dir:
                onwards.append(seen)
        if complete and node is not None:
            for name, held in there.items():
                self.result.extra[(node, name)] = held
        return onwards

    def finish(self) -> Pairs:
        """Decide what had to wait until every entry was seen."""
        for seen, held in self._waiting:
            if held.node.id in self.result.key_of:
                self._new(seen, held)  # the old object lives on under another name
            else:
                self._pair(seen, held)
        self._waiting.clear()
        extra, self.result.extra = self.result.extra, {}
        for place, held in extra.items():
            if held.node.id not in self.result.key_of:
                self.result.extra[place] = held
            elif not held.is_dir and len(self.target.names(held.node.id)) > 1:
                self.result.extra_names[place] = held
        return self.result

    # -- one entry -----------------------------------------------------------

    def _place(self, seen: Seen, held: Held | None) -> bool:
        """Pair one entry; ``False`` if it must not be made."""
        if not self.wish.within_size(seen):
            self._beyond_size(seen, held)
            return False
        if held is not None and not seen.is_dir and self._has_links(held):
            self._note(seen, held)
            self.result.shared.add(seen.key)
            self.result.key_of[held.node.id] = seen.key
            return True
        if held is not None and held.is_dir is seen.is_dir and not self._is_taken(held):
            memory = held.memory
            stays = self.wish.keeps_newer(seen, held)  # whoever has its name at the source now
            if memory is None and not seen.is_dir and held.node.nlink > 1:
                self._waiting.append((seen, held))  # a group of the source has the first right
                return True
            if memory is None or memory.ino == seen.ino or stays:
                self._pair(seen, held)
                return True
        if held is not None and self.wish.ignore_existing:
            if seen.is_dir:
                self.result.blocked.append((seen, "something else has its name"))
            else:
                self.result.skipped.append((seen, "it exists"))
            return False
        return self._by_identity(seen, held)

    def _beyond_size(self, seen: Seen, held: Held | None) -> None:
        """What is too large or too small is left as it is; but a rename is a rename."""
        known = self._remembered(seen) if held is None and not self.wish.existing else None
        if known is not None:
            self._pair(seen, known)
        else:
            self.result.skipped.append((seen, "its size is beyond the limit"))

    def _has_links(self, held: Held) -> bool:
        """Whether a node has several names though nobody asked for hard links."""
        return (
            not self.wish.hard_links
            and not held.is_dir
            and held.node.nlink > 1
            and len(self.target.names(held.node.id)) > 1
        )

    def _by_identity(self, seen: Seen, held: Held | None) -> bool:
        known = self._remembered(seen)
        if known is not None and (held is None or known.node.id != held.node.id):
            if self.wish.existing and held is None:
                return self._refuse(seen)
            self._pair(seen, known)
            self._displace(seen, held)
            return True
        if held is not None and held.is_dir is seen.is_dir and not self._is_taken(held):
            if not seen.is_dir:
                self._waiting.append((seen, held))
                return True
            memory = held.memory
            if memory is None or memory.ino not in self.source.directory_inodes():
                self._pair(seen, held)
                return True
        if held is None and self.wish.existing:
            return self._refuse(seen)
        self._new(seen, held)
        return True

    def _refuse(self, seen: Seen) -> bool:
        self.result.skipped.append((seen, "it does not exist there"))
        return False

    def _remembered(self, seen: Seen) -> Held | None:
        """The node that came from this object, if it is free and of the same sort.

        Only where deleting is allowed: without it a renamed file stays under its old name, too.
        """
        if not self.wish.delete:
            return None
        seen.handle = seen.handle or self.source.handle(seen)
        known = self.target.remembered(seen.handle) if seen.handle else None
        if known is None or self._is_taken(known) or known.is_dir is not seen.is_dir:
            return None
        if not seen.is_dir and len(self.target.names(known.node.id)) != 1:
            return None  # one of several names: a copy is simpler than to untie them
        return known if self.may_move(known) else None

    def _is_taken(self, held: Held) -> bool:
        return held.node.id in self.result.key_of

    def _pair(self, seen: Seen, held: Held) -> None:
        self._note(seen, held)
        self.result.key_of[held.node.id] = seen.key
        if seen.is_dir:
            self.local[seen.key] = held.node.id

    def _new(self, seen: Seen, held: Held | None) -> None:
        self._note(seen, None)
        self._displace(seen, held)
        if seen.is_dir:
            self.local[seen.key] = None

    def _note(self, seen: Seen, held: Held | None) -> None:
        self.result.seen[seen.key] = seen
        self.result.held[seen.key] = held
        self.result.places.setdefault(seen.key, set()).add((seen.parent, seen.name))

    def _displace(self, seen: Seen, held: Held | None) -> None:
        if held is not None:
            self.result.displaced[(seen.parent, seen.name)] = held

    # -- hard links ----------------------------------------------------------

    def _linked(self, seen: Seen, held: Held | None) -> None:
        """One name of a group: the node of its first name serves for all."""
        first = seen.group
        assert first is not None
        if not self.wish.within_size(seen):
            self._beyond_size(seen, held)
            return
        if first not in self.result.seen:
            seen.key = first
            self._first_name(seen, held)
            return
        if self.wish.ignore_existing and held is not None:
            self.result.skipped.append((seen, "it exists"))
            return
        if self.wish.existing and held is None:
            self._refuse(seen)
            return
        self.result.places[first].add((seen.parent, seen.name))
        mine = self.result.held[first]
        if held is not None and (mine is None or held.node.id != mine.node.id):
            if mine is None and not self._is_taken(held) and not held.is_dir:
                self.result.held[first] = held
                self.result.key_of[held.node.id] = first
            else:
                self._displace(seen, held)

    def _first_name(self, seen: Seen, held: Held | None) -> None:
        if held is not None and self.wish.ignore_existing:
            self.result.skipped.append((seen, "it exists"))
        elif held is not None and not held.is_dir and not self._is_taken(held):
            self._pair(seen, held)
        elif (known := self._group_remembered(seen)) is not None:
            self._pair(seen, known)
            self._displace(seen, held)
        elif held is None and self.wish.existing:
            self._refuse(seen)
        else:
            self._new(seen, held)

    def _group_remembered(self, seen: Seen) -> Held | None:
        if not self.wish.delete:
            return None
        seen.handle = seen.handle or self.source.handle(seen)
        known = self.target.remembered(seen.handle) if seen.handle else None
        return None if known is None or known.is_dir or self._is_taken(known) else known
