"""The work that is measured. A new row needs an entry in `rows.ROWS` and a function here, or a part of one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import Trial, Workload
from benchmarks.subjects import CLIENTS, Directory, ObjectClient
from tests.support import opened, run

MB = 1e6
LIMIT = 300.0  # seconds for one program


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
            with trial.timed("diff", count, reads=4096 * count):
                for path in source.iterdir():
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


def change_by_another(trial: Trial) -> None:
    from benchmarks.subjects import NatsFS

    assert isinstance(trial.subject, NatsFS)
    subject, client = trial.subject, trial.subject.place.server.client
    path = subject.path / "changing"
    meta = client.put(subject.bucket, path.name, b"")
    numbers = iter(range(1, 10**9))

    def one() -> float:
        # Only the metadata is sent anew, with another size: it is what makes a put visible.
        size = next(numbers)
        message = meta | {"size": size}
        start = time.perf_counter()
        # The acknowledgement is not waited for, the change may show before it.
        client.loop._loop.call_soon_threadsafe(client.loop._loop.create_task, client._publish_meta(message))
        while os.stat(path).st_size != size:
            time.sleep(0.00005)
            if time.perf_counter() - start > 10:
                raise TimeoutError("the change does not show")
        return time.perf_counter() - start

    def all() -> list[float]:
        seconds = []
        for _ in range(trial.sizes.changes):
            seconds.append(one())
            time.sleep(0.005)
        return seconds

    os.stat(path)
    if trial.wants("change-p50", "change-p99"):
        with trial.costed("change-p50"):
            seconds = all()
        trial.quantiles("change", seconds)
    if trial.wants("change-busy-p50", "change-busy-p99"):
        with background(WRITER, subject.path), trial.costed("change-busy-p50"):
            seconds = all()
        trial.quantiles("change-busy", seconds)


def fairness(trial: Trial) -> None:
    run("cp", "-r", trial.sources.tree, directory(trial) / "tree", limit=LIMIT)
    trial.subject.settle()
    trial.subject.cold()
    trial.sources.warm()
    tree, listings, reads = directory(trial) / "tree", list[float](), list[float]()
    with background(COPIER, trial.sources.large, directory(trial)), trial.costed("fair-ls-p50"):
        time.sleep(0.2)
        end = time.monotonic() + trial.sizes.fair
        for name in sorted(os.listdir(trial.sources.tree)):
            start = time.perf_counter()
            with os.scandir(tree) as entries:
                for entry in entries:
                    entry.stat()
            middle = time.perf_counter()
            (tree / name).read_bytes()  # each once, so that none is in the page cache
            listings.append(middle - start)
            reads.append(time.perf_counter() - middle)
            if time.monotonic() > end:
                break
    trial.quantiles("fair-ls", listings)
    trial.quantiles("fair-read", reads)


DIRECTORIES = ("natsfs", "rclone", "rclone-full", "local", "nothing")
STORES = ("natsfs", "rclone", "rclone-full", "local")

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
    Workload(
        change_by_another,
        ("change-p50", "change-p99", "change-busy-p50", "change-busy-p99"),
        ("natsfs",),
    ),
    Workload(fairness, ("fair-ls-p50", "fair-ls-p99", "fair-read-p50", "fair-read-p99"), STORES),
)

# What the quick mode leaves out.
SLOW = ("million", "git", "fio")
QUICK_SUBJECTS = ["natsfs", "natsfs-local", "rclone", "local", "natsrpy", "nats-py", "raw"]
