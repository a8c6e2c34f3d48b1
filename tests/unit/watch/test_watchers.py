"""One contract for every watcher: what happens below the root is said, of the right directory."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bisync.watch.choose import Kind, watch
from bisync.watch.fanotify import FanotifyWatcher
from bisync.watch.inotify import InotifyWatcher
from bisync.watch.interface import Pace, Scope, Spot, UnavailableError, Watcher
from tests.trees import exchange

Start = Callable[..., Watcher]


class Heard:
    """What a watcher said."""

    def __init__(self) -> None:
        self.directories: dict[bytes, list[Pace]] = {}
        self.everything: list[str] = []
        self.tokens: list[int] = []
        self._changed = threading.Condition()

    def touched(self, spot: Spot, pace: Pace) -> None:
        with self._changed:
            self.directories.setdefault(spot.path, []).append(pace)
            self._changed.notify_all()

    def lost(self, why: str) -> None:
        with self._changed:
            self.everything.append(why)
            self._changed.notify_all()

    def token(self, number: int) -> None:
        with self._changed:
            self.tokens.append(number)
            self._changed.notify_all()

    def until(self, there: Callable[["Heard"], object], seconds: float = 20) -> bool:
        """Wait until something was said."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: there(self), seconds))

    def about(self, directory: bytes) -> bool:
        """Wait until a mark leads to a directory."""
        return self.until(lambda h: h.everything or directory in h.directories)

    def clear(self) -> None:
        with self._changed:
            self.directories.clear()
            self.everything.clear()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture(params=["fanotify", "inotify", "poll"])
def start(request: pytest.FixtureRequest, heard: Heard) -> Iterator[Start]:
    """Start a watcher of each kind."""
    running: list[Watcher] = []

    def begin(root: Path, **scope: object) -> Watcher:
        words = {"poll_s": 0.05 if request.param == "poll" else 30.0, **scope}
        made = watch(Kind(request.param), Scope(os.fsencode(root), **words), heard)  # type: ignore[arg-type]
        running.append(made)
        return made

    if request.param == "fanotify" and os.geteuid() != 0:
        pytest.skip("a mark on a file system is for root")
    yield begin
    for one in running:
        one.close()


@pytest.fixture
def root(fsdir: Path) -> Path:
    """A root on each file system."""
    place = fsdir / "root"
    (place / "d" / "e").mkdir(parents=True)
    (place / "d" / "f").write_bytes(b"1")
    return place


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"3")


HAPPENINGS = {
    "written": (lambda r: (r / "d/f").write_bytes(b"22"), b"d"),
    "appended": (lambda r: append(r / "d/f"), b"d"),
    "created": (lambda r: (r / "d/e/new").write_bytes(b""), b"d/e"),
    "deleted": (lambda r: (r / "d/f").unlink(), b"d"),
    "moved from": (lambda r: (r / "d/f").rename(r / "f"), b"d"),
    "moved to": (lambda r: (r / "d/f").rename(r / "d/e/f"), b"d/e"),
    "chmod": (lambda r: (r / "d/f").chmod(0o600), b"d"),
    "chmod of a directory": (lambda r: (r / "d/e").chmod(0o700), b"d"),
    "touched": (lambda r: os.utime(r / "d/f", (1, 1)), b"d"),
    "xattr": (lambda r: os.setxattr(r / "d/f", "user.x", b"1"), b"d"),
    "linked": (lambda r: os.link(r / "d/f", r / "d/e/g"), b"d/e"),
    "symlink": (lambda r: (r / "d/e/s").symlink_to("x"), b"d/e"),
    "fifo": (lambda r: os.mkfifo(r / "d/e/p"), b"d/e"),
    "mkdir": (lambda r: (r / "d/e/n").mkdir(), b"d/e"),
    "rmdir": (lambda r: (r / "d/e").rmdir(), b"d"),
    "directory moved": (lambda r: (r / "d/e").rename(r / "g"), b""),
    "not text": (lambda r: (os.fsencode(r / "d"), os.mkdir(os.fsencode(r) + b"/d/\xff")), b"d"),
}


