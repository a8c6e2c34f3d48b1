"""What is said of a change, in the letters of rsync's ``--itemize-changes``."""

from msgspec import Struct

from bisync.core.node import Attributes, Kind
from bisync.core.wish import Held, Seen, Wish


class Item(Struct, frozen=True):
    """One thing that is to happen to one entry, in rsync's eleven letters."""

    letters: str
    path: bytes
    is_dir: bool
    target: bytes | None = None  # of a symlink
    linked: bytes | None = None  # the first name of its group
    old_path: bytes | None = None  # where it was: a rename
    size: int = 0


_KIND_LETTERS = {
    Kind.FILE: "f",
    Kind.DIR: "d",
    Kind.SYMLINK: "L",
    Kind.CHAR: "D",
    Kind.BLOCK: "D",
    Kind.FIFO: "S",
    Kind.SOCKET: "S",
}


def letters_of(
    wish: Wish, seen: Seen, held: Held | None, *, copied: bool, wanted: Attributes
) -> str:
    """rsync's itemized change, as in its manual page under ``--itemize-changes``."""
    kind = _KIND_LETTERS[seen.kind]
    if held is None or held.node.kind is not seen.kind:
        return (">" if seen.kind is Kind.FILE else "c") + kind + "+++++++++"
    now, content = held.node.attributes, held.node.content
    update = "." if not copied else ">" if seen.kind is Kind.FILE else "c"
    is_file = seen.kind is Kind.FILE
    letters = [
        "c" if copied and ((wish.checksum and is_file) or not is_file) else ".",
        "s" if copied and is_file and content.size != seen.content.size else ".",
        _time_letter(wish, seen, held, copied=copied),
        "p" if wanted.mode != now.mode and seen.kind is not Kind.SYMLINK else ".",
        "o" if wanted.uid != now.uid else ".",
        "g" if wanted.gid != now.gid else ".",
        ".",
        "a" if wanted.acl != now.acl else ".",
        "x" if wanted.xattrs != now.xattrs else ".",
    ]
    return update + kind + "".join(letters)


def _time_letter(wish: Wish, seen: Seen, held: Held, *, copied: bool) -> str:
    theirs, mine = seen.attributes.mtime_ns, held.node.attributes.mtime_ns
    differs = not wish.same_time(theirs, mine)
    if seen.is_dir:
        return "t" if differs and wish.times and wish.dir_times else "."
    if wish.times:
        return "t" if differs and (copied or not wish.keeps_newer(seen, held)) else "."
    return "T" if copied else "."


def link_letters(
    wish: Wish, seen: Seen, there: Held | None, wanted: Attributes, *, copied: bool
) -> str:
    """One more name of a file; ``there`` is what has that name now."""
    letters = "h" + letters_of(wish, seen, there, copied=copied, wanted=wanted)[1:]
    return letters if letters[2:].strip(".") else letters.replace(".", " ")
