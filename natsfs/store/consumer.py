"""An ephemeral, ordered push consumer: every message once, in order, or an error at once.

It is natsfs' own because nats-py's ordered consumer took 18 s to deliver again after a plain restart of the server.
Here a gap, a missing heartbeat or a lost connection raises `Unreachable`, and the owner starts anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from nats.aio.msg import Msg

from natsfs.catalog.metadata import new_nuid
from natsfs.errors import StoreError, Unreachable
from natsfs.store.connection import Connection
from natsfs.store.jetstream import ApiError

HEARTBEAT = 1.0  # seconds between the server's heartbeats on an idle consumer
SILENCE = 3.0  # seconds without any message after which the server is asked about the consumer

DELETE_LIMIT = 2.0  # seconds for the server to answer each request at the end


@dataclass(slots=True)
class Delivered:
    subject: str
    seq: int
    time_ns: int
    pending: int
    headers: dict[str, str] | None
    data: bytes


def parse_ack(reply: str) -> tuple[int, int, int, int]:
    """Stream sequence, consumer sequence, time in ns and pending count of a reply subject (ADR-15).

    ``$JS.ACK.<stream>.<consumer>.<delivered>.<sseq>.<cseq>.<time>.<pending>``, with domain and account hash before
    the stream, and perhaps a token at the end, in the newer form.
    """
    tokens = reply.split(".")
    at = 5 if len(tokens) == 9 else 7
    return int(tokens[at]), int(tokens[at + 1]), int(tokens[at + 2]), int(tokens[at + 3])


class Consumer:
    def __init__(
        self,
        connection: Connection,
        api_prefix: str,
        bucket: str,
        filter_subject: str,
        *,
        headers_only: bool = False,
    ) -> None:
        self._connection = connection
        self._api = api_prefix
        self._stream = f"OBJ_{bucket}"
        self._filter = filter_subject
        self._headers_only = headers_only
        self._name = "natsfs-" + new_nuid()
        self._batch: list[Delivered] = []
        self._arrived = asyncio.Event()
        self._failure: StoreError | None = None
        self._last = 0  # consumer sequence of the newest message
        self.heard = 0.0  # when anything of it came, by the monotonic clock; read by other threads, too
        self.idle = False  # a heartbeat has said that everything sent has arrived
        self.drained = False  # the server had nothing more to send at some time

    @asynccontextmanager
    async def running(self, **policy: Any) -> AsyncIterator[int]:
        """Create the consumer; yields the number of messages that are waiting for it. Deletes it at the end."""
        async with self._connection.listening(self._on_message, self._on_lost) as deliver:
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
            creation = asyncio.ensure_future(self._connection.api(subject, body, 10))
            creation.add_done_callback(lambda done: done.cancelled() or done.exception())
            try:
                reply = await asyncio.shield(creation)
                self.heard = time.monotonic()
                yield int(reply.get("num_pending", 0)) + int(reply["delivered"]["consumer_seq"])
            finally:
                # The answer is waited for: a request of a connection that is closed right after it may get lost,
                # and the server keeps a consumer without its subscriber for `inactive_threshold`.
                if self._connection.stands:
                    await _uncancelled(self._delete(creation))

    async def _delete(self, creation: asyncio.Future[Any]) -> None:
        """A server that is making the stream anew handles a creation behind a deletion that was sent after it."""
        await asyncio.wait([creation], timeout=DELETE_LIMIT)
        with contextlib.suppress(StoreError):
            await self._connection.api(
                f"{self._api}.CONSUMER.DELETE.{self._stream}.{self._name}", None, DELETE_LIMIT
            )

    def _on_lost(self) -> None:
        self.fail(Unreachable("the connection to the NATS server was lost"))

    def fail(self, error: StoreError) -> None:
        """Whoever waits for messages gets this error."""
        self._failure = self._failure or error
        self._arrived.set()

    def _on_message(self, msg: Msg) -> None:
        self.heard = time.monotonic()
        headers = msg.headers
        if headers and headers.get("Status") == "100":
            # A flow control request, or a heartbeat of a stalled consumer, has to be answered.
            answer = msg.reply or headers.get("Nats-Consumer-Stalled")
            if answer:
                self._batch.append(Delivered(answer, 0, 0, 0, None, b""))
                self._arrived.set()
            elif int(headers.get("Nats-Last-Consumer", "0")) > self._last:
                self.fail(Unreachable("the watch has missed messages"))
            else:
                self.idle = True
                self._arrived.set()
            return
        if headers and headers.get("Status") is not None:
            self.fail(Unreachable(f"the consumer ended: {headers}"))
            return
        seq, consumer_seq, time_ns, pending = parse_ack(msg.reply)
        if consumer_seq != self._last + 1:
            self.fail(Unreachable("the watch has missed messages"))
            return
        self._last = consumer_seq
        self.idle = False
        self._batch.append(Delivered(msg.subject, seq, time_ns, pending, headers, msg.data))
        self._arrived.set()

    async def messages(self) -> list[Delivered]:
        """The messages that came since the last call; empty only after a heartbeat says that there are none."""
        while True:
            if self._failure is not None:
                raise self._failure
            self._arrived.clear()
            batch, self._batch = self._batch, []
            for control in [item for item in batch if item.seq == 0]:
                # Answered only here, after all before it were taken: that is what paces the server.
                await self._connection.publish(control.subject, b"")
                batch.remove(control)
            if batch or self.idle:
                self.idle = False
                self.drained = self.drained or not batch
                return batch
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), HEARTBEAT)
            if time.monotonic() - self.heard > SILENCE and not self._arrived.is_set():
                await self._confirm()

    async def _confirm(self) -> None:
        """Ask whether a silent consumer is alive and has sent nothing that is missing here.

        A purge of some ten thousand messages keeps a stream, and so its heartbeats, waiting for seconds; to list a
        large bucket again for that would only add to the load.
        """
        try:
            info = await self._connection.api(
                f"{self._api}.CONSUMER.INFO.{self._stream}.{self._name}", None, 10
            )
        except ApiError as error:
            raise Unreachable(f"the watch is gone from the server: {error}") from None
        if int(info["delivered"]["consumer_seq"]) > self._last and not self._arrived.is_set():
            raise Unreachable("the watch has missed messages")
        self.heard = time.monotonic()


async def _uncancelled(work: Coroutine[Any, Any, None]) -> None:
    """Do it to its end, however often the task is cancelled meanwhile; the cancellation follows."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


async def scan(
    connection: Connection, api_prefix: str, bucket: str, subject: str
) -> tuple[list[int], list[int]]:
    """Lengths and sequences of all messages of a subject, from a consumer that delivers headers only."""
    lengths: list[int] = []
    seqs: list[int] = []
    consumer = Consumer(connection, api_prefix, bucket, subject, headers_only=True)
    async with consumer.running(deliver_policy="all") as pending:
        while len(seqs) < pending and not consumer.drained:
            for message in await consumer.messages():
                lengths.append(int((message.headers or {}).get("Nats-Msg-Size", "0")))
                seqs.append(message.seq)
    return lengths, seqs
