"""`bisync mirror OPTIONS SRC... DST` does what `rsync OPTIONS SRC... DST` does; rsync is the judge.

Both programs get the same source, twins of one destination and the same words. Afterwards the
destinations are equal in names, kinds, contents and attributes, the exit codes say the same and
the source is untouched, but for the rows of EXCUSES and EXIT_CODES, which are the documentation.

* Generated cases, of two kinds: once onto a destination that differs, and twice into an empty one
  with renames and edits at the source in between, where bisync has memory and moves.
* Cases with a name: what a simple reading of rsync's manual gets wrong.
* The words of ``-n -i`` and of ``--out-format``.

``BISYNC_MIRROR_CASES=600`` plays so many generated cases, ``BISYNC_SEED=2`` takes other dice and
``BISYNC_CASE=17`` plays case 17 only. ``BISYNC_MIRROR="rsync"`` puts another program to the test.
"""

import contextlib
import functools
import os
import random
import re
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest

from tests.trees import (
    NOON,
    STATE,
    STORE,
    Entry,
    environment,
    exchange,
    frozen,
    look,
    noise,
    put,
    snapshot,
    walk,
)

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="setting owners needs root"),
    pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is the judge"),
]

CASES = int(os.environ.get("BISYNC_MIRROR_CASES", "100"))
SEED = int(os.environ.get("BISYNC_SEED", "1"))
ONLY = os.environ.get("BISYNC_CASE")
NUMBERS = [int(ONLY)] if ONLY else range(CASES)
PROGRAM = shlex.split(os.environ.get("BISYNC_MIRROR", "")) or [
    *(sys.executable, "-m", "bisync", "mirror")
]
RECENT = (NOON + 1000) * 10**9  # ns; every time that a case gives is earlier, a run's "now" later
RULES = (".rules", ".rsync-filter")  # files inside the trees that rule over them
STRANGER = 54_321  # an id that no user has


# Where rsync did half of something, bisync does none of it: a directory that is in the way and
# cannot go as a whole stays whole. Nor does it delete anything if a source is missing.
HALVES = (b"could not make way", b"cannot delete non-empty directory", b"Not a directory (20)")

# --- What is asked -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wish:
    """One command line, but for the program and the folder in which its DST lies."""

    options: tuple[str, ...]
    sources: tuple[str, ...] = ("src/A/",)
    target: str = "dst/"
    umask: int = 0o022

    def words(self, folder: str) -> list[str]:
        return [*self.options, *self.sources, f"{folder}/{self.target}"]

    @property
    def letters(self) -> frozenset[str]:
        """The one-letter options in force when all words are read in their order."""
        on: set[str] = set()
        for option in self.options:
            if option in _UNDO:
                on.discard(_UNDO[option])
            elif re.fullmatch("-[A-Za-z]+", option):
                on.update(option[1:].replace("a", "rlptgoD"))
        return frozenset(on)

    @property
    def deletes(self) -> bool:
        return any(option.startswith("--delete") for option in self.options)


_UNDO = {
    "--no-perms": "p",
    "--no-times": "t",
    "--no-owner": "o",
    "--no-group": "g",
    "--no-links": "l",
}


# --- Where bisync may differ: all of it -----------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One attribute of one path that the two destinations do not share."""

    path: bytes  # below the folder that DST lies in: b"dst/..."
    name: str  # a field of Entry
    rsync: Any
    bisync: Any
    judged: Entry  # as rsync left it
    before: Entry | None  # as both found it
    sources: Iterable[Entry]  # all that the source has
    wish: Wish

    def is_time(self) -> bool:
        return self.name == "mtime_ns"

    def is_of_a_source(self) -> bool:
        """Whether bisync gave the path a time that the source has, to the nanosecond."""
        return self.is_time() and any(each.mtime_ns == self.bisync for each in self.sources)

    def apart_s(self) -> int:
        """Tell how many whole seconds lie between the two times."""
        return abs(self.rsync // 10**9 - self.bisync // 10**9)


EXCUSES: dict[str, Callable[[Difference], bool]] = {
    # The state folder lies in DST and touches it.
    "DST's own time": lambda d: d.is_time() and d.path == b"dst",
    # With --files-from filter rules are asked about the source itself; not so in bisync.
    "DST itself with --files-from": lambda d: (
        d.path == b"dst" and any(each.startswith("--files-from") for each in d.wish.options)
    ),
    # Without -t a file that rsync copies is of now, and it copies all of them each time.
    "times without -t": lambda d: d.is_time() and "t" not in d.wish.letters,
    # A directory that rsync itself leaves at the moment of its run is nobody's wish.
    "a directory at now": lambda d: d.is_time() and d.judged.kind == "d" and d.rsync > RECENT,
    # rsync leaves a time alone that differs in the fraction of the second only.
    "nanoseconds": lambda d: d.is_of_a_source() and d.apart_s() == 0,
    # ... and so it leaves the owner, too.
    "the owner of what differs in nanoseconds": lambda d: (
        d.name in ("uid", "gid")
        and d.before is not None
        and any(0 < abs(each.mtime_ns - d.before.mtime_ns) < 10**9 for each in d.sources)
    ),
    # Within the window rsync leaves the time alone; memory does not know the window.
    "--modify-window": lambda d: (
        "--modify-window=1" in d.wish.options and d.is_of_a_source() and d.apart_s() <= 1
    ),
    # Attributes that nobody asked for stay as they were; rsync drops them with the old file.
    "attributes without -X or -A": lambda d: (
        d.name == "xattrs"
        and _asked(d.rsync, d.wish) == _asked(d.bisync, d.wish)
        and d.before is not None
        and _unasked(d.bisync, d.wish) == _unasked(d.before.xattrs, d.wish)
    ),
    # Without -H which names share an inode is not part of the wish: separate files.
    "links without -H": lambda d: d.name == "names" and "H" not in d.wish.letters,
    # rsync --inplace writes through one name of a file into all its names.
    "--inplace": lambda d: (
        "--inplace" in d.wish.options and d.before is not None and len(d.before.names) > 1
    ),
    # rsync gives a new special file the mode of what had its name, be it that of a symlink.
    "a special file without -p": lambda d: (
        d.name == "mode"
        and "p" not in d.wish.letters
        and d.judged.kind in "psbc"
        and d.before is not None
        and d.before.kind != d.judged.kind
    ),
    # -u decides content and its time only; rsync skips a newer file with its attributes.
    "-u": lambda d: (
        "u" in d.wish.letters
        and d.name in ("mode", "uid", "gid", "xattrs")
        and d.before == d.judged
        and d.judged.kind == "-"
        and any(each.mtime_ns < d.judged.mtime_ns for each in d.sources)
    ),
}

EXIT_CODES = {1: 2}  # rsync's (a usage error) -> bisync's; all others are the same

ANSWERS = (0, 23, 24, 25)  # any other exit code of rsync is no outcome that one could compare


def _asked(xattrs: tuple[tuple[str, bytes], ...], wish: Wish) -> list[tuple[str, bytes]]:
    return [each for each in xattrs if ("A" if "posix_acl" in each[0] else "X") in wish.letters]


def _unasked(xattrs: tuple[tuple[str, bytes], ...], wish: Wish) -> list[tuple[str, bytes]]:
    asked = _asked(xattrs, wish)
    return [each for each in xattrs if each not in asked]


def approval(wish: Wish) -> list[str]:
    """Approve deletions, which rsync needs not and bisync does where there are many."""
    is_bisync = PROGRAM[-1] == "mirror"
    return ["--yes"] if is_bisync and (wish.deletes or "--force" in wish.options) else []


# --- Two programs, one wish -----------------------------------------------------------------------


class Refused(Exception):
    """rsync does not take these options together, cannot read a file of rules, or is broken."""


@dataclass(slots=True)
class Round:
    """One run of both programs: what was there, what was asked, what they said."""

    wish: Wish
    sources: dict[bytes, Entry]
    before: dict[bytes, Entry]
    rules: dict[str, bytes]
    said: dict[str, "subprocess.CompletedProcess[bytes]"] = field(default_factory=dict)


class Duel:
    """A folder with the sources and one folder for the DST of each program.

    A test fills ``src`` and ``dst``; the first run copies ``dst`` for bisync.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.src, self.lists = base / "src", base / "lists"
        self.folders = (base / "rsync", base / "bisync")
        for folder in (self.src / "A", self.lists, base / "rsync/dst"):
            folder.mkdir(parents=True)
        self.rounds: list[Round] = []

    @property
    def a(self) -> Path:
        return self.src / "A"

    @property
    def dst(self) -> Path:
        """The destination that the test prepares, and in which rsync works."""
        return self.folders[0] / "dst"

    def play(self, wish: Wish) -> list[str]:
        """Run both programs and return what is wrong with bisync's outcome."""
        self.twin()
        texts = look(self.base)
        rules = {n: text for n, text in texts.items() if _rules(n) and isinstance(text, bytes)}
        now = Round(wish, snapshot(self.src), seen(self.folders[0]), rules)
        self.rounds.append(now)
        judge = now.said["rsync"] = self._run(["rsync"], wish, "rsync")
        if judge.returncode not in ANSWERS:
            raise Refused(judge.stderr.decode(errors="replace"))
        ours = now.said["bisync"] = self._run([*PROGRAM, *approval(wish)], wish, "bisync")
        wrong = [
            *(f"the source changed: {line}" for line in _changes(now.sources, snapshot(self.src))),
        ]
        halves = any(text in judge.stdout + judge.stderr for text in HALVES)
        if not halves and not (wish.deletes and b"link_stat" in judge.stderr):
            wrong += _inexcusable(now, *map(seen, self.folders))
        expected = EXIT_CODES.get(judge.returncode, judge.returncode)
        if ours.returncode != expected:
            wrong.append(f"exit code: {expected} expected, {ours.returncode} from bisync")
        if b"Traceback (most recent call last)" in ours.stderr:
            wrong.append("a traceback")
        return wrong

    def agree(self, *options: str, rc: int = 0, **more: Any) -> dict[str, bytes | str | None]:
        """Require that bisync does what rsync does, with rsync's code ``rc``; return DST's look."""
        wrong = self.play(Wish(options, **more))
        assert not wrong, self.report(wrong)
        assert self.rounds[-1].said["rsync"].returncode == rc, self.report([f"rsync: not {rc}"])
        return look(self.dst) if self.dst.is_dir() else {}

    def lines(self, *options: str) -> tuple[Counter[str], Counter[str]]:
        """Require agreement and return the lines that each program wrote on its output."""
        self.agree(*options)
        said = self.rounds[-1].said
        texts = (said[each].stdout.decode(errors="surrogateescape") for each in ("rsync", "bisync"))
        one, two = (Counter(text.splitlines()) for text in texts)
        return one, two

    def twin(self) -> None:
        """Make DST of bisync what DST of rsync is, before the first run."""
        if not self.folders[1].exists():
            subprocess.run(["cp", "-a", *self.folders], check=True)

    def _run(
        self, program: list[str], wish: Wish, folder: str
    ) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            [*program, *wish.words(folder)],
            cwd=self.base,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=60,
            umask=wish.umask,
            env=environment(),
        )

    def report(self, wrong: list[str]) -> str:
        """Tell everything that one needs to see or to repeat the last run by hand."""
        parts = [f"{len(wrong)} differences:", *(f"  {line}" for line in wrong[:40])]
        for number, each in enumerate(self.rounds, 1):
            parts += ["", f"--- run {number}, in {self.base}, umask {each.wish.umask:03o}"]
            for program, first in ("rsync", ["rsync"]), ("bisync", PROGRAM + approval(each.wish)):
                said = each.said.get(program)
                line = " ".join(map(quoted, first + each.wish.words(program)))
                parts.append(f"{line}  # {said and said.returncode}")
                if said and (text := (said.stdout + said.stderr).decode(errors="replace").strip()):
                    parts += [f"    | {line}" for line in text.splitlines()[-12:]]
            parts += [f"{name!a}: {text!r}" for name, text in each.rules.items()]
            parts += ["source:", *_listing(each.sources), "DST before:", *_listing(each.before)]
        return "\n".join(parts)


