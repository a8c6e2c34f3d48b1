"""Copy and remove whole objects by descriptor, where a rename cannot serve."""

import errno
import os
import stat

from bisync.fs.content import Chunk, chunks_of
from bisync.fs.meta import apply_attributes, attributes_of, kind_of, read_xattrs
from bisync.linux.filesystem import begin_flush, clone

OPEN_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BUFFER = 1 << 20  # bytes
_GOES_OUT = 16 << 20  # bytes of a file at a time


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of some bytes. What is whole of a long file goes out while the rest still comes."""
    begin = offset // _GOES_OUT
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done
    end = offset // _GOES_OUT
    if end > begin:
        begin_flush(fd, begin * _GOES_OUT, (end - begin) * _GOES_OUT)


def write_chunk(fd: int, chunk: Chunk) -> None:
    """Write one chunk at its offset; holes stay holes."""
    if chunk.data is not None:
        write_at(fd, chunk.data, chunk.offset)


def copy_object(from_fd: int, name: bytes, to_fd: int, to_name: bytes) -> None:
    """Copy a file, link, special file or a whole directory, with all attributes, durably.

    Files share their blocks where the file system can. The new name itself is made durable
    by the caller's flush of ``to_fd``.

    Raises:
        FileExistsError: ``to_name`` is taken; nothing was made.
        OSError: it cannot be copied whole; what was made is removed again.
    """
    info = os.stat(name, dir_fd=from_fd, follow_symlinks=False)
    kind = stat.S_IFMT(info.st_mode)
    if kind == stat.S_IFREG:
        _copy_file(from_fd, name, to_fd, to_name, info)
        return
    if kind == stat.S_IFDIR:
        os.mkdir(to_name, 0o700, dir_fd=to_fd)
    elif kind == stat.S_IFLNK:
        os.symlink(os.readlink(name, dir_fd=from_fd), to_name, dir_fd=to_fd)
    else:
        os.mknod(to_name, kind | 0o600, info.st_rdev, dir_fd=to_fd)
    try:
        if kind == stat.S_IFDIR:
            _copy_below(from_fd, name, to_fd, to_name)
        _dress(from_fd, name, to_fd, to_name, info)
    except BaseException:
        remove_object(to_fd, to_name)
        raise


def _copy_file(from_fd: int, name: bytes, to_fd: int, to_name: bytes, info: os.stat_result) -> None:
    source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=from_fd)
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        target = os.open(to_name, flags, 0o600, dir_fd=to_fd)
        try:
            if not clone(source, target):
                for chunk in chunks_of(source, info.st_size, bytearray(_BUFFER)):
                    write_chunk(target, chunk)
                os.ftruncate(target, info.st_size)
            _dress(from_fd, name, target, b"", info)
            os.fsync(target)
        except BaseException:
            os.unlink(to_name, dir_fd=to_fd)
            raise
        finally:
            os.close(target)
    finally:
        os.close(source)


def _copy_below(from_fd: int, name: bytes, to_fd: int, to_name: bytes) -> None:
    source = os.open(name, OPEN_DIR, dir_fd=from_fd)
    try:
        target = os.open(to_name, OPEN_DIR, dir_fd=to_fd)
        try:
            for child in map(os.fsencode, os.listdir(source)):
                copy_object(source, child, target, child)
            os.fsync(target)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _dress(from_fd: int, name: bytes, to_fd: int, to_name: bytes, info: os.stat_result) -> None:
    """All attributes, as far as we may set them; what is missed is no reason to keep nothing."""
    wanted = attributes_of(info, *read_xattrs(from_fd, name))
    made = os.stat(to_name, dir_fd=to_fd, follow_symlinks=False) if to_name else os.fstat(to_fd)
    now = attributes_of(made, *read_xattrs(to_fd, to_name))
    apply_attributes(to_fd, to_name, kind_of(info.st_mode), now, wanted)


def dress_like(from_fd: int, name: bytes, fd: int) -> None:
    """Give an open file the attributes of another one, as far as we may set them."""
    _dress(from_fd, name, fd, b"", os.stat(name, dir_fd=from_fd, follow_symlinks=False))


def remove_object(dir_fd: int, name: bytes) -> tuple[int, int]:
    """Remove a name with everything below it; links are not followed, depth does not matter.

    Returns:
        (entries removed, bytes of files).
    """
    count, size = 0, 0
    stack: list[tuple[int, bytes, list[bytes]]] = []  # (parent, name, what is left in it)
    opened: list[int] = []
    todo = [name]
    parent = dir_fd
    try:
        while True:
            if todo:
                child = todo.pop()
                info = os.stat(child, dir_fd=parent, follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode):
                    fd = os.open(child, OPEN_DIR, dir_fd=parent)
                    stack.append((parent, child, todo))
                    opened.append(fd)
                    parent, todo = fd, [os.fsencode(each) for each in os.listdir(fd)]
                    continue
                os.unlink(child, dir_fd=parent)
                count += 1
                size += info.st_size if stat.S_ISREG(info.st_mode) else 0
            elif stack:
                os.close(opened.pop())
                parent, child, todo = stack.pop()
                os.rmdir(child, dir_fd=parent)
                count += 1
            else:
                return count, size
    finally:
        for fd in opened:
            os.close(fd)


def is_another_place(error: OSError) -> bool:
    """Whether a rename or link is impossible between two places of one root.

    Another quota project, encryption policy, subvolume or mount.
    """
    return error.errno == errno.EXDEV
