"""What a file tells of content that is not in the store, for `natsfs recover`."""

from __future__ import annotations

import logging
import time

import trio

from natsfs.catalog.inodes import Inode
from natsfs.config import Config
from natsfs.errors import ChunksGone, StoreError
from natsfs.files.manifest import Manifest
from natsfs.files.overlay import Overlay
from natsfs.files.reader import Reader, Sequence, Version
from natsfs.files.spool import SpoolFile
from natsfs.options import LOGIN
from natsfs.store.segments import Kept

log = logging.getLogger(__name__)

# What a failed commit fetches at most, so that what is kept needs nothing of a version that may soon be gone.
MOST = 64 * 1024 * 1024  # bytes
LIMIT = 5.0  # seconds
MOST_EXTENTS = 1024  # that a note tells of: it is made again and again, and each takes some 3 us


def describe(
    config: Config,
    inode: Inode,
    overlay: Overlay,
    base: Version | None,
    *,
    reason: str,
    modified_ns: int = 0,
    saved: bool = False,
) -> Manifest:
    """With `modified_ns` it is a note, see `Manifest`."""
    current = inode.current()
    segments = None
    if not modified_ns or overlay.extents <= MOST_EXTENTS:
        segments = tuple(overlay.segments(0, overlay.size))
    shows = segments is None or any(isinstance(segment, Kept) for segment in segments)
    login = {name: getattr(config.options, name) for name in LOGIN}
    return Manifest(
        source=config.display_source,
        options={name: value for name, value in login.items() if value is not None},
        bucket=inode.bucket.name if inode.bucket else None,
        name=inode.name,
        size=overlay.size,
        base=base.meta if base is not None and overlay.kept and shows else None,
        below=overlay.kept,
        segments=segments,
        attributes=inode.attributes.encode(current.attributes),
        description=current.description,
        headers=current.headers,
        reason=reason,
        time_ns=time.time_ns(),
        modified_ns=modified_ns,
        saved=saved,
    )


async def complete(overlay: Overlay, spool: SpoolFile, base: Version, reader: Reader) -> None:
    """Fetch what shows of `base`, as far as it is there: other clients purge what they have replaced."""
    kept = [segment for segment in overlay.segments(0, overlay.size) if isinstance(segment, Kept)]
    if sum(segment.end - segment.start for segment in kept) > MOST:
        return
    sequence, step = Sequence(), base.meta.chunk_size
    with trio.move_on_after(LIMIT):
        for segment in kept:
            at = segment.start
            while at < segment.end:
                stop = min(segment.end, (at // step + 1) * step)
                try:
                    data = await reader.read(base, at, stop, sequence)
                    _fill(overlay, spool, at, data)
                except ChunksGone:
                    pass  # others may be in the cache
                except (StoreError, OSError) as error:
                    log.info("what is kept of %s stays without the rest: %s", base.meta.name, error)
                    return
                at = stop


def _fill(overlay: Overlay, spool: SpoolFile, at: int, data: bytes) -> None:
    """Where nothing was written meanwhile."""
    for segment in overlay.segments(at, at + len(data)):
        if isinstance(segment, Kept):
            start, end = segment.start, segment.end
            spool.write(data[start - at : end - at], start, end - start)
            overlay.write(start, end)
