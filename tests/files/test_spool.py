"""A spool file against a plain byte array, and what is on the disk of both at any time."""

from __future__ import annotations

import errno
import resource
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from natsfs.files import spool as module
from natsfs.files.manifest import Manifest
from natsfs.files.spool import PIECES, SMALL, TAIL, TAILS, Spool, SpoolFile
from natsfs.store.segments import Spooled, Zeros
from tests.support import noise, raises

UNIT = 4096  # bytes

offsets = st.integers(0, 300)
sizes = st.integers(1, 100)
LIMITS = {"SMALL": 50, "TAIL": 80, "PIECES": 6}  # in place of the real ones, so that all cases are met soon


def on_disk(spool: Spool) -> bytes:
    """What is in the one file that holds something."""
    (content,) = [data for path in spool._folder.iterdir() if (data := path.read_bytes())] or [b""]
    return content


class SpoolMachine(RuleBasedStateMachine):
    """`model` is what has been written, and `states` what that was after each change since it was last on the disk."""

    @initialize()
    def start(self) -> None:
        self.patch = pytest.MonkeyPatch()
        for name, value in LIMITS.items():
            self.patch.setattr(module, name, value)
        self.directory = tempfile.TemporaryDirectory()
        self.spool = Spool(self.directory.name, 0)
        self.file = self.spool.create()
        self.model = bytearray()
        self.states = [b""]
        self.tick = 0

    def teardown(self) -> None:
        if hasattr(self, "spool"):
            self.file.discard()
            assert (self.spool.gathered, self.spool.gathering, self.spool.used) == (0, set(), 0)
            assert on_disk(self.spool) == b""
            self.spool.close()
            self.directory.cleanup()
            self.patch.undo()

    def changed(self) -> None:
        self.states.append(bytes(self.model))

    def put(self, offset: int, size: int) -> None:
        self.tick += 1
        data = bytes([self.tick % 256]) * size
        self.file.write(data, offset, 0)
        self.model += bytes(max(0, offset - len(self.model)))
        self.model[offset : offset + size] = data
        self.changed()

    @rule(size=sizes)
    def append(self, size: int) -> None:
        self.put(len(self.model), size)

    @rule(size=st.integers(1, 20), count=st.integers(1, 9))
    def append_often(self, size: int, count: int) -> None:
        for _ in range(count):
            self.put(len(self.model), size)

    @rule(offset=offsets, size=sizes)
    def write(self, offset: int, size: int) -> None:
        self.put(offset, size)

    @rule(size=offsets)
    def truncate(self, size: int) -> None:
        self.file.truncate(size)
        del self.model[size:]
        self.model += bytes(size - len(self.model))
        self.changed()

    @rule(back=sizes)
    def truncate_the_end(self, back: int) -> None:
        self.truncate(max(0, len(self.model) - back))

    @rule()
    def flush(self) -> None:
        self.spool.flush()
        assert not self.spool.gathering
        assert on_disk(self.spool) == self.model
        self.states = [bytes(self.model)]

    @rule(offset=offsets, size=sizes)
    def read(self, offset: int, size: int) -> None:
        assert self.file.read(offset, offset + size) == self.model[offset : offset + size]

    @rule(back=sizes, size=sizes)
    def read_at_the_end(self, back: int, size: int) -> None:
        self.read(max(0, len(self.model) - back), size)

    @rule()
    def use_again(self) -> None:
        self.file.discard()
        self.file = self.spool.create()
        assert self.file.read(0, UNIT) == b""
        self.model.clear()
        self.states = [b""]

    @invariant()
    def a_kill_would_leave_what_was(self) -> None:
        """Nothing that came later without what came before; a truncation may have taken more than it should."""
        if hasattr(self, "spool"):
            left = on_disk(self.spool)
            assert any(state.startswith(left) for state in self.states)
            assert self.spool.gathered <= LIMITS["TAIL"]


TestSpool = SpoolMachine.TestCase
TestSpool.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(str(tmp_path), 0)
    yield made
    made.close()


