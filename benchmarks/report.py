"""The tables of docs/benchmarks.md, and the machine that they come from."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from benchmarks import processes
from benchmarks.measure import Results, Sizes
from benchmarks.rows import CALLS, QUANTILES, ROWS, SITUATIONS, Bound, Row, Within
from benchmarks.subjects import SUBJECTS
from tests.support import REPOSITORY, program

BEGIN = "<!-- written by ./dev bench --write: begin -->"
END = "<!-- written by ./dev bench --write: end -->"
PEER = "rclone"


def number(value: float) -> str:
    """Three digits, or all of those before the point."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.01 or value == 0 else f"{value:.1g}"


def cell(values: Sequence[float]) -> str:
    """The median, and in brackets the least and the most."""
    text = number(statistics.median(values))
    if len(values) > 1:
        text += f" ({number(min(values))}-{number(max(values))})"
    return text


def _bound(bound: Bound, row: Row) -> str:
    if isinstance(bound, Within):
        return f"{bound.limit:g} {row.unit}"
    own = (
        "" if bound.subject == "natsfs" else f" with {SUBJECTS[bound.subject].title.removeprefix('natsfs, ')}"
    )
    return f"{bound.factor:g}x {SUBJECTS[bound.peer].title}{own}"


def judgement(row: Row, bounds: Sequence[Bound], medians: dict[str, float]) -> str:
    parts = []
    for bound in bounds:
        holds = bound.holds(row, medians)
        verdict = {True: "PASS", False: "**MISS**", None: "not measured"}[holds]
        parts.append(f"{_bound(bound, row)}: {verdict}")
    return ", ".join(parts)


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "| " + " | ".join(["---"] * len(header)) + " |",
        *("| " + " | ".join(line) + " |" for line in lines),
    ]


def _versions() -> str:
    def of(*command: str | Path) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=REPOSITORY)
        except OSError:
            return ""
        return (done.stdout or done.stderr).strip().partition("\n")[0]

    def found(name: str) -> str:
        try:
            return program(name)
        except AssertionError:
            return name

    def package(name: str) -> str:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            return ""

    revision = of("git", "describe", "--always", "--dirty")
    parts = [
        f"natsfs {metadata.version('natsfs')}" if package("natsfs") else "natsfs",
        f"at {revision}" if revision else "",
    ]
    rest = [
        of(found("nats-server"), "--version").replace(": v", " "),
        of(found("rclone"), "version").replace(" v", " "),
        of("fio", "--version").replace("-", " "),
        f"Python {platform.python_version()} ({_maker_of_python()})",
        *(package(name) for name in ("pyfuse3", "trio", "nats-py", "natsrpy")),
    ]
    return ", ".join(filter(None, [" ".join(filter(None, parts)), *rest]))


def _maker_of_python() -> str:
    """It matters: an interpreter that is a shared library needs up to a quarter more time than Debian's."""
    if Path(sys.base_prefix) != Path("/usr"):
        return f"not the distribution's, built with {platform.python_compiler()}"
    try:
        return f"of {platform.freedesktop_os_release()['PRETTY_NAME']}"
    except (OSError, KeyError):
        return "the distribution's"


def _machine(folder: Path, load: float) -> str:
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    told = subprocess.run(["df", "--output=fstype", folder], capture_output=True, text=True, timeout=20)
    kind = told.stdout.split()[-1]
    return (
        f"{cores} cores ({model[1] if model else platform.machine()}), {memory:.0f} GiB of memory, "
        f"Linux {platform.release()}, {kind}, load {load:.1f} at the start"
    )


def tables(
    results: Results, sizes: Sizes, chosen: Sequence[str], trials: int, folder: Path, load: float
) -> str:
    """All of it in Markdown."""
    subjects = [
        key for key in chosen if any(subject == key for _, subject in (*results.values, *results.failures))
    ]
    lines = [
        f"Measured {time.strftime('%Y-%m-%d', time.gmtime())}: {_machine(folder, load)}.",
        "",
        f"{_versions()}.",
        "",
        f"Large file {sizes.large >> 20} MiB, {sizes.files:,} small files, {sizes.small_writes / 2**20:g} MiB in small "
        f"writes, {sizes.objects:,} objects where there are very many, {trials} trials in turn"
        f"{'' if sizes.name == 'full' else f', sizes of the {sizes.name} mode'}. Median, in brackets least and most; "
        "MB are 10^6 bytes. `x` is how many times as good natsfs is as rclone mount without a VFS cache.",
        "",
    ]
    if not processes.can_drop_caches():
        lines += ["Not run as root: the kernel's caches were not dropped for cold rows.", ""]
    body, failed = [], []
    for row in ROWS.values():
        if row.key.startswith("visibility-"):
            continue
        medians = results.medians(row.key)
        texts = []
        for key in subjects:
            if values := results.values.get((row.key, key)):
                texts.append(cell(values))
            elif reason := results.failures.get((row.key, key)):
                texts.append("fails")
                failed.append(f"* {row.title}: {SUBJECTS[key].title}: {reason}")
            else:
                texts.append("")
        if not any(texts):
            continue
        ratio = ""
        if "natsfs" in medians and PEER in medians:
            ratio = number(row.advantage(medians["natsfs"], medians[PEER]))
        verdicts = [judgement(row, bounds, medians) for bounds in (row.floor, row.goal)]
        body.append([row.title, row.unit, *texts, ratio, *verdicts])
    titles = [SUBJECTS[key].title for key in subjects]
    parts = [
        _table(["work", "unit", *titles, "x", "floor", "goal"], body) if body else [],
        ["What fails:", "", *failed] if failed else [],
        _visibility(results, subjects),
        _proofs(results, subjects),
        _costs(results, subjects),
    ]
    for part in filter(None, parts):
        lines += [*part, ""]
    return "\n".join(lines).rstrip() + "\n"


def _visibility(results: Results, subjects: Sequence[str]) -> list[str]:
    """How soon changes show, by situation and call."""
    columns = [
        key for key in subjects if any((row, key) in results.values for row in ROWS if "visibility-" in row)
    ]
    lines = []
    for situation, title in SITUATIONS.items():
        for call, shows in CALLS.items():
            rows = [ROWS[f"visibility-{situation}-{call}-{name}"] for name in QUANTILES]
            values = [results.values.get((row.key, key)) for key in columns for row in rows]
            if not any(values):
                continue
            verdicts = [
                ", ".join(
                    f"{row.key.rpartition('-')[2]} {told}"
                    for row in rows
                    if (told := judgement(row, getattr(row, bounds), results.medians(row.key)))
                )
                for bounds in ("floor", "goal")
            ]
            lines.append([title, shows, *(cell(found) if found else "" for found in values), *verdicts])
    if not lines:
        return []
    titles = [f"{SUBJECTS[key].title}, {name}" for key in columns for name in QUANTILES]
    return [
        "Milliseconds from the moment another client's put has returned:",
        "",
        *_table(["while", "until", *titles, "floor", "goal"], lines),
    ]


def _proofs(results: Results, subjects: Sequence[str]) -> list[str]:
    """That cold reads were cold."""
    rows = [key for key in ROWS if any(row == key for row, _ in results.proofs)]
    columns = [key for key in subjects if any(subject == key for _, subject in results.proofs)]
    if not rows:
        return []
    lines = []
    for row in rows:
        texts = [
            f"{statistics.median(found):.2f}" if (found := results.proofs.get((row, key))) else ""
            for key in columns
        ]
        lines.append([ROWS[row].title, *texts])
    return [
        "Bytes that came from the server over bytes read, in the cold rows:",
        "",
        *_table(["work", *(SUBJECTS[key].title for key in columns)], lines),
    ]


def _costs(results: Results, subjects: Sequence[str]) -> list[str]:
    rows = [key for key in ROWS if any(row == key for row, _ in results.costs)]
    columns = [key for key in subjects if any(subject == key for _, subject in results.costs)]
    columns = [key for key in columns if key not in ("local",)]
    if not rows:
        return []
    lines = []
    for row in rows:
        texts = []
        for key in columns:
            costs = results.costs.get((row, key))
            if not costs:
                texts.append("")
                continue
            daemon, server, peak = (
                statistics.median(getattr(cost, name) for cost in costs)
                for name in ("daemon", "server", "peak")
            )
            text = f"{server:.2f}"
            texts.append(f"{daemon:.2f} / {text} / {peak / 1e6:.0f}" if peak else text)
        lines.append([ROWS[row].title, *texts])
    return [
        "Seconds of CPU time of the daemon / of its server, and the daemon's peak memory in MB (of a client in this "
        "process: only the server's CPU time):",
        "",
        *_table(["work", *(SUBJECTS[key].title for key in columns)], lines),
    ]


def write(path: Path, text: str) -> None:
    """Replace what is between the markers; what people wrote around them stays."""
    old = path.read_text()
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} lacks the lines {BEGIN!r} and {END!r}")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
