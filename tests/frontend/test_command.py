"""Bad input on the command line: one line of what to do, the right status, and nothing left behind. No server."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from natsfs import __version__
from tests.frontend.conftest import Natsfs

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["localhost/b"], 2, "SOURCE 'localhost/b' is not of the form nats://"),
        (["nats://h:99999/b"], 2, "not a port"),
        (["nats://h/b.c"], 2, "not a bucket name"),
        (["nats:///b"], 2, "give nats://host/bucket, or -o context=NAME"),
        (["-o", "cahe_size=1M", "nats://h/b"], 2, "did you mean cache_size=SIZE?"),
        (["-o", "timeout=x", "nats://h/b"], 2, "expected a time"),
        (["-o", f"password={SECRET}", "nats://h/b"], 2, "give password_file=FILE, or set NATSFS_PASSWORD"),
        (["-o", f"token={SECRET}", "nats://h/b"], 2, "give token_file=FILE, or set NATSFS_TOKEN"),
        (["-o", "context=nope", "nats://h/b"], 2, "context 'nope' does not exist"),
        (["-o", "password_file=/nope", "nats://u@h/b"], 2, "/nope cannot be read: No such file"),
        (["-o", "user=bob", "nats://h/b"], 2, "user=bob has no password"),
        (["-o", "creds=/a,nkey=/b", "nats://h/b"], 2, "give only one"),
        (["-o", "remount,ro", "nats://h/b"], 2, "use mount(8)"),
        (["-o", "creds=/nope", "nats://h/b"], 1, "creds file /nope cannot be read"),
        (["-o", "nkey=/", "nats://h/b"], 1, "nkey file / cannot be read: Is a directory"),
        (["-o", "tls_ca=/nope", "nats://h/b"], 1, "tls_ca file /nope"),
        (["-o", "log_file=/nope/log", "nats://h/b"], 1, "log_file /nope/log cannot be written"),
        (
            ["-o", "spool_dir=/etc/passwd", "nats://h/b"],
            1,
            "spool_dir /etc/passwd is not a writable directory",
        ),
    ],
)
def test_bad_arguments(
    natsfs: Natsfs, mountpoint: Path, arguments: list[str], status: int, expected: str
) -> None:
    result = natsfs("mount", *arguments, mountpoint)
    assert result.status == status
    assert expected in result.error
    assert SECRET not in result.error


def test_a_secret_in_a_bad_source_is_not_repeated(natsfs: Natsfs, mountpoint: Path) -> None:
    for source in (
        f"nats://u:{SECRET}@h:x/b",
        f"nats://u:{SECRET}/x@h/b",
        f"http://{SECRET}@h",
        f"{SECRET}@h",
    ):
        result = natsfs("mount", source, mountpoint)
        assert result.status == 2
        assert SECRET not in result.err


def test_mount_point_is_missing(natsfs: Natsfs, tmp_path: Path) -> None:
    result = natsfs("mount", "nats://h/b", tmp_path / "nope")
    assert (result.status, result.error) == (
        1,
        f"mount point {tmp_path}/nope does not exist; create it with: mkdir -p {tmp_path}/nope",
    )


def test_mount_point_is_a_file(natsfs: Natsfs, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = natsfs("mount", "nats://h/b", tmp_path / "file")
    assert result.status == 1
    assert "is not a directory" in result.error


def test_spool_and_log_may_not_lie_inside_the_mount(natsfs: Natsfs, mountpoint: Path) -> None:
    for option in ("spool_dir", "log_file"):
        result = natsfs("mount", "-o", f"{option}={mountpoint}/x", "nats://h/b", mountpoint)
        assert result.status == 1
        assert "lies inside the mount point" in result.error


def test_two_starts_on_one_mount_point(natsfs: Natsfs, mountpoint: Path) -> None:
    """The lock that the other start would hold."""
    other = os.open(mountpoint, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        result = natsfs("mount", "nats://127.0.0.1:1/b", mountpoint)
    finally:
        os.close(other)
    assert result.status == 1
    assert "another natsfs is being mounted there" in result.error


def test_umount_of_what_is_not_mounted(natsfs: Natsfs, mountpoint: Path) -> None:
    result = natsfs("umount", mountpoint)
    assert result.status == 1
    assert "is not mounted" in result.error
    result = natsfs("umount", "/proc")
    assert result.status == 1
    assert "/proc is not a natsfs mount but proc" in result.error


@pytest.mark.parametrize("arguments", [[], ["mont"], ["mount"], ["mount", "a"], ["umount", "--lazy", "a"]])
def test_what_argparse_refuses(natsfs: Natsfs, arguments: list[str]) -> None:
    result = natsfs(*arguments)
    assert result.status == 2
    assert "usage: natsfs" in result.err


def test_version_and_help(natsfs: Natsfs) -> None:
    assert natsfs("--version").out == f"natsfs {__version__}\n"
    help_text = natsfs("--help").out
    for command in ("mount", "umount", "recover", "demo", "install-helper"):
        assert f"\n    {command}" in help_text
        assert natsfs(command, "--help").status == 0


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["nats://h/b"], 1, "usage: mount.natsfs SOURCE MOUNTPOINT"),
        (["nats://h/b", "MNT", "-Q"], 1, "unknown option -Q"),
        (["nats://h/b", "MNT", "-o"], 1, "-o needs a value"),
        (["nats://h/b", "MNT", "-o", "zzz=1"], 1, "unknown option 'zzz'"),
        (["nats://h/b", "/nope"], 32, "mount point /nope does not exist"),
        (["nats://h/b", "MNT", "-o", "remount,ro"], 32, "is not a natsfs mount"),
    ],
)
def test_bad_arguments_of_the_mount_helper(
    natsfs: Natsfs, mountpoint: Path, arguments: list[str], status: int, expected: str
) -> None:
    """The statuses are those of mount(8)."""
    result = natsfs("mount-helper", *(str(mountpoint) if word == "MNT" else word for word in arguments))
    assert result.status == status
    assert expected in result.error


def test_mount_helper_checks_only_when_faking(natsfs: Natsfs, mountpoint: Path) -> None:
    result = natsfs("mount-helper", "nats://127.0.0.1:1/b", mountpoint, "-sfnv", "-o", "rw,user,zzz=1")
    assert (result.status, result.err) == (0, "")


def test_umount_helper(natsfs: Natsfs, mountpoint: Path) -> None:
    assert "is not mounted" in natsfs("umount-helper", mountpoint, "-n", "-t", "fuse.natsfs").error
    assert natsfs("umount-helper").status == 1
