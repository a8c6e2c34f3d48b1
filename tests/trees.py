"""Trees on disk for the tests: build, change, look at, compare, and run the program on them.

Everything that looks at a tree walks by directory descriptor, so that no name and no depth is too
much for it. The engine's state and store at the top of a root are not part of its tree.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.prepared import Prepared

STATE = b".bisync"
STORE = b"rsync-rollback"
NOON = 1_700_000_000  # seconds; a fixed moment in the past for files whose times must be known
FAR = os.environ.get("BISYNC_TEST_FAR", "")
"""Which sides of all runs are reached as if on another machine: alpha, beta, both; or none."""
COUNTS = (
    "files_scanned moves bytes_sent bytes_received literal_bytes matched_bytes created updated "
    "deleted conflicts problems busy kept presumed skipped"
).split()
APPLIED = ("moves", "created", "updated", "deleted", "literal_bytes", "kept")

_LONGEST_S = 180.0  # that a run may take
_forking = threading.Lock()
_HERE = Path(__file__).resolve().parents[1]
ELSEWHERE = _HERE / "tests" / "fakes" / "elsewhere"
_SWITCHES = (
    "--json --yes --dry-run --checksum --specials --devices --accept-root --delete --verbose "
    "--stats --quiet"
).split()
_BLOCK = 64 << 10
_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_DAY = re.compile(rb"\d{4}-\d\d-\d\d")


# --- Looking at a tree ---------------------------------------------------------------------------


class Spot(NamedTuple):
    """One name met on a walk, reachable while the walk stands there."""

    path: bytes
    parent: int
    name: bytes
    status: os.stat_result

    @property
    def link(self) -> str:
        """A short path to the object itself, whatever the length of its real one."""
        return os.fsdecode(b"/proc/self/fd/%d/%s" % (self.parent, self.name))

    @property
    def target(self) -> bytes:
        return os.readlink(self.name, dir_fd=self.parent)


@dataclass(frozen=True, slots=True)
class Entry:
    """All of an object that two sides can agree on."""

    kind: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int | None
    digest: str | None
    target: bytes | None
    xattrs: tuple[tuple[str, bytes], ...]
    names: tuple[bytes, ...]
    rdev: int | None


def walk(root: Path, *, top: Iterable[bytes] = (STATE, STORE)) -> Iterator[Spot]:
    """Yield every name below ``root``, parents first, but for the names ``top`` of the root."""
    fd = os.open(root, _DIR)
    try:
        yield from _below(fd, b"", frozenset(top))
    finally:
        os.close(fd)


def _below(fd: int, path: bytes, without: frozenset[bytes]) -> Iterator[Spot]:
    for name in sorted(map(os.fsencode, os.listdir(fd))):
        if name in without:
            continue
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        yield Spot(path + name, fd, name, status)
        if stat.S_ISDIR(status.st_mode):
            inner = os.open(name, _DIR, dir_fd=fd)
            try:
                yield from _below(inner, path + name + b"/", frozenset())
            finally:
                os.close(inner)


def snapshot(root: Path) -> dict[bytes, Entry]:
    """Map each path below ``root`` to everything about it that must be equal on both sides."""
    groups: dict[tuple[int, int], list[bytes]] = {}
    found: dict[bytes, tuple[Entry, tuple[int, int]]] = {}
    for spot in walk(root):
        inode = (spot.status.st_dev, spot.status.st_ino)
        if not stat.S_ISDIR(spot.status.st_mode):
            groups.setdefault(inode, []).append(spot.path)
        found[spot.path] = _entry(spot), inode
    return {
        path: _with_names(entry, tuple(groups.get(inode, ())))
        for path, (entry, inode) in found.items()
    }


def _entry(spot: Spot) -> Entry:
    status = spot.status
    regular, link = stat.S_ISREG(status.st_mode), stat.S_ISLNK(status.st_mode)
    device = stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode)
    return Entry(
        kind=stat.filemode(status.st_mode)[0],
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        size=status.st_size if regular else None,
        digest=_digest(spot) if regular else None,
        target=spot.target if link else None,
        xattrs=_xattrs(spot.link),
        names=(),
        rdev=status.st_rdev if device else None,
    )


def _with_names(entry: Entry, names: tuple[bytes, ...]) -> Entry:
    values = {each.name: getattr(entry, each.name) for each in fields(entry)}
    return Entry(**{**values, "names": names if len(names) > 1 else ()})


def _xattrs(link: str) -> tuple[tuple[str, bytes], ...]:
    names = sorted(os.listxattr(link, follow_symlinks=False))
    return tuple((name, os.getxattr(link, name, follow_symlinks=False)) for name in names)


def _digest(spot: Spot) -> str:
    """Digest content so that a hole and zeros are the same, and holes cost nothing."""
    digest = hashlib.blake2b(b"%d" % spot.status.st_size, digest_size=16)
    fd = os.open(spot.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=spot.parent)
    try:
        for start in _blocks_with_data(fd, spot.status.st_size):
            block = os.pread(fd, _BLOCK, start)
            if block.count(0) != len(block):
                digest.update(b"%d:" % start + block)
    finally:
        os.close(fd)
    return digest.hexdigest()


def _blocks_with_data(fd: int, size: int) -> Iterator[int]:
    """Yield the starts of the blocks that the file system does not know to be holes."""
    start = 0
    while start < size:
        try:
            data = os.lseek(fd, start, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole up to the end
            return
        start = max(start, data - data % _BLOCK)
        yield start
        start += _BLOCK


def frozen(root: Path) -> dict[bytes, tuple[int, ...]]:
    """Map each path, the root and its store included, to what any write would change."""
    top = os.stat(root)
    seen = {b".": top} | {spot.path: spot.status for spot in walk(root, top=[STATE])}
    return {
        path: (s.st_ino, s.st_mode, s.st_nlink, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        for path, s in seen.items()
    }


def look(root: Path) -> dict[str, bytes | str | None]:
    """Show names and contents: the bytes of a file, ``-> target`` of a symlink, else None."""
    shown: dict[str, bytes | str | None] = {}
    for spot in walk(root):
        path = os.fsdecode(spot.path)
        if stat.S_ISREG(spot.status.st_mode):
            shown[path] = _bytes(spot)
        elif stat.S_ISLNK(spot.status.st_mode):
            shown[path] = "-> " + os.fsdecode(spot.target)
        else:
            shown[path] = None
    return shown


def _bytes(spot: Spot) -> bytes:
    fd = os.open(spot.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=spot.parent)
    with open(fd, "rb") as file:
        return file.read()


def contents(root: Path) -> set[bytes]:
    """Collect the bytes of every regular file of the tree."""
    return {seen for seen in look(root).values() if isinstance(seen, bytes)}


def kept(root: Path) -> list[tuple[bytes, bytes]]:
    """List (path below its day, content) of every file in the root's rollback store."""
    store = root / os.fsdecode(STORE)
    if not store.is_dir():
        return []
    return [
        (spot.path.split(b"/", 1)[1], _bytes(spot))
        for spot in walk(store, top=())
        if stat.S_ISREG(spot.status.st_mode) and _DAY.match(spot.path) and b"/" in spot.path
    ]


