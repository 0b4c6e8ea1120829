"""The first request of a mount, FUSE_INIT, in whose answer two flags are changed: libfuse 3.14 gives no way to.

With FUSE_HANDLE_KILLPRIV_V2 (include/uapi/linux/fuse.h, Linux 5.11) the file system takes set-user-ID and set-group-ID
away itself at a chown, a write or a truncation. A kernel that does not have the promise asks for the attribute
``security.capability`` before every single write: half of all requests of a program that writes in small pieces.

FUSE_AUTO_INVAL_DATA, which libfuse asks for, makes the kernel drop the pages of a file whose time of change is another
one: after each write by a program of this machine, too, at the next stat(2). It is taken away, since the notifier tells
of all content that has changed.

libfuse answers the request on the descriptor that it read it from. So for this one exchange that number stands for a
socket, and the answer is brought up to date on its way to the kernel.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct

log = logging.getLogger(__name__)

AUTO_INVAL_DATA = 1 << 12
HANDLE_KILLPRIV_V2 = 1 << 28

_INIT = 26  # the opcode
_MOST = 1 << 20  # bytes; the kernel refuses to fill a buffer that is too small for any request
_OPCODE = 4  # in struct fuse_in_header, of 40 bytes
_OFFERED = 40 + 12  # `flags` of struct fuse_init_in, behind it
_ERROR = 4  # in struct fuse_out_header, of 16 bytes
_WANTED = 16 + 12  # `flags` of struct fuse_init_out, behind it


class Handshake:
    """Begins with FUSE_INIT waiting on `fd`; `finish` comes after the session has read and answered it.

    Raises OSError, as read(2) does, if there is nothing to read; then nothing has been changed.
    """

    def __init__(self, fd: int) -> None:
        request = os.read(fd, _MOST)
        self._fd = fd
        self._promises = promises(request)
        self._kernel = os.dup(fd)
        self._session, session = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with session:
            os.dup2(session.fileno(), fd, inheritable=False)
        self._session.setblocking(False)
        self._session.send(request)

    def finish(self) -> None:
        """Pass the answer on; from now on `fd` leads to the kernel again.

        It is nobody's any more where the mount was taken down meanwhile: the session learns that from its next read.
        """
        try:
            os.write(self._kernel, with_promises(self._session.recv(_MOST), self._promises))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            log.info("the mount went before it was answered: %s", error.strerror)
        finally:
            os.dup2(self._kernel, self._fd, inheritable=False)
            os.close(self._kernel)
            self._session.close()


def promises(request: bytes) -> int:
    """The flags that can be promised to the kernel that sent this; none where it asks for something else."""
    if len(request) < _OFFERED + 4 or struct.unpack_from("=I", request, _OPCODE)[0] != _INIT:
        return 0
    offered: int = struct.unpack_from("=I", request, _OFFERED)[0]
    return offered & HANDLE_KILLPRIV_V2


def with_promises(answer: bytes, flags: int) -> bytes:
    """An answer to FUSE_INIT with `flags` and without AUTO_INVAL_DATA; a refusal, and one too short, stays as it is."""
    if len(answer) < _WANTED + 4 or struct.unpack_from("=i", answer, _ERROR)[0]:
        return answer
    wanted: int = struct.unpack_from("=I", answer, _WANTED)[0]
    return answer[:_WANTED] + struct.pack("=I", (wanted | flags) & ~AUTO_INVAL_DATA) + answer[_WANTED + 4 :]
