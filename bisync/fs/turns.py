"""One engine at a time works on a root, and whoever else wants to gets a turn.

The right to work is a lock that the kernel takes back when its holder ends. Beside it the holder
hangs out a bell, a socket in the state folder: who finds the lock held rings it, says who it is,
hears who holds the root, and waits. A holder that is at rest, between two runs, gives the root
away at once; one that works does so when its run is over (docs/decisions/0018).
"""

import contextlib
import fcntl
import json
import logging
import os
import random
import select
import socket
import sys
import threading
import time
from collections.abc import Callable

from msgspec import Struct

from bisync.errors import (
    EndpointError,
    HeldSilentlyError,
    HeldTooLongError,
    RootLockedError,
    UsageError,
)
from bisync.linux.closing import close

log = logging.getLogger(__name__)
_NAME = b"socket"
_FREE = b"free\n"
_LONGEST = 4096  # bytes of what either says of itself
_MOST_WAITING = 64
_SAY_S = 1.0  # of waiting before a person hears of it
_LOOK_S = 0.1  # between two looks whether to stop
_NO_BELL_S = 1.0  # a holder that began just now has no bell yet
DEAF_S = 15.0
"""For a holder to say who it is: it needs no engine for that."""
_SAY_AGAIN_S = 60.0
_HANDED_S = 1.0  # for who waited to take what was given away


class Patience(Struct, frozen=True):
    """How to wait for a root that another engine works on."""

    session: str = ""  # whoever holds the other root for the same one waits for us
    seconds: float | None = None  # None: for as long as its holder lives
    stop: Callable[[], None] = lambda: None  # asked now and then; may raise


