"""One engine at a time on a root: whoever else wants to work on it gets a turn."""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bisync import Config, EndpointError, HeldTooLongError, Reach, RootLockedError, Session
from tests.system.live import Watching, ready, watching
from tests.trees import ELSEWHERE, assert_equal, command, environment, look, put, run, sync

Pair = tuple[Path, Path]
AGENT = shlex.join(map(str, command()))
REACH = ("-e", ELSEWHERE, "--agent-command", AGENT)
HOLD = """
import sys
from bisync import Session
with Session(sys.argv[1], sys.argv[2]) as session:
    session.run()
    print("held", flush=True)
    with session._in_hand:  # as if a run were in hand
        sys.stdin.read()
"""


def roots(base: Path, names: str) -> list[Path]:
    """Some empty roots."""
    found = [base / name for name in names]
    for place in found:
        place.mkdir(exist_ok=True)
    return found


def held(a: Path, b: Path) -> subprocess.Popen[str]:
    """A process that has both roots in hand until its input ends."""
    words = [sys.executable, "-c", HOLD, str(a), str(b)]
    child = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def let_go(child: subprocess.Popen[str]) -> None:
    """Its run ends."""
    child.communicate()
    assert child.returncode == 0


def test_a_session_at_rest_gives_its_roots_away(here: Pair):
    """A command works beside an open session, which then goes on with what it did."""
    a, b = here
    put(a / "f", b"1")
    with Session(a, b) as session:
        session.run()
        put(b / "g", b"2")
        assert sync(a, b).summary["created"] == 1
        put(a / "h", b"3")
        assert session.run().created == 1
        assert session.run(only=([], [])).conflicts == 0
    assert_equal(a, b)


def test_a_star(here: Pair):
    """Two open sessions share a root, and both see what the other did: edits, moves, removals."""
    base = here[0].parent
    a, hub, c = roots(base, "AHC")
    put(a / "d/f", b"1")
    with Session(a, hub) as one, Session(hub, c) as two:
        for session in (one, two):
            session.run()
        put(c / "d/g", b"2")
        (a / "d").rename(a / "e")
        (a / "e/f").write_bytes(b"edited")
        for session in (one, two, one, two):
            report = session.run()
            assert report.conflicts == 0
        assert look(c) == {"e": None, "e/f": b"edited", "e/g": b"2"}
        (c / "e/f").unlink()
        for session in (two, one):
            session.run()
    for place in (a, hub):
        assert_equal(place, c)


