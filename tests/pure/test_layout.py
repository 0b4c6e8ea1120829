"""Where chunks lie: what may be concluded from two messages, and what only from a scan."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import assume, example, given
from hypothesis import strategies as st

from natsfs.store.layout import Layout, irregular, prove_uniform, uniform

lengths_of_chunks = st.lists(st.integers(0, 9), min_size=1, max_size=30)
gaps = st.lists(st.integers(1, 5), min_size=40, max_size=40)


def sequences(steps: list[int], count: int, first: int = 7) -> list[int]:
    return [first - steps[0] + seq for seq in accumulate(steps[:count])]


@given(lengths=lengths_of_chunks, chunk_size=st.integers(1, 9), claimed=st.integers(1, 31))
def test_what_is_proved_uniform_is_uniform(lengths: list[int], chunk_size: int, claimed: int) -> None:
    """Whatever the chunks are, as long as none is over the size that the metadata names."""
    assume(max(lengths) <= chunk_size)
    if prove_uniform(sum(lengths), claimed, chunk_size, len(lengths), lengths[-1]):
        assert lengths[:-1] == [chunk_size] * (len(lengths) - 1)
        assert claimed == len(lengths)


@given(size=st.integers(1, 200), chunk_size=st.integers(1, 50))
def test_full_chunks_are_proved(size: int, chunk_size: int) -> None:
    count = -(-size // chunk_size)
    assert prove_uniform(size, count, chunk_size, count, size - (count - 1) * chunk_size)


def test_an_empty_chunk_at_the_end_is_not_uniform() -> None:
    assert not prove_uniform(20, 2, 10, 3, 0)
    assert not prove_uniform(20, 3, 10, 3, 0)
    assert not prove_uniform(0, 0, 10, 1, 0)


@given(size=st.integers(1, 300), chunk_size=st.integers(1, 50), steps=gaps)
def test_uniform_chunks(size: int, chunk_size: int, steps: list[int]) -> None:
    count = -(-size // chunk_size)
    assume(count <= len(steps))
    seqs = sequences(steps, count)
    layout = uniform(size, count, chunk_size, seqs[0], seqs[-1])
    for offset in range(size):
        index = layout.index(offset)
        assert layout.start(index) <= offset < layout.start(index + 1)
    assert sum(layout.length(index) for index in range(count)) == size
    contiguous = seqs == list(range(seqs[0], seqs[0] + count))
    assert (layout.first is not None) == contiguous
    for index, seq in enumerate(seqs):
        assert layout.agrees(index, seq, count - 1 - index)
        if layout.seq(index) is not None:
            assert (seqs[index - 1] if index else 0) < (layout.seq(index) or 0) <= seq


@given(lengths=lengths_of_chunks, steps=gaps)
@example(lengths=[0], steps=[1] * 40)
@example(lengths=[5, 5, 0], steps=[1] * 40)
def test_irregular_chunks(lengths: list[int], steps: list[int]) -> None:
    seqs = sequences(steps, len(lengths))
    size = sum(lengths)
    layout = irregular(size, lengths, seqs)
    assert layout is not None
    present = [(length, seq) for length, seq in zip(lengths, seqs, strict=True) if length]
    assert layout.count == len(present)
    content = b"".join(bytes([number]) * length for number, (length, _) in enumerate(present))
    for offset in range(size):
        assert layout.index(offset) == content[offset]
    for index, (length, seq) in enumerate(present):
        assert layout.length(index) == length
        assert layout.seq(index) == seq
        assert layout.agrees(index, seq, -1)
        assert not layout.agrees(index, seq + 1, -1)


@given(lengths=lengths_of_chunks, wrong=st.integers(1, 100))
def test_chunks_of_another_size_in_all_are_refused(lengths: list[int], wrong: int) -> None:
    seqs = list(range(1, len(lengths) + 1))
    assert irregular(sum(lengths) + wrong, lengths, seqs) is None


@given(steps=gaps, count=st.integers(2, 40), index=st.integers(0, 39))
@example(steps=[1, 1, 1, 50, *[1] * 36], count=4, index=2)
def test_a_search_ends_and_stays_between_what_is_known(steps: list[int], count: int, index: int) -> None:
    """The search that the fetcher makes, with a stream in which `seqs` belong to the object."""
    assume(index < count)
    seqs = sequences(steps, count)
    layout = Layout(count, count, 1, ranks=[0, count - 1], seqs=[seqs[0], seqs[-1]])
    ceiling: int | None = None
    for step in range(200):
        known = layout.seq(index)
        if known is not None:
            # A request for the object's messages from `known` on gets this chunk first.
            assert min(seq for seq in seqs if seq >= known) == seqs[index]
            return
        (low_rank, low), (high_rank, high) = layout.bracket(index)
        assert low_rank < index < high_rank
        probe = layout.guess(index, step, ceiling)
        assert low < probe < high, "a probe outside tells nothing new"
        found = min(seq for seq in seqs if seq >= probe)
        layout.learn(seqs.index(found), found)
        assert layout.seqs == sorted(layout.seqs)
        if seqs.index(found) > index:
            ceiling = probe
    raise AssertionError("the search does not end")


def test_a_message_behind_a_removed_chunk_is_not_taken_for_it() -> None:
    contiguous = uniform(30, 3, 10, 5, 7)
    assert contiguous.agrees(0, 5, 2)
    assert not contiguous.agrees(0, 6, 1)
    scattered = uniform(40, 4, 10, 5, 20)
    assert scattered.agrees(1, 9, 2)
    assert not scattered.agrees(1, 12, 1), "of the right length, but there are too few behind it"
    assert not scattered.agrees(0, 9, 2)
