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

from bisync.core.location import Location
from bisync.errors import EndpointError, TimedOutError, UsageError
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
                self._tell(connection, question)

    def _tell(self, connection: socket.socket, question: dict[str, Any]) -> None:
        """Pass on what happens in the sessions that are meant, also in those to come."""
        ear = Ear()
        heard: dict[Live, contextlib.ExitStack] = {}
        try:
            while not _has_left(connection):
                present = {live: name for name, live in self._meant(question)}
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

    def _meant(self, question: dict[str, Any]) -> Iterator[tuple[str, Live]]:
        return chosen_of(self._sessions(), question.get("session"), question.get("path"))

    def _do(self, question: dict[str, Any]) -> dict[str, Any]:
        what = question["do"]
        chosen = dict(self._meant(question))
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
        elif what in ("events", "find"):
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


def chosen_of(
    sessions: dict[str, Live], word: object, path: object = None
) -> Iterator[tuple[str, Live]]:
    """The sessions that a word means: a name, or a side as it was given, or as a path.

    Args:
        path: where the word leads for who said it; nobody else's folder counts.
    """
    for name, live in sessions.items():
        if (
            word is None
            or word == name
            or any(
                word == where.text if where.is_remote else path == _real(where)
                for where in live.session.locations
            )
        ):
            yield name, live


def _real(where: Location) -> str:
    return os.path.realpath(os.fsdecode(where.path))


def _has_left(connection: socket.socket) -> bool:
    """Whether the other end closed it."""
    try:
        return not connection.recv(1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False


def ask(
    question: dict[str, Any], *, slow: bool = False, silent: list[EndpointError] | None = None
) -> list[dict[str, Any]]:
    """Ask every process of this user that runs sessions.

    A process that does not answer keeps nobody from asking for a session of another one.

    Args:
        question: what; with ``session`` and ``timeout`` in seconds, if there is one.
        slow: the answer may take any time.
        silent: gets why processes did not answer, if others did; else one is one too many where
            no session is named.

    Returns:
        What they say of each session that is meant.

    Raises:
        EndpointError: nobody is there, or who may have the session does not answer.
        TimedOutError: nor did within the question's time.
        UsageError: it was not understood, or nobody has such a session.
    """
    question = _located(question)
    timeout = question.get("timeout")
    patience: float | None
    patience = _ANSWER_S if timeout is None else min(_ANSWER_S, max(float(timeout), _LOOK_S))
    paths, failed = list(_sockets(folder())), list[EndpointError]()
    answers = _answers(paths, {**question, "do": "find"} if slow else question, patience, failed)
    word = question.get("session")
    _require(answers, failed, word, all_of_them=silent is None)
    if slow:  # who is meant is known now, and nobody else is waited for
        meant = [path for path, answer in answers.items() if answer["sessions"]]
        patience = None if timeout is None else float(timeout) + _ANSWER_S
        answers = _answers(meant, question, patience, failed)
        _require(answers, failed, word, all_of_them=True)
    if silent is not None:
        silent += failed
    return [row for answer in answers.values() for row in answer["sessions"]]


def _located(question: dict[str, Any]) -> dict[str, Any]:
    """With where its session leads as a path from here."""
    word = question.get("session")
    return question if word is None else {**question, "path": os.path.realpath(word)}


def _answers(
    paths: list[str], question: dict[str, Any], patience: float | None, silent: list[EndpointError]
) -> dict[str, dict[str, Any]]:
    """What each process answers that is there; all are asked at once.

    Args:
        patience: seconds until one is silent.
        silent: gets why one did not answer.

    Raises:
        UsageError: one did not understand it.
    """

    answers: dict[str, dict[str, Any] | EndpointError | None] = {}

    def asked(path: str) -> None:
        try:
            answers[path] = _asked(path, question, patience)
        except EndpointError as error:
            answers[path] = error

    # Nobody has to wait for one that does not answer, if somebody stops this process.
    threads = [threading.Thread(target=asked, args=(path,), daemon=True) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {}
    for path in paths:
        answer = answers[path]
        if isinstance(answer, EndpointError):
            silent.append(answer)
        elif answer is not None:
            found[path] = answer
    for answer in found.values():
        if answer["code"]:
            raise UsageError(str(answer["said"]))
    return found


def _require(
    answers: dict[str, dict[str, Any]],
    silent: list[EndpointError],
    word: object,
    *,
    all_of_them: bool,
) -> None:
    """Somebody was there, and had what was meant; of all sessions, everybody was."""
    if silent and word is None and all_of_them:
        raise silent[0]
    if any(answer["sessions"] for answer in answers.values()):
        return
    if silent:
        raise silent[0]
    if not answers:
        raise EndpointError(
            "no session runs here; start one with 'bisync watch' or 'bisync daemon'"
        )
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

    question = _located({"do": "events", "session": word})
    answers, silent, left = dict[str, dict[str, Any]](), list[EndpointError](), 0
    with contextlib.ExitStack() as closing:
        for path in _sockets(folder()):
            connection = closing.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            stream = closing.enter_context(connection.makefile("rb"))
            try:
                if not _connect(connection, path, _ANSWER_S):
                    continue
                answer = answers[path] = _answer_of(connection, stream, path, question)
            except EndpointError as error:
                silent.append(error)
                continue
            if answer["code"]:
                raise UsageError(str(answer["said"]))
            if answer["sessions"]:
                connection.settimeout(None)
                closing.callback(connection.shutdown, socket.SHUT_RDWR)  # ends who reads it
                left += 1
                threading.Thread(target=read, args=(stream,), daemon=True).start()
        _require(answers, silent, word, all_of_them=False)
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


def _asked(path: str, question: dict[str, Any], patience: float | None) -> dict[str, Any] | None:
    """The answer of one process; ``None``: it has gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        if not _connect(connection, path, _ANSWER_S if patience is None else patience):
            return None
        connection.settimeout(patience)
        with connection.makefile("rb") as stream:
            return _answer_of(connection, stream, path, question)


def _connect(connection: socket.socket, path: str, patience: float) -> bool:
    """Reach a process; ``False``: it has gone."""
    connection.settimeout(patience)
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
    connection: socket.socket, stream: IO[bytes], path: str, question: dict[str, Any]
) -> dict[str, Any]:
    try:
        connection.sendall(json.dumps(question).encode() + b"\n")
        text = stream.readline()
    except TimeoutError as error:
        late = TimedOutError if question.get("timeout") is not None else EndpointError
        raise late(f"{path}: it does not answer") from error
    except OSError as error:
        raise EndpointError(f"{path}: it does not answer") from error
    if not text:
        raise EndpointError(f"{path}: it ended without an answer")
    answer: dict[str, Any] = json.loads(text)
    return answer
