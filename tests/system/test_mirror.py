"""``bisync mirror``: renames by identity, kept versions, guards; what differs from rsync.

What is equal to rsync is in ``test_mirror_like_rsync.py``; the rows of hard points 17 to 20 and
what bad input gets are here.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bisync.cli.rsyncwords import REFUSED, markdown
from tests.trees import (
    NOON,
    Outcome,
    edit,
    exchange,
    kept,
    look,
    put,
    run,
    snapshot,
    sync,
)

Pair = tuple[Path, Path]
REPOSITORY = Path(__file__).resolve().parents[2]
needs_rsync = pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")


def mirror(*words: str | Path, check: int = 0, user: int | None = None) -> Outcome:
    """Run the command and require an exit code."""
    return run("mirror", "--json", *words, check=check, user=user)


def _files(folder: Path, count: int) -> None:
    for number in range(count):
        put(folder / f"{number:03d}", b"%d" % number)


# --- Renames ---


def test_renames_are_renames(pair: Pair):
    """Files and directories renamed at the source: no content crosses, the objects stay."""
    a, b = pair
    _files(a / "d/e", 10)
    put(a / "x", b"x")
    mirror("-a", "--delete", f"{a}/", b)
    numbers = {p.name: p.stat().st_ino for p in (b / "d/e").iterdir()}
    (a / "d/e").rename(a / "f")
    (a / "x").rename(a / "d/y")
    outcome = mirror("-a", "--delete", f"{a}/", b)
    assert (outcome.summary["moves"], outcome.summary["literal_bytes"]) == (2, 0)
    assert {p.name: p.stat().st_ino for p in (b / "f").iterdir()} == numbers
    assert look(a) == look(b)


def test_without_delete_the_old_name_stays(pair: Pair):
    """As rsync: what was renamed stays under its old name, too."""
    a, b = pair
    put(a / "x", b"x")
    mirror("-a", f"{a}/", b)
    (a / "x").rename(a / "y")
    mirror("-a", f"{a}/", b)
    assert look(b) == {"x": b"x", "y": b"x"}


def test_swaps_rotations_and_saves(pair: Pair):
    """Names that change hands: every object ends under its new name."""
    a, b = pair
    for name in ("p", "q", "1", "2", "3", "doc"):
        put(a / name, name.encode())
    mirror("-a", "--delete", f"{a}/", b)
    exchange(a / "p", a / "q")
    (a / "1").rename(a / "t")
    (a / "2").rename(a / "1")
    (a / "3").rename(a / "2")
    (a / "t").rename(a / "3")
    (a / "doc").rename(a / "doc~")
    put(a / "doc", b"saved anew")
    outcome = mirror("-a", "--delete", f"{a}/", b)
    assert look(b) == look(a)
    assert outcome.summary["literal_bytes"] == len(b"saved anew")


def test_a_local_edit_is_undone_and_kept(pair: Pair):
    """The destination is observed, not trusted; with times restored it is noticed all the same."""
    a, b = pair
    put(a / "x", b"theirs", t=NOON)
    mirror("-a", f"{a}/", b)
    edit(b / "x", b"mine!!", t=NOON)
    mirror("-a", f"{a}/", b)
    assert look(b) == {"x": b"theirs"}
    assert {c for _, c in kept(b)} == {b"mine!!"}


def test_an_edit_with_its_time_restored(pair: Pair):
    """At the source, too: its change time moved."""
    a, b = pair
    put(a / "x", b"one", t=NOON)
    mirror("-a", f"{a}/", b)
    edit(a / "x", b"two", t=NOON)
    mirror("-a", f"{a}/", b)
    assert look(b) == {"x": b"two"}


def test_nothing_to_do(pair: Pair):
    """The second run changes nothing, and the source is never written."""
    a, b = pair
    _files(a / "d", 30)
    os.symlink("d", a / "l")
    before = snapshot(a)
    mirror("-a", f"{a}/", b)
    second = mirror("-a", f"{a}/", b).summary
    counts = ("created", "updated", "deleted", "moves", "kept", "literal_bytes")
    assert [second[name] for name in counts] == [0] * len(counts)
    assert snapshot(a) == before
    assert not (a / ".bisync").exists()


def test_beside_sync(pair: Pair):
    """mirror and sync on one pair: equal afterwards, and the next sync finds nothing to do."""
    a, b = pair
    put(a / "x", b"one")
    sync(a, b)
    edit(a / "x", b"two")
    put(a / "new", b"new")
    mirror("-a", f"{a}/", b)
    outcome = sync(a, b)
    assert (outcome.summary["conflicts"], outcome.summary["literal_bytes"]) == (0, 0)
    assert look(a) == look(b)


# --- Options against renames (hard point 18) ---


def test_size_limits_and_renames(pair: Pair):
    """--max-size limits transfers: a rename is still a rename (rsync loses the file)."""
    a, b = pair
    put(a / "big", b"x" * 5000)
    mirror("-a", "--delete", f"{a}/", b)
    (a / "big").rename(a / "renamed")
    mirror("-a", "--delete", "--max-size=1k", f"{a}/", b)
    assert look(b) == {"renamed": b"x" * 5000}


def test_existing_and_renames(pair: Pair):
    """--existing makes no new name; the old one is extra and goes to the store."""
    a, b = pair
    put(a / "x", b"x")
    put(a / "stays", b"stays")
    mirror("-a", "--delete", f"{a}/", b)
    (a / "x").rename(a / "y")
    mirror("-a", "--delete", "--existing", f"{a}/", b)
    assert look(b) == {"stays": b"stays"}
    assert {c for _, c in kept(b)} == {b"x"}


def test_ignore_existing_and_renames(pair: Pair):
    """--ignore-existing: an existing name is not replaced, by a rename either."""
    a, b = pair
    put(a / "x", b"x")
    put(a / "y", b"y")
    mirror("-a", "--delete", f"{a}/", b)
    (a / "x").rename(a / "y")
    mirror("-a", "--delete", "--ignore-existing", f"{a}/", b)
    assert look(b) == {"y": b"y"}
    assert {c for _, c in kept(b)} == {b"x"}


def test_excluded_files_and_a_renamed_directory(pair: Pair):
    """What a filter protects stays at its name; the rest moves on."""
    a, b = pair
    put(a / "d/x", b"x")
    mirror("-a", "--delete", "--exclude=*.keep", f"{a}/", b)
    put(b / "d/mine.keep", b"mine")
    (a / "d").rename(a / "e")
    outcome = mirror("-a", "--delete", "--exclude=*.keep", f"{a}/", b)
    assert b"mine" in look(b).values()
    assert look(b)["e/x"] == b"x"
    assert outcome.summary["literal_bytes"] in (0, 1)


def test_a_link_to_the_outside_is_never_written_through(pair: Pair):
    """Without -H, and with --inplace: the other name keeps its content."""
    a, b = pair
    put(a / "x", b"one")
    mirror("-a", f"{a}/", b)
    outside = b.parent / "outside"
    outside.unlink(missing_ok=True)
    os.link(b / "x", outside)
    edit(a / "x", b"two")
    mirror("-a", "--inplace", f"{a}/", b)
    assert (look(b)["x"], outside.read_bytes()) == (b"two", b"one")
    outside.unlink()


def test_update_decides_about_content_only(pair: Pair):
    """-u keeps newer content and its time; the mode is carried."""
    a, b = pair
    put(a / "x", b"old", t=NOON)
    put(b / "x", b"newer", t=NOON + 100)
    (a / "x").chmod(0o600)
    mirror("-a", "-u", f"{a}/", b)
    info = (b / "x").stat()
    assert (look(b)["x"], info.st_mode & 0o777, info.st_mtime) == (b"newer", 0o600, NOON + 100)


def test_delete_excluded_spares_state_and_store(pair: Pair):
    """--delete-excluded never touches what is bisync's own."""
    a, b = pair
    put(a / "x", b"one")
    put(b / "out", b"out")
    mirror("-a", f"{a}/", b)
    edit(a / "x", b"two")
    mirror("-a", "--delete", "--delete-excluded", "--exclude=.*", "--exclude=rsync-rollback",
           "--exclude=out", f"{a}/", b)  # fmt: skip
    assert look(b) == {"x": b"two"}
    assert (b / ".bisync/replica").exists()
    assert {c for _, c in kept(b)} == {b"one", b"out"}


