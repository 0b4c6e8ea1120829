"""Taking a mount down: unmount, wait for the daemon to save what is dirty, pass on what it could not save."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from natsfs import libc, mounttable, registry
from natsfs.errors import MountError
from natsfs.options import recover_command

FUSERMOUNT = "fusermount3"

# fusermount3 only makes one system call; it can be stuck when the kernel waits for a daemon.
_FUSERMOUNT_LIMIT = 60.0
_HOLDERS_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What to tell after unmounting: what could not be saved, and why nothing was waited for."""

    unsaved: tuple[str, ...] = ()
    note: str = ""


def unmount(
    mountpoint: str,
    *,
    limit: float,
    flags: int = 0,
    waiting: Callable[[int, float], None] = lambda pid, seconds: None,
) -> Outcome:
    """Unmount and wait up to `limit` seconds for the daemon's end; `waiting` is called about once a second.

    `flags` are those of umount2(2); with MNT_DETACH nothing is waited for.
    """
    entry = mounttable.at(mountpoint)
    if entry is None:
        raise MountError(f"{mountpoint} is not mounted; /proc/mounts lists all mounts")
    if not entry.is_natsfs:
        raise MountError(f"{mountpoint} is not a natsfs mount but {entry.fstype}; use umount(8)")
    owner = entry.user_id if entry.user_id is not None else os.getuid()
    if os.geteuid() not in (0, owner):
        raise MountError(f"{mountpoint} was mounted by user {owner}; only that user or root can unmount it")
    folders = registry.folders(owner)
    record = registry.find(folders, entry.device)
    dead = registry.find(folders, entry.device, alive=False)
    with contextlib.ExitStack() as stack:
        pidfd = stack.enter_context(_process(record)) if record else None
        _unmount_now(mountpoint, flags)
        if os.geteuid() == owner:
            for folder in folders:
                registry.prune(folder, mounttable.devices())
        if flags & libc.MNT_DETACH:
            return Outcome()
        if record is None:
            return Outcome(note=_why_not_waited(mountpoint, dead))
        if pidfd is not None:
            _wait(pidfd, record.pid, mountpoint, limit, waiting)
    return _outcome(folders, record)


def end_daemon(mountpoint: str, *, limit: float) -> Outcome:
    """Send SIGTERM to the daemon behind a mount that stays busy; it saves, detaches the mount and ends."""
    entry = mounttable.at(mountpoint)
    folders = registry.folders(os.getuid())
    record = registry.find(folders, entry.device) if entry else None
    if record is None:
        raise MountError(
            f"the natsfs process behind {mountpoint} is not known; umount -l {mountpoint} detaches it"
        )
    with _process(record) as pidfd:
        if pidfd is not None:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            _wait(pidfd, record.pid, mountpoint, limit, lambda pid, seconds: None)
    return _outcome(folders, record)


def detach(mountpoint: str) -> None:
    """Lazy unmount, for a mount whose daemon is dead."""
    if os.geteuid() == 0:
        libc.umount(mountpoint, libc.MNT_DETACH)
    else:
        _fusermount("-u", "-z", mountpoint)


def holders(mountpoint: str) -> list[str]:
    """The processes that hold the mount by a working directory or an open file, as "name (pid)".

    Links in /proc are read but not followed, so a stuck mount does not stop this.
    """
    found = []
    inside = mountpoint.rstrip("/") + "/"
    for name in os.listdir("/proc"):
        if name.isdigit() and any((link + "/").startswith(inside) for link in _links(name)):
            found.append(f"{_name(name)} ({name})")
    return found


def _outcome(folders: list[str], record: registry.Record) -> Outcome:
    reports = registry.take_reports(folders, daemon=record)
    return Outcome(unsaved=tuple(line for report in reports for line in report.unsaved))


def _why_not_waited(mountpoint: str, dead: registry.Record | None) -> str:
    if dead is None:
        return f"the daemon behind {mountpoint} is not known, so nothing was waited for"
    command = recover_command(str(dead.options.get("spool_dir")))
    return f"the daemon behind {mountpoint} had died; to see what it had not saved: {command}"


def _unmount_now(mountpoint: str, flags: int) -> None:
    try:
        if os.geteuid() == 0:
            libc.umount(mountpoint, flags)
        else:
            _fusermount("-u", *(["-z"] if flags & libc.MNT_DETACH else []), mountpoint)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _busy(mountpoint) from None
        raise MountError(f"cannot unmount {mountpoint}: {error.strerror}") from None


def _busy(mountpoint: str) -> MountError:
    below = [
        entry.mountpoint
        for entry in mounttable.read()
        if entry.mountpoint.startswith(mountpoint.rstrip("/") + "/")
    ]
    if below:
        return MountError(f"{mountpoint} is busy: {below[-1]} is mounted below it; unmount that first")
    using = holders(mountpoint)
    if not using:
        return MountError(f"{mountpoint} is busy: some program still uses it; close it and try again")
    more = f" and {len(using) - _HOLDERS_SHOWN} more" if len(using) > _HOLDERS_SHOWN else ""
    return MountError(
        f"{mountpoint} is busy: in use by {', '.join(using[:_HOLDERS_SHOWN])}{more}; end that and try again"
    )


def _fusermount(*arguments: str) -> None:
    """Run fusermount3; it tells the reason only in text, so "busy" is read from that."""
    program = shutil.which(FUSERMOUNT)
    if program is None:
        raise OSError(errno.ENOENT, f"{FUSERMOUNT} is not installed (package fuse3)")
    try:
        done = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            timeout=_FUSERMOUNT_LIMIT,
        )
    except subprocess.TimeoutExpired:
        raise OSError(errno.ETIMEDOUT, f"{FUSERMOUNT} did not end within {_FUSERMOUNT_LIMIT:g} s") from None
    if done.returncode != 0:
        reason = " ".join(done.stderr.split()) or f"{FUSERMOUNT} exited with {done.returncode}"
        raise OSError(errno.EBUSY if "busy" in reason else errno.EPERM, reason)


@contextlib.contextmanager
def _process(record: registry.Record) -> Iterator[int | None]:
    """A pidfd of the daemon, or None if it has ended already."""
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        # Looked at again with the pidfd in hand: the number may have been given to another process meanwhile.
        yield pidfd if registry.is_alive(record) else None
    finally:
        os.close(pidfd)


def _wait(pidfd: int, pid: int, mountpoint: str, limit: float, waiting: Callable[[int, float], None]) -> None:
    started = time.monotonic()
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    while True:
        passed = time.monotonic() - started
        if poll.poll(max(0.0, min(1.0, limit - passed)) * 1000):
            return
        passed = time.monotonic() - started
        if passed >= limit:
            raise MountError(
                f"{mountpoint} is unmounted, but natsfs (pid {pid}) is still saving after {limit:g} s; "
                "it goes on and ends by itself"
            )
        waiting(pid, passed)


def _links(pid: str) -> Iterator[str]:
    with contextlib.suppress(OSError):
        yield os.readlink(f"/proc/{pid}/cwd")
        yield os.readlink(f"/proc/{pid}/root")
        yield os.readlink(f"/proc/{pid}/exe")
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(f"/proc/{pid}/fd/{number}")


def _name(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "a program"
