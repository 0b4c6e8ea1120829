"""The chunks in memory. Pure and synchronous.

A segmented LRU: a chunk comes in on probation, and is protected once bytes of it are read that had been read before.
So a scan of a large file, which reads everything once, pushes out what is on probation and nothing else.
"""

from __future__ import annotations

import sys
from typing import Final

from cachetools import LRUCache

Key = tuple[str, str, int]  # bucket, nuid, index

ENTRY: Final = 300  # bytes of the key and the bookkeeping, so that the limit is on the real use
PROTECTED: Final = (
    0.75  # of the limit at most; chunks on probation may have all that the protected ones leave
)
END: Final = sys.maxsize


class _Entry:
    __slots__ = ("data", "seen")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.seen = 0  # how far the chunk was read; a scan reads each byte once and goes on from here


def _weight(entry: _Entry) -> int:
    return len(entry.data) + ENTRY


class ChunkCache:
    """`limit` is in bytes and holds for all chunks together. One of more than a quarter of it is not kept."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._most_protected = int(limit * PROTECTED)
        self._probation: LRUCache[Key, _Entry] = LRUCache(limit, getsizeof=_weight)
        self._protected: LRUCache[Key, _Entry] = LRUCache(limit, getsizeof=_weight)

    @property
    def used(self) -> int:
        return int(self._probation.currsize + self._protected.currsize)

    def __contains__(self, key: Key) -> bool:
        return key in self._protected or key in self._probation

    def was_read(self, key: Key) -> bool:
        """Whether the chunk is here, and somebody has had bytes of it."""
        return key in self._protected or (key in self._probation and self._probation[key].seen > 0)

    def get(self, key: Key, start: int = 0, end: int = END) -> bytes | None:
        """The chunk, of which the bytes [start, end) are about to be read."""
        if key in self._protected:
            return self._protected[key].data
        if key not in self._probation:
            return None
        entry = self._probation[key]
        if start >= entry.seen:
            entry.seen = min(end, len(entry.data))
        else:
            self._protect(key, entry)
        return entry.data

    def _protect(self, key: Key, entry: _Entry) -> None:
        del self._probation[key]
        self._protected[key] = entry
        while self._protected.currsize > self._most_protected:
            demoted, left = self._protected.popitem()
            left.seen = END  # one more touch is enough for it
            self._probation[demoted] = left

    def put(self, key: Key, data: bytes) -> None:
        """A chunk of which nothing is read yet. One that is there already stays what it is."""
        size = len(data) + ENTRY
        if size > self.limit // 4 or key in self:
            return
        while self.used + size > self.limit:
            # The chunks on probation have at least a quarter, so there is one unless all of them are protected.
            (self._probation or self._protected).popitem()
        self._probation[key] = _Entry(data)