# --- Guards (hard point 19) ---


def test_guard(pair: Pair):
    """Most of the destination would go: withheld, everything else is done; --yes approves."""
    a, b = pair
    _files(a, 50)
    mirror("-a", f"{a}/", b)
    for number in range(40):
        (a / f"{number:03d}").unlink()
    put(a / "new", b"new")
    outcome = mirror("-a", "--delete", f"{a}/", b, check=25)
    assert outcome.summary["withheld"] == 40
    assert (len(look(b)), look(b)["new"]) == (51, b"new")
    mirror("-a", "--delete", "-n", f"{a}/", b, check=25)
    mirror("-a", "--delete", "--yes", f"{a}/", b)
    assert look(b) == look(a)


def test_an_emptied_source(pair: Pair):
    """Five files are below every limit, but a source that is empty deletes nothing."""
    a, b = pair
    _files(a, 5)
    mirror("-a", f"{a}/", b)
    for path in a.iterdir():
        path.unlink()
    mirror("-a", "--delete", "--ignore-errors", f"{a}/", b, check=25)
    assert len(look(b)) == 5


def test_another_source(pair: Pair):
    """Another tree at the place of the source (a lost mount): nothing is deleted."""
    a, b = pair
    _files(a / "s", 5)
    mirror("-a", "--delete", f"{a}/s/", b)
    (a / "s").rename(a / "gone")
    put(a / "s/other", b"other")
    mirror("-a", "--delete", f"{a}/s/", b, check=25)
    assert len(look(b)) == 6
    mirror("-a", "--delete", "--yes", f"{a}/s/", b)
    assert look(b) == {"other": b"other"}


