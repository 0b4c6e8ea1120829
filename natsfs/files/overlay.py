"""What has been written over a version of a file: extents, a size, and how much of the version still shows. Pure."""

from __future__ import annotations

import bisect

from natsfs.store.segments import Kept, Segment, Spooled, Zeros


class Overlay:
    """`kept` is the number of leading bytes of the version below that show through where nothing was written.

    Bytes beyond `kept` that nobody wrote are NULs: a truncation cuts the version below for good, and growing the
    file again does not bring it back.
    """

    __slots__ = ("_ends", "_starts", "kept", "size")

    def __init__(self, size: int) -> None:
        """An overlay without writes over a version of `size` bytes."""
        self.size = size
        self.kept = size
        # Written extents, disjoint and not touching, in rising order.
        self._starts: list[int] = []
        self._ends: list[int] = []

    def write(self, start: int, end: int) -> None:
        if start >= end:
            return
        self.size = max(self.size, end)
        ends = self._ends
        if ends and start == ends[-1]:  # it follows on the last one, as most writes do
            ends[-1] = end
            return
        # Extents that overlap or touch [start, end) melt into one with it.
        low = bisect.bisect_left(self._ends, start)
        high = bisect.bisect_right(self._starts, end)
        if low < high:
            start = min(start, self._starts[low])
            end = max(end, self._ends[high - 1])
        self._starts[low:high] = [start]
        self._ends[low:high] = [end]

    def truncate(self, size: int) -> None:
        self.kept = min(self.kept, size)
        place = bisect.bisect_left(self._starts, size)
        del self._starts[place:]
        del self._ends[place:]
        if self._ends and self._ends[-1] > size:
            self._ends[-1] = size
        self.size = size

    @property
    def front(self) -> int:
        """How many bytes from the start on have been written without a gap."""
        return self._ends[0] if self._starts and self._starts[0] == 0 else 0

    @property
    def written(self) -> int:
        """Bytes in extents: what the spool file really occupies, holes left out."""
        return sum(self._ends) - sum(self._starts)

    def missing(self, start: int, end: int) -> int:
        """How many bytes of [start, end) are in no extent."""
        if not self._ends or start >= self._ends[-1]:
            return end - start
        return end - start - sum(s.end - s.start for s in self.segments(start, end) if isinstance(s, Spooled))

    @property
    def extents(self) -> int:
        """How many they are."""
        return len(self._starts)

    def segments(self, start: int, end: int) -> list[Segment]:
        """What [start, end) is made of, in order; it ends at the size."""
        end = min(end, self.size)
        found: list[Segment] = []
        place = bisect.bisect_right(self._ends, start)
        while start < end:
            if place < len(self._starts) and self._starts[place] <= start:
                stop = min(end, self._ends[place])
                found.append(Spooled(start, stop))
                place += 1
            else:
                stop = min(end, self._starts[place] if place < len(self._starts) else end)
                if start < self.kept:
                    stop = min(stop, self.kept)
                    found.append(Kept(start, stop))
                else:
                    found.append(Zeros(start, stop))
            start = stop
        return found
