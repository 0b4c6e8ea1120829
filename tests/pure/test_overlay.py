"""The overlay against a plain byte array that is changed in the same way."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from natsfs.files.overlay import Overlay
from natsfs.store.segments import Kept, Spooled, Zeros

BASE = 200  # largest version below
FAR = 260  # largest offset

offsets = st.integers(0, FAR)


class OverlayMachine(RuleBasedStateMachine):
    """`model` is what the file reads as, `written` which of its bytes are in the spool."""

    @initialize(size=st.integers(0, BASE))
    def start(self, size: int) -> None:
        self.base = bytes(1 + i % 250 for i in range(size))
        self.spool = bytearray(FAR * 2)
        self.model = bytearray(self.base)
        self.written = [False] * size
        self.overlay = Overlay(size)
        self.tick = 0

    @rule(start=offsets, length=st.integers(0, 60))
    def write(self, start: int, length: int) -> None:
        self.tick += 1
        data = bytes([self.tick % 256]) * length
        if length:
            grown = max(len(self.model), start + length) - len(self.model)
            self.model += bytes(grown)
            self.written += [False] * grown
            self.model[start : start + length] = data
            self.written[start : start + length] = [True] * length
        self.spool[start : start + length] = data
        self.overlay.write(start, start + length)

    @rule(size=offsets)
    def truncate(self, size: int) -> None:
        grown = max(0, size - len(self.model))
        del self.model[size:]
        del self.written[size:]
        self.model += bytes(grown)
        self.written += [False] * grown
        self.overlay.truncate(size)

    @rule(start=offsets, end=offsets)
    def part(self, start: int, end: int) -> None:
        self.compare(start, end)

    def compare(self, start: int, end: int) -> None:
        read = bytearray()
        at = start
        for segment in self.overlay.segments(start, end):
            assert segment.start == at < segment.end, "segments follow on each other and are not empty"
            at = segment.end
            match segment:
                case Spooled(a, b):
                    assert all(self.written[a:b])
                    read += self.spool[a:b]
                case Zeros(a, b):
                    assert not any(self.written[a:b])
                    read += bytes(b - a)
                case Kept(a, b):
                    assert b <= len(self.base)
                    assert not any(self.written[a:b])
                    read += self.base[a:b]
        assert read == self.model[start:end]

    @invariant()
    def same(self) -> None:
        self.compare(0, FAR * 2)
        assert self.overlay.size == len(self.model)
        assert self.overlay.written == sum(self.written)
        front = self.written.index(False) if False in self.written else len(self.written)
        assert self.overlay.front == front
        assert self.overlay.kept <= min(len(self.base), self.overlay.size)


TestOverlay = OverlayMachine.TestCase
TestOverlay.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
