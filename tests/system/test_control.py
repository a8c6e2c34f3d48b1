"""What is asked of running sessions, and a configuration that is read again: nobody is misled."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.live import AGENT, Watching, ready, watching
from tests.system.test_daemon import CONFIG, daemon
from tests.trees import Outcome, assert_equal, command, environment, look, put

Pair = tuple[Path, Path]
READS_NOT_ALL = () if os.geteuid() else ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


def ask(it: Watching, *words: str, folder: Path | None = None, seconds: float = 60) -> Outcome:
    """Ask, from a folder, within a time."""
    done = subprocess.run(
        command(*words), env=environment(BISYNC_RUNTIME_DIR=str(it.runtime)), cwd=folder,
        capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def two(here: Pair) -> Iterator[tuple[Watching, Watching]]:
    """Two processes with a session each, "fine" and "frozen"; the second one does not answer."""
    a, b = here
    c, d = a.parent / "C", a.parent / "D"
    c.mkdir()
    d.mkdir()
    runtime = a.parent / "runtime"
    with (
        watching(a, b, "--name", "fine", runtime=runtime) as fine,
        watching(c, d, "--name", "frozen", runtime=runtime) as frozen,
    ):
        ready(fine)
        ready(frozen)
        frozen.process.send_signal(signal.SIGSTOP)
        try:
            yield fine, frozen
        finally:
            frozen.process.send_signal(signal.SIGCONT)


def test_a_process_that_does_not_answer(two: tuple[Watching, Watching]):
    """It keeps nobody from asking the others; who waits for it waits no longer than he said."""
    fine, _ = two
    assert ask(fine, "wait", "fine").rc == 0
    assert ask(fine, "wait", "fine", "--timeout", "5").rc == 0
    assert "(process" in ask(fine, "status", "fine").stdout
    assert ask(fine, "wait", "frozen", "--timeout", "1", seconds=30).rc == 30
    assert ask(fine, "wait", "frozen", "--timeout", "0", seconds=30).rc == 30
    assert ask(fine, "wait", "frozen").rc == 12
    everybody = ask(fine, "status", "--json")
    assert everybody.rc == 12
    assert json.loads(everybody.stdout.splitlines()[0])["session"] == "fine"
    assert ask(fine, "wait", "--timeout", "1", seconds=30).rc == 30  # of all: not all are complete


def test_a_session_by_a_path_of_who_asks(here: Pair):
    """A relative path means the asking shell's folder, and nobody else's."""
    a, b = here
    elsewhere = a.parent / "elsewhere"
    (elsewhere / "A").mkdir(parents=True)
    process = subprocess.Popen(
        command("watch", "A", "./B"), cwd=a.parent, stdout=subprocess.DEVNULL,
        env=environment(BISYNC_RUNTIME_DIR=str(a.parent / "runtime")),
    )  # fmt: skip
    it = Watching(process, a.parent / "runtime")
    try:
        found = it.shows(lambda status: status.get("phase") == "watching")
        assert (found["alpha"], found["beta"]) == (str(a), str(b))
        for folder, word in ((a, "."), (a.parent, "A"), (b, "../A"), (elsewhere, "../B")):
            assert ask(it, "status", word, folder=folder).rc == 0, (folder, word)
        for word in ("A", "./A", ".", "./B"):
            assert ask(it, "resume", word, "--yes", folder=elsewhere).rc == 2, word
        assert ask(it, "pause", str(a), folder=elsewhere).rc == 0
    finally:
        assert it.stop() == 0


def test_who_follows_outlives_a_root_that_goes(here: Pair):
    """It halts, as who drives does, and goes on when the root is back."""
    a, b = here
    put(a / "f", b"1")
    with watching(a, b) as driver:
        ready(driver)
        with watching(a, b, runtime=a.parent / "second") as it:
            assert it.shows(lambda s: s.get("phase") == "following")["phase"] == "following"
            driver.process.kill()
            driver.process.wait()
            b.rename(b.with_name("away"))
            assert it.shows(lambda s: s.get("phase") == "halted")["phase"] == "halted"
            b.with_name("away").rename(b)
            put(a / "g", b"2")
            it.shows(lambda s: s.get("phase") == "watching", 90)
            it.wait()
            assert_equal(a, b)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("poll = 'abc'\n", "--poll abc"),
        ("poll = 0\n", "--poll 0: at least"),
        ("timeout = 'x'\n", "--timeout x"),
        ("bwlimit = 'x'\n", "--bwlimit"),
        ("[session.two]\nalpha = '{a}'\nbeta = 'ssh://'\n", "ssh://"),
        ("[session.two]\nalpha = '{a}'\nbeta = '{a}'\n", "the same directory"),
        ("[session.two]\nalpha = '{a}'\nbeta = '{a}/sub'\n", "lies inside"),
    ],
)
def test_a_new_configuration_that_cannot_be(here: Pair, more: str, said: str):
    """``--check`` says so, and SIGHUP: what runs goes on as before."""
    a, b = here
    text = CONFIG.format(a=a, b=b)
    with daemon(a.parent, text) as (it, config):
        config.write_text(text + more.format(a=a))
        checked = ask(it, "daemon", "--check", "--config", str(config))
        assert (checked.rc, said in checked.stderr) == (2, True), checked
        it.process.send_signal(signal.SIGHUP)
        for number in range(3):
            put(a / f"f{number}", b"1")
            it.wait("one")
        assert len(look(b)) == 3
    assert said in "".join(it.said)
    assert "going on as before" in "".join(it.said)


def test_a_file_that_the_configuration_names(here: Pair):
    """What it says counts, when the configuration is read again: not its name alone."""
    a, b = here
    patterns = put(a.parent / "patterns", b"*.tmp\n")
    text = CONFIG.format(a=a, b=b) + f'exclude-from = ["{patterns}"]\n'
    with daemon(a.parent, text) as (it, _):
        put(patterns, b"*.tmp\n*.bak\n")
        it.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 60
        number = 0
        while time.monotonic() < deadline:
            number += 1
            put(a / f"{number}.bak", b"1")
            put(a / f"{number}.txt", b"1")
            it.ask("wait", "one", check=(0, 2, 12))
            if (b / f"{number}.txt").exists() and not (b / f"{number}.bak").exists():
                break
        assert f"{number}.bak" not in look(b)


def test_no_room_for_what_is_said(here: Pair):
    """A log that takes nothing stops no replication."""
    a, b = here
    config = a.parent / "config.toml"
    config.write_text(CONFIG.format(a=a, b=b))
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(
            [sys.executable, "-m", "bisync", "daemon", "-v", "--config", str(config)], stdout=full,
            env=environment(BISYNC_RUNTIME_DIR=str(a.parent / "runtime")),
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        it = Watching(process, a.parent / "runtime")
        try:
            it.shows(lambda s: s.get("phase") == "watching")
            for number in range(3):
                put(a / f"f{number}", b"1")
                it.wait()
            assert_equal(a, b)
        finally:
            process.terminate()
            _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in said
    assert said.count("nothing more is written") == 1


def test_who_waits_for_a_session_that_failed(here: Pair):
    """He hears why, and at once."""
    a, _ = here
    text = CONFIG.format(a=a, b=a.parent / "missing")
    with daemon(a.parent, text) as (it, _):
        assert it.status()["phase"] == "failed"
        done = ask(it, "wait", "one", seconds=15)
        assert done.rc == 2
        assert "missing" in done.stdout


def test_each_line_of_a_daemon_is_json(here: Pair):
    """The last one, too: what was done, by session."""
    a, b = here
    config = a.parent / "config.toml"
    config.write_text(CONFIG.format(a=a, b=b))
    process = subprocess.Popen(
        [sys.executable, "-m", "bisync", "daemon", "--json", "--config", str(config)],
        env=environment(BISYNC_RUNTIME_DIR=str(a.parent / "runtime")),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    it = Watching(process, a.parent / "runtime")
    it.shows(lambda s: s.get("phase") == "watching")
    put(a / "f", b"1")
    it.wait()
    process.send_signal(signal.SIGHUP)
    it.wait()
    process.terminate()
    text, _ = process.communicate(timeout=60)
    rows = [json.loads(row) for row in text.splitlines()]
    assert (rows[-1]["type"], rows[-1]["session"], rows[-1]["created"]) == ("summary", "one", 1)
    assert process.returncode == 0


def test_a_waiting_conflict_is_counted_once(here: Pair):
    """In status and in the summary, however often it is met."""
    a, b = here
    put(a / "f", b"old")
    with watching(a, b, "--conflict", "manual") as it:
        ready(it)
        it.ask("pause")
        put(a / "f", b"from alpha")
        put(b / "f", b"from beta!")
        it.ask("resume")
        it.wait(check=40)
        for number in range(4):
            put(a / f"g{number}", b"1")
            it.ask("flush", check=40)
        found = it.status()
        assert (found["waiting_conflicts"], found["totals"]["conflicts"]) == (1, 1)
        assert it.stop() == 0
    assert (it.summary["waiting"], it.summary["conflicts"]) == (1, 1)


def test_a_name_that_a_terminal_would_obey(here: Pair):
    """In status it is shown as what it is."""
    a, b = here
    put(b / "\x1b[31mred\nline", b"1")
    with watching(a, b, "--one-way", "--leave-edits", *AGENT) as it:
        ready(it)
        it.shows(lambda s: s["problems"])
        for text in (it.ask("status").stdout, *it.status()["problems"]):
            assert "\\x1b[31mred\\x0aline" in text
            assert "\x1b" not in text


@contextlib.contextmanager
def _unreadable(folder: Path) -> Iterator[None]:
    folder.chmod(0)
    try:
        yield
    finally:
        folder.chmod(0o700)


def test_complete_means_complete(here: Pair):
    """What could not be looked at is not done, whatever else is; the roots' facts say the same."""
    a, b = here
    (a / "d").mkdir()
    put(a / "d/1", b"1")
    with watching(a, b, "--watcher", "inotify", prefix=READS_NOT_ALL) as it:
        ready(it)
        it.ask("pause")
        put(a / "d/2", b"2")
        with _unreadable(a / "d"):
            it.ask("resume")
            assert it.wait(check=23).rc == 23
            before = [_facts(root)["pairs"][0]["complete_ns"] for root in (a, b)]
            put(a / "other", b"1")
            assert it.wait(check=23).rc == 23
            assert (b / "other").exists()
            assert before == [_facts(root)["pairs"][0]["complete_ns"] for root in (a, b)]
        it.ask("flush")
        assert_equal(a, b)
        after = [_facts(root)["pairs"][0]["complete_ns"] for root in (a, b)]
        assert all(new > old for new, old in zip(after, before, strict=True))


def _facts(root: Path) -> dict[str, list[dict[str, int]]]:
    found: dict[str, list[dict[str, int]]] = json.loads((root / ".bisync/facts.json").read_text())
    return found
