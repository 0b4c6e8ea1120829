"""The watch of one bucket: every metadata message, from now on and for ever, in order.

After any interruption it lists the whole bucket again, because a purge leaves no trace that could be caught up on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from natsfs.catalog.bucket import Identity
from natsfs.catalog.metadata import MalformedMetadata, Metadata, decode
from natsfs.errors import BucketGone, StoreError, Unreachable
from natsfs.store.consumer import API_LIMIT, HEARTBEAT, Consumer
from natsfs.store.frames import Message
from natsfs.store.wire import Wire

log = logging.getLogger(__name__)

OVERDUE = 1.5 * HEARTBEAT  # seconds of silence after which a change is not made without asking the leader
OP_HEADER = "Natsfs-Op"
SUSPECTS = 1000  # removals that are told one by one
LONGER = 3  # times that the limit for the beginning of a listing is doubled
SLICE = 128  # messages that are applied before other tasks have their turn: some milliseconds
_OP = OP_HEADER.encode()


@dataclass(frozen=True, slots=True)
class Loading:
    """A listing of the whole bucket begins; it covers everything up to the stream's sequence `last_seq`.

    What it says holds for this `generation` of the connection that messages are published on; after a reconnect the
    store may be another one.
    """

    bucket: str
    identity: Identity
    last_seq: int
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Messages:
    bucket: str
    messages: list[Message]  # to be read with `decode_message`


@dataclass(frozen=True, slots=True)
class Loaded:
    bucket: str


@dataclass(frozen=True, slots=True)
class Interrupted:
    """Until the next `Loaded` changes may go unseen."""

    bucket: str


@dataclass(frozen=True, slots=True)
class Gone:
    """The bucket's stream does not exist any more."""

    bucket: str


@dataclass(frozen=True, slots=True)
class Suspect:
    """What may have been removed without a message: a subject, what has a sequence, or anything at all (None)."""

    bucket: str
    what: str | int | None


@dataclass(frozen=True, slots=True)
class BucketsChanged:
    """The list of buckets, or a bucket's settings, changed."""


Event = Loading | Messages | Loaded | Interrupted | Gone
Hint = Suspect | BucketsChanged


class Receiver(Protocol):
    """Who is told what happens in the buckets. None of this may raise."""

    async def take(self, event: Event) -> None:
        """What the watch of a bucket tells, in order, in the task of that watch. Meanwhile the server waits."""

    def take_now(self, bucket: str, message: Message) -> bool:
        """One more message of a bucket that is loaded, when all before was taken. False: not without a wait."""

    def hint(self, hint: Hint) -> None:
        """What others let suspect."""


def decode_message(message: Message) -> Metadata | None:
    """None, and a warning, where it is no metadata."""
    subject = message.subject.decode("utf-8", "replace")
    op = message.header(_OP) if message.headers else None
    try:
        return decode(
            message.data,
            subject=subject,
            seq=message.seq,
            time_ns=message.time_ns,
            op=None if op is None else op.decode("utf-8", "replace"),
        )
    except MalformedMetadata as error:
        log.warning("metadata on %s (sequence %d) is passed over: %s", subject, message.seq, error)
        return None


