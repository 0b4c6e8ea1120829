"""Which connection a read of chunks takes, and when what is long makes room for what is short. Pure.

The wire of the metadata is empty most of the time. That of the chunks has up to 4 MiB of an upload on their way, and
the server answers a request behind them when it has stored them. So a read that brings little takes the first one. A
read that brings much does not: the server works on a connection's requests one after the other, and commits would wait.
"""

from __future__ import annotations

from math import inf

QUICK_READ = 256 * 1024  # bytes that one request may bring beside the metadata
QUICK_ROOM = 1024 * 1024  # bytes that may be on their way there, of all such requests together

# A long copy, the daemon and the server are more than two cores have time for: who wants something small beside them
# waits for a core each time. So what goes on for longer than LONG rests for a while at each of its parts where a small
# thing was asked for a moment ago. The files of a tree do not slow each other down so: they are gone by then. With
# longer moments (10 ms) `ls -l` beside a copy was some quicker, and the copy beside an `ls` each 50 ms much slower.
LONG = 0.1  # seconds; after a pause of so long something else begins
RECENT = 0.004
REST = 0.004  # seconds for each MiB
MIB = 1024 * 1024


class Courtesy:
    """What is short, and was asked for: a name, an opened file, a few KiB, another client's change."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def asked(self) -> None:
        self.count += 1


class Long:
    """Something that may be long: it makes room for what is short then. Times are seconds of any steady clock."""

    __slots__ = ("_asked", "_began", "_courtesy", "_last", "_seen", "_size")

    def __init__(self, courtesy: Courtesy) -> None:
        self._courtesy, self._seen = courtesy, courtesy.count
        self._began = self._last = self._asked = -inf
        self._size = 0  # bytes that it is to rest for and did not yet: the loop cannot wait for less than a millisecond

    def rest(self, now: float, size: int) -> float:
        """Seconds for which it is to rest `now`, at a part of `size` bytes."""
        if now - self._last > LONG:
            self._began = now
        self._last = now
        if self._seen != self._courtesy.count:
            self._seen, self._asked = self._courtesy.count, now
        if now - self._began <= LONG or now - self._asked >= RECENT:
            self._size = 0
            return 0.0
        self._size += size
        if self._size < MIB:
            return 0.0
        due, self._size = REST * self._size / MIB, 0
        return due


def is_quick(expected: int, outstanding: int) -> bool:
    """Whether a request for about `expected` bytes of chunks travels with the metadata.

    `outstanding` bytes are awaited there already.
    """
    return expected <= QUICK_READ and outstanding + expected <= QUICK_ROOM
