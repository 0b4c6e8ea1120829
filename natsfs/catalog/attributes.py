"""POSIX attributes in an object's ``metadata`` map, under the keys and in the forms that rclone uses."""

from __future__ import annotations

import functools
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9})\d*)?(?:[Zz]|([+-])(\d\d):?(\d\d))"
)
# "NUID SIZE" of the version whose bytes this one begins with, unchanged: what an append was made to.
EXTENDS_KEY: Final = "extends"
OWN_KEYS: Final = (
    *("mode", "uid", "gid", "rdev", "atime", "mtime", "ctime", "btime", "named", "ino"),
    EXTENDS_KEY,
)
SYMLINK_KEY: Final = "symlink"
# "MOUNT:NUID ..." of what was appended to: the last version that each mount has stored, the newest first.
APPENDS_KEY: Final = "appends"
APPENDERS: Final = 16  # mounts that are named there, at most
# Only these can follow one another in the mode of something that a directory lists and that is none itself.
_FILE_TYPES: Final = frozenset(
    [stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK]
)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def parse_time(text: str) -> int | None:
    """Nanoseconds since the epoch of an RFC 3339 time, or None. Exact, unlike datetime, to the nanosecond."""
    if len(text) == 30 and text[29] == "Z" and text[19] == "." and text[20:29].isdigit() and text.isascii():
        # As natsfs writes it. Of a million files most fall on a few seconds.
        whole_ns = _parse(text[:19] + "Z")
        return None if whole_ns is None else whole_ns + int(text[20:29])
    return _parse(text)


@functools.lru_cache(1024)
def _parse(text: str) -> int | None:
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    year, month, day, hour, minute, second = (int(match[i]) for i in range(1, 7))
    try:
        whole = datetime(year, month, day, hour, minute, min(second, 59), tzinfo=UTC) - _EPOCH
    except ValueError:
        return None
    seconds = whole.days * 86400 + whole.seconds + (second == 60)
    if match[8]:
        offset = int(match[9]) * 3600 + int(match[10]) * 60
        seconds += offset if match[8] == "-" else -offset
    return seconds * 1_000_000_000 + int((match[7] or "0").ljust(9, "0"))


@functools.lru_cache(256)  # the times of one file are mostly the same
def format_time(time_ns: int) -> str:
    """RFC 3339 in UTC with nanoseconds. Times outside of the years 1 to 9999 become the nearest that fits."""
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    seconds = max(-62135596800, min(seconds, 253402300799))
    days, rest = divmod(seconds, 86400)
    date = datetime.fromordinal(_EPOCH.toordinal() + days)
    return (
        f"{date.year:04}-{date.month:02}-{date.day:02}T{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
        f".{nanoseconds:09}Z"
    )


# --- the map of a file that natsfs wrote, in a quarter of its memory ----------------------------------------------

_COMPACT: Final = struct.Struct("<IIIqqqqq")
_COMPACT_KEYS: Final = ("mode", "uid", "gid", "atime", "mtime", "ctime", "btime", "ino")


# Lines: mode, uid and gid; four times; the number.
_WRITTEN: Final = re.compile(
    "([0-7]+\n[0-9]+\n[0-9]+)\n" + r"(.{19})\.([0-9]{9})Z\n" * 4 + "(0|[1-9][0-9]{,18})"
)


def compact(values: Mapping[str, str]) -> bytes | None:
    """What `expand` makes exactly this map of, None of one that natsfs did not write, or wrote otherwise."""
    if tuple(values) != _COMPACT_KEYS:
        return None
    match = _WRITTEN.fullmatch("\n".join(values.values()))
    if match is None:
        return None
    owner, atime, a_ns, mtime, m_ns, ctime, c_ns, btime, b_ns, ino = match.groups()
    second = _written_second
    try:
        return _COMPACT.pack(
            *_owner(owner),
            second(atime) + int(a_ns),
            second(mtime) + int(m_ns),
            second(ctime) + int(c_ns),
            second(btime) + int(b_ns),
            int(ino),
        )
    except (ValueError, struct.error):
        return None


def expand(packed: bytes) -> dict[str, str]:
    mode, uid, gid, *times, ino = _COMPACT.unpack(packed)
    texts = (f"{mode:o}", str(uid), str(gid), *map(format_time, times), str(ino))
    return dict(zip(_COMPACT_KEYS, texts, strict=True))


@functools.lru_cache(1024)
def _owner(text: str) -> tuple[int, ...]:
    """Mode, uid and gid. Raises ValueError where another text stands for the same numbers."""
    mode, uid, gid = text.split("\n")
    numbers = int(mode, 8), int(uid), int(gid)
    if (mode, uid, gid) != (f"{numbers[0]:o}", str(numbers[1]), str(numbers[2])):
        raise ValueError("not as natsfs writes it")
    return numbers


@functools.lru_cache(8192)
def _written_second(text: str) -> int:
    """In nanoseconds. Raises ValueError where another text stands for the same second."""
    whole_ns = _parse(text + "Z")
    if whole_ns is None or format_time(whole_ns)[:19] != text:
        raise ValueError("not as natsfs writes it")
    return whole_ns


def _number(values: Mapping[str, str], key: str, base: int, bits: int = 32) -> int | None:
    try:
        number = int(values[key], base)
    except (KeyError, ValueError):
        return None
    return number if 0 <= number < 1 << bits else None


@dataclass(frozen=True, slots=True)
class Defaults:
    """What objects get that carry no attributes of their own. Modes are permission bits."""

    uid: int
    gid: int
    file_mode: int
    dir_mode: int


