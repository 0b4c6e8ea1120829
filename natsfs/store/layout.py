"""Where the chunks of an object lie in the stream, and how long they are. Pure.

All chunks of a version share one subject; their order is the stream's. Writers differ: most publish chunks of equal
size, some publish whatever a read returned, .NET adds an empty last message, and chunks of objects that were
written at the same time interleave. So nothing is computed from `max_chunk_size` before it is proved:

* `n` messages of at most `c` bytes, of which the last has ``size - (n - 1) * c`` bytes, can only sum up to `size`
  if all others have `c` bytes exactly;
* if the last sequence minus the first is ``n - 1``, no other message lies between.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from itertools import accumulate


@dataclass(slots=True)
class Layout:
    """`count` chunks carry data. `starts` holds their offsets if they are irregular, else they have `chunk_size`.

    `first` is the first chunk's sequence if the chunks are contiguous; otherwise `ranks` and `seqs` are parallel
    sorted lists of what is known, which grows with every reply.
    """

    size: int
    count: int
    chunk_size: int
    starts: list[int] | None = None
    first: int | None = None
    ranks: list[int] = field(default_factory=list)
    seqs: list[int] = field(default_factory=list)

    def index(self, offset: int) -> int:
        """The chunk that holds the byte at `offset` (0 <= offset < size)."""
        if self.starts is None:
            return offset // self.chunk_size
        return bisect.bisect_right(self.starts, offset) - 1

    def start(self, index: int) -> int:
        """The offset of a chunk's first byte; of `count`, the size."""
        if index >= self.count:
            return self.size
        return self.starts[index] if self.starts is not None else index * self.chunk_size

    def length(self, index: int) -> int:
        return self.start(index + 1) - self.start(index)

    def cuts_like(self, other: Layout) -> bool:
        """Whether both have the same chunks, wherever those lie."""
        return (self.size, self.count) == (other.size, other.count) and (
            self.chunk_size == other.chunk_size
            if self.starts is None and other.starts is None
            else all(self.start(index) == other.start(index) for index in range(self.count))
        )

    def seq(self, index: int) -> int | None:
        """The sequence to ask from in order to get this chunk first, if it is known."""
        if self.first is not None:
            return self.first + index
        place = bisect.bisect_right(self.ranks, index) - 1
        if place >= 0 and self.ranks[place] == index:
            return self.seqs[place]
        if place >= 0 and self.ranks[place] == index - 1:
            return self.seqs[place] + 1
        return None

    def agrees(self, index: int, seq: int, pending: int) -> bool:
        """Whether a message can be this chunk, by its sequence and how many of its subject follow (-1: unknown).

        A request for messages "from here on" silently starts at a later one where the first was removed.
        """
        if self.first is not None:
            return seq == self.first + index
        place = bisect.bisect_left(self.ranks, index)
        if place < len(self.ranks) and self.ranks[place] == index:
            return seq == self.seqs[place]
        # Uniform chunks have no empty message behind them, and of irregular ones every sequence is known.
        return pending == self.count - 1 - index

    def learn(self, index: int, seq: int) -> None:
        if self.first is not None:
            return
        place = bisect.bisect_left(self.ranks, index)
        if place == len(self.ranks) or self.ranks[place] != index:
            self.ranks.insert(place, index)
            self.seqs.insert(place, seq)

    def place(self, seqs: list[int]) -> None:
        """The sequences of all chunks, which are scattered, instead of what was known."""
        self.ranks, self.seqs = list(range(self.count)), seqs

    def bracket(self, index: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The nearest known (rank, seq) at or below `index`, and above it."""
        place = bisect.bisect_right(self.ranks, index)
        low = (self.ranks[place - 1], self.seqs[place - 1])
        high = (self.ranks[place], self.seqs[place]) if place < len(self.ranks) else low
        return low, high

    def guess(self, index: int, step: int, ceiling: int | None = None) -> int:
        """A sequence to probe for chunk `index`: interpolated, and every fourth time the middle.

        `ceiling` is a sequence that the chunk is known to lie below: a probe that only finds again what is known above
        says so, and without it the search would go on probing the same gap. Interpolation needs 1.5 to 1.8 probes where
        several writers ran at once; the middle bounds the worst case.
        """
        (low_rank, low_seq), (high_rank, high_seq) = self.bracket(index)
        if ceiling is not None:
            high_seq = min(high_seq, ceiling)
        if high_rank <= low_rank:
            return low_seq + 1
        if step % 4 == 3:
            seq = (low_seq + high_seq) // 2
        else:
            seq = low_seq + (high_seq - low_seq) * (index - low_rank) // (high_rank - low_rank)
        return max(low_seq + 1, min(seq, high_seq - 1))


def prove_uniform(size: int, chunks: int, chunk_size: int, total: int, last_length: int) -> bool:
    """Whether `total` messages, the last of `last_length` bytes, prove that all others are full."""
    if total != chunks or chunks < 1 or chunk_size < 1:
        return False
    expected = size - (chunks - 1) * chunk_size
    return 0 < expected <= chunk_size and last_length == expected


def uniform(size: int, chunks: int, chunk_size: int, first: int, last: int) -> Layout:
    """The layout of chunks that `prove_uniform` vouches for, with the sequences of the first and last one."""
    if last - first == chunks - 1:
        return Layout(size, chunks, chunk_size, first=first)
    return Layout(size, chunks, chunk_size, ranks=[0, chunks - 1], seqs=[first, last])


def irregular(size: int, lengths: list[int], seqs: list[int]) -> Layout | None:
    """The layout of a complete scan; None if the lengths do not sum up to `size`."""
    present = [(length, seq) for length, seq in zip(lengths, seqs, strict=True) if length]
    starts = [0, *accumulate(length for length, _ in present)]
    if starts.pop() != size:
        return None
    sequences = [seq for _, seq in present]
    if sequences and sequences[-1] - sequences[0] == len(sequences) - 1:
        return Layout(size, len(present), 0, starts=starts, first=sequences[0])
    return Layout(size, len(present), 0, starts=starts, ranks=list(range(len(present))), seqs=sequences)
