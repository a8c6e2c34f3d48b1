"""What one end may ask of the other: every call, with what it takes and gives."""

from msgspec import Struct

from bisync.core.method import Apply
from bisync.core.node import Place
from bisync.core.plan import Placed, Placements
from bisync.endpoint.glance import Around, Glance, Peers
from bisync.endpoint.inline import Inline
from bisync.endpoint.interface import Ending, Hello, Read
from bisync.fs.archive import Chain, Commit, Epoch, PairState
from bisync.fs.conflicts import Choice, Quarrel, Take
from bisync.fs.content import LARGEST
from bisync.fs.displaced import Probed
from bisync.fs.recovery import Recovered
from bisync.fs.result import Status
from bisync.fs.sizes import Sizes
from bisync.fs.walk import Problem, ScanResult
from bisync.watch.interface import Coverage, Spot
from bisync.wire.frames import BULK
from bisync.wire.schema import (
    Bool,
    Bytes,
    Each,
    Int,
    Maybe,
    Member,
    Name,
    OsText,
    Path,
    Record,
    Schema,
    Several,
    Table,
    Text,
)
from bisync.wire.values import (
    AGREED,
    AT,
    ATTRIBUTES,
    CHILDREN,
    DECLARED,
    IDS,
    KEY,
    LONG_PATH,
    MANY,
    MOMENT,
    NAMES_OF,
    NODES,
    NUMBER,
    PLACE,
    REASON,
    REASONS,
    RETENTION,
    SIZE,
    STEP,
    TIME,
    TOGETHER,
    UPDATE,
    VERSIONS,
)

_FULL_PATH = LONG_PATH
_COUNT = Int(0, 2**62)
_ID = Text(128)  # a replica, an incarnation, a nonce, a conflict
_PAIR = Int(1)
_COLUMN = Int(0, 1)
NOTHING = Each(())
ROWS = Bytes(20 << 20)
"""Rows of the ancestor as JSON; who takes them looks at each."""

_EPOCH = Record(Epoch, number=_COUNT, nonce=_ID, predecessor=_ID)
_PAIR_STATE = Record(
    PairState,
    pair=_PAIR,
    peer=_ID,
    column=_COLUMN,
    location=Text(),
    identity=Text(),
    epoch=_EPOCH,
    digest=Bytes(32),
    entries=_COUNT,
    cursor=Maybe(_COUNT),
    incarnation=_ID,
    complete_ns=Maybe(MOMENT),
)
HELLO = Record(
    Hello,
    path=Text(8192),
    known=Bool(),
    replica=_ID,
    incarnation=_ID,
    root=Text(),
    recorded=Text(),
    empty=Bool(),
    pairs=Several(_PAIR_STATE, 4096),
    damaged=Text(),
    became_link=Bool(),
)
_READ = Record(Read, node=NUMBER, status=Text(16), reason=REASON)
_READS = Several(_READ, MANY, list)
_PROBLEM = Record(Problem, path=_FULL_PATH, reason=REASON, kind=Text(16))
_SCANNED = Record(
    ScanResult,
    entries=_COUNT,
    changed=_COUNT,
    vanished=_COUNT,
    problems=Several(_PROBLEM, MANY, list),
    frozen=REASONS,
)


class _PlacementsSchema:
    """A table that is a class of its own."""

    _table = Table(NUMBER, Record(Placed, key=KEY, first=PLACE, last=PLACE), MANY)

    def pack(self, value: Placements) -> object:
        """As a table."""
        return self._table.pack(value)

    def unpack(self, plain: object) -> Placements:
        """From a table."""
        return Placements(self._table.unpack(plain))


_RECOVERED = Record(
    Recovered,
    updates=Table(NUMBER, Each((UPDATE, VERSIONS)), MANY),
    performed=Several(KEY, MANY, set),
    failed=Several(KEY, MANY, set),
    placed=_PlacementsSchema(),
    returned=_COUNT,
    damaged=IDS,
    said=Several(Text(), 65536, list),
    stuck=Several(Each((_FULL_PATH, REASON)), 65536, list),
)


