"""Running an installed suite on mounts that are made for it, with a server of their own, and taken down afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from natsfs import helper
from tests.conformance.results import Result, SuiteError, parse_rust, parse_tap, parse_xfstests
from tests.support import Mount, Server, natsfs

# A test that wants a file of a petabyte is refused by the bucket before the disk is full.
BUCKET_SIZE = 4 << 30
FILE_LIMIT = 300.0  # seconds for one file of pjdfstest
SUITE_LIMIT = 6 * 3600.0

PJDFSTEST_CONFIG = """\
# What natsfs has of the features that tests may ask for; posix_fallocate is not among them.
[features]
utimensat = {}
utime_now = {}
rename_ctime = {}

[settings]
naptime = 0.01
"""


@contextlib.contextmanager
def mounted(*buckets: str) -> Iterator[tuple[Path, list[Mount]]]:
    """A mount of each bucket, in a folder where other users may search. Complaints of natsfs are told at the end."""
    folder = Path(tempfile.mkdtemp(prefix="natsfs-conformance-"))
    folder.chmod(0o755)
    server = Server()
    mounts: list[Mount] = []
    try:
        server.start()
        for bucket in buckets:
            server.client.create_bucket(bucket, max_bytes=BUCKET_SIZE)
            mounts.append(Mount.make(server, folder / bucket, f"/{bucket}", *other_users()))
        yield folder, mounts
    finally:
        for mount in mounts:
            # Refused operations leave warnings in the log; that is for the reader to judge.
            for problem in mount.finish():
                print(f"natsfs: {problem}", file=sys.stderr)
        server.close()
        shutil.rmtree(folder, ignore_errors=True)


def other_users() -> list[str]:
    """The option that lets the users in to whom tests change; only root may always give it."""
    return ["allow_other"] if os.getuid() == 0 else []


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def pjdfstest(suite: Path, patterns: Sequence[str]) -> list[Result]:
    """The suite in C and shell (with a folder `tests`), or the one in Rust (a program)."""
    suite = suite.resolve()
    if (suite / "tests").is_dir() and any((suite / "tests").glob("*/*.t")):
        return _shell_tests(suite, patterns)
    for place in ("pjdfstest", "target/release/pjdfstest", "rust/target/release/pjdfstest"):
        if os.access(suite / place, os.X_OK):
            return _rust_tests(suite / place, patterns)
    raise SuiteError(f"{suite} has neither tests/GROUP/NN.t nor a program pjdfstest")


def _shell_tests(suite: Path, patterns: Sequence[str]) -> list[Result]:
    if not os.access(suite / "pjdfstest", os.X_OK):
        raise SuiteError(f"{suite}/pjdfstest is missing: build the suite first")
    if shutil.which("openssl") is None:
        raise SuiteError("the suite needs the program openssl")
    files = [
        path
        for path in sorted((suite / "tests").glob("*/*.t"))
        if not patterns or any(pattern in str(path.relative_to(suite / "tests")) for pattern in patterns)
    ]
    if not files:
        raise SuiteError(f"no test has {' or '.join(patterns)} in its name")
    results = []
    with mounted("conformance") as (_, (mount,)):
        for path in files:
            name = f"{path.parent.name}/{path.stem}"
            work = mount.path / name.replace("/", "-")
            work.mkdir()
            results.append(_tap_file(name, path, work))
            say(f"{name}: {results[-1].outcome}")
    return results


def _tap_file(name: str, path: Path, work: Path) -> Result:
    process = subprocess.Popen(
        ["sh", path],
        cwd=work,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=FILE_LIMIT)
    except subprocess.TimeoutExpired:
        _end_session(process)
        return Result(name, "failed", f"not done after {FILE_LIMIT:g} s")
    return parse_tap(name, text, process.returncode)


def _end_session(process: subprocess.Popen[str]) -> None:
    """The process and its children, which may hold its output open."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.communicate()


def _rust_tests(program: Path, patterns: Sequence[str]) -> list[Result]:
    with mounted("conformance") as (folder, (mount,)):
        config = folder / "pjdfstest.toml"
        config.write_text(PJDFSTEST_CONFIG)
        work = mount.path / "work"
        work.mkdir()
        return parse_rust(_output([program, "-c", config, "-p", work, *patterns], folder, {"NO_COLOR": "1"}))


def _output(command: Sequence[str | Path], folder: Path, environ: dict[str, str]) -> str:
    """What a suite prints, shown while it does. Its status is not needed: it says that a test has failed."""
    lines = []
    with subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line)
                say(line.rstrip("\n"))
            process.wait(SUITE_LIMIT)
        except BaseException:
            _end_session(process)
            raise
    return "".join(lines)


def xfstests(suite: Path, arguments: Sequence[str], helpers: Path) -> list[Result]:
    """`check -fuse`. The suite mounts and unmounts by mount(8), which has to find natsfs' helper for that."""
    suite = suite.resolve()
    if not os.access(suite / "check", os.X_OK):
        raise SuiteError(f"{suite} has no program check")
    with _helpers(helpers), mounted("test", "scratch") as (folder, (test, scratch)):
        config = folder / "local.config"

        def options(mount: Mount) -> str:
            return "-o " + ",".join([*other_users(), f"spool_dir={mount.spool}", f"log_file={mount.log}"])

        settings = {
            "FSTYP": "fuse",
            "FUSE_SUBTYP": ".natsfs",
            "TEST_DEV": f"{test.server.url}/test",
            "TEST_DIR": str(test.path),
            "SCRATCH_DEV": f"{scratch.server.url}/scratch",
            "SCRATCH_MNT": str(scratch.path),
            "TEST_FS_MOUNT_OPTS": options(test),
            "MOUNT_OPTIONS": options(scratch),
            "RESULT_BASE": str(folder / "results"),
        }
        config.write_text("".join(f'export {name}="{value}"\n' for name, value in settings.items()))
        # The suite mounts and unmounts this one by itself.
        scratch.umount()
        chosen = arguments or ["-g", "quick"]
        try:
            return parse_xfstests(
                _output([suite / "check", "-fuse", *chosen], suite, {"HOST_OPTIONS": str(config)})
            )
        finally:
            for mount in (test, scratch):
                _unmount(mount.path)


def _unmount(path: Path) -> None:
    """Whatever the suite has left there."""
    while os.path.ismount(path):
        if natsfs("umount", path).returncode not in (0, 1):
            subprocess.run(["umount", "-l", path], check=True)


@contextlib.contextmanager
def _helpers(folder: Path) -> Iterator[None]:
    """mount.fuse.natsfs, for the time of the run if it is not installed."""
    if os.access(folder / "mount.fuse.natsfs", os.X_OK):
        yield
        return
    helper.install(str(folder))
    try:
        yield
    finally:
        helper.remove(str(folder))
