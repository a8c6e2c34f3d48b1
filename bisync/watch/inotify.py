"""inotify: a watch for each directory, with a table that knows where each is now.

The descriptor and its reading are the watchdog package's; its recursive observer is not used: after
an overflow it adds all watches again and may never end, it hides a watch limit, and it reports
writes in a directory that was moved out at its former place.
"""

import contextlib
import errno
import logging
import os
import threading
import time

from msgspec import Struct, field
from watchdog.observers.inotify_c import (
    CallbackId,
    InotifyEvent,
    InotifyFD,
    Mask,
    WatchDescriptor,
)
from watchdog.observers.inotify_c import (
    InotifyConstants as In,
)

from bisync.linux.handle import HandleReader, is_guess
from bisync.watch.interface import (
    AT_ONCE,
    CREATED,
    VACATED,
    WRITTEN,
    Coverage,
    Scope,
    Sink,
    Spot,
    UnavailableError,
)
from bisync.watch.newborn import Newborn
from bisync.watch.tokens import make_folder, make_token

log = logging.getLogger(__name__)
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_UNMOUNT = 0x2000
_EXCL_UNLINK = 0x04000000
_MASK = Mask(
    In.IN_MODIFY | In.IN_ATTRIB | In.IN_CLOSE_WRITE | In.IN_MOVED_FROM | In.IN_MOVED_TO
    | In.IN_CREATE | In.IN_DELETE | In.IN_DELETE_SELF | In.IN_MOVE_SELF | In.IN_ONLYDIR
    | _EXCL_UNLINK
)  # fmt: skip
_TOKENS = Mask(In.IN_CREATE | In.IN_ONLYDIR)
_ID = CallbackId(1)
_HALF_S = 1.0  # the other half of a move comes within
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)
_NOT_OURS = (errno.EACCES, errno.EPERM)  # until an event says that its permissions changed


class _Watched(Struct):
    """A directory with a watch."""

    parent: int | None  # the watch of the directory above; None: not below the root just now
    name: bytes
    handle: bytes
    below: dict[bytes, int] = field(default_factory=dict)  # watches, by name


class _Half(Struct):
    """A directory that was moved away, and has not come out elsewhere yet."""

    wd: int
    since: float
    parent: int  # the watch of the directory that it was in
    path: bytes


