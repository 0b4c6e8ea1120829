"""The kernel's mount table, /proc/self/mountinfo (see proc_pid_mountinfo(5))."""

from __future__ import annotations

import re
from dataclasses import dataclass

FSTYPE = "fuse.natsfs"

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One mount. `device` ("0:47") is the same in every mount namespace that sees the mount."""

    device: str
    mountpoint: str
    options: tuple[str, ...]
    fstype: str
    source: str
    super_options: tuple[str, ...]

    @property
    def is_natsfs(self) -> bool:
        return self.fstype == FSTYPE

    @property
    def user_id(self) -> int | None:
        """Who mounted it, for a FUSE mount."""
        for option in self.super_options:
            name, _, value = option.partition("=")
            if name == "user_id" and value.isdigit():
                return int(value)
        return None


def parse(text: str) -> list[Entry]:
    """All mounts, in the kernel's order: of two on one mount point the later one lies on top."""
    entries = []
    for line in text.splitlines():
        front, separator, back = line.partition(" - ")
        head, tail = front.split(" "), back.split(" ")
        if not separator or len(head) < 6 or len(tail) < 3:
            continue
        entries.append(
            Entry(
                device=head[2],
                mountpoint=_plain(head[4]),
                options=tuple(head[5].split(",")),
                fstype=_plain(tail[0]),
                source=_plain(tail[1]),
                super_options=tuple(tail[2].split(",")),
            )
        )
    return entries


def read() -> list[Entry]:
    # Mount points are bytes to the kernel; what is not UTF-8 must survive the way through str.
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return parse(file.read())


def devices() -> set[str]:
    """Of all mounts."""
    return {entry.device for entry in read()}


def top(entries: list[Entry], mountpoint: str) -> Entry | None:
    """What is seen at `mountpoint`, if it is a mount point at all."""
    return next((entry for entry in reversed(entries) if entry.mountpoint == mountpoint), None)


def at(mountpoint: str) -> Entry | None:
    return top(read(), mountpoint)


def _plain(text: str) -> str:
    r"""The kernel writes blank, tab, newline and backslash as \ooo."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
