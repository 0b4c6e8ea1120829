"""What is written beside kept content, and what that says of its bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natsfs.catalog.metadata import Metadata
from natsfs.files.manifest import TICKS_NS, Content, Manifest, Range, content_of, subtract
from natsfs.files.overlay import Overlay
from natsfs.recover import ranges_text, short_size
from natsfs.store.segments import Kept, Segment, Spooled, Zeros

SIZE = 60
BASE = Metadata(name="n", bucket="b", nuid="N", size=40, chunks=2, chunk_size=25, digest="SHA-256=x")


def manifest(
    segments: tuple[Segment, ...] | None, *, base: Metadata | None = BASE, **fields: object
) -> Manifest:
    size = segments[-1].end if segments else 0
    known: dict[str, object] = {"size": size, "below": 0, "modified_ns": 0, "saved": False} | fields
    return Manifest(
        source="nats://h/b",
        options={"creds": "/a"},
        bucket="b",
        name="n",
        base=base,
        segments=segments,
        attributes={"mode": "100644"},
        description=None,
        headers={"a": ["b"]},
        reason="because",
        time_ns=10**18,
        **known,  # type: ignore[arg-type]
    )


@st.composite
def ranges(draw: st.DrawFn) -> tuple[Range, ...]:
    marks = sorted(draw(st.sets(st.integers(0, SIZE), max_size=12)))
    return tuple(zip(marks[::2], marks[1::2], strict=False))


def positions(of: tuple[Range, ...]) -> set[int]:
    return {at for start, end in of for at in range(start, end)}


@given(ranges(), ranges())
def test_subtract(some: tuple[Range, ...], others: tuple[Range, ...]) -> None:
    left = subtract(some, others)
    assert positions(left) == positions(some) - positions(others)
    assert list(left) == sorted(left)
    assert all(start < end for start, end in left)


names = st.text(st.characters(), min_size=1, max_size=8)


@given(names, st.sampled_from([None, BASE]), st.booleans())
def test_a_manifest_comes_back_as_it_was(name: str, base: Metadata | None, note: bool) -> None:
    """Any name, also one with lone surrogates."""
    segments: tuple[Segment, ...] | None = None if note else (Spooled(0, 3), Kept(3, 9), Zeros(9, 12))
    made = manifest(segments, base=base, below=9, modified_ns=7 if note else 0, saved=note)
    made = Manifest(**{field: getattr(made, field) for field in made.__slots__} | {"name": name})
    read = Manifest.decode(made.encode())
    assert read.encode() == made.encode()
    assert (read.name, read.segments, read.saved, read.below) == (name, segments, note, 9)
    assert (read.base is None) == (base is None)
    if read.base is not None:
        assert (read.base.nuid, read.base.size, read.base.chunks) == ("N", 40, 2)


@pytest.mark.parametrize("text", ["", "{}", "[]", '"x"', '{"segments": [["Other", 1, 2]], "base": null}'])
def test_what_is_no_manifest(text: str) -> None:
    with pytest.raises(ValueError, match="no manifest"):
        Manifest.decode(text)


def test_what_is_known_of_content() -> None:
    segments = (Spooled(0, 3), Kept(3, 9), Zeros(9, 12))
    about = {"size": 5, "modified_ns": 10**18, "extents": [(0, 5)]}
    # Without a word on it, and where nothing of a version below shows, the file is the content.
    assert content_of(None, note=True, **about) == Content(5, (Spooled(0, 5),))  # type: ignore[arg-type]
    no_base = manifest((Spooled(0, 3),), base=None)
    assert content_of(no_base, note=True, **about) == Content(5, (Spooled(0, 5),))  # type: ignore[arg-type]
    # What was put aside is what its manifest says, and so is what was not written to since its note was made.
    assert content_of(manifest(segments), note=False, **about) == Content(12, segments)  # type: ignore[arg-type]
    rested = 10**18 - TICKS_NS - 1
    note = manifest(segments, below=9, modified_ns=rested)
    exact = content_of(note, note=True, size=5, modified_ns=rested, extents=[(0, 5)])
    assert exact == Content(12, segments)
    assert exact.kept == ((3, 9),)
    assert exact.written == 3
    # A write in the same tick of the clock would not show.
    assert not manifest(segments, modified_ns=10**18).fits(10**18)


@given(ranges(), st.integers(0, SIZE - 1), st.integers(1, SIZE))
def test_what_was_lost(written: tuple[Range, ...], start: int, size: int) -> None:
    """Nothing else of what was written changes."""
    overlay, end = Overlay(BASE.size), min(start + size, SIZE)
    for extent in written:
        overlay.write(*extent)
    before = manifest(tuple(overlay.segments(0, overlay.size)), below=overlay.kept)
    after = Manifest.decode(before.without(start, end).encode())
    assert after.lost == ((start, end),)
    segments = after.segments or ()
    assert [s.start for s in segments] == [0, *(s.end for s in segments[:-1])]
    assert all(s.start < s.end for s in segments)
    lost, kept = set(range(start, end)), before.segments or ()
    for kind in (Spooled, Kept):
        had, has = (
            positions(tuple((s.start, s.end) for s in of if isinstance(s, kind))) for of in (kept, segments)
        )
        assert has == (had - lost if kind is Spooled else had)


@given(st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=6), ranges(), st.booleans())
def test_content_that_was_written_after_its_note(
    writes: list[tuple[int, int]], later: tuple[Range, ...], too_many: bool
) -> None:
    """Bytes of the note's extents are sure, other bytes that are there are named, and nothing overlaps or is left."""
    overlay = Overlay(BASE.size)
    for start, end in writes:
        overlay.write(start, end)
    noted = tuple(overlay.segments(0, overlay.size))
    sure = positions(tuple((s.start, s.end) for s in noted if isinstance(s, Spooled) and not too_many))
    note = manifest(None if too_many else noted, size=overlay.size, below=overlay.kept, modified_ns=5)
    content = content_of(
        note, note=True, size=later[-1][1] if later else 0, modified_ns=10**18, extents=later
    )
    at = 0
    for segment in content.segments:
        assert segment.start == at < segment.end
        at = segment.end
    assert at == content.size
    assert positions(content.unsure) == positions(later) - sure
    spooled = positions(tuple((s.start, s.end) for s in content.segments if isinstance(s, Spooled)))
    assert spooled == positions(later) | sure
    assert positions(content.kept) == set(range(BASE.size)) - spooled


def test_what_people_read() -> None:
    assert [short_size(n) for n in (0, 1023, 1024, 10 * 1024, 3 << 20, 5 << 30)] == [
        *("0", "1023", "1.0K", "10K", "3.0M", "5.0G")
    ]
    assert ranges_text([(0, 1), (5, 9)]) == "0-0, 5-8"
    assert ranges_text([(n, n + 1) for n in range(0, 40, 2)]).endswith("and 12 more ranges")
