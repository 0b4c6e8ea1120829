"""The work that is measured. A new row needs an entry in `rows.ROWS` and a function here, or a part of one."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.measure import Trial, Workload
from benchmarks.rows import ROWS, SITUATIONS
from benchmarks.subjects import CLIENTS, Directory, NatsFS, ObjectClient, Rclone
from tests.support import CHUNK, digest_of, encode, noise, opened, run, until

MB = 1e6
LIMIT = 300.0  # seconds for one program
# async-nats leaves a consumer behind at each get; over the 1,000 that a stream may have it ends the process.
MOST_GETS = 900


def directory(trial: Trial) -> Path:
    assert isinstance(trial.subject, Directory)
    return trial.subject.path


def read_all(path: Path) -> int:
    buffer, total = bytearray(1 << 20), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


# --- one large file ---------------------------------------------------------------------------------------------


def large_file(trial: Trial) -> None:
    size = trial.sizes.large
    if isinstance(trial.subject, ObjectClient):
        if trial.subject.key == "raw":  # its limit is for reading only
            trial.subject.put("large", trial.sources.large)
        else:
            with trial.timed("write", size / MB):
                trial.subject.put("large", trial.sources.large)
        if trial.wants("read"):
            trial.subject.cold()
            with trial.timed("read", size / MB, reads=size):
                trial.subject.get("large")
        return

    path = directory(trial) / "large"
    with trial.timed("write", size / MB):
        run("cp", trial.sources.large, path, limit=LIMIT)
    peak = trial.peak
    trial.subject.settle()
    if trial.wants("read", "read-again", "memory"):
        trial.subject.cold()
        path = directory(trial) / "large"
        with trial.timed("read", size / MB, reads=size):
            assert read_all(path) == size
        peak = max(peak, trial.peak)
        with trial.timed("read-again", size / MB):
            assert read_all(path) == size
        if trial.subject.daemons():
            trial.add("memory", peak)
    if trial.wants("tail"):
        trial.subject.cold()
        path = directory(trial) / "large"
        os.listdir(path.parent)  # what is cold here is the content
        with trial.timed("tail", reads=4096), opened(path, os.O_RDONLY) as fd:
            assert len(os.pread(fd, 4096, size - 40_000)) == 4096
    if trial.wants("random-p50", "random-p99"):
        trial.subject.cold()
        random_reads(trial, directory(trial) / "large")
    with trial.timed("rename-file"):
        os.rename(directory(trial) / "large", directory(trial) / "renamed")


def random_reads(trial: Trial, path: Path) -> None:
    blocks = random.Random(7).sample(range(trial.sizes.large // 4096), trial.sizes.randoms)
    seconds = []
    with trial.costed("random-p50", reads=4096 * len(blocks)), opened(path, os.O_RDONLY) as fd:
        for block in blocks:
            start = time.perf_counter()
            os.pread(fd, 4096, block * 4096)
            seconds.append(time.perf_counter() - start)
    trial.quantiles("random", seconds)


def small_writes(trial: Trial) -> None:
    block, count = os.urandom(4096), trial.sizes.small_writes // 4096
    with (
        trial.timed("small-writes", count * 4096 / MB),
        opened(directory(trial) / "file", os.O_WRONLY | os.O_CREAT) as fd,
    ):
        for _ in range(count):
            os.write(fd, block)


# --- many small files -------------------------------------------------------------------------------------------


def small_files(trial: Trial) -> None:
    source, count = trial.sources.tree, trial.sizes.files
    if isinstance(trial.subject, ObjectClient):
        with trial.timed("cp", count):
            for path in source.iterdir():
                trial.subject.put(path.name, path)
        if trial.wants("diff"):
            trial.subject.cold()
            paths = list(source.iterdir())[:MOST_GETS]
            with trial.timed("diff", len(paths), reads=4096 * len(paths)):
                for path in paths:
                    trial.subject.get(path.name)
        return

    def tree() -> Path:
        return directory(trial) / "tree"

    with trial.timed("cp", count):
        run("cp", "-r", source, tree(), limit=LIMIT)
    trial.subject.settle()
    if trial.wants("ls", "ls-again"):
        trial.subject.cold()
        for row in ("ls", "ls-again"):
            with trial.timed(row):
                run("ls", "-lR", directory(trial), limit=LIMIT)
    if trial.wants("diff"):
        trial.subject.cold()
        trial.sources.warm()
        with trial.timed("diff", count, reads=4096 * count):
            run("diff", "-r", source, tree(), limit=LIMIT, status=0 if trial.subject.keeps_content else 1)
    moved = directory(trial) / "moved"
    if trial.wants("rename", "rm"):
        with trial.timed("rename"):
            os.rename(tree(), moved)
        with trial.timed("rm", count):
            run("rm", "-r", moved, limit=LIMIT)
    if trial.wants("cp-p"):
        with trial.timed("cp-p", count):
            run("cp", "-rp", source, directory(trial) / "kept", limit=LIMIT)


# --- changes of others --------------------------------------------------------------------------------------------


WRITER = """
import itertools, sys
for number in itertools.count():
    with open(f"{sys.argv[1]}/busy-{number}", "w") as file:
        file.write("x")
