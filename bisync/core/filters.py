"""rsync's filter rules: the first rule that matches a path decides, without one it is taken.

A rule acts at the source (it hides a path), at the destination (it protects a path from
deletion), or at both. Rules may come from files that lie in the directories of the tree
itself; those of the nearest directory are asked first.
"""

from collections.abc import Callable

from msgspec import Struct, field
from msgspec.structs import replace

from bisync.core.wildcard import Pattern
from bisync.errors import UsageError

Reader = Callable[[bytes], bytes | None]
"""The content of a file of rules by its path below the root; ``None`` where there is none."""

_WORDS = {
    b"exclude": b"-",
    b"include": b"+",
    b"merge": b".",
    b"dir-merge": b":",
    b"hide": b"H",
    b"show": b"S",
    b"protect": b"P",
    b"risk": b"R",
    b"clear": b"!",
}


class Rule(Struct, frozen=True):
    """One rule: what it is for, and where it acts."""

    include: bool
    pattern: Pattern
    at_source: bool = True
    at_destination: bool = True
    negated: bool = False
    perishable: bool = False  # not asked in a directory that is being deleted
    prefix: bytes = b""  # leads from where an anchored pattern begins to where paths begin

    def matches(self, path: bytes, *, is_dir: bool) -> bool:
        """Whether it speaks of a path."""
        return self.pattern.matches(self.prefix + path, is_dir=is_dir) is not self.negated


class PerDirectory(Struct, frozen=True):
    """Files of rules in the directories of the tree, and the rules of the one in hand."""

    name: bytes
    flags: "Flags"
    inherit: bool = True
    rules: tuple["Rule | PerDirectory", ...] = ()


class Flags(Struct, frozen=True):
    """What the letters behind a rule's first one say."""

    only: str = ""  # of merged files: "+" or "-", all their lines are patterns of that kind
    source: bool = False
    destination: bool = False
    negated: bool = False
    perishable: bool = False
    hide_itself: bool = False
    no_inherit: bool = False
    words: bool = False


class Filters(Struct, frozen=True):
    """A list of rules, as it stands in one directory."""

    rules: tuple[Rule | PerDirectory, ...] = ()
    delete_excluded: bool = False
    separator: bytes = b"\n"  # of rules in files
    _dynamic: bool = field(default=False)

    @property
    def active(self) -> bool:
        """Whether there is any rule."""
        return bool(self.rules)

    def under(self, base: bytes, read: Reader, *, itself: bool) -> "Filters":
        """The rules with those that lie above the tree.

        A file of rules whose name begins with a slash is looked for in all directories from
        there down to the parent of the transfer's first directory; see "parent directories"
        under ``dir-merge`` in rsync's manual.

        Args:
            base: the absolute path of the directory that paths are relative to.
            read: reads a file of rules by its absolute path.
            itself: ``base`` is no directory of the transfer but the parent of one.
        """
        if not self._dynamic:
            return self
        found = (self._collected(rule, base, read, itself=itself) for rule in self.rules)
        return replace(self, rules=tuple(found))

    def _collected(
        self, rule: Rule | PerDirectory, base: bytes, read: Reader, *, itself: bool
    ) -> Rule | PerDirectory:
        if not isinstance(rule, PerDirectory) or not rule.name.startswith(b"/") or not rule.inherit:
            return rule
        top, _, name = rule.name.rpartition(b"/")
        if not (base + b"/").startswith(top + b"/"):
            return rule
        rules: tuple[Rule | PerDirectory, ...] = ()
        parts = [part for part in base[len(top) :].split(b"/") if part]
        for depth in range(len(parts) + itself):
            data = read(b"/".join([top, *parts[:depth], name]))
            if data is None:
                continue
            own = self._reading(read)
            own.lines(data, rule.flags)
            prefix = b"".join(part + b"/" for part in parts[depth:])
            found = tuple(
                replace(r, prefix=prefix) if isinstance(r, Rule) and r.pattern.anchored else r
                for r in (_at_source(own.rules) if self.delete_excluded else own.rules)
            )
            rules = found if own.cleared else found + rules
        return replace(rule, rules=rules)

    def _reading(self, read: Reader, anchor: bytes = b"") -> "_Reading":
        return _Reading(read, anchor, self.separator)

    def within(self, directory: bytes, read: Reader) -> "Filters":
        """The rules as they stand in a directory ("" is the root), given those of its parent."""
        if not self._dynamic:
            return self
        return replace(self, rules=tuple(self._entered(r, directory, read) for r in self.rules))

    def _entered(
        self, rule: Rule | PerDirectory, directory: bytes, read: Reader
    ) -> Rule | PerDirectory:
        if not isinstance(rule, PerDirectory):
            return rule
        prefix = directory + b"/" if directory else b""
        outer = tuple(self._entered(r, directory, read) for r in rule.rules if rule.inherit)
        data = read(prefix + rule.name.lstrip(b"/"))
        if data is None:
            return replace(rule, rules=outer)
        own = self._reading(read, b"/" + directory if directory else b"")
        own.lines(data, rule.flags)
        found = _at_source(own.rules) if self.delete_excluded else own.rules
        rules = tuple(self._entered(r, directory, read) for r in found)
        return replace(rule, rules=rules if own.cleared else rules + outer)

    def hides(self, path: bytes, *, is_dir: bool) -> bool:
        """Whether the source must not show a path."""
        rule = _first(self.rules, path, is_dir=is_dir, source=True)
        return rule is not None and not rule.include

    def protects(self, path: bytes, *, is_dir: bool, deleting: bool = False) -> bool:
        """Whether a path at the destination must not be deleted.

        Args:
            deleting: its directory is being deleted.
        """
        rule = _first(self.rules, path, is_dir=is_dir, source=False, deleting=deleting)
        return rule is not None and not rule.include


