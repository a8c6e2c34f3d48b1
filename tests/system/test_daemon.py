"""The daemon, its configuration, and what is asked over its socket."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.live import AGENT, Watching, ready, watching
from tests.trees import command, environment, look, put

Pair = tuple[Path, Path]

CONFIG = """
[defaults]
keep = "30d"

[session.one]
alpha = "{a}"
beta = "{b}"
watcher = "inotify"
exclude = ["*.tmp"]
"""


@contextlib.contextmanager
def daemon(folder: Path, text: str, **more: str) -> Iterator[tuple[Watching, Path]]:
    """A daemon with a configuration."""
    config = folder / "config.toml"
    config.write_text(text)
    process = subprocess.Popen(
        [sys.executable, "-m", "bisync", "daemon", "--json", "--config", str(config)],
        env=environment(BISYNC_RUNTIME_DIR=str(folder / "runtime"), **more),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    it = Watching(process, folder / "runtime")
    try:
        deadline = time.monotonic() + 60
        ends = ("watching", "failed")
        while it.status().get("phase") not in ends and time.monotonic() < deadline:
            time.sleep(0.1)
        yield it, config
    finally:
        process.terminate()
        _, said = process.communicate(timeout=60)
        it.said.append(said)
    assert process.returncode == 0
    assert "Traceback" not in said


def test_the_daemon(here: Pair):
    """It runs what the file says, takes a new file on SIGHUP, and says why not."""
    a, b = here
    c = a.parent / "C"
    c.mkdir()
    text = CONFIG.format(a=a, b=b)
    with daemon(a.parent, text) as (it, config):
        put(a / "f", b"1")
        put(a / "x.tmp", b"1")
        it.wait("one")
        assert look(b) == {"f": b"1"}
        config.write_text(text + "conflikt = 'newest'\n")
        it.process.send_signal(signal.SIGHUP)
        it.wait("one")
        config.write_text(text + f'[session.two]\nalpha = "{b}"\nbeta = "{c}"\n')
        it.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 30
        while not (c / "f").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (c / "f").exists()
        put(a / "g", b"2")
        for name in ("one", "two", "one"):
            it.wait(name)
        assert look(c) == {"f": b"1", "g": b"2"}
        second = subprocess.run(
            [sys.executable, "-m", "bisync", "daemon", "--config", str(config)],
            env=environment(BISYNC_RUNTIME_DIR=str(it.runtime)), capture_output=True, check=False,
        )  # fmt: skip
        assert second.returncode == 3
    assert "did you mean conflict" in "".join(it.said)


def test_the_service_manager(here: Pair):
    """It hears when all sessions are complete, and then that the daemon lives."""
    a, b = here
    put(a / "f", b"1")
    name = str(a.parent / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        manager.settimeout(30)
        more = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000000"}
        with daemon(a.parent, CONFIG.format(a=a, b=b), **more):
            heard = {manager.recv(100) for _ in range(4)}
            assert heard == {b"READY=1", b"WATCHDOG=1"}
            assert look(b) == {"f": b"1"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[session.x]\nalpha = '/a'\n", "beta: say where that side is"),
        ("[session.x]\nalpha = '/a'\nbeta = '/b'\nspecials = 1\n", "write true or false"),
        ("[session.x]\nalpha = '/a'\nbeta = '/b'\nconflict = 'best'\n", "invalid choice"),
        ("[session.x]\nalpha = '/a'\nbeta = '/b'\nkeep = ['1d', '2d']\n", "one value, not a list"),
        ("[sessions.x]\nalpha = '/a'\nbeta = '/b'\n", "did you mean session"),
        ("[session.x\n", "config.toml"),
        ("", "it has no session"),
    ],
)
def test_a_configuration_that_is_wrong(tmp_path: Path, text: str, said: str):
    """It is said what, and where; nothing is started: 2."""
    config = tmp_path / "config.toml"
    config.write_text(text)
    for words in ((), ("--check",)):
        done = subprocess.run(
            [sys.executable, "-m", "bisync", "daemon", "--config", str(config), *words],
            env=environment(BISYNC_RUNTIME_DIR=str(tmp_path / "run")), capture_output=True,
            text=True, check=False, timeout=30,
        )  # fmt: skip
        assert done.returncode == 2
        assert said in done.stderr


@contextlib.contextmanager
def events(it: Watching, *words: str) -> Iterator[tuple[subprocess.Popen[str], Iterator[Any]]]:
    """Somebody who listens: the process, and what it hears from now on."""
    listener = subprocess.Popen(
        command("events", *words), env=environment(BISYNC_RUNTIME_DIR=str(it.runtime)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert listener.stdout is not None
    try:
        yield listener, (json.loads(text) for text in listener.stdout)
    finally:
        listener.kill()
        listener.communicate(timeout=30)


def test_what_happens_is_told(here: Pair):
    """To everybody who listens, with the session's name, also of sessions that come later."""
    a, b = here
    c = a.parent / "C"
    c.mkdir()
    text = CONFIG.format(a=a, b=b)
    with daemon(a.parent, text) as (it, config), events(it) as (_, all_of), events(it, "one") as (
        _, of_one,
    ):  # fmt: skip
        first = {"type": "listening", "session": "one"}
        assert (next(all_of), next(of_one)) == (first, first)
        put(a / "f", b"1")
        for heard in (all_of, of_one):
            row = next(heard)
            assert (row["type"], row["side"], row["action"], row["path"], row["session"]) == (
                "change", "beta", "create", "f", "one",
            )  # fmt: skip
        config.write_text(text + f'[session.two]\nalpha = "{b}"\nbeta = "{c}"\n')
        it.process.send_signal(signal.SIGHUP)
        # It may hear of the first run, or come too late for that.
        assert any(row == {"type": "listening", "session": "two"} for row in all_of)
        put(a / "g", b"1")
        assert any(row.get("path") == "g" and row["session"] == "two" for row in all_of)
        assert next(of_one)["path"] == "g"


