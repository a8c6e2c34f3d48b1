"""What scripts depend on: exit codes, JSON, options, and what leaves the trees alone."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.trees import (
    COUNTS,
    FAR,
    NOON,
    assert_equal,
    command,
    edit,
    environment,
    everything,
    frozen,
    kept,
    look,
    put,
    run,
    run_anew,
    sync,
)

Pair = tuple[Path, Path]


def _spelled(value: object) -> str:
    """Name a row of a table by its options."""
    return (" ".join(value) or "default") if isinstance(value, list) else ""


def _conflict(a: Path, b: Path, *options: str, check: int = 0) -> None:
    """Bring a pair into a conflict about ``disputed``: A's is older and longer, B's is newer."""
    put(a / "disputed", b"old", t=NOON)
    put(a / "other", b"other")
    sync(a, b)
    edit(a / "disputed", b"from alpha", t=NOON + 10)
    edit(b / "disputed", b"of beta", t=NOON + 20)
    edit(a / "other", b"edited")
    sync(a, b, *options, check=check)
    assert (b / "other").read_bytes() == b"edited"


# --- Help and usage ------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["sync", "--help"], ["conflicts", "--help"]])
def test_help(args: list[str]):
    """Help goes to stdout and is no failure."""
    outcome = run(*args)
    assert outcome.stdout.strip()
    assert outcome.stderr == ""


def test_help_names_the_commands():
    """The help names each command of this stage."""
    said = run("--help").stdout
    assert [word for word in ("sync", "plan", "conflicts") if word not in said] == []


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["frobnicate"],
        ["sync"],
        ["sync", "A"],
        ["sync", "A", "B", "C"],
        ["sync", "--no-such-option", "A", "B"],
        ["sync", "--conflict", "coin-toss", "A", "B"],
        ["sync", "--max-delete", "many", "A", "B"],
        ["sync", "--max-delete", "-3", "A", "B"],
        ["sync", "--exclude-from", "missing", "A", "B"],
        ["plan", "A"],
        ["conflicts", "frobnicate"],
        ["conflicts", "resolve", "x", "--take", "nothing"],
    ],
    ids=" ".join,
)
def test_usage_error(here: Pair, args: list[str]):
    """A call that makes no sense ends with 2 and one line on stderr; nothing is made."""
    put(here[0] / "x", b"one")
    put(here[0].with_name("file"), b"a file")
    before = [frozen(root) for root in here]
    outcome = run(*args, cwd=here[0].parent, check=2)
    lines = [line for line in outcome.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, outcome.stderr
    assert outcome.stdout == ""
    assert [frozen(root) for root in here] == before
    assert not (here[0] / ".bisync").exists()


@pytest.mark.parametrize("root", ["no/such/place", "some-file", "some-file/below"])
def test_unusable_root(here: Pair, root: str):
    """A root that is not there, or no directory, is named; the other one is left alone."""
    a, b = here
    put(a / "x", b"one")
    put(b / "some-file", b"a file")
    before = frozen(a), frozen(b)
    for roots in ((a, b / root), (b / root, a)):
        outcome = run("sync", *roots, check=(2, 25))
        assert root in outcome.stderr
    assert (frozen(a), frozen(b)) == before


# --- JSON ----------------------------------------------------------------------------------------


def test_summary(here: Pair):
    """The last object is the summary: all counts are integers, the exit code is the real one."""
    a, b = here
    put(a / "d/x", b"x" * 1000)
    put(b / "y", b"y" * 10)
    outcome = sync(a, b)
    summary = outcome.summary
    kinds = {name: type(summary[name]) for name in COUNTS}
    assert kinds == dict.fromkeys(COUNTS, int)
    assert type(summary["exit_code"]) is int
    assert summary["exit_code"] == 0
    assert isinstance(summary["elapsed_s"], int | float)
    assert not summary["error"]
    assert all(isinstance(each, dict) and "type" in each for each in outcome.objects)
    assert [each["type"] for each in outcome.objects].count("summary") == 1


def test_counters(here: Pair):
    """Each counter counts what its name says, on both sides together."""
    a, b = here
    for name in ("one", "two", "three"):
        put(a / name, name.encode() * 100)
    put(b / "four", b"four" * 100)
    first = sync(a, b)
    assert first.counts("created", "updated", "deleted", "moves", "kept", "literal_bytes") == {
        "created": 4,
        "updated": 0,
        "deleted": 0,
        "moves": 0,
        "kept": 0,
        "literal_bytes": 1500,
    }
    if not FAR:
        assert first.counts("bytes_sent", "bytes_received") == {
            "bytes_sent": 1100,
            "bytes_received": 400,
        }
    assert first.summary["files_scanned"] >= 4
    edit(a / "one", b"edited")
    (b / "two").unlink()
    (b / "three").rename(b / "third")
    second = sync(a, b)
    assert second.counts("created", "updated", "deleted", "moves", "kept", "literal_bytes") == {
        "created": 0,
        "updated": 1,
        "deleted": 1,
        "moves": 1,
        "kept": 2,
        "literal_bytes": 6,
    }
    assert sorted(kept(a) + kept(b)) == [(b"one", b"one" * 100), (b"two", b"two" * 100)]


def test_summary_of_a_failure(here: Pair):
    """The summary comes last also where the run halts, and says so."""
    a, b = here
    put(a / "x", b"one")
    sync(a, b)
    (b / "x").unlink()
    summary = sync(a, b, check=25).summary
    assert summary["exit_code"] == 25
    assert summary["deleted"] == 0


def test_nothing_is_presumed_later(here: Pair):
    """Files of equal size and time that both sides make later are read: no first contact."""
    a, b = here
    put(a / "other", b"other")
    sync(a, b)
    put(a / "x", b"of alpha", t=NOON)
    put(b / "x", b"of beta!", t=NOON)
    outcome = sync(a, b)
    assert outcome.counts("presumed", "conflicts") == {"presumed": 0, "conflicts": 1}
    assert_equal(a, b)
    assert {b"of alpha", b"of beta!"} <= everything(a, b)


def test_presumed_equal(here: Pair):
    """First contact of equal size and time is presumed equal and counted; --checksum looks."""
    a, b = here
    for number in range(3):
        put(a / f"{number}", b"same", t=NOON)
        put(b / f"{number}", b"same" if number else b"SAME", t=NOON)
    outcome = sync(a, b)
    assert outcome.counts("presumed", "literal_bytes", "conflicts") == {
        "presumed": 3,
        "literal_bytes": 0,
        "conflicts": 0,
    }
    for root in here:
        shutil.rmtree(root / ".bisync")
    outcome = sync(a, b, "--checksum")
    assert outcome.counts("presumed", "conflicts") == {"presumed": 0, "conflicts": 1}
    assert_equal(a, b)
    assert {b"same", b"SAME"} <= everything(a, b)


# --- Looking without touching --------------------------------------------------------------------

DRY = pytest.mark.parametrize("dry", [["sync", "-n"], ["plan"]], ids=["sync -n", "plan"])


@DRY
def test_dry_run_at_first_contact(here: Pair, dry: list[str]):
    """A plan of two roots that never met says what it would do and makes nothing at all."""
    a, b = here
    put(a / "from-alpha", b"one")
    put(b / "from-beta", b"two")
    before = frozen(a), frozen(b)
    outcome = run(*dry, a, b)
    assert "from-alpha" in outcome.stdout
    assert "from-beta" in outcome.stdout
    assert (frozen(a), frozen(b)) == before
    assert sorted(os.listdir(a) + os.listdir(b)) == ["from-alpha", "from-beta"]


@DRY
def test_dry_run_of_a_known_pair(here: Pair, dry: list[str]):
    """A plan of a known pair changes nothing, and the run after it does it all."""
    a, b = here
    for name in ("edited", "deleted", "renamed", "disputed"):
        put(a / name, name.encode(), t=NOON)
    sync(a, b)
    edit(a / "edited", b"again")
    (a / "deleted").unlink()
    (b / "renamed").rename(b / "other-name")
    edit(a / "disputed", b"A", t=NOON + 10)
    edit(b / "disputed", b"B", t=NOON + 20)
    before = frozen(a), frozen(b)
    said = run(*dry, a, b).stdout
    assert (frozen(a), frozen(b)) == before
    named = ("edited", "deleted", "renamed", "other-name", "disputed")
    assert [name for name in named if name not in said] == []
    outcome = sync(a, b)
    assert outcome.counts("updated", "deleted", "moves", "conflicts") == {
        "updated": 2,
        "deleted": 1,
        "moves": 1,
        "conflicts": 1,
    }


@DRY
def test_dry_run_of_what_would_halt(here: Pair, dry: list[str]):
    """A plan of a run that would halt ends with 25 like the run."""
    a, b = here
    put(a / "x", b"one")
    sync(a, b)
    (b / "x").unlink()
    before = frozen(a), frozen(b)
    run(*dry, a, b, check=25)
    assert (frozen(a), frozen(b)) == before


# --- Interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(here: Pair, sign: signal.Signals, code: int):
    """A run stopped by a signal says so by its status; the next run finishes the work."""
    a, b = here
    for number in range(4000):
        put(a / f"{number % 40}/{number}", b"%d" % number)
    engine = subprocess.Popen(
        command("sync", a, b), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    while engine.poll() is None and not {*os.listdir(b)} - {".bisync", "rsync-rollback"}:
        pass
    assert engine.poll() is None, "the engine was too fast for this test"
    engine.send_signal(sign)
    _, said = engine.communicate(timeout=120)
    assert engine.returncode in (code, -sign), said
    assert b"Traceback" not in said
    whole = look(a)
    assert all(whole[path] == seen for path, seen in look(b).items())
    sync(a, b)
    assert_equal(a, b)
    assert look(b) == whole


# --- The deletion guard --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--max-delete", "30"], 25),
        (["--max-delete", "50"], 0),
        (["--max-delete", "30%"], 25),
        (["--max-delete", "60%"], 0),
        (["--max-delete", "30", "--yes"], 0),
        ([], 0),
    ],
    ids=_spelled,
)
def test_max_delete(here: Pair, options: list[str], code: int):
    """Above the limit all deletions are withheld, transfers go on; below, or approved, all go."""
    a, b = here
    for number in range(100):
        put(a / f"{number}", b"%d" % number)
    sync(a, b)
    for number in range(40):
        (a / f"{number}").unlink()
    (a / "99").rename(a / "moved")
    put(a / "new", b"new")
    edit(b / "98", b"edited")
    outcome = sync(a, b, *options, check=code)
    assert outcome.summary["deleted"] == (0 if code else 40)
    assert len(look(b)) == (101 if code else 61)
    assert look(b)["moved"] == b"99"
    assert look(b)["new"] == b"new"
    assert look(a)["98"] == b"edited"
    assert len(kept(b)) == (0 if code else 40)
    if code:
        sync(a, b, *options, "--yes")
        assert_equal(a, b)


def test_default_guard(here: Pair):
    """More than half and more than twenty are withheld by default; moves do not count."""
    a, b = here
    for number in range(60):
        put(a / f"{number}", b"%d" % number)
    sync(a, b)
    for number in range(60):
        (a / f"{number}").rename(a / f"moved{number}")
    assert sync(a, b).counts("moves", "deleted") == {"moves": 60, "deleted": 0}
    for number in range(35):
        (a / f"moved{number}").unlink()
    put(a / "new", b"new")
    sync(a, b, check=25)
    assert len(look(b)) == 61
    sync(a, b, check=25)
    assert sync(a, b, "--yes").summary["deleted"] == 35
    assert_equal(a, b)


def test_small_deletions_pass(here: Pair):
    """Twenty entries may go without a question, even if they are most of the tree."""
    a, b = here
    for number in range(21):
        put(a / f"{number}", b"%d" % number)
    sync(a, b)
    for number in range(20):
        (a / f"{number}").unlink()
    assert sync(a, b).summary["deleted"] == 20
    assert_equal(a, b)


# --- Conflict policies ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "winner"),
    [
        ("newest", b"of beta"),
        ("oldest", b"from alpha"),
        ("alpha", b"from alpha"),
        ("beta", b"of beta"),
    ],
)
def test_conflict_policy(here: Pair, policy: str, winner: bytes):
    """The policy's winner is on both sides, the loser in a store and in the list of both."""
    a, b = here
    _conflict(a, b, "--conflict", policy)
    assert_equal(a, b)
    assert look(a) == {"disputed": winner, "other": b"edited"}
    assert ({b"from alpha", b"of beta"} - {winner}) <= {content for _, content in kept(a) + kept(b)}
    for root in here:
        assert "disputed" in run("conflicts", "list", cwd=root).stdout


