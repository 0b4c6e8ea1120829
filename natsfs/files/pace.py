"""How often a file that stays open is committed, and when its content goes out before. Pure; times are seconds of any
steady clock.

Every commit uploads the whole file. fsync(2) and the last close(2) ask for one; the close of a duplicate (each child of
a shell closes its standard output) and a file that nobody closes (a daemon's log) do not insist: they get theirs as
long as all uploads together stay within `FACTOR` times the file's size.
"""

from __future__ import annotations

FACTOR = 3
SMALL = 16 * 1024  # bytes of a file for which a commit costs less than finding out whether it could wait
IDLE = 5.0  # a file that is open and has not been written for so long is committed
# A file that is written all the time is committed when its size could have been uploaded at this rate meanwhile: a log
# is slower than that, a copy faster.
RATE = 1024 * 1024
STEADY = 30.0  # and not more often than this
# Early publishing begins when so many bytes lie contiguous in front of what was published; smaller files go out whole
# when they are closed.
EARLY = 1024 * 1024
# Who writes in smaller pieces than this waits for an answer all the time, and for much longer where the daemon has
# something else to do: what they write goes out in a go, as late as this.
PIECE = 32 * 1024
PATIENCE = 0.5


class Pace:
    __slots__ = ("_committed", "_published", "_uploaded", "_written")

    def __init__(self, now: float) -> None:
        self._uploaded = 0
        self._written = now
        self._committed = self._published = now

    def wrote(self, now: float) -> None:
        self._written = now

    def committed(self, size: int, now: float) -> None:
        """A commit has uploaded `size` bytes."""
        self._uploaded += size
        self._committed = now

    def published(self, now: float) -> None:
        """What was written has gone out early."""
        self._published = now

    def goes_out(self, ahead: int, piece: int) -> bool:
        """Whether `ahead` bytes, of which the last `piece` were written just now, go out while the program goes on."""
        return ahead >= EARLY and (piece >= PIECE or self._written - self._published >= PATIENCE)

    def rests(self, ahead: int, now: float) -> bool:
        """Whether `ahead` bytes go out although nobody writes."""
        return ahead >= EARLY and now - self._written >= PATIENCE

    def affordable(self, size: int) -> bool:
        """Whether a commit that nobody insists on may be made now."""
        return size <= SMALL or self._uploaded + size <= FACTOR * size

    def due(self, size: int, now: float) -> bool:
        """Whether a file that is open and dirty should be committed now."""
        since = now - self._committed
        resting = now - self._written >= IDLE
        return self.affordable(size) and (resting or (since >= STEADY and size <= RATE * since))
