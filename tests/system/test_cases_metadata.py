"""Modes, owners, times, attributes, ACLs: cases 98, 147-154."""

import os
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trees import (
    NOON,
    Arena,
    Batch,
    assert_equal,
    collect,
    edit,
    frozen,
    look,
    put,
    sync,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="setting owners needs root")

UMASK = 0o077  # of the program under test
_ENGINES = {".bisync", "rsync-rollback"}
STRANGER = 54_321  # an id that no user has
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service+ep


def _acl(*args: str | Path) -> None:
    done = subprocess.run(["setfacl", *args], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no ACLs here: {done.stderr.strip()}")


def case_147_unknown_owner(c: Arena):
    """Ids that no user has are numbers like any other."""
    put(c.a / "f", c("one"))
    os.chown(c.a / "f", STRANGER, STRANGER + 1)
    (c.a / "d").mkdir()
    os.chown(c.a / "d", STRANGER, STRANGER)
    (c.a / "l").symlink_to("nowhere")
    os.lchown(c.a / "l", STRANGER, STRANGER)
    yield
    os.chown(c.b / "f", STRANGER + 2, -1)
    os.chown(c.a / "f", -1, STRANGER + 3)
    yield
    status = (c.a / "f").stat()
    assert (status.st_uid, status.st_gid) == (STRANGER + 2, STRANGER + 3)


def case_148_acls(c: Arena):
    """ACLs, default ones too, with ids that no user has; nothing is inherited that A lacks."""
    put(c.a / "f", c("one"))
    _acl("-m", f"u:{STRANGER}:r,g:{STRANGER}:rw", c.a / "f")
    put(c.a / "d/plain", c("made before the default"))
    (c.a / "d/sub").mkdir()
    _acl("-d", "-m", f"g:{STRANGER}:rwx", c.a / "d")
    put(c.a / "d/inherits", c("made after the default"))
    yield
    assert "system.posix_acl_access" in os.listxattr(c.b / "f")
    assert "system.posix_acl_default" in os.listxattr(c.b / "d")
    assert os.listxattr(c.b / "d/plain") == os.listxattr(c.b / "d/sub") == []
    put(c.a / "d/later", c("made after the first sync"))
    _acl("-b", c.a / "d/later")
    _acl("-b", c.b / "f")
    edit(c.a / "f", c("two"))
    yield
    assert os.listxattr(c.b / "d/later") == []
    assert os.listxattr(c.a / "f") == []


def case_150_extended_attributes(c: Arena):
    """Attributes of users, of root and capabilities are set, changed and removed."""
    path = put(c.a / "f", c("one"), mode=0o755)
    os.setxattr(path, "user.one", b"1")
    os.setxattr(path, "user.binary", bytes(range(256)))
    os.setxattr(path, "user.empty", b"")
    os.setxattr(path, "trusted.note", b"of root")
    os.setxattr(path, "security.capability", CAPABILITY)
    (c.a / "d").mkdir()
    os.setxattr(c.a / "d", "user.dir", b"d")
    yield
    assert len(os.listxattr(c.b / "f")) == 5
    os.setxattr(path, "user.one", b"one")
    os.removexattr(path, "user.empty")
    os.setxattr(c.b / "f", "user.two", b"2")
    os.removexattr(c.b / "f", "trusted.note")
    os.removexattr(c.b / "d", "user.dir")
    yield
    seen = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    assert seen == {
        "user.one": b"one",
        "user.two": b"2",
        "user.binary": bytes(range(256)),
        "security.capability": CAPABILITY,
    }


def case_150_attribute_against_edit(c: Arena):
    """A sets an attribute, B edits the content: both effects."""
    path = put(c.a / "f", c("one"))
    yield
    os.setxattr(path, "user.tag", b"A")
    edit(c.b / "f", c("edited at B"))
    yield
    assert look(c.a) == {"f": c("edited at B")}
    assert os.getxattr(c.b / "f", "user.tag") == b"A"


def case_151_set_id_bits(c: Arena):
    """Set-id bits travel between local roots and outlive a change of owner and of content."""
    for name, mode in {"u": 0o4755, "g": 0o2755, "both": 0o6711}.items():
        put(c.a / name, c(name))
        os.chown(c.a / name, STRANGER, STRANGER)
        (c.a / name).chmod(mode)
    yield
    assert stat.S_IMODE((c.b / "both").stat().st_mode) == 0o6711
    os.chown(c.a / "u", STRANGER + 1, STRANGER)
    edit(c.a / "g", c("edited"))
    (c.a / "u").chmod(0o4755)
    (c.a / "g").chmod(0o2755)
    yield
    assert stat.S_IMODE((c.b / "u").stat().st_mode) == 0o4755
    assert stat.S_IMODE((c.b / "g").stat().st_mode) == 0o2755


def case_153_modes(c: Arena):
    """Modes are the source's, whatever the umask; set-id and sticky directories keep theirs."""
    for mode in (0o000, 0o200, 0o444, 0o600, 0o666, 0o777):
        put(c.a / f"{mode:o}", c(f"{mode:o}"), mode=mode)
    for mode in (0o500, 0o555, 0o777, 0o1777, 0o2775, 0o3770):
        put(c.a / f"d{mode:o}/inner", c(f"d{mode:o}"))
        os.chown(c.a / f"d{mode:o}", -1, STRANGER)
        (c.a / f"d{mode:o}").chmod(mode)
    yield
    assert stat.S_IMODE((c.b / "d2775").stat().st_mode) == 0o2775
    put(c.a / "d2775/later", c("later"))
    os.chown(c.a / "d2775/later", -1, 0)  # not the directory's group
    put(c.a / "d555/later", c("later too"))
    (c.b / "0").chmod(0o640)
    yield
    assert (c.b / "d2775/later").stat().st_gid == 0
    assert stat.S_IMODE((c.b / "d555").stat().st_mode) == 0o555
    assert stat.S_IMODE((c.a / "0").stat().st_mode) == 0o640


def case_154_directory_times(c: Arena):
    """A directory's time is the source's after its children were written, at every depth."""
    put(c.a / "one/two/three/f", c("f"))
    for path in ("one/two/three", "one/two", "one"):
        os.utime(c.a / path, (NOON, NOON))
    yield
    assert (c.b / "one/two/three").stat().st_mtime == NOON
    put(c.a / "one/two/three/g", c("g"))
    os.utime(c.a / "one/two/three", (NOON + 10, NOON + 10))
    yield
    assert (c.b / "one/two/three").stat().st_mtime == NOON + 10
    assert (c.b / "one/two").stat().st_mtime == NOON


def case_154_touched_directory(c: Arena):
    """A directory of which nothing but the time changed gets that time."""
    (c.a / "d").mkdir()
    yield
    os.utime(c.a / "d", (NOON + 4e8, NOON + 4e8))  # later than now: the later of both stands
    yield
    assert (c.b / "d").stat().st_mtime == NOON + 4e8


def case_154_times_of_files_and_links(c: Arena):
    """Times arrive to the nanosecond, those of symlinks too."""
    path = put(c.a / "f", c("f"))
    (c.a / "l").symlink_to("nowhere")
    for each in (path, c.a / "l"):
        os.utime(each, ns=(NOON * 10**9 + 123_456_789,) * 2, follow_symlinks=False)
    yield
    os.utime(path, ns=(NOON * 10**9 + 987_654_321,) * 2)
    yield
    assert (c.b / "f").stat().st_mtime_ns == NOON * 10**9 + 987_654_321
    assert (c.b / "l").lstat().st_mtime_ns == NOON * 10**9 + 123_456_789


CASES = collect(globals())


@pytest.mark.parametrize("case", CASES)
def test_case(batch: Batch, case: str):
    """Each case ends as its row says."""
    batch.verdict(case)


def test_counts(batch: Batch):
    """Attributes merge one by one: no conflict, no problem, and no content for them."""
    batch.assert_runs("conflicts", "problems", "busy")


def test_rest(batch: Batch):
    """A run at rest writes nothing outside the state folder."""
    batch.assert_rest()


def test_case_098_times_far_away(pair: tuple[Path, Path]):
    """Times before 1970 and after 2446 arrive as the file system holds them, and stay at rest."""
    a, b = pair
    for number, seconds in enumerate((-1, -(10**9), 2**31, 2**34 + 5, 10**9)):
        path = put(a / f"t{number}", b"%d" % number)
        os.utime(path, ns=(seconds * 10**9 + 123_456_789,) * 2)
    sync(a, b)
    assert_equal(a, b)
    before = frozen(a), frozen(b)
    sync(a, b)
    assert (frozen(a), frozen(b)) == before


def test_case_149_attribute_too_big_for_the_other_side(
    file_system: Callable[[str], Path], tmp_path: Path
):
    """XFS holds what ext4 cannot: the content arrives, the attribute stays where it is."""
    a, b = (file_system(name) / tmp_path.name for name in ("xfs", "ext4"))
    a.mkdir()
    b.mkdir()
    put(a / "f", b"content")
    os.setxattr(a / "f", "user.big", b"x" * 20_000)
    os.setxattr(a / "f", "user.small", b"y")
    first = sync(a, b, check=(0, 23))
    assert "user.big" in first.said
    assert (b / "f").read_bytes() == b"content"
    assert os.listxattr(b / "f") == ["user.small"]
    assert sorted(os.listxattr(a / "f")) == ["user.big", "user.small"]
    edit(b / "f", b"edited on ext4")
    sync(a, b, check=(0, 23))
    assert (a / "f").read_bytes() == b"edited on ext4"
    assert os.getxattr(a / "f", "user.big") == b"x" * 20_000
    before = frozen(a), frozen(b)
    sync(a, b, check=(0, 23))
    assert (frozen(a), frozen(b)) == before


def test_cases_122_141_147_152_a_plain_user(pair: tuple[Path, Path]):
    """As a plain user: what may not be read is frozen, what may not be written is a problem.

    122: a directory that cannot be listed deletes nothing. 141: a directory that cannot be
    written is a problem of the paths in it. 147: an owner that cannot be set is no problem and
    never changes the other side's. 152: a read-only directory of his takes what comes, and keeps
    its mode.
    """
    a, b = pair
    user = 12_345
    put(a / "secret/f", b"secret")
    put(a / "locked/f", b"locked")
    put(a / "readonly/f", b"readonly")
    put(a / "foreign", b"foreign", mode=0o644)
    put(a / "free", b"free")
    for path in (a, b, *a.rglob("*")):
        os.chown(path, user, user)
    os.chown(a / "foreign", STRANGER, STRANGER)
    (a / "readonly").chmod(0o555)

    first = sync(a, b, user=user)
    assert first.summary["problems"] == 0
    assert look(b) == look(a)
    assert ((a / "foreign").stat().st_uid, (b / "foreign").stat().st_uid) == (STRANGER, user)

    os.chown(a / "secret", 0, 0)
    (a / "secret").chmod(0o700)
    os.chown(b / "locked", 0, 0)
    for name in ("locked/new", "readonly/new", "free"):
        put(a / name, b"new")
        os.chown(a / name, user, user)
    outcome = sync(a, b, check=23, user=user)
    assert outcome.summary["problems"] > 0
    assert outcome.summary["deleted"] == 0
    assert (b / "secret/f").read_bytes() == b"secret"
    assert not (b / "locked/new").exists()
    assert (b / "locked/f").read_bytes() == b"locked"
    assert (b / "free").read_bytes() == b"new"
    assert (a / "foreign").stat().st_uid == STRANGER
    for side in (a, b):
        assert stat.S_IMODE((side / "readonly").stat().st_mode) == 0o555

    for path in (a / "secret", a / "locked", b / "locked"):
        os.chown(path, user, user)
        path.chmod(0o755)
    (b / "secret").chmod(0o755)
    assert (b / "readonly/new").read_bytes() == b"new"
    sync(a, b, user=user)
    assert look(a) == look(b)
    assert look(a)["locked/new"] == b"new"
    assert (a / "foreign").stat().st_uid == STRANGER
    before = frozen(a), frozen(b)
    sync(a, b, user=user)
    assert (frozen(a), frozen(b)) == before


def _read_only(root: Path) -> None:
    os.chown(root, 12_345, 12_345)
    for path in root.rglob("*"):
        if not _ENGINES.intersection(path.parts):
            os.chown(path, 12_345, 12_345)
            if path.is_dir():
                path.chmod(0o555)


def test_case_152_all_kinds_of_change_in_read_only_directories(pair: tuple[Path, Path]):
    """A plain user's tree of read-only directories, as a package manager leaves it."""
    a, b = pair
    for name in ("keep/f", "keep/gone", "move/f", "move/sub/f", "dead/sub/f", "to/f", "swap/p/1"):
        put(a / name, name.encode())
    put(a / "swap/q/1", b"q")
    _read_only(a)
    os.chown(b, 12_345, 12_345)
    sync(a, b, user=12_345)
    put(a / "keep/f", b"edited")
    put(a / "keep/new", b"new")
    put(a / "keep/made/deep/f", b"deep")
    (a / "keep/gone").unlink()
    (a / "move/f").rename(a / "to/moved")
    (a / "move/sub").rename(a / "to/sub")
    shutil.rmtree(a / "dead")
    (a / "swap/p").rename(a / "x")
    (a / "swap/q").rename(a / "swap/p")
    (a / "x").rename(a / "swap/q")
    _read_only(a)
    assert sync(a, b, user=12_345).summary["problems"] == 0
    assert_equal(a, b)
    folders = [p for p in b.rglob("*") if p.is_dir() and not _ENGINES.intersection(p.parts)]
    assert {stat.S_IMODE(p.stat().st_mode) for p in folders} == {0o555}
    before = frozen(a), frozen(b)
    sync(a, b, user=12_345)
    assert (frozen(a), frozen(b)) == before


def test_case_152_a_run_that_was_cut(pair: tuple[Path, Path]):
    """What a killed run left writable is hardened by the next one; what a user set since, stays."""
    a, b = pair
    for name in ("left", "opened", "closed"):
        put(a / name / "f", b"f")
    _read_only(a)
    for root in pair:
        os.chown(root, 12_345, 12_345)
    sync(a, b, user=12_345)
    db = sqlite3.connect(b / ".bisync/state.db")
    for name in ("", "left", "opened", "closed"):  # as a kill in the middle of a step leaves it
        ino = (b / name).stat().st_ino
        (node,) = db.execute("SELECT id FROM node WHERE ino=?", (ino,)).fetchone()
        db.execute("INSERT INTO softened VALUES(?, ?)", (node, 0o555))
    db.commit()
    db.close()
    os.chown(b / ".bisync/state.db", 12_345, 12_345)
    b.chmod(0o755)
    (b / "left").chmod(0o755)
    (b / "opened").chmod(0o777)
    sync(a, b, user=12_345)
    modes = [stat.S_IMODE((b / name).stat().st_mode) for name in ("", "left", "opened", "closed")]
    assert modes == [0o555, 0o555, 0o777, 0o555]


def test_case_147_a_weak_side_does_not_rewrite_the_strong_one(pair: tuple[Path, Path]):
    """B cannot hold an owner; root then edits there: the content travels, A's owner stays."""
    a, b = pair
    user = 12_345
    for path in (a, b):
        os.chown(path, user, user)
    put(a / "f", b"one", mode=0o666)
    os.chown(a / "f", STRANGER, STRANGER)
    sync(a, b, user=user)
    edit(b / "f", b"two")
    sync(a, b)
    status = (a / "f").stat()
    assert (status.st_uid, status.st_gid) == (STRANGER, STRANGER)
    assert (a / "f").read_bytes() == b"two"