def test_conflict_keep_both(here: Pair):
    """Keep-both leaves both versions in the tree."""
    a, b = here
    _conflict(a, b, "--conflict", "keep-both")
    assert_equal(a, b)
    assert {*look(a).values()} == {b"from alpha", b"of beta", b"edited"}
    assert [name for name in look(a) if re.fullmatch(r"disputed\.conflict-.+-\d{8}T\d{6}", name)]


def test_conflict_manual(here: Pair):
    """Manual decides nothing: both sides keep theirs, the rest goes on, 40 until it is decided."""
    a, b = here
    _conflict(a, b, "--conflict", "manual", check=40)
    for _ in range(2):
        assert (a / "disputed").read_bytes() == b"from alpha"
        assert (b / "disputed").read_bytes() == b"of beta"
        assert "disputed" in run("conflicts", "list", cwd=a).stdout
        assert sync(a, b, "--conflict", "manual", check=40).summary["exit_code"] == 40
    edit(a / "disputed", b"of beta", t=NOON + 20)
    sync(a, b, "--conflict", "manual")
    assert_equal(a, b)


def test_tie_does_not_depend_on_the_side(here: Pair):
    """Two edits of one time: the same version wins when the sides are swapped."""
    a, b = here
    other = a.with_name("other")
    c, d = other / "C", other / "D"
    for root in (c, d):
        root.mkdir(parents=True)
    for left, right in ((a, b), (c, d)):
        for number in range(4):
            put(left / f"{number}", b"old", t=NOON)
        sync(left, right)
    for number in range(4):
        for root, text in ((a, b"one%d"), (b, b"two%d"), (c, b"two%d"), (d, b"one%d")):
            edit(root / f"{number}", text % number, t=NOON + 10)
    sync(a, b)
    sync(c, d)
    assert look(a) == look(b) == look(c) == look(d)


