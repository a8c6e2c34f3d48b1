"""A bad line between two machines: late, cut at any byte, stalled; and ends that are killed."""

import os
import random
import shlex
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from bisync.wire.frames import VERSIONS
from tests.trees import (
    ELSEWHERE,
    assert_equal,
    command,
    contents,
    edit,
    environment,
    kept,
    look,
    noise,
    put,
    run,
    snapshot,
    sync,
)

Pair = tuple[Path, Path]
RELAY = f"{sys.executable} {ELSEWHERE.with_name('relay.py')}"
AGENT = ("--agent-command", shlex.join(map(str, command())))
FULL = bool(os.environ.get("BISYNC_FULL"))
POINTS = 40 if FULL else 2


def far(place: Path) -> Path:
    """A place on another machine."""
    return Path(f"elsewhere:{place}")


def over(a: Path, b: Path, *options: str, check: int | tuple[int, ...] = 0):
    """Synchronise over the line; ``b`` is at its other end."""
    return sync(a, far(b), "--rsh", RELAY, *AGENT, *options, check=check)


def fill(a: Path, b: Path) -> None:
    """Something to do in both directions: new, edited, moved, removed, small and big."""
    for number in range(30):
        put(a / "d" / f"f{number}", b"from a %d\n" % number * 40, t=1_700_000_000)
        put(b / "e" / f"g{number}", b"from b %d\n" % number * 40, t=1_700_000_000)
    put(a / "image", noise(5 << 20, 1), t=1_700_000_000)
    put(b / "disk", noise(5 << 20, 2), t=1_700_000_000)


def change(a: Path, b: Path) -> None:
    """Changes on both sides."""
    (a / "d").rename(a / "moved")
    edit(a / "moved" / "f1", b"edited at a", t=1_700_000_100)
    edit(b / "e" / "g1", b"edited at b", t=1_700_000_100)
    (b / "e" / "g2").unlink()
    for name, place in (("image", b), ("disk", a)):
        with (place / name).open("r+b") as file:
            file.seek(2_000_000)
            file.write(noise(300_000, 3))
    put(a / "new", noise(700_000, 4))
    put(b / "other", noise(700_000, 5))


def total(a: Path, b: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, int]:
    """How many bytes pass in a run like the one to come, on copies."""
    name = folder / "count"
    monkeypatch.setenv("RELAY_COUNT", str(name))
    over(a, b)
    monkeypatch.delenv("RELAY_COUNT")
    up, down = map(int, name.read_text().split())
    return {"up": up, "down": down}


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, int]]]:
    """The bytes of the first run, and of the second one after the changes."""
    folder = tmp_path_factory.mktemp("sizes")
    a, b = folder / "A", folder / "B"
    a.mkdir()
    b.mkdir()
    fill(a, b)
    with pytest.MonkeyPatch.context() as patch:
        first = total(a, b, patch, folder)
        change(a, b)
        yield [first, total(a, b, patch, folder)]


