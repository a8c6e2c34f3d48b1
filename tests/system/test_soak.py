"""Writers on both sides, a wire that is cut, ends that are killed: in the end all is there.

Two machines (network namespaces), a real sshd, ``bisync watch``. BISYNC_SOAK_SECONDS=7200 for the
full run: then the wire is cut every 20 s and an end is killed every 60 s.
"""

import contextlib
import hashlib
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.system.hosts import hosts, ip
from tests.system.live import Watching, ready, watching
from tests.system.sshd import machine
from tests.trees import assert_equal, look

SECONDS = float(os.environ.get("BISYNC_SOAK_SECONDS", "40"))
CUT_S, KILL_S = min(20.0, SECONDS / 4), min(60.0, SECONDS / 3)
ASK_S = 2.0
BLOCK, BLOCKS = 64 << 10, 48

# Each works in its own folder until it is told to stop, then says what has to be there.
HEAD = """
import hashlib, json, os, random, sqlite3, subprocess, sys, time
os.makedirs(sys.argv[1], exist_ok=True)
os.chdir(sys.argv[1])
stop = sys.argv[2]
chance = random.Random(sys.argv[3])
"""
WRITERS = {
    "database": """
db = sqlite3.connect('x.db', isolation_level=None)
db.execute('PRAGMA journal_mode=WAL')
db.execute('CREATE TABLE t(n INTEGER PRIMARY KEY)')
n = 0
while not os.path.exists(stop):
    n += 1
    db.execute('INSERT INTO t VALUES(?)', (n,))
    time.sleep(0.05)
db.close()
print(json.dumps(n))
""",
    "log": """
n = 0
while not os.path.exists(stop):
    n += 1
    with open('log', 'a') as file:
        file.write('%d %s\\n' % (n, hashlib.sha256(b'%d' % n).hexdigest()))
    time.sleep(0.03)
print(json.dumps(n))
""",
    "image": f"""
n = 0
while not os.path.exists(stop):
    n += 1
    with open('image', 'r+b' if n > 1 else 'wb') as file:
        for block in range({BLOCKS}):
            file.write(b'%08d' % n + bytes({BLOCK} - 8))
    time.sleep(0.8)
print(json.dumps(n))
""",
    "git": """
def git(*words):
    subprocess.run(['git', '-c', 'user.name=x', '-c', 'user.email=x@y', *words], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
git('init', '-b', 'main', '.')
n = 0
while not os.path.exists(stop):
    n += 1
    open('f%d' % (n % 7), 'w').write('%d' % n)
    git('add', '-A')
    git('commit', '-m', '%d' % n)
    if n % 20 == 0:
        git('gc', '-q')
    time.sleep(0.1)
print(json.dumps(n))
""",
    "tokens": """
there, n = {}, 0
while not os.path.exists(stop):
    n += 1
    names = sorted(there)
    match chance.randrange(6):
        case 0 | 1:
            name = 'd%d/t%d' % (chance.randrange(5), n)
            os.makedirs(os.path.dirname(name), exist_ok=True)
            open(name, 'w').write(name)
            there[name] = name
        case 2 if names:  # as an editor saves
            name = chance.choice(names)
            open(name + '~new', 'w').write('%s %d' % (name, n))
            os.rename(name + '~new', name)
            there[name] = '%s %d' % (name, n)
        case 3 if names:
            name = chance.choice(names)
            new = os.path.dirname(name) + '/m%d' % n
            os.rename(name, new)
            there[new] = there.pop(name)
        case 4 if len(names) > 20:
            name = chance.choice(names)
            os.unlink(name)
            del there[name]
        case 5 if n % 10 == 0:
            old = chance.choice(sorted(x for x in os.listdir('.')) or ['.'])
            if old != '.':
                os.rename(old, 'r%d' % n)
                moved = [x for x in there if x.startswith(old + '/')]
                for name in moved:
                    there['r%d' % n + name[len(old):]] = there.pop(name)
    time.sleep(0.02)
print(json.dumps(there))
""",
}
PLACES = (("database", 0), ("log", 1), ("image", 0), ("git", 1), ("tokens", 0), ("tokens", 1))


@dataclass
class Soak:
    """What is going on, and what was seen."""

    a: Path
    b: Path
    stop: Path
    images: set[bytes] = field(default_factory=set)
    torn: list[str] = field(default_factory=list)
    asked: int = 0
    cuts: int = 0
    kills: int = 0

    @contextlib.contextmanager
    def writers(self) -> Iterator[dict[str, Any]]:
        """Let them write while the block runs; what they say they left, at its end."""
        said: dict[str, Any] = {}
        started = {}
        for name, number in PLACES:
            folder = (self.a, self.b)[number] / f"{name}{number}"
            words = [sys.executable, "-c", HEAD + WRITERS[name], folder, self.stop, str(number)]
            started[folder.name] = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        try:
            yield said
        finally:
            self.stop.touch()
            for key, process in started.items():
                out, _ = process.communicate(timeout=60)
                said[key] = json.loads(out) if process.returncode == 0 else None

    def look_at_image(self) -> None:
        """Whatever version can be opened at the other end is one version."""
        try:
            data = (self.b / "image0/image").read_bytes()
        except FileNotFoundError:
            return
        stamps = {data[at : at + 8] for at in range(0, len(data), BLOCK)}
        if len(stamps) != 1 or len(data) != BLOCK * BLOCKS:
            self.torn.append(f"{len(data)} bytes, stamps {sorted(stamps)[:4]}")
        self.images |= stamps


