"""What is in the disk cache, and what goes first. Pure and synchronous; the caller serializes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

# A small entry counts as so many bytes: each costs a file, and some 250 bytes of memory here, which this bounds.
LEAST: Final = 32 * 1024
_BLOCK: Final = 4096


def room_of(size: int) -> int:
    """What a file of `size` bytes counts for."""
    return max(LEAST, -(-size // _BLOCK) * _BLOCK)


class DiskIndex:
    """Entries by name, with the room they take (bytes); at most `limit` of it in all, least recently used first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._entries: OrderedDict[bytes, int] = OrderedDict()

    def __contains__(self, name: bytes) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[bytes]:
        """From the least recently used one on."""
        return iter(self._entries)

    def add(self, name: bytes, size: int) -> None:
        """An entry of a file of `size` bytes, for which `make_room` has made room."""
        self.remove(name)
        self._entries[name] = room_of(size)
        self.used += room_of(size)

    def touch(self, name: bytes) -> None:
        if name in self._entries:
            self._entries.move_to_end(name)

    def remove(self, name: bytes) -> None:
        self.used -= self._entries.pop(name, 0)

    def make_room(self, size: int) -> list[bytes] | None:
        """The names that have to go, and are gone here, before a file of `size` bytes comes; None: it never fits."""
        need = room_of(size)
        if need > self.limit:
            return None
        gone = []
        while self.used + need > self.limit:
            name, room = self._entries.popitem(last=False)
            self.used -= room
            gone.append(name)
        return gone

    def give_up(self, amount: int) -> list[bytes]:
        """Names that take `amount` bytes or more together, or all there are; they are gone here."""
        gone = []
        while amount > 0 and self._entries:
            name, room = self._entries.popitem(last=False)
            self.used -= room
            amount -= room
            gone.append(name)
        return gone