"""

COPIER = """
import itertools, shutil, sys
for number in itertools.count():
    shutil.copyfile(sys.argv[1], f"{sys.argv[2]}/bulk-{number % 2}")
"""


@contextmanager
def background(script: str, *arguments: Path) -> Iterator[None]:
    """A process that works on until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield
        if process.poll() is not None:
            raise RuntimeError("the work in the background has failed")
    finally:
        process.kill()
        process.wait(60)


def visibility(trial: Trial) -> None:
    """From the moment another client's put returns; the limit is what a change may take to show."""
    subject = trial.subject
    assert isinstance(subject, NatsFS | Rclone)
    limit, changes = (30.0, trial.sizes.changes) if isinstance(subject, NatsFS) else (trial.sizes.patience, 1)
    if not limit:
        return
    path = subject.path / "changing"
    subject.put_elsewhere(path.name, b"")
    until(path.exists, limit)
    works = {
        "busy": lambda: background(WRITER, subject.path),
        "copy": lambda: background(COPIER, trial.sources.large, subject.path),
    }
    for situation in SITUATIONS:
        if not trial.wants(*(row for row in ROWS if row.startswith(f"visibility-{situation}-"))):
            continue
        if situation != "idle" and not isinstance(subject, NatsFS):
            continue
        stats, reads = list[float](), list[float]()
        with ExitStack() as stack:
            if work := works.get(situation):
                stack.enter_context(work())
            stack.enter_context(trial.costed(f"visibility-{situation}-stat-p50"))
            for number in range(changes):
                content = b"%d" % number + bytes(1 + number % 7)
                returned = subject.put_elsewhere(path.name, content)
                stats.append(_shows(lambda: os.stat(path).st_size == len(content), returned, limit))  # noqa: B023
                reads.append(_shows(lambda: path.read_bytes() == content, returned, limit))  # noqa: B023
        trial.quantiles(f"visibility-{situation}-stat", stats)
        trial.quantiles(f"visibility-{situation}-read", reads)


def _shows(shown: Callable[[], bool], since: float, limit: float) -> float:
    """Seconds since then, when it shows. Looked for every 50 us at first, later every second."""
    while not shown():
        waited = time.perf_counter() - since
        if waited > limit:
            raise TimeoutError("the change does not show")
        time.sleep(0.00005 if waited < 1 else 1)
    return time.perf_counter() - since


def fairness(trial: Trial) -> None:
    run("cp", "-r", trial.sources.tree, directory(trial) / "tree", limit=LIMIT)
    trial.subject.settle()
    trial.subject.cold()
    trial.sources.warm()
    tree, listings, reads = directory(trial) / "tree", list[float](), list[float]()
    with background(COPIER, trial.sources.large, directory(trial)), trial.costed("fair-ls-p50"):
        time.sleep(0.2)
        end = time.monotonic() + trial.sizes.fair
        # In no order, so that none is fetched ahead; and each once, so that none is in the page cache.
        names = sorted(os.listdir(trial.sources.tree))
        random.Random(8).shuffle(names)
        for name in names:
            start = time.perf_counter()
            with os.scandir(tree) as entries:
                for entry in entries:
                    entry.stat()
            middle = time.perf_counter()
            (tree / name).read_bytes()
            listings.append(middle - start)
            reads.append(time.perf_counter() - middle)
            if time.monotonic() > end:
                break
    trial.quantiles("fair-ls", listings)
    trial.quantiles("fair-read", reads)


# --- durability, databases, programs ------------------------------------------------------------------------------


FSYNC_SIZES = {"4k": 4 << 10, "1m": 1 << 20, "64m": 64 << 20}


def fsync(trial: Trial) -> None:
    for name in trial.sizes.fsync:
        content = noise(FSYNC_SIZES[name])
        with opened(directory(trial) / f"file-{name}", os.O_WRONLY | os.O_CREAT) as fd:
            with trial.costed(f"fsync-{name}"):
                os.write(fd, content)
                # At once: what is left alone for a while is stored anyway.
                start = time.perf_counter()
                os.fsync(fd)
                seconds = time.perf_counter() - start
            trial.add(f"fsync-{name}", seconds * 1000)


