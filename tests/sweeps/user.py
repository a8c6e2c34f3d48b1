"""A user at one side: plain system calls, and a unique token in everything written."""

import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PAGE = 4096
_EPOCH_NS = 1_700_000_000 * 10**9


@dataclass(slots=True)
class Mint:
    """Gives out tokens and times; both users of a pair share it, so nothing is written twice."""

    tokens: int = 0
    now_ns: int = _EPOCH_NS
    done: list[str] = field(default_factory=list)  # what the users did, for a failure message

    def token(self) -> str:
        self.tokens += 1
        return f"TOKEN-{self.tokens:06d}"

    def tick(self, step_ns: int = 1_000_000_007) -> int:
        self.now_ns += step_ns
        return self.now_ns


def filled(token: str, size: int) -> bytes:
    """Return `size` bytes (at least one token) that hold the token on every page."""
    line = f"{token}\n".encode()
    return (line * (size // len(line) + 1))[: max(size, len(line))]


@dataclass(slots=True)
class User:
    """Somebody who works in one root. Paths are relative to it; parents are made when needed.

    Times of written files come from the mint, so that a replay gives the same winners.
    `step_ns` of a write may be 0: two writes at the same time.
    """

    side: str
    root: Path
    mint: Mint
    step_ns: int = 1_000_000_007

    def path(self, name: str) -> Path:
        return self.root / name

    # -- contents -------------------------------------------------------------------------

    def write(self, name: str, size: int = 200) -> None:
        """Create a file, or write an existing one anew in place."""
        token = self.mint.token()
        self._note(f"write {name} {token} {size}")
        self._put(self._at(name), filled(token, size))

    def empty(self, name: str) -> None:
        assert Path(name).name.startswith("empty"), "the ledger knows empty files by their name"
        self._note(f"empty {name}")
        self._put(self._at(name), b"")

    def edit(self, name: str) -> None:
        """Overwrite one page in the middle (a small file: all of it) without a new inode."""
        token = self.mint.token()
        self._note(f"edit {name} {token}")
        path = self.path(name)
        size = path.stat().st_size
        offset = size // 2 // PAGE * PAGE
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(filled(token, min(PAGE, size - offset)))
        self._stamp(path)

    def edit_unseen(self, name: str) -> None:
        """Change bytes but neither size nor mtime (case 95)."""
        token = self.mint.token()
        self._note(f"edit {name} {token}, same size and mtime")
        path = self.path(name)
        before = path.stat()
        with path.open("r+b") as file:
            file.write(filled(token, before.st_size)[: before.st_size])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def save_over(self, name: str, size: int = 200) -> None:
        """Save as editors do: a new file is renamed over the old one (case 83)."""
        token = self.mint.token()
        self._note(f"save {name} {token} {size} by rename over")
        path = self._at(name)
        fresh = path.with_name(f"saving{self.mint.tokens}.tmp")
        self._put(fresh, filled(token, size))
        fresh.replace(path)

    def save_backup(self, name: str, size: int = 200) -> None:
        """Save as editors do: the old file becomes NAME~, a new one takes the name (case 81)."""
        token = self.mint.token()
        self._note(f"save {name} {token} {size} by backup")
        path = self.path(name)
        path.replace(f"{path}~")
        self._put(path, filled(token, size))

    # -- names ----------------------------------------------------------------------------

    def move(self, old: str, new: str) -> None:
        """Rename a file or a directory; a file that has the new name is replaced."""
        self._note(f"move {old} -> {new}")
        self.path(old).rename(self._at(new))

    def rotate(self, *names: str) -> None:
        """Give each object the next one's name; two names are swapped."""
        self._note(f"rotate {' -> '.join(names)}")
        aside = self.path(names[-1]).with_name(f"rotating{self.mint.tick()}")
        self.path(names[-1]).rename(aside)
        for old, new in reversed(list(itertools.pairwise(names))):
            self.path(old).rename(self.path(new))
        aside.rename(self.path(names[0]))

    def link(self, old: str, new: str) -> None:
        self._note(f"link {old} as {new}")
        os.link(self.path(old), self._at(new), follow_symlinks=False)

    def symlink(self, name: str, target: str | None = None) -> None:
        """Make a symbolic link, or point an existing name elsewhere."""
        target = target or self.mint.token()
        self._note(f"symlink {name} -> {target}")
        path = self._at(name)
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        self._stamp(path)

    def delete(self, name: str) -> None:
        self._note(f"delete {name}")
        self.path(name).unlink()

    def delete_tree(self, name: str) -> None:
        self._note(f"delete tree {name}")
        shutil.rmtree(self.path(name))

    def mkdir(self, name: str) -> None:
        self._note(f"mkdir {name}")
        self._at(name).mkdir(exist_ok=True)

    # -- attributes -----------------------------------------------------------------------

    def chmod(self, name: str, mode: int) -> None:
        self._note(f"chmod {name} {mode:o}")
        self.path(name).chmod(mode)

    def chown(self, name: str, owner: int, group: int) -> None:
        """Give a file away; without the right to do that, nothing happens."""
        if os.geteuid() == 0:
            self._note(f"chown {name} {owner}:{group}")
            os.chown(self.path(name), owner, group)

    def touch(self, name: str) -> None:
        self._note(f"touch {name}")
        self._stamp(self.path(name))

    def set_xattr(self, name: str, key: str, value: bytes) -> None:
        self._xattr(f"setxattr {name} {key}", lambda p: os.setxattr(p, key, value), name)

    def remove_xattr(self, name: str, key: str) -> None:
        self._xattr(f"removexattr {name} {key}", lambda p: os.removexattr(p, key), name)

    # -------------------------------------------------------------------------------------

    def _xattr(self, what: str, act: Callable[[Path], None], name: str) -> None:
        try:
            act(self.path(name))
        except OSError as error:
            what += f" (refused: {error.strerror})"
        self._note(what)

    def _note(self, what: str) -> None:
        self.mint.done.append(f"{self.side}: {what}")

    def _at(self, name: str) -> Path:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _put(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)
        self._stamp(path)

    def _stamp(self, path: Path) -> None:
        now = self.mint.tick(self.step_ns)
        os.utime(path, ns=(now, now), follow_symlinks=False)
