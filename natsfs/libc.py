"""mount(2), umount2(2) and sched_setattr(2), which Python does not have."""

from __future__ import annotations

import ctypes
import os
import platform
import struct

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_DIRSYNC = 128
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_RELATIME = 1 << 21

MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274}  # by machine; glibc has it since 2.41 only

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


def remount(mountpoint: str, flags: int) -> None:
    _check(_libc.mount(None, os.fsencode(mountpoint), None, MS_REMOUNT | flags, None), mountpoint)


def umount(mountpoint: str, flags: int = 0) -> None:
    _check(_libc.umount2(os.fsencode(mountpoint), UMOUNT_NOFOLLOW | flags), mountpoint)


def set_time_slice(seconds: float) -> None:
    """Ask for time slices of this length for the calling thread, and those that it starts.

    Such a thread runs sooner when it is woken, and others of its priority sooner when they are; its share stays the
    same. Linux 6.12 and later; before, and on other machines, nothing changes. Raises OSError.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None:
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    # struct sched_attr (uapi/linux/sched/types.h): size, policy, flags, nice, priority, runtime, deadline, period
    attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, round(seconds * 1e9), 0, 0)
    if _libc.syscall(ctypes.c_long(number), ctypes.c_int(0), attributes, ctypes.c_uint(0)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _check(result: int, path: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