def test_max_delete(pair: Pair):
    """rsync's: the first N are deleted, the rest is withheld; the guard is off."""
    a, b = pair
    _files(a, 40)
    put(a / "stays", b"")
    mirror("-a", f"{a}/", b)
    for number in range(40):
        (a / f"{number:03d}").unlink()
    mirror("-a", "--delete", "--max-delete=30", f"{a}/", b, check=25)
    assert len(look(b)) == 11
    mirror("-a", "--delete", "--max-delete=100", f"{a}/", b)
    assert look(b) == {"stays": b""}


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming a plain user needs root")
def test_an_unreadable_directory_protects_its_counterpart(here: Pair):
    """As a plain user: what cannot be listed is not taken for empty, --ignore-errors or not."""
    a, b = here
    for folder in here:
        os.chown(folder, 65534, 65534)
    put(a / "d/x", b"x")
    put(a / "y", b"y")
    for path in (a / "d", a / "d/x", a / "y"):
        os.chown(path, 65534, 65534)
    words = ("-rt", "--delete", "--ignore-errors", f"{a}/", b)
    mirror(*words, user=65534)
    (a / "d").chmod(0)
    (a / "y").unlink()
    put(a / "z", b"z")
    mirror(*words, user=65534, check=23)
    assert look(b) == {"d": None, "d/x": b"x", "z": b"z"}


@needs_rsync
@pytest.mark.parametrize("torn", [False, True])
def test_a_hard_link_group_that_was_edited(here: Pair, torn: bool):
    """All its names get the new object, also where only one of them has it already."""
    a, b = here
    put(a / "d/one", b"old", t=NOON)
    (a / "d/sub").mkdir()
    for name in ("d/two", "d/sub/three"):
        (a / name).hardlink_to(a / "d/one")
    mirror("-aH", f"{a}/", b)
    put(a / "d/two", b"new content", t=NOON + 9)
    if torn:
        (b / "d/two").unlink()
        put(b / "d/two", b"new content", t=NOON + 9)
    twin = b.with_name("twin")
    subprocess.run(["cp", "-a", b, twin], check=True)
    line = ["rsync", "-aHi", "--exclude=.bisync", f"{a}/", f"{twin}/"]
    judge = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    done = run("mirror", "-aHi", f"{a}/", b).stdout
    said = [[line for line in text.splitlines() if line[1:2] == "f"] for text in (judge, done)]
    assert sorted(said[0]) == sorted(said[1])
    assert len({(b / name).stat().st_ino for name in ("d/one", "d/two", "d/sub/three")}) == 1
    assert look(b)["d/one"] == b"new content"


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming a plain user needs root")
def test_a_plain_users_read_only_directories(here: Pair):
    """They take and lose names as with rsync, and are read-only afterwards."""
    a, b = here
    put(a / "d/stays", b"1")
    put(b / "d/goes", b"2")
    put(b / "d/sub/goes", b"3")
    for path in (a, b, a / "d", a / "d/stays", *b.rglob("*")):
        os.chown(path, 65534, 65534)
    for path in (b / "d/sub", b / "d", a / "d"):
        path.chmod(0o555)
    mirror("-a", "--delete", f"{a}/", b, user=65534)
    assert look(b) == {"d": None, "d/stays": b"1"}
    assert (b / "d").stat().st_mode & 0o777 == 0o555


