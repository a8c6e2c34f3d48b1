"""The rules over trees in memory: one row per situation, by its number in the list of cases.

A row says: the agreed tree, what alpha's user does, what beta's user does, the tree on both sides
afterwards, how many files' content crossed, and the conflicts by kind. The same situations on real
file systems are in `tests/system`.
"""

# ruff: noqa: E501 - a row of a table is a line
import pytest

from bisync.core.node import ROOT, Content, Kind
from bisync.core.resolve import Policy, Rules
from tests.fakes.memory import MemoryPair, MemoryReplica, file_content


def place(replica: MemoryReplica, path: str):
    """(parent node, name) of a path whose parent exists."""
    *parts, name = path.encode().split(b"/")
    node = ROOT
    for part in parts:
        node = replica.at_place[node, part]
    return node, name


def do(replica: MemoryReplica, script: str) -> None:
    """Do what a user does: words separated by blanks, operations by semicolons."""
    for line in filter(None, (part.strip() for part in script.split(";"))):
        act, path, *rest = line.split()
        at = place(replica, path)
        match act:
            case "new":
                replica.make(*at, file_content(rest[0]))
            case "mkdir":
                replica.make(*at, Content(Kind.DIR))
            case "symlink":
                replica.make(*at, Content(Kind.SYMLINK, target=rest[0].encode()))
            case "edit":
                replica.edit(replica.at_place[at], file_content(rest[0]))
            case "save":
                replica.remove(at)
                replica.make(*at, file_content(rest[0]))
            case "mv":
                replica.rename(at, place(replica, rest[0]))
            case "swap":
                two = place(replica, rest[0])
                one, other = replica.at_place[at], replica.at_place[two]
                replica.at_place[at], replica.at_place[two] = other, one
                replica.marks.update((one, other))
            case "ln":
                replica.link(replica.at_place[at], place(replica, rest[0]))
            case "rm":
                replica.remove(at)
            case "chmod":
                replica.chmod(replica.at_place[at], int(rest[0], 8))
            case "touch":
                replica.touch(replica.at_place[at])
            case _:
                raise AssertionError(line)


def tree(replica: MemoryReplica) -> dict[str, str]:
    """Path -> content: a file's text, ``/`` of a directory, ``->target`` of a symlink."""
    shown = {}
    for path, (content, _, _) in replica.tree().items():
        match content.kind:
            case Kind.DIR:
                text = "/"
            case Kind.SYMLINK:
                text = "->" + content.target.decode()
            case _:
                text = content.digest.rstrip(b".").decode()
        shown[path.decode()] = text
    return shown


def wanted(text: str) -> dict[str, str]:
    """``x=1 d/ d/y=2`` as a tree."""
    found = {}
    for word in text.split():
        if word.endswith("/"):
            found[word[:-1]] = "/"
        else:
            path, _, content = word.partition("=")
            found[path] = content
    return found


XY = "new x 1; new y 2"
TREE = "mkdir D; new D/f 1; new D/g 2"