@dataclass(slots=True)
class Attributes:
    """What stat(2) tells of an inode beside its size. Times are in nanoseconds since the epoch.

    `ino` is the number that the object keeps through renames, new content and remounts, 0 if none is stored.
    `named_ns` is the time of its last rename, 0 if there was none: with the birth it says when its directory changed.
    """

    mode: int
    uid: int
    gid: int
    rdev: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int
    ino: int = 0
    named_ns: int = 0

    @classmethod
    def decode(
        cls, values: Mapping[str, str] | None, file_type: int, time_ns: int, defaults: Defaults
    ) -> Attributes:
        """Read the map of an object whose message has the time `time_ns`.

        `file_type` (an S_IF* constant) holds where the map says nothing, and always for directories: what a name is
        follows from the names, not from what somebody wrote into a map.
        """
        permissions = defaults.dir_mode if file_type == stat.S_IFDIR else defaults.file_mode
        if not values:
            return cls(
                file_type | permissions, defaults.uid, defaults.gid, 0, time_ns, time_ns, time_ns, time_ns
            )
        mode = _number(values, "mode", 8)
        if mode is not None:
            permissions = stat.S_IMODE(mode)
            if file_type == stat.S_IFREG and stat.S_IFMT(mode) in _FILE_TYPES:
                file_type = stat.S_IFMT(mode)
        uid = _number(values, "uid", 10)
        gid = _number(values, "gid", 10)
        times = {key: parse_time(values.get(key, "")) for key in ("atime", "mtime", "ctime", "btime")}
        mtime = times["mtime"] if times["mtime"] is not None else time_ns
        return cls(
            file_type | permissions,
            defaults.uid if uid is None else uid,
            defaults.gid if gid is None else gid,
            _number(values, "rdev", 16) or 0,
            mtime if times["atime"] is None else times["atime"],
            mtime,
            time_ns if times["ctime"] is None else times["ctime"],
            time_ns if times["btime"] is None else times["btime"],
            _number(values, "ino", 10, 63) or 0,
            parse_time(values.get("named", "")) or 0,
        )

    @classmethod
    def of(cls, values: Mapping[str, str] | bytes | None, time_ns: int, defaults: Defaults) -> Attributes:
        """As `decode` of a file, also from what `compact` made of the map."""
        if not isinstance(values, bytes):
            return cls.decode(values, stat.S_IFREG, time_ns, defaults)
        mode, uid, gid, atime_ns, mtime_ns, ctime_ns, btime_ns, ino = _COMPACT.unpack(values)
        file_type = stat.S_IFMT(mode)
        mode = stat.S_IMODE(mode) | (file_type if file_type in _FILE_TYPES else stat.S_IFREG)
        return cls(mode, uid, gid, 0, atime_ns, mtime_ns, ctime_ns, btime_ns, ino)

    def drop_privileges(self) -> None:
        """What chown(2) takes from a regular file: set-user-ID, and set-group-ID if the group may execute."""
        if not stat.S_ISREG(self.mode):
            return
        self.mode &= ~stat.S_ISUID
        if self.mode & stat.S_IXGRP:
            self.mode &= ~stat.S_ISGID

    def encode(self, values: Mapping[str, str] | None) -> dict[str, str]:
        """The map to store: `values` (what is stored already, other clients' keys included) brought up to date."""
        encoded = {key: value for key, value in (values or {}).items() if key not in OWN_KEYS}
        encoded["mode"] = f"{self.mode:o}"
        encoded["uid"] = str(self.uid)
        encoded["gid"] = str(self.gid)
        if self.rdev:
            encoded["rdev"] = f"{self.rdev:x}"
        encoded["atime"] = format_time(self.atime_ns)
        encoded["mtime"] = format_time(self.mtime_ns)
        encoded["ctime"] = format_time(self.ctime_ns)
        encoded["btime"] = format_time(self.btime_ns)
        if self.named_ns:
            encoded["named"] = format_time(self.named_ns)
        if self.ino:
            encoded["ino"] = str(self.ino)
        return encoded


def with_append(values: Mapping[str, str], mount: str, nuid: str) -> dict[str, str]:
    """The map of a version that `mount` has made by appending."""
    others = [entry for entry in values.get(APPENDS_KEY, "").split() if not entry.startswith(f"{mount}:")]
    return {**values, APPENDS_KEY: " ".join([f"{mount}:{nuid}", *others[: APPENDERS - 1]])}


def has_append(values: Mapping[str, str] | None, mount: str, nuid: str) -> bool:
    """Whether the version `nuid`, which `mount` made by appending, was certainly stored."""
    return f"{mount}:{nuid}" in (values or {}).get(APPENDS_KEY, "").split()


def named_ns(values: Mapping[str, str] | bytes | None) -> int | None:
    """When an object came under its name, by its map, or `compact` of it: its last rename, else its birth."""
    if not values:
        return None
    if isinstance(values, bytes):
        btime_ns: int = _COMPACT.unpack(values)[6]
        return btime_ns
    named = parse_time(values.get("named", ""))
    return parse_time(values.get("btime", "")) if named is None else named


def renamed_at(values: Mapping[str, str] | None) -> str | None:
    """The text of the time of an object's last rename."""
    return (values or {}).get("named")


def same_inode(one: Mapping[str, str] | None, other: Mapping[str, str] | None) -> bool:
    """Whether two maps tell of one file that was written to, or renamed, in between."""
    ino = (one or {}).get("ino")
    return ino is not None and ino == (other or {}).get("ino")


def removed_ns(values: Mapping[str, str] | None) -> int | None:
    """When the name of a tombstone was removed, by what its map says."""
    return parse_time((values or {}).get("ctime", ""))
