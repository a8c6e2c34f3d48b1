"""What a scan of a few directories must not overlook, whatever moves meanwhile."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bisync.core.ignore import Matcher
from bisync.core.node import ROOT
from bisync.endpoint.local import LocalEndpoint
from bisync.fs import walk
from bisync.fs.index import NO_STAMP
from bisync.fs.replica import Options
from bisync.fs.walk import ScanRules
from bisync.watch.interface import Spot
from tests.trees import put


@pytest.fixture
def side(tmp_path: Path) -> Iterator[LocalEndpoint]:
    """A root that was scanned: ``d/p/x/f``."""
    put(tmp_path / "d/p/x/f", b"1")
    (tmp_path / "e").mkdir()
    side = LocalEndpoint(os.fsencode(tmp_path), Options(ScanRules(Matcher(()))))
    side.establish()
    side.scan()
    yield side
    side.close()


def _node(side: LocalEndpoint, path: bytes) -> int:
    node = ROOT
    for name in path.split(b"/"):
        node = side.view.at([(node, name)])[node, name]
    return node


def _paths(side: LocalEndpoint) -> set[bytes]:
    rows = side.replica.database.execute("SELECT node FROM name").fetchall()
    return {path for (node,) in rows if (path := side.path(node)) is not None}


@pytest.mark.parametrize("moved", ["d/p", "d/p/x"])
def test_a_directory_that_goes_and_comes_back(side: LocalEndpoint, tmp_path: Path, moved: str):
    """What happened in it is seen, although it was looked for while it was elsewhere."""
    x, d = _node(side, b"d/p/x"), _node(side, b"d")
    p = _node(side, b"d/p")
    put(tmp_path / "d/p/x/new", b"2")
    (tmp_path / moved).rename(tmp_path / "e/away")
    side.scan({x})
    (tmp_path / "e/away").rename(tmp_path / moved)
    side.scan({d, p, _node(side, b"e")})
    assert b"d/p/x/new" in _paths(side)


def test_a_new_directory_that_moves_before_it_is_looked_into(
    side: LocalEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is not known where it was listed: coming back there, it is new."""
    put(tmp_path / "d/new/f", b"2")
    meet = walk.Scanner._meet

    def met(self: walk.Scanner, entry: os.DirEntry[str], *args: Any, **words: Any) -> None:
        meet(self, entry, *args, **words)
        if entry.name == "new" and (tmp_path / "d/new").exists():
            (tmp_path / "d/new").rename(tmp_path / "away")

    with monkeypatch.context() as patch:
        patch.setattr(walk.Scanner, "_meet", met)
        side.scan({_node(side, b"d")})
    (tmp_path / "away").rename(tmp_path / "d/new")
    side.scan({_node(side, b"d"), ROOT})
    assert b"d/new/f" in _paths(side)


def test_a_directory_renamed_after_something_was_written_in_it(
    side: LocalEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The common case: found by the listing of where it went, and not by looking everywhere."""
    x, d = _node(side, b"d/p/x"), _node(side, b"d")
    put(tmp_path / "d/p/x/new", b"2")
    (tmp_path / "d/p").rename(tmp_path / "d/q")
    monkeypatch.setattr(walk.Scanner, "_prove_vanished", lambda self: self._lost.clear())
    side.scan({x, d})
    assert b"d/q/x/new" in _paths(side)


@pytest.mark.parametrize("spots", [["d"], ["d", "d/p"], ["", "d", "d/p"]])
def test_what_is_owed_to_a_directory_is_paid_by_its_parent(
    side: LocalEndpoint, tmp_path: Path, spots: list[str]
):
    """Nothing is vouched for below it: that it was looked at itself does not change that."""
    put(tmp_path / "d/p/x/new", b"2")
    side.view.set_stamp((ROOT, b"d"), NO_STAMP)
    side.look({Spot(spot.encode()) for spot in spots})
    side.look({Spot(b"")})
    assert b"d/p/x/new" in _paths(side)


def test_a_directory_that_another_one_replaces_while_it_is_looked_at(
    side: LocalEndpoint,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
):
    """The other one is looked into when its parent is listed."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    put(elsewhere / "n/sub/g", b"2")
    put(tmp_path / "d/new", b"3")
    real, done = walk.Scanner._look, list[int]()

    def look(self: walk.Scanner, fd: int, place: Any, path: bytes, *rest: Any) -> Any:
        if path == b"d" and not done:
            done.append(1)
            (tmp_path / "d").rename(elsewhere / "gone")
            (elsewhere / "n").rename(tmp_path / "d")
        return real(self, fd, place, path, *rest)

    monkeypatch.setattr(walk.Scanner, "_look", look)
    side.look({Spot(b"d")})
    side.look({Spot(b"")})
    assert b"d/sub/g" in _paths(side)
    assert b"d/new" not in _paths(side)


def test_the_time_of_a_directory_is_seen_with_what_was_done_in_it(
    side: LocalEndpoint, tmp_path: Path
):
    """By the listing of the directory alone."""
    put(tmp_path / "d/p/new", b"2")
    assert side.look({Spot(b"d/p")}).changed == 2
    assert _mtime(side, b"d/p") == (tmp_path / "d/p").stat().st_mtime_ns


def _mtime(side: LocalEndpoint, path: bytes) -> int:
    node = _node(side, path)
    return side.nodes([node])[node].attributes.mtime_ns