def _rules(path: str) -> bool:
    is_rule = path.startswith("lists/") or path.rpartition("/")[2] in RULES
    return is_rule and not path.startswith("bisync/")


def quoted(word: str) -> str:
    """Quote a word for bash, whatever bytes it has."""
    if word.isascii() and word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(f"\\x{byte:02x}" for byte in os.fsencode(word)) + "'"


def seen(folder: Path) -> dict[bytes, Entry]:
    """Map what lies in a program's folder, DST itself included, but for what bisync keeps there."""
    return {
        path: replace(entry, names=names if len(names) > 1 else ())
        for path, entry in snapshot(folder).items()
        if not _is_own(path)
        for names in [tuple(name for name in entry.names if not _is_own(name))]
    }


def _is_own(path: bytes) -> bool:
    """Whether it is bisync's: in a DST that is a folder, or beside a DST that is a file."""
    first, second = (*path.split(b"/"), b"")[:2]
    return first in (STATE, STORE) or second in (STATE, STORE)


def _inexcusable(
    now: Round, rsync: Mapping[bytes, Entry], bisync: Mapping[bytes, Entry]
) -> list[str]:
    lines = []
    for path in sorted(rsync.keys() | bisync.keys()):
        one, two = rsync.get(path), bisync.get(path)
        if one is None or two is None:
            who, shown = ("rsync", one) if one else ("bisync", two)
            lines.append(f"{path!r}: only after {who}: {_line(shown)}")
            continue
        for name, mine, other in _unequal(one, two):
            difference = Difference(
                path=path,
                name=name,
                rsync=mine,
                bisync=other,
                judged=one,
                before=now.before.get(path),
                sources=now.sources.values(),
                wish=now.wish,
            )
            if not any(excuse(difference) for excuse in EXCUSES.values()):
                lines.append(f"{path!r}: {name}: {_say(name, mine)} != {_say(name, other)}")
    return lines


def _unequal(one: Entry, two: Entry) -> list[tuple[str, Any, Any]]:
    pairs = ((each.name, getattr(one, each.name), getattr(two, each.name)) for each in fields(one))
    return [(name, mine, other) for name, mine, other in pairs if mine != other]


def _say(name: str, value: object) -> str:
    return f"{value:04o}" if name == "mode" else repr(value)