# fmt: off
CASES = {
    # name:                                  agreed  alpha  beta  result  sent  conflicts
    "001 rename":                            ("new x 1", "mv x y", "", "y=1", 0, ""),
    "002 swap through a third name":         (XY, "mv x t; mv y x; mv t y", "", "x=2 y=1", 0, ""),
    "003 swap at once":                      (XY, "swap x y", "", "x=2 y=1", 0, ""),
    "004 chain and a new one":               (XY, "mv y z; mv x y; new x 3", "", "x=3 y=1 z=2", 1, ""),
    "005 rotation":                          (XY + "; new z 3", "mv z t; mv y z; mv x y; mv t x", "",
                                              "x=3 y=1 z=2", 0, ""),
    "006 there and back":                    ("new x 1", "mv x y; mv y x", "", "x=1", 0, ""),
    "007 rename and edit":                   ("new x 1", "mv x y; edit y 2", "", "y=2", 1, ""),
    "008 rename against edit":               ("new x 1", "mv x y", "edit x 2", "y=2", 1, ""),
    "009 rename against delete":             ("new x 1", "mv x y", "rm x", "y=1", 1, ""),
    "010 two new names":                     ("new x 1", "mv x z", "mv x y", "y=1", 0, "name"),
    "011 the same new name":                 ("new x 1", "mv x y", "mv x y", "y=1", 0, ""),
    "014 rename over":                       (XY, "mv x y", "", "y=1", 0, ""),
    "016 rename over, the mover edited":     (XY, "mv x y", "edit x 3", "y=3", 1, ""),
    "017 into a new directory":              ("mkdir d; new d/f 1", "mkdir e; mv d/f e/f", "",
                                              "d/ e/ e/f=1", 0, ""),
    "018 into a directory renamed there":    ("mkdir d; new f 1", "mv f d/f", "mv d e", "e/ e/f=1", 0, ""),
    "019 directory into one renamed there":  ("mkdir D; mkdir E", "mv D E/D", "mv E F", "F/ F/D/", 0, ""),
    "020 renamed directory gets a file":     (TREE, "mv D E", "new D/h 3", "E/ E/f=1 E/g=2 E/h=3", 1, ""),
    "021 renamed directory, edited file":    (TREE, "mv D E", "edit D/f 3", "E/ E/f=3 E/g=2", 1, ""),
    "022 renamed directory against delete":  (TREE, "mv D E", "rm D", "E/ E/f=1 E/g=2", 2, ""),
    "023 deleted but one moved out":         (TREE, "rm D", "mv D/f f", "f=1", 1, ""),
    "024 deleted but one moved in":          (TREE + "; new x 3", "rm D", "mv x D/x", "D/ D/x=3", 0, ""),
    "025 two directories into each other":   ("mkdir X; mkdir Y; new X/a 1; new Y/b 2",
                                              "mv X Y/X", "mv Y X/Y", "X/ X/a=1 X/Y/ X/Y/b=2", 0, "cycle"),
    "027 out, then deleted":                 ("mkdir D; mkdir D/s; new D/s/f 1", "mv D/s s; rm D", "",
                                              "s/ s/f=1", 0, ""),
    "028 inversion":                         ("mkdir A; mkdir A/e", "mv A/e e; mv A e/A", "", "e/ e/A/", 0, ""),
    "029 renamed, and a new one":            (TREE, "mv D E; mkdir D; new D/f 8; new D/g 9", "",
                                              "D/ D/f=8 D/g=9 E/ E/f=1 E/g=2", 2, ""),
    "037 two moves of one file":             ("new x 1", "mv x y; mv y z", "", "z=1", 0, ""),
    "041 two edits":                         ("new x 1", "edit x 2", "edit x 3", "x=3", 1, "content"),
    "042 the same edit":                     ("new x 1", "edit x 2", "edit x 2", "x=2", 0, ""),
    "043 two new files":                     ("", "new x 1", "new x 2", "x=2", 1, "content"),
    "044 two new directories":               ("", "mkdir D; new D/a 1", "mkdir D; new D/b 2",
                                              "D/ D/a=1 D/b=2", 2, ""),
    "046 edit against delete":               ("new x 1", "edit x 2", "rm x", "x=2", 1, ""),
    "047 edit in a deleted directory":       (TREE, "edit D/f 3", "rm D", "D/ D/f=3", 1, ""),
    "048 deleted twice":                     ("new x 1", "rm x", "rm x", "", 0, ""),
    "049 all against a part":                (TREE, "rm D", "rm D/f", "", 0, ""),
    "051 made anew against edit":            ("new x 1", "save x 2", "edit x 3", "x=3", 1, "content"),
    "056 touch against edit":                ("new x 1", "touch x", "edit x 2", "x=2", 1, ""),
    "057 chmod against edit":                ("new x 1", "chmod x 600", "edit x 2", "x=2", 1, ""),
    "058 two chmods":                        ("new x 1", "chmod x 600", "chmod x 640", "x=1", 0, "attributes"),
    "059 directory against edit":            ("new x 1", "rm x; mkdir x; new x/f 2", "edit x 3",
                                              "x/ x/f=2", 1, "type"),
    "060 symlink against edit":              ("new x 1", "rm x; symlink x t", "edit x 3", "x=3", 1, "content"),
    "065 group edited through one name":     ("new x 1; ln x y; ln x z", "edit y 2", "", "x=2 y=2 z=2", 1, ""),
    "066 one of a group saved anew":         ("new x 1; ln x y; ln x z", "save y 2", "", "x=1 y=2 z=1", 1, ""),
    "067 one more name":                     ("new x 1", "ln x y", "", "x=1 y=1", 0, ""),
    "069 one directory of a group deleted":  ("mkdir D; new x 1; ln x y; ln x D/z", "rm D", "", "x=1 y=1", 0, ""),
    "078 empty directory made and removed":  ("mkdir d", "rm d; mkdir e", "", "e/", 0, ""),
    "081 save by a backup that stays":       ("new x 1", "mv x x~; new x 2", "", "x=2 x~=1", 1, ""),
    "081 the same against an edit":          ("new x 1", "mv x x~; new x 2", "edit x 3", "x=3 x~=1", 2, "content"),
    "083 save against chmod":                ("new x 1", "save x 2", "chmod x 600", "x=2", 1, ""),
}
# fmt: on


