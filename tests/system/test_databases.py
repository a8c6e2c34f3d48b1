"""The files of a database are one thing: read at one instant, decided and applied together."""

import contextlib
import errno
import os
import random
import resource
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import bisync
from bisync.errors import Interrupted
from tests.trees import look, run, sync

VERSIONS = int(os.environ.get("BISYNC_VERSIONS", "15"))
SEED = int(os.environ.get("BISYNC_SEED", "1"))
ACCOUNTS, BALANCE = 300, 1000
Pair = tuple[Path, Path]


class Bank:
    """A database whose balances always have the same sum; one commit moves money."""

    def __init__(self, path: Path, *, mode: str = "WAL", seed: int = SEED) -> None:
        self.path = path
        self.chance = random.Random(seed)
        self.db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self.db.execute(f"PRAGMA journal_mode={mode}")
        self.db.execute("PRAGMA wal_autocheckpoint=60")
        self.db.execute("CREATE TABLE IF NOT EXISTS account(id INTEGER PRIMARY KEY, v, pad)")
        self.db.execute("BEGIN")
        self.db.executemany(
            "INSERT OR REPLACE INTO account VALUES(?, ?, randomblob(400))",
            [(number, BALANCE) for number in range(ACCOUNTS)],
        )
        self.db.execute("COMMIT")

    def move(self, times: int = 1) -> None:
        for _ in range(times):
            one, two = self.chance.sample(range(ACCOUNTS), 2)
            self.db.execute("BEGIN")
            for account, amount in ((one, -7), (two, 7)):
                self.db.execute(
                    "UPDATE account SET v=v+?, pad=randomblob(400) WHERE id=?", (amount, account)
                )
            self.db.execute("COMMIT")

    def close(self) -> None:
        self.db.close()


def balances(folder: Path, copy: Path) -> list[int] | None:
    """What a database holds for who opens a copy of its files; ``None``: it is broken."""
    for file in copy.glob("*"):
        file.unlink()
    copy.mkdir(exist_ok=True)
    for file in folder.glob("bank.db*"):
        if not file.name.endswith("-shm"):
            (copy / file.name).write_bytes(file.read_bytes())
    with contextlib.closing(sqlite3.connect(copy / "bank.db")) as db:
        try:
            if db.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                return None
            found = [v for (v,) in db.execute("SELECT v FROM account ORDER BY id")]
        except sqlite3.DatabaseError:
            return None
    return found if (len(found), sum(found)) == (ACCOUNTS, ACCOUNTS * BALANCE) else None


