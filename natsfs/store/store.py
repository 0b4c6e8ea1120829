"""The face of the store.

Three connections: metadata, small requests and small reads on one wire; uploads and reads of much on the second, so
that a long transfer delays no name operation; and the third for the watches, so that the listing of a large bucket
delays neither.
"""

from __future__ import annotations

import base64
import json
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from natsfs.catalog.attributes import parse_time
from natsfs.catalog.metadata import NUID, MalformedMetadata, Metadata, decode
from natsfs.config import Config
from natsfs.errors import BucketGone, MountError, StoreError, Unreachable
from natsfs.store.consumer import count, newest_of_each, scan
from natsfs.store.fetch import Fetcher
from natsfs.store.frames import SMALL_ROOM, Message
from natsfs.store.jetstream import NO_STORE, ApiError, NoResponders
from natsfs.store.lanes import Courtesy
from natsfs.store.layout import Layout
from natsfs.store.login import Login
from natsfs.store.publish import HEADERS_ROOM, Base, Known, Publisher, Upload, Uploaded, paced
from natsfs.store.segments import Read, Segment
from natsfs.store.watch import OP_HEADER, BucketsChanged, Hint, Receiver, Watch
from natsfs.store.wire import Wire, persist

log = logging.getLogger(__name__)

WIRE_LIMIT = 10.0  # seconds for the first connection of a wire; the login has just found the server
RELIST = 1.0  # seconds for the watches to notice a restart of the server as well
STORE_DELAYS = (0.02, 0.1, 0.5)  # seconds between attempts to create a stream whose folder could not be made
NEARLY = 0.8  # of a stream's limit
API_LIMIT = 10.0  # seconds for one attempt at an API request


@dataclass(frozen=True, slots=True)
class BucketInfo:
    """A stream's settings and use. Sizes in bytes, -1 where there is no limit."""

    name: str
    created: str
    bytes: int
    messages: int
    max_bytes: int
    sealed: bool
    mirror: bool
    max_msgs_per_subject: int
    max_msgs: int
    discard: str
    description: str
    replicas: int
    storage: str
    compression: str
    ttl: float  # seconds, 0 for none
    first_seq: int  # everything before it is gone
    last_seq: int  # of the newest message that was ever stored

    @classmethod
    def of(cls, info: dict[str, Any]) -> BucketInfo:
        config, state = info["config"], info["state"]
        return cls(
            name=config["name"].removeprefix("OBJ_"),
            created=str(info["created"]),
            bytes=int(state["bytes"]),
            messages=int(state["messages"]),
            max_bytes=int(config.get("max_bytes", -1)),
            sealed=bool(config.get("sealed")),
            mirror=bool(config.get("mirror")),
            max_msgs_per_subject=int(config.get("max_msgs_per_subject", -1)),
            max_msgs=int(config.get("max_msgs", -1)),
            discard=str(config.get("discard", "old")),
            description=str(config.get("description") or ""),
            replicas=int(config.get("num_replicas", 1)),
            storage=str(config.get("storage", "file")),
            compression=str(config.get("compression") or "none"),
            ttl=int(config.get("max_age", 0)) / 1e9,
            first_seq=int(state["first_seq"]),
            last_seq=int(state["last_seq"]),
        )

    @property
    def drops(self) -> bool:
        """Whether the stream makes room by dropping what it got first, without a sign."""
        return self.discard == "old" and (self.max_bytes > 0 or self.max_msgs > 0)

    @property
    def forgets(self) -> bool:
        """Whether old content goes by itself."""
        return self.drops or self.ttl > 0

    @property
    def is_nearly_full(self) -> bool:
        """Whether the next large object may be over a limit."""
        return self.bytes > NEARLY * self.max_bytes > 0 or self.messages > NEARLY * self.max_msgs > 0

    @property
    def read_only_because(self) -> str | None:
        """Why natsfs must not write here: the stream is closed for writing, or would lose data silently."""
        if self.sealed:
            return "it is sealed"
        if self.mirror:
            return "it is a mirror"
        if self.max_msgs_per_subject > 0:
            return "its stream keeps a limited number of messages for each subject and would drop chunks"
        if self.drops:
            return "its stream discards old messages at its limit and would drop chunks"
        return None


