"""Reach a bisync on another machine: the system's ssh runs one there, we talk through its pipes.

ssh decides whom to trust; nothing here ever turns its checks off.
"""

import contextlib
import os
import select
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

from msgspec import Struct

from bisync.core.location import Location
from bisync.endpoint.channel import Channel
from bisync.endpoint.talk import MOST_PATIENCE_S, PATIENCE
from bisync.errors import EndpointError, TimedOutError, UsageError
from bisync.wire.link import SILENCE_S

_PATIENCE_S = 120.0  # until the other end has begun: somebody may have to type a passphrase
_MOST_SAID = 64 << 10  # bytes of the other end's messages that are shown
_LONGEST_LINE = 1000
_GONE_S = 5.0  # for ssh to end after the goodbye
_LATER_S = 5  # the other end gives up after us: who drives says what happened
_AT_ONCE_S = 0.5  # for one whose connection is lost already, or has not begun


class Reach(Struct, frozen=True):
    """How other machines are reached."""

    rsh: str = "ssh"  # a program and its first words, as a shell would split them
    agent_command: str = "bisync"  # the program there; " agent" is appended
    timeout_s: int = 0  # give up on an end that is silent for so long; 0: after a minute
    bwlimit: int = 0  # bytes in a second, each way; 0: no limit
    compress: bool = True
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr)  # noqa: T201


class Connection:
    """A child that leads to another machine, and the channel through it.

    It is on its way from the start; :meth:`begun` waits until it is there.

    Raises:
        EndpointError: the child cannot be started.
    """

    def __init__(self, where: Location, reach: Reach, stop: Callable[[], None]) -> None:
        self._where, self._reach = where, reach
        self._last = ""  # line that the other end said
        words = _words(where, reach)
        try:
            with _keyboard_left_alone():
                self._child = subprocess.Popen(
                    words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
                )
        except OSError as error:
            raise EndpointError(f"cannot start {words[0]}: {error.strerror}") from error
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._relay = threading.Thread(target=self._say, name="bisync-stderr", daemon=True)
        self._relay.start()
        self._timeout_s = timeout_s = min(reach.timeout_s, MOST_PATIENCE_S - _LATER_S)
        self.channel = Channel(
            os.dup(self._child.stdout.fileno()),
            os.dup(self._child.stdin.fileno()),
            first=1,
            compress=reach.compress,
            stop=stop,
            patience=float(timeout_s or _PATIENCE_S),
            silence=float(timeout_s or SILENCE_S),
            pace=_pace(reach.bwlimit),
        )
        self._child.stdin.close()
        self._child.stdout.close()
        self._has_begun = False
        self._code: int | None = None  # what the child ended with, if it did so by itself

    def begun(self) -> Channel:
        """The channel, as soon as the other end has begun.

        Raises:
            EndpointError: it cannot be reached, or there is no bisync that is understood. The
                connection is closed then.
        """
        if self._has_begun:
            return self.channel
        try:
            self.channel.begun()
            if self._timeout_s:
                self.channel.tell(PATIENCE, self._timeout_s + _LATER_S)
        except TimedOutError:
            self.close()
            raise
        except EndpointError as error:
            self.close()
            raise self._why(error) from error
        except BaseException:
            self.close()
            raise
        self._has_begun = True
        return self.channel

    def _say(self) -> None:
        """Relay what the other end says to people, line by line, and not without end."""
        assert self._child.stderr is not None
        left = _MOST_SAID
        with self._child.stderr as stream:
            while line := stream.readline(_LONGEST_LINE):
                text = line.decode("utf-8", "replace").rstrip("\r\n")
                shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
                if shown.strip():
                    self._last = shown
                if left > 0:
                    left -= len(line)
                    self._reach.say(f"{self._where.machine}: {shown}")

    def _why(self, error: EndpointError) -> EndpointError:
        """What a person can do about a connection that did not begin."""
        machine, said = self._where.machine, f" ({self._last})" if self._last else ""
        program = self._reach.agent_command
        match self._code:
            case 255:
                return EndpointError(f"{machine}: ssh could not get there{said}")
            case 127 | 126:
                return EndpointError(
                    f"{machine}: '{program}' could not be run there{said}; install bisync, or say "
                    "where it is with --agent-command"
                )
            case 2:
                return EndpointError(
                    f"{machine}: '{program} agent' was not understood there{said}; is its bisync "
                    "too old?"
                )
        return type(error)(f"{machine}: {error}{said}")

    def close(self) -> None:
        """Say goodbye and let the child end."""
        lost = self.channel.broken or self.channel.is_silent or not self._has_begun
        self.channel.close()
        if self._has_ended(_AT_ONCE_S if lost else _GONE_S):
            self._code = self._child.returncode
        else:
            self._child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(1)
            if self._child.returncode is None:
                self._child.kill()
                self._child.wait()
        self.channel.join()
        self._relay.join(1)

    def _has_ended(self, most_s: float) -> bool:
        """Wait for the child; told by the kernel, for ``Popen.wait`` looks only now and then."""
        if self._child.poll() is None:
            try:
                fd = os.pidfd_open(self._child.pid)
            except OSError:  # not allowed here, or no descriptor left
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._child.wait(most_s)
                return self._child.poll() is not None
            try:
                waiting = select.poll()
                waiting.register(fd, select.POLLIN)
                waiting.poll(most_s * 1000)
            finally:
                os.close(fd)
        return self._child.poll() is not None


@contextlib.contextmanager
def _keyboard_left_alone() -> Iterator[None]:
    """What starts now ignores Ctrl-C: it is for us, who end the run cleanly over that connection.

    In the same session all the same, so that ssh can ask its questions at the terminal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what signals do
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _pace(bwlimit: int) -> Callable[[int], None] | None:
    if not bwlimit:
        return None
    from bisync.fs.pace import Pace  # noqa: PLC0415

    return Pace(bwlimit)


def _words(where: Location, reach: Reach) -> list[str]:
    try:
        words = shlex.split(reach.rsh)
    except ValueError as error:
        raise UsageError(f"--rsh {reach.rsh}: {error}") from error
    if not words:
        raise UsageError("--rsh: an empty command")
    if not reach.agent_command.strip():
        raise UsageError("--agent-command: an empty command")
    if where.port is not None:
        words += ["-p", str(where.port)]
    if where.user is not None:
        words += ["-l", where.user]
    assert where.host is not None
    return [*words, where.host, f"{reach.agent_command} agent"]