def sqlite(trial: Trial) -> None:
    with closing(
        sqlite3.connect(directory(trial) / "database", isolation_level=None, timeout=60)
    ) as database:
        database.execute("CREATE TABLE measured (number INTEGER PRIMARY KEY, text TEXT)")
        with trial.timed("sqlite", trial.sizes.transactions):
            for number in range(trial.sizes.transactions):
                database.execute("INSERT INTO measured VALUES (?, ?)", (number, "x" * 100))


def git(trial: Trial) -> None:
    source = trial.sources.folder / "repository"
    if not source.exists():
        run("git", "init", "-q", source)
        for path in sorted(trial.sources.tree.iterdir())[: trial.sizes.git_files]:
            folder = source / path.name[:-2]
            folder.mkdir(exist_ok=True)
            (folder / path.name).write_bytes(path.read_bytes())
        run("git", "-C", source, "add", ".")
        identity = ("-c", "user.name=bench", "-c", "user.email=bench@example.org")
        run("git", "-C", source, *identity, "commit", "-q", "-m", "All")

    def status(row: str) -> None:
        clone = directory(trial) / "clone"
        with trial.timed(row):
            done = run("git", "-C", clone, "-c", "safe.directory=*", "status", "--short", limit=LIMIT)
        assert done.stdout == "", "git status finds changes"

    with trial.timed("git-clone"):
        run("git", "clone", "-q", source.as_uri(), directory(trial) / "clone", limit=LIMIT)
    status("git-status")
    trial.subject.settle()
    trial.subject.cold()
    status("git-status-cold")


def children(trial: Trial) -> None:
    script = "set -e; i=0; while [ $i -lt 100 ]; do /bin/echo a line of a child; i=$((i + 1)); done > output"
    with trial.timed("children"):
        run("sh", "-c", script, cwd=directory(trial), limit=LIMIT)


def idle(trial: Trial) -> None:
    run("cp", "-r", trial.sources.tree, directory(trial) / "tree", limit=LIMIT)
    trial.subject.settle()
    time.sleep(1)
    daemons = trial.subject.daemons()
    before = processes.cpu(daemons)
    with trial.costed("idle"):
        time.sleep(trial.sizes.idle)
    trial.add("idle", (processes.cpu(daemons) - before) / trial.sizes.idle * 100)


# --- fio ------------------------------------------------------------------------------------------------------------


