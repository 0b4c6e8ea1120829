"""Looking at a mount point that may be dead or stuck, within a time limit."""

from __future__ import annotations

import errno
import os
import threading
import time

from natsfs import mounttable, unmount
from natsfs.errors import MountError

_STACK_LIMIT = 32


def device_of(path: str, limit: float) -> int:
    """st_dev of the file system that answers at `path`.

    statvfs is what is asked, because the kernel answers stat from its cache even when the daemon is dead.
    Raises its OSError, or TimeoutError after `limit` seconds; a stuck thread ends with the daemon.
    """
    result: list[int | OSError] = []

    def ask() -> None:
        try:
            os.statvfs(path)
            result.append(os.stat(path).st_dev)
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=ask, name="natsfs-probe", daemon=True)
    thread.start()
    thread.join(limit)
    if not result:
        raise TimeoutError(f"{path} does not answer within {limit:g} s")
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]


def is_dead(mountpoint: str, limit: float = 5.0) -> bool:
    """Whether the daemon behind a FUSE mount is gone: the kernel then answers ENOTCONN or ECONNABORTED."""
    try:
        device_of(mountpoint, limit)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def clear_dead(mountpoint: str) -> None:
    """Take away what a killed natsfs left at `mountpoint`; raise MountError if a live natsfs is there."""
    for _ in range(_STACK_LIMIT):
        entry = mounttable.at(mountpoint)
        if entry is None or not entry.is_natsfs:
            return
        if not is_dead(mountpoint):
            raise MountError(
                f"{mountpoint} is busy: {entry.source} is mounted there by natsfs; "
                f"to end that: natsfs umount {mountpoint}"
            )
        try:
            unmount.detach(mountpoint)
        except OSError as error:
            raise MountError(
                f"the dead natsfs mount at {mountpoint} cannot be removed ({error.strerror}); "
                f"as root: umount -l {mountpoint}"
            ) from None
    raise MountError(
        f"more than {_STACK_LIMIT} dead mounts are stacked at {mountpoint}; umount -l removes one each"
    )


def wait_until_mounted(mountpoint: str, before: int, limit: float) -> None:
    """Until another file system than `before` answers at `mountpoint`; raises TimeoutError or OSError."""
    deadline = time.monotonic() + limit
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"the mount does not answer within {limit:g} s")
        if device_of(mountpoint, left) != before:
            return
        time.sleep(0.02)