# --- conflicts list, show, resolve ---------------------------------------------------------------


def test_conflicts_empty(here: Pair):
    """A pair without a conflict has an empty list, which is no failure."""
    a, b = here
    put(a / "some-name", b"one")
    sync(a, b)
    assert "some-name" not in run("conflicts", cwd=a).stdout
    assert "some-name" not in run("conflicts", "list", "--root", b).stdout


def test_conflicts_list_and_show(here: Pair):
    """A conflict is listed and shown from anywhere in the root, by --root too, on both sides."""
    a, b = here
    put(a / "deep/down/disputed", b"old", t=NOON)
    sync(a, b)
    edit(a / "deep/down/disputed", b"A", t=NOON + 10)
    edit(b / "deep/down/disputed", b"B", t=NOON + 20)
    sync(a, b)
    for root in here:
        assert "deep/down/disputed" in run("conflicts", "list", "--root", root).stdout
        assert "deep/down/disputed" in run("conflicts", cwd=root / "deep").stdout
        shown = run("conflicts", "show", "deep/down/disputed", "--root", root).stdout
        assert "deep/down/disputed" in shown
    run("conflicts", "show", "no/such/conflict", "--root", a, check=(2, 23))


@pytest.mark.parametrize("take", ["live", "kept", "both"])
def test_conflicts_resolve(here: Pair, take: str):
    """A person takes the live version, the kept one or both; the list shrinks on both sides."""
    a, b = here
    _conflict(a, b)  # B's is newer, so A's is displaced, at A
    run("conflicts", "resolve", "disputed", "--take", take, cwd=a)
    sync(a, b)
    assert_equal(a, b)
    live = {name: seen for name, seen in look(b).items() if name != "other"}
    match take:
        case "live":
            assert live == {"disputed": b"of beta"}
        case "kept":
            assert live == {"disputed": b"from alpha"}
        case "both":
            assert live["disputed"] == b"of beta"
            assert {*live.values()} == {b"of beta", b"from alpha"}
    assert {b"of beta", b"from alpha"} <= everything(a, b)
    for root in here:
        assert "disputed" not in run("conflicts", "list", cwd=root).stdout


