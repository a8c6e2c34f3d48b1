"""Random histories of two sites, each from one seed.

A history is a few rounds; in each round both users do some random operations (their turn), then
the engine runs, in some rounds to a violent end. At the end the engine runs until it has converged,
at most `PATIENCE` times. See `ledger` for what must exist then.

The users keep three habits, so that every complaint is about the engine: nobody writes through a
symbolic link; a file whose name begins with "empty" keeps such a name for ever, and no other file
gets one; ``anchor.txt`` is never touched, so that no tree is ever quite empty.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from . import tree, verdict
from .ledger import Ledger
from .place import Pair
from .user import Mint, User

PATIENCE = 3  # runs at the end of a history until it must have converged
ANCHOR = "anchor.txt"
_LARGE = 300 * 1024

# Runs the engine once; `None` if it was killed, else its exit code.
Sync = Callable[[Pair, random.Random, bool], int | None]


@dataclass(slots=True)
class History:
    """One history: its users, its ledger, and what was complained about."""

    seed: int
    pair: Pair
    sync: Sync
    complaints: list[str] = field(default_factory=list)
    mint: Mint = field(default_factory=Mint)
    runs: int = 0
    kills: int = 0

    def play(self, rounds: int, longest_turn: int) -> list[str]:
        """Play the history to its end; return the complaints."""
        chance = random.Random(self.seed)
        mint = self.mint
        ledger = Ledger({"alpha": self.pair.alpha, "beta": self.pair.beta})
        alpha, beta = User("alpha", self.pair.alpha, mint), User("beta", self.pair.beta, mint)
        _begin(chance, alpha)
        ledger.user_changed("alpha")
        self._run(chance, ledger, may_die=False)
        for _ in range(rounds):
            turns = [alpha, beta] if chance.random() < 0.5 else [beta, alpha]
            for user in turns:
                user.step_ns = chance.choice((1_000_000_007, 1_000_000_007, 0))
                for _ in range(chance.randrange(longest_turn + 1)):
                    act(chance, user)
                ledger.user_changed(user.side)
            self._run(chance, ledger, may_die=chance.random() < 1 / 3)
        self._settle(chance, ledger)
        return self.complaints

    def story(self) -> str:
        """Say what happened, for a failure message."""
        return "\n".join(f"    {line}" for line in ["what happened:", *self.mint.done])

    def _run(self, chance: random.Random, ledger: Ledger, *, may_die: bool) -> int:
        code = self.sync(self.pair, chance, may_die)
        self.runs += 1
        self.kills += code is None
        how = "killed" if code is None else f"ended with {code}"
        self.mint.done.append(f"run {self.runs}: {how}")
        complaints = ledger.engine_ran()
        if code not in {None, 0, 23, 24}:
            complaints.append(f"an unexpected exit code: {code}")
        if code == 0:
            complaints += verdict.agreement(self.pair)
        self.complaints += [f"run {self.runs}: {text}" for text in complaints]
        return -1 if code is None else code

    def _settle(self, chance: random.Random, ledger: Ledger) -> None:
        codes: list[int] = []
        while len(codes) < PATIENCE and 0 not in codes:
            codes.append(self._run(chance, ledger, may_die=False))
        if 0 not in codes:
            self.complaints.append(f"never converged, the last runs ended with {codes}")
        self.complaints += ledger.lost()
        if not self.complaints:
            self._rest(chance, ledger)

    def _rest(self, chance: random.Random, ledger: Ledger) -> None:
        """A run at rest writes nothing in the trees."""
        roots = {"alpha": self.pair.alpha, "beta": self.pair.beta}
        before = {side: tree.resting_state(root) for side, root in roots.items()}
        self._run(chance, ledger, may_die=False)
        for side, root in roots.items():
            after = tree.resting_state(root)
            self.complaints += [
                f"written at rest: {side}:{path!r} {before[side].get(path)} -> {after.get(path)}"
                for path in sorted(before[side].keys() | after.keys())
                if before[side].get(path) != after.get(path)
            ]


@contextmanager
def fresh_pair(folder: Path) -> Iterator[Pair]:
    """Yield two empty roots."""
    pair = Pair(folder / "alpha", folder / "beta", folder / "home", folder)
    try:
        for path in (pair.alpha, pair.beta, pair.home):
            path.mkdir(parents=True)
        yield pair
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _begin(chance: random.Random, user: User) -> None:
    user.write(ANCHOR)
    for _ in range(chance.randrange(3, 12)):
        _create(chance, user, _Listing.of(user))


# -- what a user may do -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Listing:
    """What is in a user's tree just now."""

    files: list[str]
    folders: list[str]  # "" is the root
    links: list[str]

    @classmethod
    def of(cls, user: User) -> "_Listing":
        entries = tree.snapshot(user.root)
        wanted = {p: e for p, e in entries.items() if p != ANCHOR and not tree.is_temporary(p)}
        return cls(
            files=[p for p, e in wanted.items() if e.kind == "file"],
            folders=["", *(p for p, e in wanted.items() if e.kind == "directory")],
            links=[p for p, e in wanted.items() if e.kind == "link"],
        )


def act(chance: random.Random, user: User) -> None:
    """Do one random operation; one that makes no sense just now is left out."""
    doings = list(_DOINGS)
    doing = chance.choices(doings, [_DOINGS[d] for d in doings])[0]
    doing(chance, user, _Listing.of(user))


