"""How a session behaves. One frozen value travels through everything."""

from collections.abc import Callable
from enum import Enum

from msgspec import Struct, field

from bisync.core.declared import Declared
from bisync.core.hot import Allowance
from bisync.core.ignore import Ignore, Matcher
from bisync.core.method import BASE_CLONES, Apply
from bisync.core.path import STORE_DIR, display, valid_name
from bisync.core.resolve import OneWay, Policy
from bisync.core.retention import Retention
from bisync.core.safety import DeleteLimit
from bisync.errors import UsageError


class AfterRestore(Enum):
    """What to do when one side's state is an older link of the other's chain."""

    FORWARD = "forward"  # merge from the older agreed state
    KEEP = "keep"  # the restored tree is the truth
    MERGE = "merge"  # agree anew; delete nothing


class Fsync(Enum):
    """When new data is made durable."""

    BATCH = "batch"  # before it becomes visible, a batch at a time
    ALWAYS = "always"  # one transition at a time
    NEVER = "never"  # leave it to the kernel; a power cut may cost what was applied


class Config(Struct, frozen=True, kw_only=True):
    """Everything a person may choose about a session; the defaults are the safe ones."""

    conflict: Policy = Policy.NEWEST
    one_way: OneWay | None = None  # beta becomes what alpha is; None: both count
    ignore: Ignore = field(default_factory=Ignore)
    max_delete: DeleteLimit = field(default_factory=DeleteLimit)
    yes: bool = False  # approve what the deletion guard would withhold, in this run
    accept_root: bool = False  # approve a root that is not the recorded one
    after_restore: AfterRestore | None = None
    checksum: bool = False  # read files that were, or would be, taken for equal by size and time
    specials: bool = False  # carry FIFOs and sockets
    devices: bool = False  # carry device nodes
    store: bytes = STORE_DIR  # the rollback store's path below each root
    state_dir: str | None = None  # holds the state folders instead of the roots
    retention: Retention = field(default_factory=Retention)  # of kept versions
    fsync: Fsync = Fsync.BATCH
    apply: Apply = Apply.AUTO  # how new versions of big files get into place
    groups: tuple[Declared, ...] = ()  # directories whose files are one thing together
    hot: Ignore = field(default_factory=Ignore)  # files to take before their writer closes them
    allowance: Allowance | None = field(
        default_factory=Allowance
    )  # of files that are never closed; None: they may cost anything
    base_clones: int = BASE_CLONES  # how many big files may have a frozen clone of what is known
    wait_s: float | None = None  # for another engine that works on a root; None: while it lives
    workers: int = 2  # threads that read, hash and flush
    chunk: int = 2000  # marks decided at a time; bounds memory
    stop: Callable[[], None] = lambda: None  # raises Interrupted when a stop was asked for

    def __post_init__(self) -> None:
        if self.base_clones < 0:
            raise UsageError("the number of base clones cannot be below 0")
        parts = self.store.split(b"/")
        if not all(map(valid_name, parts)) or parts[0] == b".bisync":
            raise UsageError("the rollback folder must be a path below the root")
        paths = [group.path + b"/" for group in self.groups]
        for i, path in enumerate(paths):
            if any(path.startswith(other) for other in paths[:i] + paths[i + 1 :]):
                raise UsageError(f"{display(path[:-1])} is part of another group")

    @property
    def merging(self) -> str:
        """What a run without a memory of both sides does, for people."""
        if self.one_way is None:
            return "the trees are merged, nothing is deleted"
        return "they are compared by names; what only the replica has goes to its store"

    def matcher(self) -> Matcher:
        """What is left alone, in the trees and in groups.

        Raises:
            UsageError: a pattern cannot be understood.
        """
        return Ignore(self.patterns()).matcher()

    def patterns(self) -> tuple[str, ...]:
        """What is left alone, in gitignore syntax."""
        inside = [pattern for group in self.groups for pattern in group.patterns]
        return (*self.ignore.patterns, *inside)
