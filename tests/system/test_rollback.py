"""The rollback store in a person's hands: list, prune, lock, unlock, merge; stores as roots."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.trees import Outcome, edit, look, put, run, snapshot, sync

Pair = tuple[Path, Path]


def rollback(root: Path, *words: str | Path, check: int = 0) -> Outcome:
    """Run the command in a root."""
    return run("rollback", "--json", *words, "--root", root, check=check)


def _day(root: Path, name: str) -> Path:
    """Give today's folder of a store another date, as if time had passed."""
    store = root / "rsync-rollback"
    (today,) = [p for p in store.iterdir() if not p.name.startswith(".")]
    for manifest in (store / ".manifest").iterdir():
        text = manifest.read_text()
        manifest.write_text(text.replace(f'"kept":"{today.name}/', f'"kept":"{name}/'))
    return today.rename(store / name)


def _two_versions(a: Path, b: Path) -> None:
    put(a / "d/x", b"one")
    sync(a, b)
    edit(a / "d/x", b"two")
    sync(a, b)
    _day(b, "2020-01-02")
    edit(a / "d/x", b"three")
    sync(a, b, "--keep", "forever")


def test_list(pair: Pair):
    """The days with what they hold; what another program put there is of unknown origin."""
    a, b = pair
    _two_versions(a, b)
    put(b / "rsync-rollback/2019-05-05/old", b"by rsync")
    days = {row["day"]: row for row in rollback(b).objects}
    assert days["2019-05-05"]["unknown"] == 1
    assert (days["2020-01-02"]["versions"], days["2020-01-02"]["unknown"]) == (1, 0)
    assert len(days) == 3


def test_prune(pair: Pair):
    """By age, whole days; by name, one day; the rest stays."""
    a, b = pair
    _two_versions(a, b)
    put(b / "rsync-rollback/2019-05-05/old", b"by rsync")
    assert rollback(b, "prune", "--day", "2019-05-05").objects[-1]["entries"] == 1
    assert not (b / "rsync-rollback/2019-05-05").exists()
    assert rollback(b, "prune", "--keep", "30d").objects[-1]["entries"] == 1
    assert len(rollback(b).objects) == 1
    rollback(b, "prune", check=2)
    rollback(b, "prune", "--day", "2001-01-01", check=2)


@pytest.mark.skipif(os.geteuid() != 0, reason="inode flags need root")
def test_lock(pair: Pair):
    """Locked: nobody removes or changes a version, the engine still adds today's."""
    a, b = pair
    _two_versions(a, b)
    old = b / "rsync-rollback/2020-01-02/d/x"
    row = rollback(b, "lock").objects[-1]
    try:
        if not row["weaker"]:
            with pytest.raises(PermissionError):
                old.unlink()
            with pytest.raises(PermissionError):
                old.write_bytes(b"forged")
        assert rollback(b, "prune", "--day", "2020-01-02", check=23).objects[-1]["refused"] == 1
        edit(a / "d/x", b"four")
        sync(a, b, "--keep", "1d")
        assert old.read_bytes() == b"one"
        assert {p.read_bytes() for p in (b / "rsync-rollback").glob("2*/d/*")} >= {b"two", b"three"}
    finally:
        rollback(b, "unlock")
    rollback(b, "prune", "--day", "2020-01-02")
    assert not old.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming a plain user needs root")
def test_lock_by_permission_bits(here: Pair):
    """A plain user has no flags: bits are taken away, and unlocking gives back the same ones."""
    a, b = here
    for root in here:
        os.chown(root, 65534, 65534)
    for name in ("x", "y"):
        put(a / name, b"one")
        os.chown(a / name, 65534, 65534)
    (a / "x").chmod(0o664)
    (a / "y").chmod(0o444)
    sync(a, b, user=65534)
    edit(b / "x", b"two")
    (b / "y").unlink()
    sync(a, b, user=65534)
    old = _day(a, "2020-01-02")
    modes = {p.name: p.stat().st_mode for p in old.iterdir()}
    assert run("rollback", "lock", "--json", "--root", a, user=65534).objects[-1]["weaker"]
    assert not (old / "x").stat().st_mode & 0o222
    run("rollback", "prune", "--day", "2020-01-02", "--root", a, user=65534, check=23)
    run("rollback", "unlock", "--root", a, user=65534)
    assert {p.name: p.stat().st_mode for p in old.iterdir()} == modes
    run("rollback", "prune", "--day", "2020-01-02", "--root", a, user=65534)
    assert not old.exists()


