"""Runs of the workloads: which subject when, what is recorded of it, and what happens when one fails."""

from __future__ import annotations

import contextlib
import re
import statistics
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import processes
from benchmarks.processes import say
from benchmarks.rows import QUANTILES, ROWS, SPEEDS
from benchmarks.subjects import SUBJECTS, Place, Subject
from tests.support import noise

Cell = tuple[str, str]  # row and subject


@dataclass(frozen=True)
class Sizes:
    """How much work a workload is."""

    name: str
    trials: int
    large: int  # bytes
    small_writes: int  # bytes, in writes of 4 KiB
    randoms: int
    files: int
    changes: int
    patience: (
        float  # seconds to wait for a change to show where it is found by time-out; 0: that is not measured
    )
    fair: float  # seconds
    fsync: tuple[str, ...]
    transactions: int
    git_files: int
    idle: float  # seconds
    fio: int  # bytes of each process
    fio_small: int  # bytes of each process in blocks of 4 KiB
    objects: int


FULL = Sizes(
    "full", 5, 512 << 20, 32 << 20, 300, 1000, 1000, 600, 10, ("4k", "1m", "64m"), 200, 500, 20,
    256 << 20, 4 << 20, 1_000_000,
)  # fmt: skip
QUICK = Sizes(
    "quick", 2, 128 << 20, 8 << 20, 100, 300, 100, 0, 3, ("4k", "1m"), 50, 100, 3, 32 << 20, 1 << 20, 100_000
)  # fmt: skip
TINY = Sizes("tiny", 1, 2 << 20, 64 << 10, 5, 10, 5, 0, 0.3, ("4k",), 3, 5, 0.3, 1 << 20, 64 << 10, 1000)
SIZES = {sizes.name: sizes for sizes in (FULL, QUICK, TINY)}


@dataclass
class Cost:
    """Of one measured piece of work."""

    seconds: float
    daemon: float  # seconds of CPU
    server: float
    peak: int  # bytes


@dataclass
class Block:
    """A piece of work that is being accounted for."""

    reads: int  # bytes that it reads; for one who is told only by the work, until the end of the block
    started: float

    def seconds(self) -> float:
        return time.perf_counter() - self.started


