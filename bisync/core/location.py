"""Where a root is: a path on this machine, or one on another as ssh knows it."""

import re

from msgspec import Struct

from bisync.errors import UsageError

_MACHINE = rb"(?:([^@/]+)@)?(\[[0-9A-Za-z:.%]+\]|[^:/\[\]]+)"
_URL = re.compile(rb"ssh://" + _MACHINE + rb"(?::([0-9]+))?(/.*)?", re.DOTALL)
_SHORT = re.compile(_MACHINE + rb":(.*)", re.DOTALL)


class Location(Struct, frozen=True):
    """A path, and the machine that it is on."""

    path: bytes
    host: str | None = None  # None: this machine
    user: str | None = None
    port: int | None = None

    @property
    def is_remote(self) -> bool:
        """Whether it is on another machine."""
        return self.host is not None

    @property
    def machine(self) -> str:
        """The other machine, as a person writes it."""
        return f"{self.user}@{self.host}" if self.user else str(self.host)

    @property
    def text(self) -> str:
        """As a person writes it."""
        path = self.path.decode("utf-8", "backslashreplace")
        if self.port is not None:
            return f"ssh://{self.machine}:{self.port}{path}"
        return f"{self.machine}:{path}" if self.is_remote else path


def location(text: bytes) -> Location:
    """Take ``PATH``, ``[USER@]HOST:PATH`` or ``ssh://[USER@]HOST[:PORT]/PATH`` apart.

    As with rsync, a colon before the first slash means another machine; write ``./a:b`` for a path.

    Raises:
        UsageError: it cannot be understood.
    """
    shown = text.decode("utf-8", "backslashreplace")
    if text.startswith(b"rsync://") or re.match(rb"[^/\[]*::", text):
        raise UsageError(f"{shown}: there is no rsync daemon protocol here; use HOST:PATH over ssh")
    port = None
    if text.startswith(b"ssh://"):
        found = _URL.fullmatch(text)
        if found is None or not found[4]:
            raise UsageError(f"{shown}: write ssh://[USER@]HOST[:PORT]/PATH")
        path = found[4]
        if found[3] is not None:
            port = int(found[3])
            if not 0 < port < 65536:
                raise UsageError(f"{shown}: no such port")
    else:
        if b":" not in text.split(b"/", 1)[0]:
            return Location(text)
        found = _SHORT.fullmatch(text)
        if found is None:
            raise UsageError(f"{shown}: write [USER@]HOST:PATH, or ./PATH for one of this machine")
        path = found[3]
    user = None if found[1] is None else found[1].decode("utf-8", "replace")
    host = found[2].decode("utf-8", "replace").removeprefix("[").removesuffix("]")
    for word in (user or "", host):
        # Neither may be taken for an option by ssh, whatever a script puts in here.
        if word.startswith("-") or any(c.isspace() or not c.isprintable() for c in word):
            raise UsageError(f"{shown}: that is no name of a machine or user")
    if b"\0" in path:
        raise UsageError(f"{shown}: a path cannot hold a NUL")
    return Location(path or b".", host, user, port)