def everything(*roots: Path) -> set[bytes]:
    """Collect the contents that are live or kept in any of ``roots``."""
    live = set().union(*map(contents, roots))
    return live | {content for root in roots for _, content in kept(root)}


def killed(act: Callable[[], object]) -> None:
    """Do something in a process of its own, which has to end by SIGKILL."""
    if not (pid := os.fork()):
        try:
            act()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


# --- Comparing trees -----------------------------------------------------------------------------


def differences(a: Path, b: Path) -> list[str]:
    """Say in one line each how two trees differ."""
    left, right = snapshot(a), snapshot(b)
    lines = []
    for path in sorted(left.keys() | right.keys()):
        one, two = left.get(path), right.get(path)
        if one is None or two is None:
            lines.append(f"{path!r}: only in {a if two is None else b}: {one or two}")
            continue
        lines += [
            f"{path!r}: {each.name}: {getattr(one, each.name)!r} != {getattr(two, each.name)!r}"
            for each in fields(Entry)
            if getattr(one, each.name) != getattr(two, each.name)
        ]
    return lines


def assert_equal(a: Path, b: Path) -> None:
    """Require two trees to be equal in every attribute."""
    lines = differences(a, b)
    assert not lines, f"{len(lines)} differences between {a} and {b}:\n" + "\n".join(lines[:30])


