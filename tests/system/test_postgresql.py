"""A live PostgreSQL server under load, replicated again and again: every version starts."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.trees import look, sync

VERSIONS = int(os.environ.get("BISYNC_VERSIONS", "3"))
SUMS = """
    SELECT (SELECT sum(abalance) FROM pgbench_accounts),
           (SELECT sum(bbalance) FROM pgbench_branches),
           (SELECT sum(tbalance) FROM pgbench_tellers),
           (SELECT coalesce(sum(delta), 0) FROM pgbench_history),
           (SELECT count(*) FROM pgbench_history)
"""
SETTINGS = """
unix_socket_directories = '{sockets}'
listen_addresses = ''
min_wal_size = 4MB
max_wal_size = 8MB
checkpoint_timeout = 30s
wal_recycle = on
"""
OWN = ("postmaster.pid", "postmaster.opts", "pgsql_tmp")  # a running server's
PLAN = ("--postgresql", "pg", "--hot-share", "all")


def carried(root: Path) -> dict[str, bytes | str | None]:
    """What is carried of a root with a data directory."""
    return {path: data for path, data in look(root).items() if path.rpartition("/")[2] not in OWN}


class Server:
    """A data directory, and the programs that work with it."""

    def __init__(self, data: Path, sockets: Path, port: int) -> None:
        self.data, self.sockets, self.port = data, sockets, port

    def program(self, name: str, *words: str | Path) -> list[str | Path]:
        """A command line of one of PostgreSQL's programs, as the user who may run them."""
        user = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")
        where = ("env", f"PGHOST={self.sockets}", f"PGPORT={self.port}")
        return [*user, *where, _programs() / name, *words]

    def run(self, name: str, *words: str | Path) -> str:
        done = subprocess.run(
            self.program(name, *words), capture_output=True, text=True, check=False, cwd="/"
        )
        assert done.returncode == 0, (name, done.stdout[-500:], done.stderr[-500:])
        return done.stdout

    def make(self) -> None:
        self.run("initdb", "-k", "-A", "trust", "--wal-segsize=1", "-D", self.data)
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(SETTINGS.format(sockets=self.sockets))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        at, said = f"-p {self.port}", self.sockets / f"log{self.port}"
        words = ("-D", self.data, "-w", "-o", at, "-l", said)
        started = subprocess.run(
            self.program("pg_ctl", *words, "start"), stdout=subprocess.DEVNULL, check=False, cwd="/"
        )
        assert started.returncode == 0, said.read_text()[-2000:]
        try:
            yield
        finally:
            self.run("pg_ctl", "-D", self.data, "-w", "-m", "fast", "stop")

    @contextlib.contextmanager
    def under_load(self) -> Iterator[None]:
        words = self.program("pgbench", "-n", "-c", "4", "-T", "3600", "postgres")
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as load:
            try:
                yield
            finally:
                assert load.poll() is None  # it worked all the time
                load.terminate()

    def query(self, text: str) -> str:
        return self.run("psql", "-tAX", "-c", text, "postgres").strip()


def _programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_amcheck"))
    if not found or os.geteuid() != 0:
        pytest.skip("needs PostgreSQL, and root to run it as its user")
    return found[-1].parent


def check(folder: Path, copy: Path, sockets: Path) -> int:
    """Open a copy of a replica; how many transactions it has."""
    subprocess.run(["rm", "-rf", copy], check=True)
    subprocess.run(["cp", "-a", "--reflink=auto", folder, copy], check=True)
    assert not (copy / "postmaster.pid").exists()
    server = Server(copy, sockets, 5433)
    with server.running():
        *sums, count = server.query(SUMS).split("|")
        assert len(set(sums)) == 1
        server.query("CREATE EXTENSION IF NOT EXISTS amcheck")
        server.run("pg_amcheck", "--heapallindexed", "postgres")
    server.run("pg_checksums", "--check", "-D", copy)
    return int(count)


@pytest.fixture
def server(
    request: pytest.FixtureRequest, file_system: Callable[[str], Path], tmp_path: Path
) -> Iterator[Server]:
    _programs()
    base = file_system(request.param) / tmp_path.name
    for name in ("A", "B", "run"):
        (base / name).mkdir(parents=True)
        subprocess.run(["chown", "postgres", base / name], check=True)
    for folder in (base, *base.parents):
        if str(folder).startswith(tempfile.gettempdir() + "/"):
            folder.chmod(0o755)
    sockets = Path(tempfile.mkdtemp(prefix="bisync-test-"))  # a socket's path has to be short
    sockets.chmod(0o755)
    subprocess.run(["chown", "postgres", sockets], check=True)
    made = Server(base / "A/pg", sockets, 5432)
    try:
        made.make()
        yield made
    finally:
        subprocess.run(["rm", "-rf", base, sockets], check=False)


@pytest.mark.parametrize("server", ["xfs-4096", "btrfs-4096"], indirect=True)
@pytest.mark.timeout(3000)
def test_every_version_starts(server: Server):
    """Its sums fit, its indexes fit its tables, its pages their checksums; and it gets on."""
    a, b = server.data.parent, server.data.parent.with_name("B")
    counts = []
    with server.running():
        server.run("pgbench", "-i", "-q", "-s", "2", "postgres")
        with server.under_load():
            for number in range(2 * VERSIONS):
                server.query(f"CREATE TABLE t{number} AS SELECT generate_series(1, 5000)")
                server.query(f"DROP TABLE IF EXISTS t{number // 2}")
                done = sync(a, b, *PLAN, check=(0, 24))
                if done.summary["exit_code"] == 0:
                    counts.append(check(b / "pg", b.with_name("C"), server.sockets))
                else:
                    print(done.said)
                if len(counts) == VERSIONS:
                    break
    print(f"{server.data}: {len(counts)} versions, transactions {counts}")
    assert len(counts) == VERSIONS
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]
    sync(a, b, *PLAN)
    assert carried(a) == carried(b)


@pytest.mark.parametrize("server", ["ext4-2048"], indirect=True)
def test_where_nothing_can_be_cloned(server: Server):
    """A server at work is busy, and the replica stays what it is; at rest it is copied."""
    a, b = server.data.parent, server.data.parent.with_name("B")
    with server.running():
        server.run("pgbench", "-i", "-q", "-s", "1", "postgres")
    sync(a, b, *PLAN)
    before = carried(b)
    check(b / "pg", b.with_name("C"), server.sockets)
    with server.running(), server.under_load():
        while server.query("SELECT count(*) FROM pgbench_history") == "0":
            pass  # not at work yet
        sync(a, b, *PLAN, check=24)
        assert carried(b) == before
    sync(a, b, *PLAN)
    assert carried(a) == carried(b)
    assert check(b / "pg", b.with_name("C"), server.sockets) > 0


@pytest.mark.parametrize("server", ["xfs-4096"], indirect=True)
def test_a_server_runs_at_the_replica(server: Server):
    """Somebody started it there: nothing is put under its feet, and one is chosen."""
    a, b = server.data.parent, server.data.parent.with_name("B")
    with server.running():
        server.query("CREATE TABLE t(x int)")
    sync(a, b, *PLAN)
    other = Server(b / "pg", server.sockets, 5434)
    with server.running():
        server.query("INSERT INTO t VALUES (1)")
    with other.running():
        other.query("INSERT INTO t VALUES (2)")
        sync(a, b, *PLAN, "--conflict", "alpha", check=24)
        assert other.query("SELECT * FROM t") == "2"
    sync(a, b, *PLAN, "--conflict", "alpha")
    with other.running():
        assert other.query("SELECT * FROM t") == "1"
