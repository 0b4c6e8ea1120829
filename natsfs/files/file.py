"""A file while it is open or has uncommitted data: its overlay, its spool, and the commit of both.

The dirty state belongs to the inode, not to a handle. `lock` orders commits, truncations and everything else that
must see the content at rest; a write waits for it only where it would change bytes that a commit is reading.

States of the content (`dirty`, `_reading`):

    clean      nothing to commit; an overlay may still hold what was committed, as a cache, until the last release
    dirty      writes or a truncation since the last commit
    committing [0, _reading) is being read; writes behind it go on, writes into it wait
    failed     as clean: the data was put aside, the inode shows what the store holds
"""

from __future__ import annotations

import errno
import logging
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from natsfs.catalog.attributes import EXTENDS_KEY, SYMLINK_KEY, has_append, with_append
from natsfs.catalog.bucket import Bucket
from natsfs.catalog.inodes import ContentChanged, Effect, EntryChanged, Inode
from natsfs.catalog.metadata import Metadata, new_nuid
from natsfs.errors import BucketFull, ChunksGone, Conflict, StoreError, Unreachable
from natsfs.files.keeping import complete, describe
from natsfs.files.manifest import is_settled
from natsfs.files.overlay import Overlay
from natsfs.files.pace import EARLY, Pace
from natsfs.files.reader import Sequence, Version
from natsfs.files.spool import SpoolFile
from natsfs.locks import Lock
from natsfs.store.publish import BLOCK, Uploaded, small, spooled
from natsfs.store.segments import Spooled, Zeros
from natsfs.store.store import StoreUpload

if TYPE_CHECKING:
    from natsfs.files.files import Files

log = logging.getLogger(__name__)

AT_ONCE = 256 * 1024  # bytes of content that may go out together with the metadata, if they are one chunk
EMPTY_DIGEST = "SHA-256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU="
REBASES = 100  # at moving what was appended onto the version that another writer has published meanwhile
ATTEMPTS = 10  # at a commit that others' commits of the same name keep overtaking


def _whole(overlay: Overlay, spool: SpoolFile, size: int) -> bytes:
    """The whole content of a file that shows nothing of a version below."""
    return b"".join(
        spooled(spool.read, s.start, s.end) if isinstance(s, Spooled) else bytes(s.end - s.start)
        for s in overlay.segments(0, size)
    )


class Overtaken(Conflict):
    """The version that the content builds on is no longer the newest one, which is `current`."""

    def __init__(self, name: str, current: Metadata | None, seq: int) -> None:
        super().__init__(f"{name!r} was replaced by somebody else meanwhile", seq)
        self.current = current


