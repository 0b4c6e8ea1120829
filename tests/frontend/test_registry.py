from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from natsfs import mounttable, registry
from natsfs.registry import Record, Report


def _record(
    pid: int = 0, start: int | None = None, device: str = "0:99", mountpoint: str = "/mnt/x"
) -> Record:
    pid = pid or os.getpid()
    started = registry.start_time(pid) if start is None else start
    return Record(
        pid=pid,
        start=started or 0,
        device=device,
        mountpoint=mountpoint,
        source="nats://h",
        options={"uid": None},
    )


def test_a_record_is_found_by_device_while_its_process_lives(tmp_path: Path) -> None:
    record = _record(mountpoint="/mnt/\udcff")
    registry.write(str(tmp_path), record)
    assert registry.find([str(tmp_path)], "0:99") == record
    assert registry.find([str(tmp_path)], "0:98") is None
    assert registry.find(["/nope"], "0:99") is None
    registry.remove(str(tmp_path), record.pid)
    registry.remove(str(tmp_path), record.pid)
    assert list(tmp_path.iterdir()) == []


def test_a_reused_pid_is_another_process(tmp_path: Path) -> None:
    record = _record()
    earlier = replace(record, start=record.start - 1)
    registry.write(str(tmp_path), earlier)
    assert registry.find([str(tmp_path)], "0:99") is None
    registry.prune(str(tmp_path), {"0:98"})
    assert list(tmp_path.iterdir()) == []
    registry.write(str(tmp_path), record)
    registry.prune(str(tmp_path), ())
    assert registry.find([str(tmp_path)], "0:99") == record


def test_the_record_of_a_dead_mount_stays_until_that_is_taken_down(tmp_path: Path) -> None:
    record = _record()
    dead = replace(record, pid=2**22 + 1)  # over the kernel's highest number
    registry.write(str(tmp_path), dead)
    registry.prune(str(tmp_path), {"0:99"})
    assert registry.find([str(tmp_path)], "0:99", alive=False) == dead
    registry.write(str(tmp_path), record)
    registry.prune(str(tmp_path), {"0:99"})
    assert [found for _, found in registry.records([str(tmp_path)])] == [record], "the number has a new mount"


def test_an_ended_process_is_dead_even_as_a_zombie() -> None:
    process = subprocess.Popen(["true"])
    assert os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert registry.start_time(process.pid) is None
    process.wait()
    assert registry.start_time(process.pid) is None


def test_start_time_of_a_process_with_an_odd_name(tmp_path: Path) -> None:
    program = tmp_path / "a) S 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "30"]) as process:
        try:
            other = registry.start_time(os.getpid())
            start = registry.start_time(process.pid)
            assert start is not None
            assert other is not None
            assert start >= other
        finally:
            process.kill()


def test_foreign_files_are_passed_over(tmp_path: Path) -> None:
    for name, text in (
        ("1.json", "{"),
        ("2.json", "[]"),
        ("3.json", "{}"),
        ("x.json", "{}"),
        ("4.report.json", "{}"),
    ):
        (tmp_path / name).write_text(text)
    assert list(registry.records([str(tmp_path)])) == []
    assert registry.take_reports([str(tmp_path)]) == []


def test_reports_are_taken_once(tmp_path: Path) -> None:
    one = Report(pid=1, start=2, mountpoint="/a", unsaved=("x", "y"))
    two = Report(pid=3, start=4, mountpoint="/b", unsaved=("z",))
    for report in (one, two):
        registry.write_report(str(tmp_path), report)
    assert registry.take_reports([str(tmp_path)], mountpoint="/c") == []
    assert registry.take_reports([str(tmp_path)], mountpoint="/a") == [one]
    assert registry.take_reports([str(tmp_path)]) == [two]
    assert registry.take_reports([str(tmp_path)]) == []


def test_a_report_of_an_earlier_process_with_the_same_number_is_not_of_this_daemon(tmp_path: Path) -> None:
    earlier = Report(pid=3, start=4, mountpoint="/a", unsaved=("x",))
    own = Report(pid=3, start=5, mountpoint="/b", unsaved=("y",))
    for report in (earlier, own):
        registry.write_report(str(tmp_path), report)
    assert registry.take_reports([str(tmp_path)], daemon=_record(pid=3, start=5)) == [own]
    assert registry.take_reports([str(tmp_path)], mountpoint="/a") == [earlier]


def test_candidates() -> None:
    assert registry.candidates(0, None)[0] == "/run/natsfs"
    assert registry.candidates(7, "/run/user/7") == [
        "/run/user/7/natsfs",
        "/run/user/7/natsfs",
        f"{tempfile.gettempdir()}/natsfs-7",
    ]
    assert registry.candidates(7, "relative")[0] == "/run/user/7/natsfs"


def test_own_folder_exists_and_is_writable_by_nobody_else() -> None:
    status = os.stat(registry.folder())
    assert status.st_uid == os.getuid()
    assert not status.st_mode & 0o022


MOUNTINFO = r"""
22 27 0:20 / /proc rw,nosuid,nodev,noexec,relatime shared:13 - proc proc rw
90 27 0:40 / /mnt/a\040b rw,nosuid,nodev,relatime shared:1 master:2 - fuse.natsfs nats://h/\134x rw,user_id=7,group_id=0
91 90 0:41 / /mnt/a\040b ro,relatime - fuse.natsfs nats://h2 rw,user_id=0
short line
""".lstrip()


def test_mount_table() -> None:
    entries = mounttable.parse(MOUNTINFO)
    assert [entry.device for entry in entries] == ["0:20", "0:40", "0:41"]
    first = entries[1]
    assert (first.mountpoint, first.source, first.user_id) == ("/mnt/a b", r"nats://h/\x", 7)
    assert first.options == ("rw", "nosuid", "nodev", "relatime")
    assert first.is_natsfs
    assert not entries[0].is_natsfs
    assert entries[0].user_id is None
    top = mounttable.top(entries, "/mnt/a b")
    assert top is not None
    assert top.device == "0:41"
    assert mounttable.top(entries, "/mnt") is None


def test_own_mount_table_is_read() -> None:
    entry = mounttable.at("/proc")
    assert entry is not None
    assert entry.fstype == "proc"


@given(st.text())
def test_no_mount_table_is_too_odd(text: str) -> None:
    mounttable.parse(text)