# --- Backups ---


@needs_rsync
@pytest.mark.parametrize("suffix", [[], ["--suffix=.bak"]])
def test_backups_beside_their_names(pair: Pair, suffix: list[str]):
    """-b: what is replaced, deleted or displaced is at NAME~, as after rsync."""
    a, b = pair
    other = b.parent / "by-rsync"
    for name in ("a", "b", "c", "d/x", "d/y"):
        put(a / name, b"old " + name.encode(), t=NOON)
    subprocess.run(["rsync", "-a", f"{a}/", f"{other}/"], check=True)
    mirror("-a", f"{a}/", b)
    edit(a / "a", b"new", t=NOON + 10)
    edit(a / "d/x", b"new", t=NOON + 10)
    (a / "b").unlink()
    (a / "d/y").unlink()
    (a / "c").unlink()
    (a / "c").mkdir()
    for _ in range(2):
        subprocess.run(["rsync", "-ab", "--delete", *suffix, f"{a}/", f"{other}/"], check=True)
        mirror("-ab", "--delete", *suffix, f"{a}/", b)
        assert look(b) == look(other)
    shutil.rmtree(other)


def test_backup_dir(pair: Pair):
    """The lab script's dated folder is a day of the store; a second version is NAME.~2~."""
    a, b = pair
    put(a / "d/x", b"one", t=NOON)
    mirror("-a", f"{a}/", b)
    for number, text in enumerate((b"two", b"three")):
        edit(a / "d/x", text, t=NOON + 10 + number)
        mirror("-a", "--delete", "--backup-dir=rsync-rollback/2020-01-02",
               "--exclude=rsync-rollback", f"{a}/", b)  # fmt: skip
    day = b / "rsync-rollback/2020-01-02/d"
    assert {p.name: p.read_bytes() for p in day.iterdir()} == {"x": b"one", "x.~2~": b"two"}


def test_backup_dir_elsewhere(pair: Pair, tmp_path: Path):
    """On another file system: copied, made durable, then removed."""
    a, b = pair
    put(a / "d/x", b"one", t=NOON)
    mirror("-a", f"{a}/", b)
    edit(a / "d/x", b"two", t=NOON + 10)
    mirror("-a", f"--backup-dir={tmp_path}/backup", f"{a}/", b)
    assert (tmp_path / "backup/d/x").read_bytes() == b"one"
    assert kept(b) == []


def test_no_keep(pair: Pair):
    """rsync's way: nothing is kept."""
    a, b = pair
    put(a / "x", b"one", t=NOON)
    put(a / "y", b"y")
    mirror("-a", f"{a}/", b)
    edit(a / "x", b"two", t=NOON + 10)
    (a / "y").unlink()
    mirror("-a", "--delete", "--no-keep", f"{a}/", b)
    assert (look(b), kept(b)) == ({"x": b"two"}, [])


# --- Where to, and what is refused ---


def test_single_files(pair: Pair):
    """A file as source: into a folder, over a file, to a new name."""
    a, b = pair
    put(a / "x", b"x")
    mirror("-a", a / "x", b)
    mirror("-a", a / "x", b / "new")
    put(b / "old", b"old", t=NOON)
    mirror("-a", a / "x", b / "old")
    assert look(b) == {"x": b"x", "new": b"x", "old": b"x"}
    assert {c for _, c in kept(b)} == {b"old"}