@pytest.mark.parametrize("how", ["RELAY_CUT", "RELAY_KILL"])
@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("run_number", [0, 1])
def test_cut_anywhere(
    here: Pair,
    sizes: list[dict[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    way: str,
    run_number: int,
):
    """The line ends at any byte, or the other end is killed: 12, nothing lost, the rest later."""
    rng = random.Random(f"{how} {way} {run_number}")
    for point in range(POINTS):
        a, b = here[0] / str(point), here[1] / str(point)
        a.mkdir()
        b.mkdir()
        fill(a, b)
        if run_number:
            over(a, b)
            change(a, b)
        wanted = contents(a) | contents(b)
        at = rng.randrange(1, sizes[run_number][way] - 200)
        monkeypatch.setenv(how, f"{way}:{at}")
        done = over(a, b, check=(0, 12))
        monkeypatch.delenv(how)
        here_now = contents(a) | contents(b) | {c for side in (a, b) for _, c in kept(side)}
        assert wanted <= here_now, (point, at)
        if done.rc == 0:
            assert_equal(a, b)
        after = over(a, b)
        assert after.counts("conflicts", "problems") == {"conflicts": 0, "problems": 0}, (point, at)
        assert_equal(a, b)
        assert look(a).get("moved/f1" if run_number else "d/f1") is not None


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("run_number", [0, 1])
def test_a_byte_is_another(
    here: Pair,
    sizes: list[dict[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    run_number: int,
):
    """Any byte is damaged on the way: whatever comes of it, nothing is lost or made up."""
    rng = random.Random(f"flip {way} {run_number}")
    for point in range(2 * POINTS):
        a, b = here[0] / str(point), here[1] / str(point)
        a.mkdir()
        b.mkdir()
        fill(a, b)
        if run_number:
            over(a, b)
            change(a, b)
        wanted = contents(a) | contents(b)
        # Most bytes are content; those in the beginning are not.
        at = rng.randrange(rng.choice([2_000, sizes[run_number][way] - 200]))
        monkeypatch.setenv("RELAY_FLIP", f"{way}:{at}")
        over(a, b, "--timeout", "5", check=(0, 12, 23, 24, 25, 30))
        monkeypatch.delenv("RELAY_FLIP")
        now = contents(a) | contents(b) | {c for side in (a, b) for _, c in kept(side)}
        assert wanted <= now, (point, at)
        assert now <= wanted | contents(a) | contents(b)
        over(a, b, check=(0, 24))
        over(a, b)
        assert_equal(a, b)
        made = contents(a) - wanted
        assert not made, (point, at, [len(c) for c in made])


def test_what_arrived_is_used(here: Pair, monkeypatch: pytest.MonkeyPatch):
    """A cut in a large file costs about what was on its way: the next run goes on there."""
    a, b = here
    size = 80 << 20
    put(a / "image", noise(size, 1))
    monkeypatch.setenv("RELAY_CUT", f"up:{60 << 20}")
    over(a, b, check=12)
    monkeypatch.delenv("RELAY_CUT")
    done = over(a, b)
    assert_equal(a, b)
    assert done.summary["bytes_sent"] < 36 << 20


@pytest.mark.parametrize("way", ["up", "down"])
def test_stall(here: Pair, monkeypatch: pytest.MonkeyPatch, way: str):
    """A line that goes silent: 30 after ``--timeout``, and both ends are gone."""
    a, b = here
    fill(a, b)
    monkeypatch.setenv("RELAY_STALL", f"{way}:5000")
    done = over(a, b, "--timeout", "3", check=30)
    assert ("silent" if way == "down" else "heard nothing") in str(done.summary["error"])
    monkeypatch.delenv("RELAY_STALL")
    over(a, b)
    assert_equal(a, b)


def test_a_line_that_stalls_in_the_beginning(here: Pair, monkeypatch: pytest.MonkeyPatch):
    """Nothing comes at all: 30, too."""
    a, b = here
    monkeypatch.setenv("RELAY_STALL", "down:0")
    over(a, b, "--timeout", "2", check=30)


def test_mirrors_are_cut(here: Pair, monkeypatch: pytest.MonkeyPatch):
    """Either direction of a mirror ends in the middle: 12, and the next run does the rest."""
    a, b = here
    fill(a, a)
    words = ("mirror", "-a", "--delete", "--rsh", RELAY, "--rsync-path", AGENT[1])
    for number, (way, at) in enumerate(
        [("up", 3_000), ("up", 900_000), ("down", 200), ("up", 5_000_000)]
    ):
        to = b / f"push{number}"
        monkeypatch.setenv("RELAY_CUT", f"{way}:{at}")
        run(*words, f"{a}/", f"elsewhere:{to}", check=12)
        monkeypatch.delenv("RELAY_CUT")
        run(*words, f"{a}/", f"elsewhere:{to}")
        assert_equal(a, to)
    for number, (way, at) in enumerate(
        [("down", 3_000), ("down", 900_000), ("up", 200), ("down", 5_000_000)]
    ):
        to = b / f"pull{number}"
        monkeypatch.setenv("RELAY_CUT", f"{way}:{at}")
        run(*words, f"elsewhere:{a}/", to, check=12)
        monkeypatch.delenv("RELAY_CUT")
        run(*words, f"elsewhere:{a}/", to)
        assert_equal(a, to)
    assert snapshot(a)


def test_long_way(here: Pair, monkeypatch: pytest.MonkeyPatch):
    """No round trip per file: over a line of 100 ms the calls of a run are few."""
    a, b = here
    for number in range(600):
        put(a / f"d{number % 7}" / f"f{number}", b"%d\n" % number)
    monkeypatch.setenv("RELAY_DELAY", "0.05")
    done = over(a, b)
    assert_equal(a, b)
    assert done.summary["elapsed_s"] < 600 * 0.1 / 2  # a round trip for each takes twice that


def test_far_disk_is_full(tmp_path: Path, mount: Callable[..., None], here: Pair):
    """The other machine's disk fills while a big file is made: 23, soon, and nothing is lost."""
    a = here[0]
    b = tmp_path / "far"
    mount(b, "-t", "tmpfs", "-o", "size=130m", "none")
    root = b / "B"
    root.mkdir()
    put(a / "image", noise(100 << 20, 1))
    sync(a, far(root), "--rsh", str(ELSEWHERE), *AGENT)
    old = (root / "image").read_bytes()
    with (a / "image").open("r+b") as file:
        for at in range(0, 100 << 20, 128 << 10):
            file.seek(at)
            file.write(noise(100_000, at))
    put(a / "small", b"small")
    done = sync(a, far(root), "--rsh", str(ELSEWHERE), *AGENT, "--timeout", "60", check=23)
    assert done.summary["elapsed_s"] < 50
    assert (root / "image").read_bytes() == old
    assert (root / "small").read_bytes() == b"small"


@pytest.mark.parametrize("at_all", [False, True], ids=["one", "group"])
@pytest.mark.parametrize("words", [("sync",), ("mirror", "-a")], ids=["sync", "mirror"])
def test_interrupted(here: Pair, words: tuple[str, ...], at_all: bool):
    """Ctrl-C here ends both ends cleanly, with the exit code of a stop here."""
    a, b = here
    for number in range(3000):
        put(a / f"d{number % 10}" / f"f{number}", b"%d\n" % number)
    program = "--agent-command" if words == ("sync",) else "--rsync-path"
    line = [*command(*words, "--rsh", str(ELSEWHERE), program, AGENT[1]), f"{a}/", far(b)]
    run_ = subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, start_new_session=True)
    while not any(b.rglob("f1*")) and run_.poll() is None:
        time.sleep(0.01)
    if at_all:
        os.killpg(run_.pid, signal.SIGINT)  # as a terminal does
    else:
        run_.send_signal(signal.SIGINT)
    _, said = run_.communicate(timeout=60)
    assert run_.returncode in (0, 130), said
    run(*words, "--rsh", str(ELSEWHERE), program, AGENT[1], f"{a}/", far(b))
    assert_equal(a, b)


def test_compared_by_content(here: Pair):
    """``mirror -c`` to another machine sends what differs, and nothing else."""
    a, b = here
    for number in range(20):
        put(a / f"f{number}", noise(5000, number), t=1_700_000_000)
    words = ("mirror", "-ac", "--json", "--rsh", str(ELSEWHERE), "--rsync-path", AGENT[1])
    run(*words, f"{a}/", far(b))
    (b / "f3").write_bytes(noise(5000, 99))
    os.utime(b / "f3", (1_700_000_000, 1_700_000_000))
    again = run(*words, f"{a}/", far(b))
    assert again.counts("updated", "literal_bytes") == {"updated": 1, "literal_bytes": 5000}
    assert run(*words, f"{a}/", far(b)).counts("updated", "kept") == {"updated": 0, "kept": 0}


def test_merging_a_far_store(here: Pair):
    """What a far store has under a name that is taken here comes under another one."""
    a, b = here
    for root, text in ((a, b"AAAA"), (b, b"BBBB")):
        put(root / "S/2026-01-01/f", text, t=1_500_000_000)
        (root / "S/2026-01-01/l").symlink_to(text.decode())
        (root / "S/.store").touch()
    words = ("mirror", "-a", "--rsh", str(ELSEWHERE), "--rsync-path", AGENT[1])
    for _ in range(2):
        run(*words, f"elsewhere:{a}/S/", b / "S")
    found = sorted(path.name for path in (b / "S/2026-01-01").iterdir())
    assert found == ["f", "f.~2~", "l", "l.~2~"]


def test_into_itself(here: Pair):
    """A source that is on this machine after all, and has the destination in it: refused."""
    a, _ = here
    put(a / "f", b"f")
    (a / "d").mkdir()
    words = ("mirror", "-a", "--delete", "--rsh", str(ELSEWHERE), "--rsync-path", AGENT[1])
    for source, target in (
        (f"elsewhere:{a}/", f"{a}/d/"),
        (f"{a}/", f"elsewhere:{a}/d/"),
        (f"elsewhere:{a}/", f"elsewhere:{a}/d/"),
    ):
        assert "inside the source" in run(*words, source, target, check=2).stderr
    assert look(a) == {"f": b"f", "d": None}


def test_small_files_of_all_sizes(here: Pair):
    """What goes together in one frame, and what does not: every size around the limits."""
    a, b = here
    edges = [0, 1, 4096, 128 << 10, (256 << 10) - 4096, 256 << 10, 512 << 10]
    for size in {max(0, edge + d) for edge in edges for d in (-1, 0, 1)}:
        put(a / "sizes" / f"s{size}", noise(size, size))
    for number in range(700):
        put(a / "many" / f"f{number}", b"%d\n" % number)
    with (a / "holes").open("wb") as file:
        file.seek(200_000)
        file.write(b"end")
    sync(a, far(b), "--rsh", str(ELSEWHERE), *AGENT)
    assert_equal(a, b)
    words = ("--rsh", str(ELSEWHERE), "--rsync-path", AGENT[1])
    run("mirror", "-a", *words, f"elsewhere:{a}/", b / "pulled")
    assert_equal(a, b / "pulled")


def test_small_files_change_while_they_are_sent(here: Pair):
    """Files that were asked for ahead are gone, longer or unreadable when their turn comes."""
    a, b = here
    for number in range(900):
        put(a / f"f{number:03}", b"%d\n" % number)
    line = [*command("sync", "--rsh", str(ELSEWHERE), *AGENT), a, far(b)]
    going = subprocess.Popen(line, env=environment(), stderr=subprocess.DEVNULL)
    for number in range(899, 0, -3):
        (a / f"f{number:03}").unlink()
        (a / f"f{number - 1:03}").write_bytes(bytes(5000))
    going.wait(120)
    sync(a, far(b), "--rsh", str(ELSEWHERE), *AGENT)
    assert_equal(a, b)


@pytest.mark.parametrize(
    ("lowest", "highest", "says"),
    [
        (VERSIONS[1] + 1, 9, "the bisync here is too old"),
        (0, VERSIONS[0] - 1, "the bisync there is too old"),
        (3, 2, "order"),
    ],
)
def test_other_versions(here: Pair, lowest: int, highest: int, says: str):
    """Another bisync with no version in common: refused, and said which one is too old."""
    a, b = here
    put(a / "f", b"data")
    begin = b"\xf0bisync\n" + struct.pack(">HHQ16s", lowest, highest, 0, bytes(16))
    (b / "begin").write_bytes(begin)
    agent = f"cat {b / 'begin'} -; true"
    done = run("sync", "--rsh", str(ELSEWHERE), "--agent-command", agent, a, far(b), check=12)
    assert says in done.stderr
    assert not (a / ".bisync").exists()


def test_features_of_tomorrow(here: Pair, tmp_path: Path):
    """A newer bisync that still speaks our version, with features that we do not know."""
    a, b = here
    put(a / "f", b"data")
    program = tmp_path / "newer.py"
    program.write_text(
        "import sys\n"
        "from bisync.wire import frames\n"
        "from bisync.endpoint import channel\n"
        "channel.VERSIONS = (1, 7)\n"
        "old = frames.Preamble.to_bytes\n"
        "frames.Preamble.to_bytes = lambda self: old(\n"
        "    frames.Preamble(self.lowest, self.highest, 2**63 + 5, self.nonce))\n"
        "from bisync.cli.main import main\n"
        "sys.exit(main())\n"
    )
    agent = shlex.join([sys.executable, str(program)])
    sync(a, far(b), "--rsh", str(ELSEWHERE), "--agent-command", agent)
    assert_equal(a, b)


def _script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_one_question_at_a_time(here: Pair, tmp_path: Path):
    """Two machines are not reached at once: both would ask for a password at one terminal."""
    a, b = here
    put(a / "f", b"1")
    log = tmp_path / "log"
    text = f'echo "asks $1" >> {log}\nsleep 0.4\necho "knows $1" >> {log}\nshift\nexec sh -c "$*"'
    rsh = _script(tmp_path / "rsh", text)
    for words in (["sync", "--agent-command"], ["mirror", "-a", "--rsync-path"]):
        log.write_text("")
        run(*words, AGENT[1], "--rsh", rsh, f"one:{a}/", f"two:{b}/")
        assert log.read_text().split("\n") == ["asks one", "knows one", "asks two", "knows two", ""]
    assert look(b) == {"f": b"1"}


def test_half_a_line_of_somebody_else(here: Pair, tmp_path: Path):
    """A login shell that says something first is named soon, whenever it says it."""
    a, b = here
    rsh = _script(tmp_path / "rsh", "sleep 0.7; printf Welcome; exec sleep 60")
    began = time.monotonic()
    outcome = run("sync", "--rsh", rsh, a, f"elsewhere:{b}", check=12)
    assert "Welcome" in outcome.said
    assert time.monotonic() - began < 30  # not the two minutes that a passphrase may take


UNCOMMITTED = """
import os, signal, sys
from bisync.cli.main import main
from bisync.session.commit import Ledger

def commit(self, rows, reasons=None):
    if rows:
        os.kill(os.getpid(), signal.SIGKILL)

Ledger.commit = commit
main(sys.argv[1:])
"""


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("ends", [(), (0,), (1,), (0, 1)])
def test_what_happened_after_it_was_copied(here: Pair, ends: tuple[int, ...], first: bool):
    """A run was cut when all was applied and nothing agreed on: what came then is no dispute.

    What was deleted, renamed or edited where it came from is that at the other end, too.
    """
    a, b = here
    if not first:
        put(a / "old", b"known")
        sync(a, b)
    for name in ("gone", "d/gone", "named", "d/named", "edited", "deep/x", "deep/y", "stays"):
        put(a / name, name.encode())
    roots = [far(root) if side in ends else root for side, root in enumerate(here)]
    words = ("--rsh", ELSEWHERE, *AGENT, *roots)
    cut = [sys.executable, "-c", UNCOMMITTED, "sync", *words]
    assert subprocess.run(cut, env=environment(), check=False).returncode == -9
    assert (b / "stays").read_bytes() == b"stays"
    for name in ("gone", "d/gone"):
        (a / name).unlink()
    (a / "named").rename(a / "renamed")
    (a / "d/named").rename(a / "moved out")
    edit(a / "edited", b"another text")
    (a / "deep").rename(a / "d/deeper")
    mine = look(a)
    assert run("sync", "--json", *words).summary["conflicts"] == 0
    assert look(a) == mine
    assert look(b) == mine


def test_what_was_written_while_it_was_copied(here: Pair):
    """The killed run forgot that the file had a writer: it is read again, its times say nothing."""
    a, b = here
    put(a / "f", b"as it was observed")
    cut = [sys.executable, "-c", UNCOMMITTED, "sync", a, b]
    assert subprocess.run(cut, env=environment(), check=False).returncode == -9
    info = (a / "f").stat()
    with closing(sqlite3.connect(a / ".bisync/state.db")) as db:
        (ctime,) = db.execute("SELECT ctime FROM node WHERE ino=?", (info.st_ino,)).fetchone()
        assert ctime == info.st_ctime_ns
        (a / "f").write_bytes(b"written by mapping")
        os.utime(a / "f", ns=(info.st_atime_ns, info.st_mtime_ns))
        late = (a / "f").stat().st_ctime_ns
        db.execute("UPDATE node SET ctime=? WHERE ino=?", (late, info.st_ino))
        db.commit()
    assert sync(a, b).summary["conflicts"] == 0
    assert look(b)["f"] == b"written by mapping"