@contextlib.contextmanager
def at_work(bank: Bank, *, pause: float) -> Iterator[None]:
    """Money moves all the time, in a thread; the connection is closed at the end."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(pause):
            bank.move()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        bank.close()


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_a_database_at_work(pair: Pair, tmp_path: Path, mode: str):
    """Every version of the replica is an instant of it, or the run says that it has to wait."""
    a, b = pair
    bank = Bank(a / "bank.db", mode=mode)
    seen = set()
    with at_work(bank, pause=0.002 if mode == "WAL" else 0.02):
        for _ in range(VERSIONS):
            assert bisync.sync(a, b).exit_code in (0, 24)
            if (b / "bank.db").exists():
                found = balances(b, tmp_path / "copy")
                assert found is not None
                seen.add(tuple(found))
    # Where files can be cloned, a busy database is no reason to wait.
    clones = subprocess.run(
        ["cp", "--reflink=always", a / "bank.db", a.parent / "probe"], check=False
    )
    if clones.returncode == 0 and mode == "WAL":
        assert len(seen) >= 3
    sync(a, b)
    assert look(a) == look(b)
    assert balances(b, tmp_path / "copy") == balances(a, tmp_path / "other")


def test_a_log_goes_with_its_database(pair: Pair, tmp_path: Path):
    """The last one who closes it writes the log into the file: one step, no old log left."""
    a, b = pair
    bank = Bank(a / "bank.db")
    bank.move(20)
    sync(a, b)
    assert (b / "bank.db-wal").stat().st_size
    bank.move(20)
    bank.close()
    assert not (a / "bank.db-wal").exists()
    report = bisync.sync(a, b, bisync.Config(max_delete=bisync.DeleteLimit(count=0)))
    assert report.exit_code in (0, 25)  # the shared memory may wait, the log must not
    assert not (b / "bank.db-wal").exists()
    assert balances(b, tmp_path / "copy") == balances(a, tmp_path / "other")


@pytest.mark.parametrize("policy", list(bisync.Policy))
def test_both_sides_wrote(pair: Pair, tmp_path: Path, policy: bisync.Policy):
    """The database of one side, whole, or nothing until a person says; never half of each."""
    a, b = pair
    Bank(a / "bank.db").close()
    sync(a, b)
    one, two = Bank(a / "bank.db", seed=2), Bank(b / "bank.db", seed=3)
    one.move(20)
    two.move(20)
    for bank in (one, two):  # one has its news in the log, one in the file
        bank.db.execute("PRAGMA wal_checkpoint(PASSIVE)")
    two.close()
    one.move(1)
    subprocess.run(["cp", "-a", a / "bank.db-wal", tmp_path / "wal"], check=True)
    one.close()
    subprocess.run(["cp", "-a", tmp_path / "wal", a / "bank.db-wal"], check=True)
    mine, theirs = (balances(x, tmp_path / "copy") for x in pair)
    assert mine is not None and theirs is not None and mine != theirs
    report = bisync.sync(a, b, bisync.Config(conflict=policy))
    after = [balances(x, tmp_path / "copy") for x in pair]
    match policy:
        case bisync.Policy.MANUAL:
            assert report.exit_code == 23
            assert after == [mine, theirs]
        case bisync.Policy.BETA:
            assert after == [theirs, theirs]
        case bisync.Policy.ALPHA:
            assert after == [mine, mine]
        case _:
            assert after in ([mine, mine], [theirs, theirs])
    if policy is bisync.Policy.KEEP_BOTH:
        assert len(list(a.glob("bank.db.conflict*"))) == 1
    if policy is not bisync.Policy.MANUAL:
        assert report.conflicts
        assert look(a) == look(b)
        assert bisync.sync(a, b).exit_code == 0


@pytest.mark.parametrize("policy", [bisync.Policy.ALPHA, bisync.Policy.BETA])
def test_one_side_closed_it_the_other_moved_its_log_on(
    here: Pair, tmp_path: Path, policy: bisync.Policy
):
    """The log that one side has not any more stays with the other side's file, or goes."""
    a, b = here
    one = Bank(a / "bank.db")
    one.db.execute("PRAGMA wal_autocheckpoint=0")
    one.move(9)
    sync(a, b)
    one.move(9)
    one.close()
    log = (b / "bank.db-wal").read_bytes(), os.stat(b / "bank.db-wal").st_mtime_ns
    with contextlib.closing(sqlite3.connect(b / "bank.db")) as two:
        two.execute("PRAGMA wal_checkpoint(PASSIVE)")
        moved = (b / "bank.db").read_bytes()
    (b / "bank.db").write_bytes(moved)
    (b / "bank.db-wal").write_bytes(log[0])
    mine, theirs = (balances(x, tmp_path / "copy") for x in here)
    assert None not in (mine, theirs) and mine != theirs
    report = bisync.sync(a, b, bisync.Config(conflict=policy))
    assert report.exit_code == 0
    wanted = mine if policy is bisync.Policy.ALPHA else theirs
    assert [balances(x, tmp_path / "copy") for x in here] == [wanted, wanted]
    assert look(a) == look(b)


def test_a_reader_at_the_replica(pair: Pair, tmp_path: Path):
    """Who only looks leaves an empty log; that is no version of the database."""
    a, b = pair
    bank = Bank(a / "bank.db")
    bank.close()
    sync(a, b)
    bank = Bank(a / "bank.db", seed=5)
    bank.move(30)
    with contextlib.closing(sqlite3.connect(b / "bank.db")) as reader:
        assert reader.execute("SELECT count(*) FROM account").fetchone() == (ACCOUNTS,)
        wanted = balances(a, tmp_path / "copy")
        sync(a, b, check=24)  # it is open at the replica: all of it waits
        assert balances(a, tmp_path / "copy") == wanted
        assert balances(b, tmp_path / "copy") not in (None, wanted)
    bank.close()
    sync(a, b)
    assert balances(b, tmp_path / "copy") == wanted
    assert look(a) == look(b)