def _changes(old: Mapping[bytes, Entry], new: Mapping[bytes, Entry]) -> list[str]:
    return [
        f"{path!r}: {_line(old.get(path))} -> {_line(new.get(path))}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]


def _line(entry: Entry | None) -> str:
    if entry is None:
        return "nothing"
    time = f"{entry.mtime_ns / 1e9 - NOON:+.9f}" if entry.mtime_ns < RECENT else "now"
    more = [f"-> {entry.target!r}"] if entry.target is not None else []
    more += [f"{entry.size} bytes {entry.digest[:6]}"] if entry.digest else []
    more += [f"{name}={value!r}" for name, value in entry.xattrs]
    more += [f"links {entry.names!r}"] if entry.names else []
    return " ".join([f"{entry.kind}{entry.mode:04o} {entry.uid}:{entry.gid} NOON{time}", *more])


def _listing(tree: Mapping[bytes, Entry]) -> list[str]:
    return [f"    {path!r}: {_line(entry)}" for path, entry in tree.items()] or ["    nothing"]


# --- Generated trees -----------------------------------------------------------------------------

PLAIN = ("a", "b", "c", "d", "x", "keep", "sub", "dir", "a.txt", "b.txt", "c.o", "o.txt", "tmp~")
FEW = ("a", "b", "x", "c.txt")
ODD = ["sp ace", "-n", "[x]", "*", "new\nline", os.fsdecode(b"\xff\xfe"), "\u00e9", ".hid", "\\x"]
TARGETS = ["nowhere", "../a", "a", "sub", ".", "/etc/hostname", "dir/b", "\u00e9"]
SIZES = [0, 1, 10, 10, 99, 100, 101, 999, 1000, 1024, 1025, 5000, 150_000]
FILE_MODES = [0o644, 0o600, 0o755, 0o444, 0o640, 0o664, 0o4755]
FOLDER_MODES = [0o755, 0o700, 0o2755, 0o775, 0o1777]
OWNERS = [0, 0, 0, 1, 1000, STRANGER]


@dataclass
class Hand:
    """Make and change one tree. What it does depends on its dice and on the tree alone."""

    root: Path
    rng: random.Random
    links: bool = False  # may link files
    acls: bool = False  # may set ACLs
    sly: bool = False  # may leave size and time as they are, or the time nearly
    ruled: bool = False  # writes files of rules that matter
    names: tuple[str, ...] = PLAIN  # few names make patterns meet many paths
    smallest: int = 0  # bytes
    serial: int = 0

    def build(self, entries: int) -> None:
        """Fill the tree."""
        for _ in range(entries):
            self._add()
        if self.rng.random() < 0.3:
            self._dress(self.root)
        self._rule()
        self._settle()

    def change(self, steps: int) -> None:
        """Do what users do, ``steps`` times."""
        for _ in range(steps):
            act = self.rng.choice(_ACTS)
            with contextlib.suppress(OSError, IndexError):  # not possible here; nothing to act on
                act(self)
        self._rule()
        self._settle()

    def _paths(self, *kinds: str) -> list[Path]:
        return [
            self.root / os.fsdecode(spot.path)
            for spot in walk(self.root)
            if not kinds or stat.filemode(spot.status.st_mode)[0] in kinds
        ]

    def _any(self, *kinds: str) -> Path:
        return self.rng.choice(self._paths(*kinds))

    def _place(self) -> Path:
        """Choose a folder, not too deep, and a name that may be taken."""
        folders = [path for path in self._paths("d") if len(path.relative_to(self.root).parts) < 4]
        name = self.rng.choice(self.names if self.rng.random() < 0.9 else ODD)
        return self.rng.choice([self.root, *folders]) / name

    def _data(self) -> bytes:
        self.serial += 1
        size = max(self.smallest, self.rng.choice(SIZES))
        return noise(size, self.rng.randrange(10**9) + self.serial)

    def _moment(self) -> int:
        fraction = self.rng.choice([0, 0, self.rng.randrange(10**9)])
        return (NOON - 10 * self.rng.randrange(1, 10**7)) * 10**9 + fraction

    # Making.

    def _add(self) -> None:
        path = self._place()
        if not os.path.lexists(path):
            self._make(path)

    def _make(self, path: Path) -> None:
        roll = self.rng.random()
        if roll < 0.28:
            path.mkdir()
            for _ in range(self.rng.randrange(3)):
                self._make_file(path / self.rng.choice(self.names))
        elif roll < 0.40:
            path.symlink_to(self.rng.choice(TARGETS))
        elif roll < 0.43:
            os.mkfifo(path)
        elif roll < 0.53 and self.links and (files := self._paths("-")):
            path.hardlink_to(self.rng.choice(files))
            return
        elif roll < 0.60:
            self._make_rules(path)
            return
        else:
            self._make_file(path)
            return
        self._dress(path)

    def _make_file(self, path: Path) -> None:
        if not os.path.lexists(path):
            path.write_bytes(self._data())
            self._dress(path)

    def _make_rules(self, path: Path) -> None:
        """Write a per-directory file of rules, which are ordinary files to who is not told."""
        path = path.with_name(self.rng.choice(RULES))
        if not os.path.lexists(path):
            spots = walk(path.parent)
            below = [os.fsdecode(spot.path) for spot in spots if b"\n" not in spot.path]
            rules = [f"{self.rng.choice('--+')} {pattern(self.rng, below)}" for _ in range(2)]
            path.write_bytes(os.fsencode("\n".join([*rules, ""])))
            self._dress(path)

    def _rule(self) -> None:
        for _ in range(2 * self.ruled):
            self._make_rules(self._place())

    def _dress(self, path: Path) -> None:
        """Give an object attributes of its own."""
        status = path.lstat()
        if self.rng.random() < 0.4:
            os.lchown(path, self.rng.choice(OWNERS), self.rng.choice(OWNERS))
        if not path.is_symlink():
            modes = FOLDER_MODES if path.is_dir() else FILE_MODES
            path.chmod(self.rng.choice(modes) if self.rng.random() < 0.5 else modes[0])
        if stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode):
            if self.rng.random() < 0.15:
                os.setxattr(path, "user.note", b"%d" % self.rng.randrange(9))
            if self.acls and self.rng.random() < 0.3:
                names = ["access", "default"] if path.is_dir() else ["access"]
                os.setxattr(path, f"system.posix_acl_{self.rng.choice(names)}", _acl(self.rng))
        self._date(path, self._moment())

    def _date(self, path: Path, ns: int) -> None:
        os.utime(path, ns=(ns, ns), follow_symlinks=False)

    def _settle(self) -> None:
        """Give a time in the past to the directories that the hand has touched."""
        for path in [self.root, *self._paths("d")]:
            if path.stat().st_mtime_ns > RECENT:
                self._date(path, self._moment())

    # Changing.

    def _remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

    def _delete(self) -> None:
        self._remove(self._any())

    def _change_kind(self) -> None:
        path = self._any()
        self._remove(path)
        self._make(path)

    def _edit(self) -> None:
        """Write other bytes: in place or beside, of the same size or not, with a new time."""
        path = self._any("-")
        old = path.stat()
        roll = self.rng.random()
        beside = roll < 0.5
        data = path.read_bytes()
        if beside or self.rng.random() < 0.5 or not data:
            data += self._data() + b"+"
        else:
            cut = self.rng.randrange(len(data))
            data = data[:cut] + bytes([data[cut] ^ 255]) + data[cut + 1 :]
        if beside:
            path.unlink()
        path.write_bytes(data)
        if beside:
            path.chmod(stat.S_IMODE(old.st_mode))
        same = self.sly and self.rng.random() < 0.3
        self._date(path, old.st_mtime_ns if same else self._moment())

    def _touch(self) -> None:
        path = self._any()
        steps = [-(10**9), 10**9, 3 * 10**9, 1] if self.sly else []
        step = self.rng.choice([*steps, None, None])
        old = path.lstat().st_mtime_ns
        self._date(path, self._moment() if step is None else old + step)

    def _redress(self) -> None:
        self._dress(self._any())

    def _retarget(self) -> None:
        path = self._any("l")
        path.unlink()
        path.symlink_to(self.rng.choice(TARGETS))
        self._date(path, self._moment())

    def _rename(self) -> None:
        self._any("-", "-", "d", "l").rename(self._place())

    def _rename_over(self) -> None:
        self._any("-").rename(self._any("-"))

    def _rename_folder(self) -> None:
        self._any("d").rename(self._place())

    def _leave_link(self) -> None:
        """Move a folder and leave a symlink to it behind."""
        path, place = self._any("d"), self._place()
        path.rename(place)
        path.symlink_to(os.path.relpath(place, path.parent))
        self._date(path, self._moment())

    def _swap(self) -> None:
        exchange(self._any(), self._any())


_ACTS: tuple[Callable[[Hand], None], ...] = (
    Hand._add,
    Hand._add,
    Hand._delete,
    Hand._change_kind,
    Hand._edit,
    Hand._edit,
    Hand._touch,
    Hand._redress,
    Hand._retarget,
    Hand._rename,
    Hand._rename,
    Hand._rename_over,
    Hand._rename_folder,
    Hand._leave_link,
    Hand._swap,
)


def _acl(rng: random.Random) -> bytes:
    """Spell a POSIX ACL with one named user as the kernel does."""
    nobody = 0xFFFF_FFFF
    rows = [(1, 7, nobody), (2, rng.choice([4, 6]), STRANGER), (4, 5, nobody)]
    rows += [(16, rng.choice([5, 7]), nobody), (32, rng.choice([0, 4]), nobody)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)


# --- Generated wishes ----------------------------------------------------------------------------


def pattern(rng: random.Random, paths: list[str]) -> str:
    """Make a pattern that has to do with one of ``paths``."""
    path = rng.choice(paths or ["a"])
    parent, _, name = path.rpartition("/")
    first = path.split("/")[0]
    return rng.choice(
        [
            *(name, name, f"{name}/", f"*{name[-1:]}", f"{name[0]}*", f"[!{name[0]}]*"),
            *(path, f"/{path}", f"/{path}", f"/{path}/", f"/{name}", f"/{name}/", f"/{first}"),
            *(f"{first}/***", f"/{path}/***", f"/{path}/**", f"{first}/**", f"/{first}/*/{name}"),
            *(f"**/{name}", f"/**/{name}", f"*/{name}", f"/*/{name}", f"/{first}/**/{name}"),
            *(f"{parent}/*" if parent else "*", f"/{parent}/*" if parent else "/*", f"/{first}/*"),
            *("*", "*/", "*.txt", "*.o", "[a-c]*", "?", "/?", "?.*", ".*", "**.txt", "**/*.txt"),
        ]
    )