def test_sessions_that_want_each_others_roots(here: Pair):
    """Who holds one root does not wait for the other for ever."""
    a, b, c = roots(here[0].parent, "ABC")

    def work(one: Path, two: Path) -> None:
        with Session(one, two) as session:
            for number in range(4):
                put(one / f"{one.name}{two.name}{number}", b"x")
                session.run()

    threads = [
        threading.Thread(target=work, args=pair) for pair in ((a, b), (b, c), (c, a), (b, a))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, two in ((a, b), (b, c), (c, a), (a, b)):
        Session(one, two).run()
    assert len(look(a)) == 16
    assert_equal(a, b)
    assert_equal(b, c)


def test_a_command_waits_for_the_run_in_hand(here: Pair):
    """It says for whom, and goes on as soon as that is done."""
    a, b = here
    put(a / "f", b"1")
    child = held(a, b)
    put(b / "g", b"2")
    words = command("sync", a, b)
    waiting = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    assert waiting.stderr is not None
    said = waiting.stderr.readline()
    assert f"process {child.pid}" in said
    assert waiting.poll() is None
    let_go(child)
    waiting.communicate()
    assert waiting.returncode == 0
    assert_equal(a, b)


def test_waiting_ends_with_timeout(here: Pair):
    """Then the command says who has the root: 30."""
    a, b = here
    child = held(a, b)
    outcome = sync(a, b, "--timeout", "1", check=30)
    assert f"process {child.pid}" in outcome.said
    assert outcome.summary["exit_code"] == 30
    with pytest.raises(HeldTooLongError):
        Session(a, b, Config(wait_s=0)).run()
    mirrored = run("mirror", "-a", "--timeout", "1", "--json", f"{a}/", b, check=30)
    assert f"process {child.pid}" in mirrored.said
    far, source = f"elsewhere:{b}", roots(a.parent, "C")[0]
    words = ("mirror", "-a", "-e", ELSEWHERE, "--rsync-path", AGENT, "--timeout", "3")
    mirrored = run(*words, f"{source}/", far, check=30)
    assert f"process {child.pid}" in mirrored.said
    let_go(child)
    sync(a, b, "--timeout", "1")
    endless = ("--timeout", "9999999999")
    sync(a, Path(far), "-e", ELSEWHERE, "--agent-command", AGENT, *endless)


def test_a_holder_that_was_killed_holds_nothing(here: Pair):
    """Who waited goes on at once; the socket it left is nobody's."""
    a, b = here
    child = held(a, b)
    waiting = subprocess.Popen(command("sync", a, b), env=environment(), stderr=subprocess.PIPE)
    assert waiting.stderr is not None
    assert b"waiting" in waiting.stderr.readline()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    waiting.communicate()
    assert waiting.returncode == 0
    assert (a / ".bisync/socket").exists() is False


def test_a_holder_that_does_not_answer(here: Pair):
    """Whatever it is, it is not waited for: 3."""
    a, b = here
    sync(a, b)
    with (b / ".bisync/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "does not answer" in sync(a, b, check=3).said
        with pytest.raises(RootLockedError):
            Session(a, b).run()
    sync(a, b)


def test_only_the_owner_may_ring(here: Pair):
    """The bell is not for other users."""
    a, b = here
    with Session(a, b) as session:
        session.run()
        info = os.stat(a / ".bisync/socket")
        assert info.st_mode & 0o777 == 0o600


def test_a_far_root_is_given_away(here: Pair):
    """An agent whose driver is at rest lets others work there, and goes on afterwards."""
    a, b = here
    put(a / "f", b"1")
    reach = Reach(rsh=str(ELSEWHERE), agent_command=AGENT)
    with Session(a, f"elsewhere:{b}", reach=reach) as session:
        session.run()
        c = roots(a.parent, "C")[0]
        sync(b, c, "--timeout", "20")
        put(c / "g", b"2")
        sync(c, b, "--timeout", "20")
        assert session.run(only=([], [""])).created == 1
        put(a / "h", b"3")
        assert session.run(only=([""], [])).created == 1
    sync(b, c)
    for place in (b, c):
        assert_equal(a, place)


def test_an_agent_whose_driver_is_gone_is_not_waited_for(here: Pair, tmp_path: Path):
    """A driver that stopped in the middle of a run keeps others out for seconds only."""
    a, b = here
    put(a / "f", b"1")
    words = command("sync", a, f"elsewhere:{b}", "-e", ELSEWHERE, "--agent-command", AGENT)
    sync(a, b)
    put(a / "big", b"x" * 50_000_000)
    driver = subprocess.Popen(words, env=environment(), start_new_session=True)
    assert _is_held(b, driver)
    driver.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        sync(b, roots(tmp_path, "C")[0], "--timeout", "40")
        assert time.monotonic() - began < 40
    finally:
        driver.send_signal(signal.SIGCONT)
        driver.wait()


def _is_held(root: Path, driver: subprocess.Popen[bytes]) -> bool:
    """Wait until the far root is held."""
    while driver.poll() is None:
        with (root / ".bisync/lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        time.sleep(0.002)
    return False


def test_one_directory_twice(here: Pair, mount: Callable[..., None]):
    """Whichever way it is reached, it is no pair."""
    a, b = here
    put(a / "f", b"1")
    reach = ("-e", ELSEWHERE, "--agent-command", AGENT)
    for _ in range(2):
        assert "the same directory" in sync(a, Path(f"elsewhere:{a}"), *reach, check=2).said
        assert "the same directory" in sync(Path(f"elsewhere:{a}"), a, *reach, check=2).said
        sync(a, b)
    mount(b, "--bind", a)
    assert "the same directory" in sync(a, b, check=2).said


def test_a_holder_that_is_stopped(here: Pair):
    """It is not waited for without end, whichever of the roots it has."""
    a, b = here
    c = roots(a.parent, "C")[0]
    child = held(a, b)
    child.send_signal(signal.SIGSTOP)
    try:
        assert "does not answer" in sync(c, b, check=3).said
    finally:
        child.send_signal(signal.SIGCONT)
    let_go(child)


def test_nobody_leads_the_bell_astray(here: Pair):
    """A link in the place of the socket is not followed, nor is anything else made of it."""
    a, b = here
    sync(a, b)
    victim = put(a.parent / "victim", b"1", mode=0o644)
    (a / ".bisync/socket").symlink_to(victim)
    with Session(a, b) as session:
        session.run()
        assert (a / ".bisync/socket").is_socket()
    assert victim.stat().st_mode & 0o777 == 0o644


def test_a_state_folder_that_was_taken_away(here: Pair):
    """An open session does not go on with what is not the root's any more."""
    a, b = here
    with Session(a, b) as session:
        session.run()
        (a / ".bisync").rename(a.parent / "taken")
        put(a / "f", b"1")
        with pytest.raises(EndpointError):
            session.run()
        assert session.run().created == 1
    assert_equal(a, b)


def test_many_descriptors(here: Pair):
    """However many files a process has open, it hears the bell."""
    a, b = here
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with Session(a, b) as session:
            session.run()
            sync(a, b, "--timeout", "20")
    finally:
        for fd in taken:
            os.close(fd)


def status_of(it: Watching, wanted: str) -> dict[str, Any]:
    """Its status, once it is in a phase."""
    return it.shows(lambda status: status.get("phase") == wanted)


@pytest.mark.parametrize("far", [False, True])
def test_two_sessions_of_one_pair(here: Pair, far: bool):
    """One drives, whichever end it is at; the other one says so, and goes on when that is gone."""
    a, b = here
    put(a / "f", b"1")
    there = f"elsewhere:{b}" if far else b
    back = f"elsewhere:{a}" if far else a
    one, two = a.parent / "one", a.parent / "two"
    with watching(a, there, *REACH, runtime=one) as first:
        ready(first)
        with watching(b, back, *REACH, runtime=two) as second:
            status = status_of(second, "following")
            assert f"process {first.process.pid} on" in status["reason"]
            assert "drives this pair already" in second.ask("wait", check=3).stdout
            put(b / "g", b"2")
            first.wait()
            assert_equal(a, b)
            sync(a, b)  # a command has its turn all the same
            first.process.kill()
            first.process.wait()
            ready(second)
            put(a / "h", b"3")
            second.wait()
            assert_equal(a, b)
        first.said.clear()


def test_a_driver_that_was_not_heard_for_long(here: Pair):
    """Its claims are given up meanwhile; heard again, it makes them again, and nobody else's."""
    a, b = here
    put(a / "f", b"1")
    one, two = a.parent / "one", a.parent / "two"
    with watching(f"elsewhere:{a}", f"elsewhere:{b}", *REACH, runtime=one) as first:
        ready(first)
        first.process.send_signal(signal.SIGSTOP)
        time.sleep(13)  # an agent gives a driver up that it has not heard for ten seconds
        first.process.send_signal(signal.SIGCONT)
        put(a / "g", b"2")
        first.wait()
        assert_equal(a, b)
        with watching(a, b, runtime=two) as second:
            assert "drives this pair already" in status_of(second, "following")["reason"]


def test_a_star_has_a_driver_for_each_pair(here: Pair):
    """A claim is a pair's, not a root's."""
    a, b = here
    c = roots(a.parent, "C")[0]
    put(a / "f", b"1")
    one, two = a.parent / "one", a.parent / "two"
    with watching(a, b, runtime=one) as first, watching(a, c, runtime=two) as second:
        ready(first)
        ready(second)
        put(c / "g", b"2")
        second.wait()
        first.wait()
        assert_equal(a, b)
        assert_equal(a, c)
