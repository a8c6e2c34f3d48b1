"""rsync's patterns: shell wildcards over paths, as its manual page defines them.

``*`` and ``?`` stop at slashes, ``**`` does not; ``[...]`` never matches a slash. A pattern
with a leading slash is anchored; one with a slash inside is compared with that many trailing
components, one with ``**`` inside with the rest behind any slash.
"""

import re

from msgspec import Struct
from msgspec.structs import force_setattr

_CLASSES = {
    b"alnum": b"0-9A-Za-z",
    b"alpha": b"A-Za-z",
    b"blank": b" \\t",
    b"cntrl": b"\\x00-\\x1f\\x7f",
    b"digit": b"0-9",
    b"graph": b"\\x21-\\x7e",
    b"lower": b"a-z",
    b"print": b"\\x20-\\x7e",
    b"punct": b"!-\\/:-@\\[-`{-~",
    b"space": b"\\s",
    b"upper": b"A-Z",
    b"xdigit": b"0-9A-Fa-f",
}


class Pattern(Struct, frozen=True):
    """One pattern, ready to match. Compare with :meth:`matches`."""

    text: bytes
    # What follows is made of the text.
    only_dirs: bool = False
    _plain: bytes | None = None
    _expression: re.Pattern[bytes] | None = None
    anchored: bool = False
    _components: int = 0  # compared from the end; 0: the whole path
    _after_slash: bool = False
    _base_only: bool = False
    _slash_before: bool = False
    _slash_behind: bool = False

    def __post_init__(self) -> None:
        text = self.text
        only_dirs = len(text) > 1 and text.endswith(b"/")
        text = text[:-1] if only_dirs else text
        anchored = text.startswith(b"/")
        slashes = text.count(b"/")
        wild = any(c in text for c in b"*[?")
        wild2 = wild and b"**" in text
        prefix2 = wild2 and text.startswith(b"**")
        body = text[1:] if anchored else text
        force_setattr(self, "only_dirs", only_dirs)
        force_setattr(self, "anchored", anchored)
        force_setattr(self, "_plain", None if wild else body)
        force_setattr(self, "_expression", _compile(body) if wild else None)
        trailing = not anchored and slashes > 0 and not wild2
        force_setattr(self, "_components", slashes + 1 if trailing else 0)
        force_setattr(self, "_after_slash", not anchored and wild2 and not prefix2)
        force_setattr(self, "_base_only", slashes == 0 and not wild2)
        force_setattr(self, "_slash_before", prefix2)
        force_setattr(self, "_slash_behind", wild2 and text.endswith(b"***"))

    def matches(self, path: bytes, *, is_dir: bool) -> bool:
        """Whether a path below the root of the transfer matches."""
        if self.only_dirs and not is_dir:
            return False
        if self._base_only:
            path = path.rsplit(b"/", 1)[-1]
        if self._slash_before:
            path = b"/" + path
        if is_dir and self._slash_behind:
            path += b"/"
        if self._components:
            parts = path.split(b"/")
            if len(parts) < self._components:
                return False
            path = b"/".join(parts[-self._components :])
        if self._expression is None:
            return path == self._plain
        if self._expression.fullmatch(path):
            return True
        if not self._after_slash:
            return False
        at = path.find(b"/")
        while at >= 0:
            if self._expression.fullmatch(path, at + 1):
                return True
            at = path.find(b"/", at + 1)
        return False


def _compile(text: bytes) -> re.Pattern[bytes]:
    out, i = [], 0
    while i < len(text):
        char = text[i : i + 1]
        if char == b"*":
            end = i
            while text[end : end + 1] == b"*":
                end += 1
            out.append(b".*" if end - i > 1 else b"[^/]*")
            i = end
            continue
        if char == b"?":
            out.append(b"[^/]")
        elif char == b"[":
            found, i = _bracket(text, i)
            out.append(found)
            continue
        elif char == b"\\" and i + 1 < len(text):
            i += 1
            out.append(re.escape(text[i : i + 1]))
        else:
            out.append(re.escape(char))
        i += 1
    return re.compile(b"".join(out), re.DOTALL)


def _bracket(text: bytes, start: int) -> tuple[bytes, int]:
    """A ``[...]`` as a regular expression, and where it ends; without an end it matches nothing."""
    i = start + 1
    negated = text[i : i + 1] in (b"!", b"^")
    i += negated
    parts: list[bytes] = []
    first = True
    while i < len(text):
        char = text[i : i + 1]
        if char == b"]" and not first:
            inside = b"".join(parts)
            body = b"[^/" + inside + b"]" if negated else b"(?!/)[" + inside + b"]"
            return body, i + 1
        first = False
        if text[i : i + 2] == b"[:" and (end := text.find(b":]", i)) > 0:
            parts.append(_CLASSES.get(text[i + 2 : end], b""))
            i = end + 2
            continue
        if char == b"\\" and i + 1 < len(text):
            i += 1
            char = text[i : i + 1]
        if text[i + 1 : i + 2] == b"-" and text[i + 2 : i + 3] not in (b"]", b""):
            high = text[i + 2 : i + 3]
            i += 3
            if high == b"\\" and i < len(text):
                high = text[i : i + 1]
                i += 1
            if char <= high:
                parts.append(re.escape(char) + b"-" + re.escape(high))
            continue
        parts.append(re.escape(char))
        i += 1
    return b"(?!)", len(text)
