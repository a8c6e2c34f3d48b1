"""What the other end said is remembered exactly as long as it holds."""

import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from bisync import Reach, Session
from bisync.core.ignore import Matcher
from bisync.core.node import ROOT, Attributes, Content, Kind, Node, NodeId, Place
from bisync.endpoint import far as module
from bisync.endpoint import glance
from bisync.endpoint.calls import BY_NUMBER
from bisync.endpoint.channel import Channel
from bisync.endpoint.content import ContentServer
from bisync.endpoint.far import Far, RemoteView
from bisync.endpoint.glance import Around, around
from bisync.endpoint.local import LocalEndpoint
from bisync.errors import EndpointError
from bisync.fs.replica import Options
from bisync.fs.walk import ScanRules
from bisync.session.commit import Ledger
from bisync.session.run import Manner
from tests.trees import ELSEWHERE, command, put

Tree = dict[NodeId, set[Place]]
NUMBERS = st.integers(1, 9)
PLACES = st.tuples(NUMBERS, st.sampled_from([b"a", b"b"]))
TREES = st.dictionaries(st.integers(2, 9), st.sets(PLACES, max_size=2), max_size=8)


class Index:
    """An index of a few nodes, and how often it was asked."""

    def __init__(self, tree: Tree) -> None:
        self.tree = {ROOT: set[Place](), **tree}
        self.version = 0

    def nodes(self, ids: Iterable[NodeId]) -> dict[NodeId, Node]:
        """Those with a name, and the root."""
        node = Node(0, Content(Kind.DIR), Attributes(0, 0, 0, 0, ()), version=self.version)
        some = {n for n in ids if self.tree.get(n) or n == ROOT}
        return {n: replace(node, id=n) for n in some}

    def names_of(self, ids: Iterable[NodeId]) -> dict[NodeId, frozenset[Place]]:
        """All names."""
        return {n: frozenset(self.tree[n]) for n in ids if self.tree.get(n)}

    def at(self, places: Iterable[Place]) -> dict[Place, NodeId]:
        """The one node at a place."""
        held = {place: n for n in sorted(self.tree) for place in self.tree[n]}
        return {p: held[p] for p in places if p in held}

    def forgotten(self, ids: Iterable[NodeId]) -> set[NodeId]:
        """Every other one without a name."""
        return {n for n in ids if n % 2 and not self.tree.get(n)}

    def children(self, ids: Iterable[NodeId]) -> dict[NodeId, list[tuple[bytes, NodeId]]]:
        """Not remembered by anybody."""
        return {}


class Answers:
    """The other end: answers from an index."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.asked: list[str] = []

    def __call__(self, name: str, values: list[Any]) -> Any:
        self.asked.append(name)
        if name == "around":
            assert len(values) <= glance.AT_A_TIME
            return around(self.index, values)
        assert name == "at"
        found = self.index.at(values)
        return found, around(self.index, found.values())


def _one_node_a_place(tree: Tree) -> Tree:
    taken = set[Place]()
    found = {}
    for node, places in sorted(tree.items()):
        found[node] = {p for p in places if p not in taken}
        taken |= found[node]
    return found


LOOKS = st.tuples(st.sampled_from(["nodes", "names_of", "forgotten"]), st.lists(NUMBERS))
AT = st.tuples(st.just("at"), st.lists(PLACES))
CHANGE = st.tuples(st.just("change"), TREES)


@pytest.mark.parametrize("at_a_time", [2, 5, 5000])
def test_what_is_remembered_is_what_the_index_says(at_a_time: int, monkeypatch: pytest.MonkeyPatch):
    """Lookups in any order, with what may be asked at a time as small as it gets."""
    for where in (glance, module):
        monkeypatch.setattr(where, "AT_A_TIME", at_a_time)
        monkeypatch.setattr(where, "MOST_AROUND", at_a_time + 1)
    monkeypatch.setattr(module, "_REMEMBERED", at_a_time)

    @settings(deadline=None)
    @given(TREES, st.lists(st.one_of(LOOKS, AT, CHANGE), max_size=12))
    def play(tree: Tree, steps: list[tuple[str, Any]]) -> None:
        index = Index(_one_node_a_place(tree))
        view = RemoteView(Answers(index))  # type: ignore[arg-type]
        for what, values in steps:
            if what == "change":
                index.tree = {ROOT: set(), **_one_node_a_place(values)}
                index.version += 1
                view.forget()
                continue
            found = getattr(view, what)(values)
            assert found == getattr(index, what)(values), what

    play()


def test_what_was_asked_about_has_to_be_answered():
    """An end that says nothing of a node does not make it one that is gone."""
    view = RemoteView(lambda _name, _ids: Around())  # type: ignore[arg-type]
    with pytest.raises(EndpointError, match="no answer"):
        view.names_of([7])


def test_a_call_that_may_change_the_index_forgets(monkeypatch: pytest.MonkeyPatch):
    """Any but those that are known to leave it as it is; also one that fails."""
    forgot: list[str] = []

    class Broken:
        def ask(self, *_: object, **__: object) -> int:
            return 1

        def answer(self, *_: object) -> None:
            raise EndpointError("lost")

    far = Far(Broken())  # type: ignore[arg-type]
    for name, values in (("rest", ()), ("around", ([1],)), ("agreed.state", (1,))):
        far.index_changes = lambda name=name: forgot.append(name)
        with pytest.raises(EndpointError):
            far(name, *values)
    assert not forgot
    for name, values in (("scan", (None,)), ("set_directory_times", ([],)), ("read", ([1],))):
        far.index_changes = lambda name=name: forgot.append(name)
        with pytest.raises(EndpointError):
            far(name, *values)
        assert forgot == [name, name]
        forgot.clear()


def test_a_new_meeting_reads_from_the_beginning(tmp_path: Path):
    """What was read for one meeting is read again at the next, from what is then agreed."""
    put(tmp_path / "A/f", b"1")
    put(tmp_path / "B/f", b"1")
    with Session(tmp_path / "A", tmp_path / "B") as session:
        session.run()
    side = LocalEndpoint(os.fsencode(tmp_path / "A"), Options(ScanRules(Matcher(()))))
    other = LocalEndpoint(os.fsencode(tmp_path / "B"), Options(ScanRules(Matcher(()))))
    try:
        side.establish()
        hello = other.establish()
        archive = side.archive(hello, column=0, flipped=False)
        assert list(side.changed(archive)) == []
        archive.forget()
        archive = side.archive(hello, column=0, flipped=False)
        assert len(list(side.changed(archive))) == 2  # the root and the file
    finally:
        side.close()
        other.close()


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What crosses together and is waited for: names of calls, with a + between them."""
    names: list[str] = []
    together: list[str] = []
    ask, answer = Channel.ask, Channel.answer

    def counted(self: Channel, about: int, body: Any, *, parts: bool = False) -> int:
        together.append(BY_NUMBER[about])
        return ask(self, about, body, parts=parts)

    def waited_for(self: Channel, number: int, part: Any = None) -> Any:
        if together:
            names.append("+".join(together))
            together.clear()
        return answer(self, number, part)

    monkeypatch.setattr(Channel, "ask", counted)
    monkeypatch.setattr(Channel, "answer", waited_for)
    return names