class Dice:
    """Draw the words of one case; the trees are there already."""

    def __init__(self, rng: random.Random, duel: Duel, base: list[str], plot: "Plot") -> None:
        self.rng, self.duel, self.base, self.plot = rng, duel, base, plot
        found = [os.fsdecode(spot.path) for spot in walk(duel.src)]
        found += [os.fsdecode(spot.path) for spot in walk(duel.dst)] if duel.dst.is_dir() else []
        short = [path.partition("/")[2] for path in found]
        self.names = [path for path in [*found, *short, *short] if path]
        self.nul = False

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def wish(self, sources: list[str], target: str) -> Wish:
        """Draw options for ``sources``."""
        options = [*self.base, *self._some(COMMON, 0.08)]
        if not self.plot.twice:
            options += self._some(CHOOSY, 0.06)
        if "a" in self.base[0]:
            options += self._some(list(_UNDO), 0.1)
        if self.chance(0.10):
            options += [f"--chmod={self.rng.choice(CHMODS)}"]
        deletes = self.chance(0.8 if self.plot.filtered else 0.5)
        if sources == ["src/A/"] and self.chance(0.12) and not (deletes and self.plot.twice):
            options += self._files_from(complete=deletes)
        if deletes:
            options += self.rng.choice(DELETES)
            options += self._some(["--force", "--ignore-errors"], 0.1)
        elif self.chance(0.15):
            options += ["--force"]
        if self.plot.filtered or self.chance(0.2):
            options += self._filters()
        umask = self.rng.choice([0o022, 0o022, 0o027, 0o077, 0o002])
        return Wish(tuple(options), tuple(sources), target, umask)

    def _some(self, options: list[str], share: float) -> list[str]:
        return [each for each in options if self.chance(share)]

    def _write(self, name: str, lines: Iterable[str]) -> str:
        end = "\0" if self.nul else "\n"
        path = self.duel.lists / name
        path.write_bytes(os.fsencode("".join(line + end for line in lines)))
        return f"lists/{name}"

    def _files_from(self, *, complete: bool) -> list[str]:
        """Name some paths, all of them there if ``complete``; a slash asks for what is inside."""
        self.nul = self.chance(0.5)
        below = [os.fsdecode(spot.path) for spot in walk(self.duel.a)]
        wanted = self.rng.sample(below, min(len(below), self.rng.randrange(1, 5)))
        slashed = {path for path in wanted if self._is_folder(path) and self.chance(0.5)}
        wanted = [path + "/" * (path in slashed) for path in wanted]
        wanted += ["no/such"] if not complete and self.chance(0.15) else []
        wanted = [self.rng.choice(["", "", "/", "./"]) + path for path in wanted]
        lines = [path for path in wanted if self.nul or "\n" not in path]
        options = [f"--files-from={self._write('from', lines)}"]
        options += [self.rng.choice(["-0", "--from0"])] if self.nul else []
        return [*options, *(["-r"] if self.chance(0.6) else [])]

    def _is_folder(self, path: str) -> bool:
        return (self.duel.a / path).is_dir() and not (self.duel.a / path).is_symlink()

    def _filters(self) -> list[str]:
        makers = [self._option, self._option, self._rule, self._rule, self._rule, self._file]
        filters = [self.rng.choice(makers)() for _ in range(self.rng.randrange(1, 6))]
        if self.plot.ruled and not self.nul:  # -0 means the files in the trees too
            filters.insert(self.rng.randrange(len(filters)), self._per_directory())
        if self.chance(0.25):  # nothing but what is named
            named = [f"--include={self._pattern()}" for _ in range(self.rng.randrange(1, 4))]
            last = self.rng.choice(["--exclude=*", "--filter=- *", "--filter=H *", "--exclude=/*"])
            filters = [*self._some(["--include=*/"], 0.6), *filters[:1], *named, last]
        return filters

    def _pattern(self) -> str:
        return pattern(self.rng, self.names)

    def _option(self) -> str:
        prefix = self.rng.choice(["", "", "", "", "", "+ ", "- "])
        return f"--{self.rng.choice(['exclude', 'exclude', 'include'])}={prefix}{self._pattern()}"

    def _rule(self) -> str:
        kinds = "- - + P P R H S exclude include protect risk hide show".split()
        return f"--filter={self.rng.choice(kinds)}{self.rng.choice(' _')}{self._pattern()}"

    def _per_directory(self) -> str:
        return self.rng.choice(["--filter=: .rules", "--filter=dir-merge .rules", "-F", "-FF"])

    def _file(self) -> str:
        patterns = [self._pattern() for _ in range(self.rng.randrange(1, 4))]
        patterns = [each for each in patterns if "\n" not in each]
        serial = len(list(self.duel.lists.iterdir()))
        if self.chance(0.3):
            rules = [f"{self.rng.choice('-+PRHS')} {each}" for each in patterns]
            word = self.rng.choice([".", "merge"])
            return f"--filter={word} {self._write(f'merge{serial}', ['# a comment', *rules])}"
        lines = [self.rng.choice(["", "", "+ ", "- "]) + each for each in patterns]
        lines.insert(0, self.rng.choice(["# a comment", "; a comment", "", "!"]))
        kind = self.rng.choice(["exclude", "exclude", "include"])
        return f"--{kind}-from={self._write(f'{kind}{serial}', lines)}"


BASES = [
    *([["-a"]] * 6),
    *(["-rlpt"], ["-rlpt"], ["-r"], ["-rt"], ["-rt"], ["-rp"], ["-rl"], ["-rlptgoD"]),
    *(["-aH"], ["-aH"], ["-aX"], ["-aAX"]),
]
COMMON = (
    "-c -u -x -S -m -W -z --numeric-ids --inplace --no-whole-file --partial -h "
    "--block-size=128.00K --modify-window=1"
).split()
CHOOSY = (
    "--existing --ignore-existing --max-size=100 --max-size=1k --min-size=100 --min-size=1k "
    "--max-size=1kb"
).split()
CHMODS = ["D755,F644", "u+x", "go-w", "a+rX", "Dg+s,Fo-r", "F600", "D2750,ug=rwX", "o="]
DELETES = [
    *([["--delete"]] * 4),
    *(["--delete-before"], ["--delete-during"], ["--delete-after"], ["--delete-excluded"]),
    *(["--delete", "--delete-excluded"], ["--delete-before", "--delete-excluded"]),
]
SPOILED = {
    # rsync lets names share an inode that should not, or writes through one name into another.
    "H": {"-u", "--inplace", *CHOOSY},
    # rsync gives an existing name the source's mode with the attribute, though -p is off.
    "X": {"--no-perms"},
}


MISSING = "src/none"
PER_DIRECTORY = ("--filter=:", "--filter=dir-merge", "-F")


def _sources(rng: random.Random, a: Path) -> list[str]:
    """Choose what is mirrored: one or two folders, with and without slash, or files."""
    files = [os.fsdecode(s.path) for s in walk(a) if not stat.S_ISDIR(s.status.st_mode)]
    file = f"src/A/{rng.choice(files or ['none'])}"
    one, two = "src/A/", "src/B/"
    ways = [
        *([[one]] * 8),
        *([["src/A"]] * 3),
        *(["src/A/."], [one, two], [two, one], ["src/A", "src/B"], [one, "src/B"], ["src/A", two]),
        *([file], [file, two], [file, "src/B"], [one, MISSING]),
    ]
    return rng.choice(ways)


@dataclass(frozen=True, slots=True)
class Plot:
    """What a generated case is about."""

    twice: bool  # two runs, with changes of the source in between
    filtered: bool  # patterns meet many paths
    ruled: bool  # the trees hold files of rules

    @staticmethod
    def draw(rng: random.Random) -> "Plot":
        filtered = rng.random() < 0.45
        return Plot(rng.random() < 0.35, filtered, filtered and rng.random() < 0.4)


