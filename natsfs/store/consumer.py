"""An ephemeral, ordered push consumer: every message once, in order, or an error at once.

It is natsfs' own because nats-py's ordered consumer took 18 s to deliver again after a plain restart of the server.
Here a gap, a missing heartbeat or a lost connection raises `Unreachable`, and the owner starts anew.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio

from natsfs.catalog.metadata import new_nuid
from natsfs.errors import StoreError, Unreachable
from natsfs.store.frames import Message
from natsfs.store.jetstream import ApiError
from natsfs.store.wire import Wire, api_answer

HEARTBEAT = 1.0  # seconds between the server's heartbeats on an idle consumer
SILENCE = 3.0  # seconds without any message after which the server is asked about the consumer

# Seconds for the answer. Nobody gives it where the consumer's node has stopped, and until then no change shows.
CONFIRM_LIMIT = 3.0

API_LIMIT = 10.0  # seconds for one attempt at an API request
NEWEST_LIMIT = 60.0  # seconds for the server to find the newest message of each of very many subjects
AT_ONCE = 16  # messages of one reading of the connection that are taken at once; then others have their turn
DELETE_LIMIT = 2.0  # seconds for the server to answer each request at the end


def parse_ack(reply: bytes) -> tuple[int, int, int]:
    """Stream sequence, consumer sequence and time in ns of a reply subject (ADR-15).

    ``$JS.ACK.<stream>.<consumer>.<delivered>.<sseq>.<cseq>.<time>.<pending>``, with domain and account hash before
    the stream, and perhaps a token at the end, in the newer form.
    """
    tokens = reply.rsplit(b".", 4)[1:] if reply.count(b".") == 8 else reply.split(b".")[7:]
    return int(tokens[0]), int(tokens[1]), int(tokens[2])


class Consumer:
    def __init__(
        self,
        wire: Wire,
        api_prefix: str,
        bucket: str,
        filter_subject: str,
        *,
        headers_only: bool = False,
    ) -> None:
        self._wire = wire
        self._api = api_prefix
        self._stream = f"OBJ_{bucket}"
        self._filter = filter_subject
        self._headers_only = headers_only
        self._name = "natsfs-" + new_nuid()
        # Takes a message that comes while nobody is busy with those before, without a turn of the loop; False where it
        # cannot. To be set by the owner.
        self.at_once: Callable[[Message], bool] | None = None
        self._read = 0.0  # when what is being read came, and how many of it may still be taken at once
        self._room = 0
        self._waits = False  # whether the owner has taken everything
        self._batch: list[Message] = []
        self._arrived = trio.Event()
        self._controls: list[str] = []  # to be answered when all before was taken
        self._failure: StoreError | None = None
        self._last = 0  # consumer sequence of the newest message
        self.heard = 0.0  # when anything of it came
        self.idle = False  # a heartbeat has said that everything sent has arrived
        self.drained = False  # the server had nothing more to send at some time

    @asynccontextmanager
    async def running(self, limit: float = API_LIMIT, /, **policy: Any) -> AsyncIterator[int]:
        """Create the consumer; yields the number of messages that are waiting for it. Deletes it at the end.

        `limit` is for the server's answer.
        """
        async with self._wire.listening(self._take) as deliver:
            config = {
                "name": self._name,
                "deliver_subject": deliver,
                "ack_policy": "none",
                "max_deliver": 1,
                "filter_subject": self._filter,
                "idle_heartbeat": int(HEARTBEAT * 1e9),
                "flow_control": True,
                "mem_storage": True,
                "num_replicas": 1,
                "headers_only": self._headers_only,
                "inactive_threshold": int(10e9),
                **policy,
            }
            subject = f"{self._api}.CONSUMER.CREATE.{self._stream}.{self._name}.{self._filter}"
            body = {"stream_name": self._stream, "config": config, "action": "create"}
            (creation,) = await self._wire.send((subject, json.dumps(body).encode(), None))
            try:
                reply = api_answer(await creation.get(limit, f"answer on {subject}"))
                self.heard = trio.current_time()
                yield int(reply.get("num_pending", 0)) + int(reply["delivered"]["consumer_seq"])
            finally:
                # The answer is waited for: a request of a connection that is closed right after it may get lost,
                # and the server keeps a consumer without its subscriber for `inactive_threshold`.
                with trio.CancelScope(shield=True), suppress(StoreError):
                    if self._wire.stands:
                        # A server that is making the stream anew handles a creation behind a deletion that was sent
                        # after it.
                        await creation.settled(DELETE_LIMIT)
                        await self._wire.api(
                            f"{self._api}.CONSUMER.DELETE.{self._stream}.{self._name}", None, DELETE_LIMIT
                        )

    def fail(self, error: StoreError) -> None:
        """Whoever waits for messages gets this error."""
        self._failure = self._failure or error
        self._arrived.set()

    def _take(self, message: Message | StoreError) -> None:
        if isinstance(message, StoreError):
            self.fail(message)
            return
        self.heard = self._wire.heard
        if message.headers and (status := message.status) is not None:
            self._told(message, status)
            return
        try:
            message.seq, consumer_seq, message.time_ns = parse_ack(message.reply)
        except (ValueError, IndexError):
            self.fail(Unreachable(f"the consumer sent what it should not: {message.reply!r}"))
            return
        if consumer_seq != self._last + 1:
            self.fail(Unreachable("the watch has missed messages"))
            return
        self._last = consumer_seq
        self.idle = False
        if self.at_once is not None and self.is_taken:
            if self._read != self.heard:
                self._read, self._room = self.heard, AT_ONCE
            if self._room:
                self._room -= 1
                if self.at_once(message):
                    return
        self._batch.append(message)
        self._arrived.set()

    def _told(self, message: Message, status: int) -> None:
        """What the server says of the consumer itself."""
        if status != 100:
            self.fail(Unreachable(f"the consumer ended: {status} {message.description}"))
            return
        # A flow control request, or a heartbeat of a stalled consumer, has to be answered.
        answer = message.reply or message.header(b"Nats-Consumer-Stalled")
        if answer:
            self._controls.append(answer.decode())
        elif int(message.header(b"Nats-Last-Consumer") or 0) > self._last:
            self.fail(Unreachable("the watch has missed messages"))
        else:
            self.idle = True
        self._arrived.set()

    @property
    def is_taken(self) -> bool:
        """Whether the owner has taken all that came, and waits for more."""
        return self._waits and not self._batch

    @property
    def has_come(self) -> bool:
        """Whether there is a message to be taken."""
        return bool(self._batch)

    async def messages(self) -> list[Message]:
        """The messages that came since the last call; empty only after a heartbeat says that there are none."""
        while True:
            if self._failure is not None:
                raise self._failure
            self._arrived = trio.Event()
            batch, self._batch = self._batch, []
            controls, self._controls = self._controls, []
            self._waits = not batch
            try:
                for subject in controls:
                    # Answered only here, after all before it were taken: that is what paces the server.
                    await self._wire.publish(subject, b"")
                if batch or self.idle:
                    self.idle = False
                    self.drained = self.drained or not batch
                    return batch
                with trio.move_on_after(HEARTBEAT):
                    await self._arrived.wait()
                if trio.current_time() - self.heard > SILENCE and not self._arrived.is_set():
                    await self._confirm()
            finally:
                self._waits = False

    async def _confirm(self) -> None:
        """Ask whether a silent consumer is alive and has sent nothing that is missing here.

        A purge of some ten thousand messages keeps a stream, and so its heartbeats, waiting for seconds; to list a
        large bucket again for that would only add to the load.
        """
        try:
            info = await self._wire.api(
                f"{self._api}.CONSUMER.INFO.{self._stream}.{self._name}", None, CONFIRM_LIMIT
            )
        except ApiError as error:
            raise Unreachable(f"the watch is gone from the server: {error}") from None
        if int(info["delivered"]["consumer_seq"]) > self._last and not self._arrived.is_set():
            raise Unreachable("the watch has missed messages")
        self.heard = trio.current_time()


async def scan(wire: Wire, api_prefix: str, bucket: str, subject: str) -> tuple[list[int], list[int]]:
    """Lengths and sequences of all messages of a subject, from a consumer that delivers headers only."""
    lengths: list[int] = []
    seqs: list[int] = []
    consumer = Consumer(wire, api_prefix, bucket, subject, headers_only=True)
    async with consumer.running(deliver_policy="all") as pending:
        while len(seqs) < pending and not consumer.drained:
            for message in await consumer.messages():
                lengths.append(int(message.header(b"Nats-Msg-Size") or 0))
                seqs.append(message.seq)
    return lengths, seqs


async def newest_of_each(
    wire: Wire, api_prefix: str, bucket: str, subject: str, take: Callable[[list[Message]], None]
) -> None:
    """Give `take` the newest message of each subject that matches, with its sequence and time and no content."""
    seen = 0
    consumer = Consumer(wire, api_prefix, bucket, subject, headers_only=True)
    async with consumer.running(NEWEST_LIMIT, deliver_policy="last_per_subject") as pending:
        while seen < pending and not consumer.drained:
            messages = await consumer.messages()
            take(messages)
            seen += len(messages)


async def count(wire: Wire, api_prefix: str, bucket: str, subject: str) -> int:
    """How many messages match, by a consumer that delivers none: it is asked for nothing but how many wait for it."""
    stream, name = f"OBJ_{bucket}", "natsfs-" + new_nuid()
    config = {
        "name": name,
        "ack_policy": "none",
        "deliver_policy": "all",
        "filter_subject": subject,
        "mem_storage": True,
        "num_replicas": 1,
        "inactive_threshold": int(10e9),
    }
    body = {"stream_name": stream, "config": config, "action": "create"}
    create = f"{api_prefix}.CONSUMER.CREATE.{stream}.{name}.{subject}"
    try:
        reply = await wire.api(create, body, API_LIMIT)
    finally:
        with trio.CancelScope(shield=True), suppress(StoreError):
            await wire.api(f"{api_prefix}.CONSUMER.DELETE.{stream}.{name}", None, DELETE_LIMIT)
    return int(reply.get("num_pending", 0))
