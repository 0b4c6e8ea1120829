"""`./dev conformance` with small suites of the shape that the real ones have; those are not part of this repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.results import (
    Expectation,
    Report,
    Result,
    SuiteError,
    expectations,
    parse_rust,
    parse_tap,
    parse_xfstests,
)
from tests.support import REPOSITORY

EXPECTED = """\
[[pjdfstest]]
tests = ["link/*"]
message = "got EPERM"
reason = "there are no hard links"

[[xfstests]]
tests = ["generic/002"]
reason = "there are no hard links here either"
"""

# Prints what a call gave, as the suite's own program does.
PROGRAM = """\
#!/bin/sh
case $1 in
create) : > "$2" && echo 0 ;;
link) if ln "$2" "$3" 2>&1 | grep -q 'not permitted'; then echo EPERM; else echo 0; fi ;;
stat) stat -c "%$3" "$2" ;;
type) stat -f -c %T . ;;
esac
"""

MISC = """\
n=0
fstest=$(dirname "$0")/../../pjdfstest
expect() {
    want=$1; shift; n=$((n + 1))
    got=$("$fstest" "$@")
    if [ "$got" = "$want" ]; then echo "ok $n"
    else echo "not ok $n - tried '$*', expected $want, got $got"; fi
}
"""

TESTS = {
    "create/00": 'echo "1..3"; expect 0 create f; expect 0 stat f s; expect 644 stat f a',
    "create/01": 'echo "1..1"; expect fuseblk type',
    "create/02": 'echo "1..0 # SKIP not on this system"',
    "link/00": 'echo "1..2"; expect 0 create f; expect 0 link f g',
    "link/01": 'echo "1..2"; expect 0 create f; expect EPERM link f g',
}


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A small suite of pjdfstest's shape, which passes on natsfs but for a hard link."""
    suite = tmp_path / "suite"
    write_program(suite / "pjdfstest", PROGRAM)
    (suite / "tests").mkdir()
    (suite / "tests/misc.sh").write_text(MISC)
    for name, body in TESTS.items():
        write_program(suite / f"tests/{name}.t", f'#!/bin/sh\n. "$(dirname "$0")/../misc.sh"\n{body}\n')
    return suite


