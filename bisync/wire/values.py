"""Schemas of the model: nodes, steps, what is agreed on. What the engine means by them is in core.

Limits are what a file system can hold, or far above what a run makes in one message.
"""

from bisync.core.conflict import ConflictKind
from bisync.core.declared import Declared, Hooks
from bisync.core.groups import Together
from bisync.core.node import ACL_NAMES, Agreed, Attributes, Content, Kind, Node
from bisync.core.plan import (
    Exchange,
    Link,
    Make,
    Move,
    Park,
    Remove,
    Replace,
    SetAttributes,
    Unlink,
    Update,
)
from bisync.core.retention import Retention
from bisync.errors import UsageError
from bisync.wire.schema import (
    Bool,
    Bytes,
    Each,
    Int,
    Maybe,
    Member,
    Name,
    NoNul,
    OneOf,
    OsText,
    Path,
    Plain,
    Record,
    Schema,
    Several,
    Table,
    Text,
    Time,
    refuse,
)

MANY = 1 << 20  # values in one list; the size of a message bounds them sooner
NUMBER = Int(0, 2**62)  # of a node, or in an archive
SIZE = Int(0)
TIME = Time()  # of a file: any that a file system has
MOMENT = Int()  # nanoseconds since 1970
DIGEST = Bytes(32, 32)
IDS = Several(NUMBER, MANY, set)
LONG_PATH = NoNul(1 << 20)
"""A path below a root, for output: directories may lie deeper than any call can reach."""
PLACE = Each((NUMBER, Name()))
PLACES = Several(PLACE, MANY, frozenset)
NAMES_OF = Table(NUMBER, PLACES, MANY)
AT = Table(PLACE, NUMBER, MANY)
CHILDREN = Table(NUMBER, Several(Each((Name(), NUMBER)), MANY, list), MANY)
REASON = Text(4096)
REASONS = Table(NUMBER, REASON, MANY)

_ID = Int(0, 2**32 - 1)  # of a user or group
_XATTRS = Several(Each((NoNul(255, 1), Bytes(1 << 16))), 4096)


class _AclName:
    """One of the two attributes that ACLs are kept in."""

    def pack(self, value: bytes) -> Plain:
        """As it is."""
        return value

    def unpack(self, plain: Plain) -> bytes:
        """As it is, if it is one."""
        if type(plain) is not bytes or plain not in ACL_NAMES:
            refuse("an ACL that is none")
        return plain


_ACL = Several(Each((_AclName(), Bytes(1 << 16))), len(ACL_NAMES))
_KIND = Member(Kind)

CONTENT = Record(
    Content, kind=_KIND, size=SIZE, digest=Maybe(DIGEST), target=NoNul(4096), rdev=Int(0)
)
ATTRIBUTES = Record(
    Attributes,
    mode=Int(0, 0o7777),
    uid=_ID,
    gid=_ID,
    mtime_ns=TIME,
    xattrs=_XATTRS,
    acl=_ACL,
)
NODE = Record(
    Node,
    id=NUMBER,
    content=CONTENT,
    attributes=ATTRIBUTES,
    ctime_ns=TIME,
    version=Int(-1),
    foreign=Bool(),
    nlink=Int(0),
)
NODES = Table(NUMBER, NODE, MANY)
_PAIR = Each((Maybe(NUMBER), Maybe(NUMBER)))
_ATTRIBUTES_OF_BOTH = Each((Maybe(ATTRIBUTES), Maybe(ATTRIBUTES)))
VERSIONS = Each((Int(-1), Int(-1)))
AGREED = Record(
    Agreed,
    id=NUMBER,
    content=CONTENT,
    attributes=_ATTRIBUTES_OF_BOTH,
    ids=_PAIR,
    versions=VERSIONS,
    presumed=Bool(),
)

KEY = Int()  # archive numbers; what is not agreed on yet has one below zero
_STEP: dict[str, Schema] = {"key": KEY, "node": NUMBER, "reason": REASON}
_REMOVE = Record(
    Remove,
    **_STEP,
    place=PLACE,
    members=Several(Each((KEY, NUMBER)), MANY),
    conflict=Bool(),
)
_NEW: dict[str, Schema] = {"content": CONTENT, "attributes": ATTRIBUTES, "source": Maybe(NUMBER)}
STEP = OneOf(
    {
        1: Record(Make, **_STEP, **_NEW, place=PLACE, displaces=Maybe(_REMOVE)),
        2: Record(Link, **_STEP, place=PLACE, displaces=Maybe(_REMOVE)),
        3: Record(Move, **_STEP, old=Maybe(PLACE), new=PLACE, displaces=Maybe(_REMOVE)),
        4: Record(Exchange, **_STEP, old=PLACE, new=PLACE, other=NUMBER, other_key=KEY),
        5: Record(Park, **_STEP, old=PLACE),
        6: Record(
            Replace,
            **_STEP,
            **_NEW,
            places=Several(PLACE, 1 << 16),
            conflict=Bool(),
            keep=Maybe(PLACE),
            keep_node=NUMBER,
            keep_key=KEY,
        ),
        7: Record(Unlink, **_STEP, place=PLACE),
        8: _REMOVE,
        9: Record(SetAttributes, **_STEP, attributes=ATTRIBUTES, successor=Maybe(KEY)),
    }
)
UPDATE = Record(
    Update,
    key=NUMBER,
    names=PLACES,
    content=Maybe(CONTENT),
    ids=_PAIR,
    attributes=_ATTRIBUTES_OF_BOTH,
    presumed=Bool(),
)
TOGETHER = Record(
    Together,
    keys=Several(KEY, MANY, frozenset),
    source=Several(NUMBER, MANY),
    there=Several(NUMBER, MANY),
    top=Maybe(NUMBER),
)
RETENTION = Record(Retention, days=Maybe(Int(0)), every_s=Maybe(Int(0)), recent=Int(0, 1 << 20))
CONFLICT_KIND = Member(ConflictKind)


class _Milliseconds:
    """A duration in seconds; on the wire there are no fractions."""

    def pack(self, value: float) -> Plain:
        """In milliseconds."""
        return max(1, round(value * 1000))

    def unpack(self, plain: Plain) -> float:
        """From milliseconds, up to a day."""
        return Int(1, 86_400_000).unpack(plain) / 1000


class _Checked:
    """A record that judges its own values."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def pack(self, value: object) -> Plain:
        """As the record."""
        return self._record.pack(value)

    def unpack(self, plain: Plain) -> object:
        """As the record, if it takes its values."""
        try:
            return self._record.unpack(plain)
        except UsageError as error:
            refuse(str(error))


DECLARED = _Checked(
    Record(
        Declared,
        path=Path(),
        stamp=Maybe(Path()),
        last=Maybe(Path()),
        left_out=Several(OsText(), 1024),
        hooks=Maybe(
            _Checked(
                Record(
                    Hooks,
                    freeze=OsText(1 << 16),
                    thaw=OsText(1 << 16),
                    read_from=Maybe(Bytes(4096)),
                    limit_s=_Milliseconds(),
                    root=Maybe(Bytes(4096)),
                )
            )
        ),
    )
)