@pytest.mark.parametrize("flip", [False, True], ids=["as said", "sides swapped"])
@pytest.mark.parametrize("row", CASES.values(), ids=CASES)
def test_case(row, flip: bool):
    """Both sides end as the row says, whichever of them is alpha."""
    agreed, alpha, beta, result, sent, conflicts = row
    pair = MemoryPair()
    one, two = pair.sides[::-1] if flip else pair.sides
    two.clock = iter(range(5000, 6000))  # beta's user is always the later one
    do(one, agreed)
    pair.cycle()
    before = sum(side.content_moved for side in pair.sides)
    do(one, alpha)
    do(two, beta)
    plan = pair.cycle(tuple(set(side.marks) for side in pair.sides))
    assert tree(one) == tree(two) == wanted(result)
    assert sum(side.content_moved for side in pair.sides) - before == sent
    assert sorted(c.kind.value for c in plan.conflicts) == conflicts.split()
    again, _ = pair.plan()
    assert again.empty()
    assert not again.conflicts


NAMES = {
    # two different nodes want one name: both stay, the newer at the name
    "012 renamed against new": ("new x 1", "mv x y", "new y 2", ["2", "1"]),
    "013 two renamed to one": ("new x 1; new w 2", "mv x z", "mv w z", ["2", "1"]),
    "015 renamed over an edited one": ("new x 1; new y 2", "mv x y", "edit y 3", ["3", "1"]),
}


@pytest.mark.parametrize("row", NAMES.values(), ids=NAMES)
def test_both_stay(row):
    """Nothing leaves the tree where two files want one name."""
    agreed, alpha, beta, contents = row
    pair = MemoryPair()
    do(pair.sides[0], agreed)
    pair.cycle()
    do(pair.sides[0], alpha)
    pair.sides[1].clock = iter(range(5000, 6000))
    do(pair.sides[1], beta)
    plan = pair.cycle()
    shown = tree(pair.sides[0])
    assert shown == tree(pair.sides[1])
    assert [shown[name] for name in sorted(shown)] == contents
    assert [name for name in shown if ".conflict-" in name]
    assert [c.kind.value for c in plan.conflicts] == ["name"]


@pytest.mark.parametrize("policy", [Policy.OLDEST, Policy.ALPHA, Policy.KEEP_BOTH, Policy.MANUAL])
def test_policies(policy: Policy):
    """041 under each policy: who wins, what stays, what waits."""
    pair = MemoryPair(Rules(policy=policy, replicas=("A", "B")))
    pair.sides[1].clock = iter(range(5000, 6000))
    do(pair.sides[0], "new x 1")
    pair.cycle()
    do(pair.sides[0], "edit x 2")
    do(pair.sides[1], "edit x 3")
    plan = pair.cycle()
    trees = [tree(side) for side in pair.sides]
    if policy is Policy.MANUAL:
        assert trees == [{"x": "2"}, {"x": "3"}]
        assert plan.conflicts[0].winner is None
    elif policy is Policy.KEEP_BOTH:
        assert trees[0] == trees[1]
        assert sorted(trees[0].values()) == ["2", "3"]
        assert trees[0]["x"] == "3"
    else:
        assert trees == [{"x": "2"}, {"x": "2"}]
        assert pair.sides[1].kept == [file_content("3")]


def test_loser_is_kept():
    """041: the loser is in the store of its side."""
    pair = MemoryPair()
    do(pair.sides[0], "new x 1")
    pair.cycle()
    do(pair.sides[0], "edit x 2")
    pair.sides[1].clock = iter(range(5000, 6000))
    do(pair.sides[1], "edit x 3")
    pair.cycle()
    assert pair.sides[0].kept == [file_content("2")]
    assert pair.sides[1].kept == []
