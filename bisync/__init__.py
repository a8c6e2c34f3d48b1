"""bisync: two-way file synchronisation for Linux. Moves are moves; nothing is ever lost."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bisync.errors import (
    BisyncError,
    BusyError,
    EndpointError,
    HaltError,
    PathError,
    RootLockedError,
    UsageError,
)

if TYPE_CHECKING:
    from bisync.core.ignore import Ignore
    from bisync.core.resolve import Policy
    from bisync.core.safety import DeleteLimit
    from bisync.endpoint.interface import Endpoint
    from bisync.session.api import plan, sync
    from bisync.session.config import Config
    from bisync.session.report import Change, Event, Met, Progress, Report
    from bisync.session.session import Session

__version__ = "0.1.0"

# Loaded when first used: the command's help must not wait for the engine.
_LAZY = {
    "Change": "bisync.session.report",
    "Config": "bisync.session.config",
    "DeleteLimit": "bisync.core.safety",
    "Endpoint": "bisync.endpoint.interface",
    "Event": "bisync.session.report",
    "Ignore": "bisync.core.ignore",
    "Met": "bisync.session.report",
    "Policy": "bisync.core.resolve",
    "Progress": "bisync.session.report",
    "Report": "bisync.session.report",
    "Session": "bisync.session.session",
    "plan": "bisync.session.api",
    "sync": "bisync.session.api",
}

__all__ = [
    "BisyncError",
    "BusyError",
    "Change",
    "Config",
    "DeleteLimit",
    "Endpoint",
    "EndpointError",
    "Event",
    "HaltError",
    "Ignore",
    "Met",
    "PathError",
    "Policy",
    "Progress",
    "Report",
    "RootLockedError",
    "Session",
    "UsageError",
    "__version__",
    "plan",
    "sync",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bisync' has no attribute {name!r}")