@pytest.mark.parametrize("what", HAPPENINGS)
def test_what_happens_is_said(start: Start, heard: Heard, root: Path, what: str):
    """Each kind of event leads to the directory that a scan has to list."""
    start(root)
    heard.clear()
    act, directory = HAPPENINGS[what]
    act(root)
    assert heard.about(directory)


def test_what_happens_in_new_directories(start: Start, heard: Heard, root: Path):
    """Made, moved and filled faster than anybody can look: every directory with a file is said."""
    start(root)
    heard.clear()
    script = (
        "import os,sys\nos.chdir(sys.argv[1])\n"
        "for i in range(200):\n"
        "    os.makedirs(f'n{i}/a/b'); open(f'n{i}/a/b/f','w').close()\n"
        "    if i % 3 == 0: os.rename(f'n{i}', f'm{i}'); open(f'm{i}/a/g','w').close()\n"
    )
    subprocess.run([sys.executable, "-c", script, str(root)], check=True)
    # A name that is new is walked when its directory is listed: the old one will do.
    for number in range(200):
        assert heard.until(
            lambda h, n=b"%d" % number: (
                h.everything
                or (b"" in h.directories and any(d[1:].split(b"/")[0] == n for d in h.directories))
            ),
        ), number


def test_after_a_directory_was_moved(start: Start, heard: Heard, root: Path):
    """What happens below is said of where it is now, two levels down."""
    start(root)
    (root / "d").rename(root / "moved")
    assert heard.about(b"")
    heard.clear()
    (root / "moved/e/x").write_bytes(b"1")
    assert heard.about(b"moved/e")
    assert b"d/e" not in heard.directories


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_directories_that_were_exchanged(
    start: Start, heard: Heard, root: Path, times: int, *, apart: bool
):
    """Each is watched where it is then, and so is what is made in it."""
    one, two = root / "d", root / ("n/o" if apart else "n")
    (two / "below").mkdir(parents=True)
    start(root)
    for _ in range(times):
        exchange(one, two)
    assert heard.about(b"")
    for place in (one, two):
        (place / "new").mkdir()
    _settle(heard, root)
    for place in (one, two):
        for below in ("new", "e" if (place / "e").exists() else "below"):
            heard.clear()
            (place / below / "f").write_bytes(b"1")
            assert heard.about(_below(root, place / below)), (place, below)


def _below(root: Path, path: Path) -> bytes:
    return os.fsencode(path.relative_to(root))


def _settle(heard: Heard, root: Path) -> None:
    """Until all that happened so far was said."""
    heard.clear()
    (root / "mark").write_bytes(b"1")
    assert heard.about(b"")


def test_a_directory_that_was_of_no_interest_for_a_while(start: Start, heard: Heard, root: Path):
    """What happened far below it meanwhile is said when it is back."""
    start(root, skip=lambda path: any(name.endswith(b".tmp") for name in path.split(b"/")))
    (root / "d").rename(root / "d.tmp")
    (root / "d.tmp/e/new").write_bytes(b"1")
    _settle(heard, root)
    heard.clear()
    (root / "d.tmp").rename(root / "d")
    assert heard.about(b"d/e")


