"""The NATS client protocol as the server speaks it, cut into frames. Pure: bytes go in, frames come out.

https://docs.nats.io/reference/reference-protocols/nats-protocol: a control line, and behind MSG and HMSG a payload of
the length that the line tells. Headers stay as they came: most replies are looked at for one or two of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

ROOM: Final = 1024 * 1024  # bytes of the buffer to begin with
SMALL_ROOM: Final = 192 * 1024  # of one whose messages are many and small: as much is worked on in one go
_MOST_CONTROL: Final = 64 * 1024  # bytes of a control line; INFO of a large cluster is the longest
_CRLF: Final = b"\r\n"


class ProtocolError(Exception):
    """What came is no frame of the protocol: the connection is of no use any more."""


@dataclass(slots=True)
class Message:
    """`headers` is the whole block from its version line on, empty if there is none.

    `sid` is the subscription's id, `reply` the subject for an answer, empty if none is wanted. `seq` and `time_ns` say
    where in its stream a message that a consumer delivers is stored, and since when.
    """

    subject: bytes
    headers: bytes
    data: bytes
    sid: bytes = b""
    reply: bytes = b""
    seq: int = 0
    time_ns: int = 0

    @property
    def status(self) -> int | None:
        """Of a message that the server sends in place of one: 404, 408, 503 ..."""
        if self.headers[8:9] != b" ":
            return None
        code = self.headers[9:12]
        return int(code) if code.isdigit() else None

    @property
    def description(self) -> str:
        return self.headers[12 : self.headers.find(_CRLF)].strip().decode("utf-8", "replace")

    def header(self, name: bytes) -> bytes | None:
        at = self.headers.find(_CRLF + name + b":")
        if at < 0:
            return None
        start = at + len(name) + 3
        return self.headers[start : self.headers.find(_CRLF, start)].strip()


@dataclass(frozen=True, slots=True)
class Control:
    """PING, PONG, +OK, INFO with its JSON, or -ERR with its text."""

    verb: bytes
    text: bytes


_CONTROL: Final = re.compile(rb"(?i)(PING|PONG|\+OK|INFO|-ERR)(?:[ \t]+(.*))?$", re.DOTALL)
# ``MSG subject sid [reply] length`` and ``HMSG subject sid [reply] header-length length``.
_MSG: Final = re.compile(rb"MSG +(\S+) +(\S+) +(?:(\S+) +)?()(\d{1,18})\r\n")
_HMSG: Final = re.compile(rb"HMSG +(\S+) +(\S+) +(?:(\S+) +)?(\d{1,18}) +(\d{1,18})\r\n")
_H: Final = ord("H")


class Frames:
    """The buffer that a socket is read into, and what of it is complete."""

    def __init__(self, room: int = ROOM) -> None:
        self._room = room
        self._buffer = bytearray(room)
        self._start = 0
        self._end = 0
        self._length = 0  # of the frame that is awaited, as far as that is known

    def space(self) -> memoryview:
        """Where the next bytes are to be put; tell `received` how many came."""
        if self._start == self._end:
            self._start = self._end = 0
        need = max(self._length, 65536)
        if len(self._buffer) - self._start < need:
            # The tail goes to the front: less than a frame, once in a buffer's length.
            rest = self._buffer[self._start : self._end]
            if need > len(self._buffer):
                self._buffer = bytearray(need + self._room)
            self._buffer[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        return memoryview(self._buffer)[self._end :]

    def received(self, count: int) -> None:
        self._end += count

    def __iter__(self) -> Iterator[Message | Control]:
        """The frames that are complete; what is left waits for more bytes. Raises `ProtocolError`."""
        buffer, end = self._buffer, self._end
        view = memoryview(buffer)
        while (start := self._start) < end:
            self._length = 0
            head = (_HMSG if buffer[start] == _H else _MSG).match(buffer, start, end)
            if head is None:
                control = self._control()
                if control is None:
                    return
                yield control
                continue
            subject, sid, reply, header_length, length = head.groups(b"")
            body = head.end()
            split, stop = body + int(header_length or 0), body + int(length)
            if split > stop:
                raise ProtocolError(f"not understood: {head[0][:80]!r}")
            if end < stop + 2:
                self._length = stop + 2 - start
                return
            self._start = stop + 2
            headers = bytes(view[body:split]) if split > body else b""
            yield Message(subject, headers, bytes(view[split:stop]), sid, reply)

    def _control(self) -> Control | None:
        """The control line that comes next, None if its end has not come."""
        at = self._buffer.find(_CRLF, self._start, self._end)
        if at < 0:
            if self._end - self._start > _MOST_CONTROL:
                raise ProtocolError("a control line without an end")
            return None
        line = bytes(memoryview(self._buffer)[self._start : at])
        self._start = at + 2
        control = _CONTROL.match(line)
        if control is None:
            raise ProtocolError(f"not understood: {line[:80]!r}")
        return Control(control[1].upper(), control[2] or b"")
