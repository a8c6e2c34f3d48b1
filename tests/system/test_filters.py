"""Filter rules: what they take is what rsync takes, for random rules over one tree."""

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from bisync.core.filters import Filters, parse_filters
from bisync.core.wildcard import Pattern

CASES = int(os.environ.get("BISYNC_FILTER_CASES", "150"))
SEED = int(os.environ.get("BISYNC_SEED", "1"))
NAMES = ["a", "b", "ab", "abc", "foo", "bar.o", "x.txt", "a*b", "[x]", "q\\z", "core"]
needs_rsync = pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")


def _tree(root: Path) -> None:
    """Three levels in which the same names come again and again."""
    chance = random.Random(0)
    for one in [*NAMES, "d", "foo2"]:
        top = root / one
        if chance.random() < 0.4:
            top.write_text("x")
            continue
        top.mkdir()
        for two in NAMES:
            below = top / two
            if chance.random() < 0.6:
                below.write_text("x")
                continue
            below.mkdir()
            for three in chance.sample(NAMES, 4):
                (below / three).write_text("x")


def _pattern(chance: random.Random) -> str:
    parts = []
    for _ in range(chance.choice([1, 1, 1, 2, 2, 3])):
        kind = chance.random()
        name = chance.choice(NAMES)
        if kind < 0.45:
            parts.append(name)
        elif kind < 0.9:
            wild = chance.choice(
                ["*", "?", "**", "[a-c]", "[!a]", "*.o", "a?", "?b*", "***", "\\a"]
            )
            parts.append(chance.choice([wild, wild + name[:1], name[:1] + wild]))
        else:
            parts.append("**")
    text = "/".join(parts)
    return chance.choice(["", "", "/"]) + text + chance.choice(["", "", "/"])


def _rule(chance: random.Random) -> tuple[str, str]:
    pattern = _pattern(chance)
    match chance.randrange(6):
        case 0 | 1:
            return "exclude", pattern
        case 2:
            return "include", pattern
        case 3:
            return "exclude", chance.choice("+-") + " " + pattern
        case 4:
            word = chance.choice(
                ["-", "+", "H", "S", "P", "R", "exclude", "include", "hide", "show"]
            )
            return "filter", f"{word} {pattern}"
        case _:
            return (
                "filter",
                f"{chance.choice('+-')}{chance.choice(['!', 's', 'r', ',p'])} {pattern}",
            )


def _taken(root: Path, rules: Filters) -> set[str]:
    """The paths that a walk of the source comes to."""
    found: set[str] = set()
    read = _reader(root)

    def walk(folder: Path, prefix: str, above: Filters) -> None:
        here = above.within(prefix.rstrip("/").encode(), read)
        for path in folder.iterdir():
            name = prefix + path.name
            if here.hides(os.fsencode(name), is_dir=path.is_dir()):
                continue
            found.add(name)
            if path.is_dir():
                walk(path, name + "/", here)

    walk(root, "", rules)
    return found


def _reader(root: Path):
    def read(path: bytes) -> bytes | None:
        try:
            return (root / os.fsdecode(path)).read_bytes()
        except OSError:
            return None

    return read


def _by_rsync(root: Path, words: list[str]) -> set[str] | None:
    done = subprocess.run(
        ["rsync", "-rn", "--out-format=%n", *words, f"{root}/", f"{root}-none/"],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        return None
    lines = os.fsdecode(done.stdout).splitlines()
    return {line.rstrip("/").replace("\\#134", "\\") for line in lines} - {"."}


@needs_rsync
def test_random_rules(tmp_path: Path):
    """For any list of rules: the paths that rsync would send."""
    root = tmp_path / "tree"
    root.mkdir()
    _tree(root)
    chance = random.Random(SEED)
    tried = 0
    for case in range(CASES):
        rules = [_rule(chance) for _ in range(chance.randrange(1, 6))]
        wanted = _by_rsync(root, [f"--{kind}={value}" for kind, value in rules])
        if wanted is None:
            continue
        tried += 1
        read = _reader(root)
        filters = parse_filters([(kind, value.encode()) for kind, value in rules], read)
        assert _taken(root, filters) == wanted, f"case {case}: {rules}"
    assert tried > CASES * 0.9


@needs_rsync
@pytest.mark.parametrize(
    "words",
    [
        ["--filter=: .rules"],
        ["--filter=dir-merge,n .rules"],
        ["--filter=:- .rules"],
        ["--filter=:e .rules", "--exclude=abc"],
        ["--include=abc", "--filter=: .rules"],
        ["--filter=:s .rules"],
    ],
)
def test_rules_in_directories(tmp_path: Path, words: list[str]):
    """Rules that lie in the tree: the nearest first, anchored to their directory."""
    root = tmp_path / "tree"
    root.mkdir()
    _tree(root)
    (root / ".rules").write_text("# a comment\n\n- /foo\n- *.o\n")
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    (folders[0] / ".rules").write_text("+ bar.o\n- /a\n- b/\n")
    (folders[1] / ".rules").write_text("!\n- ab*\n")
    only_patterns = "--filter=:- .rules" in words
    if only_patterns:
        for path in root.rglob(".rules"):
            path.write_text("/foo\n*.o\nab\n")
    wanted = _by_rsync(root, words)
    assert wanted is not None
    pairs = [word.removeprefix("--").split("=", 1) for word in words]
    filters = parse_filters([(kind, value.encode()) for kind, value in pairs], _reader(root))
    assert _taken(root, filters) == wanted


@pytest.mark.parametrize(
    ("pattern", "path", "is_dir", "wanted"),
    [
        ("*.o", "x/y.o", False, True),
        ("/*.o", "x/y.o", False, False),
        ("foo/", "a/foo", False, False),
        ("foo/", "a/foo", True, True),
        ("foo/bar", "a/foo/bar", False, True),
        ("foo/bar", "afoo/bar", False, False),
        ("**/foo", "foo", False, True),
        ("foo/***", "foo", True, True),
        ("foo/***", "foo/a/b", False, True),
        ("foo/**", "foo", True, False),
        ("a/**/b", "a/b", False, False),
        ("[[:digit:]]x", "1x", False, True),
        ("[]a]", "]", False, True),
        ("[^a]", "/", False, False),
        ("x[", "x[", False, False),
        ("a\\*", "a\\*", False, False),
        ("b\\a", "b\\a", False, True),
    ],
)
def test_patterns(pattern: str, path: str, is_dir: bool, wanted: bool):
    """One pattern, one path."""
    assert Pattern(pattern.encode()).matches(path.encode(), is_dir=is_dir) is wanted
