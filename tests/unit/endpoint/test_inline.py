"""Small files that go along: what they save, and what must not go along."""

import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bisync import Config, Policy, Reach, Report, Session
from bisync.core.resolve import OneWay
from bisync.endpoint import content
from bisync.endpoint.content import ContentServer
from bisync.endpoint.remote import RemoteEndpoint
from tests.trees import ELSEWHERE, command, put

Pair = tuple[Path, Path]
REACH = Reach(rsh=str(ELSEWHERE), agent_command=shlex.join(map(str, command())), compress=False)
NOISE = os.urandom(60_000)


def _session(here: Pair, config: Config | None = None) -> Session:
    a, b = here
    return Session(a, f"elsewhere:{b}", config, reach=REACH)


def _settled(session: Session) -> None:
    session.run()
    session.run(only=([], []))  # what the first one left


@pytest.fixture
def far(here: Pair) -> Iterator[tuple[Path, Path, Session]]:
    """Two folders, the second one elsewhere, in a session that is open."""
    a, b = here
    put(a / "d/f", b"1")
    put(b / "d/g", NOISE)
    with _session(here) as session:
        _settled(session)
        yield a, b, session


def _there(session: Session, *folders: str) -> Report:
    return session.run(only=([], list(folders)))


def test_holes_stay_holes(far: tuple[Path, Path, Session]):
    """A file that is nothing but a hole, on either side."""
    a, b, session = far
    for one in (a / "d/here", b / "d/there"):
        one.touch()
        os.truncate(one, 60_000)
    session.run(only=(["d"], ["d"]))
    for other in (b / "d/here", a / "d/there"):
        assert (other.stat().st_size, other.stat().st_blocks) == (60_000, 0)


def test_what_is_no_news_stays_there(far: tuple[Path, Path, Session]):
    """A file that got another name, or other permissions."""
    a, b, session = far
    (b / "d/g").rename(b / "d/h")
    assert _there(session, "d").bytes_received < 20_000
    (b / "d/h").chmod(0o600)
    assert _there(session, "d").bytes_received < 20_000
    assert (a / "d/h").stat().st_mode & 0o777 == 0o600


def test_what_waits_stays_there(here: Pair):
    """A conflict that nobody decided is not sent again with every run."""
    a, b = here
    put(a / "d/f", b"1")
    put(a / "e/f", b"1")
    with _session(here, Config(conflict=Policy.MANUAL)) as session:
        _settled(session)
        (a / "d/f").write_bytes(b"mine")
        (b / "d/f").write_bytes(NOISE)
        assert session.run(only=(["d"], ["d"])).waiting == 1
        (a / "e/f").write_bytes(b"2")
        assert session.run(only=(["e"], [])).bytes_received < 20_000
        assert (b / "e/f").read_bytes() == b"2"


def test_what_does_not_count_stays_there(here: Pair):
    """Nothing of the side that has to become what the other one is."""
    a, b = here
    put(a / "d/f", b"1")
    with _session(here, Config(one_way=OneWay.UNDO)) as session:
        _settled(session)
        (b / "d/f").write_bytes(NOISE)
        assert _there(session, "d").bytes_received < 20_000
        assert (b / "d/f").read_bytes() == b"1"


def test_what_came_long_ago_is_asked_for(
    far: tuple[Path, Path, Session], monkeypatch: pytest.MonkeyPatch
):
    """It may be another by then."""
    a, b, session = far
    monkeypatch.setattr(content, "_FRESH_S", 0.0)
    put(b / "d/new", b"2")
    real = RemoteEndpoint.supply
    asked = []

    def supply(self: RemoteEndpoint, node: int, *rest: object, **more: bool) -> object:
        asked.append(self._content.has([node]))
        return real(self, node, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(RemoteEndpoint, "supply", supply)
    _there(session, "d")
    assert asked == [False]
    assert (a / "d/new").read_bytes() == b"2"


def test_what_has_a_writer_is_left_out(far: tuple[Path, Path, Session]):
    """A new file is not made before its writer closes it."""
    a, b, session = far
    with open(b / "d/new", "wb", buffering=0) as file:
        file.write(b"half")
        assert _there(session, "d").exit_code == 24
        assert not (a / "d/new").exists()
        file.write(b" and half")
    _there(session, "d")
    assert (a / "d/new").read_bytes() == b"half and half"


@pytest.mark.parametrize("act", ["edit", "remove", "replace"])
def test_what_happens_after_it_came(
    far: tuple[Path, Path, Session], monkeypatch: pytest.MonkeyPatch, act: str
):
    """It is whole, if not the newest, and the next run carries what happened."""
    a, b, session = far
    put(b / "d/new", b"one")
    real = RemoteEndpoint.changed
    done: list[float] = []

    def changed(self: RemoteEndpoint, *rest: object) -> object:
        if not done:
            done.append(time.monotonic())
            match act:
                case "edit":
                    (b / "d/new").write_bytes(b"two")
                case "remove":
                    (b / "d/new").unlink()
                case _:
                    put(b / "d/other", b"two").rename(b / "d/new")
        return real(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(RemoteEndpoint, "changed", changed)
    _there(session, "d")
    assert not (a / "d/new").exists() or (a / "d/new").read_bytes() in (b"one", b"two")
    for _ in range(2):
        _there(session, "d")
    assert (a / "d/new").exists() == (b / "d/new").exists()
    if act != "remove":
        assert (a / "d/new").read_bytes() == b"two"


def test_many_are_asked_for(far: tuple[Path, Path, Session], monkeypatch: pytest.MonkeyPatch):
    """What goes along is little."""
    a, b, session = far
    wanted: list[int] = []
    real = ContentServer.want

    def want(self: ContentServer, stream: object, first: object) -> None:
        wanted.append(1)
        real(self, stream, first)  # type: ignore[arg-type]

    monkeypatch.setattr(ContentServer, "want", want)
    for number in range(17):
        put(a / f"d/m{number}", b"%d" % number)
    session.run(only=(["d"], []))
    assert len(wanted) == 17
    put(a / "d/big", NOISE + NOISE)
    session.run(only=(["d"], []))
    assert len(wanted) == 18
    assert (b / "d/big").read_bytes() == NOISE + NOISE