def test_merge(pair: Pair):
    """The union of two stores: equal bytes once, other bytes under the next number."""
    a, b = pair
    _two_versions(a, b)
    other = b.parent / "other-store"
    shutil.rmtree(other, ignore_errors=True)
    put(other / "2020-01-02/d/x", b"one")
    put(other / "2020-01-02/d/y", b"y")
    put(other / "2020-01-02/e", b"a file where others have none")
    put(other / "2018-01-01/d/x", b"older")
    row = rollback(b, "merge", other).objects[-1]
    assert (row["entries"], row["skipped"], row["renamed"]) == (3, 1, 0)
    edit(other / "2020-01-02/d/x", b"another version")
    row = rollback(b, "merge", other).objects[-1]
    assert (row["entries"], row["skipped"], row["renamed"]) == (1, 3, 1)
    day = b / "rsync-rollback/2020-01-02/d"
    assert {p.name: p.read_bytes() for p in day.iterdir()} == {
        "x": b"one",
        "x.~2~": b"another version",
        "y": b"y",
    }
    assert rollback(b, "merge", other).objects[-1]["entries"] == 0
    rollback(b, "merge", b / "rsync-rollback", check=2)
    rollback(b, "merge", b / "none", check=2)
    shutil.rmtree(other)


def test_merge_brings_history(pair: Pair):
    """Manifests come along: what the other site kept is found by history."""
    a, b = pair
    _two_versions(a, b)
    assert not (a / "rsync-rollback").exists()
    rollback(a, "merge", b / "rsync-rollback")
    shutil.rmtree(b / "rsync-rollback")
    found = [m for m in run("history", "--json", a / "d/x").objects if m["action"] == "modified"]
    assert [m["complete"] for m in found] == [True, True]


def test_a_day_that_is_gone(pair: Pair):
    """A user removed a day in the middle: what is complete is said to be, and is restored."""
    a, b = pair
    _two_versions(a, b)
    edit(a / "d/x", b"four")
    sync(a, b, "--keep-every", "all")
    shutil.rmtree(b / "rsync-rollback/2020-01-02")
    found = [m for m in run("history", "--json", a / "d/x").objects if m["action"] == "modified"]
    assert [m["complete"] for m in found] == [False, True, True]
    run("restore", a / "d/x")
    assert look(a)["d/x"] == b"three"


def test_mirror_into_a_store(pair: Pair):
    """The lab script's merge line: a store as source and destination is a merge."""
    a, b = pair
    _two_versions(a, b)
    put(a / "rsync-rollback/2020-01-02/d/x", b"of the other site")
    put(a / "rsync-rollback/2020-01-02/big", b"x" * 5000)
    run("mirror", "-aAXx", "--max-size=4K", "--ignore-existing", "--numeric-ids", "--delete",
        f"{a}/rsync-rollback/", f"{b}/rsync-rollback/")  # fmt: skip
    day = b / "rsync-rollback/2020-01-02"
    assert {p.name: p.read_bytes() for p in (day / "d").iterdir()} == {
        "x": b"one",
        "x.~2~": b"of the other site",
    }
    assert not (day / "big").exists()
    assert not (b / "rsync-rollback/.bisync").exists()
    assert len(list((b / "rsync-rollback").iterdir())) == 4


def test_mirror_from_a_store(pair: Pair, tmp_path: Path):
    """A day of a store as source: its files, without the store's own."""
    a, b = pair
    _two_versions(a, b)
    run("mirror", "-a", f"{b}/rsync-rollback/2020-01-02/", tmp_path / "out")
    assert look(tmp_path / "out") == {"d": None, "d/x": b"one"}


@pytest.mark.parametrize("words", [["burn"], ["list", "x"], ["merge"], ["prune", "--keep", "soon"]])
def test_bad_words(here: Pair, words: list[str]):
    """One clear line, exit code 2, nothing changed."""
    a, b = here
    _two_versions(a, b)
    before = snapshot(b / "rsync-rollback")
    outcome = run("rollback", *words, "--root", b, check=2)
    assert outcome.stderr.count("\n") == 1
    assert snapshot(b / "rsync-rollback") == before


def test_a_store_without_a_manifest(here: Pair):
    """Filled by rsync: adopted, listed as of unknown origin, pruned by day like any other."""
    a, b = here
    put(a / "x", b"x")
    sync(a, b)
    put(b / "rsync-rollback/2020-01-02/x", b"by rsync")
    (row,) = rollback(b).objects
    assert (row["versions"], row["unknown"]) == (1, 1)
    subprocess.run(["rm", "-rf", b / "rsync-rollback/.manifest"], check=True)
    assert rollback(b, "prune", "--day", "2020-01-02").objects[-1]["entries"] == 1