def _first(
    rules: tuple[Rule | PerDirectory, ...],
    path: bytes,
    *,
    is_dir: bool,
    source: bool,
    deleting: bool = False,
) -> Rule | None:
    for rule in rules:
        if isinstance(rule, PerDirectory):
            found = _first(rule.rules, path, is_dir=is_dir, source=source, deleting=deleting)
            if found is not None:
                return found
        elif (
            (rule.at_source if source else rule.at_destination)
            and not (deleting and rule.perishable)
            and rule.matches(path, is_dir=is_dir)
        ):
            return rule
    return None


def _at_source(rules: list[Rule | PerDirectory]) -> list[Rule | PerDirectory]:
    """With --delete-excluded a rule that acts at both ends acts at the source only."""
    return [
        replace(r, at_destination=False) if isinstance(r, Rule) and r.at_source else r
        for r in rules
    ]


class _Reading:
    """Rules as they are read, one after the other."""

    def __init__(self, read: Reader, anchor: bytes, separator: bytes) -> None:
        self.read = read
        self.separator = separator  # of the rules in files
        self.anchor = anchor  # put before anchored patterns: where the file lies
        self.rules: list[Rule | PerDirectory] = []
        self.cleared = False

    def split(self, data: bytes) -> list[bytes]:
        """The lines of a file."""
        lines = data.split(self.separator)
        return [line.rstrip(b"\r") for line in lines] if self.separator == b"\n" else lines

    def lines(self, data: bytes, flags: Flags) -> None:
        """A file of rules."""
        for text in data.split() if flags.words else self.split(data):
            if not text or (not flags.words and text[:1] in b";#"):
                continue
            if flags.only:
                self.pattern(text, include=flags.only == "+", flags=flags)
            else:
                self.rule(text, flags)

    def old_style(self, text: bytes, *, include: bool) -> None:
        """What --exclude and --include take: a pattern, which may say itself what it is."""
        if text == b"!":
            self.clear()
        elif text[:2] in (b"+ ", b"- "):
            self.pattern(text[2:], include=text[:1] == b"+", flags=Flags())
        else:
            self.pattern(text, include=include, flags=Flags())

    def clear(self) -> None:
        self.rules.clear()
        self.cleared = True

    def rule(self, text: bytes, outer: Flags) -> None:
        """One rule in the long form."""
        kind, flags, rest = _split(text)
        if kind == b"!":
            self.clear()
        elif kind in (b"+", b"-"):
            flags = replace(
                flags,
                source=flags.source or outer.source,
                destination=flags.destination or outer.destination,
                perishable=flags.perishable or outer.perishable,
            )
            self.pattern(rest, include=kind == b"+", flags=flags)
        elif kind in (b"H", b"S"):
            self.pattern(rest, include=kind == b"S", flags=replace(flags, source=True))
        elif kind in (b"P", b"R"):
            self.pattern(rest, include=kind == b"R", flags=replace(flags, destination=True))
        else:
            self.merge(kind, flags, rest)

    def merge(self, kind: bytes, flags: Flags, name: bytes) -> None:
        """A file of rules, here (``.``) or in each directory (``:``)."""
        if flags.hide_itself:
            base = name.rsplit(b"/", 1)[-1]
            self.pattern(base, include=False, flags=Flags())
        if kind == b":":
            self.rules.append(PerDirectory(name, flags, not flags.no_inherit))
            return
        data = self.read(name)
        if data is None:
            raise UsageError(f"filter: cannot read the file {name.decode(errors='replace')!r}")
        self.lines(data, flags)

    def pattern(self, text: bytes, *, include: bool, flags: Flags) -> None:
        if not text:
            raise UsageError("filter: a rule without a pattern")
        if self.anchor and text.startswith(b"/"):
            text = self.anchor + text
        both = flags.source is flags.destination
        self.rules.append(
            Rule(
                include,
                Pattern(text),
                at_source=both or flags.source,
                at_destination=both or flags.destination,
                negated=flags.negated,
                perishable=flags.perishable,
            )
        )