def fio(trial: Trial) -> None:
    large, small = trial.sizes.fio, trial.sizes.fio_small
    mixed = "--bssplit=4k/40:64k/40:1m/20"
    for jobs in (1, 4):
        fio_job(trial, f"fio-read-{jobs}", jobs, large, "--rw=read", "--bs=1m")
        fio_job(trial, f"fio-write-{jobs}", jobs, large, "--rw=write", "--bs=1m")
        fio_job(trial, f"fio-randread-{jobs}", jobs, large, "--rw=randread", "--bs=4k", f"--io_size={small}")
        fio_job(trial, f"fio-randwrite-{jobs}", jobs, small, "--rw=randwrite", "--bs=4k")
        fio_job(trial, f"fio-mixed-{jobs}", jobs, large // 4, "--rw=randrw", mixed)
    if trial.wants("fio-create", "fio-stat", "fio-delete"):
        folder = directory(trial) / "fio-files"
        folder.mkdir()
        for kind in ("create", "stat", "delete"):
            fio_names(trial, kind)


def fio_job(trial: Trial, row: str, jobs: int, size: int, *arguments: str) -> None:
    if not trial.wants(row):
        return
    names = [f"{row}.{number}.0" for number in range(jobs)]  # fio's
    with trial.attempt(row):
        if "--rw=write" not in arguments:
            for name in names:
                copy_part(trial.sources.large, directory(trial) / name, size)
            trial.subject.settle()
            trial.subject.cold()
        with trial.costed(row) as block:
            told = run_fio(
                directory(trial), row, f"--size={size}", f"--numjobs={jobs}", "--ioengine=psync", *arguments
            )
            block.reads = told["read"]["io_bytes"]
        read, write = told["read"], told["write"]
        moved = read["io_bytes"] + write["io_bytes"]
        trial.add(row, moved * 1000 / max(1, read["runtime"], write["runtime"]) / MB)
    trial.subject.settle()
    for name in names:
        (directory(trial) / name).unlink(missing_ok=True)


def fio_names(trial: Trial, kind: str) -> None:
    row, count = f"fio-{kind}", trial.sizes.files
    with trial.attempt(row):
        if kind != "create":
            trial.subject.settle()
            trial.subject.cold()
        folder = directory(trial) / "fio-files"
        with trial.costed(row) as block:
            told = run_fio(
                folder,
                "names",
                *(f"--nrfiles={count}", "--filesize=4k", f"--ioengine=file{kind}"),
                *("--openfiles=1", "--create_on_open=1"),
            )
            seconds = block.seconds()
        # fio times open(2) only, but a file may be stored at close(2). The rest is in its milliseconds.
        trial.add(row, count / (seconds if kind == "create" else max(1, told["read"]["runtime"]) / 1000))


def copy_part(source: Path, target: Path, size: int) -> None:
    with source.open("rb") as content, target.open("wb", buffering=0) as file:
        for start in range(0, size, 1 << 20):
            file.write(content.read(min(1 << 20, size - start)))


def run_fio(folder: Path, name: str, *arguments: str) -> dict[str, Any]:
    """fio's results, of all processes together. What is written counts when fsync(2) has returned."""
    common = ("--fallocate=none", "--group_reporting", "--runtime=60", "--end_fsync=1")
    done = run(
        "fio",
        "--output-format=json",
        f"--name={name}",
        f"--directory={folder}",
        *common,
        *arguments,
        limit=LIMIT,
    )
    told: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return told


# --- very many objects ----------------------------------------------------------------------------------------------


def many_objects(trial: Trial) -> None:
    assert isinstance(trial.subject, NatsFS)
    subject, count = trial.subject, trial.sizes.objects
    client = subject.place.server.client

    async def publish() -> None:
        digest = digest_of(b"")
        for number in range(count):
            name = f"object-{number:07}"
            meta = {"name": name, "bucket": subject.bucket, "nuid": f"{number:022}", "size": 0, "chunks": 0}
            meta |= {"mtime": "0001-01-01T00:00:00Z", "digest": digest, "options": {"max_chunk_size": CHUNK}}
            await client.connection.publish(
                f"$O.{subject.bucket}.M.{encode(name)}", json.dumps(meta).encode()
            )
            if number % 1000 == 0:
                await client.connection.flush(60)
        await client.connection.flush(60)

    client.run(publish(), 1200)
    until(lambda: client.info(subject.bucket)["state"]["messages"] >= count, 300)
    subject.cold()
    with trial.timed("many-names"):
        assert len(os.listdir(subject.path)) == count
    peak = trial.peak
    subject.cold()
    with trial.timed("many-stat"), os.scandir(subject.path) as entries:
        assert sum(entry.stat().st_size == 0 for entry in entries) == count
    trial.add("many-memory", max(peak, trial.peak))


DIRECTORIES = ("natsfs", "rclone", "rclone-full", "local", "nothing")
STORES = ("natsfs", "rclone", "rclone-full", "local")
VISIBILITY = tuple(row for row in ROWS if row.startswith("visibility-"))

WORKLOADS: tuple[Workload, ...] = (
    Workload(
        large_file,
        ("write", "read", "read-again", "tail", "random-p50", "random-p99", "rename-file", "memory"),
        (*DIRECTORIES, *CLIENTS, "raw"),
    ),
    Workload(small_writes, ("small-writes",), DIRECTORIES),
    Workload(
        small_files,
        ("cp", "ls", "ls-again", "diff", "rename", "rm", "cp-p"),
        (*DIRECTORIES, "natsfs-local", *CLIENTS),
    ),
    Workload(visibility, VISIBILITY, ("natsfs",), limit=1200),
    Workload(visibility, VISIBILITY, ("rclone",), limit=1200, most=1),
    Workload(fairness, ("fair-ls-p50", "fair-ls-p99", "fair-read-p50", "fair-read-p99"), STORES),
    Workload(fsync, ("fsync-4k", "fsync-1m", "fsync-64m"), STORES),
    Workload(sqlite, ("sqlite",), STORES),
    Workload(git, ("git-clone", "git-status", "git-status-cold"), STORES),
    Workload(children, ("children",), STORES),
    Workload(idle, ("idle",), ("natsfs", "rclone", "rclone-full")),
    Workload(fio, tuple(row for row in ROWS if row.startswith("fio-")), STORES, limit=1800, most=2),
    Workload(many_objects, ("many-names", "many-stat", "many-memory"), ("natsfs",), limit=1800, most=1),
)

# What the quick mode leaves out.
SLOW = ("many", "git", "fio")
QUICK_SUBJECTS = ["natsfs", "natsfs-local", "rclone", "local", "natsrpy", "nats-py", "raw"]