def play(number: int, base: Path) -> tuple[Duel, list[str]]:
    """Play one generated case and return it with what is wrong."""
    rng = random.Random(f"{SEED}/{number}")
    duel, plot, options = Duel(base), Plot.draw(rng), rng.choice(BASES)
    letters = Wish(tuple(options)).letters
    hand = functools.partial(
        Hand,
        rng=rng,
        acls="A" in letters,
        smallest=16 if "H" in letters else 0,
        ruled=plot.ruled,
        names=FEW if plot.filtered else PLAIN,
    )
    (duel.src / "B").mkdir()
    makers = [hand(root=duel.a, links=True), hand(root=duel.src / "B")]
    makers[0].build(rng.choice([15, 25] if plot.filtered else [3, 8, 15, 25]))
    makers[1].build(rng.choice([0, 3, 8]))
    sources, target = _sources(rng, duel.a), rng.choice(["dst", "dst/"])
    if "H" in letters:  # rsync's generator can die of links in two sources that overlap
        sources = [each for each in sources if each != "src/B/"][:1] or ["src/A/"]
    if plot.twice or rng.random() < 0.2:
        if rng.random() < 0.5:
            duel.dst.rmdir()
    else:
        _derive(duel, sources, hand(root=duel.dst, sly=True), rng)
    wish = Dice(rng, duel, options, plot).wish(sources, target)
    wish = _comparable(wish, duel, plot)
    _never_empty(duel, wish)
    wrong = duel.play(wish)
    if plot.twice and not wrong:
        for maker in makers:
            maker.change(rng.choice([2, 5, 10]))
        if rng.random() < 0.25:
            _meddle(duel, hand, rng.randrange(10**9))
        _never_empty(duel, wish)
        if not _through_links(duel):
            wrong = duel.play(wish)
    return duel, wrong


def _through_links(duel: Duel) -> bool:
    """Whether a name of --files-from leads through a symlink: rsync follows it."""
    listed = duel.lists / "from"
    if not listed.exists():
        return False
    paths = re.split(b"[\0\n]", listed.read_bytes())
    parents = [above for path in paths for above in (duel.a / os.fsdecode(path)[1:]).parents]
    parents += [above for path in paths for above in (duel.a / os.fsdecode(path)).parents]
    return any(above.is_symlink() for above in parents)


def _comparable(wish: Wish, duel: Duel, plot: Plot) -> Wish:
    """Leave out what rsync does badly, and what bisync does better on purpose."""
    # Files of rules at the destination are read before the run, as with --delete-before.
    words = ["--delete" if each == "--delete-after" else each for each in wish.options]
    if plot.twice:  # a rename brings its mode along, whatever has the old name now
        words = [each for each in words if each not in ("--no-perms", "-u")] + ["-plD"]
        # ... and a directory that is renamed takes along what is protected in it
        words = [each for each in words if not each.startswith(("--filter=P", "--filter=protect"))]
    listed = any(each.startswith("--files-from") for each in words)
    if not duel.dst.exists() and (listed or not wish.sources[0].endswith("/")):
        wish = replace(wish, target="dst/")  # else an empty directory gets the name DST in rsync
    if len(wish.sources) > 1:  # in rsync the rules of one source hide files of the next one
        words = [each for each in words if not each.startswith(PER_DIRECTORY)]
    wish = replace(wish, options=tuple(words))
    spoiled = set().union(*(SPOILED.get(letter, ()) for letter in wish.letters))
    if _folders(duel.src, here=True) & _folders(duel.dst, here=False):
        # rsync goes on below a name that it left alone: through a symlink, or to an error.
        spoiled.add("--ignore-existing")
    if wish.deletes and MISSING in wish.sources:  # it may be an unmounted one: bisync waits
        wish = replace(wish, sources=tuple(each for each in wish.sources if each != MISSING))
    return replace(wish, options=tuple(each for each in wish.options if each not in spoiled))


def _folders(root: Path, *, here: bool) -> set[bytes]:
    """Collect the names of the directories below ``root``, or of all that are none."""
    spots = walk(root) if root.is_dir() else ()
    return {spot.name for spot in spots if stat.S_ISDIR(spot.status.st_mode) == here}


def _derive(duel: Duel, sources: list[str], hand: Hand, rng: random.Random) -> None:
    """Fill DST with what an earlier mirror would have left there, then change it at random."""
    there = [each for each in sources if os.path.lexists(duel.base / each)]
    line = ["rsync", "-aHAX" if len(there) == 1 else "-aAX", *there, "rsync/dst/"]
    subprocess.run(line, cwd=duel.base, check=True, capture_output=True)
    hand.change(rng.choice([1, 4, 8, 15]))


def _meddle(duel: Duel, hand: Callable[..., Hand], seed: int) -> None:
    """Change both destinations in the same way: DST is observed, not remembered."""
    for folder in duel.folders:
        if (folder / "dst").is_dir() and not (folder / "dst").is_symlink():
            hand(root=folder / "dst", rng=random.Random(seed)).change(4)


def _never_empty(duel: Duel, wish: Wish) -> None:
    """A source without entries withholds all deletions of bisync: never ask for that."""
    for root in (duel.a, duel.src / "B"):
        if wish.deletes and not any(root.iterdir()):
            put(root / "a", b"the only one", t=NOON - 5)
            os.utime(root, ns=((NOON - 5) * 10**9,) * 2)


TALLY: Counter[str] = Counter()


@pytest.mark.parametrize("number", NUMBERS)
def test_generated(tmp_path: Path, number: int):
    """The same options on the same trees: what rsync makes of DST, bisync makes of it."""
    TALLY["cases"] += 1
    try:
        duel, wrong = play(number, tmp_path / "case")
    except Refused as refused:
        TALLY["refused"] += 1
        pytest.skip(f"rsync refuses: {refused}")
    if wrong:
        again = f"BISYNC_SEED={SEED} BISYNC_CASE={number} pytest {Path(__file__).name} -k generated"
        pytest.fail(f"case {number} of seed {SEED}; again: {again}\n{duel.report(wrong)}", False)


def test_few_cases_are_refused():
    """What rsync refuses tests nothing: at most one case in twenty."""
    assert TALLY["refused"] * 20 <= TALLY["cases"]


# --- Cases with a name ---------------------------------------------------------------------------


@pytest.fixture(name="duel")
def _duel(tmp_path: Path) -> Duel:
    return Duel(tmp_path / "duel")


def fill(root: Path, *names: str, text: bytes = b"") -> None:
    """Make files, or directories where a name ends in a slash, or symlinks ``name -> target``.

    A file holds ``text`` or else its own name. Files with the same content have the same time.
    """
    for name in names:
        name, arrow, target = name.partition(" -> ")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if arrow:
            path.symlink_to(target)
            os.utime(path, (NOON - len(name),) * 2, follow_symlinks=False)
        elif name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            data = text or os.fsencode(path.name)
            put(path, data, t=NOON - sum(data))


def names(shown: Mapping[str, object]) -> str:
    """Spell the names of a tree."""
    return " ".join(sorted(shown))


def mode(path: Path) -> str:
    return f"{stat.S_IMODE(path.lstat().st_mode):04o}"


def test_slash_after_the_source(duel: Duel):
    """``A`` makes DST/A and deletes only in there; ``A/`` is DST."""
    fill(duel.a, "f")
    fill(duel.dst, "old", "A/old")
    assert names(duel.agree("-a", "--delete", sources=("src/A",))) == "A A/f old"
    assert names(duel.agree("-a", "--delete")) == "f"


def test_anchor_is_where_the_transfer_begins(duel: Duel):
    """With ``A`` the path begins with A, with ``A/`` it does not; A itself can be excluded."""
    fill(duel.a, "f", "sub/f")
    rule = "--exclude=/f"
    assert names(duel.agree("-a", rule, sources=("src/A",))) == "A A/f A/sub A/sub/f"
    assert names(duel.agree("-a", "--delete", rule)) == "sub sub/f"
    assert names(duel.agree("-a", "--delete", "--exclude=/A/f", sources=("src/A/.",))) == (
        "f sub sub/f"
    )
    assert "A" not in duel.agree("-a", "--exclude=A/", sources=("src/A",))


def test_star_does_not_exclude_the_root_itself(duel: Duel):
    """``--exclude=*`` leaves nothing of the content, but DST gets the attributes of SRC/."""
    fill(duel.a, "f", "sub/")
    duel.a.chmod(0o750)
    assert duel.agree("-a", "--exclude=*") == {}
    assert mode(duel.dst) == "0750"


def test_what_is_excluded_keeps_its_directories(duel: Duel):
    """An excluded entry stays, and so do the directories over it, which is no error."""
    fill(duel.a, "f")
    fill(duel.dst, "x/y/k.o", "x/y/z", "x/w/z")
    assert names(duel.agree("-a", "--delete", "--exclude=*.o")) == "f x x/y x/y/k.o"
    assert names(duel.agree("-a", "--delete", "--filter=P /x/y/")) == "f x x/y x/y/k.o"
    assert names(duel.agree("-a", "--delete", "--exclude=z", "--filter=R x")) == "f"


