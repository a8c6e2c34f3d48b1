"""Stands in for ssh, and is a bad line: it delays, cuts or stalls what passes.

Told by the environment: ``RELAY_DELAY`` (seconds, each way), ``RELAY_CUT`` (``up:N`` or ``down:N``:
after so many bytes towards the other machine, or from it, everything ends), ``RELAY_STALL``
(likewise: nothing passes any more, and nothing ends), ``RELAY_COUNT`` (a file that gets the bytes
that passed, up and down), ``RELAY_KILL`` (likewise as the cut: the other end is killed first),
``RELAY_FLIP`` (the bits of that one byte are others).
"""

import collections
import contextlib
import os
import select
import subprocess
import sys
import threading
import time

SIZE = 1 << 16


def limit(name: str, way: str) -> int | None:
    """After how many bytes of a direction something happens."""
    where, _, count = os.environ.get(name, "").partition(":")
    return int(count) if where == way else None


class Pipe(threading.Thread):
    """One direction."""

    def __init__(self, way: str, source: int, target: int, child: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self.way, self.source, self.target, self.child = way, source, target, child
        self.passed = 0
        self.delay = float(os.environ.get("RELAY_DELAY", "0"))
        self.waiting: collections.deque[tuple[float, bytes]] = collections.deque()

    def run(self) -> None:
        """Pass on what comes, late."""
        with contextlib.suppress(OSError):
            while True:
                now = time.monotonic()
                while self.waiting and self.waiting[0][0] <= now:
                    self.put(self.waiting.popleft()[1])
                wait = self.waiting[0][0] - now if self.waiting else None
                if select.select([self.source], [], [], wait)[0]:
                    data = os.read(self.source, SIZE)
                    if not data:
                        break
                    self.waiting.append((time.monotonic() + self.delay, data))
            for _, data in self.waiting:
                time.sleep(self.delay)
                self.put(data)
        with contextlib.suppress(OSError):
            os.close(self.target)

    def put(self, data: bytes) -> None:
        """Pass bytes on, as far as nothing happens."""
        flip = limit("RELAY_FLIP", self.way)
        if flip is not None and 0 <= flip - self.passed < len(data):
            at = flip - self.passed
            data = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        stall, cut = limit("RELAY_STALL", self.way), limit("RELAY_CUT", self.way)
        kill = limit("RELAY_KILL", self.way)
        most = min((n for n in (stall, cut, kill) if n is not None), default=None)
        over = most is not None and self.passed + len(data) >= most
        if over:
            assert most is not None
            data = data[: most - self.passed]
        while data:
            data = data[self.sent(os.write(self.target, data)) :]
        if over and most == stall:
            threading.Event().wait()
        if over:
            if most == kill:
                self.child.kill()
                self.child.wait()
            finish(1)

    def sent(self, count: int) -> int:
        """Count what passed."""
        self.passed += count
        return count


def finish(code: int) -> None:
    """Say what passed, and end."""
    name = os.environ.get("RELAY_COUNT")
    if name:
        with open(name, "w", encoding="ascii") as file:
            file.write(f"{pipes[0].passed} {pipes[1].passed}\n")
    os._exit(code)


words = sys.argv[1:]
while words and words[0].startswith("-"):
    del words[: 2 if words[0] in ("-p", "-l", "-o", "-i") else 1]
far = subprocess.Popen(
    ["sh", "-c", " ".join(words[1:])], stdin=subprocess.PIPE, stdout=subprocess.PIPE
)
assert far.stdin is not None
assert far.stdout is not None
pipes = [
    Pipe("up", 0, os.dup(far.stdin.fileno()), far),
    Pipe("down", far.stdout.fileno(), 1, far),
]
far.stdin.close()
for pipe in pipes:
    pipe.start()
pipes[1].join()
finish(far.wait())