def test_case_062_conflict_copy_deleted(here: Pair):
    """A person deletes the losing copy: it returns nowhere and the conflict is settled."""
    a, b = here
    _conflict(a, b, "--conflict", "keep-both")
    (copy,) = look(a).keys() - {"disputed", "other"}
    (b / copy).unlink()
    sync(a, b, "--conflict", "keep-both")
    assert look(a).keys() == look(b).keys() == {"disputed", "other"}
    for root in here:
        assert copy not in run("conflicts", "list", cwd=root).stdout


# --- Filters -------------------------------------------------------------------------------------

FILTERED = ["keep", "x.o", "sub/x.o", "sub/keep.o", "build/f", "sub/build/f", "top", "sub/top"]
FILTERED += ["a/b/deep.txt", "a/deep.txt", "name with space", "#hash", "build.txt"]


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (["--exclude", "*.o"], {"x.o", "sub/x.o", "sub/keep.o"}),
        (["--exclude", "*.o", "--include", "keep.o"], {"x.o", "sub/x.o"}),
        (["--exclude", "/top"], {"top"}),
        (["--exclude", "build/"], {"build/f", "sub/build/f"}),
        (["--exclude", "/build"], {"build/f"}),
        (["--exclude", "a/**/deep.txt"], {"a/b/deep.txt", "a/deep.txt"}),
        (["--exclude", "sub/*", "--include", "sub/top"], {"sub/x.o", "sub/keep.o", "sub/build/f"}),
        (["--exclude", r"\#hash"], {"#hash"}),
        (["--exclude", "?.o", "--exclude", "[t]op"], {"x.o", "sub/x.o", "top", "sub/top"}),
        (
            ["--exclude-from", "patterns"],
            {"x.o", "sub/x.o", "build/f", "sub/build/f", "name with space"},
        ),
    ],
    ids=_spelled,
)
def test_filters(here: Pair, options: list[str], gone: set[str]):
    """Filters read as in gitignore: the last match decides, anchors and slashes included."""
    a, b = here
    for name in FILTERED:
        put(a / name, name.encode())
    put(
        a.with_name("patterns"),
        b"# a comment\n\n*.o\n!keep.o\nbuild/\nname with space\n",
    )
    if "x.o" in gone:
        put(b / "x.o", b"not to be touched")
    spelled = [str(a.with_name(each)) if each == "patterns" else each for each in options]
    sync(a, b, *spelled)
    arrived = {name for name in FILTERED if (b / name).exists()}
    assert arrived - {"x.o"} == {*FILTERED} - gone - {"x.o"}
    if "x.o" in gone:
        assert look(b)["x.o"] == b"not to be touched"
        assert look(a)["x.o"] == b"x.o"


