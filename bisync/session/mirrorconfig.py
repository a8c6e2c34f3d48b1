"""What a mirror run is asked to do, and what it tells afterwards."""

from collections.abc import Callable

from msgspec import Struct, field

from bisync.core.filters import Filters
from bisync.core.items import Item
from bisync.core.method import Apply
from bisync.core.node import Kind
from bisync.core.retention import Retention
from bisync.core.wish import Seen, Wish
from bisync.fs.wanted import Wanted
from bisync.session.report import Report


class MirrorConfig(Struct, frozen=True, kw_only=True):
    """What a mirror run is asked to do. The defaults carry nothing but names and contents."""

    wish: Wish = field(default_factory=Wish)
    filters: Filters = field(default_factory=Filters)
    files_from: Wanted | None = None
    one_file_system: bool = False
    prune_empty: bool = False
    ignore_errors: bool = False
    max_delete: int | None = None  # the first so many are done; the guard is off then
    numeric_ids: bool = True  # else owners are those of the same name, if another machine has them
    yes: bool = False  # approve what the guard would withhold
    backup_dir: bytes | None = None  # relative to the destination, or absolute
    keep: bool = True  # displaced versions stay in the store
    retention: Retention | None = field(
        default_factory=Retention
    )  # of the store; None: it is left alone
    whole_files: bool = False  # never make a new version from the old one
    apply: Apply = Apply.AUTO  # how new versions of big files get into place
    bwlimit: int = 0  # bytes in a second; 0: no limit
    wait_s: float | None = None  # for another engine that works there; None: while it lives
    state_dir: str | None = None  # holds the state folder instead of the root
    fsync: bool = True
    workers: int = 2
    stop: Callable[[], None] = lambda: None


class MirrorReport(Report):
    """A report, and what is to be told of single entries."""

    items: list[Item] = field(default_factory=list)
    listed: list[Seen] = field(default_factory=list)  # everything the source has
    walk_s: float = 0.0  # the time it took to list that
    transferred_bytes: int = 0
    transferred: int = 0
    created_kinds: dict[Kind, int] = field(default_factory=dict)
    deleted_kinds: dict[bool, int] = field(default_factory=dict)  # whether a directory
