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
    # Without -t a file that rsync copies is of now, and it copies all of them each time.
    "times without -t": lambda d: d.is_time() and "t" not in d.wish.letters,
    # A directory that rsync itself leaves at the moment of its run is nobody's wish.
    "a directory at now": lambda d: d.is_time() and d.judged.kind == "d" and d.rsync > RECENT,
    # rsync leaves a time alone that differs in the fraction of the second only.
    "nanoseconds": lambda d: d.is_of_a_source() and d.apart_s() == 0,
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
        self._twin()
        rules = {name: text for name, text in look(self.base).items() if isinstance(text, bytes)}
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

    def _twin(self) -> None:
        if not self.rounds:
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
            ruling = ("lists/", *RULES)
            shown = {n: t for n, t in each.rules.items() if n.startswith(ruling) or _rules(n)}
            parts += [f"{name!a}: {text!r}" for name, text in shown.items()]
            parts += ["source:", *_listing(each.sources), "DST before:", *_listing(each.before)]
        return "\n".join(parts)


def _rules(path: str) -> bool:
    return path.rpartition("/")[2] in RULES and not path.startswith("bisync/")


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
        if sources == ["src/A/"] and self.chance(0.12):
            options += self._files_from()
        if self.chance(0.8 if self.plot.filtered else 0.5) and (
            "-r" in options or "--files-from=lists/from" not in options
        ):
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

    def _files_from(self) -> list[str]:
        self.nul = self.chance(0.5)
        below = [os.fsdecode(spot.path) for spot in walk(self.duel.a)]
        wanted = self.rng.sample(below, min(len(below), self.rng.randrange(1, 5)))
        wanted += ["no/such"] if self.chance(0.1) else []
        wanted = [self.rng.choice([path, path, f"/{path}", f"./{path}"]) for path in wanted]
        lines = [path for path in wanted if self.nul or "\n" not in path]
        options = [f"--files-from={self._write('from', lines)}"]
        options += [self.rng.choice(["-0", "--from0"])] if self.nul else []
        return [*options, *(["-r"] if self.chance(0.6) else [])]

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
    # rsync gives an existing file the source's mode with the attribute, unasked and not always.
    "X": {"--no-perms"},
}


def _sources(rng: random.Random, a: Path) -> list[str]:
    """Choose what is mirrored: one or two folders, with and without slash, or files."""
    files = [os.fsdecode(s.path) for s in walk(a) if not stat.S_ISDIR(s.status.st_mode)]
    file = f"src/A/{rng.choice(files or ['none'])}"
    one, two = "src/A/", "src/B/"
    ways = [
        *([[one]] * 8),
        *([["src/A"]] * 3),
        *(["src/A/."], [one, two], [two, one], ["src/A", "src/B"], [one, "src/B"], ["src/A", two]),
        *([file], [file, two], [file, "src/B"], [one, "src/none"]),
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
    # Files of rules at the destination are read before the run, as with --delete-before.
    words = ["--delete" if each == "--delete-after" else each for each in wish.options]
    if plot.twice:  # a rename brings its mode along, and -u does not keep what it displaces
        words = [each for each in words if each not in ("-u", "--no-perms")] + ["-p"]
    wish = replace(wish, options=tuple(words))
    spoiled = set().union(*(SPOILED.get(letter, ()) for letter in letters))
    wish = replace(wish, options=tuple(each for each in wish.options if each not in spoiled))
    _never_empty(duel, wish)
    wrong = duel.play(wish)
    if plot.twice and not wrong:
        for maker in makers:
            maker.change(rng.choice([2, 5, 10]))
        if rng.random() < 0.25:
            _meddle(duel, hand, rng.randrange(10**9))
        _never_empty(duel, wish)
        wrong = duel.play(wish)
    return duel, wrong


def _derive(duel: Duel, sources: list[str], hand: Hand, rng: random.Random) -> None:
    """Fill DST with what an earlier mirror would have left there, then change it at random."""
    there = [each for each in sources if os.path.lexists(duel.base / each)]
    line = ["rsync", "-aHAX" if len(there) == 1 else "-aAX", *there, "rsync/dst/"]
    subprocess.run(line, cwd=duel.base, check=True, capture_output=True)
    hand.change(rng.choice([1, 4, 8, 15]))


def _meddle(duel: Duel, hand: Callable[..., Hand], seed: int) -> None:
    """Change both destinations in the same way: DST is observed, not remembered."""
    for folder in duel.folders:
        if (folder / "dst").is_dir():
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
