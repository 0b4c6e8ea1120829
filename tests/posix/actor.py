"""Another process that makes system calls when it is told to.

The process is a plain Python without this repository, so that any user can run it; it starts in a directory of its own
and gets paths relative to it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROGRAM = r"""
import base64, errno, fcntl, json, mmap, os, signal, stat, struct, sys

def flock(fd, kind, wait=False):
    fcntl.flock(fd, getattr(fcntl, kind) | (0 if wait else fcntl.LOCK_NB))

def record(command, kind, start, length):
    return struct.pack("hhqqi4x", getattr(fcntl, kind), 0, start, length, 0)

def lock(fd, kind, start=0, length=0, command="F_SETLK"):
    number = {"F_OFD_GETLK": 36, "F_OFD_SETLK": 37, "F_OFD_SETLKW": 38}.get(command) or getattr(fcntl, command)
    answer = fcntl.fcntl(fd, number, record(command, kind, start, length))
    if "GETLK" in command:
        kind, _, start, length, pid = struct.unpack("hhqqi4x", answer)
        return [{v: k for k, v in vars(fcntl).items() if k in ("F_RDLCK", "F_WRLCK", "F_UNLCK")}[kind],
                *([] if kind == fcntl.F_UNLCK else [start, length, pid])]

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

def attributes(path):
    s = os.lstat(path)
    return [oct(s.st_mode), s.st_uid, s.st_gid, s.st_size]

def execute(path, *arguments):
    import subprocess
    return subprocess.run([path, *arguments], capture_output=True, text=True).stdout.strip()

OWN = {call.__name__: call for call in (flock, lock, content, create, append, attributes, execute)}

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
        user: int | None = None,
        group: int | None = None,
        groups: Sequence[int] | None = None,
        umask: int = -1,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self._process = subprocess.Popen(
            [sys._base_executable, "-I", "-c", PROGRAM],  # type: ignore[attr-defined]
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=directory,
            user=user,
            group=group,
            extra_groups=groups,
            umask=umask,
            pass_fds=pass_fds,
        )
        self.pid: int = self._answer()

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
        self.close()

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait(20)

    def __enter__(self) -> Actor:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