def test_nobody_left_to_tell(here: Pair):
    """The end of the last session ends it: 12; a wrong name is said at once: 2."""
    a, b = here
    with watching(a, b) as it:
        ready(it)
        with events(it, "other") as (listener, heard):
            assert list(heard) == []
            assert listener.wait(30) == 2
        with events(it) as (listener, heard):
            next(heard)
            it.stop()
            assert list(heard) == []
            assert listener.wait(30) == 12
        with events(it) as (listener, heard):
            assert list(heard) == []
            assert listener.wait(30) == 12


def test_who_listens_delays_nobody(here: Pair):
    """A listener that reads nothing; what it missed is counted, and the rest comes."""
    a, b = here
    with watching(a, b) as it:
        ready(it)
        with events(it) as (listener, heard):
            next(heard)
            listener.send_signal(signal.SIGSTOP)
            for number in range(3):
                for each in range(5000):
                    put(a / f"d{number}/with-a-rather-long-name-{each}", b"")
                it.wait()
            listener.send_signal(signal.SIGCONT)
            rows = []
            for row in heard:
                rows.append(row)
                if row["type"] == "lost":
                    break
    files = sum(row.get("path", "").startswith("d") for row in rows)
    assert files + rows[-1]["events"] == 3 * 5001
    assert rows[-1]["events"] > 0


@pytest.mark.parametrize("where", ["near", "far"])
def test_how_much_room_it_takes(here: Pair, where: str):
    """The index, bases, stage and store of each side."""
    a, b = here
    put(a / "f", os.urandom(200_000))
    put(b / "f", os.urandom(300_000))
    os.utime(a / "f", (1, 1))
    there = b if where == "near" else f"elsewhere:{b}"
    with watching(a, there, *AGENT) as it:
        ready(it)
        near, far = it.shows(lambda s: s["sizes"])["sizes"]
        text = it.ask("status").stdout
        figures = it.ask("status", "--prometheus").stdout
    assert near["index"] > 50_000
    assert far["index"] > 50_000
    assert 200_000 <= near["store"] < 300_000
    assert far["store"] == 0
    assert "alpha's own files: index" in text
    assert f'side="alpha",part="store"}} {near["store"]}' in figures
