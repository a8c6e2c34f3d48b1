"""Looking back: history that follows renames, folders and files as they were at a time."""

import os
import random
import shutil
import time
from pathlib import Path

import pytest

import bisync
from bisync.cli.moments import moment
from bisync.errors import UsageError
from tests.trees import NOON, edit, kept, look, put, run, snapshot, sync

Pair = tuple[Path, Path]
FULL = os.environ.get("BISYNC_FULL", "") not in {"", "0"}
SEED = int(os.environ.get("BISYNC_SEED", "1"))
DAYS, CHANGES, INSTANTS = (365, 200, 50) if FULL else (25, 40, 10)
YES = bisync.Config(yes=True, retention=bisync.Retention(days=None, every_s=None))


def _history(path: Path, *words: str) -> list[dict[str, object]]:
    return run("history", "--json", path, *words).objects


def _restore(path: Path, *words: str | Path, check: int = 0) -> dict[str, object]:
    return run("restore", "--json", path, *words, check=check).objects[-1]


def test_history_follows_renames(pair: Pair):
    """A path's node: made, edited, moved, edited by the other side, deleted."""
    a, b = pair
    put(a / "other", b"other")
    sync(a, b)
    put(a / "d/x", b"one")
    sync(a, b)
    edit(a / "d/x", b"two")
    sync(a, b)
    (a / "d/x").rename(a / "y")
    sync(a, b)
    edit(b / "y", b"three")
    sync(a, b)
    (b / "y").unlink()
    sync(a, b)
    for root in (a, b):
        for name in ("d/x", "y"):
            found = [(m["action"], m["path"]) for m in _history(root / name)]
            found = [step for step in found if step[0] != "attributes"]
            assert found == [
                ("created", "d/x"),
                ("modified", "d/x"),
                ("moved", "y"),
                ("modified", "y"),
                ("deleted", "y"),
            ]
    assert all(m["complete"] for m in _history(a / "y"))


def test_restore_a_file(pair: Pair):
    """Without a time: the version before its last change; what is there now is kept."""
    a, b = pair
    put(a / "d/x", b"one")
    sync(a, b)
    edit(a / "d/x", b"two")
    sync(a, b)
    assert _restore(a / "d/x")["restored"] == 1
    assert look(a)["d/x"] == b"one"
    assert b"two" in {c for _, c in kept(a)}
    sync(a, b)
    assert look(b)["d/x"] == b"one"


def test_restore_a_deleted_folder(pair: Pair):
    """A folder that is gone comes back with all that was in it."""
    a, b = pair
    put(a / "d/e/x", b"x", mode=0o640)
    put(a / "d/y", b"y")
    os.symlink("y", a / "d/l")
    os.link(a / "d/y", a / "d/z")
    sync(a, b)
    before = snapshot(a)
    time_ns = time.time_ns()
    for path in ("d/e/x", "d/y", "d/l", "d/z"):
        (a / path).unlink()
    (a / "d/e").rmdir()
    (a / "d").rmdir()
    sync(a, b, "--yes")
    _restore(b / "d", "--at", f"@{time_ns / 1e9:.9f}")
    sync(a, b)
    after = snapshot(a)
    assert after.keys() == before.keys()
    for path, entry in before.items():
        assert (after[path].digest, after[path].mode) == (entry.digest, entry.mode)
    assert after[b"d/z"].names == before[b"d/z"].names


def test_restore_leaves_out_what_was_made_later(pair: Pair):
    """The folder as it was: younger files go to the store, older names come back."""
    a, b = pair
    put(a / "d/x", b"x")
    sync(a, b)
    time_ns = time.time_ns()
    (a / "d/x").rename(a / "d/y")
    put(a / "d/new", b"new")
    sync(a, b)
    _restore(a / "d", "--at", f"@{time_ns / 1e9:.9f}")
    assert look(a) == {"d": None, "d/x": b"x"}
    assert b"new" in {c for _, c in kept(a)}