@dataclass
class Results:
    values: dict[Cell, list[float]] = field(default_factory=lambda: defaultdict(list))
    costs: dict[Cell, list[Cost]] = field(default_factory=lambda: defaultdict(list))
    # Bytes that came from the server over bytes read.
    proofs: dict[Cell, list[float]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[Cell, str] = field(default_factory=dict)

    def medians(self, row: str) -> dict[str, float]:
        """By subject."""
        return {
            subject: statistics.median(values) for (key, subject), values in self.values.items() if key == row
        }


class Trial:
    """One run of one workload on one subject."""

    def __init__(
        self, subject: Subject, sizes: Sizes, sources: Sources, wanted: set[str], results: Results
    ) -> None:
        self.subject = subject
        self.sizes = sizes
        self.sources = sources
        self.row: str | None = None
        self._wanted = wanted
        self._results = results

    def wants(self, *rows: str) -> bool:
        return not self._wanted.isdisjoint(rows)

    def add(self, row: str, value: float) -> None:
        if row in self._wanted:
            self._results.values[row, self.subject.key].append(value)

    def quantiles(self, row: str, seconds: Sequence[float]) -> None:
        """Record them, of those that have a row, in milliseconds."""
        ordered = sorted(seconds)
        for name, part in QUANTILES.items():
            index = min(len(ordered) - 1, int(len(ordered) * part))
            self.add(f"{row}-{name}", ordered[index] * 1000)

    @contextlib.contextmanager
    def costed(self, row: str, reads: int = 0) -> Iterator[Block]:
        """Account for the block under this row."""
        self.row = row
        subject = self.subject
        processes.sync(subject.place.folder)
        daemons, servers = subject.daemons(), subject.servers()
        processes.forget_peak(daemons)
        served = subject.served()
        before = processes.cpu(daemons), processes.cpu(servers)
        block = Block(reads, time.perf_counter())
        yield block
        seconds = block.seconds()
        cell = row, subject.key
        if row not in self._wanted:
            return
        cost = Cost(
            seconds,
            processes.cpu(daemons) - before[0],
            processes.cpu(servers) - before[1],
            processes.peak(daemons),
        )
        self._results.costs[cell].append(cost)
        if block.reads and served is not None:
            self._results.proofs[cell].append(((subject.served() or 0) - served) / block.reads)
        self.row = None

    @contextlib.contextmanager
    def timed(self, row: str, amount: float = 1, reads: int = 0) -> Iterator[None]:
        """The block's time is the row's value: `amount` a second, or just the time."""
        with self.costed(row, reads) as block:
            yield
            seconds = block.seconds()
        unit = ROWS[row].unit
        self.add(row, amount / seconds if unit in SPEEDS else seconds * {"ms": 1000, "s": 1}[unit])

    @contextlib.contextmanager
    def attempt(self, row: str) -> Iterator[None]:
        """A failure in the block is noted, and the trial goes on."""
        try:
            yield
        except Exception as error:
            self.fail(row, error)

    def fail(self, row: str, error: BaseException) -> None:
        text = describe(error)
        say(f"  {row}, {self.subject.key}: {text}")
        self._results.failures[row, self.subject.key] = text

    @property
    def peak(self) -> float:
        """The daemon's most memory since the last accounted block began, in MB."""
        return processes.peak(self.subject.daemons()) / 1e6


def describe(error: BaseException) -> str:
    """In one line, without paths of this machine."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, subprocess.TimeoutExpired):
        return "time-out"
    text = str(error).strip()
    if told := re.search(r" ended with \d+: (.*)", text):  # a program's first line
        text = told[1]
    lines = text.splitlines()
    return re.sub(r"/\S*/", "", lines[-1])[:200] if lines else type(error).__name__


class Sources:
    """The files that workloads copy from, on the same disk, without repetition in them."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        folder.mkdir()
        self.large = folder / "large"
        with self.large.open("wb") as file:
            for number in range(-(-sizes.large // (1 << 20))):
                file.write(noise(1 << 20, number))
        self.tree = folder / "tree"
        self.tree.mkdir()
        content = noise(4096 * sizes.files, 10**9)
        for number in range(sizes.files):
            (self.tree / f"file-{number:05}").write_bytes(content[number * 4096 : (number + 1) * 4096])
        self.folder = folder

    def warm(self) -> None:
        """Into the page cache."""
        buffer = bytearray(1 << 20)
        for path in (self.large, *self.tree.iterdir()):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


@dataclass(frozen=True)
class Workload:
    """A function that measures some rows on a subject."""

    work: Callable[[Trial], None]
    rows: tuple[str, ...]
    subjects: tuple[str, ...]
    limit: float = 600.0
    most: int = 99  # trials, of one that takes long


def measure(
    workloads: Sequence[Workload],
    place: Place,
    sizes: Sizes,
    chosen: Sequence[str],
    wanted: set[str],
    trials: int,
    results: Results,
) -> None:
    """The subjects take turns, A B C A B C, so that what disturbs the machine disturbs all of them."""
    sources = Sources(place.folder / "sources", sizes)
    for workload in workloads:
        name = workload.work.__name__.replace("_", " ")
        if wanted.isdisjoint(workload.rows):
            continue
        failed: set[str] = set()
        count = min(trials, workload.most)
        for number in range(count):
            for key in chosen:
                if key not in workload.subjects or key in failed:
                    continue
                say(f"{name} {number + 1}/{count}: {key}")
                subject = SUBJECTS[key](place)
                trial = Trial(subject, sizes, sources, wanted, results)
                if not _run(workload, trial):
                    failed.add(key)


def _run(workload: Workload, trial: Trial) -> bool:
    subject = trial.subject
    # A system call on a mount that hangs ends only with the mount's daemon.
    late = threading.Event()

    def give_up() -> None:
        late.set()
        processes.kill(subject.daemons())

    timer = threading.Timer(workload.limit, give_up)
    timer.daemon = True
    timer.start()
    try:
        trial.sources.warm()
        with processes.shielded():
            subject.open()
        workload.work(trial)
        return True
    except Exception as error:
        row = trial.row or next(row for row in workload.rows if trial.wants(row))
        trial.fail(row, TimeoutError(f"not within {workload.limit:g} s") if late.is_set() else error)
        return False
    finally:
        timer.cancel()
        try:
            with processes.shielded():
                subject.close()
        except Exception as error:
            say(f"  taking down {subject.key}: {describe(error)}")
