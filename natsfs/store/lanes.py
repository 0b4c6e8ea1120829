"""Which connection a read of chunks takes, and when what is long makes room for what is short. Pure.

The wire of the metadata is empty most of the time. That of the chunks has up to 4 MiB of an upload on their way, and
the server answers a request behind them when it has stored them. So a read that brings little takes the first one. A
read that brings much does not: the server works on a connection's requests one after the other, and commits would wait.
"""

from __future__ import annotations

QUICK_READ = 256 * 1024  # bytes that one request may bring beside the metadata
QUICK_ROOM = 1024 * 1024  # bytes that may be on their way there, of all such requests together

# A long upload, the server that stores it, and the program that writes are more than two cores have time for: who wants
# something small beside them waits for a core each time. So an upload that is older than LONG rests for so long before
# its next MiB, as often as something small was asked for during the last one. The files of a tree do not slow each
# other down so: they are gone by then.
LONG = 0.1  # seconds
REST = 0.004


class Courtesy:
    """What is short, and was asked for: a name, an opened file, a few KiB, another client's change."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def asked(self) -> None:
        self.count += 1


class Long:
    """Something long, as far as it makes room for what is short."""

    __slots__ = ("_began", "_courtesy", "_seen")

    def __init__(self, courtesy: Courtesy, now: float) -> None:
        """It begins `now`, by any steady clock."""
        self._courtesy, self._began, self._seen = courtesy, now, courtesy.count

    def rest(self, now: float) -> float:
        """Seconds for which it is to rest now, after a part of its work."""
        seen, self._seen = self._seen, self._courtesy.count
        return REST if seen != self._seen and now - self._began > LONG else 0.0


def is_quick(expected: int, outstanding: int) -> bool:
    """Whether a request for about `expected` bytes of chunks travels with the metadata.

    `outstanding` bytes are awaited there already.
    """
    return expected <= QUICK_READ and outstanding + expected <= QUICK_ROOM
