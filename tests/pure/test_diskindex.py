"""The index of the disk cache against a plain list."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from natsfs.files.diskindex import LEAST, DiskIndex, room_of

LIMIT = 20 * LEAST

names = st.integers(0, 15).map(lambda number: number.to_bytes(16, "big"))
sizes = st.integers(0, 12 * LEAST)


class IndexMachine(RuleBasedStateMachine):
    """`model` holds names and sizes, least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        self.index = DiskIndex(LIMIT)
        self.model: list[tuple[bytes, int]] = []

    def _without(self, name: bytes) -> list[tuple[bytes, int]]:
        return [entry for entry in self.model if entry[0] != name]

    def _used(self) -> int:
        return sum(room_of(size) for _, size in self.model)

    @rule(name=names, size=sizes)
    def put(self, name: bytes, size: int) -> None:
        if name in self.index:
            return
        gone = self.index.make_room(size)
        assert gone is not None
        assert self.index.used + room_of(size) <= LIMIT
        assert gone == [name for name, _ in self.model[: len(gone)]], "the least recently used ones"
        last = room_of(self.model[len(gone) - 1][1]) if gone else 0
        self.model = self.model[len(gone) :]
        assert not gone or self._used() + last + room_of(size) > LIMIT, "no more than has to go"
        self.index.add(name, size)
        self.model.append((name, size))

    @rule(name=names)
    def touch(self, name: bytes) -> None:
        self.index.touch(name)
        self.model = self._without(name) + [entry for entry in self.model if entry[0] == name]

    @rule(name=names)
    def remove(self, name: bytes) -> None:
        self.index.remove(name)
        self.model = self._without(name)

    @rule(amount=st.integers(0, 5 * LEAST))
    def give_up(self, amount: int) -> None:
        gone = self.index.give_up(amount)
        assert gone == [name for name, _ in self.model[: len(gone)]]
        freed = sum(room_of(size) for _, size in self.model[: len(gone)])
        assert freed >= amount or len(gone) == len(self.model)
        self.model = self.model[len(gone) :]

    @invariant()
    def holds_what_it_should(self) -> None:
        assert list(self.index) == [name for name, _ in self.model]
        assert all((name in self.index) for name, _ in self.model)
        assert self.index.used == self._used() <= LIMIT
        assert len(self.index) <= LIMIT // LEAST, "so the memory for it is bounded"


TestIndex = IndexMachine.TestCase


@pytest.mark.parametrize("size", [LIMIT + 1, 10 * LIMIT])
def test_what_never_fits_drives_nothing_out(size: int) -> None:
    index = DiskIndex(LIMIT)
    index.add(b"n", 1)
    assert index.make_room(size) is None
    assert b"n" in index
