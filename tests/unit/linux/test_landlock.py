"""Landlock: what was given up is gone, what was named stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from bisync.linux.landlock import confine
inside, outside = sys.argv[1:]
if not confine([inside, os.devnull], ["/usr", "/proc", sys.prefix, sys.base_prefix]):
    print("cannot")
    sys.exit()
os.mkdir(inside + "/d")
open(inside + "/f", "w").write("x")
os.rename(inside + "/f", inside + "/d/f")
os.link(inside + "/d/f", inside + "/g")
os.truncate(inside + "/g", 0)
open(os.devnull, "w").close()
for act in (
    lambda: open(outside + "/f"),
    lambda: os.listdir(outside),
    lambda: open(outside + "/new", "w"),
    lambda: os.rename(inside + "/g", outside + "/g"),
    lambda: os.unlink(outside + "/f"),
    lambda: os.symlink("x", outside + "/l"),
):
    try:
        act()
    except OSError as error:
        assert error.errno in (13, 18), error
    else:
        sys.exit("it was not given up")
print("held")
"""


def test_confine(tmp_path: Path):
    """In a process of its own, since nobody gets anything back."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "f").write_text("theirs")
    here = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, inside, outside],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(here)},
        check=False,
    )
    if done.stdout.strip() == "cannot":
        pytest.skip("no Landlock here")
    assert done.stdout.strip() == "held", done.stderr
    assert (outside / "f").read_text() == "theirs"
