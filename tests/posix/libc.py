"""System calls that the module `os` has not, or does too much around."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2
AT_SYMLINK_NOFOLLOW = 0x100


class Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Dirent(ctypes.Structure):
    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    )


for _name in ("opendir", "fdopendir"):
    getattr(_libc, _name).restype = ctypes.c_void_p
_libc.readdir.restype = ctypes.POINTER(Dirent)
_libc.readdir.argtypes = _libc.closedir.argtypes = _libc.telldir.argtypes = (ctypes.c_void_p,)
_libc.rewinddir.argtypes = (ctypes.c_void_p,)
_libc.telldir.restype = ctypes.c_long
_libc.seekdir.argtypes = (ctypes.c_void_p, ctypes.c_long)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.msync.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MS_SYNC = 4


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def renameat2(old: Path | str, new: Path | str, flags: int) -> int:
    return _checked(_libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags))


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    return _checked(_libc.fallocate(fd, mode, offset, length))


def utimensat(path: Path, times: tuple[tuple[int, int], tuple[int, int]] | None, flags: int = 0) -> int:
    """utimensat(2) with (seconds, nanoseconds) for atime and mtime."""
    given = None if times is None else (Timespec * 2)(*(Timespec(*time) for time in times))
    return _checked(_libc.utimensat(AT_FDCWD, os.fsencode(path), given, flags))


class Directory:
    """opendir(3) and what follows it."""

    def __init__(self, path: Path) -> None:
        self._stream = _libc.opendir(os.fsencode(path))
        if not self._stream:
            _checked(-1)

    def read(self) -> tuple[bytes, int, int] | None:
        """The next entry's name, inode number and type; None at the end."""
        entry = _libc.readdir(self._stream)
        return (entry[0].d_name, entry[0].d_ino, entry[0].d_type) if entry else None

    def rest(self) -> list[bytes]:
        """The names that are still to come, without the two dots."""
        found = []
        while (entry := self.read()) is not None:
            if entry[0] not in (b".", b".."):
                found.append(entry[0])
        return found

    def tell(self) -> int:
        return int(_libc.telldir(self._stream))

    def seek(self, position: int) -> None:
        _libc.seekdir(self._stream, position)

    def rewind(self) -> None:
        _libc.rewinddir(self._stream)

    def close(self) -> None:
        _libc.closedir(self._stream)

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Mapping:
    """mmap(2) alone: the module `mmap` keeps a duplicate of the descriptor, whose close(2) commits."""

    def __init__(self, fd: int, length: int, offset: int = 0, *, writable: bool = False) -> None:
        self._length = length
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        address = _libc.mmap(None, length, protection, mmap.MAP_SHARED, fd, offset)
        _checked(-1 if address == ctypes.c_void_p(-1).value else 0)
        self._address: int = address

    def load(self, start: int, size: int) -> bytes:
        assert 0 <= start <= start + size <= self._length
        return ctypes.string_at(self._address + start, size)

    def store(self, start: int, data: bytes) -> None:
        assert 0 <= start <= start + len(data) <= self._length
        ctypes.memmove(self._address + start, data, len(data))

    def sync(self) -> None:
        _checked(_libc.msync(self._address, self._length, _MS_SYNC))

    def close(self) -> None:
        _checked(_libc.munmap(self._address, self._length))

    def __enter__(self) -> Mapping:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