def _split(text: bytes) -> tuple[bytes, Flags, bytes]:
    """A rule's kind, its modifiers, and the rest of the line."""
    shown = text.decode(errors="backslashreplace")
    for word, letter in _WORDS.items():
        if text.startswith(word) and text[len(word) : len(word) + 1] in (b" ", b"_", b",", b""):
            kind, behind = letter, text[len(word) :]
            break
    else:
        kind, behind = text[:1], text[1:]
        if kind not in _WORDS.values():
            raise UsageError(f"filter rule not understood: {shown!r}")
    flags, i = Flags(), 1 if behind.startswith(b",") else 0
    while i < len(behind) and behind[i : i + 1] not in b" _":
        letter = behind[i : i + 1]
        merges = kind in b".:"
        if letter in b"+-" and merges:
            flags = replace(flags, only=letter.decode())
        elif letter == b"s":
            flags = replace(flags, source=True)
        elif letter == b"r":
            flags = replace(flags, destination=True)
        elif letter == b"p":
            flags = replace(flags, perishable=True)
        elif letter == b"!" and not merges:
            flags = replace(flags, negated=True)
        elif letter == b"e" and merges:
            flags = replace(flags, hide_itself=True)
        elif letter == b"n" and merges:
            flags = replace(flags, no_inherit=True)
        elif letter == b"w" and merges:
            flags = replace(flags, words=True)
        else:
            raise UsageError(
                f"filter rule {shown!r}: the modifier {letter.decode()!r} is not known"
            )
        i += 1
    rest = behind[i + 1 :]
    if not rest and kind != b"!":
        raise UsageError(f"filter rule {shown!r}: it has no pattern")
    return kind, flags, rest


def parse_filters(
    words: list[tuple[str, bytes]],
    read: Reader,
    *,
    delete_excluded: bool = False,
    zero: bool = False,
) -> Filters:
    """Rules in the order of the command line.

    Args:
        words: (exclude | include | exclude-from | include-from | filter, its value).
        read: how to read the files of rules that are named there.
        delete_excluded: rules that do not say where they act, act at the source only.
        zero: rules in files end with a zero byte, not a line.

    Raises:
        UsageError: a rule cannot be understood, or a file not be read.
    """
    separator = b"\0" if zero else b"\n"
    reading = _Reading(read, b"", separator)
    for kind, value in words:
        if kind == "filter":
            reading.rule(value.lstrip(b" "), Flags())
        elif kind in ("exclude", "include"):
            reading.old_style(value, include=kind == "include")
        else:
            data = read(value)
            if data is None:
                raise UsageError(f"--{kind}: cannot read {value.decode(errors='replace')!r}")
            for text in reading.split(data):
                if text and text[:1] not in b";#":
                    reading.old_style(text, include=kind == "include-from")
    rules = _at_source(reading.rules) if delete_excluded else reading.rules
    dynamic = any(isinstance(rule, PerDirectory) for rule in rules)
    return Filters(tuple(rules), delete_excluded, separator, dynamic)
