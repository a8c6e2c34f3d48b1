"""Tokens: files that come and go so that a watcher sees them behind all that happened before."""

import contextlib
import os


def make_folder(path: bytes) -> None:
    """Make the folder for tokens; what it lies in is there."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)


def make_token(folder: bytes, number: int) -> None:
    """Make a file that a watcher of the folder sees, and take it away again."""
    path = folder + b"/%d" % number
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    os.unlink(path)
