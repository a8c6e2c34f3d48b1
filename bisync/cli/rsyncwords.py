"""rsync's command line: every word, what it does here, or why it is refused.

The tables are the one place that knows: the parser, the help and the documentation read them.
"""

import argparse

from msgspec import Struct

from bisync.errors import UsageError


class Word(Struct, frozen=True):
    """One option: its spellings, the field it sets, and what is to be said about it."""

    names: str  # separated by spaces
    field: str
    text: str
    value: str = ""  # the name of its value; "" for a switch
    many: bool = False  # may be given several times
    negatable: bool = False  # has a --no- form
    note: str = ""  # for the documentation, where it differs from rsync or is always true


SWITCHES = (
    Word("-r --recursive", "recursive", "go into directories", negatable=True),
    Word("-l --links", "links", "carry symlinks as symlinks", negatable=True),
    Word("-p --perms", "perms", "carry permissions", negatable=True),
    Word("-t --times", "times", "carry modification times", negatable=True),
    Word("-g --group", "group", "carry the group", negatable=True),
    Word("-o --owner", "owner", "carry the owner (as root)", negatable=True),
    Word("--devices", "devices", "carry device files (as root)", negatable=True),
    Word("--specials", "specials", "carry FIFOs and sockets", negatable=True),
    Word("-A --acls", "acls", "carry ACLs; implies -p", negatable=True),
    Word("-X --xattrs", "xattrs", "carry extended attributes", negatable=True),
    Word(
        "-H --hard-links",
        "hard_links",
        "carry hard links",
        negatable=True,
        note="without it a file of the destination that has other names is never written to",
    ),
    Word("-O --omit-dir-times", "omit_dir_times", "leave directory times out", negatable=True),
    Word(
        "-x --one-file-system",
        "one_file_system",
        "do not cross into other file systems",
        negatable=True,
        note="what is mounted at the destination is never emptied",
    ),
    Word("-S --sparse", "sparse", "keep holes", negatable=True, note="always true"),
    Word("-c --checksum", "checksum", "compare contents, not size and time", negatable=True),
    Word(
        "-u --update",
        "update",
        "keep content that is newer at the destination",
        negatable=True,
        note="decides about content and its time; other attributes are carried",
    ),
    Word("--existing --ignore-non-existing", "existing", "make nothing new"),
    Word(
        "--ignore-existing",
        "ignore_existing",
        "change nothing that exists",
        note="an existing name is not replaced by a rename either",
    ),
    Word(
        "-m --prune-empty-dirs",
        "prune_empty",
        "leave out directories without files",
        negatable=True,
    ),
    Word(
        "--force",
        "force",
        "replace a directory that is not empty by something else",
        negatable=True,
    ),
    Word(
        "--ignore-errors",
        "ignore_errors",
        "delete although something could not be read",
        negatable=True,
        note="a directory that could not be listed protects its counterpart, and "
        "a source that is empty or another one than last time deletes nothing",
    ),
    Word(
        "--numeric-ids",
        "numeric_ids",
        "owners by number",
        negatable=True,
        note="always true on one machine; else owners go by name, root stays root",
    ),
    Word(
        "--inplace",
        "inplace",
        "change big files in place",
        negatable=True,
        note="whether that is so, the file system and the change decide, see --apply; nobody sees "
        "half of it",
    ),
    Word(
        "-W --whole-file",
        "whole_file",
        "copy whole files",
        negatable=True,
        note="without it, what the destination has of a file from 4 MiB on is not sent, here too",
    ),
    Word(
        "--partial",
        "partial",
        "keep what was transferred of an interrupted file",
        negatable=True,
        note="nobody sees a partial file; it waits in the state folder",
    ),
    Word(
        "-z --compress",
        "compress",
        "compress on the way",
        negatable=True,
        note="with zstd; what does not get smaller is sent as it is",
    ),
    Word(
        "-b --backup",
        "backup",
        "keep what is replaced or deleted beside its name (NAME~)",
        negatable=True,
        note="without it the rollback store keeps it; see --no-keep",
    ),
    Word(
        "--delete-excluded",
        "delete_excluded",
        "delete what a filter hides, too",
        note="never the state folder and the store",
    ),
    Word("-0 --from0", "from0", "names and rules in files end with a zero byte", negatable=True),
    Word("-n --dry-run", "dry_run", "say what would be done"),
    Word(
        "-i --itemize-changes",
        "itemize",
        "one line per change, in rsync's letters",
        negatable=True,
        note="a rename is shown as one line, NEW <- OLD",
    ),
    Word("-q --quiet", "quiet", "problems only"),
    Word("-h --human-readable", "human", "sizes with units", negatable=True),
    Word("--stats", "stats", "counters at the end"),
    Word("--progress", "progress", "show progress", negatable=True),
    Word("--json", "json", "one JSON object per line, the last a summary"),
    Word("--yes", "yes", "approve what the deletion guard withholds"),
)
DELETES = ("--delete", "--del", "--delete-before", "--delete-during", "--delete-delay",
           "--delete-after")  # fmt: skip