def test_a_folder_below_a_root(pair: Pair):
    """The destination may be any folder of a root: the root's state serves, no new one is made."""
    a, b = pair
    put(a / "x", b"x")
    sync(a, b)
    put(a / "s/y", b"y")
    mirror("-a", "--delete", f"{a}/s/", b / "below/")
    assert not (b / "below/.bisync").exists()
    assert look(b) == {"x": b"x", "below": None, "below/y": b"y"}


def test_dry_run(pair: Pair):
    """-n changes nothing, not even a folder that is not there yet."""
    a, b = pair
    put(a / "x", b"x")
    outcome = mirror("-an", f"{a}/", b / "new")
    assert outcome.summary["created"] == 1
    assert look(b) == {}
    assert os.listdir(b) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["SRC/"], "destination"),
        (["-a", "--delete", "--no-r", "SRC/", "DST"], "--recursive"),
        (["-a", "--max-size=lots", "SRC/", "DST"], "--max-size"),
        (["-a", "--chmod=x+y", "SRC/", "DST"], "--chmod"),
        (["-a", "--filter=what is this", "SRC/", "DST"], "not understood"),
        (["-a", "--exclude-from=none", "SRC/", "DST"], "none"),
        (["-a", "--files-from=none", "SRC/", "DST"], "none"),
        (["-a", "--out-format=%Q", "SRC/", "DST"], "%Q"),
        (["-a", "--nonsense", "SRC/", "DST"], "--nonsense"),
        (["-a", "SRC/", "DST/no/such/folder"], "cannot make"),
        (["-a", "SRC/", "SRC/"], "the same"),
        (["-a", "SRC/", "SRC/d"], "inside the source"),
        (["-a", "--delete", "DST/d/", "DST"], "inside the destination"),
        (["-a", "SRC/", "DST/file"], "not a directory"),
        (["-a", "host::SRC/", "DST"], "over ssh"),
        (["-a", "me@-oProxyCommand=x:SRC/", "DST"], "no name of a machine"),
        (["-a", "one:SRC/", "two:SRC/", "DST"], "on one machine"),
        (["-a", "--backup-dir=.", "SRC/", "DST"], "--backup-dir"),
        (["-a", "--max-delete=x", "SRC/", "DST"], "--max-delete"),
    ],
)
def test_bad_words(here: Pair, words: list[str], said: str):
    """One clear line, exit code 2, nothing changed."""
    a, b = here
    put(a / "d/x", b"x")
    put(b / "d/x", b"mine")
    put(b / "file", b"file")
    before = snapshot(a), snapshot(b)
    words = [w.replace("SRC", str(a), 1).replace("DST", str(b), 1) for w in words]
    outcome = run("mirror", *words, check=2)
    assert said in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert (snapshot(a), snapshot(b)) == before
    assert not (b / ".bisync").exists()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_words(here: Pair, name: str):
    """An option of rsync's that is not supported is refused by name, with the reason."""
    a, b = here
    outcome = run("mirror", "-a", name, f"{a}/", b, check=2)
    assert f"{name}: " in outcome.stderr
    assert REFUSED[name] in outcome.stderr


def test_a_missing_source(pair: Pair):
    """Alone: nothing is touched. Beside others: a problem, and nothing is deleted."""
    a, b = pair
    put(b / "x", b"x")
    mirror("-a", "--delete", f"{a}/none/", b, check=23)
    put(a / "y", b"y")
    mirror("-a", "--delete", f"{a}/", f"{a}/none", b, check=23)
    assert look(b) == {"x": b"x", "y": b"y"}


def test_the_table_of_words():
    """The documentation has every word."""
    text = (REPOSITORY / "docs/from-rsync.md").read_text(encoding="utf-8")
    assert markdown() in text


def test_bandwidth_limit(here: Pair, monkeypatch: pytest.MonkeyPatch):
    """--bwlimit waits as long as the bytes need: the pace is asked for each of them."""
    from bisync.fs.pace import Pace  # noqa: PLC0415

    now, waits = [0.0], []
    monkeypatch.setattr("bisync.fs.pace.time.sleep", waits.append)
    pace = Pace(1000, clock=lambda: now[0])
    for _ in range(10):
        pace(1000)
    assert 9 < max(waits) <= 10
    now[0] = 100.0
    waits.clear()
    pace(100)
    assert sum(waits) <= 0.1
