"""A connection to NATS under trio, in the thread that answers the kernel.

nats-py runs on asyncio, which would be another thread. Each message through it cost two hand-overs of the
interpreter's lock and three copies: reading 512 MB took 1.7 s of processor time there and takes 0.2 s here. What
nats-py still does is the login (login.py): the CONNECT line is its work.

When the connection is lost everybody who waits hears it at once: an answer to what was sent before cannot be relied on.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from math import inf
from typing import Any, TypeVar
from urllib.parse import urlsplit

import trio

from natsfs.catalog.metadata import new_nuid
from natsfs.errors import Denied, StoreError, TooLarge, Unreachable
from natsfs.locks import Lock
from natsfs.store.frames import ROOM, Control, Frames, Message, ProtocolError
from natsfs.store.jetstream import NoResponders, api_error
from natsfs.store.login import Login

log = logging.getLogger(__name__)

DIAL_LIMIT = 4.0  # seconds for one attempt at one server
WRITE_LIMIT = 20.0  # seconds in which the server has to take what is sent
PING = 10.0  # seconds of silence after which the server is asked for a sign of life
SILENCE = 25.0  # seconds of silence after which the connection counts as lost
LATE = 0.5  # seconds that an answer may be waited for over its limit
PIECES = 1024  # of what is sent by one system call (IOV_MAX)
INBOX_SID, FIRST_SID = b"1", 2
FIRST_DELAY, LAST_DELAY = 0.05, 1.0  # seconds between attempts to connect again

Handler = Callable[[Message | StoreError], None]
T = TypeVar("T")


@dataclass(slots=True)
class Waiter:
    handler: Handler
    subject: str = ""


class Answer:
    """The single reply to a message that was sent."""

    __slots__ = ("_event", "_reply", "_result", "_wire", "deadline", "subject")

    def __init__(self, wire: Wire, subject: str) -> None:
        self.subject = subject
        self.deadline = inf  # of whoever waits
        self._wire = wire
        self._reply = wire.register(self)
        self._event: trio.Event | None = None
        self._result: Message | StoreError | None = None

    def handler(self, result: Message | StoreError) -> None:
        self.forget()
        if self._result is None:
            if isinstance(result, Message) and result.status == 503:
                result = NoResponders(f"nobody answers on {self.subject}: JetStream is off or starting")
            self._result = result
            self.wake()

    def forget(self) -> None:
        """What comes from now on is of no use."""
        self._wire.unregister(self._reply)

    def wake(self) -> None:
        """Whoever waits goes on, with an answer or without."""
        self.deadline = inf
        if self._event is not None:
            self._event.set()
            self._event = None

    @property
    def reply(self) -> bytes:
        return self._reply

    @property
    def arrived(self) -> bool:
        return self._result is not None

    async def settled(self, limit: float) -> bool:
        """Whether the answer, or its loss, is known within `limit` seconds, or `LATE` more."""
        deadline = trio.current_time() + limit
        while self._result is None and trio.current_time() < deadline:
            if self._event is None:
                self._event = trio.Event()
            self.deadline = min(self.deadline, deadline)
            self._wire.waited_for()
            await self._event.wait()
        return self._result is not None

    async def get(self, limit: float, what: str) -> Message:
        """Raises `Unreachable` after `limit` seconds, or what came in place of an answer."""
        if not await self.settled(limit):
            raise Unreachable(f"no {what} within {limit:.0f} s")
        result = self._result
        assert result is not None
        if isinstance(result, StoreError):
            raise result
        return result


class Wire:
    """One connection. `generation` rises with every reconnect. All state belongs to the trio thread."""

    def __init__(
        self,
        name: str,
        servers: tuple[str, ...],
        login: Login,
        on_back: Callable[[], None] = lambda: None,
        subscriptions: Mapping[str, Handler] | None = None,
        room: int = ROOM,
    ) -> None:
        self.name = name
        self.generation = 0
        self.max_payload = 1024 * 1024
        self._configured = servers
        self._servers = list(servers)
        self._login = login
        self._on_back = on_back
        self._inbox = b"_INBOX." + new_nuid().encode() + b"."
        self._waiters: dict[bytes, Waiter | Answer] = {}
        self._some_wait = trio.Event()
        self._next = 0
        # By subscription id; those of the whole life are made again with every connection.
        self._standing = dict(subscriptions or {})
        self._listeners: dict[bytes, Waiter] = {}
        self._next_sid = FIRST_SID
        self._room = room
        self._stream: trio.abc.Stream | None = None
        self._writing = Lock()
        self._up = trio.Event()
        self.heard = 0.0  # when the bytes came that are handled now
        self.last_error = "no attempt yet"

    # --- life -------------------------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Connect, serve, connect again, until cancelled. The first connection is announced as started."""
        delay, started = FIRST_DELAY, False
        while True:
            for server in list(self._servers):
                try:
                    with trio.fail_after(DIAL_LIMIT):
                        stream, frames = await self._dial(server)
                except (
                    OSError,
                    trio.TooSlowError,
                    trio.BrokenResourceError,
                    ProtocolError,
                    StoreError,
                ) as error:
                    self.last_error = str(error) or type(error).__name__
                    log.debug("NATS connection %r to %s: %s", self.name, server, self.last_error)
                    continue
                if started:
                    self.generation += 1
                    log.warning("NATS connection %r is back", self.name)
                    self._on_back()
                else:
                    started = True
                    task_status.started()
                delay = FIRST_DELAY
                await self._serve(stream, frames)
                log.warning("NATS connection %r is lost; trying again until it is back", self.name)
                break
            await trio.sleep(delay)
            delay = min(delay * 2, LAST_DELAY)

    async def _dial(self, server: str) -> tuple[trio.abc.Stream, Frames]:
        url = urlsplit(server)
        host = url.hostname or "127.0.0.1"
        stream: trio.abc.Stream = await trio.open_tcp_stream(host, url.port or 4222)
        try:
            frames = Frames(self._room)
            info = await self._control(stream, frames, b"INFO")
            settings = json.loads(info.text)
            context = self._login.tls
            if context is not None and not settings.get("tls_required"):
                raise ProtocolError("TLS was asked for, and this server offers none")
            if context is not None:
                stream = trio.SSLStream(stream, context, server_hostname=host, https_compatible=True)
            await stream.send_all(self._login.connect(settings, f"natsfs {self.name}") + b"PING\r\n")
            await self._control(stream, frames, b"PONG")
            await stream.send_all(b"SUB %s* %s\r\n" % (self._inbox, INBOX_SID))
            self._listeners = {}
            for subject, handler in self._standing.items():
                await stream.send_all(self._subscribe(subject, handler))
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        self.max_payload = int(settings.get("max_payload", self.max_payload))
        scheme = url.scheme
        found = [f"{scheme}://{address}" for address in settings.get("connect_urls") or ()]
        self._servers = [*self._configured, *(url for url in found if url not in self._configured)]
        return stream, frames

    async def _control(self, stream: trio.abc.Stream, frames: Frames, verb: bytes) -> Control:
        """The control line that has to come next."""
        while True:
            for frame in frames:
                if isinstance(frame, Control) and frame.verb == verb:
                    return frame
                if isinstance(frame, Control) and frame.verb == b"-ERR":
                    raise ProtocolError(frame.text.decode("utf-8", "replace"))
            await self._receive(stream, frames)

    async def _receive(self, stream: trio.abc.Stream, frames: Frames) -> None:
        space = frames.space()
        if isinstance(stream, trio.SocketStream):
            # trio's own recv tries first, which mostly fails, and takes a turn of the loop when it does not.
            await trio.lowlevel.wait_readable(stream.socket)
            try:
                count = os.readv(stream.socket.fileno(), (space,))
            except BlockingIOError:
                count = -1
        else:
            data = await stream.receive_some(len(space))
            count = len(data)
            space[:count] = data
        space.release()
        if not count:
            raise ProtocolError("the server closed the connection")
        frames.received(max(count, 0))

    async def _serve(self, stream: trio.abc.Stream, frames: Frames) -> None:
        """Until the connection is lost."""
        self._stream, self.heard = stream, trio.current_time()
        self._up.set()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_alive, stream)
                nursery.start_soon(self._expire)
                while True:
                    for frame in frames:
                        if isinstance(frame, Message):
                            waiter = (
                                self._waiters.get(frame.subject[len(self._inbox) :])
                                if frame.sid == INBOX_SID
                                else self._listeners.get(frame.sid)
                            )
                            if waiter is not None:
                                waiter.handler(frame)
                        elif frame.verb == b"PING":
                            nursery.start_soon(self._write, (b"PONG\r\n",))
                        elif frame.verb == b"-ERR":
                            self._refused(frame.text.decode("utf-8", "replace"))
                    await self._receive(stream, frames)
                    self.heard = trio.current_time()
        except* (
            OSError,
            trio.BrokenResourceError,
            trio.ClosedResourceError,
            ProtocolError,
            StoreError,
        ) as errors:
            log.info("NATS connection %r: %s", self.name, "; ".join(str(error) for error in _leaves(errors)))
        finally:
            self._stream = None
            self._up = trio.Event()
            waiters = [*self._waiters.values(), *self._listeners.values()]
            self._waiters, self._listeners = {}, {}
            for waiter in waiters:
                waiter.handler(Unreachable("the connection to the NATS server was lost"))
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)

    def _refused(self, text: str) -> None:
        log.warning("NATS connection %r: %s", self.name, text)
        if "permissions violation" in text.lower():
            for waiter in (*self._waiters.values(), *self._listeners.values()):
                if waiter.subject and f'"{waiter.subject}"' in text:
                    waiter.handler(Denied(text))

    async def _keep_alive(self, stream: trio.abc.Stream) -> None:
        while True:
            await trio.sleep(PING / 2)
            silent = trio.current_time() - self.heard
            if silent > SILENCE:
                raise ProtocolError(f"nothing was heard for {silent:.0f} s")
            if silent > PING:
                await self._write((b"PING\r\n",))

    def waited_for(self) -> None:
        self._some_wait.set()

    async def _expire(self) -> None:
        """Look after the limits of all answers at once: a time-out of its own costs each as much as decoding it."""
        while True:
            await self._some_wait.wait()
            self._some_wait = trio.Event()
            await trio.sleep(LATE)
            now = trio.current_time()
            for waiter in list(self._waiters.values()):
                if isinstance(waiter, Answer) and waiter.deadline < inf:
                    if waiter.deadline < now:
                        waiter.wake()
                    else:
                        self.waited_for()

    # --- sending and waiting ----------------------------------------------------------------------------------

    @property
    def stands(self) -> bool:
        return self._stream is not None

    async def up(self, limit: float) -> None:
        """Wait until the connection stands. Raises `Unreachable` after `limit` seconds."""
        while self._stream is None:
            with trio.move_on_after(limit) as scope:
                await self._up.wait()
            if scope.cancelled_caught:
                raise Unreachable(f"the NATS server has been out of reach for {limit:.0f} s")

    def register(self, waiter: Waiter | Answer) -> bytes:
        """A reply subject for what `waiter` gets, until `unregister`; an error replaces it on a loss."""
        self._next += 1
        token = b"%d" % self._next
        self._waiters[token] = waiter
        return self._inbox + token

    def unregister(self, reply: bytes) -> None:
        self._waiters.pop(reply[len(self._inbox) :], None)

    def _subscribe(self, subject: str, handler: Handler) -> bytes:
        sid = b"%d" % self._next_sid
        self._next_sid += 1
        self._listeners[sid] = Waiter(handler, subject)
        return b"SUB %s %s\r\n" % (subject.encode(), sid)

    @asynccontextmanager
    async def listening(self, handler: Handler) -> AsyncIterator[str]:
        """A subscription to a subject that nobody else knows, for a consumer; an error replaces messages on a loss."""
        subject = f"_INBOX.{new_nuid()}"
        sid = b"%d" % self._next_sid
        try:
            await self._write((self._subscribe(subject, handler),))
            yield subject
        finally:
            if self._listeners.pop(sid, None) is not None:
                with suppress(Unreachable):
                    await self._write((b"UNSUB %s\r\n" % sid,))

    async def _write(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send all of it, or lose the connection: half a frame would spoil whatever follows."""
        stream = self._stream
        if isinstance(stream, trio.SocketStream) and not self._writing.locked():
            # Mostly the socket has room, and nobody has to wait.
            try:
                parts = _behind(parts, os.writev(stream.socket.fileno(), parts[:PIECES]))
            except BlockingIOError:
                pass
            except OSError as error:
                await trio.aclose_forcefully(stream)
                raise Unreachable(f"the connection to the NATS server is lost: {error}") from None
            if not parts:
                return
        async with self._writing:
            if stream is None or self._stream is not stream:
                raise Unreachable("the connection to the NATS server is lost")
            try:
                with trio.CancelScope(shield=True), trio.fail_after(WRITE_LIMIT):
                    if isinstance(stream, trio.SocketStream):
                        while parts:
                            parts = _behind(parts, await stream.socket.sendmsg(parts[:PIECES]))
                    else:
                        await stream.send_all(b"".join(parts))
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError) as error:
                if self._stream is stream:
                    await trio.aclose_forcefully(stream)
                raise Unreachable(f"the connection to the NATS server is lost: {error}") from None

    async def publish(
        self,
        subject: str,
        payload: bytes | memoryview,
        reply: bytes = b"",
        headers: dict[str, str] | None = None,
    ) -> None:
        await self._write(self._frame(subject, payload, reply, headers))

    def _frame(
        self, subject: str, payload: bytes | memoryview, reply: bytes, headers: dict[str, str] | None
    ) -> tuple[bytes | memoryview, ...]:
        to = subject.encode() + (b" " + reply if reply else b"")
        if headers is None:
            block = b""
            line = b"PUB %s %d\r\n" % (to, len(payload))
        else:
            lines = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
            block = f"NATS/1.0\r\n{lines}\r\n".encode()
            line = b"HPUB %s %d %d\r\n" % (to, len(block), len(block) + len(payload))
        if len(block) + len(payload) > self.max_payload:
            raise TooLarge(f"a message of {len(block) + len(payload)} bytes is over the server's max_payload")
        return line, block, payload, b"\r\n"

    async def send(
        self, *messages: tuple[str, bytes | memoryview, dict[str, str] | None]
    ) -> tuple[Answer, ...]:
        """Publish messages (subject, payload, headers) one right behind the other, each with an answer to come."""
        answers = [Answer(self, subject) for subject, _, _ in messages]
        parts: list[bytes | memoryview] = []
        try:
            for answer, (subject, payload, headers) in zip(answers, messages, strict=True):
                parts += self._frame(subject, payload, answer.reply, headers)
            await self._write(parts)
        except BaseException:
            for answer in answers:
                answer.forget()
            raise
        return tuple(answers)

    async def request(self, subject: str, payload: bytes, limit: float) -> Message:
        """One request, one reply, one attempt."""
        await self.up(limit)
        (answer,) = await self.send((subject, payload, None))
        return await answer.get(limit, f"answer on {subject}")

    async def api(self, subject: str, body: dict[str, Any] | None, limit: float) -> dict[str, Any]:
        """A request to the JetStream API. Raises the exception of its error, if it answers with one."""
        payload = json.dumps(body).encode() if body is not None else b""
        return api_answer(await self.request(subject, payload, limit))


def api_answer(message: Message) -> dict[str, Any]:
    """What the JetStream API answers. Raises the exception of its error, if it is one."""
    data: dict[str, Any] = json.loads(message.data)
    if "error" in data:
        raise api_error(data["error"])
    return data


def _behind(parts: Sequence[bytes | memoryview], sent: int) -> list[bytes | memoryview]:
    """What of `parts` is left after `sent` bytes."""
    left = [memoryview(part) for part in parts if len(part)]
    first = 0
    while first < len(left) and sent >= len(left[first]):
        sent -= len(left[first])
        first += 1
    if sent:
        left[first] = left[first][sent:]
    return list(left[first:])


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


async def persist(attempt: Callable[[], Awaitable[T]], limit: float) -> T:
    """Repeat an idempotent request over lost connections until `limit` seconds have passed."""
    deadline = trio.current_time() + limit
    delay = 0.05
    while True:
        try:
            return await attempt()
        except Unreachable:
            if trio.current_time() + delay > deadline:
                raise
        await trio.sleep(delay)
        delay = min(delay * 2, 1.0)


async def both(*calls: Callable[[], Awaitable[None]]) -> None:
    """Run calls side by side; of their errors the first is raised, as it is."""
    errors: list[StoreError] = []

    async def run(call: Callable[[], Awaitable[None]]) -> None:
        try:
            await call()
        except StoreError as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(run, call)
    if errors:
        raise errors[0]