def test_delete_excluded(duel: Duel):
    """Excluded entries go too, but for what a P rule names; a sender's include is no shield."""
    fill(duel.a, "f", "k.o", "m.o")
    fill(duel.dst, "k.o", "x/l.o", "x/p.c")
    rules = ("--filter=P *.c", "--include=m.o", "--exclude=*.o")
    assert names(duel.agree("-a", "--delete-excluded", *rules)) == "f m.o x x/p.c"


@pytest.mark.parametrize("how", [(), ("--existing",), ("--force",), ("--delete",)], ids=str)
def test_file_where_a_directory_is(duel: Duel, how: tuple[str, ...]):
    """An empty directory gives way; a full one only with --force or --delete, else it is 23."""
    fill(duel.a, "empty", "full", "link -> f")
    fill(duel.dst, "empty/", "full/inner", "link/inner")
    gives_way = how in (("--force",), ("--delete",))
    shown = duel.agree("-a", *how, rc=0 if gives_way else 23)
    assert shown["empty"] == b"empty"
    assert shown["full"] == (b"full" if gives_way else None)
    assert shown["link"] == ("-> f" if gives_way else None)


def test_protected_entry_where_a_file_should_be(duel: Duel):
    """A directory with something protected inside stays, emptied of all else, and it is 23."""
    fill(duel.a, "x")
    fill(duel.dst, "x/k.o", "x/l")
    assert names(duel.agree("-a", "--delete", "--exclude=*.o", rc=23)) == "x x/k.o"


def test_directory_where_something_else_is(duel: Duel):
    """A directory replaces a file, and a symlink to a directory: nothing is written through it."""
    fill(duel.a, "x/f", "y/f")
    fill(duel.dst, "real/", "x", "y -> real")
    assert names(duel.agree("-a")) == "real x x/f y y/f"


def test_existing(duel: Duel):
    """Nothing new, directories neither; a name of another kind counts as existing."""
    fill(duel.a, "new", "newdir/f", "olddir/new", "olddir/f", "kind/f", "link -> x")
    fill(duel.dst, "olddir/", "kind", "gone")
    fill(duel.dst / "olddir", "f", text=b"other")
    shown = duel.agree("-a", "--existing", "--delete")
    assert names(shown) == "kind olddir olddir/f"
    assert shown["kind"] is None
    assert shown["olddir/f"] == b"f"


def test_ignore_existing(duel: Duel):
    """Existing names that are no directories stay as they are; directories get attributes."""
    fill(duel.a, "f", "dir/new", "link -> new", "kind -> x")
    fill(duel.dst, "f", "dir/", "link -> old", "kind")
    os.utime(duel.dst / "f", (NOON, NOON))
    duel.dst.joinpath("f").chmod(0o600)
    duel.a.joinpath("dir").chmod(0o700)
    shown = duel.agree("-a", "--ignore-existing")
    assert shown["link"] == "-> old" and shown["kind"] == b"kind"
    assert mode(duel.dst / "f") == "0600" and mode(duel.dst / "dir") == "0700"
    assert "dir/new" in shown


def test_prune_empty_directories(duel: Duel):
    """-m drops directories that filters emptied, and --delete takes them; sizes do not count."""
    fill(duel.a, "e/e2/", "k/1.o", "x/1.c", "big/")
    fill(duel.a / "big", "f", text=b"much")
    fill(duel.dst, "e/", "k/")
    options = ("-a", "-m", "--exclude=*.o", "--max-size=3")
    assert names(duel.agree(*options)) == "big e k x x/1.c"
    assert names(duel.agree(*options, "--delete")) == "big x x/1.c"


def test_kinds_that_are_not_asked_for(duel: Duel):
    """Without -l and -D symlinks and fifos are passed over, but their names are not gone."""
    fill(duel.a, "link -> new", "other -> new", "f")
    os.mkfifo(duel.a / "fifo")
    fill(duel.dst, "link -> old", "other", "fifo", "gone -> old")
    shown = duel.agree("-rt", "--delete")
    assert names(shown) == "f fifo link other"
    assert shown["link"] == "-> old" and shown["other"] == b"other"


def test_sizes(duel: Duel):
    """What is too large or too small is not sent, nor deleted; 1k is 1024, 1kb is 1000."""
    for size in (999, 1000, 1001, 1024, 1025):
        fill(duel.a, str(size), text=bytes(size))
    fill(duel.dst, "1025", "gone")
    assert names(duel.agree("-a", "--delete", "--max-size=1kb")) == "1000 1025 999"
    shown = duel.agree("-a", "--delete", "--max-size=1k", "--min-size=1000")
    assert names(shown) == "1000 1001 1024 1025 999"
    assert shown["1025"] == b"1025"


@functools.cache
def _updates_other_kinds() -> bool:
    """Whether the judge is new enough: 3.2 kept newer objects of other kinds with -u."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "a"), Path(folder, "b")
        source.mkdir()
        target.mkdir()
        put(source / "x", b"file", t=NOON)
        (target / "x").symlink_to("nowhere")
        subprocess.run(["rsync", "-au", f"{source}/", f"{target}/"], check=True)
        return not (target / "x").is_symlink()


def test_update(duel: Duel):
    """-u keeps what is newer; equal times with other sizes, and other kinds, are updated."""
    fill(duel.a, "older", "equal", "same", "kind/", "other", "link -> new")
    fill(duel.dst, "kind", "link -> old")
    if _updates_other_kinds():
        fill(duel.dst, "other -> x")
    for name, text in {"older": b"mine", "equal": b"of dst", "same": b"emas"}.items():
        put(duel.dst / name, text, t=NOON if name == "older" else None)
    for name in ("equal", "same"):
        os.utime(duel.dst / name, ns=((duel.a / name).stat().st_mtime_ns,) * 2)
    shown = duel.agree("-a", "-u")
    assert shown["older"] == b"mine" and shown["equal"] == b"equal" and shown["same"] == b"emas"
    assert shown["link"] == "-> new" and shown["kind"] is None and shown["other"] == b"other"


def test_quick_check(duel: Duel):
    """Same size and same second are taken for equal, but with -c; a second more is not."""
    for name, later in {"same": 0, "second": 1}.items():
        put(duel.a / name, b"good", t=NOON - 9 + later)
        put(duel.dst / name, b"evil", t=NOON - 9)
    good, evil = b"good", b"evil"
    assert duel.agree("-a", "--modify-window=1") == {"same": evil, "second": evil}
    assert duel.agree("-a") == {"same": evil, "second": good}
    assert duel.agree("-ac") == {"same": good, "second": good}


def test_modes_without_perms(duel: Duel):
    """New names get the source's mode less the umask and set-id bits, old ones keep theirs."""
    fill(duel.a, "new", "old", "same", "dir/", "olddir/")
    fill(duel.dst, "same", "olddir/")
    put(duel.dst / "old", b"longer than before", mode=0o640)
    for path in duel.a.iterdir():
        path.chmod(0o3777 if path.is_dir() else 0o4777)
    duel.agree("-rt", umask=0o027)
    modes = {path.name: mode(path) for path in duel.dst.iterdir()}
    assert modes == {"new": "0750", "old": "0640", "same": "0644", "dir": "0750", "olddir": "0755"}


def test_chmod_without_perms(duel: Duel):
    """--chmod without -p rules over new names only, and the umask over it."""
    fill(duel.a, "new", "old", "dir/", "olddir/")
    fill(duel.dst, "olddir/")
    fill(duel.dst, "old", text=b"other")
    duel.agree("-r", "--chmod=D700,F606", umask=0o002)
    modes = {path.name: mode(path) for path in duel.dst.iterdir()}
    assert modes == {"new": "0604", "old": "0644", "dir": "0700", "olddir": "0755"}
    duel.agree("-rp", "--chmod=D700,F606")
    assert {mode(path) for path in duel.dst.iterdir()} == {"0700", "0606"}


def test_owners_without_owner(duel: Duel):
    """Without -o and -g a file that is copied is ours, one that is up to date keeps its owner."""
    fill(duel.a, "new", "old", "same", "dir/", "olddir/")
    fill(duel.dst, "same", "olddir/")
    fill(duel.dst, "old", text=b"other")
    for path in [*duel.a.iterdir(), *duel.dst.iterdir()]:
        os.chown(path, STRANGER, STRANGER)
    duel.agree("-rlpt")
    owners = {path.name: path.stat().st_uid for path in duel.dst.iterdir()}
    assert owners == {"new": 0, "old": 0, "same": STRANGER, "dir": 0, "olddir": STRANGER}