def _name(chance: random.Random, folder: str, stem: str) -> str:
    name = f"{stem}{chance.randrange(8)}"
    return f"{folder}/{name}" if folder else name


def _stem(path: str) -> str:
    """Return the stem a file must keep: see the users' habits."""
    return "empty-" if path.rsplit("/", 1)[-1].startswith("empty") else "f"


def _size(chance: random.Random) -> int:
    return chance.choice((20, 200, 3000, 3000, 20_000, 20_000, _LARGE))


def _is_free(user: User, name: str) -> bool:
    return not user.path(name).exists() and not user.path(name).is_symlink()


def _is_file(user: User, name: str) -> bool:
    return user.path(name).is_file() and not user.path(name).is_symlink()


def _create(chance: random.Random, user: User, now: _Listing) -> None:
    name = _name(chance, chance.choice(now.folders), "f")
    if _is_free(user, name) or _is_file(user, name):
        user.write(name, _size(chance))


def _create_empty(chance: random.Random, user: User, now: _Listing) -> None:
    name = _name(chance, chance.choice(now.folders), "empty-")
    if _is_free(user, name):
        user.empty(name)


def _make_folder(chance: random.Random, user: User, now: _Listing) -> None:
    parent = chance.choice(now.folders)
    name = _name(chance, parent, "d")
    if parent.count("/") < 3 and _is_free(user, name):
        user.mkdir(name)
        if chance.random() < 0.7:
            user.write(_name(chance, name, "f"), _size(chance))


def _edit(chance: random.Random, user: User, now: _Listing) -> None:
    if now.files:
        user.edit(chance.choice(now.files))


def _save_over(chance: random.Random, user: User, now: _Listing) -> None:
    if now.files:
        user.save_over(chance.choice(now.files), _size(chance))


def _save_backup(chance: random.Random, user: User, now: _Listing) -> None:
    if now.files and not (name := chance.choice(now.files)).endswith("~"):
        backup = f"{name}~"
        if _is_free(user, backup) or _is_file(user, backup):
            user.save_backup(name, _size(chance))


def _move(chance: random.Random, user: User, now: _Listing) -> None:
    if now.files:
        old = chance.choice(now.files)
        new = _name(chance, chance.choice(now.folders), _stem(old))
        if _is_free(user, new) or (_is_file(user, new) and new != old):
            user.move(old, new)


def _move_folder(chance: random.Random, user: User, now: _Listing) -> None:
    if len(now.folders) > 1:
        old = chance.choice(now.folders[1:])
        new = _name(chance, chance.choice(now.folders), "d")
        if _is_free(user, new) and not f"{new}/".startswith(f"{old}/"):
            user.move(old, new)


def _swap(chance: random.Random, user: User, now: _Listing) -> None:
    alike = [n for n in now.files if _stem(n) == "f"]
    if len(alike) >= 2:
        user.rotate(*chance.sample(alike, chance.choice((2, 3)) if len(alike) > 2 else 2))


def _delete(chance: random.Random, user: User, now: _Listing) -> None:
    if names := now.files + now.links:
        user.delete(chance.choice(names))


def _delete_tree(chance: random.Random, user: User, now: _Listing) -> None:
    small = [
        folder
        for folder in now.folders[1:]
        if sum(name.startswith(f"{folder}/") for name in now.files) <= 4
    ]
    if small:
        user.delete_tree(chance.choice(small))


def _link(chance: random.Random, user: User, now: _Listing) -> None:
    if now.files:
        old = chance.choice(now.files)
        new = _name(chance, chance.choice(now.folders), _stem(old))
        if _is_free(user, new):
            user.link(old, new)


def _symlink(chance: random.Random, user: User, now: _Listing) -> None:
    name = _name(chance, chance.choice(now.folders), "l")
    if _is_free(user, name) or user.path(name).is_symlink():
        user.symlink(name)


def _turn_into_folder(chance: random.Random, user: User, now: _Listing) -> None:
    if alike := [n for n in now.files if _stem(n) == "f"]:
        name = chance.choice(alike)
        user.delete(name)
        user.write(_name(chance, name, "f"), _size(chance))


def _chmod(chance: random.Random, user: User, now: _Listing) -> None:
    if names := now.files + now.folders[1:]:
        name = chance.choice(names)
        modes = (0o600, 0o640, 0o644) if name in now.files else (0o700, 0o750, 0o755)
        user.chmod(name, chance.choice(modes))


def _touch(chance: random.Random, user: User, now: _Listing) -> None:
    if now.files:
        user.touch(chance.choice(now.files))


def _set_xattr(chance: random.Random, user: User, now: _Listing) -> None:
    if now.files:
        value = str(chance.randrange(9)).encode()
        user.set_xattr(chance.choice(now.files), chance.choice(("user.a", "user.b")), value)


_DOINGS: dict[Callable[[random.Random, User, _Listing], None], int] = {
    _create: 14,
    _create_empty: 2,
    _make_folder: 6,
    _edit: 12,
    _save_over: 8,
    _save_backup: 6,
    _move: 12,
    _move_folder: 7,
    _swap: 5,
    _delete: 7,
    _delete_tree: 3,
    _link: 4,
    _symlink: 4,
    _turn_into_folder: 2,
    _chmod: 4,
    _touch: 4,
    _set_xattr: 3,
}