def _agents(port: int) -> list[int]:
    """The other end: what an sshd of this test runs."""
    found = []
    for each in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (each / "cmdline").read_bytes().split(b"\0")
            if b"agent" in words and b"BISYNC_SOAK=%d" % port in (each / "environ").read_bytes():
                found.append(int(each.name))
    return found


@pytest.mark.timeout(SECONDS + 900)
@pytest.mark.parametrize("kind", ["fanotify", "inotify"])
def test_soak(two_hosts: tuple[str, str], tmp_path: Path, here: tuple[Path, Path], kind: str):
    """Equal trees, every token where it belongs, nothing torn, whatever was cut or killed."""
    one, two = two_hosts
    soak = Soak(*here, stop=tmp_path / "stop")
    folder = tmp_path / "sshd"
    folder.mkdir()
    with machine(folder, "ip", "netns", "exec", two, address="192.0.2.2") as there:
        agent = f"env BISYNC_SOAK={there.port} bisync"
        guard = ("--max-delete", "100%")  # git packs its objects: hundreds of files go at once
        reach = ("--timeout", "5", "--rsh", there.rsh, "--agent-command", agent)
        words = (*guard, *reach, "--watcher", kind)
        far, prefix = f"192.0.2.2:{soak.b}", ("ip", "netns", "exec", one)
        ends = itertools.cycle(("agent", "driver"))
        began = time.monotonic()
        with contextlib.ExitStack() as running:
            it = running.enter_context(watching(soak.a, far, *words, prefix=prefix))
            with soak.writers() as said:
                ask_at, cut_at, kill_at = began, began + CUT_S, began + KILL_S
                while (now := time.monotonic()) - began < SECONDS:
                    soak.look_at_image()
                    if now > ask_at:
                        soak.asked += "phase" in it.status()
                        ask_at = time.monotonic() + ASK_S
                    if now > cut_at:
                        _cut(one)
                        soak.cuts += 1
                        cut_at = time.monotonic() + CUT_S
                    if now > kill_at:
                        soak.kills += 1
                        kill_at = time.monotonic() + KILL_S
                        if next(ends) == "agent":
                            for pid in _agents(there.port):
                                with contextlib.suppress(ProcessLookupError):
                                    os.kill(pid, signal.SIGKILL)
                        else:
                            it.process.kill()
                            running.close()
                            it = running.enter_context(watching(soak.a, far, *words, prefix=prefix))
                    with it.changed:
                        it.changed.wait(0.1)
            _quiet(it)
    assert not soak.torn, soak.torn
    assert_equal(*here)
    _as_said(soak, said)
    print(
        f"{SECONDS:.0f} s, {kind}: {soak.cuts} cuts, {soak.kills} kills, {len(soak.images)}"
        f" versions of the image seen, {said['database0']} rows, {said['log1']} lines,"
        f" {said['git1']} commits, {len(said['tokens0']) + len(said['tokens1'])} tokens"
    )
    assert soak.cuts >= 2
    assert soak.kills >= 2
    assert soak.asked >= 2
    assert len(soak.images) >= 2


def _cut(host: str) -> None:
    """The wire is down for longer than anybody waits: that is what the sleep is, not a hope."""
    ip("-n", host, "link", "set", "wire", "down")
    time.sleep(6)
    ip("-n", host, "link", "set", "wire", "up")


def _quiet(it: Watching) -> None:
    """Until it says that all is done; after a long soak there is much to look at again."""
    patience_s = 180 + SECONDS / 10
    ready(it, seconds=patience_s)
    deadline = time.monotonic() + patience_s
    while (done := it.ask("wait", "--timeout", "60", check=(0, 12, 23, 24, 30))).rc:
        assert time.monotonic() < deadline, (done, it.status(), it.said[-20:])


def _as_said(soak: Soak, said: dict[str, Any]) -> None:
    """What the writers left, at the end where they did not write."""
    a, b = soak.a, soak.b
    assert None not in said.values(), said
    with contextlib.closing(sqlite3.connect(b / "database0/x.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT count(*), max(n) FROM t").fetchone() == (said["database0"],) * 2
    lines = (a / "log1/log").read_text().splitlines()
    assert lines == [
        f"{n} {hashlib.sha256(b'%d' % n).hexdigest()}" for n in range(1, said["log1"] + 1)
    ]
    assert (b / "image0/image").read_bytes()[:8] == b"%08d" % said["image0"]
    repository = a / "git1"
    checked = ["git", "-c", "safe.directory=*", "-C", repository]
    subprocess.run([*checked, "fsck", "--strict"], check=True, capture_output=True)
    log = subprocess.run([*checked, "rev-list", "--count", "HEAD"], check=True, capture_output=True)
    assert int(log.stdout) == said["git1"]
    for folder in ("tokens0", "tokens1"):
        found = {name: text for name, text in look(b / folder).items() if isinstance(text, bytes)}
        assert {name: text.decode() for name, text in found.items()} == said[folder]


@pytest.fixture(autouse=True)
def _plain_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration of whoever runs this."""
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("HOME", "/nonexistent")


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two machines with a wire between them."""
    with hosts() as names:
        yield names
