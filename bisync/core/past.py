"""Earlier states of a tree: the present one, and what each operation since found before it."""

from collections.abc import Iterable, Mapping

from msgspec import Struct

from bisync.core.node import ROOT, Attributes, Content, Kind, Place


class Past(Struct, frozen=True):
    """One node as it was: where, with what content and attributes."""

    names: frozenset[Place]
    content: Content
    attributes: Attributes | None


State = dict[int, Past]
"""A whole tree, by key."""


def rewind(present: State, before: Iterable[tuple[int, Past | None]]) -> State:
    """The tree before a series of operations.

    Args:
        present: the tree after them; not changed.
        before: what each operation found, the newest operation first; ``None``: no such node.
    """
    state = dict(present)
    for key, past in before:
        if past is None:
            state.pop(key, None)
        else:
            state[key] = past
    return state


def paths(state: Mapping[int, Past], top: int = ROOT) -> dict[bytes, int]:
    """Path below a directory -> key, parents before what is in them; every name of a node."""
    children: dict[int, list[tuple[bytes, int]]] = {}
    for key, past in state.items():
        for parent, name in past.names:
            children.setdefault(parent, []).append((name, key))
    found: dict[bytes, int] = {}
    stack: list[tuple[bytes, int]] = [(b"", top)]
    while stack:
        prefix, directory = stack.pop()
        for name, key in sorted(children.get(directory, ())):
            path = prefix + name
            found[path] = key
            if state[key].content.kind is Kind.DIR:
                stack.append((path + b"/", key))
    return found


def find(state: Mapping[int, Past], path: bytes) -> int | None:
    """The key at a path; ``None`` where nothing is."""
    at = {place: key for key, past in state.items() for place in past.names}
    key: int | None = ROOT
    for name in path.split(b"/") if path else ():
        key = at.get((key if key is not None else 0, name))
        if key is None:
            return None
    return key


def path_of(state: Mapping[int, Past], key: int) -> bytes | None:
    """A path of a node; ``None`` if it has none."""
    parts: list[bytes] = []
    seen: set[int] = set()
    while key != ROOT:
        past = state.get(key)
        if past is None or not past.names or key in seen:
            return None
        seen.add(key)
        key, name = min(past.names, key=lambda p: (p[1], p[0]))
        parts.append(name)
    return b"/".join(reversed(parts))
