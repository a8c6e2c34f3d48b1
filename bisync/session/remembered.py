"""What the roots on this machine remember of a session, and where they are."""

import contextlib
import os

from bisync.core.location import Location
from bisync.errors import UsageError
from bisync.fs.facts import facts
from bisync.session.session import Session


def last_complete(session: Session) -> int | None:
    """When all was done in an earlier life (ns since 1970); ``None``: unknown."""
    if session.config.state_dir is not None:
        return None
    times = []
    for here, there in (session.locations, session.locations[::-1]):
        with contextlib.suppress(UsageError):
            times += [] if here.is_remote else [facts(here.path).complete_with(there)]
    return max((time for time in times if time is not None), default=None)


def absolute(where: Location) -> str:
    """A location as it is understood in any folder."""
    return where.text if where.is_remote else os.path.abspath(where.text)
