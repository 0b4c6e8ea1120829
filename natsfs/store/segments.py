"""What the content of a file is made of while it is written. Offsets are bytes, half open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spooled:
    """In the spool file, at the same offsets."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Zeros:
    """Never written, and not there in the version below: reads as NUL."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Kept:
    """Never touched: the bytes of the version that the write builds on."""

    start: int
    end: int


# The bytes [start, end) of a spool file; less where it ends before.
Read = Callable[[int, int], bytes]

Segment = Spooled | Zeros | Kept
