"""Schemas of what a mirror speaks of: entries of the source, options, filter rules, items."""

from collections.abc import Callable
from typing import Any

from bisync.core.chmod import Chmod, ChmodStep
from bisync.core.filters import Filters, Flags, PerDirectory, Rule
from bisync.core.items import Item
from bisync.core.wildcard import Pattern
from bisync.core.wish import Seen, Wish
from bisync.errors import UsageError
from bisync.wire.schema import (
    Bool,
    Bytes,
    Int,
    Maybe,
    Name,
    NoNul,
    OneOf,
    Plain,
    Record,
    Schema,
    Several,
    Text,
    refuse,
)
from bisync.wire.values import ATTRIBUTES, CONTENT, LONG_PATH, NUMBER, SIZE, TIME

_PATTERN = NoNul(4096, 1)
_PATH = LONG_PATH
_ID = Int(0, 2**32 - 1)

_SEEN: dict[str, Schema] = {
    "key": Int(1),
    "parent": NUMBER,
    "content": CONTENT,
    "attributes": ATTRIBUTES,
    "ino": Int(0, 2**64 - 1),
    "ctime_ns": TIME,
    "group": Maybe(Int(1)),
    "handle": Bytes(256),
    "listed": Bool(),
}
SEEN = Record(Seen, name=Name(), **_SEEN)
ROOT_SEEN = Record(Seen, name=Bytes(0), **_SEEN)
ITEM = Record(
    Item,
    letters=Text(32),
    path=_PATH,
    is_dir=Bool(),
    target=Maybe(_PATH),
    linked=Maybe(_PATH),
    old_path=Maybe(_PATH),
    size=SIZE,
)


class _Made:
    """A value that is made of another one, and may refuse it."""

    def __init__(self, of: Schema, make: Callable[[Any], Any], take: Callable[[Any], Any]) -> None:
        self._of, self._make, self._take = of, make, take

    def pack(self, value: Any) -> Plain:
        """As what it is made of."""
        return self._of.pack(self._take(value))

    def unpack(self, plain: Plain) -> Any:
        """Made anew."""
        try:
            return self._make(self._of.unpack(plain))
        except (UsageError, ValueError) as error:
            refuse(str(error))


_BITS = Int(0, 0o7777)
_CHMOD = Record(
    Chmod,
    steps=Several(
        Record(ChmodStep, dirs=Bool(), files=Bool(), clear=_BITS, bits=_BITS, search=_BITS), 1024
    ),
)
_RULE = Record(
    Rule,
    include=Bool(),
    pattern=_Made(_PATTERN, Pattern, lambda pattern: pattern.text),
    at_source=Bool(),
    at_destination=Bool(),
    negated=Bool(),
    perishable=Bool(),
    prefix=_PATH,
)
_FLAGS = Record(
    Flags,
    only=Text(1),
    source=Bool(),
    destination=Bool(),
    negated=Bool(),
    perishable=Bool(),
    hide_itself=Bool(),
    no_inherit=Bool(),
    words=Bool(),
)
# What a directory's own file says is read where that file is: it never crosses.
_PER_DIRECTORY = Record(
    PerDirectory, name=_PATH, flags=_FLAGS, inherit=Bool(), rules=Several(Bool(), 0)
)
FILTERS = Record(
    Filters,
    rules=Several(OneOf({1: _RULE, 2: _PER_DIRECTORY}), 65536),
    delete_excluded=Bool(),
    separator=Bytes(1, 1),
    _dynamic=Bool(),
)
_FLAGS_OF_A_WISH = (
    "recursive", "links", "perms", "times", "dir_times", "owner", "group", "acls", "xattrs",
    "devices", "specials", "hard_links", "checksum", "update", "existing", "ignore_existing",
    "delete", "force", "inplace",
)  # fmt: skip
WISH = Record(
    Wish,
    **dict.fromkeys(_FLAGS_OF_A_WISH, Bool()),
    groups=Maybe(Several(_ID, 65536, frozenset)),
    max_size=Maybe(SIZE),
    min_size=Maybe(SIZE),
    modify_window_s=Int(0, 2**31),
    chmod=_CHMOD,
    umask=Int(0, 0o777),
    user=_ID,
    user_group=_ID,
    backup_suffix=Bytes(255),
)
