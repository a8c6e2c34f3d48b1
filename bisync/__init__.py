"""bisync: two-way file synchronisation for Linux. Moves are moves; nothing is ever lost."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bisync.errors import (
    BisyncError,
    BusyError,
    EndpointError,
    HaltError,
    HeldTooLongError,
    PathError,
    RootLockedError,
    UsageError,
)

if TYPE_CHECKING:
    from bisync.core.conflict import Conflict
    from bisync.core.declared import Declared, Hooks, postgresql
    from bisync.core.hot import Allowance
    from bisync.core.ignore import Ignore
    from bisync.core.method import Apply
    from bisync.core.resolve import OneWay, Policy
    from bisync.core.retention import Retention
    from bisync.core.safety import DeleteLimit
    from bisync.core.wish import Wish
    from bisync.endpoint.connect import Reach
    from bisync.endpoint.interface import Endpoint
    from bisync.fs.conflicts import Quarrel, Take
    from bisync.fs.facts import PairFacts, RootFacts, facts
    from bisync.fs.torn import Mended
    from bisync.session.api import plan, sync
    from bisync.session.config import AfterRestore, Config, Fsync
    from bisync.session.conflicts import conflicts, resolve
    from bisync.session.groupfile import read_groups
    from bisync.session.history import Moment, Restored, history, restore
    from bisync.session.live import Live, LiveConfig
    from bisync.session.mirrorconfig import MirrorConfig, MirrorReport
    from bisync.session.mirroring import mirror
    from bisync.session.recover import recover
    from bisync.session.report import Change, Event, Met, Progress, Report
    from bisync.session.session import Session
    from bisync.session.verify import verify
    from bisync.session.why import why
    from bisync.watch.choose import Kind

__version__ = "0.1.0"

# Loaded when first used: the command's help must not wait for the engine.
_LAZY = {
    "AfterRestore": "bisync.session.config",
    "Change": "bisync.session.report",
    "Conflict": "bisync.core.conflict",
    "Config": "bisync.session.config",
    "DeleteLimit": "bisync.core.safety",
    "Endpoint": "bisync.endpoint.interface",
    "Event": "bisync.session.report",
    "Ignore": "bisync.core.ignore",
    "Fsync": "bisync.session.config",
    "Kind": "bisync.watch.choose",
    "Live": "bisync.session.live",
    "LiveConfig": "bisync.session.live",
    "Met": "bisync.session.report",
    "MirrorConfig": "bisync.session.mirrorconfig",
    "MirrorReport": "bisync.session.mirrorconfig",
    "Moment": "bisync.session.history",
    "PairFacts": "bisync.fs.facts",
    "OneWay": "bisync.core.resolve",
    "Policy": "bisync.core.resolve",
    "Progress": "bisync.session.report",
    "Quarrel": "bisync.fs.conflicts",
    "Reach": "bisync.endpoint.connect",
    "Report": "bisync.session.report",
    "Restored": "bisync.session.history",
    "Retention": "bisync.core.retention",
    "RootFacts": "bisync.fs.facts",
    "Session": "bisync.session.session",
    "Allowance": "bisync.core.hot",
    "Declared": "bisync.core.declared",
    "Hooks": "bisync.core.declared",
    "Apply": "bisync.core.method",
    "Mended": "bisync.fs.torn",
    "recover": "bisync.session.recover",
    "Take": "bisync.fs.conflicts",
    "Wish": "bisync.core.wish",
    "conflicts": "bisync.session.conflicts",
    "facts": "bisync.fs.facts",
    "history": "bisync.session.history",
    "mirror": "bisync.session.mirroring",
    "plan": "bisync.session.api",
    "postgresql": "bisync.core.declared",
    "read_groups": "bisync.session.groupfile",
    "resolve": "bisync.session.conflicts",
    "restore": "bisync.session.history",
    "sync": "bisync.session.api",
    "verify": "bisync.session.verify",
    "why": "bisync.session.why",
}

__all__ = [
    "AfterRestore",
    "Allowance",
    "Apply",
    "BisyncError",
    "BusyError",
    "Change",
    "Config",
    "Conflict",
    "Declared",
    "DeleteLimit",
    "Endpoint",
    "EndpointError",
    "Event",
    "Fsync",
    "HaltError",
    "HeldTooLongError",
    "Hooks",
    "Ignore",
    "Kind",
    "Live",
    "LiveConfig",
    "Mended",
    "Met",
    "MirrorConfig",
    "MirrorReport",
    "Moment",
    "OneWay",
    "PairFacts",
    "PathError",
    "Policy",
    "Progress",
    "Quarrel",
    "Reach",
    "Report",
    "Restored",
    "Retention",
    "RootFacts",
    "RootLockedError",
    "Session",
    "Take",
    "UsageError",
    "Wish",
    "__version__",
    "conflicts",
    "facts",
    "history",
    "mirror",
    "plan",
    "postgresql",
    "read_groups",
    "recover",
    "resolve",
    "restore",
    "sync",
    "verify",
    "why",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bisync' has no attribute {name!r}")