class Done(Struct, frozen=True, kw_only=True):
    """How one step ended. ``path`` and ``old`` are where its node is and was, for output."""

    position: int  # in the list that was asked for
    status: Status
    reason: str
    size: int
    matched: int
    kept: bytes | None
    missed: tuple[str, ...]
    beside: Place | None
    path: bytes | None
    old: bytes | None


DONE = Record(
    Done,
    position=_COUNT,
    status=Member(Status),
    reason=REASON,
    size=SIZE,
    matched=SIZE,
    kept=Maybe(_FULL_PATH),
    missed=Several(REASON, 4096),
    beside=Maybe(PLACE),
    path=Maybe(_FULL_PATH),
    old=Maybe(_FULL_PATH),
)
_QUARREL = Record(
    Quarrel,
    id=_ID,
    kind=Text(64),
    path=_FULL_PATH,
    time_ns=MOMENT,
    reason=REASON,
    detail=REASON,
    waiting=Bool(),
    winner=Maybe(Text(8192)),
    loser=Maybe(Text(8192)),
    loser_replica=_ID,
    kept=Maybe(_FULL_PATH),
    kept_as=Maybe(_FULL_PATH),
    mtime_ns=TIME,
    digest=Maybe(Text(64)),
)
_CHOICE = Record(Choice, quarrel=_QUARREL, take=Member(Take))
_ENDING = Record(
    Ending,
    time_ns=MOMENT,
    complete_ns=Maybe(MOMENT),
    pending=REASONS,
    waiting=Several(_ID, MANY, frozenset),
    deletions=Several(Each((_COLUMN, _COUNT)), 65536),
    entries=_COUNT,
    busy=Several(Text(), MANY),
    retention=Maybe(RETENTION),
)
_PROBED = Record(Probed, back=Several(_FULL_PATH, MANY), weak=_COUNT)
_COMMIT = Record(Commit, epoch=_EPOCH, payload=ROWS)
CHAIN = Record(
    Chain,
    epoch=_EPOCH,
    digest=Bytes(32),
    entries=_COUNT,
    next_key=_COUNT,
    links=Several(Each((_COUNT, _ID)), 65536),
)


class Opening(Struct, frozen=True, kw_only=True):
    """Which root, and how it is to be worked on. The end that has it may know better."""

    path: bytes
    dry: bool = False
    patterns: tuple[str, ...] = ()  # gitignore syntax
    store: bytes
    specials: bool = False
    devices: bool = False
    fsync: bool = True
    apply: Apply = Apply.AUTO
    hot: tuple[str, ...] = ()
    hot_share: int | None = None  # in millionths of the time; None: all of it
    base_clones: int = 0
    bwlimit: int = 0  # bytes in a second; 0: no limit
    set_aside: bool = False  # what cannot be read of its state is put away first
    session: str = ""  # a number of the driver's, by which it knows that it waits for itself
    wait_ms: int | None = None  # for another engine that works on it; None: while that lives


_OPENING = Record(
    Opening,
    path=_FULL_PATH,
    dry=Bool(),
    patterns=Several(OsText(), 65536),
    store=Path(),
    specials=Bool(),
    devices=Bool(),
    fsync=Bool(),
    apply=Member(Apply),
    hot=Several(OsText(), 65536),
    hot_share=Maybe(Int(1, 1_000_000)),
    base_clones=Int(0, 1 << 20),
    bwlimit=_COUNT,
    set_aside=Bool(),
    session=Text(64),
    wait_ms=Maybe(_COUNT),
)


