"""Names and paths of every kind: cases 129-135. Bytes in, the same bytes out."""

import os

import pytest

from tests.trees import Arena, Batch, collect, deep, edit, look, put, snapshot, write_at

CHAIN = [b"%02d" % level + b"n" * 198 for level in range(30)]  # 6 030 bytes of path


def _round(c: Arena, names: list[str | bytes]):
    """Create, edit and rename a file and a directory of each name."""
    at = {name: c.a / os.fsdecode(name) for name in names}
    for path in at.values():
        put(path, c("first"))
    put(c.a / "plain", c("plain"))
    yield
    for path in at.values():
        put(path, c("second"))
    yield
    assert set(look(c.b)) == {os.fsdecode(name) for name in names} | {"plain"}
    assert {seen for path, seen in look(c.b).items() if path != "plain"} == {c("second")}
    assert len([each for each in c.kept(1) if each[1] == c("first")]) == len(names)
    for path in at.values():
        path.unlink()
        put(path / path.name, c("third"))
    yield
    assert {path for path, seen in look(c.b).items() if seen == c("third")} == {
        f"{os.fsdecode(name)}/{os.fsdecode(name)}" for name in names
    }
    assert len([each for each in c.kept(1) if each[1] == c("second")]) == len(names)


def case_129_odd_characters(c: Arena):
    """Newline, tab, escape codes, dashes, spaces, dots: nothing is special."""
    yield from _round(
        c,
        [
            *("new\nline", "tab\ttab", "\x1b[31mred", "-rf", "--delete", "~", "$HOME", "`id`"),
            *(" lead", "trail ", "...", ".. ", "*", "a;b", "quote'\"", "back\\slash", "#", "!x"),
        ],
    )


def case_130_invalid_utf8(c: Arena):
    """Bytes that are no UTF-8 are a name like any other."""
    yield from _round(c, [b"\xff\xfe", b"caf\xe9", b"\xed\xa0\x80", b"\x80", "ж".encode()[:1]])


def case_131_name_of_255_bytes(c: Arena):
    """The longest name leaves no room for a suffix: temps and kept versions find another way."""
    yield from _round(c, ["x" * 255, "é" * 127, b"\xff" * 255])


def case_131_three_versions_of_a_255_byte_name(c: Arena):
    """Two kept versions of a day of one such name are two files."""
    path = put(c.a / ("y" * 255), c("first"))
    yield
    edit(path, c("second"))
    yield
    edit(path, c("third"))
    yield
    assert sorted(content for _, content in c.kept(1)) == [c("first"), c("second")]


def case_132_deeper_than_path_max(c: Arena):
    """A path of 6 000 bytes is created, edited, renamed and moved like any other."""
    with deep(c.a, CHAIN) as fd:
        write_at(fd, b"leaf", c("first"))
        write_at(fd, b"other", c("other"))
    yield
    assert c("first") in look(c.b).values()
    with deep(c.a, CHAIN) as fd:
        write_at(fd, b"leaf", c("second"))
        os.rename(b"other", b"renamed", src_dir_fd=fd, dst_dir_fd=fd)
    yield
    assert (c("second"), c("other")) == tuple(
        look(c.b)[os.fsdecode(b"/".join([*CHAIN, name]))] for name in (b"leaf", b"renamed")
    )
    assert c("first") in {content for _, content in c.kept(1)}
    with deep(c.a, CHAIN[:15]) as fd:
        os.rename(CHAIN[15], b"moved", src_dir_fd=fd, dst_dir_fd=fd)
    yield
    moved = b"/".join([*CHAIN[:15], b"moved", *CHAIN[16:], b"leaf"])
    assert look(c.b)[os.fsdecode(moved)] == c("second")
    with deep(c.b, [*CHAIN[:15], b"moved", *CHAIN[16:]]) as fd:
        os.unlink(b"leaf", dir_fd=fd)
    yield
    assert os.fsdecode(moved) not in look(c.a)
    assert c("second") in {content for _, content in c.kept(0)}


def case_133_composed_and_decomposed(c: Arena):
    """The two Unicode forms of one name are two files."""
    put(c.a / "caf\u00e9", c("composed"))
    put(c.a / "cafe\u0301", c("decomposed"))
    yield
    edit(c.b / "caf\u00e9", c("edited"))
    (c.a / "cafe\u0301").unlink()
    yield
    assert look(c.a) == {"caf\u00e9": c("edited")}


def case_134_names_like_the_engine_s_own(c: Arena):
    """A user's file may look like a kept version, a delta or a conflict copy."""
    names = ["x", "x.~2~", "x.~2~.bisync-delta", "x.conflict-me-20250101T000000"]
    for name in names:
        put(c.a / name, c(name))
    yield
    assert look(c.b) == {name: c(name) for name in names}
    for name in names:
        edit(c.a / name, c(name + " again"))
    yield
    assert look(c.b) == {name: c(name + " again") for name in names}
    edit(c.a / "x", c("x, third"))
    yield
    gone = {c(name) for name in names} | {c("x again")}
    assert {content for _, content in c.kept(1)} == gone


def case_135_store_name_deep_in_the_tree(c: Arena):
    """A user's directory called rsync-rollback is a directory."""
    put(c.a / "deep/rsync-rollback/2025-01-01/f", c("one"))
    yield
    edit(c.b / "deep/rsync-rollback/2025-01-01/f", c("two"))
    yield
    assert look(c.a)["deep/rsync-rollback/2025-01-01/f"] == c("two")


CASES = collect(globals())


@pytest.mark.parametrize("case", CASES)
def test_case(batch: Batch, case: str):
    """Each case ends as its row says."""
    batch.verdict(case)


def test_counts(batch: Batch):
    """No name is a problem."""
    batch.assert_runs("conflicts", "problems", "busy")


def test_rest(batch: Batch):
    """A run at rest writes nothing outside the state folder."""
    batch.assert_rest("/case_132*")  # rsync itself stops at PATH_MAX
    assert max(map(len, snapshot(batch.roots[0]))) > 4096
