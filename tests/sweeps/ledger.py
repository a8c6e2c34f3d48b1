"""Which contents must still exist, and which a user threw away.

Every content that a user writes is unique, so "is it still there" is one look-up. The ledger sees
the trees only at rest: after the user's turn at a side (`user_changed`) and after the engine's run
or its violent end (`engine_ran`). Per side it notes for each content one of

* never seen live at this side,
* *held*: live at this side when last seen there, or gone from it by the engine's doing,
* *thrown away*: it was live at this side at the end of the engine's last run and is not live there
  at the end of the user's turn: the user deleted it, overwrote it, or renamed over it. If the
  engine brings it back to this side, it is held again.

**A content may be missing only if no side holds it**: it was thrown away at each side where it
was ever live. Everything else must be live at a side or be in a store, whole. In other words: what
a user at one side destroyed, but the engine displaced at the other side, must be in that store.

What a user wrote and destroyed within one turn was never settled and is not noted. What the engine
installed and displaced within one run is not seen at that side; the ledger is then milder than the
promise, never stricter. Attributes are not in the ledger. Empty files carry no token: they may come
and go, but only at names that begin with "empty", so that a file emptied by accident is noticed.

A kept version of a large file may be a reverse delta; it counts when the delta holds the token of
that version. (A version is large above `WHOLE` bytes.)
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from . import tree
from .tree import Content

WHOLE = 64 * 1024
_TOKEN = re.compile(rb"TOKEN-\d{6}")


@dataclass(slots=True)
class Ledger:
    """The contents of a pair of roots, through any number of turns and runs."""

    roots: dict[str, Path]  # "alpha" and "beta"
    labels: dict[Content, str] = field(default_factory=dict)  # every version a user wrote
    large: dict[Content, bytes] = field(default_factory=dict)  # the token of a large version
    held: dict[str, dict[Content, bool]] = field(default_factory=dict)  # False: thrown away
    live: dict[str, set[Content]] = field(default_factory=dict)  # when last seen
    pinned: dict[str, Content] = field(default_factory=dict)  # names nobody ever touches

    def __post_init__(self) -> None:
        for side in self.roots:
            self.held.setdefault(side, {})
            self.live.setdefault(side, set())

    def user_changed(self, side: str) -> None:
        """Note the end of a user's turn at one side; call it before the engine runs again."""
        root = self.roots[side]
        found = tree.contents(root)
        for content in self.live[side] - found.keys():
            self.held[side][content] = False
        for content, paths in found.items():
            self.held[side][content] = True
            if content not in self.labels:
                self._register(content, side, root / paths[0])
        self.live[side] = set(found)

    def engine_ran(self) -> list[str]:
        """Note what is live after a run; return complaints about contents no user ever wrote."""
        complaints = []
        for side, root in self.roots.items():
            found = tree.contents(root)
            for content, paths in found.items():
                self.held[side][content] = True
                complaints += self._unwritten(content, side, paths)
            self.live[side] = set(found)
        return complaints

    def lost(self) -> list[str]:
        """Return each content that must exist and does not."""
        present = set().union(*(tree.contents(root) for root in self.roots.values()))
        present |= set().union(*(tree.kept(root) for root in self.roots.values()))
        missing = [c for c in self.labels if c not in present and not c.is_empty]
        holders = {c: [s for s in self.roots if self.held[s].get(c)] for c in missing}
        suspects = [c for c in missing if holders[c]]
        deltas = [d for root in self.roots.values() for d in tree.reverse_deltas(root)]
        return [
            f"lost: {self.labels[content]}; nobody threw it away at {' or '.join(holders[content])}"
            for content in suspects
            if not (content in self.large and any(self.large[content] in d for d in deltas))
        ]

    def pin(self, side: str, folder: str) -> None:
        """Expect everything below a folder to stay as it is now, at both sides."""
        for content, paths in tree.contents(self.roots[side]).items():
            self.pinned |= {path: content for path in paths if path.startswith(f"{folder}/")}

    def disturbed(self) -> list[str]:
        """Return each pinned name that does not hold what it held."""
        return [
            f"untouched by any user, but changed: {side}:{path!r}"
            for side, root in self.roots.items()
            for path, content in self.pinned.items()
            if not _holds(root / path, content)
        ]

    def _unwritten(self, content: Content, side: str, paths: list[str]) -> list[str]:
        root = self.roots[side]
        if content.is_empty:
            wrong = [p for p in paths if not p.rsplit("/", 1)[-1].startswith("empty")]
            return [
                f"empty: {side}:{path!r} is an empty file; no user emptied it" for path in wrong
            ]
        if content in self.labels:
            return []
        return [f"torn: {side}:{p!r} is {_describe(root / p)}; no user wrote that" for p in paths]

    def _register(self, content: Content, side: str, path: Path) -> None:
        name = path.relative_to(self.roots[side])
        if content.kind == "link":
            self.labels[content] = f"link to {content.value!r}, first at {side}:{name!s}"
            return
        data = path.read_bytes()
        tokens = sorted(set(_TOKEN.findall(data)))
        newest = tokens[-1] if tokens else b"no token"
        self.labels[content] = f"{newest.decode()}, {len(data)} bytes, first at {side}:{name!s}"
        if len(data) > WHOLE and tokens:
            self.large[content] = newest


def _holds(path: Path, content: Content) -> bool:
    return path.exists() and tree.content_at(path, path.lstat()) == content


def _describe(path: Path) -> str:
    if path.is_symlink():
        return f"a link to {str(path.readlink())!r}"
    data = path.read_bytes()
    tokens = sorted({token.decode() for token in _TOKEN.findall(data)})
    return f"{len(data)} bytes with {', '.join(tokens) or 'no token'}"