_FIRST = "rest+glance+probe_displaced"  # of a run that follows another one


def _edit(path: Path) -> None:
    put(path, b"changed")


def _make(path: Path) -> None:
    put(path.with_name("new"), b"new")


def _rename(path: Path) -> None:
    path.rename(path.with_name("renamed"))


@pytest.mark.parametrize("change", [_edit, _make, _rename])
@pytest.mark.parametrize("there", [False, True], ids=["here", "there"])
def test_a_change_takes_few_ways(
    tmp_path: Path,
    ways: list[str],
    change: Callable[[Path], None],
    there: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    """An open session carries one change over with a handful of waits for the other machine."""
    a, b = tmp_path / "A", tmp_path / "B"
    put(a / "d/f", b"1")
    put(a / "d/g", b"2")
    b.mkdir()
    reach = Reach(rsh=str(ELSEWHERE), agent_command=shlex.join(map(str, command())))
    with Session(a, f"elsewhere:{b}", reach=reach) as session:
        session.run()
        session.run(only=([], []))  # what the first one left
        change((b if there else a) / "d/f")
        monkeypatch.setattr(ContentServer, "want", None)  # a small file goes along
        ways.clear()
        only = ([], ["d"]) if there else (["d"], [])
        session.run(only=only, manner=Manner(tend=False))
        assert {p.name for p in (a / "d").iterdir()} == {p.name for p in (b / "d").iterdir()}
        ways[:] = [name for name in ways if name != "numbers"]  # asked for once in a long while
        assert ways[0] == _FIRST
        if there:  # it is visible before the commit is prepared
            ways[:] = [name for name in ways if name != "at"]  # where it was before it was renamed
            assert ways == [_FIRST, "agreed.prepare", "agreed.commit", "finish"]
        else:
            assert ways == [
                _FIRST,
                "apply",
                "set_directory_times+around",
                "agreed.prepare",
                "agreed.commit+changed+probe_displaced",
                "finish",
            ]
        ways.clear()
        session.run(only=([], []), manner=Manner(tend=False))
        assert ways == [_FIRST, "finish"]


def test_what_was_deleted_before_it_was_agreed_on_stays_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The connection is lost after a new file was made there, and its user deleted it here."""
    a, b = tmp_path / "A", tmp_path / "B"
    put(a / "other", b"1")
    b.mkdir()
    reach = Reach(rsh=str(ELSEWHERE), agent_command=shlex.join(map(str, command())))
    with Session(a, f"elsewhere:{b}", reach=reach) as session:
        session.run()
        put(a / "f", b"2")
        put(a / "g", b"3")

        def lost(*_: object) -> None:
            (a / "f").unlink()
            side = session._open_sides[0]
            assert side is not None
            side.scan()
            raise EndpointError("the connection was lost")

        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "commit", lost)
            with pytest.raises(EndpointError):
                session.run()
        assert (b / "f").exists()
        session.run()
    assert sorted(p.name for p in b.iterdir() if p.name[0] != ".") == [
        "g",
        "other",
        "rsync-rollback",
    ]
    assert sorted(p.name for p in a.iterdir() if p.name[0] != ".") == ["g", "other"]
