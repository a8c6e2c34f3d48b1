"""What a person asks of the sessions that run on this machine, over a socket of the user's own.

A line of JSON each way: ``{"do": "status", "session": "NAME or path of a side"}``, and an answer
with ``code`` (an exit code), ``said`` and ``sessions``. Behind the answer to ``events`` come the
events, a line each, until one end has enough.
"""

import contextlib
import json
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import IO, Any

from bisync.errors import EndpointError, UsageError
from bisync.session.hearing import Ear
from bisync.session.live import Live

log = logging.getLogger(__name__)
_LONGEST = 1 << 20  # bytes of a question
_ANSWER_S = 5.0  # for a process to answer what needs no run
_LOOK_S = 1.0  # for new sessions, and for whoever does not listen any more
_SUFFIX = ".socket"


def folder() -> str:
    """Where the sockets are; made if need be.

    Raises:
        UsageError: somebody else's folder is in the way.
    """
    where = os.environ.get("BISYNC_RUNTIME_DIR")
    if where is None:
        uid = os.geteuid()
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        if uid == 0:
            where = "/run/bisync"
        elif runtime is not None and os.path.isdir(runtime):
            where = f"{runtime}/bisync"
        else:
            where = f"/tmp/bisync-{uid}"  # noqa: S108 -- whose it is, is looked at below
    try:
        os.makedirs(where, 0o700, exist_ok=True)
        info = os.lstat(where)
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror}; set BISYNC_RUNTIME_DIR") from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
        raise UsageError(f"{where}: it is not this user's alone; set BISYNC_RUNTIME_DIR")
    return where