def rsync_says_equal(a: Path, b: Path, *excluded: str) -> None:
    """Require an independent judge to find nothing to do; the roots' own times do not count."""
    told = subprocess.run(
        [
            *("rsync", "-n", "-i", "-aHAXc", "--delete"),
            *("--exclude=/.bisync", "--exclude=/rsync-rollback"),
            *(f"--exclude={each}" for each in excluded),
            *(f"{a}/", f"{b}/"),
        ],
        capture_output=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    lines = [line for line in told.stdout.splitlines() if line != b".d..t...... ./"]
    assert not lines, b"\n".join(lines[:30]).decode(errors="replace")


# --- Running the program -------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What one run of the program said."""

    rc: int
    stdout: str
    stderr: str

    @cached_property
    def objects(self) -> list[dict[str, Any]]:
        """The JSON objects of a run with ``--json``."""
        return [json.loads(line) for line in self.stdout.splitlines() if line.strip()]

    @property
    def summary(self) -> dict[str, Any]:
        """The closing object of a run with ``--json``."""
        assert self.objects, f"no JSON in {self.stdout!r}; it says {self.stderr!r}"
        assert self.objects[-1].get("type") == "summary", self.objects[-1]
        return self.objects[-1]

    @property
    def said(self) -> str:
        return self.stdout + self.stderr

    def counts(self, *names: str) -> dict[str, int]:
        """Pick counters of the summary."""
        return {name: self.summary[name] for name in names}


def command(*args: str | bytes | Path) -> list[str | bytes | Path]:
    """Spell a call of the program under test."""
    return [sys.executable, "-m", "bisync", *args]


def environment(**more: str) -> dict[str, str]:
    """Make the program under test importable from any folder."""
    path = os.pathsep.join(filter(None, [str(_HERE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "LC_ALL": "C.UTF-8", **more}


def run(
    *args: str | bytes | Path,
    check: int | tuple[int, ...] | None = 0,
    cwd: Path | None = None,
    user: int | None = None,
    umask: int = -1,
) -> Outcome:
    """Run the program and require one of the exit codes ``check`` (None: any) and no traceback."""
    words = list(map(os.fsdecode, elsewhere(args) if FAR else args))
    if user is None and _forking.acquire(blocking=False):
        try:
            code, *texts = _prepared().run(
                words, environment(), cwd and str(cwd), umask, _LONGEST_S
            )
        except BaseException:
            _prepared().close()
            _prepared.cache_clear()
            raise
        finally:
            _forking.release()
    else:
        code, *texts = run_anew(words, cwd, user, umask)
    outcome = Outcome(code, *(text.decode(errors="surrogateescape") for text in texts))
    about = f"{args} -> {outcome.rc}\n{outcome.stdout[-3000:]}\n{outcome.stderr[-3000:]}"
    assert "Traceback (most recent call last)" not in outcome.said, about
    allowed = (check,) if isinstance(check, int) else check
    assert allowed is None or outcome.rc in allowed, f"expected {allowed}: {about}"
    return outcome


@functools.cache
def _prepared() -> Prepared:
    made = Prepared(environment())
    atexit.register(made.close)
    return made


def run_anew(
    words: list[str], cwd: Path | None = None, user: int | None = None, umask: int = -1
) -> tuple[int, bytes, bytes]:
    """Run the program in a process made for it: as another user, or beside another run."""
    who: dict[str, Any] = {}
    line, env = command(*words), environment()
    if user is not None:
        who = {"user": user, "group": user, "extra_groups": []}
        python = _python_for_anybody()
        line = [w.replace(sys.executable, python) if isinstance(w, str) else w for w in line]
        packages = sysconfig.get_path("purelib")
        env = environment(HOME="/nonexistent", PYTHONPATH=f"{_HERE}{os.pathsep}{packages}")
    done = subprocess.run(
        line,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=_LONGEST_S,
        cwd=cwd,
        umask=umask,
        env=env,
        **who,
    )
    return done.returncode, done.stdout, done.stderr


def elsewhere(args: tuple[str | bytes | Path, ...], far: str = FAR) -> list[str | bytes | Path]:
    """The words of a command with one side, or both, reached as if on another machine.

    ``far`` is alpha (of a mirror: the sources), beta (its destination) or both.
    """
    if not args or args[0] not in ("sync", "plan", "mirror") or "--state-dir" in args:
        return list(args)
    found, places = list(args), [i for i, arg in enumerate(args) if _is_place(args, i)]
    for place in places[:-1] if far != "beta" else []:
        found[place] = _there(found[place])
    for place in places[-1:] if far != "alpha" else []:
        found[place] = _there(found[place])
    program = "--rsync-path" if args[0] == "mirror" else "--agent-command"
    agent = shlex.join(map(str, command()))
    return [found[0], "--rsh", str(ELSEWHERE), program, agent, *found[1:]]


def _is_place(args: tuple[str | bytes | Path, ...], at: int) -> bool:
    """Whether a word is a root, and not the value of an option."""
    before = args[at - 1] if at else ""
    is_value = isinstance(before, str) and before.startswith("--") and "=" not in before
    return isinstance(args[at], Path) and not (is_value and before not in _SWITCHES)


def _there(place: str | bytes | Path) -> str | bytes:
    return b"elsewhere:" + place if isinstance(place, bytes) else f"elsewhere:{place}"


def _python_for_anybody() -> str:
    """Find an interpreter like ours that a plain user may start."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for program in (sys.executable, shutil.which(version, path="/usr/local/bin:/usr/bin") or ""):
        real = Path(program).resolve()
        if program and all(p.stat().st_mode & 0o001 for p in (real, *real.parents)):
            return program
    pytest.skip(f"no {version} here that a plain user may start")


def sync(
    a: Path,
    b: Path,
    *options: str | Path,
    check: int | tuple[int, ...] | None = 0,
    user: int | None = None,
    umask: int = -1,
) -> Outcome:
    """Run ``sync`` once and return what it said, as JSON."""
    return run("sync", "--json", *options, a, b, check=check, user=user, umask=umask)


# --- Changing a tree -----------------------------------------------------------------------------


def put(path: Path, data: bytes, *, t: float | None = None, mode: int | None = None) -> Path:
    """Write a new file, with its parents, and give it the time ``t`` (seconds) and ``mode``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return _finish(path, t, mode)


def edit(path: Path, data: bytes, *, t: float | None = None) -> Path:
    """Rewrite an existing file in its own inode."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()
    return _finish(path, t, None)


def save(path: Path, data: bytes, *, t: float | None = None, mode: int | None = None) -> Path:
    """Replace a file as editors do: write beside it, flush, rename over it."""
    beside = path.with_name(".tmp-save")
    with beside.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    _finish(beside, t, mode)
    return beside.rename(path)


def _finish(path: Path, t: float | None, mode: int | None) -> Path:
    if mode is not None:
        path.chmod(mode)
    if t is not None:
        os.utime(path, ns=(int(t * 10**9),) * 2)
    return path


def exchange(one: Path, two: Path) -> None:
    """Swap two names in one atomic step."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = (os.fsencode(one), os.fsencode(two))
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), "renameat2", *names)


@contextlib.contextmanager
def deep(root: Path, names: Iterable[bytes]) -> Iterator[int]:
    """Open the directory at the end of a chain of names, made where missing, at any depth."""
    fd = os.open(root, _DIR)
    try:
        for name in names:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=fd)
            inner = os.open(name, _DIR, dir_fd=fd)
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


def write_at(fd: int, name: bytes, data: bytes) -> None:
    """Write a file in an open directory."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with open(os.open(name, flags, 0o644, dir_fd=fd), "wb") as file:
        file.write(data)


def noise(size: int, seed: int) -> bytes:
    """Make bytes that neither repeat nor compress."""
    return random.Random(seed).randbytes(size)


# --- Random trees --------------------------------------------------------------------------------


def build(root: Path, rng: random.Random, *, files: int = 40) -> None:
    """Fill a root with directories and with files of all sizes from nothing to a few blocks."""
    folders = [root]
    for number in range(files // 5):
        folders.append(rng.choice(folders) / f"dir{number}")
        folders[-1].mkdir()
    for number in range(files):
        size = rng.choice([0, 1, 100, 5_000, 200_000])
        put(rng.choice(folders) / f"file{number}", rng.randbytes(size) + b"%d" % number)


def perturb(root: Path, rng: random.Random, *, steps: int = 12) -> None:
    """Do what users do to a tree, ``steps`` times."""
    for step in range(steps):
        files = [root / os.fsdecode(s.path) for s in walk(root) if stat.S_ISREG(s.status.st_mode)]
        folders = [root / os.fsdecode(s.path) for s in walk(root) if stat.S_ISDIR(s.status.st_mode)]
        act = rng.choice(_ACTS)
        with contextlib.suppress(IndexError, FileExistsError):  # nothing left to act on; name taken
            act(_Stage(root, rng, files, [root, *folders], f"{rng.randrange(10**6)}-{step}"))


class _Stage(NamedTuple):
    root: Path
    rng: random.Random
    files: list[Path]
    folders: list[Path]
    fresh: str

    @property
    def file(self) -> Path:
        return self.rng.choice(self.files)

    @property
    def folder(self) -> Path:
        return self.rng.choice(self.folders)

    @property
    def data(self) -> bytes:
        return self.fresh.encode() * self.rng.choice([1, 50, 5_000])


def _touch(s: _Stage) -> None:
    os.utime(s.file, (NOON + s.rng.randrange(10**6),) * 2)


def _move_folder(s: _Stage) -> None:
    chosen, parent = s.rng.choice(s.folders[1:]), s.folder
    if chosen not in (parent, *parent.parents):
        chosen.rename(parent / f"moved{s.fresh}")


_ACTS: tuple[Callable[[_Stage], object], ...] = (
    lambda s: put(s.folder / f"new{s.fresh}", s.data),
    lambda s: put(s.folder / f"made{s.fresh}" / "inner", s.data),
    lambda s: edit(s.file, s.data),
    lambda s: edit(s.file, s.data),
    lambda s: save(s.file, s.data),
    lambda s: s.file.chmod(s.rng.choice([0o600, 0o640, 0o755])),
    lambda s: s.file.unlink(),
    lambda s: s.file.rename(s.folder / f"moved{s.fresh}"),
    lambda s: (s.folder / f"link{s.fresh}").hardlink_to(s.file),
    lambda s: (s.folder / f"symlink{s.fresh}").symlink_to(s.fresh),
    _touch,
    _move_folder,
)


# --- Many situations, few runs -------------------------------------------------------------------


class Arena:
    """One case's own folder on both sides, a place outside the roots, and its kept versions."""

    def __init__(self, base: Path, name: str) -> None:
        self.name = name
        self.roots = (base / "A", base / "B")
        self.a, self.b = (root / name for root in self.roots)
        self.out = base / "outside" / name
        for folder in (self.a, self.b, self.out):
            folder.mkdir(parents=True)

    def __call__(self, text: str) -> bytes:
        """Make content that no other case has."""
        return f"{self.name}: {text}\n".encode()

    def kept(self, side: int | None = None) -> list[tuple[str, bytes]]:
        """List what the stores (of side 0, 1 or both) keep of this case."""
        top = self.name.encode() + b"/"
        roots = self.roots if side is None else [self.roots[side]]
        found = [each for root in roots for each in kept(root)]
        return [(os.fsdecode(path[len(top) :]), c) for path, c in found if path.startswith(top)]

    def holds(self, content: bytes) -> bool:
        """Whether content is live or kept on any side."""
        return content in everything(self.a, self.b) or any(content == c for _, c in self.kept())


Case = Callable[[Arena], Generator[Mapping[str, int] | None, None, None]]


def collect(namespace: Mapping[str, Any]) -> dict[str, Case]:
    """Find the cases of a module: the functions called ``case_...``."""
    return {name: case for name, case in namespace.items() if name.startswith("case_")}


@dataclass
class Batch:
    """Play many cases in their own folders of one pair, so that they share its runs.

    A case is a generator: it prepares, yields, changes, yields, ..., checks. At each yield one
    ``sync`` of the pair runs; what is yielded is what this case adds to the run's counters. A
    case that has ended is at rest and its folder must be equal on both sides.
    """

    base: Path
    cases: Mapping[str, Case]
    options: tuple[str, ...] = ()
    umask: int = -1
    runs: list[Outcome] = field(default_factory=list)
    wanted: list[dict[str, int]] = field(default_factory=list)
    failures: dict[str, Exception] = field(default_factory=dict)

    @property
    def roots(self) -> tuple[Path, Path]:
        return self.base / "A", self.base / "B"

    def play(self) -> "Batch":
        """Run all cases to their ends."""
        arenas = {name: Arena(self.base, name) for name in self.cases}
        going = {name: case(arenas[name]) for name, case in self.cases.items()}
        while going:
            self.wanted.append({})
            going = {name: each for name, each in going.items() if self._step(arenas[name], each)}
            if going:
                outcome = sync(*self.roots, *self.options, check=None, umask=self.umask)
                self.runs.append(outcome)
        self.wanted.pop()
        return self

    def _step(self, arena: Arena, going: Generator[Mapping[str, int] | None, None, None]) -> bool:
        try:
            adds = next(going)
        except StopIteration:
            try:
                assert_equal(arena.a, arena.b)
            except AssertionError as wrong:
                self.failures[arena.name] = wrong
            return False
        except Exception as wrong:
            self.failures[arena.name] = wrong
            return False
        for counter, value in (adds or {}).items():
            self.wanted[-1][counter] = self.wanted[-1].get(counter, 0) + value
        return True

    def verdict(self, name: str) -> None:
        """Raise what went wrong in one case."""
        if name in self.failures:
            raise self.failures[name]

    def assert_runs(self, *counters: str) -> None:
        """Require every run to have ended well, with the sum of the cases in ``counters``."""
        for number, outcome in enumerate(self.runs):
            assert outcome.rc == 0, f"run {number}: {outcome.rc}: {outcome.said[-3000:]}"
        seen = [outcome.counts(*counters) for outcome in self.runs]
        assert seen == [{name: run.get(name, 0) for name in counters} for run in self.wanted]

    def assert_rest(self, *not_for_rsync: str) -> None:
        """Require one more run to find nothing to do and to write nothing outside the state."""
        before = [frozen(root) for root in self.roots]
        outcome = sync(*self.roots, *self.options, umask=self.umask)
        assert outcome.counts(*APPLIED) == dict.fromkeys(APPLIED, 0)
        assert [frozen(root) for root in self.roots] == before
        rsync_says_equal(*self.roots, *not_for_rsync)
