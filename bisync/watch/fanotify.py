"""fanotify: one mark for a whole file system, no watch for each directory, no limit, no race.

It reports everybody's events of that file system; a bounded cache knows which directories are below
the root, so those that are not cost next to nothing.
"""

import errno
import logging
import os
import select
import threading

from bisync.linux.fanotify import (
    CLOSE_WRITE,
    CREATE,
    DELETE,
    MODIFY,
    ON_DIR,
    OVERFLOW,
    RENAME,
    Event,
    events,
    mark_file_system,
    open_group,
)
from bisync.linux.handle import HandleReader, open_by_handle
from bisync.watch.interface import (
    AT_ONCE,
    CREATED,
    VACATED,
    WRITTEN,
    Coverage,
    Pace,
    Scope,
    Sink,
    Spot,
    UnavailableError,
)
from bisync.watch.newborn import Newborn
from bisync.watch.tokens import make_folder, make_token

log = logging.getLogger(__name__)
_READ = 1 << 18
_MOST_PATHS = 100_000
_PAUSE_S, _MOST_PAUSE_S = 1.0, 60.0  # after a failed read
_UNKNOWN = b"//"
"""The path of a directory that is too long to be asked for: it may be anywhere."""


class FanotifyWatcher:
    """Watches the file system that a root is on.

    Raises:
        UnavailableError: the kernel, the file system or our rights do not allow it.
    """

    def __init__(self, scope: Scope, sink: Sink) -> None:
        self._scope, self._sink = scope, sink
        self._paths: dict[bytes, bytes | None] = {}  # by handle; None: outside, or of no interest
        self._newborn: Newborn[tuple[bytes, bytes]] = Newborn()
        self._token_handle = b""
        self._wake, self._waker = os.pipe()
        self._group = self._root = -1
        try:
            self._root = os.open(scope.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._base = os.readlink(b"/proc/self/fd/%d" % self._root).rstrip(b"/")
            self._here = self._base  # where it is now
            handle = HandleReader().read(self._root, b"")
            if handle.startswith(b"born"):
                raise UnavailableError("fanotify: the file system has no handles")
            opened = open_by_handle(self._root, handle)
            if opened is None:
                raise UnavailableError("fanotify: the root cannot be opened by its handle")
            os.close(opened)
            self._group = open_group()
            mark_file_system(self._group, self._root)
        except OSError as error:
            self._free()
            raise UnavailableError(f"fanotify: {error.strerror}") from error
        except UnavailableError:
            self._free()
            raise
        self._thread = threading.Thread(target=self._read, name="bisync-fanotify", daemon=True)
        self._thread.start()

    def _free(self) -> None:
        for fd in (self._wake, self._waker, self._group, self._root):
            if fd >= 0:
                os.close(fd)

    # -- events, on the reader's thread --------------------------------------

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._group, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        pause = _PAUSE_S
        while not any(fd == self._wake for fd, _ in poll.poll()):
            try:
                data = os.read(self._group, _READ)
                pause = _PAUSE_S
            except BlockingIOError:
                continue
            except OSError as error:
                self._sink.lost(f"events cannot be read: {error.strerror}")
                if select.select([self._wake], [], [], pause)[0]:
                    return
                pause = min(2 * pause, _MOST_PAUSE_S)
                continue
            try:
                for event in events(data):
                    self._came(event)
            except Exception as error:  # noqa: BLE001 -- nobody would hear of anything any more
                log.warning("watcher-failed error=%r", error)
                self._paths.clear()
                self._sink.lost(f"the watcher failed: {type(error).__name__}: {error}")

    def _came(self, event: Event) -> None:
        if event.mask & OVERFLOW:
            log.warning("%s: the queue of events overflowed", os.fsdecode(self._base))
            self._paths.clear()
            self._sink.lost("events were lost: the kernel's queue overflowed")
            return
        for position, (handle, name) in enumerate(event.names):
            if handle == self._token_handle:
                if name.isdigit() and event.mask & CREATE:
                    self._sink.token(int(name))
                continue
            path = self._path(handle)
            if path is _UNKNOWN:
                self._sink.touched(Spot(b"", handle), AT_ONCE)
            elif path is not None:
                self._happened(event, handle, path, name, old=position + 1 < len(event.names))
        if event.mask & ON_DIR and event.mask & (RENAME | DELETE):
            came_in = event.mask & RENAME and self._came_in(event)
            self._paths.clear()  # what is below has other paths now
            if came_in:
                self._touch_below(*event.names[-1])
            self._look_at_root()

    def _came_in(self, event: Event) -> bool:
        """Whether a directory was moved to here from where nothing was noticed."""
        if len(event.names) != 2:
            return True
        (old, name), (new, _) = event.names
        before, after = self._path(old), self._path(new)
        if after is None:
            return False
        return before is None or self._scope.skip(before + b"/" + name if before else name)

    def _look_at_root(self) -> None:
        """Nothing is noticed while the root, or what it lies in, is elsewhere."""
        here = os.readlink(b"/proc/self/fd/%d" % self._root).rstrip(b"/")
        if here != self._here:
            self._here = here
            self._paths.clear()
            self._sink.lost("the root was moved")

    def _touch_below(self, handle: bytes, name: bytes) -> None:
        """Everything in a directory may have changed while it was elsewhere."""
        top = self._path(handle)
        if top is None:
            return
        todo = [top + b"/" + name if top else name]
        while todo:
            path = todo.pop()
            if self._scope.skip(path):
                continue
            self._sink.touched(Spot(path), AT_ONCE)
            try:
                with os.scandir(self._base + b"/" + path) as entries:
                    todo += [e.path[len(self._base) + 1 :] for e in entries if _is_directory(e)]
            except OSError as error:
                log.info("cannot-list path=%r error=%s", path, error.strerror)

    def _happened(
        self, event: Event, handle: bytes, path: bytes, name: bytes, *, old: bool
    ) -> None:
        if name == b".":  # the directory itself
            self._sink.touched(Spot(os.path.dirname(path), handle, above=True), AT_ONCE)
            return
        below = path + b"/" + name if path else name
        if self._scope.skip(below):
            return
        pace = self._pace(event.mask, (handle, name), old=old)
        self._sink.touched(Spot(path, handle), pace)
        if event.mask & ON_DIR and event.mask & (CREATE | RENAME) and not old:
            self._sink.touched(Spot(below), AT_ONCE)

    def _pace(self, mask: int, name: tuple[bytes, bytes], *, old: bool) -> Pace:
        if mask & ON_DIR:
            return AT_ONCE
        if mask & DELETE or old:
            # Several things may be one event: made again after it was deleted, it may be closed.
            return AT_ONCE if self._newborn.gone(name) else VACATED
        if mask & CREATE:
            self._newborn.made(name)
        if mask & CLOSE_WRITE:
            return AT_ONCE
        if mask & CREATE:
            return CREATED
        return WRITTEN if mask & MODIFY else AT_ONCE

    def _path(self, handle: bytes) -> bytes | None:
        """The path of a directory below the root; ``None``: it is not, or of no interest."""
        if handle in self._paths:
            return self._paths[handle]
        path = self._look_up(handle)
        if len(self._paths) >= _MOST_PATHS:
            self._paths.clear()
        self._paths[handle] = path
        return path

    def _look_up(self, handle: bytes) -> bytes | None:
        try:
            fd = open_by_handle(self._root, handle)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise  # it may be below the root
            return None
        if fd is None:
            return None
        try:
            if os.fstat(fd).st_nlink == 0:
                return None
            full = os.readlink(b"/proc/self/fd/%d" % fd)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return _UNKNOWN
            raise
        finally:
            os.close(fd)
        base = self._base
        if full != (base or b"/") and not full.startswith(base + b"/"):
            return None
        path = full[len(base) :].lstrip(b"/")
        if path and self._scope.skip(path):
            return None
        parts = path.split(b"/")
        above = (b"/".join(parts[:end]) for end in range(1, len(parts)))
        return None if any(self._scope.skip(each) for each in above) else path

    # -- tokens, the end -----------------------------------------------------

    def send_token(self, number: int) -> bool:
        """Make a token."""
        tokens = self._scope.tokens
        if tokens is None:
            return False
        try:
            make_folder(tokens)
            if not self._token_handle:
                fd = os.open(tokens, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    if os.fstat(fd).st_dev != os.fstat(self._root).st_dev:
                        return False
                    self._token_handle = HandleReader().read(fd, b"")
                finally:
                    os.close(fd)
            make_token(tokens, number)
        except OSError as error:
            log.info("no-token error=%s", error)
            return False
        return True

    def coverage(self) -> Coverage:
        """What it sees."""
        notes = ["writes through a hard link from outside the root are found by the next full scan"]
        return Coverage("fanotify", notes=notes)

    def close(self) -> None:
        """Stop."""
        os.write(self._waker, b"x")
        self._thread.join()
        self._free()


def _is_directory(entry: os.DirEntry[bytes]) -> bool:
    return entry.is_dir(follow_symlinks=False)