@pytest.mark.parametrize("options", ["-r", "-rp", "-rg", "-rlptD"])
def test_set_group_id_of_a_directory(duel: Duel, options: str):
    """New entries take the group of a set-group-id directory, unless -g, or -p ends it first."""
    fill(duel.a, "f", "sub/f")
    duel.dst.chmod(0o2755)
    os.chown(duel.dst, 0, STRANGER)
    duel.dst.chmod(0o2755)
    duel.agree(options)
    groups = {path.stat().st_gid for path in duel.dst.rglob("*")}
    assert groups == ({STRANGER} if options == "-r" else {0})
    assert mode(duel.dst / "sub") == ("2755" if options in ("-r", "-rg") else "0755")


def test_times_of_links_and_directories(duel: Duel):
    """Symlinks and directories have times too, and deletions below do not disturb them."""
    fill(duel.a, "dir/sub/f", "dir/link -> f")
    fill(duel.dst, "dir/sub/old", "dir/gone/f")
    for path in ("dir/link", "dir/sub", "dir"):
        os.utime(duel.a / path, (NOON - 77, NOON - 77), follow_symlinks=False)
    duel.agree("-a", "--delete-after")
    for path in ("dir/link", "dir/sub", "dir"):
        assert (duel.dst / path).lstat().st_mtime == NOON - 77


def test_rules_of_the_receiving_side(duel: Duel):
    """What protects from deletion is DST's own file of rules as it was before the run."""
    put(duel.a / ".rules", b"- k\n")
    fill(duel.dst, "k", "gone")
    put(duel.dst / ".rules", b"- k\n")
    rule = "--filter=: .rules"
    assert names(duel.agree("-a", "--delete", rule)) == ".rules k"
    (duel.a / ".rules").unlink()
    assert names(duel.agree("-a", "--delete-after", rule)) == "k"
    assert names(duel.agree("-a", "--delete-after", rule)) == ""


@pytest.mark.parametrize("options", ["-aF", "-a --filter=:_.rsync-filter"])
@pytest.mark.parametrize(
    "sources", ["src/A/", "src/A", "src/A/q/c", "src/A/q/a src/A/q/", "src/A/q"]
)
def test_rules_above_the_tree(duel: Duel, sources: str, options: str):
    """Files of rules with a slash count above the tree, too; those beside a named source do not."""
    fill(duel.a, "a", "b", "c", "q/a", "q/b", "q/c")
    put(duel.src / ".rsync-filter", b"- a\n- /A/q/b\n")
    put(duel.a / ".rsync-filter", b"- b\n+ c\n")
    put(duel.a / "q/.rsync-filter", b"- c\n")
    assert duel.agree(*options.split(), sources=sources.split())


def test_rules_above_the_destination(duel: Duel):
    """They protect, too: anchored where they lie."""
    fill(duel.a, "a")
    fill(duel.dst, "kept/old", "old")
    put(duel.folders[0] / ".rsync-filter", b"- /dst/kept\n", t=NOON - 1)
    assert names(duel.agree("-aF", "--delete")) == "a kept kept/old"


def test_rules_between_zero_bytes(duel: Duel):
    """-0 is for merged files of rules as well, wherever they lie."""
    fill(duel.a, "a", "b", "c")
    put(duel.a / ".rsync-filter", b"- a\0")
    (duel.lists / "merged").write_bytes(b"- b\0")
    rules = ["--filter=merge lists/merged", "-F"]
    assert names(duel.agree("-a0", *rules)) == ".rsync-filter c"


def test_rules_that_arrive_too_late(duel: Duel):
    """--delete comes before the files of a directory: rules that come with them protect nothing."""
    put(duel.a / ".rules", b"- k\n")
    fill(duel.dst, "k")
    assert names(duel.agree("-a", "--delete", "--filter=: .rules")) == ".rules"


def test_two_sources(duel: Duel):
    """Directories merge, of files the first wins, but a directory beats a file."""
    fill(duel.a, "f", "dir/one", "w", "z/")
    fill(duel.src / "B", "f", text=b"second")
    fill(duel.src / "B", "dir/two", "w/inner", "z", "g")
    (duel.a / "dir").chmod(0o700)
    fill(duel.dst, "old", "dir/old")
    shown = duel.agree("-a", "--delete", sources=("src/A/", "src/B/"))
    assert names(shown) == "dir dir/one dir/two f g w w/inner z"
    assert shown["f"] == b"f" and shown["w"] is None and shown["z"] is None
    assert mode(duel.dst / "dir") == "0700"


def test_source_that_is_missing(duel: Duel):
    """The others are mirrored, and it is 23."""
    fill(duel.a, "f")
    fill(duel.dst, "old")
    assert names(duel.agree("-a", sources=("src/none", "src/A/"), rc=23)) == "f old"


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (("-a",), "a a/b a/b/f a/old c c/h c/old c/sub d"),
        (("-a", "-r"), "a a/b a/b/f a/old c c/h c/old c/sub c/sub/i d d/e"),
        (("-a", "-r", "--delete"), "a a/b a/b/f a/old c c/h c/sub c/sub/i d d/e"),
        (("-a", "--delete"), "a a/b a/b/f a/old c c/h c/sub d"),
        (("-a", "--exclude=a", "--exclude=b/"), "a a/b a/b/f a/old c c/h c/old c/sub d"),
        (("-a", "--exclude=/a/b/f", "--exclude=h"), "a a/old c c/old c/sub d"),
    ],
)
def test_files_from(duel: Duel, options: tuple[str, ...], shown: str):
    """Without a -r of its own ``d`` is itself and ``d/`` its entries; no rule hides parents."""
    fill(duel.a, "a/b/f", "a/g", "c/h", "c/sub/i", "d/e")
    fill(duel.dst, "a/old", "c/old")
    (duel.a / "a").chmod(0o700)
    (duel.lists / "from").write_text("# a comment\n; another\n\n/a/b/f\nc/\n./d\n")
    assert names(duel.agree(*options, "--files-from=lists/from")) == shown
    assert mode(duel.dst / "a") == ("0700" if "a/b/f" in shown else "0755")


@pytest.mark.parametrize(
    ("sources", "target", "shown"),
    [
        (["src/A/f"], "dst", {}),
        (["src/A/f"], "dst/", {"f": b"f"}),
        (["src/A/f", "src/A/g"], "dst", {"f": b"f", "g": b"g"}),
        (["src/A"], "dst", {"A": None, "A/f": b"f", "A/g": b"g"}),
        (["src/A/."], "dst", {"f": b"f", "g": b"g"}),
    ],
)
def test_destination_that_is_not_there(
    duel: Duel, sources: list[str], target: str, shown: dict[str, bytes | None]
):
    """A single file without a slash takes DST for its new name; all else makes a directory."""
    fill(duel.a, "f", "g")
    duel.a.chmod(0o750)
    duel.dst.rmdir()
    assert duel.agree("-a", sources=tuple(sources), target=target) == shown
    if not shown:
        assert duel.dst.read_bytes() == b"f"


def test_destination_that_is_a_file(duel: Duel):
    """A single file mirrors onto a file, content and attributes."""
    fill(duel.a, "f")
    duel.dst.rmdir()
    put(duel.dst, b"other", mode=0o600)
    duel.agree("-a", sources=("src/A/f",), target="dst")
    assert duel.dst.read_bytes() == b"f" and mode(duel.dst) == "0644"


# --- Cases with a name and with memory -----------------------------------------------------------


def test_moves_across_the_filters(duel: Duel):
    """A name that becomes excluded is gone for DST, one that becomes included is new to it."""
    fill(duel.a, "out", "in.o", "dir/f", "dir/x.o", "over.o")
    fill(duel.dst, "over")
    duel.agree("-a", "--exclude=*.o")
    (duel.a / "out").rename(duel.a / "out.o")
    (duel.a / "in.o").rename(duel.a / "in")
    (duel.a / "over.o").rename(duel.a / "over")
    (duel.a / "dir").rename(duel.a / "new")
    shown = duel.agree("-a", "--exclude=*.o", "--delete")
    assert names(shown) == "in new new/f over"
    assert shown["over"] == b"over.o"