class Turn:
    """The right to work on a root, held until :meth:`close`.

    Args:
        folder: descriptor of the state folder.
        text: the root, for people.
        wanted: called, on a thread of its own, when somebody else begins to wait for this root.

    Raises:
        RootLockedError: its holder does not answer.
        HeldTooLongError: it answered, and did not give it away in time.
        EndpointError: the folder cannot be locked.
    """

    def __init__(
        self, folder: int, text: str, patience: Patience, wanted: Callable[[], None] | None = None
    ) -> None:
        self._folder, self._text, self._wanted = folder, text, wanted
        self._bell: _Bell | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._lock = os.open(b"lock", flags, 0o600, dir_fd=folder)
        except OSError as error:
            raise EndpointError(f"{text}: cannot lock the root: {error.strerror}") from error
        try:
            if not self._take():
                _Waiting(self._take, folder, text, patience).run()
            self._bell = _Bell.hung_out(folder, self._rung, patience.session)
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for this root."""
        return self._bell is not None and self._bell.waiting > 0

    def _take(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            text = f"{self._text}: cannot lock the root: {error.strerror}"
            raise EndpointError(text) from error
        return True

    def _rung(self) -> None:
        if self._wanted is not None:
            self._wanted()

    def close(self) -> None:
        """Give the root back, and see that who waits gets it before we want it again."""
        if self._bell is not None:
            self._bell.take_in()
        with contextlib.suppress(OSError):
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # also where a child has it still
        close(self._lock)
        if self._bell is not None:
            self._bell.hand_over()


class _Bell:
    """The holder's socket, and those who rang."""

    def __init__(
        self, folder: int, listener: socket.socket, rung: Callable[[], None], session: str
    ) -> None:
        self._folder, self._listener, self._rung = folder, listener, rung
        self._me = _introduced(session)
        self._own, self._waker = socket.socketpair()
        self._said: dict[socket.socket, bytes] = {}  # those who rang, and what they said so far
        self.waiting = 0
        self._thread = threading.Thread(target=self._answer, name="bisync-bell", daemon=True)
        self._thread.start()

    @classmethod
    def hung_out(cls, folder: int, rung: Callable[[], None], session: str) -> "_Bell | None":
        """The bell of a root that is held; ``None`` where there can be no sockets."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(_NAME, dir_fd=folder)
            os.fchmod(listener.fileno(), 0o600)  # the socket gets it when it gets its name
            listener.bind(_address(folder))
            listener.listen(_MOST_WAITING)
        except OSError as error:
            log.info("no-bell error=%s", error)
            listener.close()
            return None
        listener.setblocking(False)
        return cls(folder, listener, rung, session)

    def _answer(self) -> None:
        """Say who holds the root to everybody who rings."""
        while True:
            ready = _ready([self._own, self._listener, *self._said], None)
            if self._own in ready:
                return
            for one in ready:
                if one is self._listener:
                    self._meet()
                elif not self._hears(one):
                    del self._said[one]
                    one.close()
            self.waiting = len(self._said)

    def _meet(self) -> None:
        try:
            one, _ = self._listener.accept()
        except OSError:
            return  # it went away again
        if len(self._said) >= _MOST_WAITING:
            one.close()
            return
        one.setblocking(False)
        try:
            one.send(self._me)
        except OSError:
            one.close()
            return
        self._said[one] = b""

    def _hears(self, one: socket.socket) -> bool:
        """Take what somebody says; whether it still waits."""
        try:
            data = one.recv(_LONGEST)
        except BlockingIOError:
            return True
        except OSError:
            return False
        before = self._said[one]
        if not data or len(before) + len(data) > _LONGEST:
            return False
        self._said[one] = before + data
        if data.endswith(b"\n") and not before.endswith(b"\n"):
            self.waiting = len(self._said)
            log.info("root-wanted by=%r", data)
            threading.Thread(target=self._rung, name="bisync-rung", daemon=True).start()
        return True

    def take_in(self) -> None:
        """Nobody can ring any more; the lock is still held."""
        self._waker.send(b"x")
        self._thread.join()
        with contextlib.suppress(OSError):
            os.unlink(_NAME, dir_fd=self._folder)
        self._listener.close()

    def hand_over(self) -> None:
        """The lock is free: let those who wait have it first."""
        deadline = time.monotonic() + _HANDED_S
        waiting = []
        for one in self._said:
            with contextlib.suppress(OSError):
                one.send(_FREE)
                waiting.append(one)
        while waiting and (left := deadline - time.monotonic()) > 0:
            if any(_has_gone(one) for one in _ready(waiting, left)):
                break  # one has it, and closed its end; the others try again with that one
        for one in (*self._said, self._own, self._waker):
            one.close()


def _ready(sockets: list[socket.socket], seconds: float | None) -> list[socket.socket]:
    """Those that have something to be read; any number of descriptors may be open."""
    poll = select.poll()
    for one in sockets:
        poll.register(one, select.POLLIN)
    numbers = {fd for fd, _ in poll.poll(None if seconds is None else seconds * 1000)}
    return [one for one in sockets if one.fileno() in numbers]


def _has_gone(one: socket.socket) -> bool:
    try:
        return not one.recv(_LONGEST)
    except BlockingIOError:
        return False
    except OSError:
        return True


class _Waiting:
    """Waits for a root that is held."""

    def __init__(
        self, take: Callable[[], bool], folder: int, text: str, patience: Patience
    ) -> None:
        self._take, self._folder, self._text = take, folder, text
        self._patience = patience
        self._end = None if patience.seconds is None else time.monotonic() + patience.seconds
        self._holder, self._began = "", time.monotonic()

    def run(self) -> None:
        """Wait, and take it."""
        silent_since = time.monotonic()
        while not self._take():
            bell = self._ring()
            if bell is None:
                if time.monotonic() - silent_since > _NO_BELL_S:
                    raise RootLockedError(
                        f"{self._text}: another bisync works on this root, and does not answer; "
                        "wait for it or stop it"
                    )
                self._pause()
                continue
            with bell:
                self._listen(bell)
                if self._take():
                    return  # the bell's end tells the holder that its root has a new one
            self._pause()
            silent_since = time.monotonic()

    def _ring(self) -> socket.socket | None:
        bell = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        bell.settimeout(_LOOK_S)
        try:
            bell.connect(_address(self._folder))
            bell.sendall(_introduced(self._patience.session))
        except OSError as error:
            log.info("cannot-ring error=%s", error)
            bell.close()
            return None
        return bell

    def _listen(self, bell: socket.socket) -> None:
        """Until the holder gives the root away, or is gone."""
        heard, asked = b"", time.monotonic()
        while True:
            self._look(bell)
            try:
                data = bell.recv(_LONGEST)
            except TimeoutError:
                if not heard and time.monotonic() - asked > DEAF_S:
                    raise RootLockedError(
                        f"{self._text}: another bisync holds this root, and does not answer"
                    ) from None
                continue
            except OSError:
                return
            if not data:
                return
            heard = (heard + data)[-2 * _LONGEST :]
            if not self._holder and b"\n" in heard:
                self._holder, session = _described(heard.split(b"\n")[0])
                if session and session == self._patience.session:
                    raise UsageError(f"{self._text}: both sides are the same directory")
            if heard.endswith(_FREE):
                return

    def _say(self) -> None:
        """For whom we wait, once, if it takes a while."""
        now = time.monotonic()
        if self._holder and now - self._began > _SAY_S:
            key = (self._text, self._holder)
            if now - _said.get(key, -_SAY_AGAIN_S) < _SAY_AGAIN_S:
                return
            _said.clear()
            _said[key] = now
            log.warning("%s: waiting for %s, which works on it", self._text, self._holder)

    def _pause(self) -> None:
        self._look(None)
        time.sleep(0.02 + 0.02 * random.random())  # noqa: S311 -- so that two do not meet for ever

    def _look(self, bell: socket.socket | None) -> None:
        """Give up when told to, or when it took too long."""
        self._patience.stop()
        self._say()
        if self._end is None:
            return
        left = self._end - time.monotonic()
        if left <= 0:
            kind = HeldTooLongError if self._holder else HeldSilentlyError
            holder = self._holder or "another bisync"
            raise kind(f"{self._text}: {holder} still works on this root")
        if bell is not None:
            bell.settimeout(min(_LOOK_S, left))


_said: dict[tuple[str, str], float] = {}  # for whom we wait, and when that was said


def _introduced(session: str) -> bytes:
    """What one says of itself to the other."""
    about = {"pid": os.getpid(), "who": _who(), "session": session}
    return json.dumps(about).encode() + b"\n"


def _described(data: bytes) -> tuple[str, str]:
    """Who holds a root, for people, and for which session; it may say anything."""
    try:
        found = json.loads(data)
        who, pid, session = str(found["who"])[:200], int(found["pid"]), str(found["session"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return "another bisync", ""
    return f"{''.join(c for c in who if c.isprintable())} (process {pid})", session


def _address(folder: int) -> bytes:
    """The bell's, however long the root's path is."""
    return b"/proc/self/fd/%d/%s" % (folder, _NAME)


def _who() -> str:
    """What this process is, for people: its command."""
    words = [os.path.basename(sys.argv[0] or "python"), *sys.argv[1:2]]
    return " ".join(words)[:200]
