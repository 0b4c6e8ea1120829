"""The small parts: helpers of mount(8), remount's flags, the log, sd_notify."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natsfs import assembly, helper, libc, log, remount, systemd
from natsfs.cli import parse_helper
from natsfs.config import Config
from natsfs.errors import MountError, UsageError
from natsfs.options import Options

# --- arguments of helpers, as mount(8) gives them ---


def test_helper_arguments_as_mount_gives_them() -> None:
    call = parse_helper(
        ["nats://h/b", "/mnt", "-sfn", "-v", "-o", "rw,user", "-oro", "-t", "x.y"], flags="sfnv", valued="ot"
    )
    assert call.positional == ["nats://h/b", "/mnt"]
    assert call.flags == set("sfnv")
    assert call.options == ["rw,user", "ro"]


@pytest.mark.parametrize("arguments", [["-x"], ["-o"], ["--help"]])
def test_bad_helper_arguments(arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_helper(arguments, flags="s", valued="o")


# --- installed helpers ---


def test_install_and_remove(tmp_path: Path) -> None:
    lines = helper.install(str(tmp_path))
    assert lines == [f"installed {tmp_path}/{name}" for name in helper.NAMES]
    assert helper.install(str(tmp_path)) == lines  # a second time replaces them
    assert sorted(os.listdir(tmp_path)) == sorted(helper.NAMES)
    for name in helper.NAMES:
        done = subprocess.run(
            [tmp_path / name], capture_output=True, text=True, cwd="/", env={"PATH": "/nowhere"}, timeout=30
        )
        assert done.returncode == 1
        assert done.stderr.startswith(
            f"natsfs: usage: {name.replace('mount.fuse', 'mount') if name[0] == 'm' else name}"
        )
    assert helper.remove(str(tmp_path)) == [f"removed {tmp_path}/{name}" for name in helper.NAMES]
    assert helper.remove(str(tmp_path)) == [f"{tmp_path}/{name} is not there" for name in helper.NAMES]
    assert list(tmp_path.iterdir()) == []


def test_a_helper_of_somebody_else_stays(tmp_path: Path) -> None:
    other = tmp_path / "umount.fuse.natsfs"
    other.write_text("#!/bin/sh\n")
    with pytest.raises(MountError, match="is not from natsfs; move it away first"):
        helper.install(str(tmp_path))
    assert list(tmp_path.iterdir()) == [other]
    assert f"{other} is not from natsfs and stays" in helper.remove(str(tmp_path))


def test_install_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path == sys.argv[0])
    with pytest.raises(MountError, match=r"try: sudo .* install-helper --dir ") as caught:
        helper.install(str(tmp_path))
    assert "-m natsfs" in str(caught.value)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "natsfs")])
    with pytest.raises(MountError, match=f"sudo {tmp_path}/natsfs install-helper --remove"):
        helper.remove(str(tmp_path))


def test_install_into_what_is_no_directory() -> None:
    with pytest.raises(MountError, match="is not a directory"):
        helper.install("/nope")


# --- remount ---


@pytest.mark.parametrize(
    ("current", "items", "expected"),
    [
        (["rw"], ["ro"], libc.MS_RDONLY),
        (["ro", "nosuid", "nodev"], ["rw"], libc.MS_NOSUID | libc.MS_NODEV),
        (
            ["rw", "nosuid", "relatime"],
            ["ro", "suid", "noexec"],
            libc.MS_RDONLY | libc.MS_NOEXEC | libc.MS_RELATIME,
        ),
        (["rw", "noatime"], ["ro", "rw", "sync"], libc.MS_NOATIME | libc.MS_SYNCHRONOUS),
        (["rw", "user_id=0"], ["allow_other"], 0),
    ],
)
def test_flags_of_a_remount(current: list[str], items: list[str], expected: int) -> None:
    assert remount.new_flags(current, items) == expected


def test_is_remount() -> None:
    assert remount.is_remount(["rw", "nosuid,remount,ro"])
    assert not remount.is_remount(["rw,user=remount"])


# --- log ---


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    yield root
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = raising
    logging.captureWarnings(False)


def _config(source: str, **options: object) -> Config:
    config = assembly.configure(source, "/mnt/x", [], {})
    return replace(config, options=replace(Options(), **options))  # type: ignore[arg-type]


def test_no_secret_in_the_log(root_logger: logging.Logger, tmp_path: Path) -> None:
    path = tmp_path / "log"
    log.setup(_config("nats://u:hun%2Fter2@h", log_file=str(path)), foreground=False, fallback="")
    logger = logging.getLogger("natsfs.test")
    logger.info("connecting to %s", "nats://u:hun/ter2@h")
    try:
        raise ValueError("nats://u:hun%2Fter2@h")
    except ValueError:
        logger.exception("failed")
    text = path.read_text()
    assert "hun" not in text
    assert text.count("nats://u:***@h") == 3  # twice in the traceback


def test_fallback_log_is_created_when_something_is_logged(
    root_logger: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: path != "/dev/log")
    path = tmp_path / "log"
    log.setup(_config("nats://h", log_level="warning"), foreground=False, fallback=str(path))
    logging.getLogger("natsfs.test").info("not this")
    assert os.listdir(tmp_path) == []
    logging.getLogger("natsfs.test").warning("but this")
    assert "but this" in path.read_text()


def test_foreground_logs_to_standard_error(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    log.setup(_config("nats://h"), foreground=True, fallback="")
    logging.getLogger("natsfs.test").info("hello")
    assert capsys.readouterr().err == "INFO natsfs.test: hello\n"


@given(st.lists(st.text(min_size=1)), st.text(), st.text())
def test_redactor_leaves_no_secret(secrets: list[str], before: str, after: str) -> None:
    redact = log.Redactor(secrets)
    for secret in secrets:
        shown = redact(before + secret + after)
        # Asterisks of a replacement may complete a secret that itself has some.
        assert "*" in secret or secret not in shown


# --- sd_notify ---


def test_notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.notify("READY=1")
    for address in (str(tmp_path / "socket"), f"@natsfs-test-{os.getpid()}"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
            receiver.bind(address.replace("@", "\0", 1))
            receiver.settimeout(10)
            monkeypatch.setenv("NOTIFY_SOCKET", address)
            systemd.notify("READY=1")
            assert receiver.recv(100) == b"READY=1"
    systemd.notify("STOPPING=1")  # nobody listens any more
