"""System calls of a run, read from strace's log: the points at which a run can be stopped.

strace counts ``when=N`` per thread *and per call name*, so a point is (name, N): "the 17th
renameat2". A signal that kills is delivered on entry, before the call does anything; a stop signal
takes effect after the call. ``--seccomp-bpf`` would make tracing cheaper, but it swallows injected
signals, so only injected errors can be combined with it.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .place import Pair

WRITING = tuple(
    """write pwrite64 writev pwritev pwritev2 renameat2 renameat rename linkat link unlinkat unlink
    rmdir mkdirat mkdir symlinkat symlink openat creat mknodat mknod ftruncate truncate
    fchmod fchmodat chmod fchown fchownat chown lchown utimensat setxattr fsetxattr lsetxattr
    removexattr fremovexattr lremovexattr fsync fdatasync syncfs sync_file_range
    copy_file_range sendfile ioctl fcntl fallocate""".split()
)
READING = tuple(
    """openat read pread64 preadv preadv2 getdents64 newfstatat statx fstat readlinkat readlink
    getxattr fgetxattr lgetxattr listxattr flistxattr llistxattr name_to_handle_at
    open_by_handle_at""".split()
)
FLUSHING = ("fsync", "fdatasync", "syncfs", "sync_file_range")
NAMING = ("renameat2", "renameat", "rename", "linkat", "link", "unlinkat", "unlink", "symlinkat")

_CREATING = re.compile(r"O_CREAT|O_TRUNC|O_TMPFILE")
_CHANGING_CONTROL = re.compile(r"FICLONE|FS_IOC_(FS)?SET|FIDEDUPE|F_SETLEASE")
_CALL = re.compile(r"^(\d+) +(\w+)\((.*)$")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a reference run."""

    name: str
    nth: int  # counted from 1 per name, in its thread
    thread: int
    text: str

    @property
    def point(self) -> str:
        return f"{self.name}:{self.nth}"


def tracer(log: Path, names: Sequence[str], *injections: str, fast: bool = False) -> list[str]:
    """Return the strace command to put in front of a run.

    Args:
        names: the calls to trace.
        injections: strace expressions such as "fsync:signal=KILL:when=3".
        fast: stop the run at the traced calls only; not together with injected signals.
    """
    known = ",".join(f"?{name}" for name in names)  # "?": not every machine has every call
    line = ["strace", "-f", "-qq", "-y", "-s", "24", "-o", str(log), "-e", f"trace={known}"]
    for injection in injections:
        line += ["-e", f"inject={injection}"]
    return [*line, "--seccomp-bpf"] if fast else line


def calls(log: Path) -> list[Call]:
    """Return the calls in a log, in the order of their entry."""
    seen: Counter[tuple[int, str]] = Counter()
    found = []
    for line in log.read_text(errors="backslashreplace").splitlines():
        if match := _CALL.match(line):
            thread, name, text = int(match[1]), match[2], match[3]
            seen[thread, name] += 1
            found.append(Call(name, seen[thread, name], thread, text))
    return found


def concerns(call: Call, pair: Pair) -> bool:
    """Whether a call can change something in the place of the pair."""
    if str(pair.base) not in call.text:
        return False
    if call.name == "openat":
        return _CREATING.search(call.text) is not None
    if call.name in {"ioctl", "fcntl"}:
        return _CHANGING_CONTROL.search(call.text) is not None
    return True


def points(reference: Sequence[Call], pair: Pair) -> list[Call]:
    """Return the first call of each (name, nth) that concerns the pair, in order of entry."""
    found: dict[str, Call] = {}
    for call in reference:
        if concerns(call, pair):
            found.setdefault(call.point, call)
    return list(found.values())


def reads(reference: Sequence[Call], pair: Pair) -> list[Call]:
    """Return the first call of each (name, nth) that reads from the place of the pair."""
    found: dict[str, Call] = {}
    for call in reference:
        if str(pair.base) in call.text:
            found.setdefault(call.point, call)
    return list(found.values())


def counts_before(reference: Sequence[Call], point: Call) -> Counter[str]:
    """Return how many calls of each name the thread of `point` made before it."""
    made: Counter[str] = Counter()
    for call in reference:
        if call is point:
            break
        if call.thread == point.thread:
            made[call.name] += 1
    return made


def last_lines(log: Path, pair: Pair, count: int = 8) -> str:
    """Return the end of a log, for a failure message."""
    if not log.exists():
        return "    (no log)"
    lines = log.read_text(errors="backslashreplace").replace(f"{pair.base}/", "").splitlines()
    return "\n".join(f"    {line[:240]}" for line in lines[-count:])
