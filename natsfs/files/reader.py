"""Reading immutable versions: layout, caches of chunks, single flight, read-ahead, digest.

Everything about a version is keyed by its bucket and nuid and never goes stale. State belongs to the trio thread;
between two awaits nothing else touches it.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial

import trio
from cachetools import LRUCache

from natsfs.catalog.metadata import Metadata
from natsfs.errors import ChunksGone, Corrupt, StoreError
from natsfs.files.chunkcache import END, ChunkCache, Key
from natsfs.files.diskcache import LARGEST_LAYOUT, DiskCache, Names, pack_layout, unpack_layout
from natsfs.files.hashing import Hasher
from natsfs.locks import Lock
from natsfs.store.lanes import Courtesy, Long
from natsfs.store.layout import Layout
from natsfs.store.store import Store

log = logging.getLogger(__name__)

RUN = 1024 * 1024  # bytes that one request asks for while reading ahead
FIRST_WINDOW = 512 * 1024
LAST_WINDOW = 8 * 1024 * 1024
# Chunks that arrived ahead of their turn are kept for the digests up to this many bytes, of all versions together. What
# does not fit comes to its turn when it is read.
DIGEST_AHEAD = 16 * 1024 * 1024
LAYOUTS = 16384  # versions whose layout is remembered after they are closed; some 300 bytes each
SMALL = 1024 * 1024  # a file up to this size is read whole as soon as it is opened
SMALL_AHEAD = 4 * 1024 * 1024  # bytes of such files that are fetched before they are opened
RENEWALS = 16  # new versions of small files that are fetched at a time because the old ones were read

DISK_READERS = 4  # threads that read the disk cache at a time


@dataclass(slots=True)
class Digest:
    """The check of a version that is read from its start to its end, in whatever order the requests finish."""

    expected: bytes
    sha: hashlib._Hash = field(default_factory=hashlib.sha256)
    next: int = 0
    waiting: dict[int, bytes] = field(default_factory=dict)
    waiting_bytes: int = 0


class Version:
    """One version of an object, while somebody reads it."""

    def __init__(self, meta: Metadata, names: Names | None, courtesy: Courtesy) -> None:
        self.meta = meta
        self.names = names  # in the disk cache, if there is one
        self.layout: Layout | None = None
        # Where the content is cut, from the disk cache: enough to read what is there, and not for the server.
        self.cut: Layout | None = None
        self.lock = Lock()
        self.users = 0
        self.long = Long(courtesy)
        self.resting = Lock()
        self.digest: Digest | None = None
        if meta.digest and meta.digest.startswith("SHA-256="):
            try:
                self.digest = Digest(base64.urlsafe_b64decode(meta.digest[8:] + "=="))
            except ValueError:
                log.warning("%s has a digest that cannot be read: %r", meta.name, meta.digest)


class Flight:
    __slots__ = ("data", "done", "error")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.data: bytes | None = None
        self.error: StoreError | None = None


@dataclass(eq=False, slots=True)
class Sequence:
    """How one handle reads: where the next read would continue, and how far to read ahead (bytes)."""

    next: int = 0
    window: int = 0
    ahead: int = 0
    # Of the requests ahead, those that wait to be sent.
    unsent: set[trio.CancelScope] = field(default_factory=set)


class Reader:
    def __init__(
        self,
        store: Store,
        cache_size: int,
        nursery: trio.Nursery,
        disk: DiskCache | None,
        created: Callable[[str], str | None],
    ) -> None:
        """`created` tells when a bucket was, in the server's words; what is kept on disk is known by it."""
        self._store = store
        self._nursery = nursery
        self._disk = disk
        self._created = created
        self._disk_readers = trio.CapacityLimiter(DISK_READERS)
        self._cache = ChunkCache(cache_size)
        self._layouts: LRUCache[tuple[str, str], Layout] = LRUCache(LAYOUTS)
        self._cuts: LRUCache[tuple[str, str], Layout] = LRUCache(LAYOUTS)
        # Versions that turned out not to be what their digest says: a second reading finds most of the chunks in the
        # cache, and would not look at the digest again.
        self._corrupt: LRUCache[tuple[str, str], bool] = LRUCache(LAYOUTS)
        self._flights: dict[Key, Flight] = {}
        self._ahead = 0  # bytes that wait for the turn of a digest
        self._renewing = 0
        self._hasher = Hasher(nursery)
        self._versions: dict[tuple[str, str], Version] = {}
        self._window = max(FIRST_WINDOW, min(LAST_WINDOW, cache_size // 8))
        self._going_on: set[Sequence] = set()  # those that are read ahead

    # --- versions ---------------------------------------------------------------------------------------------

    def acquire(self, meta: Metadata) -> Version:
        key = (meta.bucket, meta.nuid)
        version = self._versions.get(key)
        if version is None:
            created = self._created(meta.bucket) if self._disk is not None else None
            version = self._versions[key] = Version(
                meta, None if created is None else Names(meta, created), self._store.courtesy
            )
        version.users += 1
        return version

    def release(self, version: Version) -> None:
        version.users -= 1
        key = (version.meta.bucket, version.meta.nuid)
        if version.users == 0 and self._versions.get(key) is version:
            del self._versions[key]
            if version.digest is not None:
                self._drop_ahead(version.digest)

    def in_use(self, bucket: str, nuid: str) -> bool:
        return (bucket, nuid) in self._versions

    async def layout(self, version: Version) -> Layout:
        """The layout as the server proves it."""
        async with version.lock:
            return await self._proven(version)

    async def _proven(self, version: Version) -> Layout:
        """`layout` for who holds the version's lock."""
        if version.layout is None:
            key = (version.meta.bucket, version.meta.nuid)
            layout = self._layouts.get(key)
            if layout is None:
                layout, chunks = await self._store.layout(version.meta)
                for index, data in enumerate(chunks):
                    await self._check(version, layout, index, data)
                self._know(version, layout, chunks)
            version.layout = layout
        return version.layout

    async def _cut(self, version: Version) -> Layout:
        """Where the content is cut: from the disk cache if it knows, without asking the server."""
        async with version.lock:
            if version.layout is None and version.cut is None:
                key = (version.meta.bucket, version.meta.nuid)
                version.cut = self._cuts.get(key)
                if version.cut is None and key not in self._layouts:
                    version.cut = await self._kept_cut(version)
                    if version.cut is not None:
                        self._cuts[key] = version.cut
            return version.layout or version.cut or await self._proven(version)

    def _know(self, version: Version, layout: Layout, chunks: list[bytes]) -> None:
        """The layout is proven; `chunks` are the first ones, or none."""
        for index, data in enumerate(chunks):
            self._put(version, index, data)
        self._layouts[version.meta.bucket, version.meta.nuid] = version.layout = layout
        if self._disk is not None and version.names is not None:
            packed = pack_layout(layout)
            if len(packed) <= LARGEST_LAYOUT:
                self._disk.put(version.names.layout, packed)

    def _is_on_disk(self, version: Version) -> bool:
        """Whether the disk cache has the version's layout, and so most likely its content, too."""
        return self._disk is not None and version.names is not None and self._disk.has(version.names.layout)

    async def opened(self, version: Version, *, prove: bool = False) -> None:
        """A reader has opened the version: a small one is fetched before open(2) returns, of another one it is proven
        that it is there where that is asked for.

        So it stays readable whatever happens to the object, and one that was replaced in this moment is noticed while
        the name can still be looked up again. Raises `ChunksGone` then. What else goes wrong is the read's to tell.
        """
        key = (version.meta.bucket, version.meta.nuid)
        if (
            not (0 < version.meta.size <= SMALL or prove)
            or version.layout is not None
            or key in self._layouts
        ):
            return
        try:
            if prove:
                await self.layout(version)
                return
            cut = await self._cut(version)
            for run in self._missing(version, 0, cut.count):
                await self._fetch(version, cut, *run)
            for index in range(cut.count):
                if (flight := self._flights.get((*key, index))) is not None:
                    await flight.done.wait()
        except ChunksGone:
            raise
        except StoreError as error:
            log.info("reading ahead in %s: %s", version.meta.name, error)

    def fetch_soon(self, version: Version) -> None:
        """Of a small version all that is there, while the caller goes on."""
        if version.meta.size <= SMALL:
            version.users += 1
            self._nursery.start_soon(self._fetch_small, version)

    async def _fetch_small(self, version: Version) -> None:
        try:
            await self.opened(version)
        except ChunksGone as error:
            log.debug("reading ahead in %s: %s", version.meta.name, error)  # replaced again meanwhile
        except Exception as error:
            log.info("reading ahead in %s: %s", version.meta.name, error)
        finally:
            self.release(version)

    def replaced(self, nuid: str, meta: Metadata) -> None:
        """Somebody else has put `meta` in the place of the version `nuid`.

        Whoever has read that is likely to read this, too: a small one is fetched while the kernel hears of it. A
        version that nobody reads ends that.
        """
        if (
            0 < meta.size <= SMALL
            and meta.nuid != nuid
            and self._renewing < RENEWALS
            and self._cache.was_read((meta.bucket, nuid, 0))
        ):
            self._renewing += 1
            self._nursery.start_soon(self._renew, self.acquire(meta))

    async def _renew(self, version: Version) -> None:
        try:
            await self._fetch_small(version)
        finally:
            self._renewing -= 1

    async def prepare(self, metas: list[Metadata]) -> None:
        """Fetch versions of one bucket that are likely to be opened next. Whoever opens one meanwhile waits for it.

        Those that are larger than `SMALL` are not.
        """
        together: list[Metadata] = []
        size = 0
        for meta in metas:
            if not 0 < meta.size <= SMALL or (meta.bucket, meta.nuid) in self._layouts:
                continue
            # Without a digest nothing would prove that the chunk is all there is.
            if meta.chunks != 1 or meta.size > meta.chunk_size or not meta.digest:
                version = self.acquire(meta)
                self.fetch_soon(version)
                self.release(version)
                continue
            if size + meta.size > RUN:
                await self._fetch_together(together)
                together, size = [], 0
            together.append(meta)
            size += meta.size
        await self._fetch_together(together)

    async def _fetch_together(self, metas: list[Metadata]) -> None:
        """Versions of one chunk each, with one request."""
        versions = [self.acquire(meta) for meta in metas if (meta.bucket, meta.nuid) not in self._layouts]
        try:
            async with AsyncExitStack() as stack:
                mine: dict[str, Version] = {}
                for version in versions:
                    known = version.layout is not None or self._is_on_disk(version)
                    if not known and not version.lock.locked():
                        await stack.enter_async_context(version.lock)
                        mine[version.meta.nuid] = version
                found = await self._store.single([v.meta for v in mine.values()]) if mine else {}
                for nuid, (layout, data) in found.items():
                    await self._check(mine[nuid], layout, 0, data)
                    self._know(mine[nuid], layout, [data])
        except Exception as error:
            log.info("reading files ahead: %s", error)
        finally:
            for version in versions:
                self.release(version)

    # --- reading ----------------------------------------------------------------------------------------------

    async def read(self, version: Version, start: int, end: int, sequence: Sequence | None = None) -> bytes:
        """The bytes [start, end), up to the size. Raises `ChunksGone`, `Corrupt`, `Unreachable`."""
        end = min(end, version.meta.size)
        if start >= end:
            return b""
        if (version.meta.bucket, version.meta.nuid) in self._corrupt:
            raise Corrupt(f"the content of {version.meta.name!r} does not match its digest")
        if rest := version.long.rest(time.monotonic(), end - start):
            # One after the other: the kernel asks for some MiB at a time.
            async with version.resting:
                await trio.sleep(rest)
        layout = version.layout or version.cut or await self._cut(version)
        first, last = layout.index(start), layout.index(end - 1)
        if sequence is not None:
            self._read_ahead(version, layout, sequence, start, end)
        skip = start - layout.start(first)
        parts = await self._chunks(version, layout, first, last + 1, skip, end - layout.start(last))
        if len(parts) == 1:
            data = parts[0]
            return data if not skip and len(data) == end - start else data[skip : skip + end - start]
        return b"".join(parts)[skip : skip + end - start]

    def _read_ahead(self, version: Version, layout: Layout, sequence: Sequence, start: int, end: int) -> None:
        """Keep a window of requests going in front of a sequential reader; it doubles as the reader goes on.

        The kernel sends the reads of its own read-ahead side by side, so a read counts as sequential if it is near
        where the last one ended.
        """
        if abs(start - sequence.next) > 2 * RUN or (start == 0 and end >= layout.size):
            self.turned(sequence)
            sequence.next = end
            return
        if end > sequence.next:
            sequence.next = end
        if not sequence.window:
            self._going_on.add(sequence)
            sequence.window = FIRST_WINDOW if start else 0
            if start == 0:
                sequence.window = FIRST_WINDOW // 2
        else:
            grown = sequence.window * (2 if sequence.ahead - end < sequence.window else 1)
            sequence.window = min(grown, self._widest())
        sequence.ahead = max(sequence.ahead, end)
        while sequence.ahead < min(end + sequence.window, layout.size):
            first = layout.index(sequence.ahead)
            stop = min(
                max(layout.index(min(layout.start(first) + RUN, layout.size) - 1), first) + 1, layout.count
            )
            if layout.start(stop) <= sequence.ahead:
                break
            version.users += 1
            scope = trio.CancelScope()
            sequence.unsent.add(scope)
            sent = partial(sequence.unsent.discard, scope)
            self._nursery.start_soon(self._prefetch, version, layout, first, stop, scope, sent)
            sequence.ahead = layout.start(stop)

    def _widest(self) -> int:
        """How far to read ahead for each of those who read on: together not more than for two of them."""
        return max(FIRST_WINDOW, min(self._window, 2 * self._window // max(len(self._going_on), 1)))

    def turned(self, sequence: Sequence) -> None:
        """Nobody reads on where the sequence was: what was not asked for yet is not needed.

        What is on its way comes anyway, since the server cannot be stopped, and stays in the cache.
        """
        sequence.window = sequence.ahead = 0
        self._going_on.discard(sequence)
        for scope in sequence.unsent:
            scope.cancel()
        sequence.unsent.clear()

    async def _prefetch(
        self,
        version: Version,
        layout: Layout,
        first: int,
        stop: int,
        scope: trio.CancelScope,
        sent: Callable[[], None],
    ) -> None:
        try:
            with scope:
                for run in self._missing(version, first, stop):
                    # While the run before was on its way, others may have asked for parts of this one.
                    for run_first, run_stop in self._missing(version, *run)[:1]:
                        await self._fetch(version, layout, run_first, run_stop, sent)
        except Exception as error:
            log.info("reading ahead in %s: %s", version.meta.name, error)
        finally:
            sent()
            self.release(version)

    def _missing(self, version: Version, first: int, stop: int) -> list[tuple[int, int]]:
        """Runs of chunks that are neither cached nor on their way."""
        bucket, nuid = version.meta.bucket, version.meta.nuid
        runs: list[tuple[int, int]] = []
        for index in range(first, stop):
            key = (bucket, nuid, index)
            if key in self._cache or key in self._flights:
                continue
            if runs and runs[-1][1] == index:
                runs[-1] = (runs[-1][0], index + 1)
            else:
                runs.append((index, index + 1))
        return runs

    async def _chunks(
        self, version: Version, layout: Layout, first: int, stop: int, skip: int = 0, end: int = END
    ) -> list[bytes]:
        """Chunks. Of the first one the first `skip` bytes are not read, and of the last one those from `end` on."""
        bucket, nuid = version.meta.bucket, version.meta.nuid
        parts: list[bytes] = []
        while (index := first + len(parts)) < stop:
            key = (bucket, nuid, index)
            data = self._cache.get(key, 0 if parts else skip, end if index == stop - 1 else END)
            if data is not None:
                if version.digest is not None:
                    await self._check(version, layout, index, data)
                parts.append(data)
            elif (flight := self._flights.get(key)) is not None:
                await flight.done.wait()
                if flight.error is not None:
                    raise flight.error
                if flight.data is not None:
                    self._cache.get(key, 0 if parts else skip, end if index == stop - 1 else END)
                    parts.append(flight.data)
            else:
                run = index
                while (
                    run < stop
                    and (bucket, nuid, run) not in self._cache
                    and (bucket, nuid, run) not in self._flights
                ):
                    run += 1
                # All of them at once: what the cache keeps of them is its own affair.
                for data in await self._fetch(version, layout, index, run):
                    index = first + len(parts)
                    self._cache.get(
                        (bucket, nuid, index), 0 if parts else skip, end if index == stop - 1 else END
                    )
                    parts.append(data)
        return parts

    async def _fetch(
        self, version: Version, layout: Layout, first: int, stop: int, sent: Callable[[], None] | None = None
    ) -> list[bytes]:
        """Get a run of chunks that nobody else is getting, for all who wait for them.

        `sent` is called when the server is asked.
        """
        meta = version.meta
        flights = []
        for index in range(first, stop):
            flight = self._flights[meta.bucket, meta.nuid, index] = Flight()
            flights.append(flight)
        try:
            data: list[bytes] = []
            kept = await self._kept(version, layout, first, stop)
            while (at := first + len(data)) < stop:
                if (chunk := kept.get(at)) is not None:
                    data.append(chunk)
                    continue
                # No single request over the store's own batch limit.
                upto = at + 1
                while (
                    upto < stop and upto not in kept and layout.start(upto + 1) - layout.start(at) <= 4 * RUN
                ):
                    upto += 1
                data += await self._from_server(version, layout, at, upto, sent)
            for index, chunk in zip(range(first, stop), data, strict=True):
                await self._check(version, layout, index, chunk)
            for index, chunk, flight in zip(range(first, stop), data, flights, strict=True):
                flight.data = chunk
                self._put(version, index, chunk, on_disk=index in kept)
            return data
        except StoreError as error:
            for flight in flights:
                flight.error = error
            raise
        finally:
            for index, flight in zip(range(first, stop), flights, strict=True):
                if self._flights.get((meta.bucket, meta.nuid, index)) is flight:
                    del self._flights[meta.bucket, meta.nuid, index]
                flight.done.set()  # cancelled: without data or error, whoever waits fetches for itself

    async def _from_server(
        self, version: Version, cut: Layout, first: int, stop: int, sent: Callable[[], None] | None
    ) -> list[bytes]:
        layout = version.layout or await self.layout(version)
        if not (layout is cut or layout.cuts_like(cut)):
            await self._forget(version)
            raise Corrupt(f"the content of {version.meta.name!r} is cut otherwise than it was")
        meta = version.meta
        return await self._store.chunks(meta.bucket, meta.nuid, layout, first, stop - first, sent)

    def _put(self, version: Version, index: int, data: bytes, *, on_disk: bool = False) -> None:
        self._cache.put((version.meta.bucket, version.meta.nuid, index), data)
        if self._disk is not None and version.names is not None and not on_disk:
            self._disk.put(version.names.chunk(index), data)

    # --- the disk ---------------------------------------------------------------------------------------------

    async def _kept(self, version: Version, layout: Layout, first: int, stop: int) -> dict[int, bytes]:
        """Those of some chunks that the disk cache has."""
        if self._disk is None or version.names is None:
            return {}
        names = {index: version.names.chunk(index) for index in range(first, stop)}
        names = {index: name for index, name in names.items() if self._disk.has(name)}
        if not names:
            return {}
        found = zip(names, await self._from_disk([*names.values()]), strict=True)
        return {
            index: data for index, data in found if data is not None and len(data) == layout.length(index)
        }

    async def _kept_cut(self, version: Version) -> Layout | None:
        if self._disk is None or version.names is None or not self._disk.has(version.names.layout):
            return None
        data = (await self._from_disk([version.names.layout]))[0]
        return unpack_layout(data, version.meta) if data is not None else None

    async def _from_disk(self, names: list[bytes]) -> list[bytes | None]:
        assert self._disk is not None
        return await trio.to_thread.run_sync(
            self._disk.read, names, abandon_on_cancel=True, limiter=self._disk_readers
        )

    async def _forget(self, version: Version) -> None:
        """What the disk cache has of the version is wrong."""
        self._cuts.pop((version.meta.bucket, version.meta.nuid), None)
        if self._disk is None or version.names is None:
            return
        names = version.names
        chunks = (names.chunk(index) for index in range(max(version.meta.chunks, 1)))
        await trio.to_thread.run_sync(self._disk.forget, (names.layout, *chunks))

    def _drop_ahead(self, digest: Digest) -> None:
        self._ahead -= digest.waiting_bytes
        digest.waiting.clear()
        digest.waiting_bytes = 0

    async def _check(self, version: Version, layout: Layout, index: int, data: bytes) -> None:
        """Feed the digest in order; raises `Corrupt` when the whole content turns out to be something else."""
        digest = version.digest
        if digest is None or index in digest.waiting:
            return
        if index < digest.next:
            if digest.next == layout.count:
                await self._judge(version, layout, digest)
            return
        if index != digest.next:
            if self._ahead + len(data) > DIGEST_AHEAD:
                self._drop_ahead(digest)
            elif version.users:
                digest.waiting[index] = data
                digest.waiting_bytes += len(data)
                self._ahead += len(data)
            return
        chunk: bytes | None = data
        while chunk is not None:
            digest.next += 1
            if layout.size > SMALL:
                self._hasher.update(digest.sha, chunk)
            else:
                digest.sha.update(chunk)
            chunk = digest.waiting.pop(digest.next, None)
            if chunk is not None:
                digest.waiting_bytes -= len(chunk)
                self._ahead -= len(chunk)
        if digest.next == layout.count:
            await self._judge(version, layout, digest)
        elif self._hasher.is_behind:
            await self._hasher.caught_up()

    async def _judge(self, version: Version, layout: Layout, digest: Digest) -> None:
        """All of the content is on its way through the digest."""
        if layout.size > SMALL:
            await self._hasher.caught_up()
        key = (version.meta.bucket, version.meta.nuid)
        if version.digest is digest:
            version.digest = None
            self._drop_ahead(digest)
            if digest.sha.digest() != digest.expected:
                self._corrupt[key] = True
                await self._forget(version)
                log.error("the content of %s (nuid %s) does not match its digest", version.meta.name, key[1])
        if key in self._corrupt:
            raise Corrupt(f"the content of {version.meta.name!r} does not match its digest")
