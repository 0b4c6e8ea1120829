"""The programs that mount(8) and umount(8) call for the types natsfs and fuse.natsfs."""

from __future__ import annotations

import contextlib
import os
import shlex
import site
import sys
from collections.abc import Iterable

from natsfs.errors import MountError

DEFAULT_DIRECTORY = "/sbin"

# Type in fstab -> mount.natsfs. The mount table says fuse.natsfs, which is what remount and umount go by.
NAMES = {
    "mount.natsfs": "mount-helper",
    "mount.fuse.natsfs": "mount-helper",
    "umount.fuse.natsfs": "umount-helper",
}

_MARK = "# Written by natsfs install-helper; natsfs install-helper --remove takes it away.\n"


def script(command: str) -> str:
    """A wrapper that runs this installation, whatever the PATH of the caller is."""
    package_parent = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    installed = package_parent in (*site.getsitepackages(), site.getusersitepackages())
    path = "" if installed else f"PYTHONPATH={shlex.quote(package_parent)} "
    return f'#!/bin/sh\n{_MARK}{path}exec {shlex.quote(sys.executable)} -P -m natsfs {command} "$@"\n'


def install(directory: str) -> list[str]:
    """Write all helpers, or none if one cannot be; returns what was done, in lines."""
    _check(directory, "install-helper")
    for name in NAMES:
        path = os.path.join(directory, name)
        if os.path.lexists(path) and not _is_ours(path):
            raise MountError(f"{path} exists and is not from natsfs; move it away first")
    lines = []
    for name, command in NAMES.items():
        path = os.path.join(directory, name)
        temporary = f"{path}.new"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(script(command))
            os.chmod(temporary, 0o755)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise MountError(f"{path} cannot be written: {error.strerror}") from None
        lines.append(f"installed {path}")
    return lines


def remove(directory: str) -> list[str]:
    _check(directory, "install-helper --remove")
    return list(_remove(directory))


def _remove(directory: str) -> Iterable[str]:
    for name in NAMES:
        path = os.path.join(directory, name)
        if not os.path.lexists(path):
            yield f"{path} is not there"
        elif not _is_ours(path):
            yield f"{path} is not from natsfs and stays"
        else:
            try:
                os.unlink(path)
            except OSError as error:
                raise MountError(f"{path} cannot be removed: {error.strerror}") from None
            yield f"removed {path}"


def _check(directory: str, command: str) -> None:
    if not os.path.isdir(directory):
        raise MountError(f"{directory} is not a directory; give one where mount(8) looks, such as /sbin")
    if not os.access(directory, os.W_OK):
        where = "" if directory == DEFAULT_DIRECTORY else f" --dir {shlex.quote(directory)}"
        raise MountError(f"{directory} is not writable for you; try: sudo {_this_program()} {command}{where}")


def _this_program() -> str:
    program = os.path.abspath(sys.argv[0])
    if os.path.basename(program) == "natsfs" and os.access(program, os.X_OK):
        return shlex.quote(program)
    return f"{shlex.quote(sys.executable)} -m natsfs"


def _is_ours(path: str) -> bool:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return _MARK in file.read(4096)
    except OSError:
        return False
