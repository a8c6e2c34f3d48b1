"""A peer that cannot be trusted: any call its schema allows, in any order, against a real root.

Whatever comes, the end that is asked either does it within its root or refuses it by an error of
its own; nothing beside the root is touched, and what users had is live or kept.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bisync.core.node import Kind
from bisync.core.path import valid_name
from bisync.delta.digest import digest_of
from bisync.endpoint.calls import CALLS
from bisync.endpoint.service import Policy, RootService
from bisync.errors import BisyncError, EndpointError, ProtocolError
from bisync.wire import mirrorvalues, schema, values
from bisync.wire.letters import Letter, Word
from tests.trees import contents, frozen, kept, put

MANY = int(os.environ.get("BISYNC_FUZZ", "150"))
NAMES = [b"d", b"f", b"sub", b"link", b"new", b".bisync", b"rsync-rollback", b"x" * 255]
NUMBERS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 4097, 4098, 10_000, 2**40, 2**63 - 1]
PATHS = [b"", b"d", b"d/f", b"link", b"link/f", b".bisync", b"a/b/c"]


def plain(of: Any) -> st.SearchStrategy[Any]:
    """Plain values that a schema may take; those that matter to a tree are likelier."""
    match of:
        case schema.Int():
            low, high = of.low, of.high
            some = [n for n in (*NUMBERS, low, high) if low <= n <= high]
            return st.sampled_from(some) | st.integers(low, high)
        case schema.Time():
            return st.sampled_from([0, -1, 10**18, [10**11, 5], [-(10**12), 0], [2**62, 0]])
        case schema.Bool():
            return st.booleans()
        case schema.Bytes():
            return st.binary(min_size=of.least, max_size=max(of.least, min(of.most, 40)))
        case schema.Text() | schema.OsText():
            text = st.text(max_size=min(of.most, 20))
            return text if isinstance(of, schema.Text) else text.map(os.fsencode)
        case schema.Name():
            return st.sampled_from(NAMES) | st.binary(min_size=1, max_size=30).filter(valid_name)
        case schema.Path():
            return st.sampled_from(PATHS)
        case schema.Maybe():
            return st.none() | plain(of.of)
        case schema.Several():
            return st.lists(plain(of.of), max_size=min(of.most, 4))
        case schema.Each():
            return st.tuples(*map(plain, of.of)).map(list)
        case schema.Table():
            pair = st.tuples(plain(of.key), plain(of.of)).map(list)
            return st.lists(pair, max_size=min(of.most, 4), unique_by=lambda p: repr(p[0]))
        case schema.Member():
            return st.sampled_from([member.value for member in of.of])
        case schema.Record():
            return st.tuples(*(plain(each) for _, each in of._fields)).map(list)
        case schema.OneOf():
            rows = [
                plain(record).map(lambda row, number=number: [number, *row])
                for number, record in of._of.items()
            ]
            return st.one_of(rows)
        case values._Checked():
            return plain(of._record)
        case values._AclName():
            return st.sampled_from(values.ACL_NAMES)
        case values._Milliseconds():
            return st.integers(1, 10_000)
        case mirrorvalues._Made():
            return plain(of._of)
        case _ if hasattr(of, "_table"):
            return plain(of._table)
        case _:
            raise AssertionError(f"no values for {of}")


# What is left out gives the root away or back; those stand in the beginning and at the end.
NAMES_OF_CALLS = sorted(CALLS.keys() - {"open", "close", "agreed.prepare", "agreed.load"})
ONE_CALL = st.sampled_from(NAMES_OF_CALLS).flatmap(
    lambda name: st.tuples(st.just(name), plain(CALLS[name].takes))
)


@dataclass
class NoChannel:
    """A connection on which no content ever comes."""

    stop_asked: bool = False
    broken: bool = False
    unheard_s: float = 0.0
    asked: list[int] = field(default_factory=list)
    pace: Callable[[int], None] | None = None

    def open(self, *, bounded: int | None = None) -> Any:
        """No stream either."""
        raise EndpointError("the connection was lost")

    def call(self, about: int, body: Any, part: Any = None) -> Any:
        """Nobody answers."""
        self.asked.append(about)
        raise EndpointError("the connection was lost")


def service(root: Path, policy: Policy) -> RootService:
    """The end that is asked, opened, with a pair and an index."""
    made = RootService(NoChannel(), lambda _path: os.fsencode(root), policy)  # type: ignore[arg-type]
    ask(made, "open", [b"/", False, [], b"rsync-rollback", False, True, True, "auto", [], None,
                       0, 0, False, "", 0])  # fmt: skip
    ask(made, "establish", [False, False], wrap=False)
    hello = ["far:/x", True, "f" * 32, "i", "r", "r", False, [], "", False]
    ask(made, "archive", [hello, 0, False], wrap=False)
    ask(made, "scan", [None], wrap=False)
    ask(made, "numbers", [100], wrap=False)
    return made


def ask(made: RootService, name: str, body: list[Any], *, wrap: bool = True) -> Any:
    """One call, as it comes from the wire."""
    letter = Letter(Word.ASK, 3, CALLS[name].number, [body] if wrap else body)
    return made.ask(letter, lambda _part: None)


def fill(base: Path) -> Path:
    """A root with something in it, beside something that is nobody's business."""
    root = base / "root"
    put(root / "f", b"a file of a user")
    put(root / "d" / "f", b"another one")
    put(root / "d" / "sub" / "g", b"a third one")
    (root / "link").symlink_to("../outside")
    put(base / "outside" / "secret", b"secret", t=1_700_000_000)
    put(base / "outside" / "sub" / "key", b"key", t=1_700_000_000)
    return root