def _no_watch_for_e(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The limit of watches is reached at directories called e, until the list is cleared."""
    original, full = InotifyWatcher._watch, [True]

    def limited(self: InotifyWatcher, fd: int, *rest: Any) -> int:
        if full and os.readlink(f"/proc/self/fd/{fd}").endswith("/e"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, fd, *rest)

    monkeypatch.setattr(InotifyWatcher, "_watch", limited)
    return full


@pytest.mark.parametrize("moved", [False, True])
def test_what_cannot_be_watched_yet(
    heard: Heard, root: Path, monkeypatch: pytest.MonkeyPatch, *, moved: bool
):
    """It is looked at where it is, and watched as soon as it can be."""
    full = _no_watch_for_e(monkeypatch)
    watcher = watch(Kind.INOTIFY, Scope(os.fsencode(root), poll_s=0.05), heard)
    try:
        assert watcher.coverage().polled == 1
        place = b"d/e"
        if moved:
            (root / "d").rename(root / "there")
            place = b"there/e"
        _settle(heard, root)
        heard.clear()
        assert heard.until(lambda h: place in h.directories)
        full.clear()
        deadline = time.monotonic() + 20
        while watcher.coverage().polled and time.monotonic() < deadline:
            time.sleep(0.01)
        seen = watcher.coverage()
        assert (seen.polled, seen.directories, seen.notes) == (0, 3, [])
        heard.clear()
        (root / os.fsdecode(place) / "f").write_bytes(b"1")
        assert heard.about(place)
    finally:
        watcher.close()


@pytest.mark.parametrize("held", [False, True])
def test_a_directory_that_is_made_again(start: Start, heard: Heard, root: Path, *, held: bool):
    """The new one is watched, whoever still has the old one, or what was in it, open."""
    start(root)
    with contextlib.ExitStack() as stack:
        if held:
            stack.enter_context((root / "d/f").open())
            fd = os.open(root / "d", os.O_RDONLY)
            stack.callback(os.close, fd)
        shutil.rmtree(root / "d")
        (root / "d").mkdir()
        _settle(heard, root)
        for number in range(2):
            heard.clear()
            (root / f"d/new{number}").write_bytes(b"1")
            assert heard.about(b"d")
    heard.clear()
    (root / "d/last").write_bytes(b"1")
    assert heard.about(b"d")


def test_a_root_that_could_not_be_listed_once(
    heard: Heard, root: Path, monkeypatch: pytest.MonkeyPatch
):
    """All below it is looked at, and then watched."""
    real, once = os.scandir, [True]

    def scandir(path: Any = ".") -> Any:
        if once and isinstance(path, int):
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    watcher = watch(Kind.INOTIFY, Scope(os.fsencode(root), poll_s=0.05), heard)
    try:
        assert watcher.coverage().polled == 1
        once.clear()
        assert heard.until(lambda h: b"d/e" in h.directories)
        deadline = time.monotonic() + 20
        while watcher.coverage().directories < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        heard.clear()
        (root / "d/e/f").write_bytes(b"1")
        assert heard.about(b"d/e")
    finally:
        watcher.close()


def test_what_nobody_reads_any_more(heard: Heard, root: Path):
    """A dead reader is no reason to miss anything, at any depth."""
    watcher = InotifyWatcher(Scope(os.fsencode(root), poll_s=0.05), heard)
    assert watcher._fd is not None
    watcher._fd.stop()
    watcher._fd.join()
    assert heard.until(lambda h: {b"", b"d", b"d/e"} <= {*h.directories})
    watcher.close()


def test_a_top_that_is_gone(heard: Heard, root: Path, monkeypatch: pytest.MonkeyPatch):
    """What cannot be watched and is not there any more is not looked for any more."""
    _no_watch_for_e(monkeypatch)
    watcher = watch(Kind.INOTIFY, Scope(os.fsencode(root), poll_s=0.05), heard)
    try:
        assert watcher.coverage().polled == 1
        (root / "d/e").rmdir()
        deadline = time.monotonic() + 20
        while watcher.coverage().polled and time.monotonic() < deadline:
            time.sleep(0.01)
        assert watcher.coverage().polled == 0
    finally:
        watcher.close()


def test_an_overflow_that_finds_no_descriptors(
    heard: Heard, root: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is said all the same; nothing is vouched for until the directories were found again."""
    (root / ".bisync").mkdir()
    watcher = InotifyWatcher(
        Scope(os.fsencode(root), _is_ours, os.fsencode(root / ".bisync/watch"), poll_s=0.05), heard
    )
    original, full = InotifyWatcher._add_below, [True]

    def add(*words: Any, **more: Any) -> None:
        if full:
            raise OSError(errno.EMFILE, "Too many open files")
        original(*words, **more)

    try:
        assert watcher.send_token(1)
        monkeypatch.setattr(InotifyWatcher, "_add_below", add)
        watcher.on_queue_overflow()
        assert heard.until(lambda h: any("overflow" in why for why in h.everything))
        assert not watcher.send_token(2)
        (root / "d/e/unseen").mkdir()
        full.clear()
        deadline = time.monotonic() + 20
        while not watcher.send_token(3) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert heard.until(lambda h: 3 in h.tokens)
        heard.clear()
        (root / "d/e/unseen/f").write_bytes(b"1")
        assert heard.until(lambda h: b"d/e/unseen" in h.directories)
    finally:
        watcher.close()


def test_a_directory_that_left(start: Start, heard: Heard, root: Path, tmp_path: Path):
    """Nothing is said of what happens outside, nor at the former place."""
    outside = root.parent / "outside"
    watcher = start(root)
    (root / "d").rename(outside)
    assert heard.about(b"")
    if watcher.coverage().kind == "poll":
        return
    (root / "d").mkdir()
    assert heard.until(lambda h: b"d" in h.directories)
    heard.clear()
    (outside / "e/x").write_bytes(b"1")
    (root / "last").write_bytes(b"1")
    assert heard.about(b"")
    assert set(heard.directories) == {b""}


def test_a_directory_that_came(start: Start, heard: Heard, root: Path):
    """It comes with all that is below, and is watched from then on."""
    outside = root.parent / "outside"
    (outside / "a/b").mkdir(parents=True)
    start(root)
    outside.rename(root / "in")
    assert heard.about(b"")
    assert heard.until(lambda h: h.everything or b"in" in h.directories)
    heard.clear()
    (root / "in/a/b/x").write_bytes(b"1")
    assert heard.about(b"in/a/b")


def test_what_is_of_no_interest(start: Start, heard: Heard, root: Path):
    """Directories that nothing is carried from are not watched."""
    (root / ".bisync").mkdir()
    (root / "skipped/x").mkdir(parents=True)
    watcher = start(root, skip=lambda path: path in (b".bisync", b"skipped"))
    if watcher.coverage().kind == "poll":
        return
    heard.clear()
    (root / "skipped/x/f").write_bytes(b"1")
    (root / ".bisync/f").write_bytes(b"1")
    (root / "d/f").write_bytes(b"1")
    assert heard.about(b"d")
    assert not {b"skipped", b"skipped/x", b".bisync"} & set(heard.directories)


def test_a_token_comes_last(start: Start, heard: Heard, root: Path):
    """When it came, all that happened before was said."""
    (root / ".bisync").mkdir()
    watcher = start(root, tokens=os.fsencode(root / ".bisync/watch"), skip=_is_ours)
    for number in range(1, 20):
        (root / "d/e" / f"{number}").write_bytes(b"1")
        heard.clear()
        (root / "d/f").write_bytes(b"%d" % number)
        assert watcher.send_token(number)
        assert heard.until(lambda h, n=number: n in h.tokens)
        assert heard.everything or b"d" in heard.directories


def _is_ours(path: bytes) -> bool:
    return path == b".bisync"


def test_writing_is_not_closing(heard: Heard, root: Path):
    """While it is written, a file is looked at later than when it is closed."""
    watcher = watch(Kind.INOTIFY, Scope(os.fsencode(root)), heard)
    with (root / "d/f").open("r+b", buffering=0) as file:
        file.write(b"1")
        assert heard.about(b"d")
        assert all(pace.due_s > 0 for pace in heard.directories[b"d"])
    assert heard.until(lambda h: any(pace.due_s == 0 for pace in h.directories[b"d"]))
    watcher.close()


def test_a_name_that_became_free_waits(start: Start, heard: Heard, root: Path):
    """A name that was there before may get a new owner; a temporary one is nobody's."""
    kind = start(root).coverage().kind
    if kind == "poll":
        return
    heard.clear()
    (root / "d/f").unlink()
    assert heard.until(lambda h: any(p.not_before_s for p in h.directories.get(b"d", [])))
    heard.clear()
    (root / "d/e/tmp").write_bytes(b"1")
    assert heard.until(lambda h: AT_ONCE_SAID(h, b"d/e"))
    (root / "d/e/tmp").rename(root / "d/e/kept")
    (root / "d/e/last").write_bytes(b"1")
    (root / "last").write_bytes(b"1")
    assert heard.about(b"")
    assert not any(pace.not_before_s for pace in heard.directories[b"d/e"])


def AT_ONCE_SAID(heard: Heard, directory: bytes) -> bool:
    return any(pace.due_s == 0 for pace in heard.directories.get(directory, []))


def test_the_limit_of_watches(heard: Heard, root: Path, monkeypatch: pytest.MonkeyPatch):
    """What cannot be watched is said, and looked at all the same."""
    for number in range(20):
        (root / f"n{number}/below").mkdir(parents=True)
    limit = Path("/proc/sys/fs/inotify/max_user_watches")
    if not os.access(limit, os.W_OK):
        pytest.skip("only root may lower the limit")
    before = limit.read_text()
    used = sum(
        line.startswith("inotify")
        for info in Path("/proc").glob("[0-9]*/fdinfo/*")
        for line in _lines(info)
    )
    limit.write_text(str(used + 5))
    try:
        watcher = watch(Kind.INOTIFY, Scope(os.fsencode(root), poll_s=0.05), heard)
    finally:
        limit.write_text(before)
    seen = watcher.coverage()
    assert seen.polled > 0 and "limit" in seen.notes[0]
    assert heard.until(lambda h: len(h.directories) >= 35)  # of 43; five could be watched
    watcher.close()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


@pytest.mark.parametrize("kind", ["inotify", "fanotify"])
def test_a_queue_that_overflows(heard: Heard, root: Path, kind: str):
    """What was lost is said, once is enough, and what happens afterwards is seen."""
    if kind == "fanotify" and os.geteuid() != 0:
        pytest.skip("a mark on a file system is for root")
    watcher = watch(Kind(kind), Scope(os.fsencode(root)), heard)
    script = (
        "import os,sys\nos.chdir(sys.argv[1])\n"
        "for i in range(30000):\n    os.mkdir(f'x{i}'); os.rmdir(f'x{i}')\n"
        "os.makedirs('unseen/below')\n"
    )
    held = threading.Event()
    free = threading.Event()
    original = heard.touched

    def stuck(spot: Spot, pace: Pace) -> None:
        held.set()
        free.wait(60)
        original(spot, pace)

    heard.touched = stuck  # type: ignore[method-assign]
    (root / "first").write_bytes(b"")
    assert held.wait(20)
    subprocess.run([sys.executable, "-c", script, str(root)], check=True)
    heard.touched = original  # type: ignore[method-assign]
    free.set()
    assert heard.until(lambda h: any("overflow" in why for why in h.everything), 60)
    heard.clear()
    (root / "unseen/below/f").write_bytes(b"1")
    assert heard.until(lambda h: b"unseen/below" in h.directories)
    watcher.close()


def test_the_root_goes(heard: Heard, root: Path):
    """A root that is moved or removed is said, not passed over."""
    watcher = watch(Kind.INOTIFY, Scope(os.fsencode(root)), heard)
    root.rename(root.with_name("elsewhere"))
    assert heard.until(lambda h: h.everything)
    watcher.close()


def test_no_root(heard: Heard, tmp_path: Path):
    """There is nothing to watch."""
    for kind in (FanotifyWatcher, InotifyWatcher):
        with pytest.raises(UnavailableError):
            kind(Scope(os.fsencode(tmp_path / "none")), heard)
