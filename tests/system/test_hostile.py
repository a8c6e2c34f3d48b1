"""A peer that cannot be trusted: any call its schema allows, in any order, against a real root.

Whatever comes, the end that is asked either does it within its root or refuses it by an error of
its own; nothing beside the root is touched, and what users had is live or kept.
"""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bisync.core.path import valid_name
from bisync.endpoint.calls import CALLS
from bisync.endpoint.service import Policy, RootService
from bisync.errors import BisyncError, EndpointError
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
    asked: list[int] = field(default_factory=list)

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
                       0, 0, False])  # fmt: skip
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
            made.close()
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