def test_a_file_that_only_looks_like_one(pair: Pair):
    """Names that end like a journal's are files like others."""
    a, b = pair
    for name in ("x", "x-wal", "y-journal", "z-shm", "-wal", "d-wal"):
        (a / name).write_bytes(b"1")
    (a / "d").mkdir()
    sync(a, b)
    (a / "x-wal").write_bytes(b"22")
    (b / "x").write_bytes(b"4444")
    (b / "y-journal").write_bytes(b"333")
    (a / "z-shm").unlink()
    (a / "d-wal").rename(a / "d/x")
    sync(a, b)
    assert look(a) == look(b)
    assert (a / "x").read_bytes() == b"4444"
    assert (b / "x-wal").read_bytes() == b"22"
    assert (a / "y-journal").read_bytes() == b"333"
    assert not (b / "z-shm").exists()


KILLED = """
import ctypes, os, signal, sys
import bisync
from bisync.fs import perform, store
left = int(sys.argv[3])

def before(act):
    def wrapped(*words, **more):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return act(*words, **more)
    return wrapped

for name in ("swap", "rename_noreplace"):
    setattr(perform, name, before(getattr(perform, name)))
store.Store.keep = before(store.Store.keep)
print(bisync.sync(sys.argv[1], sys.argv[2]).exit_code)
"""