class InotifyWatcher:
    """Watches each directory below a root.

    Raises:
        UnavailableError: not even the root can be watched.
    """

    def __init__(self, scope: Scope, sink: Sink) -> None:
        self._scope, self._sink = scope, sink
        self._table: dict[int, _Watched] = {}
        self._handles = HandleReader()
        self._by_handle: dict[bytes, int] = {}  # a number may be another directory's at once
        self._halves: dict[int, _Half] = {}  # by cookie
        self._newborn: Newborn[tuple[int, bytes]] = Newborn()
        self._missed: set[int] = set()  # directories in which something may have been made unseen
        self._unwatched: dict[bytes, str] = {}  # tops of what is polled, and why
        self._shut: set[int] = set()  # directories with some in them that we may not open
        self._has_lost = False  # the table may be wrong
        self._token_watch = -1
        self._lock = threading.RLock()
        self._closing = threading.Event()
        try:
            self._root = os.open(scope.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UnavailableError(f"{os.fsdecode(scope.root)}: {error.strerror}") from error
        self._device = os.fstat(self._root).st_dev
        self._fd: InotifyFD | None = None
        try:
            self._fd = fd = InotifyFD()
            self._root_watch = self._watch(self._root)
        except OSError as error:
            self._free()
            raise UnavailableError(f"inotify: {error.strerror}") from error
        self._table[self._root_watch] = _Watched(None, b"", b"")
        self._add_below(self._root, self._root_watch, b"", tell=False)
        fd.start()
        self._polling = threading.Thread(target=self._poll, name="bisync-poll", daemon=True)
        self._polling.start()

    def _free(self) -> None:
        if self._fd is not None:
            self._fd.start()
            self._fd.stop()
            self._fd.join()
            self._fd = None
        os.close(self._root)

    # -- watches -------------------------------------------------------------

    def _watch(self, fd: int, mask: Mask = _MASK) -> int:
        """A watch for an opened directory, whatever its name is by now."""
        assert self._fd is not None
        wd = self._fd.add_callback(b"/proc/self/fd/%d" % fd, mask, self, _ID)
        if wd == -1:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return wd

    def _add_below(self, fd: int, wd: int, path: bytes, *, tell: bool) -> None:
        """Watch all directories below one; say that each may hold news."""
        top = os.open(b".", _OPEN, dir_fd=fd)  # btrfs lists what was there at the opening
        stack = [(top, wd, path, self._directories_in(top, path))]
        try:
            while stack:
                here, watch, place, names = stack[-1]
                if not names:
                    os.close(stack.pop()[0])
                    continue
                name = names.pop()
                below = place + b"/" + name if place else name
                if self._scope.skip(below):
                    continue
                try:
                    child = os.open(name, _OPEN, dir_fd=here)
                except OSError as error:
                    self._cannot_open(below, error, watch)
                    continue
                added = self._add(child, watch, name, below)
                if tell:
                    self._sink.touched(self._spot(added, below), AT_ONCE)
                if added is None:
                    os.close(child)
                else:
                    stack.append((child, added, below, self._directories_in(child, below)))
        finally:
            for entry in stack:
                os.close(entry[0])

    def _add(self, fd: int, parent: int, name: bytes, path: bytes) -> int | None:
        """Watch one directory; ``None`` if what is below is not watched."""
        if os.fstat(fd).st_dev != self._device:
            return None  # mounted there
        handle = self._handles.read(fd, b"")
        # A guess may be another directory's: the kernel knows which one it is.
        wd = -1 if is_guess(handle) else self._by_handle.get(handle, -1)
        if wd not in self._table:
            try:
                wd = self._watch(fd)
            except OSError as error:
                self._cannot_watch(path, error)
                return None
        known = self._table.get(wd)
        if known is not None:
            self._detach(wd, known)
            known.parent, known.name = parent, name
        else:
            self._table[wd] = _Watched(parent, name, handle)
            self._by_handle[handle] = wd
        self._table[parent].below[name] = wd
        return wd

    def _cannot_open(self, path: bytes, error: OSError, parent: int) -> None:
        """A directory is gone, or not for us, which the scan says; else it may hold news."""
        if error.errno in _NOT_OURS:
            self._shut.add(parent)
        elif error.errno not in _GONE:
            self._cannot_watch(path, error)

    def _cannot_watch(self, path: bytes, error: OSError) -> None:
        what = "the limit of watches" if error.errno == errno.ENOSPC else error.strerror
        text = f"inotify: {what}; what is not watched is looked at now and then"
        if error.errno == errno.ENOSPC:
            text += " (raise fs.inotify.max_user_watches)"
        if text not in self._unwatched.values():
            log.warning("%s: %s", os.fsdecode(self._scope.root), text)
        self._unwatched[path] = text

    def _directories_in(self, fd: int, path: bytes) -> list[bytes]:
        try:
            with os.scandir(fd) as entries:
                return [os.fsencode(e.name) for e in entries if e.is_dir(follow_symlinks=False)]
        except OSError as error:
            log.info("cannot-list path=%r error=%s", path, error.strerror)
            if error.errno not in (*_GONE, *_NOT_OURS):
                self._cannot_watch(path, error)
            return []

    def _detach(self, wd: int, known: _Watched) -> None:
        above = None if known.parent is None else self._table.get(known.parent)
        if above is not None and above.below.get(known.name) == wd:
            del above.below[known.name]
        known.parent = None

    def _forget(self, wd: int) -> _Watched | None:
        known = self._table.pop(wd, None)
        self._shut.discard(wd)
        if known is not None and self._by_handle.get(known.handle) == wd:
            del self._by_handle[known.handle]
        return known

    def _drop(self, wd: int) -> None:
        """Give up the watches of a directory that left the tree, and of all below it."""
        assert self._fd is not None
        todo, gone = [wd], []
        while todo:
            one = todo.pop()
            known = self._forget(one)
            if known is not None:
                todo += known.below.values()
                gone.append(one)
        for one in gone:
            with contextlib.suppress(OSError):
                self._fd.remove_callbacks([(WatchDescriptor(one), _ID)])

    def _spot(self, wd: int | None, path: bytes) -> Spot:
        known = None if wd is None else self._table.get(wd)
        return Spot(path, b"" if known is None else known.handle)

    def _path(self, wd: int) -> bytes | None:
        """Where a watched directory is now; ``None``: not below the root."""
        names: list[bytes] = []
        seen = set[int]()
        while wd != self._root_watch:
            known = self._table.get(wd)
            if known is None or known.parent is None or wd in seen:
                return None  # the table follows the events, and may be tangled for a moment
            seen.add(wd)
            names.append(known.name)
            wd = known.parent
        return b"/".join(reversed(names))

    # -- events, on the reader's thread --------------------------------------

    def on_event(self, event: InotifyEvent) -> None:
        """One event of the kernel's."""
        try:
            self._came(event)
        except Exception as error:  # noqa: BLE001 -- the reader would end, and nobody would hear
            log.warning("watcher-failed error=%r", error)
            self._has_lost = True
            self._sink.lost(f"the watcher failed: {type(error).__name__}: {error}")

    def _came(self, event: InotifyEvent) -> None:
        with self._lock:
            if self._closing.is_set():
                return
            if event.wd == self._token_watch:
                self._token_came(event.name)
                return
            self._drop_halves()
            path = self._path(event.wd)
            if path is None:  # between the two halves of a move, or on its way out
                known = self._table.get(event.wd)
                if known is not None and not event.mask & In.IN_MOVE_SELF:
                    self._sink.touched(Spot(b"", known.handle, not event.name), AT_ONCE)
                return
            if event.mask & (_UNMOUNT | In.IN_DELETE_SELF | In.IN_MOVE_SELF):
                if event.wd == self._root_watch:
                    self._sink.lost("the root was moved, removed or unmounted")
                return
            self._happened(event, path)

    def _happened(self, event: InotifyEvent, path: bytes) -> None:
        mask, name = event.mask, event.name
        if not name:  # the directory itself
            if event.wd in self._shut:
                self._shut.discard(event.wd)
                self._look_again(event.wd)
            spot = Spot(os.path.dirname(path), self._table[event.wd].handle, above=True)
            self._sink.touched(spot, AT_ONCE)
            return
        here = self._spot(event.wd, path)
        below = path + b"/" + name if path else name
        if self._scope.skip(below):
            return
        if mask & In.IN_ISDIR:
            self._directory(event, path, below)
        elif mask & In.IN_CREATE:
            self._newborn.made((event.wd, name))
            self._sink.touched(here, CREATED)
        elif mask & (In.IN_MOVED_FROM | In.IN_DELETE):
            was_newborn = self._newborn.gone((event.wd, name))
            self._sink.touched(here, AT_ONCE if was_newborn else VACATED)
        elif mask & In.IN_MODIFY:
            self._sink.touched(here, WRITTEN)
        else:
            self._sink.touched(here, AT_ONCE)

    def _directory(self, event: InotifyEvent, path: bytes, below: bytes) -> None:
        mask, wd = event.mask, event.wd
        if mask & In.IN_MOVED_FROM:
            child = self._table[wd].below.get(event.name)
            known = None if child is None else self._table.get(child)
            if child is not None and known is not None and known.parent == wd:
                self._detach(child, known)
                self._halves[event.cookie] = _Half(child, time.monotonic(), wd, below)
        elif mask & In.IN_MOVED_TO:
            half = self._halves.pop(event.cookie, None)
            if half is not None and half.wd in self._table:
                self._moved(half, wd, event.name, below)
            else:
                self._enter(wd, event.name, below)
        elif mask & In.IN_DELETE:
            child = self._table[wd].below.get(event.name)
            known = None if child is None else self._table.get(child)
            if child is not None and known is not None:
                self._detach(child, known)  # its watch lasts for as long as somebody has it open
        elif mask & In.IN_CREATE or event.name not in self._table[wd].below:
            self._enter(wd, event.name, below)  # it is new, or may be opened since just now
        self._sink.touched(self._spot(wd, path), AT_ONCE)

    def _moved(self, half: _Half, parent: int, name: bytes, path: bytes) -> None:
        known = self._table[half.wd]
        known.parent, known.name = parent, name
        self._table[parent].below[name] = half.wd
        for top in [t for t in self._unwatched if t.startswith(half.path + b"/")]:
            self._unwatched[path + top[len(half.path) :]] = self._unwatched.pop(top)
        fd = self._open_watched(half.wd)
        if fd is not None:
            os.close(fd)
        else:  # an exchange of two is told as two moves; or there are more to come
            self._look_again(parent)
            self._look_again(half.parent)
        self._make_up()

    def _look_again(self, wd: int) -> None:
        """See which of the watched directories are really in one, whatever events said."""
        if wd not in self._table:
            return
        fd, path = self._open_watched(wd), self._path(wd)
        if fd is None or path is None:
            self._missed.add(wd)
            return
        try:
            for name in self._directories_in(fd, path):
                below = path + b"/" + name if path else name
                if not self._scope.skip(below):
                    self._look_at(fd, wd, name, below, only_new=True)
        finally:
            os.close(fd)
        self._sink.touched(self._spot(wd, path), AT_ONCE)

    def _look_at(
        self, above: int, parent: int, name: bytes, path: bytes, *, only_new: bool = False
    ) -> None:
        """Watch a directory, then all below it; then they may be listed.

        Args:
            only_new: what has a watch already only gets its place.
        """
        try:
            fd = os.open(name, _OPEN, dir_fd=above)
        except OSError as error:
            self._cannot_open(path, error, parent)
            return
        try:
            count = len(self._table)
            wd = self._add(fd, parent, name, path)
            if only_new and len(self._table) == count:
                return
            if wd is not None:
                self._add_below(fd, wd, path, tell=True)
            self._sink.touched(self._spot(wd, path), AT_ONCE)
        finally:
            os.close(fd)

    def _enter(self, parent: int, name: bytes, path: bytes) -> None:
        """Watch a directory that is new."""
        above = self._open_watched(parent)
        if above is None:
            self._missed.add(parent)
            return
        try:
            self._look_at(above, parent, name, path)
        finally:
            os.close(above)

    def _open_watched(self, wd: int) -> int | None:
        """A directory with a watch, opened; ``None``: it is not where the events so far say."""
        path = self._path(wd)
        if path is None:
            return None
        try:
            fd = self._open(path)
        except OSError:
            return None
        if wd != self._root_watch and self._handles.read(fd, b"") != self._table[wd].handle:
            os.close(fd)
            return None
        return fd

    def _make_up(self) -> None:
        """Look below the directories that were on their way elsewhere when something was made."""
        for wd in list(self._missed):
            fd = None
            if wd in self._table:
                fd = self._open_watched(wd)
                if fd is None:
                    continue  # there is another move to come
            self._missed.discard(wd)
            path = self._path(wd)
            if fd is not None and path is not None:
                self._add_below(fd, wd, path, tell=True)
                self._sink.touched(self._spot(wd, path), AT_ONCE)
                os.close(fd)

    def _open(self, path: bytes) -> int:
        fd = os.open(b".", _OPEN, dir_fd=self._root)
        for name in path.split(b"/") if path else ():
            try:
                below = os.open(name, _OPEN, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        return fd

    def _drop_halves(self) -> None:
        """What was moved away and did not come back is not ours any more."""
        if not self._halves:
            return
        long_ago = time.monotonic() - _HALF_S
        for cookie, half in list(self._halves.items()):
            if half.since < long_ago:
                del self._halves[cookie]
                known = self._table.get(half.wd)
                if known is not None and known.parent is None:
                    self._drop(half.wd)

    def on_watch_deleted(self, wd: WatchDescriptor) -> None:
        """The kernel gave a watch up: its directory is gone, or was unmounted."""
        with self._lock:
            if self._closing.is_set():
                return
            known = self._forget(wd)
            if known is not None:
                self._detach(wd, known)
            if wd == self._root_watch:
                self._sink.lost("the root was removed or unmounted")

    def on_queue_overflow(self) -> None:
        """The kernel dropped events; the watches are still there."""
        with self._lock:
            log.warning("%s: the queue of events overflowed", os.fsdecode(self._scope.root))
            self._lose("events were lost: the kernel's queue overflowed")

    def _lose(self, why: str) -> None:
        """Find again what is where; tell that anything may have happened, whatever comes of it."""
        self._has_lost = True
        try:
            self._watch_again()
            self._has_lost = False
        except OSError as error:  # no descriptors, say: it is tried again
            log.warning("%s: not watched: %s", os.fsdecode(self._scope.root), error.strerror)
        finally:
            self._sink.lost(why)

    def _watch_again(self) -> None:
        """Directories may have been made or moved unseen: find them, keep the watches there are."""
        self._unwatched.clear()
        self._missed.clear()
        for known in self._table.values():
            known.parent = None
            known.below.clear()
        self._halves.clear()
        self._add_below(self._root, self._root_watch, b"", tell=False)
        for wd, known in list(self._table.items()):
            if known.parent is None and wd != self._root_watch:
                self._drop(wd)

    # -- tokens, polling, the end --------------------------------------------

    def send_token(self, number: int) -> bool:
        """Make a token. While something is not watched it says nothing."""
        if self._scope.tokens is None or not self._sees_all():
            return False
        try:
            with self._lock:
                if self._token_watch < 0:
                    make_folder(self._scope.tokens)
                    fd = os.open(self._scope.tokens, _OPEN)
                    try:
                        self._token_watch = self._watch(fd, _TOKENS)
                    finally:
                        os.close(fd)
            make_token(self._scope.tokens, number)
        except OSError as error:
            log.info("no-token error=%s", error)
            return False
        return True

    def _sees_all(self) -> bool:
        if self._fd is None or not self._fd.is_alive():
            return False
        return not (self._unwatched or self._missed or self._has_lost)

    def _token_came(self, name: bytes) -> None:
        if name.isdigit():
            self._sink.token(int(name))

    def _poll(self) -> None:
        while not self._closing.wait(self._scope.poll_s):
            try:
                with self._lock:
                    tops = self._tops()
                for top in tops:
                    self._touch_all(top)
            except OSError as error:
                log.warning("%s: not looked at: %s", os.fsdecode(self._scope.root), error)
                self._sink.lost(f"what is not watched could not be looked at: {error.strerror}")

    def _tops(self) -> list[bytes]:
        """What is still not watched; whatever can be is, from now on."""
        if self._fd is None or not self._fd.is_alive():
            return [b""]  # nobody reads what the kernel says
        self._make_up()
        if self._has_lost or self._missed:
            self._lose("what is watched was not clear")
        tops = list(self._unwatched)
        for path in tops:
            *above, name = path.split(b"/")
            known: _Watched | None = self._table[wd := self._root_watch]
            for part in above:
                wd = -1 if known is None else known.below.get(part, -1)
                known = self._table.get(wd)
            self._unwatched.pop(path)
            try:
                if known is not None and name:
                    self._enter(wd, name, path)
                elif not name:
                    self._add_below(self._root, self._root_watch, b"", tell=True)
            except OSError as error:
                self._cannot_watch(path, error)
        return list({*tops, *self._unwatched})

    def _touch_all(self, top: bytes) -> None:
        """Everything below a directory may have changed."""
        todo = [top]
        while todo and not self._closing.is_set():
            path = todo.pop()
            self._sink.touched(Spot(path), AT_ONCE)
            try:
                fd = self._open(path)
            except OSError:
                continue
            try:
                above = path + b"/" if path else b""
                todo += [above + name for name in self._directories_in(fd, path)]
            finally:
                os.close(fd)

    def coverage(self) -> Coverage:
        """What it sees."""
        with self._lock:
            notes = list(dict.fromkeys(self._unwatched.values()))
            return Coverage("inotify", len(self._table), len(self._unwatched), notes)

    def close(self) -> None:
        """Stop."""
        with self._lock:
            self._closing.set()
        if self._fd is not None:
            self._fd.stop()
            self._fd.join()
            self._fd = None
        self._polling.join()
        os.close(self._root)