class File:
    def __init__(self, files: Files, inode: Inode) -> None:
        self._files = files
        self._volume = files.volume
        self.inode = inode
        self.handles = 0
        self.writers = 0
        self.lock = Lock()
        # Held while a message for the name is under way; always taken before the bucket's lock on names.
        self.publishing = Lock()
        self.dirty = False
        self.attributes_dirty = False
        self.settling = False  # whether a task waits to store the attributes; it counts as a handle
        # Whether the content depends on that of the version below: then that must still be current at the commit.
        self.builds_on_base = False
        # Where the uncommitted bytes begin if all of them were written at the end, through O_APPEND; else None.
        self._appended_from: int | None = None
        # Versions with what was appended whose metadata was sent, or nearly: up to where, and the generation. It is not
        # known of them whether they were stored.
        self._tried: dict[str, tuple[int, int]] = {}
        self._overlay: Overlay | None = None
        self._spool: SpoolFile | None = None
        self._base: Version | None = None
        self._fetched: Version | None = None  # of which what was not written has been asked for
        self._generation = 0
        self._reading = 0
        self._upload: StoreUpload | None = None
        self._taken = 0  # bytes from the start on that the upload has read, or is reading at this moment
        self._early: trio.Event | None = None  # set when the early publisher has stopped
        self._no_early = False
        self._held_back = False  # whether something new may go out early, and does not yet
        self._commit_done = trio.Event()
        # Commits that failed, for the handles that have not heard of them, and why the last one did.
        self.failures = 0
        self.last_error: StoreError | None = None
        self.pace = Pace(time.monotonic())

    # --- the version below ------------------------------------------------------------------------------------

    def version(self) -> Version | None:
        """The committed version that this inode shows; None if there is none, or it is empty."""
        meta = self.inode.meta
        if self._overlay is None and (
            self._base is None or meta is None or self._base.meta.nuid != meta.nuid
        ):
            self._set_base(meta)
        return self._base

    def _set_base(self, meta: Metadata | None) -> None:
        if self._base is not None:
            self._volume.reader.release(self._base)
        self._base = self._volume.reader.acquire(meta) if meta is not None and meta.size else None

    def _layer(self) -> tuple[Overlay, SpoolFile]:
        """The overlay and its spool file, made at the first change."""
        if self._overlay is None or self._spool is None:
            self.version()
            self._spool = self._files.volume.spool.create()
            self._overlay = Overlay(self.inode.size)
            self.inode.layered = True
            self.builds_on_base = self.inode.size > 0
        return self._overlay, self._spool

    # --- reading ----------------------------------------------------------------------------------------------

    async def read(self, offset: int, size: int, sequence: Sequence) -> bytes:
        """Up to the end of the file. Raises `StoreError`."""
        overlay = self._overlay
        if overlay is None:
            version = self.version()
            if version is None:
                return b""
            return await self._volume.reader.read(version, offset, offset + size, sequence)
        spool, base = self._spool, self._base
        assert spool is not None
        parts: list[bytes] = []
        for segment in overlay.segments(offset, offset + size):
            match segment:
                case Spooled(start, end):
                    # A truncation may have come between; whatever follows has to stay at its offset.
                    parts.append(spool.read(start, end).ljust(end - start, b"\0"))
                case Zeros(start, end):
                    parts.append(bytes(end - start))
                case _:
                    assert base is not None
                    parts.append(await self._volume.reader.read(base, segment.start, segment.end, sequence))
                    if self._overlay is not overlay:
                        # The last handle's commit failed meanwhile and the inode went back to the store's content.
                        return await self.read(offset, size, sequence)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    # --- writing ----------------------------------------------------------------------------------------------

    async def write(self, offset: int, data: bytes, *, append: bool) -> int:
        self._check_kept()
        while True:
            at = self.inode.size if append else offset
            if at >= self._reading:
                break
            # A commit is reading these bytes: they have to stay what they are until it is done.
            await self._commit_done.wait()
        overlay, spool = self._layer()
        if not append:
            self._appended_from = None
        elif not self.dirty:
            self._appended_from = at
        if append and at != offset:
            # The kernel has put these bytes where it took the end to be; others have appended since.
            changed = ContentChanged(self.inode.ino, offset + len(data), at + len(data))
            self._volume.notifier.send([changed])
        self._volume.notifier.sized(self.inode.ino, offset + len(data))
        start, end = at, at + len(data)
        spool.write(data, start, overlay.missing(start, end))
        front = overlay.front
        overlay.write(start, end)
        self._changed(overlay)
        base = self._base
        if base is not None and base is not self._fetched and overlay.front < overlay.kept:
            # The commit will want it, and others may replace it at any time: then what is kept has to be whole.
            self._fetched = base
            self._volume.reader.fetch_soon(base)
        if self._upload is not None and start < self._taken:
            self._no_early = True  # what was published is no longer the content; the commit starts over
        elif not self._no_early and overlay.front > front:
            self._held_back = True
            ahead = overlay.front - (self._upload.position if self._upload is not None else 0)
            if self.pace.goes_out(ahead, len(data)):
                self._publish_early(overlay)
        return len(data)

    def _check_kept(self) -> None:
        """After a failed first commit the file has no name and no content in the store: nothing more is taken in."""
        if self.last_error is not None and self.inode.meta is None and self.inode.unlinked:
            raise self.last_error

    async def truncate(self, size: int) -> None:
        self._check_kept()
        while size < self._reading:
            await self._commit_done.wait()
        self._volume.notifier.sized(self.inode.ino, size)
        if self._overlay is None and size == self.inode.size and size:
            self._touch()
            return
        overlay, spool = self._layer()
        if self.inode.meta is None and not self.inode.size and not size:
            # A file that is new here begins with this; it may be new elsewhere at the same time.
            self._appended_from = 0
        elif size != self.inode.size or not size:
            self._appended_from = None
        if self._upload is not None and size < self._taken:
            self._no_early = True
        before = overlay.written
        spool.truncate(size)
        overlay.truncate(size)
        spool.account(overlay.written - before)
        if overlay.kept == 0:
            self.builds_on_base = False
        self._changed(overlay)

    def _changed(self, overlay: Overlay) -> None:
        self.inode.size = overlay.size
        self.dirty = True
        self._generation += 1
        self.pace.wrote(time.monotonic())
        self._touch()

    def _touch(self) -> None:
        now = time.time_ns()
        attributes = self.inode.attributes
        attributes.mtime_ns = attributes.ctime_ns = now
        self.attributes_dirty = True
        self.inode.uncommitted = True

    # --- early publishing -------------------------------------------------------------------------------------

    def publish_what_rests(self, now: float) -> None:
        """What goes out in a go when the program writes on may do so while it does not."""
        overlay = self._overlay
        if self._held_back and overlay is not None and self.dirty and not self._no_early:
            position = self._upload.position if self._upload is not None else 0
            if self.pace.rests(overlay.front - position, now):
                self._publish_early(overlay)

    def _publish_early(self, overlay: Overlay) -> None:
        if self._early is None and not self._reading:
            self._held_back = False
            self._early = trio.Event()
            self._files.nursery.start_soon(self._early_loop, overlay, self._early)

    async def _early_loop(self, overlay: Overlay, stopped: trio.Event) -> None:
        """Publish what lies contiguous from the start, while the program goes on writing behind it."""
        try:
            assert self.inode.bucket is not None
            assert self._spool is not None
            if self._upload is None:
                self._upload, self._taken = self._volume.store.new_upload(self.inode.bucket.name), 0
            upload, read = self._upload, self._spool.read
            while (
                not self._no_early
                and not self._reading
                and self._overlay is overlay
                and self._upload is upload
            ):
                stop = upload.position + EARLY
                if stop > overlay.front:
                    break
                # From now on, and not only once it was read, a write below `stop` makes the upload worthless.
                self._taken = stop
                await upload.append([Spooled(upload.position, stop)], read)
        except Exception as error:
            # The commit starts over from the spool and reports what is wrong; here it must not end the daemon.
            log.info("early publishing of %s stopped: %s", self.inode.name, error)
            self._no_early = True
        finally:
            self._early = None
            self.pace.published(time.monotonic())
            stopped.set()

    async def _stop_early(self) -> None:
        """Wait until the early publisher has ended; `_reading` being set makes it."""
        while self._early is not None:
            await self._early.wait()

    async def _drop_upload(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            await upload.abort()

    # --- committing -------------------------------------------------------------------------------------------

    @property
    def needs_commit(self) -> bool:
        return (self.dirty or self.attributes_dirty) and not self.inode.unlinked

    async def commit(self, *, tentative: bool = False) -> None:
        """Make the store hold what the file holds now. Raises `StoreError`; the data was put aside then.

        A `tentative` commit, which nobody has asked for, leaves the file dirty instead: the next one tries again.
        Whatever else goes wrong on the way (the spool's disk, an answer that nobody foresaw) counts as such a failure.
        """
        async with self.lock:
            if not self.needs_commit:
                return
            try:
                if self.dirty:
                    await self._commit_on_newest()
                else:
                    self.attributes_dirty = False
                    async with self.publishing:
                        await self._files.publish_attributes(self.inode)
            except StoreError as error:
                if tentative:
                    self.attributes_dirty = True
                    log.info("%s stays uncommitted for now: %s", self.inode.name, error)
                    return
                await self._failed(error)
                raise
            except Exception as error:
                log.exception("the commit of %s failed", self.inode.name)
                failure = StoreError(f"the commit failed: {error}")
                await self._failed(failure)
                raise failure from error
            self.inode.uncommitted = self.dirty or self.attributes_dirty

    async def shown(self) -> None:
        """Wait until the kernel shows what was committed; it may take the name for another's, or for nobody's.

        Another call may have the directory meanwhile, and wait for the store.
        """
        node, notifier = self.inode.node, self._volume.notifier
        directory = None if node is None or node.parent is None else node.parent.inode
        ino = 0 if directory is None else directory.ino
        if (node is not None and notifier.owes(ino, node.name)) or notifier.keeps(self.inode.ino):
            await notifier.told_of(self.inode.ino, ino, self._volume.config.options.timeout)

    async def _commit_on_newest(self) -> None:
        """Commit; what was only appended is moved behind what others have appended or written meanwhile."""
        for attempt in range(REBASES):
            try:
                try:
                    await self._commit_content()
                except ChunksGone:
                    # Other clients purge what they replace before anybody can read it to the end.
                    catalog, meta = self.inode.bucket, self.inode.meta
                    if catalog is None or meta is None:
                        raise
                    await self._volume.refresh(catalog, meta.subject)
                    there = catalog.live(meta.subject)
                    if there is None or there.nuid == meta.nuid:
                        raise
                    raise Overtaken(self.inode.name, there, there.seq) from None
            except Overtaken as overtaken:
                if not self._can_move(overtaken.current):
                    raise
                self._no_early = True
                await self._stop_early()
                await self._drop_upload()
                # The more often it was overtaken the longer it waits, so that everybody comes to a turn.
                await trio.sleep(random.uniform(0, 0.002 * min(attempt, 20)))
                catalog = self.inode.bucket
                current = catalog.live(overtaken.current.subject) if catalog and overtaken.current else None
                if current is None or not self._can_move(current):
                    raise
                if self._move_onto(current):
                    return
            else:
                return
        raise Conflict(f"{self.inode.name!r} is replaced by others all the time", 0)

    def _can_move(self, current: Metadata | None) -> bool:
        return (
            self._appended_from is not None
            and current is not None
            and current.link is None
            and not current.is_marker
            and SYMLINK_KEY not in (current.attributes or {})
        )

    def _move_onto(self, current: Metadata) -> bool:
        """Without a wait in between: the bytes that were appended follow on the content of `current`.

        True if all of them are in there already: a version was stored whose answer was lost, and others have appended
        to it since.
        """
        old_overlay, old_spool, start = self._overlay, self._spool, self._appended_from
        assert old_overlay is not None
        assert old_spool is not None
        assert start is not None
        stored = -1
        for nuid, (end, generation) in self._tried.items():
            if has_append(current.attributes, self._files.mount, nuid):
                start, stored = end, generation
        self._tried.clear()
        is_whole = stored == self._generation
        overlay, spool = Overlay(current.size), self._volume.spool.create()
        try:
            at, end = start, old_overlay.size
            while at < end:
                data = spooled(old_spool.read, at, min(end, at + BLOCK))
                place = current.size + at - start
                spool.write(data, place, len(data))
                overlay.write(place, place + len(data))
                at += len(data)
        except BaseException:
            spool.discard()
            raise
        self._volume.notifier.send([ContentChanged(self.inode.ino, self.inode.size, overlay.size)])
        self._overlay, self._spool = overlay, spool
        old_spool.discard()
        self._set_base(current)
        self.inode.meta = current
        self.inode.size = overlay.size
        self.builds_on_base = True
        self._appended_from = current.size
        self._no_early = False
        self._generation += 1
        self.dirty = not is_whole
        return is_whole

    async def _commit_content(self, *, at_once: bool = True) -> None:
        """Upload and publish; a small file with its metadata, `at_once`, where that is possible."""
        overlay, spool = self._overlay, self._spool
        assert overlay is not None
        assert spool is not None
        catalog = self.inode.bucket
        assert catalog is not None
        self._volume.check_writable(catalog)
        generation, size = self._generation, overlay.size
        # From here on nothing in [0, size) changes until `_reading` goes down again. An empty file has nothing to
        # protect, but a truncation to nothing must not slip in between either.
        self._reading = size
        self._held_back = False
        self._commit_done = trio.Event()
        try:
            await self._stop_early()
            uploaded: Uploaded | None
            chunk_size = self._volume.store.chunk_size
            if at_once and self._upload is None and 0 < size <= min(AT_ONCE, chunk_size) and not overlay.kept:
                uploaded = small(_whole(overlay, spool, size), chunk_size)
            else:
                uploaded = await self._upload_content(overlay, spool, size)
            if uploaded is not None:
                # These chunks belong to the metadata from here on: nothing is appended to them, and nobody but the
                # purger, which asks whether an object has them, may remove them.
                self._upload, self._no_early = None, False
                if self._appended_from is not None:
                    self._tried[uploaded.nuid] = size, generation
        finally:
            self._reading = 0
            self._commit_done.set()
        published = refused = again = False
        meta = None
        try:
            meta = await self._publish_content(catalog, uploaded)
            published, refused = meta is not None, meta is None
        except StoreError as error:
            refused = not isinstance(error, Unreachable)
            # Where it is not known whether the chunk is stored: the whole of it again, step by step, with another nuid.
            again = uploaded is not None and uploaded.content is not None and not isinstance(error, Conflict)
            if not again:
                raise
            log.info("%s is committed step by step: %s", self.inode.name, error)
        finally:
            if uploaded is not None and not published:
                subject = catalog.subject_of(self.inode.name)
                self._volume.discard_unless_live(catalog, uploaded.nuid, subject, refused=refused)
        if again:
            await self._commit_content(at_once=False)
            return
        if meta is None:
            return
        # The new version's bytes are those of the overlay, so what is in the spool stays good as a cache of it; and
        # what shows through from below stays the same, at the same offsets.
        self._tried.clear()
        self._set_base(meta)
        self.pace.committed(size, time.monotonic())
        self.builds_on_base = bool(overlay.size)
        if self._appended_from is not None:
            self._appended_from = size
        if self._generation == generation:
            self.dirty = False
            overlay.kept = size

    async def _upload_content(self, overlay: Overlay, spool: SpoolFile, size: int) -> Uploaded | None:
        """Bring all chunks of [0, size) into the store. A lost connection means another try, from the start."""
        catalog = self.inode.bucket
        assert catalog is not None
        if self._no_early:
            await self._drop_upload()
        if not size:
            await self._drop_upload()
            return None
        base = None
        if self._base is not None and overlay.kept:
            base = (self._base.meta, await self._volume.reader.layout(self._base))
        limit = self._volume.config.options.timeout
        deadline, most, hurried = trio.current_time() + limit, 0, False
        while True:
            if self._upload is None:
                self._upload, self._taken = self._volume.store.new_upload(catalog.name), 0
            upload = self._upload
            try:
                await upload.append(overlay.segments(upload.position, size), spool.read, base)
                return await upload.finish()
            except ChunksGone:
                await self._drop_upload()
                raise
            except StoreError as error:
                if upload.stored > most:
                    deadline, most = trio.current_time() + limit, upload.stored
                await self._drop_upload()
                if isinstance(error, BucketFull) and not hurried and self._volume.purges.hurry(catalog.name):
                    # What waits for its grace time to pass is room.
                    hurried = True
                    await self._volume.purges.settle(catalog.name)
                    continue
                if error.errno != errno.ETIMEDOUT or trio.current_time() > deadline:
                    raise
                log.warning("the upload of %s starts again: %s", self.inode.name, error)
                await trio.sleep(0.1)

    async def _publish_content(self, catalog: Bucket, uploaded: Uploaded | None) -> Metadata | None:
        """Publish the metadata that makes the uploaded chunks the object's content; None if the file was removed."""
        inode = self.inode
        volume = self._volume
        content = uploaded.content if uploaded is not None else None
        async with self.publishing, volume.mounted_of(catalog).names.shared():
            for _ in range(ATTEMPTS):
                if inode.unlinked:
                    return None
                node = inode.node or catalog.file_node(inode.name)
                subject = catalog.subject_of(inode.name, node)
                current = catalog.live(subject)
                expected = catalog.last_seq(subject)
                if (
                    self.builds_on_base
                    and (inode.meta is None or current is None or current.nuid != inode.meta.nuid)
                ) or (inode.meta is None and current is not None and self._appended_from == 0):
                    raise Overtaken(inode.name, current, expected)
                kept = inode.meta or current
                self.attributes_dirty = False
                edits = inode.edits
                meta = Metadata(
                    name=inode.name,
                    bucket=catalog.name,
                    nuid=uploaded.nuid if uploaded else new_nuid(),
                    size=uploaded.size if uploaded else 0,
                    chunks=uploaded.chunks if uploaded else 0,
                    chunk_size=uploaded.chunk_size if uploaded else volume.config.options.chunk_size,
                    digest=uploaded.digest if uploaded else EMPTY_DIGEST,
                    description=kept.description if kept else None,
                    headers=kept.headers if kept else None,
                    attributes=kept.attributes if kept else None,
                    other=kept.other if kept else None,
                    subject=subject,
                )
                async with volume.operation(catalog) as operation:
                    try:
                        stored = await operation.publish(self._described(meta), expected, content)
                    except Conflict:
                        await volume.refresh(catalog, subject)
                        content = None
                    else:
                        operation.apply(stored, inode)
                        inode.edits_stored(edits)
                        return stored
                # An attempt whose acknowledgement was lost may have been stored, and replaced by somebody who then
                # removed its chunks: they are counted before they are promised again.
                if uploaded is not None and not await volume.store.prove(catalog.name, uploaded):
                    raise Unreachable(f"the chunks of {inode.name!r} were lost on the way")
        raise Conflict(f"{inode.name!r} is replaced by others all the time", 0)

    def _described(self, meta: Metadata) -> Metadata:
        """The message of a commit. Of what was only appended it says so: others then let the file grow in place."""
        described, base = self.inode.describe(meta), self.inode.meta
        attributes = dict(described.attributes or {})
        if self._appended_from is not None:
            attributes = with_append(attributes, self._files.mount, meta.nuid)
        if self.builds_on_base and base is not None and self._appended_from == base.size:
            attributes[EXTENDS_KEY] = f"{base.nuid} {base.size}"
        return replace(described, attributes=attributes)

    async def _failed(self, error: StoreError) -> None:
        """Put what could not be committed aside, and show again what the store holds."""
        self.failures += 1
        self.last_error = error
        # A write that comes meanwhile is kept with the rest, and nothing of it is to be in another upload.
        self._no_early = True
        await self._stop_early()
        await self._drop_upload()
        inode = self.inode
        where: Path | None = None
        overlay, spool, base = self._overlay, self._spool, self._base
        if self.dirty and spool is not None and overlay is not None:
            if base is not None and not isinstance(error, Unreachable):
                await complete(overlay, spool, base, self._volume.reader)
            # From here to the layer's end without a wait: what is written later is of what the store holds.
            where = spool.keep(describe(self._volume.config, inode, overlay, base, reason=str(error)))
            self._spool = None
        self.drop_layer()
        self.dirty = self.attributes_dirty = self.builds_on_base = self._no_early = False
        self._tried.clear()
        inode.uncommitted = False
        before, inode.size = inode.size, inode.meta.size if inode.meta else 0
        if inode.bucket is not None:
            inode.bucket.restore_attributes(inode)
        self._set_base(inode.meta)
        effects: list[Effect] = [ContentChanged(inode.ino, before, inode.size)]
        node = inode.node
        if inode.meta is None:
            inode.unlinked = True
        if inode.meta is None and node is not None and node.parent is not None and inode.bucket is not None:
            # It never was in the store: the name goes, too.
            inode.bucket.drop_node(node)
            if node.parent.inode is not None:
                effects.append(EntryChanged(node.parent.inode.ino, node.name, inode.ino))
        self._volume.notifier.send(effects)
        self._files.report_unsaved(inode, error, where)
        await self._volume.notifier.told()  # whoever hears of the failure sees what the store holds

    def note(self) -> None:
        """Say on the disk what the spool holds, in case that this process is killed, if that is news."""
        overlay, spool = self._overlay, self._spool
        if overlay is None or spool is None or not (spool.noted or (self.dirty and not self.inode.unlinked)):
            return
        try:
            spool.flush()
        except OSError:
            return  # what it would say is not on the disk
        # Where nothing shows of a version below, the spool file is the content, whatever else is written to it.
        name, modified = self.inode.name, spool.modified_ns
        told: object = name
        if overlay.kept or not self.dirty:
            told = (name, self.dirty, self._generation, is_settled(modified, time.time_ns()))
        if told == spool.noted:
            return
        manifest = describe(
            self._volume.config,
            self.inode,
            overlay,
            self._base,
            reason="",
            modified_ns=modified,
            saved=not self.dirty,
        )
        spool.note(manifest, told)

    # --- the end ----------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Nothing needs this any more: give back what it held. What is dirty here belongs to a removed file."""
        self._no_early = True
        await self._stop_early()
        await self._drop_upload()
        self.drop_layer()
        self._set_base(None)

    def drop_layer(self) -> None:
        if self._spool is not None:
            self._spool.discard()
            self._spool = None
        self._overlay = None
        self.inode.layered = False