class Store:
    def __init__(self, config: Config) -> None:
        options = config.options
        self._config = config
        self._limit = options.timeout
        self._api = f"$JS.{options.domain}.API" if options.domain else "$JS.API"
        self._chunk_size = options.chunk_size
        self._op_prefix = secrets.token_hex(6)
        self.courtesy = Courtesy()
        self._mark = f"{OP_HEADER}: {self._op_prefix}.".encode()
        self._ops = 0
        self._receiver: Receiver | None
        self._closed = False
        self._watches: dict[str, _Watched] = {}
        self._running: set[_Watched] = set()
        self._nursery: trio.Nursery
        self._quick: Wire
        self._bulk: Wire
        self._news: Wire
        self._fetcher: Fetcher
        self._publisher: Publisher

    # --- life -------------------------------------------------------------------------------------------------

    async def open(self, nursery: trio.Nursery, receiver: Receiver | None = None) -> None:
        """Connect and check that JetStream answers. Raises `MountError`.

        The wires live in `nursery`, which has to outlive every other use of the store. Nothing is watched without a
        `receiver`.
        """
        self._nursery, self._receiver = nursery, receiver
        config = self._config
        where = ", ".join(config.servers)
        login = Login(config.servers, config.credentials)
        await login.check()
        self._quick = Wire("metadata", config.servers, login, lambda: nursery.start_soon(self._list_again))
        self._bulk = Wire("chunks", config.servers, login)
        # Core NATS advisories: an account may forbid them, then polling alone finds such changes.
        advisories = {
            "$JS.EVENT.ADVISORY.API": self._advisory,
            "$JS.EVENT.ADVISORY.STREAM.*.>": self._stream_advisory,
        }
        self._news = Wire("watches", config.servers, login, self._reconnected, advisories, SMALL_ROOM)
        for wire in (self._quick, self._bulk, self._news):
            with trio.move_on_after(WIRE_LIMIT) as scope:
                await nursery.start(wire.run)
            if scope.cancelled_caught:
                raise MountError(f"cannot connect to the NATS server at {where} again: {wire.last_error}")
        self._fetcher = Fetcher(self._quick, self._bulk, self._api, self._limit, self._scan)
        self._publisher = Publisher(self._quick, self._api, self._fetcher, self._limit)
        try:
            await self._quick.api(f"{self._api}.INFO", None, 5)
        except NoResponders:
            domain = f" in domain {config.options.domain!r}" if config.options.domain else ""
            raise MountError(
                f"the NATS server at {where} has no JetStream{domain}; start it with JetStream (nats-server -js)"
            ) from None
        except StoreError as error:
            raise MountError(f"JetStream at {where} does not answer: {error}") from None

    def _hint(self, hint: Hint) -> None:
        if self._receiver is not None and not self._closed:
            self._receiver.hint(hint)

    async def _list_again(self) -> None:
        """The wire is back: what was listed before may be of another store. Most watches have noticed themselves."""
        await trio.sleep(RELIST)
        for watched in self._watches.values():
            watched.watch.outdated()

    async def _scan(self, bucket: str, subject: str) -> tuple[list[int], list[int]]:
        return await persist(lambda: scan(self._news, self._api, bucket, subject), self._limit)

    async def close(self) -> None:
        """Stop the watches; the connections end with their nursery. Bounded in time; again is harmless."""
        self._closed = True
        with trio.CancelScope(shield=True):
            # Not only those that are followed: one that `unwatch` was ending has its consumer still to delete.
            for watched in self._running:
                watched.scope.cancel()
            for watched in list(self._running):
                await watched.ended.wait()

    def _reconnected(self) -> None:
        for watched in self._watches.values():
            watched.watch.again()
        self._hint(BucketsChanged())

    # --- advisories -------------------------------------------------------------------------------------------

    def _advisory(self, message: Message | StoreError) -> None:
        """A purge, or the deletion of a message, leaves none in the stream; the server's audit trail tells of it."""
        if isinstance(message, StoreError):
            return
        try:
            data = json.loads(message.data)
            subject = str(data.get("subject", ""))
            request = str(data.get("request", ""))
            action, _, stream = subject.rpartition(".")
            if not stream.startswith("OBJ_") or not action.endswith((".STREAM.PURGE", ".STREAM.MSG.DELETE")):
                return
            bucket = stream.removeprefix("OBJ_")
            body = json.loads(request) if request else {}
            purged = body.get("filter", "")
            deleted = int(body["seq"]) if action.endswith(".STREAM.MSG.DELETE") else None
        except (ValueError, AttributeError, KeyError):
            return
        metadata = f"$O.{bucket}.M."
        if purged.startswith(f"$O.{bucket}.C.") and not purged.endswith((">", "*")):
            return
        exact = purged.startswith(metadata) and not purged.endswith((">", "*"))
        watched = self._watches.get(bucket)
        if watched is not None and not self._closed:
            watched.watch.suspect(deleted or (purged if exact else None))

    def _stream_advisory(self, message: Message | StoreError) -> None:
        if isinstance(message, Message):
            self._hint(BucketsChanged())

    # --- buckets ----------------------------------------------------------------------------------------------

    async def _call_api(self, subject: str, body: dict[str, Any] | None) -> dict[str, Any]:
        async def attempt() -> dict[str, Any]:
            return await self._quick.api(f"{self._api}.{subject}", body, min(self._limit, API_LIMIT))

        return await persist(attempt, self._limit)

    async def buckets(self) -> list[BucketInfo]:
        """All buckets of the account, from the stream list, page by page."""
        found: list[BucketInfo] = []
        offset = 0
        while True:
            data = await self._call_api("STREAM.LIST", {"offset": offset})
            streams = data.get("streams") or []
            found += [BucketInfo.of(s) for s in streams if s["config"]["name"].startswith("OBJ_")]
            offset += len(streams)
            if not streams or offset >= int(data.get("total", 0)):
                return found

    async def bucket(self, name: str) -> BucketInfo:
        """Raises `BucketGone` if it does not exist."""
        return BucketInfo.of(await self._call_api(f"STREAM.INFO.OBJ_{name}", None))

    async def account(self) -> dict[str, Any]:
        """$JS.API.INFO: use and limits of the account."""
        return await self._call_api("INFO", None)

    async def create_bucket(self, name: str) -> BucketInfo:
        """The stream that every client's create call makes (ADR-20). Raises `BucketExists`."""
        config = {
            "name": f"OBJ_{name}",
            "subjects": [f"$O.{name}.C.>", f"$O.{name}.M.>"],
            "retention": "limits",
            "discard": "new",
            "storage": "file",
            "num_replicas": 1,
            "max_consumers": -1,
            "max_msgs": -1,
            "max_bytes": -1,
            "max_age": 0,
            "max_msgs_per_subject": -1,
            "max_msg_size": -1,
            "duplicate_window": int(120e9),
            "allow_rollup_hdrs": True,
            "allow_direct": True,
        }
        for delay in STORE_DELAYS:
            try:
                return BucketInfo.of(await self._call_api(f"STREAM.CREATE.OBJ_{name}", config))
            except ApiError as error:
                # A server that removes the last other stream takes the folder of all streams away at that moment.
                if error.err_code != NO_STORE:
                    raise
                log.info("bucket %s is created again: %s", name, error)
                await trio.sleep(delay)
        return BucketInfo.of(await self._call_api(f"STREAM.CREATE.OBJ_{name}", config))

    async def delete_bucket(self, name: str) -> None:
        await self._call_api(f"STREAM.DELETE.OBJ_{name}", None)

    async def subjects(self, bucket: str, pattern: str) -> dict[str, int]:
        """The subjects of a bucket that match `pattern`, with the number of their messages."""
        found: dict[str, int] = {}
        while True:
            body = {"subjects_filter": pattern, "offset": len(found)}
            info = await self._call_api(f"STREAM.INFO.OBJ_{bucket}", body)
            page = info["state"].get("subjects") or {}
            found |= page
            if not page or len(found) >= int(info.get("total") or 0):
                return found

    async def count_metadata(self, bucket: str) -> int:
        """How many metadata messages are stored, in a moment whatever their number.

        A direct get of one message tells how many follow; where the stream does not allow it, a consumer at its
        creation. A replica that lags may answer.
        """
        request = {"seq": 1, "next_by_subj": f"$O.{bucket}.M.>", "batch": 1}
        subject = f"{self._api}.DIRECT.GET.OBJ_{bucket}"
        limit = min(self._limit, API_LIMIT)
        try:
            message = await self._quick.request(subject, json.dumps(request).encode(), limit)
        except NoResponders:
            pending = None
        else:
            if message.status == 404:
                return 0
            pending = message.header(b"Nats-Num-Pending")
        if pending is not None:
            return int(pending) + 1
        return await persist(
            lambda: count(self._news, self._api, bucket, f"$O.{bucket}.M.>"), min(self._limit, API_LIMIT)
        )

    async def newest_of_each(self, bucket: str, take: Callable[[list[Message]], None]) -> None:
        """Give `take` the newest metadata message of each subject, without its content; again after an interruption.

        A replica that lags may tell.
        """
        await persist(
            lambda: newest_of_each(self._news, self._api, bucket, f"$O.{bucket}.M.>", take), self._limit
        )

    async def newest_metadata(self, bucket: str) -> int:
        """The sequence of the newest metadata message, by the word of the stream's leader; 0 if there is none."""
        message = await self._fetcher.leader_get(bucket, {"last_by_subj": f"$O.{bucket}.M.>"})
        return 0 if message is None else int(message["seq"])

    # --- watching ---------------------------------------------------------------------------------------------

    async def watch(self, bucket: str) -> None:
        """Begin to follow a bucket; `open` was told who is given its events."""
        if self._closed or bucket in self._watches:
            return
        assert self._receiver is not None
        watch = Watch(self._news, self._api, bucket, self._receiver, lambda: self._quick.generation)
        watched = self._watches[bucket] = _Watched(watch)
        self._running.add(watched)
        self._nursery.start_soon(self._run, watched, name=f"watch {bucket}")

    async def _run(self, watched: _Watched) -> None:
        try:
            with watched.scope:
                await watched.watch.run()
        finally:
            self._running.discard(watched)
            watched.ended.set()

    async def unwatch(self, bucket: str) -> None:
        watched = self._watches.pop(bucket, None)
        if watched is not None:
            watched.scope.cancel()
            await watched.ended.wait()

    def is_silent(self, bucket: str) -> bool:
        """Whether the watch of a bucket should have heard something by now, and has not."""
        watched = self._watches.get(bucket)
        return watched is None or watched.watch.is_silent

    # --- metadata ---------------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """Of the connection that metadata is published on; it rises with every reconnect."""
        return self._quick.generation

    @property
    def limit_of_metadata(self) -> int:
        return self._publisher.limit_of_metadata

    def new_op(self) -> str:
        """An operation id, to be registered in the catalog before its message is sent."""
        self._ops += 1
        return f"{self._op_prefix}.{self._ops}"

    def has_sent(self, message: Message) -> bool:
        """Whether a message of metadata is one that this mount has published."""
        return self._mark in message.headers

    async def publish(self, meta: Metadata, known: Known, op: str, content: bytes | None = None) -> int:
        """See `Publisher.metadata`, and with the content of a single chunk `Publisher.object`."""
        if content is not None:
            return await self._publisher.object(meta, content, known, op)
        return await paced(lambda: self._publisher.metadata(meta, known, op), self._limit)

    async def metadata(self, bucket: str, subject: str) -> Metadata | None:
        """The newest metadata message of a subject, by the word of the stream's leader; None if there is none."""
        message = await self._fetcher.leader_get(bucket, {"last_by_subj": subject})
        if message is None:
            return None
        op = None
        for line in base64.b64decode(message.get("hdrs") or "").decode("utf-8", "replace").splitlines():
            if line.startswith(OP_HEADER + ": "):
                op = line.partition(": ")[2].strip()
        try:
            return decode(
                base64.b64decode(message.get("data") or ""),
                subject=subject,
                seq=int(message["seq"]),
                time_ns=parse_time(message["time"]) or 0,
                op=op,
            )
        except MalformedMetadata as error:
            raise StoreError(f"the metadata on {subject} cannot be read: {error}") from None

    async def prove(self, bucket: str, uploaded: Uploaded | Metadata) -> bool:
        """Whether every chunk of a version is stored, by the word of the leader."""
        return await self._publisher.prove(bucket, uploaded)

    async def purge_chunks(self, bucket: str, nuid: str) -> None:
        if NUID.fullmatch(nuid) is None:
            # Other clients may have put anything there; ``>`` would remove the chunks of all objects.
            raise StoreError(f"{nuid!r} is no nuid; nothing is purged")
        await self._publisher.purge(bucket, f"$O.{bucket}.C.{nuid}", None)

    # --- chunks -----------------------------------------------------------------------------------------------

    async def layout(self, meta: Metadata) -> tuple[Layout, list[bytes]]:
        return await self._fetcher.layout(meta)

    async def single(self, metas: list[Metadata]) -> dict[str, tuple[Layout, bytes]]:
        """See `Fetcher.single`."""
        return await self._fetcher.single(metas)

    async def chunks(
        self,
        bucket: str,
        nuid: str,
        layout: Layout,
        index: int,
        count: int,
        sent: Callable[[], None] | None = None,
    ) -> list[bytes]:
        """See `Fetcher.chunks`."""
        return await self._fetcher.chunks(bucket, nuid, layout, index, count, sent)

    @property
    def chunk_size(self) -> int:
        """Bytes of a chunk of new content: what was asked for, as far as the server's messages may be so long."""
        return min(self._chunk_size, self._quick.max_payload - HEADERS_ROOM)

    def new_upload(self, bucket: str) -> StoreUpload:
        return StoreUpload(self, bucket)


