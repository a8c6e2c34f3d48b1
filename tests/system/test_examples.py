"""The examples do what they say, and so does the README's first command."""

import os
import subprocess
import sys
from pathlib import Path

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
