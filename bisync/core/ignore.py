"""Which paths a session leaves alone: gitignore patterns, the last match decides.

Only home of pathspec.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from msgspec import Struct

from bisync.core.path import STATE_DIR, STORE_DIR, TEMP_PREFIX
from bisync.errors import UsageError

if TYPE_CHECKING:
    import pathspec

_TEMP_LENGTH = len(TEMP_PREFIX) + 32


class Ignore(Struct, frozen=True):
    """The filter of a session. ``patterns`` in gitignore syntax, first to last.

    A directory that is ignored is not looked into; ``!pattern`` takes a path back in as
    long as its directory is not ignored itself.
    """

    patterns: tuple[str, ...] = ()

    def matcher(self) -> "Matcher":
        """Compile the patterns.

        Raises:
            UsageError: a pattern cannot be understood.
        """
        return Matcher(self.patterns)


class Matcher:
    """Compiled patterns."""

    def __init__(self, patterns: Iterable[str]) -> None:
        lines = list(patterns)
        self._spec: pathspec.GitIgnoreSpec | None = None
        if not lines:
            return
        from pathspec import GitIgnoreSpec  # noqa: PLC0415 - start-up: most runs have no filter

        try:
            self._spec = GitIgnoreSpec.from_lines(lines)
        except (ValueError, TypeError) as error:
            raise UsageError(f"filter pattern not understood: {error}") from error

    @property
    def active(self) -> bool:
        """Whether there is any pattern at all."""
        return self._spec is not None

    def ignores(self, path: bytes, *, is_dir: bool) -> bool:
        """Whether a path below the root is left alone."""
        if self._spec is None:
            return False
        text = path.decode("utf-8", "surrogateescape")
        return self._spec.match_file(text + "/" if is_dir else text)


def reserved(name: bytes, *, at_root: bool) -> bool:
    """Whether a name belongs to the engine: state and store at the root, its temps anywhere."""
    if at_root and name in (STATE_DIR, STORE_DIR):
        return True
    return (
        len(name) == _TEMP_LENGTH
        and name.startswith(TEMP_PREFIX)
        and all(c in b"0123456789abcdef" for c in name[len(TEMP_PREFIX) :])
    )


def filter_lines(excludes: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """gitignore lines from ``--exclude`` and ``--include`` in their order.

    Args:
        excludes: ("exclude" | "include", pattern) as given.
    """
    lines = []
    for kind, pattern in excludes:
        if kind == "exclude":
            lines.append(pattern)
        else:
            lines.append(pattern[1:] if pattern.startswith("!") else "!" + pattern)
    return tuple(lines)
