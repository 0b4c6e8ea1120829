"""`mount -o remount`: the kernel's flags can be changed while mounted, the daemon's options cannot.

mount(8) passes a helper the options of /etc/fstab and of the mount table together with the new ones, so an
option that is named but not changed is no error.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from natsfs import libc, mounttable, options, registry
from natsfs.errors import MountError, UsageError

_FLAGS = {
    "ro": libc.MS_RDONLY,
    "nosuid": libc.MS_NOSUID,
    "nodev": libc.MS_NODEV,
    "noexec": libc.MS_NOEXEC,
    "sync": libc.MS_SYNCHRONOUS,
    "dirsync": libc.MS_DIRSYNC,
    "noatime": libc.MS_NOATIME,
    "nodiratime": libc.MS_NODIRATIME,
    "relatime": libc.MS_RELATIME,
}
_CLEARED_BY = {"rw": "ro", "suid": "nosuid", "dev": "nodev", "exec": "noexec", "async": "sync"}

# Options of the kernel's FUSE driver that stand in the mount table, not of natsfs.
_OF_THE_DRIVER = ("user_id=", "group_id=", "rootmode=", "fd=", "max_read=", "blksize=", "fsname=", "subtype=")


def is_remount(texts: Sequence[str]) -> bool:
    return any("remount" in options.split(text) for text in texts)


def remount(mountpoint: str, texts: Sequence[str], *, sloppy: bool = False) -> None:
    entry = mounttable.at(mountpoint)
    if entry is None or not entry.is_natsfs:
        raise MountError(f"{mountpoint} is not a natsfs mount, so it cannot be remounted")
    record = registry.find(registry.folders(entry.user_id or 0), entry.device)
    items = [
        item
        for text in texts
        for item in options.split(text)
        if item != "remount" and not item.startswith(_OF_THE_DRIVER)
    ]
    wanted = options.settings([_join(items)], sloppy=sloppy)
    if record:
        _check_unchanged(wanted, record)
    flags = new_flags(entry.options + entry.super_options, items)
    try:
        libc.remount(mountpoint, flags)
    except PermissionError:
        raise MountError("remount is for root; try: sudo mount -o remount,...") from None
    except OSError as error:
        raise MountError(f"{mountpoint} cannot be remounted: {os.strerror(error.errno or 0)}") from None


def new_flags(current: Sequence[str], items: Sequence[str]) -> int:
    """The flags for mount(2): those of the mount, changed by each item in turn."""
    names = {name for name in current if name in _FLAGS}
    for item in items:
        if item in _CLEARED_BY:
            names.discard(_CLEARED_BY[item])
        elif item in _FLAGS:
            names.add(item)
    return sum(_FLAGS[name] for name in names)


def _check_unchanged(wanted: dict[str, object], record: registry.Record) -> None:
    for field, value in wanted.items():
        if field == "kernel_options":
            continue
        if field == "read_only":
            if record.options.get(field) and not value:
                raise UsageError("natsfs was started with ro and stays so; unmount and mount again with rw")
        elif record.options.get(field) != value:
            raise UsageError(f"{field} cannot be changed by remount; unmount and mount again")


def _join(items: Sequence[str]) -> str:
    return ",".join(item.replace("\\", "\\\\").replace(",", "\\,") for item in items)