_SPOT = Record(Spot, path=_FULL_PATH, handle=Bytes(132), above=Bool())
_SPOTS = Several(_SPOT, MANY, set)
_COVERAGE = Record(
    Coverage,
    kind=Text(16),
    directories=_COUNT,
    polled=_COUNT,
    notes=Several(Text(), 64, list),
)
_SIZES = Record(Sizes, index=_COUNT, bases=_COUNT, stage=_COUNT, store=_COUNT, whole=Bool())
MARKED = Each(
    (
        # Directories with the milliseconds after which each is due, and before which it is not.
        Several(Each((_SPOT, Int(0, 60_000), Int(0, 60_000))), 1 << 16),
        Text(),  # why all has to be looked at
        _COUNT,  # the last token
    )
)
"""What an end that watches tells of its own accord."""


class Call(Struct, frozen=True):
    """One call: its number on the wire, what it takes, gives, and gives piece by piece."""

    number: int
    takes: Each
    gives: Schema
    part: Schema | None = None


_AROUND = Record(Around, nodes=NODES, names_of=NAMES_OF, without=IDS, forgotten=IDS)
_INLINE = Record(
    Inline,
    size=Int(0, LARGEST),
    digest=Bytes(32, 32),
    writer=Bool(),
    instant=Bool(),
    data=Bytes(BULK),
)
_CONTENTS = Table(NUMBER, _INLINE, 64)
_GLANCE = Record(
    Glance,
    choices=Several(_CHOICE, MANY, list),
    scanned=_SCANNED,
    companions=Several(PLACE, MANY, list),
    around=_AROUND,
    at=AT,
    contents=_CONTENTS,
)
_STRS = Several(Text(), 65536, list)
_KEYS = Several(NUMBER, MANY, list)
_PLACES = Several(PLACE, MANY, list)
_PEERS = Record(Peers, nodes=_KEYS, places=_PLACES, contents=Bool())
_ON = (_PAIR,)