class Server:
    """Answers for the sessions of this process.

    Args:
        name: of the socket.
        sessions: by name; may change.
    """

    def __init__(self, name: str, sessions: Callable[[], dict[str, Live]]) -> None:
        self._sessions = sessions
        self._path = os.path.join(folder(), name + _SUFFIX)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            os.fchmod(self._listener.fileno(), 0o600)
            # Who finds the name finds somebody who listens: others remove what nobody answers.
            early = f"{self._path}.{os.getpid()}"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(early)
            with _short(early) as address:
                self._listener.bind(address)
            self._listener.listen(16)
            os.rename(early, self._path)
        except OSError as error:
            self._listener.close()
            raise EndpointError(f"{self._path}: {error.strerror}") from error
        self._thread = threading.Thread(target=self._serve, name="bisync-control", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # it was closed
            threading.Thread(
                target=self._answer, args=(connection,), name="bisync-asked", daemon=True
            ).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            with connection.makefile("rb") as stream:
                text = stream.readline(_LONGEST)
            question: dict[str, Any] = {}
            try:
                question = json.loads(text)
                answer = self._do(question)
            except UsageError as error:
                answer = {"code": 2, "said": str(error)}
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                answer = {"code": 2, "said": f"not understood: {error}"}
            connection.sendall(json.dumps(answer).encode() + b"\n")
            if answer["code"] == 0 and answer["sessions"] and question["do"] == "events":
                self._tell(connection, question.get("session"))

    def _tell(self, connection: socket.socket, word: object) -> None:
        """Pass on what happens in the sessions that a word means, also in those to come."""
        ear = Ear()
        heard: dict[Live, contextlib.ExitStack] = {}
        try:
            while not _has_left(connection):
                present = {live: name for name, live in chosen_of(self._sessions(), word)}
                for live in heard.keys() - present.keys():
                    heard.pop(live).close()
                for live, name in present.items():
                    if live not in heard:
                        ear.put({"type": "listening", "session": name})
                        heard[live] = contextlib.ExitStack()
                        heard[live].enter_context(live.heard(ear.listener(name)))
                rows = ear.take(_LOOK_S)
                connection.sendall(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        finally:
            for each in heard.values():
                each.close()

    def _do(self, question: dict[str, Any]) -> dict[str, Any]:
        what = question["do"]
        chosen = dict(chosen_of(self._sessions(), question.get("session")))
        answer: dict[str, Any] = {"code": 0, "said": "", "sessions": []}
        if what == "status":
            answer["sessions"] = [
                {"session": name, "pid": os.getpid(), **live.status()}
                for name, live in chosen.items()
            ]
        elif what in ("wait", "flush"):
            timeout = question.get("timeout")
            end = None if timeout is None else time.monotonic() + float(timeout)
            for name, live in chosen.items():
                left = None if end is None else max(0.0, end - time.monotonic())
                code, said = live.wait(left, everything=what == "flush")
                answer["sessions"].append({"session": name, "code": code, "said": said})
        elif what in ("pause", "resume"):
            for name, live in chosen.items():
                if what == "pause":
                    live.pause()
                else:
                    live.resume(
                        yes=question.get("yes") is True,
                        accept_root=question.get("accept_root") is True,
                    )
                answer["sessions"].append({"session": name, "code": 0, "said": ""})
        elif what == "events":
            answer["sessions"] = [{"session": name} for name in chosen]
        else:
            raise UsageError(f"{what}: nobody does that here")
        return answer

    def close(self) -> None:
        """Answer nothing more."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def chosen_of(sessions: dict[str, Live], word: object) -> Iterator[tuple[str, Live]]:
    """The sessions that a word means: a name, or a side as it was given, or as a path."""
    for name, live in sessions.items():
        sides = [where.text for where in live.session.locations]
        if word is None or word == name or word in sides or _leads_to(word, sides):
            yield name, live


def _leads_to(word: object, sides: list[str]) -> bool:
    real = os.path.realpath(word) if isinstance(word, str) else None
    return real is not None and any(real == os.path.realpath(side) for side in sides)


def _has_left(connection: socket.socket) -> bool:
    """Whether the other end closed it."""
    try:
        return not connection.recv(1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False


def ask(question: dict[str, Any], *, slow: bool = False) -> list[dict[str, Any]]:
    """Ask every process of this user that runs sessions.

    Args:
        question: what.
        slow: the answer may take any time.

    Returns:
        What they say of each session that is meant.

    Raises:
        EndpointError: nobody is there, or nobody has such a session.
        UsageError: it was not understood.
    """
    where = folder()
    found: list[dict[str, Any]] = []
    there = False
    for path in _sockets(where):
        answer = _asked(path, question, slow=slow)
        if answer is None:
            continue
        there = True
        if answer["code"]:
            raise UsageError(str(answer["said"]))
        found += answer["sessions"]
    _require(there, found, question.get("session"))
    return found


def _require(there: bool, found: object, word: object) -> None:
    """Somebody was there, and had what was meant."""
    if not there:
        raise EndpointError(
            "no session runs here; start one with 'bisync watch' or 'bisync daemon'"
        )
    if not found:
        raise UsageError(f"{word}: no session is called that, nor has that side")


def follow(word: str | None) -> Iterator[dict[str, Any]]:
    """What happens in the sessions that a word means, in all processes that run some now.

    Raises:
        EndpointError: nobody is there, or nobody is left.
        UsageError: nobody has such a session.
    """
    happened: SimpleQueue[dict[str, Any] | None] = SimpleQueue()

    def read(stream: IO[bytes]) -> None:
        try:
            with contextlib.suppress(OSError, ValueError):  # it was killed, perhaps within a line
                for text in stream:
                    happened.put(json.loads(text))
        finally:
            happened.put(None)

    question = {"do": "events", "session": word}
    there, left = False, 0
    with contextlib.ExitStack() as closing:
        for path in _sockets(folder()):
            connection = closing.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            if not _connect(connection, path):
                continue
            there = True
            stream = closing.enter_context(connection.makefile("rb"))
            answer = _answer_of(connection, stream, path, question, slow=False)
            if answer["code"]:
                raise UsageError(str(answer["said"]))
            if answer["sessions"]:
                connection.settimeout(None)
                closing.callback(connection.shutdown, socket.SHUT_RDWR)  # ends who reads it
                left += 1
                threading.Thread(target=read, args=(stream,), daemon=True).start()
        _require(there, left, word)
        while left:
            row = happened.get()
            if row is None:
                left -= 1
            else:
                yield row
    raise EndpointError("no session runs here any more")


@contextlib.contextmanager
def _short(path: str) -> Iterator[str]:
    """An address of a socket, whose own path may be longer than the kernel takes (108 bytes)."""
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{os.path.basename(path)}"
    finally:
        os.close(fd)


def _sockets(where: str) -> Iterable[str]:
    return [os.path.join(where, n) for n in sorted(os.listdir(where)) if n.endswith(_SUFFIX)]


def _asked(path: str, question: dict[str, Any], *, slow: bool) -> dict[str, Any] | None:
    """The answer of one process; ``None``: it has gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        if not _connect(connection, path):
            return None
        with connection.makefile("rb") as stream:
            return _answer_of(connection, stream, path, question, slow=slow)


def _connect(connection: socket.socket, path: str) -> bool:
    """Reach a process; ``False``: it has gone."""
    connection.settimeout(_ANSWER_S)
    try:
        with _short(path) as address:
            connection.connect(address)
    except (ConnectionRefusedError, FileNotFoundError):
        with contextlib.suppress(OSError):
            os.unlink(path)  # left by one that was killed
        return False
    except OSError as error:
        raise EndpointError(f"{path}: {error.strerror or 'does not answer'}") from error
    return True


def _answer_of(
    connection: socket.socket, stream: IO[bytes], path: str, question: dict[str, Any], *, slow: bool
) -> dict[str, Any]:
    try:
        connection.settimeout(None if slow else _ANSWER_S)
        connection.sendall(json.dumps(question).encode() + b"\n")
        text = stream.readline()
    except OSError as error:
        raise EndpointError(f"{path}: it does not answer") from error
    if not text:
        raise EndpointError(f"{path}: it ended without an answer")
    answer: dict[str, Any] = json.loads(text)
    return answer