@pytest.mark.parametrize("policy", [Policy(), Policy(changes=False, prunes=False)], ids=repr)
def test_any_calls(here: tuple[Path, Path], policy: Policy):
    """Whatever is asked, in whatever order."""
    numbers = itertools.count()

    @settings(
        max_examples=MANY,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls=st.lists(ONE_CALL, min_size=1, max_size=12))
    def play(calls: list[tuple[str, list[Any]]]) -> None:
        base = here[0] / str(next(numbers))
        root = fill(base)
        mine, beside = contents(root), frozen(base / "outside")
        made = service(root, Policy() if policy.changes else Policy(prunes=False))
        made._policy = policy
        try:
            for name, body in calls:
                allowed(lambda name=name, body=body: ask(made, name, body, wrap=False))
        finally:
            made.end()
        assert frozen(base / "outside") == beside
        after = contents(root) | {content for _, content in kept(root)}
        assert mine <= after | waiting(root), calls
        if not policy.changes:
            assert contents(root) == mine

    play()


def waiting(root: Path) -> set[bytes]:
    """What waits in the stage for the next run to bring it back or to the store."""
    stage = root / ".bisync" / "stage"
    return (
        {path.read_bytes() for path in stage.rglob("*") if path.is_file()}
        if stage.exists()
        else set()
    )


def allowed(act: Callable[[], Any]) -> None:
    """Do it; the only errors that may come of it are those that end a call or a connection."""
    try:
        act()
    except BisyncError:
        pass


ATTRIBUTES = [0o644, 0, 0, 10**18, [], []]
FOLDER = [int(Kind.DIR), 0, None, b"", 0]
FILE = [int(Kind.FILE), 5, None, b"", 0]


def make(
    key: int, node: int, place: tuple[int, bytes], content: list[Any], **more: Any
) -> list[Any]:
    """A step that makes something new."""
    attributes = more.get("attributes", ATTRIBUTES)
    return [1, key, node, "", list(place), content, attributes, more.get("source"), None]


def applied(made: RootService, *steps: list[Any], files: Sequence[Any] = ()) -> list[Any]:
    """How steps end: (position, status, reason) of each. ``files``: what goes along."""
    found: list[Any] = []
    body = [1, list(steps), [], [], list(files)]
    letter = Letter(Word.ASK, 3, CALLS["apply"].number, body)
    made.ask(letter, found.extend)
    return [row[:3] for row in found]


@pytest.fixture
def asked(here: tuple[Path, Path]) -> Iterator[tuple[RootService, Path]]:
    """An end that is bound as a forced command binds it."""
    root = fill(here[0])
    made = service(root, Policy(devices=False, set_id=False, commands=False, chooses_store=False))
    yield made, root
    made.close()


def test_no_state_is_planted(asked: tuple[RootService, Path]):
    """A folder that would be believed to be the state of a root cannot be brought here."""
    made, root = asked
    first = made.side.view.next_number - 100
    ends = applied(
        made,
        make(-1, first, (1, b".bisync"), FOLDER),
        make(-2, first + 1, (1, b"rsync-rollback"), [int(Kind.SYMLINK), 0, None, b"..", 0]),
        make(-3, first + 2, (1, b"x"), FOLDER),
        make(-4, first + 3, (first + 2, b"replica"), FOLDER),
        [3, -3, first + 2, "", [1, b"x"], [1, b"y"], None],
    )
    assert [status for _, status, _ in ends] == ["problem", "problem", "done", "done", "done"]
    ends = applied(made, [3, -3, first + 2, "", [1, b"y"], [3, b".bisync"], None])
    assert [status for _, status, _ in ends] == ["problem"]
    ends = applied(
        made,
        make(-5, first + 5, (first + 2, b".bisync"), FOLDER),
        make(-6, first + 6, (first + 5, b"replica"), FOLDER),
    )
    assert [status for _, status, _ in ends] == ["done", "problem"]
    assert not list(root.rglob(".bisync/replica"))[1:]


