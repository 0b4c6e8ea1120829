"""./dev conformance: see `./dev conformance --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from natsfs.errors import MountError
from tests.conformance import suites
from tests.conformance.results import EXPECTED, Report, Result, SuiteError, expectations

DESCRIPTION = """\
Run a file system test suite that is installed on this machine, on mounts made for it. Prints a table by group; the
status is 1 if a test failed that is not in tests/conformance/expected.toml, and 2 if the suite did not run.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev conformance", description=DESCRIPTION)
    suite = parser.add_mutually_exclusive_group(required=True)
    suite.add_argument("--pjdfstest", type=Path, metavar="DIR", help="its folder, built; C and Rust versions")
    suite.add_argument("--xfstests", type=Path, metavar="DIR", help="its folder, built; needs root")
    parser.add_argument("--expected", type=Path, default=EXPECTED, metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--helpers", type=Path, default=Path("/sbin"), metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument(
        "chosen", nargs="*", help="pjdfstest: parts of test names; xfstests: arguments of check, after --"
    )
    given = parser.parse_args(arguments)
    results: list[Result]
    try:
        if given.pjdfstest is not None:
            name = "pjdfstest"
            results = suites.pjdfstest(given.pjdfstest, given.chosen)
        else:
            name = "xfstests"
            results = suites.xfstests(given.xfstests, given.chosen, given.helpers)
    except (SuiteError, MountError) as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    report = Report(results, expectations(name, given.expected))
    print(*report.lines(), sep="\n")
    return 1 if report.unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