VALUES = (
    Word(
        "--max-size",
        "max_size",
        "transfer nothing larger",
        "SIZE",
        note="limits transfers: a rename is still a rename",
    ),
    Word("--min-size", "min_size", "transfer nothing smaller", "SIZE", note="as --max-size"),
    Word(
        "-@ --modify-window",
        "modify_window",
        "times that close count as equal",
        "SECONDS",
        note="where the source is remembered its own index decides",
    ),
    Word(
        "--max-delete",
        "max_delete",
        "delete at most this many",
        "N",
        note="the guard (50 % and more than 20 entries) is off then",
    ),
    Word("--chmod", "chmod", "change permissions on the way", "CHANGES", many=True),
    Word("--files-from", "files_from", "the names to transfer, from a file or -", "FILE"),
    Word(
        "--backup-dir",
        "backup_dir",
        "keep what is replaced or deleted there; implies -b",
        "DIR",
        note="never overwrites: a second version becomes NAME.~2~",
    ),
    Word("--suffix", "suffix", "of backups (~)", "SUFFIX"),
    Word(
        "-B --block-size",
        "block_size",
        "of the rolling search",
        "SIZE",
        note="blocks are 128 KiB, whatever is given",
    ),
    Word("--bwlimit", "bwlimit", "bytes read in a second, in KiB", "RATE"),
    Word(
        "--timeout",
        "timeout",
        "give up on a silent peer",
        "SECONDS",
        note="exit 30; without it after 60 s",
    ),
    Word("--compress-level --zl", "compress_level", "see -z", "N", note="see -z"),
    Word("--compress-choice --zc", "compress_choice", "see -z", "NAME", note="see -z"),
    Word(
        "-e --rsh",
        "rsh",
        "how to reach another machine",
        "COMMAND",
        note="split as a shell would; else RSYNC_RSH, else ssh",
    ),
    Word(
        "--rsync-path",
        "rsync_path",
        "the program at the other machine (bisync)",
        "PROGRAM",
        note="a bisync; ' agent' is appended",
    ),
    Word(
        "--out-format",
        "out_format",
        "of the line per change",
        "FORMAT",
        note="the letters i, n, f, L, l, o and %%",
    ),
    Word(
        "--keep",
        "keep_age",
        "drop kept versions older than this: 90d, 12w, 1y or forever (90d; with -b: forever)",
        "AGE",
        note="bisync's own",
    ),
    Word(
        "--keep-every",
        "keep_every",
        "of versions that a later run of the mirror replaced, keep one per file in this time: "
        "15min, 1h, 1d or all (1h; with -b: all)",
        "TIME",
        note="bisync's own",
    ),
    Word(
        "--apply",
        "apply",
        "how new versions of big files get into place: auto, replace or in-place (auto; with -b: "
        "replace)",
        "HOW",
        note="bisync's own",
    ),
    Word("--log-file", "log_file", "write the lines there, too", "FILE"),
)
FILTERS = ("--exclude", "--include", "--exclude-from", "--include-from", "--filter", "-f")
REFUSED = {
    "--append": "a file that grew is not proven to have only grown",
    "--append-verify": "a file that grew is not proven to have only grown",
    "--copy-links": "links are carried as links; name the folder behind one as a source",
    "-L": "links are carried as links; name the folder behind one as a source",
    "--copy-unsafe-links": "links are carried as they are, and never followed",
    "--safe-links": "links are carried as they are, and never followed",
    "--munge-links": "links are carried as they are, and never followed",
    "--copy-dirlinks": "a link is never followed, at either side",
    "-k": "a link is never followed, at either side",
    "--keep-dirlinks": "a link is never followed, at either side",
    "-K": "a link is never followed, at either side",
    "--relative": "name the folder that the paths start from as the source, with --files-from",
    "-R": "name the folder that the paths start from as the source, with --files-from",
    "--dirs": "use -r with a filter: --exclude='/*/*'",
    "-d": "use -r with a filter: --exclude='/*/*'",
    "--executability": "use -p",
    "-E": "use -p",
    "--super": "what a plain user may not set is left out",
    "--fake-super": "attributes are never hidden in extended attributes",
    "--cvs-exclude": "give the patterns with --exclude-from",
    "-C": "give the patterns with --exclude-from",
    "--remove-source-files": "a source is never written",
    "--compare-dest": "what is equal is never copied; name the folder itself as the destination",
    "--copy-dest": "what is equal is never copied; name the folder itself as the destination",
    "--link-dest": "versions are kept in the rollback store; see 'bisync history'",
    "--fuzzy": "renames are found by identity",
    "-y": "renames are found by identity",
    "--delay-updates": "every file is complete before it gets its name",
    "--temp-dir": "what waits lies in the state folder, on the file system of the destination",
    "-T": "what waits lies in the state folder, on the file system of the destination",
    "--partial-dir": "what waits lies in the state folder, on the file system of the destination",
    "--size-only": "equal size proves nothing; use -c where times say nothing",
    "--ignore-times": "use -c",
    "-I": "use -c",
    "--usermap": "owners travel by number",
    "--groupmap": "owners travel by number",
    "--chown": "owners travel by number; run chown afterwards",
    "--atimes": "reading for a copy would change them",
    "-U": "reading for a copy would change them",
    "--crtimes": "Linux cannot set them",
    "-N": "Linux cannot set them",
    "--daemon": "ssh is the only way to another machine",
    "--password-file": "ssh is the only way to another machine",
    "--port": "use --rsh='ssh -p PORT'",
    "--write-batch": "not part of what bisync does",
    "--read-batch": "not part of what bisync does",
    "--only-write-batch": "not part of what bisync does",
    "--iconv": "names are bytes and stay what they are",
    "--ignore-missing-args": "a missing source is said",
    "--delete-missing-args": "a missing source deletes nothing",
    "--mkpath": "make the folder first",
    "--preallocate": "use neither; holes stay holes",
    "--copy-devices": "a device is no file",
    "--write-devices": "a device is no file",
    "--list-only": "use -n -i with an empty destination",
    "--stop-after": "use timeout(1): a stop is clean at any moment",
    "--stop-at": "use timeout(1): a stop is clean at any moment",
}  # fmt: skip