def conformance(tmp_path: Path, *arguments: str | Path, status: int) -> tuple[str, str]:
    """What the command prints, which must leave no mount, helper or process behind."""
    (tmp_path / "expected.toml").write_text(EXPECTED)
    (tmp_path / "helpers").mkdir(exist_ok=True)
    (tmp_path / "temporary").mkdir(exist_ok=True, mode=0o755)
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "tests.conformance", "--expected", tmp_path / "expected.toml"),
            *("--helpers", tmp_path / "helpers", *arguments),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path / "temporary")},
    )
    assert done.returncode == status, done.stderr + done.stdout
    assert list((tmp_path / "helpers").iterdir()) == []
    assert list((tmp_path / "temporary").iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    assert "natsfs:" not in done.stderr
    return done.stdout, done.stderr


def rows(table: str) -> dict[str, tuple[int, ...]]:
    """group: (passed, expected failures, unexpected failures, not run)"""
    lines = table.partition("\n\n")[0].splitlines()[1:]
    return {words[0]: tuple(map(int, words[1:])) for words in (line.split() for line in lines)}


def test_pjdfstest(suite: Path, tmp_path: Path) -> None:
    """Each file runs in a folder of the mount; failures that the list explains do not count."""
    out, _ = conformance(tmp_path, "--pjdfstest", suite, status=0)
    assert rows(out) == {"create": (2, 0, 0, 1), "link": (1, 1, 0, 0), "all": (3, 1, 0, 1)}
    assert "expected: there are no hard links\n    link/00\n" in out


def test_pjdfstest_with_an_unexpected_failure(suite: Path, tmp_path: Path) -> None:
    """A failure that the list does not name, or explains otherwise, is shown with what failed."""
    write_program(
        suite / "tests/create/03.t", '. "$(dirname "$0")/../misc.sh"; echo 1..1; expect 1 create f\n'
    )
    write_program(suite / "tests/link/02.t", "echo 1..2; echo ok 1\n")
    write_program(suite / "tests/link/03.t", "echo 1..1; echo ok 1; exit 3\n")
    out, _ = conformance(tmp_path, "--pjdfstest", "suite", status=1)
    assert rows(out)["all"] == (3, 1, 3, 1)
    assert "unexpected: create/03: 1 tried 'create f', expected 1, got 0\n" in out
    assert "unexpected: link/02: 1 of 2 assertions were made\n" in out
    assert "unexpected: link/03: ended with 3\n" in out


def test_pjdfstest_of_chosen_tests(suite: Path, tmp_path: Path) -> None:
    """Parts of names choose the files to run; if nothing fits, that is an error."""
    out, _ = conformance(tmp_path, "--pjdfstest", suite, "create", "link/01", status=0)
    assert rows(out)["all"] == (3, 0, 0, 1)
    _, err = conformance(tmp_path, "--pjdfstest", suite, "crete", status=2)
    assert "no test has crete in its name" in err


def test_pjdfstest_in_rust(tmp_path: Path) -> None:
    """The version in Rust is a program that is told where to run, and what natsfs has."""
    write_program(
        tmp_path / "suite/target/release/pjdfstest",
        """\
#!/bin/sh
[ "$1" = -c ] && grep -q '^utimensat' "$2" && [ "$3" = -p ] && cd "$4" && [ "$(stat -f -c %T .)" = fuseblk ] || exit 9
: > f
echo "chmod::change_perm::regular                  ok"
echo "link::share_metadata::regular                FAILED"
ln f g 2>&1 | sed -n "s/.*not permitted/\tcalled Result::unwrap() on an Err value: got EPERM/p"
echo "posix_fallocate::increase_file_size          skipped"
echo "	requires features: posix_fallocate"
echo
echo "Summary: 1 failed, 1 skipped, 1 passed, 0 expected failures, 3 total"
exit 1
""",
    )
    (tmp_path / "before.toml").touch()
    out, _ = conformance(tmp_path, "--pjdfstest", tmp_path / "suite", status=1)
    assert (
        "unexpected: link::share_metadata::regular: called Result::unwrap() on an Err value: got EPERM" in out
    )
    assert rows(out) == {
        "chmod": (1, 0, 0, 0),
        "link": (0, 0, 1, 0),
        "posix_fallocate": (0, 0, 0, 1),
        "all": (1, 0, 1, 1),
    }


CHECK = """\
#!/bin/bash
[ "$1" = -fuse ] || exit 9
shift
. "$HOST_OPTIONS"
[ "$FSTYP$FUSE_SUBTYP" = fuse.natsfs ] || exit 9
[ "$(findmnt -rnc -S "$TEST_DEV" -o TARGET)" = "$TEST_DIR" ] || exit 9
[ "$(findmnt -rnc -T "$SCRATCH_MNT" -o TARGET)" != "$SCRATCH_MNT" ] || exit 9
[ "$(stat -f -c %T "$TEST_DIR")" = fuseblk ] || exit 9
# mount(8) finds helpers in /sbin alone, so this calls it where it was put.
"$HELPER" "$SCRATCH_DEV" "$SCRATCH_MNT" $MOUNT_OPTIONS || exit 9
echo scratch > "$SCRATCH_MNT/file" || exit 9
: > "$TEST_DIR/file"
echo "FSTYP         -- fuse.natsfs"
echo
echo "generic/001 5s ...  4s"
if ln "$TEST_DIR/file" "$TEST_DIR/other"; then echo "generic/002 3s ...  2s"
else
    echo "generic/002       - output mismatch (see results/generic/002.out.bad)"
    echo "    -ok"
    bad=" generic/002"
fi
echo "generic/003       [not run] atime related mount options have no effect on fuse"
[ "$*" = "-g quick" ] || { echo "generic/099      [failed, exit status 1]"; bad="$bad generic/099"; }
echo "Ran: generic/001 generic/002 generic/003 ${*:+generic/099}"
echo "Not run: generic/003"
echo "Failures:$bad"
exit 1
"""


@pytest.mark.parametrize("chosen", [(), ("--", "-g", "auto")])
def test_xfstests(tmp_path: Path, chosen: tuple[str, ...]) -> None:
    """`check` gets a configuration with one mount that is there, and one that it mounts by itself."""
    text = CHECK.replace('"$HELPER"', str(tmp_path / "helpers/mount.fuse.natsfs"))
    write_program(tmp_path / "suite/check", text)
    out, _ = conformance(tmp_path, "--xfstests", tmp_path / "suite", *chosen, status=1 if chosen else 0)
    if chosen:
        assert rows(out)["all"] == (1, 1, 1, 1)
        assert "unexpected: generic/099: [failed, exit status 1]" in out
    else:
        assert rows(out)["all"] == (2, 1, 0, 1)
    assert "expected: there are no hard links here either\n    generic/002" in out


def test_no_suite(tmp_path: Path) -> None:
    """A folder without a suite, or a suite that was not built, is not a result."""
    for option in ("--pjdfstest", "--xfstests"):
        conformance(tmp_path, option, tmp_path, status=2)
    (tmp_path / "tests/chmod").mkdir(parents=True)
    (tmp_path / "tests/chmod/00.t").touch()
    _, err = conformance(tmp_path, "--pjdfstest", tmp_path, status=2)
    assert "build the suite first" in err
    write_program(tmp_path / "check", "#!/bin/sh\necho broken\n")
    _, err = conformance(tmp_path, "--xfstests", tmp_path, status=2)
    assert "xfstests ran no test; its last words: 'broken" in err


@pytest.mark.parametrize(
    ("text", "status", "outcome"),
    [
        ("1..2\nok 1\nok 2\n", 0, "passed"),
        ("ok 1\nok 2\n1..2\n", 0, "passed"),
        ("1..1\nnot ok 1 # TODO not here\n", 0, "passed"),
        ("1..0\n", 0, "skipped"),
        ("1..2\nok 1\nnot ok 2 - tried\n", 0, "failed"),
        ("1..2\nok 1\n", 0, "failed"),
        ("1..1\nok 1\nok 2\n", 0, "failed"),
        ("1..1\nok 1\n", 1, "failed"),
        ("ok 1\n", 0, "failed"),
        ("", 0, "failed"),
        ("1..1\nok 1\nBail out! no more\n", 0, "failed"),
    ],
)
def test_tap(text: str, status: int, outcome: str) -> None:
    assert parse_tap("a/00", text, status).outcome == outcome


def test_output_that_is_not_understood() -> None:
    """A number of tests other than the suite says, or no tests at all, is an error."""
    good = "a::b ok\n\nSummary: 0 failed, 0 skipped, 1 passed, 0 expected failures, 1 total\n"
    assert parse_rust(good) == [Result("a::b", "passed")]
    for bad in ("", "a::b ok\n", good.replace("a::b ok", "a::b fine"), good.replace("1 passed", "2 passed")):
        with pytest.raises(SuiteError):
            parse_rust(bad)
    with pytest.raises(SuiteError):
        parse_xfstests("generic/001 4s\n")


def test_list_names_what_no_longer_fails() -> None:
    """A pattern all of whose tests pass is named, so that the list does not outlive its reasons."""
    expected = [Expectation(("a/*", "b/00", "c/00"), "why")]
    report = Report([Result("a/00", "failed"), Result("a/01", "passed"), Result("b/00", "passed")], expected)
    assert report.unused == ["b/00"]
    assert "passed although they are listed in expected.toml: b/00" in list(report.lines())


@pytest.mark.parametrize("suite", ["pjdfstest", "xfstests"])
def test_list_of_expected_failures(suite: str) -> None:
    """The list can be read, and gives a reason for each entry."""
    found = expectations(suite)
    assert found
    assert all(entry.tests and len(entry.reason) > 20 for entry in found)