class _Watched:
    """A watch at work: what ends it, and what tells that it has ended."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.scope = trio.CancelScope()
        self.ended = trio.Event()


class StoreUpload:
    """An `Upload` with what it needs of the store. Not to be used by two tasks at once."""

    def __init__(self, store: Store, bucket: str) -> None:
        self._store = store
        self._bucket = bucket
        self._upload = Upload(store._bulk, bucket, store.chunk_size, store._limit, store.courtesy)

    @property
    def position(self) -> int:
        return self._upload.position

    @property
    def stored(self) -> int:
        """Bytes of content that the server has acknowledged."""
        return self._upload.stored

    async def append(
        self, segments: list[Segment], read: Read, base: tuple[Metadata, Layout] | None = None
    ) -> None:
        source = None if base is None else Base(self._store._fetcher, *base)
        await self._upload.append(segments, read, source)

    async def finish(self) -> Uploaded:
        """All chunks are stored and acknowledged. Raises what went wrong; `abort` is due then."""

        uploaded = await self._upload.finish()
        if self._upload.needs_proof and not await self._store._publisher.prove(self._bucket, uploaded):
            raise Unreachable("chunks of a long upload were lost on the way")
        return uploaded

    async def abort(self) -> None:
        """Purge what was stored; best effort, within a few seconds."""
        if not self._upload.stored_any:
            return
        with trio.CancelScope(shield=True), trio.move_on_after(5):
            try:
                await self._upload.settle()
                await self._store.purge_chunks(self._bucket, self._upload.nuid)
            except (BucketGone, ApiError):
                pass
            except StoreError as error:
                log.warning("chunks of an unfinished upload (%s) stay behind: %s", self._upload.nuid, error)
