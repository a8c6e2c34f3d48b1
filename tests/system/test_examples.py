"""The examples do what they say, and so does the README's first command."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

from tests.system.live import ready, watching
from tests.system.sshd import program
from tests.trees import assert_equal, edit, environment, look, put

_REPOSITORY = Path(__file__).resolve().parents[2]


def _run(name: str, *args: Path) -> str:
    done = subprocess.run(
        [sys.executable, _REPOSITORY / "examples" / name, *args],
        capture_output=True,
        check=False,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_01_sync(here: tuple[Path, Path]):
    """The program plans, synchronises and lists the conflict."""
    a, b = here
    put(a / "x", b"old")
    put(a / "scratch.tmp", b"left alone")
    assert "created" in _run("01_sync.py", a, b)
    assert "scratch.tmp" not in look(b)
    edit(a / "x", b"from alpha")
    edit(b / "x", b"from beta!")
    said = _run("01_sync.py", a, b)
    assert "1 changes planned" in said
    assert "conflict" in said
    (a / "scratch.tmp").unlink()
    assert_equal(a, b)


def test_02_mirror(here: tuple[Path, Path]):
    """The program looks, then mirrors; a rename is one."""
    a, b = here
    put(a / "d/x", b"x")
    assert "2 created" in _run("02_mirror.py", a, b)
    (a / "d").rename(a / "e")
    assert "1 renamed" in _run("02_mirror.py", a, b)
    assert look(b) == look(a)


def test_04_watch(here: tuple[Path, Path]):
    """The program follows changes, and knows when both sides are equal."""
    a, b = here
    put(a / "x", b"x")
    child = subprocess.Popen(
        [sys.executable, _REPOSITORY / "examples/04_watch.py", a, b],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == "beta create x\n"
    put(b / "y", b"y")
    child.stdin.write("wait\n")
    child.stdin.flush()
    assert child.stdout.readline() == "alpha create y\n"
    assert child.stdout.readline().startswith("complete: 0")
    assert_equal(a, b)
    said, _ = child.communicate("stop\n", timeout=60)
    assert (said, child.returncode) == ("", 0)


def test_03_history(here: tuple[Path, Path], tmp_path: Path):
    """The program lists the versions and restores the last but one."""
    a, b = here
    put(a / "x", b"one")
    _run("01_sync.py", a, b)
    edit(a / "x", b"two")
    _run("01_sync.py", a, b)
    said = _run("03_history.py", a, Path("x"), tmp_path / "x")
    assert "modified x, kept as rsync-rollback/" in said
    assert (tmp_path / "x").read_bytes() == b"one"


def test_try():
    """The demonstration runs from start to end."""
    done = subprocess.run(
        ["sh", _REPOSITORY / "examples/try.sh"],
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "PIP_NO_INPUT": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    for wanted in ("is still inode", "conflict", "alpha's title", "the trees are equal"):
        assert wanted in done.stdout, done.stdout


def test_05_delta(tmp_path: Path):
    """The program makes a new version of an old one and little else."""
    old = random.Random(1).randbytes(3 << 20)
    (tmp_path / "old").write_bytes(old)
    (tmp_path / "new").write_bytes(b"seven b" + old[: 2 << 20] + b"x" + old[2 << 20 :])
    said = _run("05_delta.py", *(tmp_path / name for name in ("old", "new", "patched")))
    assert (tmp_path / "patched").read_bytes() == (tmp_path / "new").read_bytes()
    size, came = map(int, re.findall(r"\d+", said))
    assert size == len(old) + 8
    assert came < 256 << 10


def test_06_conflict_policy(here: tuple[Path, Path]):
    """The program decides for the longer log, and for both texts."""
    a, b = here
    put(a / "x.log", b"1")
    put(a / "y.log", b"1")
    put(a / "text", b"1")
    _run("06_conflict_policy.py", a, b)
    edit(a / "x.log", b"1 and more")
    edit(b / "x.log", b"1 2")
    edit(a / "y.log", b"1 2")
    edit(b / "y.log", b"1 and more")
    edit(a / "text", b"of a")
    edit(b / "text", b"of b")
    said = _run("06_conflict_policy.py", a, b)
    assert sorted(said.splitlines()) == ["text: both", "x.log: live", "y.log: kept"]
    assert_equal(a, b)
    found = look(a)
    assert found["x.log"] == found["y.log"] == b"1 and more"
    assert sorted(data for name, data in found.items() if name.startswith("text")) == [
        b"of a",
        b"of b",
    ]


def test_07_gate(here: tuple[Path, Path], tmp_path: Path):
    """The script starts its command where all has come, and nowhere else."""
    a, b = here
    put(b / "from there", b"1")
    bins = program(tmp_path)

    def gate(runtime: Path) -> subprocess.CompletedProcess[str]:
        env = environment(BISYNC_RUNTIME_DIR=str(runtime), PATH=f"{bins}:{os.environ['PATH']}")
        line = ["sh", _REPOSITORY / "examples/07_gate.sh", "pair", "ls", a]
        return subprocess.run(line, capture_output=True, check=False, text=True, env=env)

    with watching(a, b, "--name", "pair") as it:
        ready(it)
        put(b / "just now", b"2")
        done = gate(it.runtime)
        assert done.returncode == 0
        assert done.stdout.splitlines()[-2:] == ["from there", "just now"]
        with (a / "open").open("wb") as file:
            file.write(b"half")
            file.flush()
            done = gate(it.runtime)
            assert done.returncode == 24
            assert "just now" not in done.stdout
    (tmp_path / "nobody").mkdir()
    assert gate(tmp_path / "nobody").returncode == 4