class _Filter(argparse.Action):
    """Filter words keep their order."""

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        name = (option_string or "").lstrip("-")
        name = "filter" if name == "f" else name
        namespace.filters = [*(namespace.filters or []), (name, values)]


class _Short(argparse.Action):
    """-F, and what stands for several words."""

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        _values: object,
        option_string: str | None = None,
    ) -> None:
        match option_string:
            case "-a" | "--archive":
                for name in ("links", "perms", "times", "group", "owner"):
                    setattr(namespace, name, True)
                namespace.recursive = namespace.recursive or "archive"  # not with --files-from
                namespace.devices = namespace.specials = True
            case "-D":
                namespace.devices = namespace.specials = True
            case "--no-D":
                namespace.devices = namespace.specials = False
            case "-P":
                namespace.partial = namespace.progress = True
            case "-F":
                count = sum(
                    rule == ("filter", ": /.rsync-filter") for rule in namespace.filters or []
                )
                rule = "- .rsync-filter" if count else ": /.rsync-filter"
                namespace.filters = [*(namespace.filters or []), ("filter", rule)]
            case _:
                namespace.delete = True


class _Refused(argparse.Action):
    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        _namespace: argparse.Namespace,
        _values: object,
        option_string: str | None = None,
    ) -> None:
        name = option_string or ""
        raise UsageError(f"{name}: rsync's option is not supported: {REFUSED[name]}")