def test_killed_between_two_files(pair: Pair, tmp_path: Path):
    """Recovery, before anything else, makes it the old database or the new one."""
    a, b = pair
    other = a.parent / "C"
    other.mkdir()
    codes = []
    for left in range(12):
        bank = Bank(a / "bank.db", seed=left)
        bank.move(5)
        assert bisync.sync(a, b).exit_code == bisync.sync(b, other).exit_code == 0
        old = balances(b, tmp_path / "copy")
        bank.move(30)
        if left % 2:
            bank.close()  # the log goes
        new = balances(a, tmp_path / "copy")
        done = subprocess.run(
            [sys.executable, "-c", KILLED, a, b, str(left // 2)], check=False, capture_output=True
        )
        codes.append(done.returncode)
        bisync.sync(b, other)  # another pair of the root: it recovers, and knows nothing of A
        assert balances(b, tmp_path / "copy") in (old, new)
        bank.close()
        assert bisync.sync(a, b).exit_code == 0
        assert balances(b, tmp_path / "copy") == new
        assert look(a) == look(b)
    assert codes.count(-9) >= 6


def test_a_mirror_of_a_database(pair: Pair, tmp_path: Path):
    """All files of one instant, or none: `mirror` too."""
    a, b = pair
    words = ("mirror", "-a", "--delete", "--json", f"{a}/", b)
    bank = Bank(a / "bank.db")
    seen = set()
    with at_work(bank, pause=0.05):
        for number in range(4 * VERSIONS):
            run(*words, check=(0, 24))
            if (b / "bank.db").exists():
                found = balances(b, tmp_path / "copy")
                assert found is not None
                seen.add(tuple(found))
            if seen and number >= VERSIONS:
                break
    assert seen
    run(*words)  # the log goes, with the last change of the file
    assert not (b / "bank.db-wal").exists()
    assert balances(b, tmp_path / "copy") == balances(a, tmp_path / "other")
    before = look(b)
    with contextlib.closing(sqlite3.connect(b / "bank.db")) as reader:
        reader.execute("SELECT count(*) FROM account").fetchone()
        bank = Bank(a / "bank.db", seed=9)
        bank.move(30)
        run(*words, check=24)  # it is open at the destination: all of it waits
        assert look(b)["bank.db"] == before["bank.db"]
    bank.close()
    run(*words)
    assert look(a) == look(b)


def left_behind(path: Path, *statements: str) -> None:
    """Somebody writes to a database and dies: the log stays."""
    program = (
        "import os, sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "for statement in sys.argv[2:]: db.execute(statement)\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, path, *statements], check=False)
    path.with_name(path.name + "-shm").unlink(missing_ok=True)


def finished(path: Path, *statements: str) -> None:
    """Somebody writes to a database and closes it: the log goes."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


def values(folder: Path, copy: Path, name: str = "x.db") -> list[str]:
    """What is in the table ``t`` of a copy of a database."""
    copy.mkdir(exist_ok=True)
    for file in copy.glob("*"):
        file.unlink()
    for end in ("", "-wal", "-journal"):
        if (folder / (name + end)).exists():
            (copy / (name + end)).write_bytes((folder / (name + end)).read_bytes())
    with contextlib.closing(sqlite3.connect(copy / name)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return [v for (v,) in db.execute("SELECT v FROM t ORDER BY rowid")]


MAKE = ("PRAGMA journal_mode=WAL", "CREATE TABLE t(v, pad)", "INSERT INTO t VALUES('old', 0)")
ADD = "INSERT INTO t VALUES('{}', randomblob(3000))"


@pytest.mark.parametrize("how", ["closed", "log"])
@pytest.mark.parametrize("at", ["swap", "keep"])
def test_somebody_works_with_half_of_it_after_a_crash(
    here: Pair, tmp_path: Path, how: str, at: str
):
    """Killed between the two files, and then used: what was committed there is not lost."""
    a, b = here
    left_behind(a / "x.db", *MAKE, "PRAGMA wal_checkpoint(PASSIVE)")
    sync(a, b)
    finished(a / "x.db", ADD.format("new"))
    killed = KILLED.replace('("swap", "rename_noreplace")', '("swap",)')
    if at == "keep":
        killed = killed.replace('("swap",)', "()").replace(
            "print(", "perform.Performer._keep = before(perform.Performer._keep)\nprint("
        )
    done = subprocess.run([sys.executable, "-c", killed, a, b, "0"], check=False)
    assert done.returncode == -9
    (finished if how == "closed" else left_behind)(b / "x.db", ADD.format("precious"))
    there = values(b, tmp_path / "copy")
    assert "precious" in there
    sync(a, b)
    assert look(a) == look(b)
    assert values(b, tmp_path / "copy") == there  # written last; what A had is kept
    assert any(p.is_file() for p in (a / "rsync-rollback").rglob("x.db*"))


def test_stopped_between_two_files(here: Pair, tmp_path: Path):
    """A stop is not heard within a database."""
    a, b = here
    finished(a / "x.db", *MAKE)
    sync(a, b)
    for last in range(1, 60):
        left_behind(a / "x.db", *[ADD.format(f"{last}-{n}") for n in range(20)])
        old, new = (values(x, tmp_path / "copy") for x in (b, a))
        calls = iter(range(last))

        def stop(calls: Iterator[int] = calls) -> None:
            if next(calls, None) is None:
                raise Interrupted(2)

        try:
            bisync.sync(a, b, bisync.Config(stop=stop))
        except Interrupted:
            assert values(b, tmp_path / "copy") in (old, new)
        else:
            break
        assert bisync.sync(a, b).exit_code == 0
        assert values(b, tmp_path / "copy") == new
    assert last > 3


@pytest.mark.parametrize("policy", [bisync.Policy.ALPHA, bisync.Policy.BETA, bisync.Policy.NEWEST])
@pytest.mark.parametrize("known", [True, False])
def test_one_has_news_in_the_log_the_other_in_the_file(
    here: Pair, tmp_path: Path, policy: bisync.Policy, known: bool
):
    """Each file was written to on one side only, and still it is one database."""
    a, b = here
    if known:
        left_behind(a / "x.db", *MAKE, ADD.format("both"))
        sync(a, b)
        left_behind(a / "x.db", ADD.format("alpha"))
    else:
        left_behind(a / "x.db", *MAKE, ADD.format("alpha"))
        finished(b / "x.db", *MAKE)
    finished(b / "x.db", ADD.format("beta"))
    wanted = values(a if policy is bisync.Policy.ALPHA else b, tmp_path / "copy")
    report = bisync.sync(a, b, bisync.Config(conflict=policy))
    assert report.exit_code == 0
    assert report.conflicts
    assert [values(x, tmp_path / "copy") for x in here] == [wanted, wanted]
    assert look(a) == look(b)
    assert bisync.sync(a, b).exit_code == 0


@pytest.mark.parametrize("policy", list(bisync.Policy))
def test_deleted_here_written_to_there(here: Pair, tmp_path: Path, policy: bisync.Policy):
    """An edit of the log is an edit of the database, and beats its deletion."""
    a, b = here
    left_behind(a / "x.db", *MAKE)
    sync(a, b)
    for file in a.glob("x.db*"):
        file.unlink()
    left_behind(b / "x.db", ADD.format("edit"))
    report = bisync.sync(a, b, bisync.Config(conflict=policy))
    assert report.exit_code == 0
    assert [values(x, tmp_path / "copy") for x in here] == [["old", "edit"]] * 2


def test_databases_are_deleted_like_other_files(here: Pair):
    """The guard counts them, logs and all."""
    a, b = here
    for number in range(4):
        left_behind(a / f"{number}.db", *MAKE)
    (a / "stays").write_bytes(b"x")
    sync(a, b)
    for file in a.glob("*.db*"):
        file.unlink()
    report = bisync.sync(a, b, bisync.Config(max_delete=bisync.DeleteLimit(count=3)))
    assert (report.exit_code, report.deleted, report.withheld) == (25, 0, 8)
    assert len(list(b.glob("*.db*"))) == 8


@pytest.mark.parametrize("name", ["my-journal", "a-wal", "x.db"])
def test_names_that_mislead(here: Pair, tmp_path: Path, name: str):
    """A database that is called like a journal; shared memory that is left out."""
    a, b = here
    left_behind(a / name, *MAKE)
    (a / f"{name}-shm").write_bytes(bytes(32768))
    config = bisync.Config(ignore=bisync.Ignore(("*-shm",)))
    for number in range(2):
        assert bisync.sync(a, b, config).exit_code == 0
        assert values(b, tmp_path / "copy", name) == values(a, tmp_path / "other", name)
        left_behind(a / name, ADD.format(number))


def test_a_link_to_a_log(here: Pair, tmp_path: Path):
    """A log goes as a conflict's loser; a link that somebody made of it stays."""
    a, b = here
    left_behind(a / "x.db", *MAKE)
    sync(a, b)
    left_behind(a / "x.db", ADD.format("alpha"))
    os.link(a / "x.db-wal", a / "snapshot")
    finished(b / "x.db", ADD.format("beta"))
    bisync.sync(a, b, bisync.Config(conflict=bisync.Policy.BETA))
    assert "beta" in values(a, tmp_path / "copy")
    sync(a, b)
    assert (a / "snapshot").exists()
    assert (b / "snapshot").exists()


def test_more_databases_than_descriptors(here: Pair):
    """Several hundred of them at first contact, as a home directory has; none has a writer."""
    a, b = here
    left_behind(a / "x.db", *MAKE)
    for number in range(400):
        for end in ("", "-wal"):
            (a / f"{number}.db{end}").write_bytes((a / f"x.db{end}").read_bytes())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        report = bisync.sync(a, b)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (report.exit_code, report.created) == (0, 802)
    assert look(a) == look(b)


def test_recovery_that_cannot_finish(here: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An error in between is noted, and the next plan sees to it: here for files that are new."""
    a, b = here
    sync(a, b)
    left_behind(a / "x.db", *MAKE)
    assert subprocess.run([sys.executable, "-c", KILLED, a, b, "1"], check=False).returncode == -9

    def broken(*_words: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("bisync.fs.recovery.rename_noreplace", broken)
        assert bisync.sync(a, b).exit_code == 0
    assert values(b, tmp_path / "copy") == values(a, tmp_path / "other")
    assert look(a) == look(b)