def test_restore_elsewhere(pair: Pair, tmp_path: Path):
    """--to a new place changes nothing in the root; an existing one is refused."""
    a, b = pair
    put(a / "x", b"one")
    sync(a, b)
    time_ns = time.time_ns()
    edit(a / "x", b"two")
    sync(a, b)
    _restore(a, "--at", f"@{time_ns / 1e9:.9f}", "--to", tmp_path / "then")
    assert look(tmp_path / "then") == {"x": b"one"}
    assert look(a) == {"x": b"two"}
    said = run("restore", a, "--at", "1s", "--to", tmp_path / "then", check=2).stderr
    assert "exists" in said


def test_content_that_is_nowhere(pair: Pair, tmp_path: Path):
    """A missing link in the chain is said beforehand; in place nothing is changed."""
    a, b = pair
    put(a / "d/x", b"one")
    put(a / "d/y", b"y")
    sync(a, b)
    time_ns = time.time_ns()
    edit(a / "d/x", b"two")
    sync(a, b)
    for path in (b / "rsync-rollback").rglob("x"):
        path.unlink()
    (last,) = [m for m in _history(a / "d/x") if m["action"] == "modified"]
    assert last["complete"] is False
    at = f"@{time_ns / 1e9:.9f}"
    said = run("restore", a / "d", "--at", at, check=23).stderr
    assert "nowhere" in said
    assert look(a)["d/x"] == b"two"
    row = _restore(a / "d", "--at", at, "--to", tmp_path / "then", check=23)
    assert row["incomplete"] == 1
    assert look(tmp_path / "then") == {"y": b"y"}


def test_restore_never_follows_a_link(pair: Pair):
    """A symlink has the name now, or that of its directory: it is displaced, its target is not
    touched.
    """
    a, b = pair
    outside = b.parent / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    put(outside / "p", b"precious")
    put(a / "x/f", b"inside")
    put(a / "k", b"k")
    sync(a, b)
    time_ns = time.time_ns()
    shutil.rmtree(a / "x")
    (a / "x").symlink_to(outside)
    sync(a, b)
    before = snapshot(outside)
    _restore(a / "x", "--at", f"@{time_ns / 1e9:.9f}")
    assert snapshot(outside) == before
    assert look(a) == {"x": None, "x/f": b"inside", "k": b"k"}
    shutil.rmtree(outside)


def test_restore_a_file_where_a_directory_is(pair: Pair):
    """And the reverse: what has the name now goes to the store as a whole."""
    a, b = pair
    put(a / "x", b"file")
    put(a / "y/z", b"z")
    sync(a, b)
    time_ns = time.time_ns()
    (a / "x").unlink()
    put(a / "x/g", b"in the way")
    shutil.rmtree(a / "y")
    put(a / "y", b"another")
    sync(a, b)
    at = f"@{time_ns / 1e9:.9f}"
    _restore(a / "x", "--at", at)
    _restore(a / "y/z", "--at", at)
    assert look(a) == {"x": b"file", "y": None, "y/z": b"z"}
    assert {b"in the way", b"another"} <= {c for _, c in kept(a)}


@pytest.mark.parametrize("known", [True, False])
def test_two_kept_directories_of_one_name(here: Pair, known: bool):
    """A file in the first of two kept directories is told from its namesake in the second."""
    a, b = here
    put(a / "x/f", b"aaaa", t=NOON)
    put(a / "k", b"k", t=NOON)
    words = ("mirror", "-a", "--delete", "--yes", f"{a}/", b)
    if not known:
        shutil.copytree(a, b, dirs_exist_ok=True)
    run(*words)
    time_ns = time.time_ns()
    shutil.rmtree(a / "x")
    run(*words)
    put(a / "x/f", b"bbbb", t=NOON + 10)
    run(*words)
    shutil.rmtree(a / "x")
    run(*words)
    _restore(b / "x/f", "--at", f"@{time_ns / 1e9:.9f}")
    assert look(b)["x/f"] == b"aaaa"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none"], "no earlier version"),
        (["x", "--at", "soon"], "--at soon"),
        (["x", "--at", "2001-01-01"], "the log begins"),
        (["none", "--at", "0s"], "did not exist"),
        (["../outside"], "not"),
    ],
)
def test_bad_words(here: Pair, words: list[str], said: str):
    """One clear line, exit code 2, nothing changed."""
    a, b = here
    put(a / "x", b"x")
    sync(a, b)
    before = snapshot(a)
    outcome = run("restore", *words, cwd=a, check=2)
    assert said in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert snapshot(a) == before


