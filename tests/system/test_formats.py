"""State directories as earlier versions left them: taken over with all that they know.

``tests/data/format-N.tar.gz`` is a pair of roots after three runs of the last version that wrote
format N: files made, one edited, one deleted, one moved, one that both sides had made. Extracting
makes new objects; what the state says of their identities is written anew, nothing else.
"""

import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from bisync.fs.database import FORMAT
from bisync.linux.handle import HandleReader
from tests.trees import assert_equal, kept, run, snapshot, sync

DATA = Path(__file__).parent.parent / "data"
FORMATS = range(1, FORMAT + 1)


def _identity(path: Path) -> tuple[bytes, int, int]:
    """Handle, inode number and change time of an object."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        handle = HandleReader().read(fd, os.fsencode(path.name))
    finally:
        os.close(fd)
    status = path.lstat()
    return handle, status.st_ino, status.st_ctime_ns


def _paths(db: sqlite3.Connection) -> Iterator[tuple[int, str]]:
    """Node numbers with one path of each."""
    names = {node: (parent, name) for parent, name, node in
             db.execute("SELECT parent, name, node FROM name")}  # fmt: skip
    for node in [1, *names]:
        parts, at = [], node
        while at != 1:
            at, name = names[at]
            parts.append(os.fsdecode(name))
        yield node, "/".join(reversed(parts))


def _settle(root: Path, roots: dict[str, str]) -> None:
    """Let the state know the objects that extracting made; ``roots``: old identities and new."""
    with closing(sqlite3.connect(root / ".bisync/state.db")) as db, db:
        for node, path in list(_paths(db)):
            values = (*_identity(root / path if path else root), node)
            db.execute("UPDATE node SET handle=?, ino=?, ctime=? WHERE id=?", values)
        db.execute("UPDATE name SET stamp=x''")
        for old, new in roots.items():
            db.execute("UPDATE pair SET identity=? WHERE identity=?", (new, old))
    marker = root / ".bisync/replica"
    found = json.loads(marker.read_text())
    found["root"] = roots[found["root"]]
    marker.write_text(json.dumps(found, indent=1) + "\n")


@pytest.fixture(params=FORMATS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A pair of roots as that format's last version left it."""
    data = DATA / f"format-{request.param}.tar.gz"
    subprocess.run(["tar", "-C", tmp_path, "-xzf", data], check=True)  # times to the nanosecond
    pair = tmp_path / "A", tmp_path / "B"
    for root in pair:
        with closing(sqlite3.connect(root / ".bisync/state.db")) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (request.param,)
    was = [json.loads((root / ".bisync/replica").read_text())["root"] for root in pair]
    roots = {}
    for root, identity in zip(pair, was, strict=True):
        *above, _ = identity.split(":")
        roots[identity] = ":".join([*above, _identity(root)[0].hex()])
    for root in pair:
        _settle(root, roots)
    return pair


def test_a_state_of_an_earlier_version(old: tuple[Path, Path]):
    """What it agreed on counts: a deletion is one, a move is one; versions it kept come back."""
    a, b = old
    (a / "d/one").unlink()
    (a / "moved").rename(a / "d/moved again")
    with (b / "three").open("a") as file:
        file.write("and more\n")
    (a / "new").write_text("new\n")
    before = dict(kept(b))
    done = sync(a, b)
    assert_equal(a, b)
    s = done.summary
    counts = (s["deleted"], s["moves"], s["conflicts"], s["created"], s["updated"])
    assert counts == (1, 1, 0, 1, 1), s
    assert before.items() <= dict(kept(b)).items()
    for root in old:
        with closing(sqlite3.connect(root / ".bisync/state.db")) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (FORMAT,)
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    s = sync(a, b).summary
    assert (s["created"], s["updated"], s["deleted"], s["moves"]) == (0, 0, 0, 0)
    run("conflicts", "--root", a)
    run("restore", b / "gone")
    assert (b / "gone").read_text() == "gone\n"
    assert run("verify", a).rc == run("verify", b).rc == 0


@pytest.mark.parametrize("where", ["database", "marker"])
def test_a_state_of_a_later_version(tmp_path: Path, where: str):
    """Refused before anything is touched."""
    a, b = tmp_path / "A", tmp_path / "B"
    a.mkdir()
    b.mkdir()
    (a / "f").write_text("1")
    sync(a, b)
    (a / "f").write_text("2 and more")
    if where == "database":
        with closing(sqlite3.connect(b / ".bisync/state.db")) as db, db:
            db.execute(f"PRAGMA user_version={FORMAT + 1}")
    else:
        marker = b / ".bisync/replica"
        found = json.loads(marker.read_text())
        marker.write_text(json.dumps({**found, "format": FORMAT + 1}))
    before = snapshot(b)
    done = sync(a, b, check=None)
    assert done.rc not in (0, 23, 24, 25, 26), done
    assert "newer bisync" in done.said
    assert snapshot(b) == before
    assert (b / "f").read_text() == "1"
