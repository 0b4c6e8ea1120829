"""Which processes have a file open, by /proc (proc_pid_fdinfo(5); the inode number is there since Linux 5.14)."""

from __future__ import annotations

import os
import time

LIMIT = 0.2  # seconds; of more descriptors than can be looked at in it the rest is not seen


def open_for_writing(ino: int) -> bool:
    """Whether some process is seen to have a descriptor for writing to inode `ino`.

    Blocks for some milliseconds. Numbers of inodes are unique enough to do without the device: they are drawn at random
    from 63 bits. A daemon that is not root sees its own user's processes only.
    """
    wanted = f"ino:\t{ino}\n"
    stop = time.monotonic() + LIMIT
    for pid in os.listdir("/proc"):
        if not pid.isdigit():
            continue
        try:
            descriptors = os.listdir(f"/proc/{pid}/fdinfo")
        except OSError:
            continue  # ended, or somebody else's
        for descriptor in descriptors:
            if time.monotonic() > stop:
                return False
            try:
                # Only a path can be one of ours: pipes and sockets are most of what there is.
                if not os.readlink(f"/proc/{pid}/fd/{descriptor}").startswith("/"):
                    continue
                with open(f"/proc/{pid}/fdinfo/{descriptor}") as file:
                    text = file.read()
            except OSError:
                continue
            if wanted in text and _flags(text) & os.O_ACCMODE != os.O_RDONLY:
                return True
    return False


def _flags(text: str) -> int:
    for line in text.splitlines():
        if line.startswith("flags:"):
            return int(line.split()[1], 8)
    return 0