def test_moments():
    """Times as people write them."""
    now = 1_700_000_000 * 10**9
    assert moment("@1699999999", now) == 1_699_999_999 * 10**9
    assert moment("2h ago", now) == now - 7200 * 10**9
    assert moment("3d", now) == now - 3 * 86_400 * 10**9
    assert moment("2023-11-14T22:13:20+00:00", now) == now
    assert moment("2023-11-14", now) < now
    with pytest.raises(UsageError):
        moment("tomorrow", now)


class _Life:
    """Users who change one tree for a day; what both destroy on one day is nowhere.

    The tree is listed once and followed from there: it is large after a year.
    """

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.token = 0
        self.root = Path()
        self.files: list[Path] = []
        self.folders: list[Path] = []

    def day(self, root: Path, changes: int) -> None:
        self.root = root
        self._list()
        for _ in range(changes):
            self._change()

    def _list(self) -> None:
        self.files, self.folders = [], []
        for place, folders, files in os.walk(self.root):
            if place == str(self.root):
                folders[:] = set(folders) - {".bisync", "rsync-rollback"}
            folders.sort()
            self.folders.append(Path(place))
            self.files += (Path(place, name) for name in sorted(files))

    def _change(self) -> None:
        kind = self.chance.random()
        if kind < 0.35 or len(self.files) < 10:
            self.files.append(self._somewhere("f"))
            put(self.files[-1], self._data())
        elif kind < 0.65:
            edit(self.chance.choice(self.files), self._data())
        elif kind < 0.8:
            number = self.chance.randrange(len(self.files))
            self.files[number] = self.files[number].rename(self._somewhere("r"))
        elif kind < 0.85 and len(self.folders) > 1:
            folder = self.chance.choice(self.folders[1:])
            folder.rename(self._new(self.root, "d"))
            self._list()
        elif kind < 0.88:
            self.folders.append(self._somewhere("d"))
            self.folders[-1].mkdir()
        else:
            self.files.pop(self.chance.randrange(len(self.files))).unlink()

    def _somewhere(self, letter: str) -> Path:
        return self._new(self.chance.choice(self.folders), letter)

    def _new(self, folder: Path, letter: str) -> Path:
        self.token += 1
        return folder / f"{letter}{self.token}"

    def _data(self) -> bytes:
        self.token += 1
        return b"token %d\n" % self.token * self.chance.randrange(1, 30)


@pytest.mark.timeout(0 if FULL else 600)
def test_a_year(here: Pair, tmp_path: Path):
    """Any of the instants between two days: the tree as it was, byte for byte, on either side.

    A few weeks in CI; a year of 200 changes a day with ``BISYNC_FULL=1``.
    """
    a, b = here
    chance = random.Random(SEED)
    life = _Life(chance)
    asked = set(chance.sample(range(DAYS), INSTANTS))
    trees: list[tuple[int, dict[str, bytes | str | None]]] = []
    began = time.monotonic()
    for day in range(DAYS):
        life.day(chance.choice(here), CHANGES)
        report = bisync.sync(a, b, YES)
        assert report.exit_code == 0
        if day in asked:
            trees.append((time.time_ns(), look(a)))
    lived = time.monotonic() - began
    chance.shuffle(trees)
    longest = 0.0
    for number, (time_ns, wanted) in enumerate(trees):
        place = tmp_path / f"then-{number}"
        began = time.monotonic()
        done = bisync.restore((a, b)[number % 2], b"", time_ns, os.fsencode(place))
        longest = max(longest, time.monotonic() - began)
        assert done.incomplete == []
        assert look(place) == wanted
    store = sum(p.stat().st_size for root in here for p in (root / "rsync-rollback").rglob("*"))
    state = sum((root / ".bisync/state.db").stat().st_size for root in here)
    content = sum(len(data) for data in look(a).values() if isinstance(data, bytes))
    print(
        f"{DAYS} days of {CHANGES} changes in {lived:.0f} s; the tree: {len(look(a))} entries, "
        f"{content} bytes; both stores {store} bytes, both states {state} bytes; {len(trees)} "
        f"instants restored, the last of {len(wanted)} entries, the slowest in {longest:.1f} s"
    )