def add_words(p: argparse.ArgumentParser) -> None:
    """Give a parser all of rsync's words."""
    p.add_argument("paths", nargs="*", metavar="SRC... DST", help="sources and the destination")
    p.add_argument("--help", action="help", help="show this and exit")
    groups: tuple[tuple[tuple[str, ...], str], ...] = (
        (("-a", "--archive"), "the same as -rlptgoD"),
        (("-D",), "the same as --devices --specials"),
        (("--no-D",), argparse.SUPPRESS),
        (("-P",), "the same as --partial --progress"),
        (("-F",), "rules from .rsync-filter in each directory; twice: and leave it out"),
        (DELETES, "delete what the source does not have (the rollback store keeps it)"),
    )
    for spellings, text in groups:
        p.add_argument(*spellings, action=_Short, nargs=0, help=text)
    p.add_argument("--no-delete", action="store_false", dest="delete", help=argparse.SUPPRESS)
    p.add_argument("-v", "--verbose", action="count", default=0, help="one line per change")
    for word in SWITCHES:
        names = word.names.split()
        p.add_argument(*names, dest=word.field, action="store_true", help=word.text)
        if word.negatable:
            forms = ["--no-" + name.lstrip("-") for name in names]
            p.add_argument(*forms, dest=word.field, action="store_false", help=argparse.SUPPRESS)
    for word in VALUES:
        p.add_argument(
            *word.names.split(), dest=word.field, metavar=word.value, help=word.text,
            action="append" if word.many else "store",
        )  # fmt: skip
    p.add_argument(
        *FILTERS, action=_Filter, dest="filters", metavar="RULE",
        help="rsync's filter rules; the first one that matches decides",
    )  # fmt: skip
    p.add_argument("--no-keep", action="store_true", help="do not keep what was displaced")
    for name in REFUSED:
        takes = argparse.OPTIONAL if name.startswith("--") else 0
        p.add_argument(name, action=_Refused, nargs=takes, help=argparse.SUPPRESS)
    p.set_defaults(delete=False, devices=False, specials=False, filters=None)


def size(text: str, name: str, *, unit: int = 1) -> int:
    """rsync's SIZE: a number, with K, M, G, T or P for powers of 1024 (KB ...: of 1000).

    Raises:
        UsageError: it is no size.
    """
    word, offset = text.strip(), 0
    if word.endswith(("+1", "-1")):
        word, offset = word[:-2], int(word[-2:])
    digits = word.rstrip("bBiIkKmMgGtTpP")
    suffix = word[len(digits) :].lower()
    factor = unit
    if suffix and suffix != "b":
        if suffix[0] not in "kmgtp" or suffix[1:] not in ("", "b", "ib"):
            raise UsageError(f"{name} {text}: give a size like 100, 1.5M or 2GB")
        base = 1000 if suffix[1:] == "b" else 1024
        factor = base ** ("kmgtp".index(suffix[0]) + 1)
    elif suffix == "b":
        factor = 1
    try:
        value = float(digits) if "." in digits else int(digits)
    except ValueError:
        raise UsageError(f"{name} {text}: give a size like 100, 1.5M or 2GB") from None
    if value < 0:
        raise UsageError(f"{name} {text}: give a size that is not negative")
    return int(value * factor) + offset


def markdown() -> str:
    """The table of the documentation: every word of rsync, and what it is here."""
    rows = ["| rsync's word | here |", "| --- | --- |"]
    for word in sorted((*SWITCHES, *VALUES), key=lambda w: w.names.lstrip("-").lower()):
        names = ", ".join(f"`{name}`" for name in word.names.split())
        rows.append(f"| {names} | {word.text}{'; ' + word.note if word.note else ''} |")
    rows.append("| `-a`, `-D`, `-P`, `-F`, `-v` | as rsync |")
    rows.append(
        f"| {', '.join(f'`{n}`' for n in DELETES)} | one behaviour: deletions are done last |"
    )
    rows.append(
        f"| {', '.join(f'`{n}`' for n in FILTERS)} | rsync's rules, the first match decides |"
    )
    reasons: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(name)
    for reason, refused in sorted(reasons.items(), key=lambda item: item[1]):
        rows.append(f"| {', '.join(f'`{n}`' for n in refused)} | refused: {reason} |")
    return "\n".join(rows) + "\n"
