"""A TCP proxy whose connections a test can cut or make wait, and one that keeps single messages from arriving."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator

_PAYLOAD = re.compile(rb"(H?PUB|H?MSG) (\S+) (.*?)(\d+)\Z")


class Hold:
    """The first connection that sends `text`, or is sent it if `answers`, gets no further until `release`."""

    def __init__(self, text: bytes, *, answers: bool = False) -> None:
        self.text = text
        self.answers = answers
        self.holds = threading.Event()
        self._released = threading.Event()

    def pass_on(self, data: bytes) -> None:
        if self.text in data and not self.holds.is_set():
            self.holds.set()
            self._released.wait()

    def release(self) -> None:
        self._released.set()


class Proxy:
    """Forwards each connection to `target` (a port of 127.0.0.1); `cut` breaks all of them, `port` stays open."""

    def __init__(self, target: int) -> None:
        self.cuts = 0
        self.away = False  # whether new connections are refused
        self.trickles = (
            False  # whether what is passed on arrives in pieces of some bytes, with pauses between them
        )
        self._target = target
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._hold: Hold | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.away:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            pair = (near, far)
            for one in pair:  # before a cut can close them
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs.add(pair)
            for source, sink, sift in ((near, far, self._sent()), (far, near, self._answered())):
                threading.Thread(target=self._forward, args=(source, sink, pair, sift), daemon=True).start()

    def _forward(
        self,
        source: socket.socket,
        sink: socket.socket,
        pair: tuple[socket.socket, socket.socket],
        sift: Callable[[bytes], bytes],
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(256 if self.trickles else 1 << 18):
                hold = self._hold
                if hold is not None and source is pair[hold.answers]:
                    hold.pass_on(data)
                sink.sendall(sift(data))
                if self.trickles:
                    time.sleep(0.02)
        self._end(pair)

    def _sent(self) -> Callable[[bytes], bytes]:
        """Of one connection: what goes on to the server of what the mount sends."""
        return bytes

    def _answered(self) -> Callable[[bytes], bytes]:
        """Of one connection: what goes on to the mount of what the server sends."""
        return bytes

    def _end(self, pair: tuple[socket.socket, socket.socket]) -> None:
        for one in pair:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        with self._lock:
            if pair in self._pairs:
                self._pairs.discard(pair)
                for one in pair:
                    one.close()

    @contextlib.contextmanager
    def holding(self, text: bytes, *, answers: bool = False) -> Iterator[Hold]:
        """The next connection that sends `text`, or is sent it, waits, until the end of the block at most."""
        self._hold = hold = Hold(text, answers=answers)
        try:
            yield hold
        finally:
            self._hold = None
            hold.release()

    def cut(self) -> None:
        """Both ends of every connection see it closed; what was on its way is lost or not, as it happens."""
        self.cuts += 1
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            self._end(pair)

    def close(self) -> None:
        self._listener.close()
        self.cut()


class _Frames:
    """Cuts a stream of NATS' protocol: (whole frame, subject, what stands between it and the sizes)."""

    def __init__(self) -> None:
        self._rest = b""

    def of(self, data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
        rest = self._rest + data
        while b"\r\n" in rest:
            line, _, _ = rest.partition(b"\r\n")
            found = _PAYLOAD.match(line)
            size = len(line) + 2 + (int(found[4]) + 2 if found else 0)
            if len(rest) < size:
                break
            frame, rest = rest[:size], rest[size:]
            yield (frame, found[2], found[3]) if found else (frame, b"", b"")
        self._rest = rest


class Lagging(Proxy):
    """While it `lags` a watch begins as at a replica that has nothing of the stream yet."""

    lags = False

    def _sent(self) -> Callable[[bytes], bytes]:
        frames = _Frames()
        listing = b'"last_per_subject"'

        def sift(data: bytes) -> bytes:
            passed = b"".join(frame for frame, _, _ in frames.of(data))
            return passed.replace(listing, b'"new"'.ljust(len(listing))) if self.lags else passed

        return sift


class Endless(Proxy):
    """A bucket as large as one likes: of its listing nothing but the heartbeats arrive."""

    def _answered(self) -> Callable[[bytes], bytes]:
        frames = _Frames()
        metadata = re.compile(rb"\$O\.[^.]+\.M\.")
        return lambda data: b"".join(
            frame for frame, subject, _ in frames.of(data) if not metadata.match(subject)
        )


class Gate(Proxy):
    """Keeps one metadata message of each bucket that it was told of, or the server's answer to it.

    `dark`: everything that follows in that bucket is kept as well.
    """

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self.kept: dict[str, list[bytes]] = {}  # by bucket: the messages that have not gone on
        self.answered: set[str] = set()  # buckets whose message is stored, and the answer to it is kept
        self._rules: dict[str, tuple[int, bool, bool]] = {}
        self._seen: dict[str, int] = {}
        self._awaited: dict[bytes, str] = {}

    def keep(self, bucket: str, number: int, *, stored: bool, dark: bool = False) -> None:
        """Of metadata message `number` (from 1 on) of the bucket the answer if it is to be `stored`, else all of it."""
        self._rules[bucket] = number, stored, dark
        self._seen[bucket] = 0

    def has_kept(self, bucket: str) -> bool:
        return bucket in self.answered or bucket in self.kept

    def release(self, buckets: Iterable[str]) -> None:
        """From now on everything goes on; what was kept stays away."""
        for bucket in buckets:
            del self._rules[bucket]

    def _sent(self) -> Callable[[bytes], bytes]:
        frames = _Frames()

        def sift(data: bytes) -> bytes:
            return b"".join(
                frame for frame, subject, reply in frames.of(data) if self._passes(frame, subject, reply)
            )

        return sift

    def _passes(self, frame: bytes, subject: bytes, rest: bytes) -> bool:
        tokens = subject.decode().split(".")
        if tokens[0] != "$O" or tokens[2] != "M" or tokens[1] not in self._rules:
            return True
        bucket = tokens[1]
        number, stored, dark = self._rules[bucket]
        self._seen[bucket] += 1
        if self._seen[bucket] < number or (self._seen[bucket] > number and not dark):
            return True
        if self._seen[bucket] == number and stored:
            self._awaited[rest.split()[0]] = bucket
            return True
        self.kept.setdefault(bucket, []).append(frame)
        return False

    def _answered(self) -> Callable[[bytes], bytes]:
        frames = _Frames()

        def sift(data: bytes) -> bytes:
            passed = []
            for frame, subject, _ in frames.of(data):
                bucket = self._awaited.pop(subject, None)
                if bucket is None:
                    passed.append(frame)
                else:
                    self.answered.add(bucket)
            return b"".join(passed)

        return sift


class Behind(Proxy):
    """Reads of chunks, and the first scan of an object's, are answered as by a replica that has still to get them.

    `has` is of how many chunks of each object it knows, 0 or 1; None: of all.
    """

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self.has: int | None = None
        self.reads = 0  # that were answered so
        self.scans: set[bytes] = set()  # of what

    def _sent(self) -> Callable[[bytes], bytes]:
        frames = _Frames()

        def sift(data: bytes) -> bytes:
            return b"".join(self._asked(frame, subject) for frame, subject, _ in frames.of(data))

        return sift

    def _asked(self, frame: bytes, subject: bytes) -> bytes:
        changed = frame
        if self.has is not None and b".DIRECT.GET." in subject and b".C." in frame:
            if self.has:
                changed = re.sub(rb'(?<="batch": )\d+', lambda number: b"1".rjust(len(number[0])), frame)
            else:
                changed = frame.replace(b'"$O.', b'"$X.')
            self.reads += changed != frame
        elif self.has is not None and b".CONSUMER.CREATE." in subject and b".C." in subject:
            filtered = subject.partition(b".$O.")[2]
            if filtered not in self.scans:
                self.scans.add(filtered)
                changed = frame.replace(b'"deliver_policy": "all"', b'"deliver_policy": "new"')
        return changed


class Short(Proxy):
    """Direct gets are answered as by a replica that `lacks` so many chunks at the end of each object.

    `last`: by subject the sequence of the chunk that it takes for the last one.
    """

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self.lacks = 0
        self.counted = 0  # chunks of which it has told that fewer follow
        self.last: dict[str, int] = {}

    def _sent(self) -> Callable[[bytes], bytes]:
        frames = _Frames()

        def asked(frame: bytes, subject: bytes) -> bytes:
            line, _, content = frame.partition(b"\r\n")
            body = content.removesuffix(b"\r\n")
            if b".DIRECT.GET." not in subject or b"last_by_subj" not in body:
                return frame
            last = self.last.get(json.loads(body)["last_by_subj"])
            if last is None:
                return frame
            self.counted += 1
            body = json.dumps({"seq": last}).encode()
            return line.rpartition(b" ")[0] + b" %d\r\n" % len(body) + body + b"\r\n"

        return lambda data: b"".join(asked(frame, subject) for frame, subject, _ in frames.of(data))

    def _answered(self) -> Callable[[bytes], bytes]:
        frames = _Frames()
        pending = re.compile(rb"(?<=Nats-Num-Pending: )\d+")

        def told(frame: bytes) -> bytes:
            headers, _, content = frame.partition(b"\r\n\r\n")
            found = pending.search(headers)
            if not self.lacks or not found or not re.search(rb"Nats-Subject: \$O\.[^.]+\.C\.", headers):
                return frame
            fewer = int(found[0]) - self.lacks
            if fewer < 0:
                return b""
            self.counted += 1
            number = b"%0*d" % (len(found[0]), fewer)
            return headers[: found.start()] + number + headers[found.end() :] + b"\r\n\r\n" + content

        return lambda data: b"".join(told(frame) for frame, _, _ in frames.of(data))


class Older(Proxy):
    """While it `lags` a watch lists the metadata that was the first to pass under each subject, with its sequence."""

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self.lags = False
        self.listed: set[bytes] = set()  # the subjects of which something old was told
        self._first: dict[bytes, tuple[bytes, bytes, bytes]] = {}

    def _answered(self) -> Callable[[bytes], bytes]:
        frames = _Frames()
        return lambda data: b"".join(
            self._told(frame, subject) if re.match(rb"\$O\.[^.]+\.M\.", subject) else frame
            for frame, subject, _ in frames.of(data)
        )

    def _told(self, frame: bytes, subject: bytes) -> bytes:
        line, _, content = frame.partition(b"\r\n")
        verb, _, sid, reply, *lengths = line.split(b" ")
        tokens = reply.split(b".")  # $JS ACK stream consumer delivered sequence ...
        first = self._first.setdefault(subject, (b" ".join([verb, *lengths]), tokens[5], content))
        if not self.lags or first[1] == tokens[5]:
            return frame
        self.listed.add(subject)
        tokens[5] = first[1]
        verb, *lengths = first[0].split(b" ")
        return b" ".join([verb, subject, sid, b".".join(tokens), *lengths]) + b"\r\n" + first[2]