def test_moved_directory_with_protected_entries(duel: Duel):
    """The directory moves, what is excluded at DST stays where it is."""
    fill(duel.a, "dir/f", "dir/sub/g", "gone/f")
    fill(duel.dst, "dir/k.o", "dir/sub/l.o")
    duel.agree("-a", "--exclude=*.o")
    (duel.a / "dir").rename(duel.a / "new")
    shown = duel.agree("-a", "--exclude=*.o", "--delete")
    assert names(shown) == (
        "dir dir/k.o dir/sub dir/sub/l.o gone gone/f new new/f new/sub new/sub/g"
    )


def test_moves_without_delete(duel: Duel):
    """Without --delete a moved file is at both names."""
    fill(duel.a, "x", "dir/f")
    duel.agree("-a")
    (duel.a / "x").rename(duel.a / "y")
    (duel.a / "dir").rename(duel.a / "moved")
    assert names(duel.agree("-a")) == "dir dir/f moved moved/f x y"


def test_rename_over_a_newer_name_with_update(duel: Duel):
    """With -u the newer file at DST stays, though the name belongs to another file now."""
    fill(duel.a, "x", "y")  # y is the older one
    assert (duel.a / "x").stat().st_mtime > (duel.a / "y").stat().st_mtime
    duel.agree("-a", "-u")
    (duel.a / "y").rename(duel.a / "x")
    assert duel.agree("-a", "-u", "--delete") == {"x": b"x"}


@pytest.mark.parametrize("options", ["-a", "-rp", "-rlpt", "-aH", "-aX"])
def test_swaps_and_rotations(duel: Duel, options: str):
    """Names that go round, and directories that swap with files in them, end as at the source."""
    fill(duel.a, "a", "b", "c", "one/f", "two/g", "up/down/h")
    (duel.a / "linked").hardlink_to(duel.a / "c")
    os.setxattr(duel.a / "a", "user.note", b"of a")
    os.chown(duel.a / "b", STRANGER, STRANGER)
    (duel.a / "b").chmod(0o600)
    duel.agree(options, "--delete")
    exchange(duel.a / "a", duel.a / "b")
    exchange(duel.a / "b", duel.a / "c")
    exchange(duel.a / "one", duel.a / "two")
    (duel.a / "up/down").rename(duel.a / "down")
    (duel.a / "up").rename(duel.a / "down/up")
    duel.agree(options, "--delete")
    assert look(duel.dst) == look(duel.a)


def test_what_somebody_did_at_the_destination(duel: Duel):
    """DST is observed: what was moved, edited or removed there is as at the source again."""
    fill(duel.a, "moved", "edited", "removed", "dir/f")
    duel.agree("-a", "--delete")
    for folder in duel.folders:
        dst = folder / "dst"
        (dst / "moved").rename(dst / "elsewhere")
        put(dst / "edited", b"by hand", t=NOON - 3)
        (dst / "removed").unlink()
        (dst / "dir").rename(dst / "folder")
    (duel.a / "moved").rename(duel.a / "elsewhere.too")
    duel.agree("-a", "--delete")
    assert look(duel.dst) == look(duel.a)


# --- What is said --------------------------------------------------------------------------------

ITEM = re.compile(r"[<>ch.][fdLDS][.+ ?cstTpoguabx]{9} |\*deleting   ")
ITEMIZED = [
    "-a",
    "-a --delete",
    "-a --delete-after",
    "-r --delete",
    "-rt",
    "-rlpt --delete",
    "-rp",
    "-ac --delete",
    "-a -u",
    "-aH --delete",
    "-aX",
    "-a -m --delete --exclude=*.txt",
    "-a --delete-excluded --exclude=*.txt",
    "-a --existing --delete",
    "-a --ignore-existing",
    "-a --max-size=5",
    "-a --no-times",
    "-a --no-perms --no-owner --no-group",
    "-a --chmod=go-rwx",
]


def _itemize_here(duel: Duel) -> None:
    """Prepare one entry, or more, for each letter that rsync has."""
    odd = ["sp ace", "new\nline", "-dash", os.fsdecode(b"\xff"), "\u00e9", "[x]", "back\\slash"]
    for root in (duel.a, duel.dst):
        fill(
            root, "same", "dir/same", "dirmode/", "dirtime/", "full.txt/f", "deep/a/", "link -> to"
        )
        fill(root, "time", "mode", "owner", "note", "note.txt", "one", "size", "content")
        os.mkfifo(root / "fifo")
        (root / "two").hardlink_to(root / "one")
    fill(duel.a, *odd, "new/f", "new/sub/", "new/link -> f", "deep/a/b/c")
    fill(duel.a, "changed -> new", "kind/")
    fill(duel.dst, "gone/f", "gone/sub/g.txt", "gone.txt", "changed -> old", "kind", "deep/gone")
    fill(duel.a, "dir/file", "unlinked")
    fill(duel.dst, "dir/file/", "unlinked")
    (duel.a / "hard").hardlink_to(duel.a / "unlinked")
    fill(duel.dst, "hard")
    os.mkfifo(duel.a / "newfifo")
    put(duel.dst / "size", b"other size")
    put(duel.dst / "content", b"CONTENT", t=NOON - sum(b"content"))
    (duel.a / "mode").chmod(0o755)
    (duel.a / "dirmode").chmod(0o2750)
    (duel.a / "fifo").chmod(0o600)
    os.chown(duel.a / "owner", STRANGER, STRANGER + 1)
    os.lchown(duel.dst / "link", STRANGER, 0)
    os.setxattr(duel.a / "note", "user.note", b"1")
    os.setxattr(duel.dst / "note.txt", "user.note", b"1")
    for root in (duel.a, duel.dst):
        recent = [spot.path for spot in walk(root) if spot.status.st_mtime_ns > RECENT]
        for path in (b".", *recent):
            os.utime(root / os.fsdecode(path), (NOON - 50,) * 2, follow_symlinks=False)
    os.utime(duel.a / "time", (NOON - 60, NOON - 60))
    os.utime(duel.a / "dirtime", (NOON - 60, NOON - 60))
    os.utime(duel.a / "link", (NOON - 60, NOON - 60), follow_symlinks=False)


def _items(lines: Counter[str]) -> Counter[str]:
    """Keep what is itemized, but for DST's own time."""
    return Counter({line: n for line, n in lines.items() if ITEM.match(line) and line[12:] != "./"})


def _same(one: Counter[str], two: Counter[str]) -> None:
    missing, extra = (sorted(map(ascii, each)) for each in (one - two, two - one))
    assert not missing and not extra, "\n".join(["rsync:", *missing, "bisync:", *extra])


@pytest.mark.parametrize("options", ITEMIZED)
def test_dry_run_says_what_would_be(duel: Duel, options: str):
    """``-n -i``: the same lines as rsync's, in any order, and nothing is written."""
    _itemize_here(duel)
    if "-u" in options.split() and not _updates_other_kinds():
        (duel.dst / "dir/file").rmdir()
        (duel.a / "dir/file").unlink()
        for root in (duel.a, duel.dst):
            os.utime(root / "dir", (NOON - 50,) * 2)
    duel.twin()
    before = frozen(duel.folders[1] / "dst")
    one, two = duel.lines("-n", "-i", *options.split())
    if (
        "-m" in options.split()
    ):  # what rsync would try, and then not do: a file that is excluded is in it
        one.pop("*deleting   gone/sub/")
    assert len(_items(one)) > 8
    _same(_items(one), _items(two))
    assert frozen(duel.folders[1] / "dst") == before


@pytest.mark.parametrize("options", ["-a --delete", "-rlpt", "-aH --delete-after", "-aX -c"])
def test_items_are_the_same_when_it_is_done(duel: Duel, options: str):
    """``-i`` says in a run what it said in the dry one, and in a second run nothing."""
    _itemize_here(duel)
    one, two = duel.lines("-i", *options.split())
    assert len(_items(one)) > 8
    _same(_items(one), _items(two))
    again, ours = duel.lines("-i", *options.split())
    _same(_items(again), _items(ours))


@pytest.mark.parametrize("form", ["%i %n%L", "%n%L", "%o <%n>"])
def test_out_format(duel: Duel, form: str):
    """``--out-format``: one line for each entry, formed as asked; without %i not for attributes."""
    _itemize_here(duel)
    one, two = duel.lines("-a", "--delete", f"--out-format={form}")
    assert sum(one.values()) > 8
    for each in (one, two):
        each.pop(next((line for line in each if "./" in line), ""), None)
    _same(one, two)