CALLS: dict[str, Call] = {
    # A root as a side of a session.
    "open": Call(1, Each((_OPENING,)), HELLO),
    "hello": Call(2, NOTHING, HELLO),
    "establish": Call(3, Each((Bool(), Bool())), HELLO),
    "is_empty": Call(4, NOTHING, Bool()),
    "looks_familiar": Call(5, NOTHING, Bool()),
    "look": Call(6, Each((_SPOTS,)), _SCANNED, part=_COUNT),
    "archive": Call(7, Each((HELLO, _COLUMN, Bool())), _PAIR),
    "recover": Call(8, Each(_ON), _RECOVERED),
    "scan": Call(9, Each((Maybe(IDS),)), _SCANNED, part=_COUNT),
    "read": Call(10, Each((_KEYS,)), Each((_READS, NODES))),
    "companions": Call(11, NOTHING, _PLACES),
    "hold": Call(12, Each((NUMBER, Several(Name(), 64, list), Table(Name(), NUMBER, 64))), _READ),
    "hold_declared": Call(13, Each((NUMBER, DECLARED, Table(Path(), NUMBER, MANY), IDS)), _READ),
    "release": Call(14, NOTHING, _STRS),
    "moved": Call(15, Each((IDS,)), Bool()),
    "apply": Call(
        16,
        Each(
            (
                _PAIR,
                Several(STEP, MANY, list),
                Table(NUMBER, Text(1 << 20), MANY),
                Several(TOGETHER, MANY),
                _CONTENTS,
            )
        ),
        NODES,
        part=Several(DONE, MANY, list),
    ),
    "around": Call(17, Each((_KEYS,)), _AROUND),
    "at": Call(19, Each((_PLACES,)), Each((AT, _AROUND))),
    "children": Call(20, Each((_KEYS,)), NOTHING, part=CHILDREN),
    "set_directory_times": Call(
        22,
        Each((Several(Each((NUMBER, TIME, Bool())), MANY, list),)),
        Each((Table(NUMBER, ATTRIBUTES, MANY), REASONS)),
    ),
    "numbers": Call(23, Each((Int(1, 1 << 20),)), NUMBER),
    "path": Call(24, Each((NUMBER,)), Maybe(_FULL_PATH)),
    "place_path": Call(25, Each((PLACE,)), _FULL_PATH),
    "imagine": Call(26, Each((NUMBER, PLACE)), NOTHING),
    "changed": Call(27, Each(_ON), NOTHING, part=_KEYS),
    "keep_pending": Call(28, Each((_PAIR, REASONS)), NOTHING),
    "finish": Call(29, Each((_PAIR, _ENDING)), _STRS),
    "deletions_since": Call(30, Each((_PAIR, _COLUMN, MOMENT)), _COUNT),
    "choices": Call(31, Each(_ON), Several(_CHOICE, MANY, list)),
    "carry_out": Call(32, Each((_PAIR, _CHOICE)), REASON),
    "add_conflicts": Call(33, Each((_PAIR, Several(_QUARREL, MANY, list))), NOTHING),
    "forget_conflicts": Call(34, Each((Several(_ID, MANY, list),)), NOTHING),
    "probe_displaced": Call(35, Each((_COUNT,)), _PROBED),
    "sizes": Call(65, NOTHING, _SIZES),
    "close": Call(36, NOTHING, NOTHING),
    "rest": Call(37, NOTHING, NOTHING),
    "wake": Call(38, Each((Maybe(_COUNT),)), Bool()),
    "glance": Call(18, Each((Maybe(_COUNT), _PAIR, _SPOTS, _PEERS)), Maybe(_GLANCE), part=_KEYS),
    "drive": Call(21, Each((_PAIR, Text(256))), Text(1024)),
    "watch": Call(39, Each((Text(16), _COUNT)), _COVERAGE),
    "token": Call(62, Each((_COUNT,)), Bool()),
    "coverage": Call(63, NOTHING, _COVERAGE),
    # Its copy of the ancestor.
    "agreed.nodes": Call(40, Each((_PAIR, _KEYS)), Table(NUMBER, AGREED, MANY)),
    "agreed.names_of": Call(41, Each((_PAIR, _KEYS)), NAMES_OF),
    "agreed.at": Call(42, Each((_PAIR, _PLACES)), AT),
    "agreed.children": Call(43, Each((_PAIR, _KEYS)), CHILDREN),
    "agreed.by_side": Call(44, Each((_PAIR, _COLUMN, _KEYS)), Table(NUMBER, NUMBER, MANY)),
    "agreed.state": Call(45, Each(_ON), _PAIR_STATE),
    "agreed.next_key": Call(46, Each(_ON), _COUNT),
    "agreed.nonces": Call(47, Each(_ON), Several(_ID, 65536, set)),
    "agreed.presumed": Call(64, Each((_PAIR, NUMBER, Int(1, MANY))), _KEYS),
    "agreed.halfway": Call(48, Each(_ON), Table(NUMBER, PLACE, MANY)),
    "agreed.leave_halfway": Call(49, Each((_PAIR, Table(NUMBER, PLACE, MANY))), NOTHING),
    "agreed.prepare": Call(50, Each((_PAIR, _COMMIT)), NOTHING),
    "agreed.prepared": Call(51, Each(_ON), Maybe(_COMMIT)),
    "agreed.drop_prepared": Call(52, Each(_ON), NOTHING),
    "agreed.commit": Call(53, Each((_PAIR, REASONS)), NOTHING),
    "agreed.forget": Call(54, Each(_ON), NOTHING),
    "agreed.clear": Call(55, Each(_ON), NOTHING),
    "agreed.forget_ids": Call(56, Each((_PAIR, _COLUMN)), NOTHING),
    "agreed.forget_results": Call(57, Each(_ON), NOTHING),
    "agreed.chain": Call(58, Each(_ON), CHAIN),
    "agreed.rows": Call(59, Each(_ON), NOTHING, part=ROWS),
    "agreed.load": Call(60, Each((_PAIR, ROWS)), NOTHING),
    "agreed.adopt": Call(61, Each((_PAIR, CHAIN)), NOTHING),
}
"""By name; the number is what crosses. Never renumber."""

BY_NUMBER = {call.number: name for name, call in CALLS.items()}
assert len(BY_NUMBER) == len(CALLS)