# --- Output and spelling -------------------------------------------------------------------------


def test_verbose_and_quiet(here: Pair):
    """-v names each applied change in a line of its own, names escaped; -q says nothing."""
    a, b = here
    put(a / "plain-name", b"one")
    put(a / "new\nline\x1b[31m", b"two")
    said = run("sync", "-v", a, b).stdout
    assert [line for line in said.splitlines() if "plain-name" in line]
    assert [line for line in said.splitlines() if "new" in line and "line" in line]
    assert "\x1b[31m" not in said
    edit(a / "plain-name", b"three")
    assert run("sync", "-q", a, b).said == ""
    assert (b / "plain-name").read_bytes() == b"three"


def test_spelling_of_locations(here: Pair):
    """A trailing slash means nothing, and relative paths count from the current folder."""
    a, b = here
    put(a / "x", b"one")
    run("sync", "A/", "./B", cwd=a.parent)
    put(b / "y", b"two")
    run("sync", f"{a}//", f"{b}/.", cwd=Path("/"))
    assert look(a) == look(b) == {"x": b"one", "y": b"two"}
    (a / "x").unlink()
    assert sync(a, b).counts("deleted", "presumed") == {"deleted": 1, "presumed": 0}


def test_swapped_arguments_are_the_same_pair(here: Pair):
    """The order of the arguments is no part of a pair's identity."""
    a, b = here
    put(a / "x", b"one")
    put(a / "y", b"two")
    sync(a, b)
    (a / "x").unlink()
    assert sync(b, a).counts("deleted", "presumed") == {"deleted": 1, "presumed": 0}
    assert look(b) == {"y": b"two"}


@pytest.mark.parametrize("words", [(), ("--json",), ("--json", "nowhere")])
def test_an_output_that_takes_nothing(here: Pair, words: tuple[str, ...]):
    """That is said, without a traceback, and is no success."""
    a, b = here
    put(a / "f", b"1")
    *options, last = (*words, b) if "nowhere" not in words else ("--json", b / "nowhere")
    with Path("/dev/full").open("wb") as full:
        line = command("sync", "-v", *options, a, last)
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
                              env=environment())  # fmt: skip
    assert done.returncode not in (0, 1)
    assert "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr


COMMANDS = (
    "sync watch plan mirror history restore why verify recover rollback completion man agent "
    "daemon status wait flush pause resume conflicts"
).split()


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_in_a_process_of_its_own(name: str):
    """Nothing that another one loads is missing; what is wanted alone is what it has among all."""
    code, out, err = run_anew([name, "--help"])
    assert (code, err) == (0, b"")
    assert out.startswith(b"usage: bisync " + name.encode())


def test_runs_in_processes_of_their_own(here: Pair):
    """The usual ones, each from nothing."""
    a, b = here
    put(a / "f", b"1")
    for words in (
        ["plan", a, b], ["sync", a, b], ["why", a / "f"], ["history", a / "f"], ["verify", a],
        ["conflicts", "--root", a], ["recover", a],
        ["rollback", "list", "--root", a], ["mirror", "-a", f"{a}/", b / "copy"], ["man"],
        ["completion", "bash"],
    ):  # fmt: skip
        code, _, err = run_anew(list(map(str, words)))
        assert (code, err) == (0, b""), words
    assert (b / "copy/f").read_bytes() == b"1"
