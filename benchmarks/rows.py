"""The rows of the table: what is measured in which unit, and what natsfs is to reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Medians = Mapping[str, float]
# Units in which more is better; of times and sizes less is.
SPEEDS = ("MB/s", "files/s", "1/s")


@dataclass(frozen=True)
class Times:
    """So many times as good as a peer: as fast, or in that part of its time."""

    factor: float
    peer: str
    subject: str = "natsfs"

    def holds(self, row: Row, medians: Medians) -> bool | None:
        """None if one of the two was not measured."""
        if self.subject not in medians or self.peer not in medians:
            return None
        return row.advantage(medians[self.subject], medians[self.peer]) >= self.factor


@dataclass(frozen=True)
class Within:
    """A figure that does not depend on a peer, in the row's unit."""

    limit: float

    def holds(self, row: Row, medians: Medians) -> bool | None:
        if "natsfs" not in medians:
            return None
        value = medians["natsfs"]
        return value >= self.limit if row.unit in SPEEDS else value <= self.limit


Bound = Times | Within


@dataclass(frozen=True)
class Row:
    key: str
    title: str
    unit: str
    floor: tuple[Bound, ...] = ()
    goal: tuple[Bound, ...] = ()

    def advantage(self, own: float, other: float) -> float:
        """How many times as good."""
        high, low = (own, other) if self.unit in SPEEDS else (other, own)
        return high / low if low else 1.0 if high == low else float("inf")


R, F = "rclone", "files/s"


def _fio() -> list[Row]:
    rows = []
    for kind, title in (
        ("read", "sequential read, 1 MiB"),
        ("write", "sequential write, 1 MiB"),
        ("randread", "random read, 4 KiB"),
        ("randwrite", "random write, 4 KiB"),
        ("mixed", "random read and write, blocks of 4 KiB to 1 MiB"),
    ):
        for jobs in (1, 4):
            processes = "1 process" if jobs == 1 else f"{jobs} processes"
            rows.append(Row(f"fio-{kind}-{jobs}", f"fio: {title}, {processes}", "MB/s"))
    for kind, title in (("create", "create"), ("stat", "stat"), ("delete", "delete")):
        rows.append(Row(f"fio-{kind}", f"fio: {title} files", F))
    return rows


QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
# What the machine does meanwhile.
SITUATIONS = {
    "idle": "nothing else is done",
    "busy": "files are created in the same directory",
    "copy": "the mount copies a large file",
}
CALLS = {"stat": "stat(2) shows it", "read": "read(2) gives it"}


def _visibility() -> list[Row]:
    """They have a table of their own."""
    floors, goals = {"p50": (Within(2),), "p99": (Within(15),)}, {"p50": (Within(1),)}
    return [
        Row(f"visibility-{situation}-{call}-{name}",
            f"another client's put, until {shows}, while {title}, {name}", "ms",
            floors.get(name, ()), goals.get(name, ()))
        for situation, title in SITUATIONS.items()
        for call, shows in CALLS.items()
        for name in QUANTILES
    ]  # fmt: skip


ROWS: dict[str, Row] = {
    row.key: row
    for row in (
        Row("write", "write a large file, close included", "MB/s",
            floor=(Times(2, R), Times(1, "natsrpy")), goal=(Times(3, R),)),
        Row("read", "read it, cold", "MB/s",
            floor=(Times(1.3, R), Times(1.5, "natsrpy")), goal=(Times(0.5, "raw"),)),
        Row("read-again", "read it again", "MB/s", floor=(Times(0.75, "local"),)),
        Row("tail", "first bytes near its end, cold", "ms", floor=(Within(5),)),
        Row("random-p50", "4 KiB at random offsets, cold, p50", "ms",
            floor=(Within(1.5), Times(2, R)), goal=(Within(0.6),)),
        Row("random-p99", "4 KiB at random offsets, cold, p99", "ms"),
        Row("rename-file", "rename it", "ms"),
        Row("small-writes", "write in 4 KiB writes, close included", "MB/s",
            floor=(Times(2, R),), goal=(Times(4, R),)),
        Row("cp", "`cp -r` of 4 KiB files", F,
            floor=(Times(1.5, R), Times(2.2, R, "natsfs-local")), goal=(Times(2.5, R),)),
        Row("ls", "`ls -lR` of them, cold", "ms", floor=(Times(5, R),), goal=(Times(10, R),)),
        Row("ls-again", "`ls -lR` again", "ms"),
        Row("diff", "`diff -r` against the source, cold", F, floor=(Times(2, R),), goal=(Times(4, R),)),
        Row("rename", "rename of the directory", "ms", floor=(Times(5, R),), goal=(Times(10, R),)),
        Row("rm", "`rm -r` of them", F, floor=(Times(1.8, R),), goal=(Times(3, R),)),
        Row("cp-p", "`cp -rp` of them", F),
        *_visibility(),
        Row("memory", "most memory of the daemon while a large file is copied in and out", "MB",
            floor=(Within(300),), goal=(Within(150),)),
        Row("fair-ls-p50", "`ls -l` of a directory during a large copy, p50", "ms"),
        Row("fair-ls-p99", "`ls -l` of a directory during a large copy, p99", "ms", floor=(Within(20),)),
        Row("fair-read-p50", "small reads during a large copy, p50", "ms"),
        Row("fair-read-p99", "small reads during a large copy, p99", "ms", floor=(Within(20),)),
        Row("fsync-4k", "fsync of a file of 4 KiB", "ms"),
        Row("fsync-1m", "fsync of a file of 1 MiB", "ms"),
        Row("fsync-64m", "fsync of a file of 64 MiB", "ms"),
        Row("sqlite", "sqlite transactions, one insert each", "1/s"),
        Row("git-clone", "`git clone`", "ms"),
        Row("git-status", "`git status`", "ms"),
        Row("git-status-cold", "`git status`, cold", "ms"),
        Row("children", "a file that 100 children write one after the other through one redirection", "ms"),
        Row("idle", "CPU of the daemon when idle, part of one core", "%"),
        *_fio(),
        Row("many-names", "very many objects: all names listed, cold", "s",
            floor=(Within(5),)),
        Row("many-stat", "very many objects: all names and metadata, cold", "s",
            floor=(Within(35),), goal=(Within(20),)),
        Row("many-memory", "very many objects: most memory of the daemon", "MB",
            floor=(Within(1000),), goal=(Within(600),)),
    )
}  # fmt: skip
