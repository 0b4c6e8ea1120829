"""A TCP proxy whose connections a test can cut, and make wait."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class Hold:
    """The first connection that sends `text` gets no further until `release`."""

    def __init__(self, text: bytes) -> None:
        self.text = text
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
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            pair = (near, far)
            with self._lock:
                self._pairs.add(pair)
            for source, sink in (pair, pair[::-1]):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._forward, args=(source, sink, pair), daemon=True).start()

    def _forward(
        self, source: socket.socket, sink: socket.socket, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                hold = self._hold
                if hold is not None and source is pair[0]:
                    hold.pass_on(data)
                sink.sendall(data)
        self._end(pair)

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
    def holding(self, text: bytes) -> Iterator[Hold]:
        """The next connection that sends `text` waits, until the end of the block at most."""
        self._hold = hold = Hold(text)
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