@pytest.mark.parametrize(
    "step",
    [
        make(-1, 4096, (1, b"dev"), [int(Kind.BLOCK), 0, None, b"", 0x800]),
        make(-1, 4096, (1, b"f2"), FILE),
        make(-1, 2, (1, b"f2"), FILE, source=5),
        make(-1, 2**40, (1, b"f2"), FILE, source=5),
        make(-1, 4096, (1, b".."), FOLDER),
        make(-1, 4096, (1, b"a/b"), FOLDER),
        make(-1, 4096, (1, b"f2"), FILE, source=5,
             attributes=[0o644, 0, 0, 0, [], [[b"security.capability", b"x"]]]),
    ],
    ids=["device", "from nowhere", "number of another", "number not given", "dots", "slash",
         "capability as ACL"],
)  # fmt: skip
def test_steps_that_are_refused(asked: tuple[RootService, Path], step: list[Any]):
    """Each ends the connection, and nothing was done."""
    made, root = asked
    before = frozen(root)
    step[2] = made.side.view.next_number - 1 if step[2] == 4096 else step[2]
    with pytest.raises(ProtocolError):
        applied(made, step)
    assert {k: v for k, v in frozen(root).items() if not k.startswith(b".bisync")} == {
        k: v for k, v in before.items() if not k.startswith(b".bisync")
    }


def test_content_that_goes_along(asked: tuple[RootService, Path]):
    """What comes with a step is hashed here, as all that comes; a lie ends the connection."""
    made, root = asked
    number = made.side.view.next_number - 50
    step = make(-1, number, (1, b"new"), [int(Kind.FILE), 5, None, b"", 0], source=7)
    for lie in (
        [5, b"d" * 32, False, False, b"hello"],
        [4, digest_of(b"hello"), False, False, b"hello"],
        [5, digest_of(b"hello"), False, False, b"hell"],
        [5, digest_of(b"hello"), False, False, bytes((256 << 10) + 1)],
        [5, b"short", False, False, b"hello"],
    ):
        with pytest.raises(ProtocolError):
            applied(made, step, files=[[7, lie]])
        assert not (root / "new").exists()
    true = [5, digest_of(b"hello"), False, False, b"hello"]
    assert applied(made, step, files=[[7, true]]) == [[0, "done", ""]]
    assert (root / "new").read_bytes() == b"hello"


def test_no_power_is_given(asked: tuple[RootService, Path]):
    """Set-id bits do not come along where they are not lent."""
    made, root = asked
    number = made.side.view.next_number - 1
    applied(made, make(-1, number, (1, b"tool"), FOLDER, attributes=[0o6755, 0, 0, 0, [], []]))
    assert (root / "tool").stat().st_mode & 0o6000 == 0


@pytest.mark.parametrize("store", [b".bisync/in", b".bisync", b"d", b".store"])
def test_no_other_store(here: tuple[Path, Path], store: bytes):
    """Where kept versions go is for this end to say."""
    root = fill(here[0])
    made = RootService(NoChannel(), lambda _p: os.fsencode(root), Policy(chooses_store=False))  # type: ignore[arg-type]
    with pytest.raises(BisyncError):
        ask(
            made,
            "open",
            [b"/", False, [], store, False, False, True, "auto", [], None, 0, 0, False, "", 0],
        )
    made.close()


def test_a_conflict_is_what_this_end_knows(asked: tuple[RootService, Path]):
    """A choice for a conflict that is not on the list does nothing; a list of lies is refused."""
    made, root = asked
    before = contents(root)
    quarrel = ["id", "content", b"f", 0, "", "", False, None, "x", "f" * 32,
               b"2026-01-01/secret", None, 0, None]  # fmt: skip
    said = ask(made, "carry_out", [1, [quarrel, "kept"]], wrap=False)
    assert "not on this side's list" in said
    for kept_at in (b".manifest/x", b".bisync/replica", b"../x"):
        with pytest.raises(ProtocolError):
            ask(made, "add_conflicts", [1, [[*quarrel[:10], kept_at, *quarrel[11:]]]], wrap=False)
    assert contents(root) == before


def test_the_limit_is_for_both_ways(here: tuple[Path, Path]):
    """``--bwlimit`` is the other end's limit, too."""
    there = NoChannel()
    made = RootService(there, lambda _p: os.fsencode(fill(here[0])))  # type: ignore[arg-type]
    words = [b"/", False, [], b"rsync-rollback", False, True, True, "auto", [], None, 0]
    ask(made, "open", [*words, 1000, False, "", 0])
    assert there.pace is not None
    made.close()
