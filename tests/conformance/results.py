"""What a suite has printed, as results; and which failures are expected, as a table. No I/O but the list's file."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

EXPECTED = Path(__file__).with_name("expected.toml")

Outcome = Literal["passed", "failed", "skipped"]


class SuiteError(Exception):
    """The suite did not run, or said something that cannot be understood: then nothing can be said of natsfs."""


@dataclass(frozen=True, slots=True)
class Result:
    """One test; `name` begins with its group. `detail` says what failed, or why it was not run."""

    name: str
    outcome: Outcome
    detail: str = ""

    @property
    def group(self) -> str:
        return re.split(r"/|::", self.name, maxsplit=1)[0]


# --- what the suites print --------------------------------------------------------------------------------------

_TAP = re.compile(r"(not )?ok\b\s*(\d+)?\s*(.*)")


def parse_tap(name: str, text: str, status: int) -> Result:
    """A test file of pjdfstest. It fails if an assertion does, if some are missing, or if it ends with an error."""
    planned: int | None = None
    seen = 0
    failures: list[str] = []
    for line in text.splitlines():
        if plan := re.fullmatch(r"1\.\.(\d+)(\s*#\s*skip.*)?", line.strip(), re.IGNORECASE):
            planned = int(plan[1])
        elif line.startswith("Bail out!"):
            failures.append(line)
        elif match := _TAP.match(line):
            seen += 1
            # What is marked as to be done may fail.
            if match[1] and not re.search(r"#\s*(todo|skip)\b", match[3], re.IGNORECASE):
                failures.append(f"{match[2] or seen} {match[3].removeprefix('- ')}".strip())
    if planned is None:
        failures.append("no plan was printed")
    elif seen != planned:
        failures.append(f"{seen} of {planned} assertions were made")
    if status:
        failures.append(f"ended with {status}")
    if failures:
        return Result(name, "failed", "; ".join(failures))
    return Result(name, "skipped", "does not apply") if planned == 0 else Result(name, "passed")


_RUST_TEST = re.compile(r"(?:pjdfstest::tests::)?([a-z]\w*(?:::\w+)+)\s+(ok|FAILED|skipped)\s*")
_RUST_SUMMARY = re.compile(
    r"Summary: (\d+) failed, (\d+) skipped, (\d+) passed, \d+ expected failures, (\d+) total"
)


def parse_rust(text: str) -> list[Result]:
    """The output of pjdfstest's version in Rust: one line a test, what went wrong indented below it."""
    outcomes: dict[str, Outcome] = {"ok": "passed", "FAILED": "failed", "skipped": "skipped"}
    results: list[Result] = []
    for line in text.splitlines():
        if match := _RUST_TEST.fullmatch(line):
            results.append(Result(match[1], outcomes[match[2]]))
        elif line.startswith("\t") and results:
            last = results[-1]
            detail = "; ".join(filter(None, (last.detail, line.strip())))
            results[-1] = Result(last.name, last.outcome, detail)
    summary = _RUST_SUMMARY.search(text)
    counted = tuple(
        sum(result.outcome == outcome for result in results) for outcome in ("failed", "skipped", "passed")
    )
    if summary is None:
        raise SuiteError(f"the suite printed no summary; its last words: {text[-500:]!r}")
    if tuple(map(int, summary.groups())) != (*counted, len(results)):
        raise SuiteError(
            f"{counted} failed, skipped and passed were understood, the suite says: {summary[0]}"
        )
    return results


_XFS_TEST = re.compile(r"((?:[a-z0-9]+)/\d{3,4})\b(.*)")


def parse_xfstests(text: str) -> list[Result]:
    """The output of xfstests' `check`. Its last lines name all tests; what is above says why one failed."""
    lists: dict[str, list[str]] = {"Ran": [], "Not run": [], "Failures": []}
    about: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        key, colon, names = line.partition(":")
        if colon and key in lists:
            lists[key] = names.split()
            current = None
        elif match := _XFS_TEST.match(line):
            current = about.setdefault(match[1], [])
            current.append(match[2].strip())
        elif current is not None and line.startswith((" ", "\t")):
            current.append(line.strip())
    if not lists["Ran"] and not lists["Not run"]:
        raise SuiteError(f"xfstests ran no test; its last words: {text[-500:]!r}")
    results = []
    for name in dict.fromkeys(lists["Ran"] + lists["Not run"] + lists["Failures"]):
        detail = " ".join(" ".join(about.get(name, ())).split())
        if name in lists["Failures"]:
            results.append(Result(name, "failed", detail))
        elif name in lists["Not run"]:
            results.append(Result(name, "skipped", detail.replace("[not run]", "").strip()))
        else:
            results.append(Result(name, "passed"))
    return results


# --- what is expected -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expectation:
    """Tests, by shell patterns, that may fail, and why. With `message` they may fail in this way only."""

    tests: tuple[str, ...]
    reason: str
    message: str = ""

    def covers(self, result: Result) -> bool:
        return any(fnmatch.fnmatchcase(result.name, pattern) for pattern in self.tests) and (
            re.search(self.message, result.detail) is not None
        )


def expectations(suite: str, path: Path = EXPECTED) -> list[Expectation]:
    with path.open("rb") as file:
        entries = tomllib.load(file).get(suite, [])
    return [Expectation(tuple(e["tests"]), e["reason"], e.get("message", "")) for e in entries]


@dataclass(frozen=True, slots=True)
class Report:
    results: Sequence[Result]
    expected: Sequence[Expectation]

    def reason(self, result: Result) -> str | None:
        """Why this test may fail."""
        return next((e.reason for e in self.expected if e.covers(result)), None)

    @property
    def unexpected(self) -> list[Result]:
        return [r for r in self.results if r.outcome == "failed" and self.reason(r) is None]

    @property
    def unused(self) -> list[str]:
        """Patterns of tests that were run and of which none failed: they can go from the list."""
        return [
            pattern
            for expectation in self.expected
            for pattern in expectation.tests
            if (matching := [r for r in self.results if fnmatch.fnmatchcase(r.name, pattern)])
            and all(r.outcome == "passed" for r in matching)
        ]

    def lines(self) -> Iterable[str]:
        """The table by group, then every failure that nobody expected, then what is expected and why."""
        rows: dict[str, list[int]] = {}
        for result in self.results:
            for group in (result.group, "all"):
                row = rows.setdefault(group, [0, 0, 0, 0])
                if result.outcome == "passed":
                    row[0] += 1
                elif result.outcome == "skipped":
                    row[3] += 1
                else:
                    row[1 if self.reason(result) is not None else 2] += 1
        rows["all"] = rows.pop("all")
        width = max(map(len, rows))
        yield f"{'group':{width}}  passed  expected failures  unexpected failures  not run"
        for group, (passed, expected, unexpected, skipped) in rows.items():
            yield f"{group:{width}}  {passed:6}  {expected:17}  {unexpected:19}  {skipped:7}"
        if self.unexpected:
            yield ""
            for result in self.unexpected:
                yield f"unexpected: {result.name}: {result.detail[:400]}"
        reasons: dict[str, list[str]] = {}
        for result in self.results:
            if result.outcome == "failed" and (reason := self.reason(result)) is not None:
                reasons.setdefault(reason, []).append(result.name)
        for reason, names in reasons.items():
            yield ""
            yield f"expected: {reason}"
            yield f"    {' '.join(names)}"
        if self.unused:
            yield ""
            yield f"passed although they are listed in {EXPECTED.name}: {' '.join(self.unused)}"