@contextmanager
def full_at(size: int) -> Iterator[None]:
    """No file takes bytes from `size` on: EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def write(file: SpoolFile, data: bytes, offset: int) -> None:
    file.write(data, offset, len(data))


def test_small_writes_go_out_together(spool: Spool) -> None:
    file = spool.create()
    for number in range(PIECES):
        write(file, b"%d" % (number % 10), number)
    assert on_disk(spool) == b""
    write(file, b"x", PIECES)
    assert len(on_disk(spool)) == PIECES, "a system call takes no more"
    file.truncate(0)
    for number in range(TAIL // UNIT):
        write(file, bytes(UNIT), number * UNIT)
    assert on_disk(spool) == b""
    write(file, bytes(UNIT), TAIL)
    assert len(on_disk(spool)) == TAIL
    write(file, bytes(SMALL), TAIL + UNIT)
    assert len(on_disk(spool)) == TAIL + UNIT + SMALL, "a large one goes out behind what was gathered"
    file.discard()


def test_a_small_file_never_meets_the_disk(spool: Spool) -> None:
    file = spool.create()
    before = file.modified_ns
    file.truncate(0)
    write(file, b"content", 0)
    assert file.read(0, 100) == b"content"
    assert (on_disk(spool), file.modified_ns) == (b"", before)
    file.discard()
    assert spool.create().read(0, 100) == b""


def test_all_files_together_have_a_bounded_part_of_the_memory(spool: Spool) -> None:
    """Where that is used up small writes go out as well, in order."""
    data = noise(TAIL)
    files = [spool.create() for _ in range(TAILS // TAIL + 10)]
    for start in range(0, TAIL, UNIT):
        for file in files:
            write(file, data[start : start + UNIT], start)
        assert spool.gathered <= TAILS
    assert spool.gathered > TAILS - TAIL
    for file in files:
        assert file.read(0, TAIL) == data
    spool.flush()
    assert (spool.gathered, spool.gathering) == (0, set())
    for file in files:
        assert file.read(0, TAIL) == data
        file.discard()


def test_a_full_disk(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    """What was gathered stays, and whoever writes next hears of it."""
    data = noise(5 * UNIT)
    file = spool.create()
    write(file, data[:-UNIT], 0)
    with full_at(3 * UNIT):
        spool.flush()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        spool.flush()
        assert len(caplog.records) == 1
        for offset in (4 * UNIT, 0, 100 * UNIT):
            with raises(errno.EFBIG):
                write(file, bytes(UNIT), offset)
        with raises(errno.EFBIG):
            file.truncate(100 * UNIT)
        assert file.read(0, 100 * UNIT) == data[:-UNIT]
        assert (spool.used, spool.gathered) == (4 * UNIT, UNIT)
        file.truncate(3 * UNIT + 10)
        assert file.read(0, 100 * UNIT) == data[: 3 * UNIT + 10]
        with raises(errno.EFBIG):
            file.flush()
    write(file, data[3 * UNIT + 10 :], 3 * UNIT + 10)
    spool.flush()
    assert (on_disk(spool), spool.gathered) == (data, 0)
    with full_at(UNIT):
        with raises(errno.EFBIG):
            write(file, bytes(SMALL), 0)
        assert spool.used == 4 * UNIT + len(data) - 3 * UNIT - 10, "what was not taken in is not counted"
    file.discard()
    assert spool.used == 0


def manifest(*segments: Spooled | Zeros) -> Manifest:
    return Manifest(
        source="nats://h/b",
        options={},
        bucket="b",
        name="n",
        size=segments[-1].end,
        base=None,
        below=0,
        segments=segments,
        attributes={},
        description=None,
        headers=None,
        reason="because",
        time_ns=1,
    )


def test_what_is_kept_is_on_the_disk(spool: Spool) -> None:
    file = spool.create()
    write(file, b"content", 0)
    kept = file.keep(manifest(Spooled(0, 7)))
    assert kept.read_bytes() == b"content"
    assert (spool.gathered, spool.gathering, spool.used) == (0, set(), 0)


def test_what_cannot_be_kept_is_named(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    file = spool.create()
    write(file, bytes(3 * UNIT), 0)
    file.flush()
    write(file, bytes(UNIT), 5 * UNIT)
    with full_at(5 * UNIT + 10):
        kept = file.keep(
            manifest(Spooled(0, 3 * UNIT), Zeros(3 * UNIT, 5 * UNIT), Spooled(5 * UNIT, 6 * UNIT))
        )
    lost = (5 * UNIT + 10, 6 * UNIT)
    assert f"bytes {lost[0]}-{lost[1] - 1} of n are lost" in caplog.text
    told = Manifest.decode(kept.with_suffix(".json").read_text())
    assert told.lost == (lost,)
    assert told.segments is not None
    assert told.segments[2:] == (Spooled(5 * UNIT, lost[0]), Zeros(*lost))
    assert (spool.gathered, spool.gathering, spool.used) == (0, set(), 0)
