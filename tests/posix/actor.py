"""Another process that makes system calls when it is told to.

It starts in a directory that is given to it and gets paths relative to it, so that it reaches that directory as any
user, wherever it lies; Python and its modules may lie where only root can read.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROGRAM = r"""
import errno, fcntl, json, os, stat, struct, subprocess, sys

def flock(fd, kind, wait=False):
    fcntl.flock(fd, getattr(fcntl, kind) | (0 if wait else fcntl.LOCK_NB))

def record(kind, start, length):
    return struct.pack("hhqqi4x", getattr(fcntl, kind), 0, start, length, 0)

def lock(fd, kind, start=0, length=0, command="F_SETLK"):
    number = {"F_OFD_GETLK": 36, "F_OFD_SETLK": 37, "F_OFD_SETLKW": 38}.get(command) or getattr(fcntl, command)
    answer = fcntl.fcntl(fd, number, record(kind, start, length))
    if "GETLK" in command:
        kind, _, start, length, pid = struct.unpack("hhqqi4x", answer)
        return [{v: k for k, v in vars(fcntl).items() if k in ("F_RDLCK", "F_WRLCK", "F_UNLCK")}[kind],
                *([] if kind == fcntl.F_UNLCK else [start, length, pid])]
    return None

def content(path):
    with open(path, "rb") as file:
        return file.read().decode()

def create(path, text="", mode=0o644):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, mode)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)

def append(path, text="more"):
    with open(path, "ab", buffering=0) as file:
        file.write(text.encode())

def overwrite(path):
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))

def create_anew(path, mode):
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode))

def attributes(path):
    s = os.lstat(path)
    return [oct(s.st_mode), s.st_uid, s.st_gid, None if stat.S_ISDIR(s.st_mode) else s.st_size]

def execute(path, *arguments):
    return subprocess.run([path, *arguments], capture_output=True, text=True).stdout.strip()

def count(path, times):
    for _ in range(times):
        fd = os.open(path, os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        number = int(os.pread(fd, 100, 0))
        os.pwrite(fd, str(number + 1).encode(), 0)
        os.close(fd)

def set_times(path, atime, mtime):
    os.utime(path, (atime, mtime))

def become(user, group, groups):
    os.setgroups(groups)
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)

OWN = (flock, lock, content, create, append, overwrite, create_anew, attributes, execute, count, set_times, become)
OWN = {call.__name__: call for call in OWN}

print(json.dumps(os.getpid()), flush=True)
for line in sys.stdin:
    call, arguments, named = json.loads(line)
    try:
        result = (OWN.get(call) or getattr(os, call))(*arguments, **named)
        answer = result.decode() if isinstance(result, bytes) else result
    except OSError as error:
        answer = errno.errorcode[error.errno]
    print(json.dumps(answer), flush=True)
"""


class Actor:
    """actor("name", arguments...) is what the function of `os`, or of the program, returned, or its errno's name."""

    def __init__(
        self,
        directory: Path,
        *,
        user: tuple[int, int, Sequence[int]] | None = None,
        umask: int = -1,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=directory,
            umask=umask,
            pass_fds=pass_fds,
        )
        self.pid: int = self._answer()
        if user is not None:
            assert self("become", *user) is None

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process has ended"
        return json.loads(line)

    def send(self, call: str, *arguments: Any, **named: Any) -> None:
        """Without waiting for the answer, for a call that waits."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([call, arguments, named]) + "\n")
        self._process.stdin.flush()

    def __call__(self, call: str, *arguments: Any, **named: Any) -> Any:
        self.send(call, *arguments, **named)
        return self._answer()

    def answer(self) -> Any:
        """The answer to `send`."""
        return self._answer()

    def kill(self) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait(20)

    def __enter__(self) -> Actor:
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()
