"""What is written beside content that is kept: of which object it is, which of its bytes are there, and why. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from natsfs.catalog.attributes import format_time, parse_time
from natsfs.catalog.metadata import Metadata
from natsfs.store.segments import Kept, Segment, Spooled, Zeros

Range = tuple[int, int]  # [start, end) in bytes

# The kernel's clock for the times of files ticks up to every 10 ms: a write that follows sooner may not show in them.
TICKS_NS: Final = 20_000_000

_KINDS: Final = {kind.__name__: kind for kind in (Spooled, Zeros, Kept)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Content that is not in the store: `segments` make up its `size` bytes.

    `base` is the version that `Kept` segments belong to, `below` how much of it still shows. `options` are those of the
    mount that say how to log in to the server in `source`: names of files, never a secret. `segments` are None where
    they are too many to be told. Bytes that were `lost` could not be put aside, and are among the `Zeros`.

    A manifest is made when a commit has failed, with the `reason`, or from time to time as a note of what a daemon
    holds, in case that it is killed. A note has `modified_ns`, when its content was last written to, and says whether
    the store has it (`saved`).
    """

    source: str
    options: dict[str, Any]
    bucket: str | None
    name: str
    size: int
    base: Metadata | None
    below: int
    segments: tuple[Segment, ...] | None
    attributes: dict[str, str]
    description: str | None
    headers: dict[str, Any] | None
    reason: str
    time_ns: int
    modified_ns: int = 0
    saved: bool = False
    lost: tuple[Range, ...] = ()

    def without(self, start: int, end: int) -> Manifest:
        """As it is where nothing of [start, end) is there, which had been written."""
        parts: list[Segment] = []
        for part in self.segments or ():
            if not isinstance(part, Spooled) or part.end <= start or end <= part.start:
                parts.append(part)
                continue
            if part.start < start:
                parts.append(Spooled(part.start, start))
            parts.append(Zeros(max(part.start, start), min(part.end, end)))
            if end < part.end:
                parts.append(Spooled(end, part.end))
        return replace(self, segments=tuple(parts), lost=(*self.lost, (start, end)))

    def fits(self, modified_ns: int) -> bool:
        """Whether content that was last written to then is what a note speaks of, surely."""
        return modified_ns == self.modified_ns and is_settled(modified_ns, self.time_ns)

    def encode(self) -> str:
        data: dict[str, Any] = {
            "source": self.source,
            "options": self.options,
            "bucket": self.bucket,
            "name": self.name,
            "size": self.size,
            "base": None,
            "below": self.below,
            "segments": None,
            "attributes": self.attributes,
            "description": self.description,
            "headers": self.headers,
            "reason": self.reason,
            "time": format_time(self.time_ns),
        }
        if self.base is not None:
            data["base"] = {key: getattr(self.base, key) for key in _OF_BASE}
        if self.segments is not None:
            data["segments"] = [(type(s).__name__, s.start, s.end) for s in self.segments]
        if self.lost:
            data["lost"] = self.lost
        if self.modified_ns:
            data |= {"modified": self.modified_ns, "saved": self.saved}
        # For people; a note is made every second, and the short form takes a tenth of the time.
        return json.dumps(data, indent=None if self.modified_ns else 1)

    @classmethod
    def decode(cls, text: str) -> Manifest:
        """Raises ValueError for what is no manifest."""
        try:
            data = json.loads(text)
            segments, base = data["segments"], data["base"]
            bucket, name = data["bucket"], str(data["name"])
            return cls(
                source=str(data["source"]),
                options=dict(data["options"]),
                bucket=bucket,
                name=name,
                size=int(data["size"]),
                base=None if base is None else Metadata(name=name, bucket=str(bucket), **base),
                below=int(data["below"]),
                segments=None
                if segments is None
                else tuple(_KINDS[k](int(a), int(b)) for k, a, b in segments),
                attributes=dict(data["attributes"]),
                description=data["description"],
                headers=data["headers"],
                reason=str(data["reason"]),
                time_ns=parse_time(data["time"]) or 0,
                modified_ns=int(data.get("modified", 0)),
                saved=bool(data.get("saved")),
                lost=tuple((int(a), int(b)) for a, b in data.get("lost", ())),
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"no manifest: {error!r}") from None


_OF_BASE: Final = ("nuid", "size", "chunks", "chunk_size", "digest")


def is_settled(modified_ns: int, now_ns: int) -> bool:
    """Whether a later write is sure to show as another time."""
    return now_ns - modified_ns > TICKS_NS


@dataclass(frozen=True, slots=True)
class Content:
    """What is known of content: its size, what it is made of, and where what was written may be mixed with zeros.

    In `unsure` ranges a byte that is not zero was written; one that is zero may as well be a byte of the version below.
    What was `lost` has zeros in its place.
    """

    size: int
    segments: tuple[Segment, ...]
    unsure: tuple[Range, ...] = ()
    lost: tuple[Range, ...] = ()

    @property
    def kept(self) -> tuple[Range, ...]:
        """What the version below has."""
        return tuple((s.start, s.end) for s in self.segments if isinstance(s, Kept))

    @property
    def written(self) -> int:
        return sum(s.end - s.start for s in self.segments if isinstance(s, Spooled))


def content_of(
    manifest: Manifest | None, *, note: bool, size: int, modified_ns: int, extents: Sequence[Range]
) -> Content:
    """`size`, `modified_ns` and `extents` (what is no hole) are of the file with the bytes."""
    whole = Content(size, (Spooled(0, size),) if size else ())
    if manifest is None or (note and manifest.base is None):
        return whole
    if manifest.segments is not None and (not note or manifest.fits(modified_ns)):
        return Content(manifest.size, manifest.segments, lost=manifest.lost)
    known = tuple((s.start, s.end) for s in manifest.segments or () if isinstance(s, Spooled))
    unsure = subtract(extents, known)
    size = max(size, manifest.size)
    segments: list[Segment] = []
    at = 0
    for start, end in [*sorted((*known, *unsure)), (size, size)]:
        if at < (stop := min(manifest.below, start)):
            segments.append(Kept(at, stop))
            at = stop
        if at < start:
            segments.append(Zeros(at, start))
        if start < end:
            segments.append(Spooled(start, end))
        at = end
    return Content(size, tuple(segments), unsure)


def subtract(ranges: Sequence[Range], others: Sequence[Range]) -> tuple[Range, ...]:
    """What of `ranges` lies in none of `others`; both are disjoint and in rising order."""
    left: list[Range] = []
    place = 0
    for start, end in ranges:
        while place < len(others) and others[place][1] <= start:
            place += 1
        next_one = place
        while next_one < len(others) and others[next_one][0] < end:
            low, high = others[next_one]
            if start < low:
                left.append((start, low))
            start = max(start, high)
            next_one += 1
        if start < end:
            left.append((start, end))
    return tuple(left)


def join(ranges: Iterable[Range]) -> list[Range]:
    """Ranges in rising order; those that touch become one."""
    joined: list[Range] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined
