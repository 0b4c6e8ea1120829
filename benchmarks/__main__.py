"""`./dev bench`."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.measure import FULL, QUICK, SIZES, Results, Sizes, measure
from benchmarks.processes import can_drop_caches, handle_signals, say, shielded
from benchmarks.rows import ROWS
from benchmarks.subjects import SUBJECTS, Place
from benchmarks.workloads import QUICK_SUBJECTS, SLOW, WORKLOADS
from tests.support import REPOSITORY, Server

DOCUMENT = REPOSITORY / "docs" / "benchmarks.md"


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./dev bench",
        description="Compares natsfs with others on this machine. The table goes to standard output.",
        epilog=f"Subjects: {', '.join(SUBJECTS)}. Rows: {', '.join(ROWS)}; a part of a name up to a dash will do.",
    )
    names = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, fewer rows and columns: a few minutes"
    )
    parser.add_argument("--only", type=names, metavar="ROW,...", help="only these rows")
    parser.add_argument("--subjects", type=names, metavar="SUBJECT,...", help="only these columns")
    parser.add_argument("--trials", type=int, metavar="N", help=f"{FULL.trials}, quick {QUICK.trials}")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where all data lies: %(default)s")
    parser.add_argument("--size", choices=SIZES, help=argparse.SUPPRESS)
    parser.add_argument("--document", type=Path, default=DOCUMENT, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    for name in arguments.subjects or ():
        if name not in SUBJECTS:
            parser.error(f"there is no subject {name}: {', '.join(SUBJECTS)}")
    for name in arguments.only or ():
        if not _rows([name]):
            parser.error(f"there is no row {name}: {', '.join(ROWS)}")
    return arguments


def _rows(names: Sequence[str]) -> set[str]:
    return {row for row in ROWS for name in names if row == name or row.startswith(f"{name}-")}


@contextlib.contextmanager
def _place(under: Path) -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="natsfs-bench-", dir=under))
    earlier = tempfile.tempdir
    tempfile.tempdir = str(folder)  # for the server's data
    server = Server()
    try:
        with shielded():
            server.start()
        yield Place(folder, server)
    finally:
        with shielded():
            server.close()
            tempfile.tempdir = earlier
            shutil.rmtree(folder, ignore_errors=True)


def main(given: Sequence[str]) -> int:
    arguments = _arguments(given)
    sizes: Sizes = SIZES[arguments.size] if arguments.size else QUICK if arguments.quick else FULL
    chosen = arguments.subjects or (QUICK_SUBJECTS if arguments.quick else list(SUBJECTS))
    chosen = [key for key in SUBJECTS if key in chosen]
    wanted = _rows(arguments.only) if arguments.only else set(ROWS)
    if arguments.quick and not arguments.only:
        wanted -= _rows(SLOW)
    trials = arguments.trials or sizes.trials
    handle_signals()
    if not can_drop_caches():
        say("not root: the kernel's caches are not dropped; what a daemon caches is")
    load, start, results = os.getloadavg()[0], time.monotonic(), Results()
    status = 0
    with _place(arguments.dir) as place:
        try:
            measure(WORKLOADS, place, sizes, chosen, wanted, trials, results)
        except KeyboardInterrupt:
            say("interrupted: this is what there is")
            status = 130
        text = report.tables(results, sizes, chosen, trials, place.folder, load)
    print(text)
    say(f"took {time.monotonic() - start:.0f} s")
    if arguments.write and not status:
        report.write(arguments.document, text)
        say(f"written to {arguments.document}")
    return status or any(subject.startswith("natsfs") for _, subject in results.failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