class Watch:
    """`generation` is that of the connection that messages are published on."""

    def __init__(
        self,
        wire: Wire,
        api_prefix: str,
        bucket: str,
        receiver: Receiver,
        generation: Callable[[], int],
    ) -> None:
        self._wire = wire
        self._api = api_prefix
        self._bucket = bucket
        self._receiver = receiver
        self._generation = generation
        self._listed = 0  # the generation in which the bucket was listed last
        self._consumer: Consumer | None = None
        self._identity: Identity | None = None
        self._last_seq = 0
        self._again = trio.Event()
        self._attempts = 0  # to list the bucket, since that succeeded
        self._suspects: set[str | int | None] = set()  # to be told behind the messages that came before them

    def suspect(self, what: str | int | None) -> None:
        """What `Suspect` says.

        That is told in its turn: of a message that was purged, and is still to be taken, nothing is known yet.
        """
        self._suspects.add(what)
        if len(self._suspects) > SUSPECTS:
            self._suspects = {None}
        if self._consumer is None or self._consumer.is_taken:
            self._tell(self._take_suspects())

    def _take_suspects(self) -> set[str | int | None]:
        suspects, self._suspects = self._suspects, set()
        return suspects

    def _tell(self, suspects: set[str | int | None]) -> None:
        for what in suspects:
            self._receiver.hint(Suspect(self._bucket, what))

    def again(self) -> None:
        """The connection is back: do not wait out the delay between attempts."""
        self._again.set()

    def outdated(self) -> None:
        """List the bucket again, unless that was done since messages are published on a new connection."""
        if self._consumer is not None and self._listed != self._generation():
            self._consumer.fail(Unreachable("what was listed may be of another store"))
            self.again()

    @property
    def is_silent(self) -> bool:
        """Whether a heartbeat is overdue: the stream may be another one by now."""
        consumer = self._consumer
        return consumer is None or trio.current_time() - consumer.heard > OVERDUE

    async def run(self) -> None:
        """Until cancelled, or until the bucket is gone."""
        delay = 0.05
        while True:
            started = trio.current_time()
            self._again = trio.Event()
            try:
                await self._follow()
            except BucketGone:
                await self._receiver.take(Gone(self._bucket))
                return
            except StoreError as error:
                log.warning("watch of bucket %s interrupted: %s", self._bucket, error)
            except Exception:
                # Whatever it was, a bucket that nobody follows any more would be stale for ever.
                log.exception("watch of bucket %s interrupted", self._bucket)
            await self._receiver.take(Interrupted(self._bucket))
            if trio.current_time() - started > 10:
                delay = 0.05
            with trio.move_on_after(delay) as scope:
                await self._again.wait()
            if scope.cancelled_caught:
                delay = min(delay * 2, 2.0)

    async def _follow(self) -> None:
        await self._wire.up(10)
        self._listed = generation = self._generation()
        info = await self._wire.api(f"{self._api}.STREAM.INFO.OBJ_{self._bucket}", None, 10)
        created, last_seq = str(info["created"]), int(info["state"]["last_seq"])
        epoch = 0
        if self._identity is not None and self._identity.created == created:
            epoch = self._identity.epoch + (last_seq < self._last_seq)
        if self._identity is not None and self._identity != Identity(self._bucket, created, epoch):
            log.warning(
                "bucket %s was re-created or restored: everything known of it is read anew", self._bucket
            )
            self._last_seq = 0
        self._identity = Identity(self._bucket, created, epoch)
        self._last_seq = max(self._last_seq, last_seq)
        consumer = Consumer(self._wire, self._api, self._bucket, f"$O.{self._bucket}.M.>")
        self._consumer = consumer
        # A server that has much to do needs long to find the newest of a million messages; others do not answer.
        limit = API_LIMIT * 2**self._attempts
        self._attempts = min(self._attempts + 1, LONGER)
        async with consumer.running(limit, deliver_policy="last_per_subject") as pending:
            self._attempts = 0
            await self._receiver.take(Loading(self._bucket, self._identity, last_seq, generation))
            loaded = pending == 0
            if loaded:
                await self._receiver.take(Loaded(self._bucket))
                consumer.at_once = self._at_once
            seen = 0
            while True:
                if not consumer.has_come:
                    self._tell(self._take_suspects())
                batch = await consumer.messages()
                suspects = self._take_suspects()
                for start in range(0, len(batch), SLICE):
                    if start:
                        await trio.lowlevel.checkpoint()
                    await self._receiver.take(Messages(self._bucket, batch[start : start + SLICE]))
                self._tell(suspects)
                if batch:
                    self._last_seq = max(self._last_seq, batch[-1].seq)
                seen += len(batch)
                # A subject that is purged during the listing is never delivered: the heartbeat tells the end then.
                if not loaded and (seen >= pending or consumer.drained):
                    loaded = True
                    await self._receiver.take(Loaded(self._bucket))
                    consumer.at_once = self._at_once

    def _at_once(self, message: Message) -> bool:
        taken = self._receiver.take_now(self._bucket, message)
        if taken:
            self._last_seq = max(self._last_seq, message.seq)
        return taken
