"""The running mounts, one small file for each daemon, and what an ended daemon had to report.

A mount is found by its device number, because that names the same file system in every mount namespace, which
a path does not. A process is known by its number and its start time, because the kernel gives numbers out
again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

_RECORD = ".json"
_REPORT = ".report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A daemon that serves a mount. `options` are the fields of Options, as JSON has them."""

    pid: int
    start: int
    device: str
    mountpoint: str
    source: str
    options: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a daemon could not save, in lines for people."""

    pid: int
    start: int
    mountpoint: str
    unsaved: tuple[str, ...]


# --- processes ---


def start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of the process; None if there is none, or only a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return None
    # The name, in parentheses, may itself hold blanks and parentheses.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def is_alive(record: Record | Report) -> bool:
    return start_time(record.pid) == record.start


# --- folders ---


def candidates(uid: int, runtime_dir: str | None) -> list[str]:
    """Where the records of `uid` may be, best first."""
    system = ["/run/natsfs"] if uid == 0 else []
    runtime = [os.path.join(runtime_dir, "natsfs")] if runtime_dir and os.path.isabs(runtime_dir) else []
    return [*system, *runtime, f"/run/user/{uid}/natsfs", f"{tempfile.gettempdir()}/natsfs-{uid}"]


def folder() -> str:
    """The folder for this process's own record, made if need be."""
    reason = ""
    for path in candidates(os.getuid(), os.environ.get("XDG_RUNTIME_DIR")):
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o755 if path == "/run/natsfs" else 0o700)
            if _is_own(path) and os.access(path, os.W_OK):
                return path
        except OSError as error:
            reason = f"{path}: {error.strerror}"
    raise OSError(f"no folder for the record of running mounts can be made ({reason})")


def folders(uid: int) -> list[str]:
    """The folders that exist, for looking up mounts of `uid`."""
    own = os.environ.get("XDG_RUNTIME_DIR") if uid == os.getuid() else None
    found = dict.fromkeys(candidates(os.getuid(), os.environ.get("XDG_RUNTIME_DIR")) + candidates(uid, own))
    return [path for path in found if os.path.isdir(path)]


def _is_own(path: str) -> bool:
    """/tmp belongs to all: somebody else may have made the folder there first."""
    status = os.lstat(path)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def log_path(directory: str, mountpoint: str) -> str:
    """The log of a mount on a machine without syslog; one per mount point, to bound their number."""
    digest = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:12]
    return os.path.join(directory, f"{digest}.log")


# --- records and reports ---


def write(directory: str, record: Record) -> None:
    _write(os.path.join(directory, f"{record.pid}{_RECORD}"), asdict(record))


def write_report(directory: str, report: Report) -> None:
    # Nothing takes it away but whoever reads it, so a later process of the same number may have one, too.
    _write(os.path.join(directory, f"{report.pid}-{report.start}{_REPORT}"), asdict(report))


def remove(directory: str, pid: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(directory, f"{pid}{_RECORD}"))


def records(directories: Iterable[str]) -> Iterator[tuple[str, Record]]:
    """All records with their folder, dead ones included; a file that is none is passed over."""
    for directory in directories:
        for name in _names(directory):
            data = _read(os.path.join(directory, name)) if _is_record(name) else None
            if data is not None:
                with contextlib.suppress(TypeError):
                    yield directory, Record(**data)


def find(directories: Iterable[str], device: str, *, alive: bool = True) -> Record | None:
    """The daemon behind the mount with this device number; or, not `alive`, the one that died behind it."""
    for _, record in records(directories):
        if record.device == device and is_alive(record) == alive:
            return record
    return None


def prune(directory: str, mounted: Container[str]) -> None:
    """Remove the records of daemons that ended without doing so themselves.

    Those of dead mounts that still stand, by the devices in `mounted`, stay for whoever takes them down.
    """
    found = [record for _, record in records([directory])]
    served = {record.device for record in found if is_alive(record)}
    for record in found:
        if not is_alive(record) and (record.device in served or record.device not in mounted):
            remove(directory, record.pid)


def take_reports(
    directories: Iterable[str], *, mountpoint: str | None = None, daemon: Record | None = None
) -> list[Report]:
    """Read and remove the reports of ended daemons: those of a mount point, or of one daemon."""
    taken = []
    for directory in directories:
        for name in _names(directory):
            path = os.path.join(directory, name)
            data = _read(path) if name.endswith(_REPORT) else None
            if data is None:
                continue
            try:
                report = Report(**data | {"unsaved": tuple(data["unsaved"])})
            except (TypeError, KeyError):
                continue
            of_daemon = daemon is None or (daemon.pid, daemon.start) == (report.pid, report.start)
            if mountpoint in (None, report.mountpoint) and of_daemon:
                taken.append(report)
                with contextlib.suppress(OSError):
                    os.unlink(path)
    return taken


def _is_record(name: str) -> bool:
    return name.endswith(_RECORD) and name[: -len(_RECORD)].isdigit()


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _read(path: str) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _write(path: str, data: dict[str, Any]) -> None:
    """In one step: a reader sees the whole file or none."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(data, file)
    os.replace(temporary, path)
