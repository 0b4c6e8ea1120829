"""SQLite databases on one mount: every journal mode, several writers, and writers that are killed."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.support import Client, Mount, Mounter

MODES = ("delete", "truncate", "persist", "wal")

# Moves amounts between accounts, each time in a transaction; the sum stays what it was.
TRANSFER = """
import random, sqlite3, sys
path, mode, seed, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
choose = random.Random(seed)
db = sqlite3.connect(path, timeout=100, isolation_level=None)
assert db.execute(f"PRAGMA journal_mode={mode}").fetchone() == (mode,)
for number in range(count):
    db.execute("BEGIN IMMEDIATE")
    one, two = choose.sample(range(500), 2)
    db.execute("UPDATE account SET amount = amount - 1 WHERE id = ?", (one,))
    db.execute("UPDATE account SET amount = amount + 1 WHERE id = ?", (two,))
    db.execute("INSERT INTO log VALUES (?, ?)", (seed, number))
    db.execute("COMMIT")
db.close()
"""

# Stops in the middle of a transaction that has already changed the database file, because the cache is tiny.
STUCK = """
import sqlite3, sys, time
path, mode = sys.argv[1:]
db = sqlite3.connect(path, timeout=100, isolation_level=None)
assert db.execute(f"PRAGMA journal_mode={mode}").fetchone() == (mode,)
db.execute("PRAGMA cache_size=2")
db.execute("BEGIN IMMEDIATE")
db.execute("UPDATE account SET amount = 7, filler = hex(randomblob(100))")
db.execute("DELETE FROM log")
print("in the middle", flush=True)
time.sleep(1000)
"""


def create(path: Path, mode: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        assert db.execute(f"PRAGMA journal_mode={mode}").fetchone() == (mode,)
        db.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, amount INTEGER, filler TEXT)")
        db.execute("CREATE TABLE log (writer INTEGER, number INTEGER)")
        db.execute("BEGIN")
        db.executemany("INSERT INTO account VALUES (?, 100, ?)", ((n, "x" * 200) for n in range(500)))
        db.execute("COMMIT")


def check(path: Path, logged: int) -> None:
    """The database is sound, no amount was lost, and so many transfers are recorded."""
    with closing(sqlite3.connect(path, timeout=100, isolation_level=None)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("SELECT count(*), sum(amount) FROM account").fetchone() == (500, 50_000)
        assert db.execute("SELECT count(*) FROM (SELECT DISTINCT * FROM log)").fetchone() == (logged,)


@contextmanager
def killed_in_a_transaction(path: Path, mode: str) -> Iterator[None]:
    """A writer that is killed after the block, which runs in the middle of its transaction."""
    writer = subprocess.Popen([sys.executable, "-c", STUCK, path, mode], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "in the middle\n"
        yield
    finally:
        writer.kill()
        writer.communicate()
    assert writer.returncode == -signal.SIGKILL


@pytest.mark.semantics("sqlite-on-one-mount")
@pytest.mark.parametrize("mode", MODES)
def test_two_writers_and_a_reader(folder: Path, mode: str) -> None:
    """Two processes write at the same time and a third reads: all transactions are there, none is seen half."""
    path = folder / "db"
    create(path, mode)
    writers = [
        subprocess.Popen([sys.executable, "-c", TRANSFER, path, mode, str(seed), "25"]) for seed in range(2)
    ]
    try:
        while any(writer.poll() is None for writer in writers):
            with closing(sqlite3.connect(path, timeout=100, isolation_level=None)) as db:
                assert db.execute("SELECT count(*), sum(amount) FROM account").fetchone() == (500, 50_000)
    finally:
        statuses = [writer.wait(100) for writer in writers]
    assert statuses == [0, 0]
    check(path, 50)


@pytest.mark.semantics("sqlite-recovers")
@pytest.mark.parametrize("mode", MODES)
def test_writer_is_killed(folder: Path, mode: str) -> None:
    """A writer that is killed in the middle of a transaction leaves a database without that transaction."""
    path = folder / "db"
    create(path, mode)
    subprocess.run([sys.executable, "-c", TRANSFER, path, mode, "1", "5"], check=True)
    journal = folder / ("db-wal" if mode == "wal" else "db-journal")
    with killed_in_a_transaction(path, mode):
        assert journal.stat().st_size > 512, "nothing of the transaction has reached the file system"
    check(path, 5)
    subprocess.run([sys.executable, "-c", TRANSFER, path, mode, "2", "5"], check=True)
    check(path, 10)


def remounted(mount: Mounter, bucket: str, tmp_path: Path, old: Mount) -> Path:
    assert old.finish() == []
    return mount(f"/{bucket}", folder=tmp_path).path


@pytest.mark.semantics("sqlite-recovers", "sqlite-on-one-mount")
def test_databases_after_a_remount(bucket: str, mount: Mounter, tmp_path: Path) -> None:
    """After a remount a database is sound, also one whose writer was killed and whose journal has to be replayed."""
    first = mount(f"/{bucket}", folder=tmp_path)
    for mode in MODES:
        for name in ("closed", "killed"):
            path = first.path / f"{name}-{mode}"
            create(path, mode)
            subprocess.run([sys.executable, "-c", TRANSFER, path, mode, "1", "5"], check=True)
        with killed_in_a_transaction(first.path / f"killed-{mode}", mode):
            pass
    root = remounted(mount, bucket, tmp_path, first)
    left = {name for name in os.listdir(root) if name.startswith("killed-")}
    assert {"killed-delete-journal", "killed-wal-wal"} <= left, "there is nothing to recover"
    for mode in MODES:
        for name in ("closed", "killed"):
            check(root / f"{name}-{mode}", 5)


@pytest.mark.semantics("sqlite-recovers")
@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_daemon_is_killed(bucket: str, mount: Mounter, client: Client, tmp_path: Path, mode: str) -> None:
    """If the daemon dies in the middle of a transaction, every transaction that was committed is there afterwards."""
    first = mount(f"/{bucket}", folder=tmp_path)
    path = first.path / "db"
    create(path, mode)
    subprocess.run([sys.executable, "-c", TRANSFER, path, mode, "1", "5"], check=True)
    with killed_in_a_transaction(path, mode):
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    # What the dead daemon has left behind is not what this test is about.
    shutil.rmtree(first.spool / f"mount-{first.pid}")
    for consumer in client.consumers(bucket):
        client.api(f"CONSUMER.DELETE.OBJ_{bucket}.{consumer['name']}")
    check(mount(f"/{bucket}", folder=tmp_path).path / "db", 5)


@pytest.mark.semantics("sqlite-on-one-mount")
@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_mapped_database(folder: Path, mode: str) -> None:
    """A reader that maps the database file (PRAGMA mmap_size) sees what another process commits."""
    path = folder / "db"
    create(path, mode)
    with closing(sqlite3.connect(path, timeout=100, isolation_level=None)) as db:
        assert db.execute("PRAGMA mmap_size=10000000").fetchone() == (10_000_000,)
        for seed in range(3):
            subprocess.run([sys.executable, "-c", TRANSFER, path, mode, str(seed), "3"], check=True)
            assert db.execute("SELECT count(*), sum(amount) FROM account").fetchone() == (500, 50_000)
            assert db.execute("SELECT count(*) FROM log").fetchone() == (3 * (seed + 1),)
    check(path, 9)


@pytest.mark.semantics("sqlite-on-one-mount")
def test_vacuum_backup_and_change_of_mode(folder: Path, tmp_path: Path) -> None:
    """VACUUM, the backup API in both directions and a change of the journal mode work on the mount."""
    path = folder / "db"
    create(path, "wal")
    subprocess.run([sys.executable, "-c", TRANSFER, path, "wal", "1", "5"], check=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("DELETE FROM log")
        db.execute("VACUUM")
        assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
        assert db.execute("PRAGMA journal_mode=delete").fetchone() == ("delete",)
        assert os.listdir(folder) == ["db"]
        for other in (tmp_path / "out", folder / "copy"):
            with closing(sqlite3.connect(other)) as copy:
                db.backup(copy)
            check(other, 0)
    check(path, 0)
