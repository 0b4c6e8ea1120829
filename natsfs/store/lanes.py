"""Which connection a read of chunks takes. Pure.

The wire of the metadata is empty most of the time. That of the chunks has up to 4 MiB of an upload on their way, and
the server answers a request behind them when it has stored them. So a read that brings little takes the first one. A
read that brings much does not: the server works on a connection's requests one after the other, and commits would wait.
"""

from __future__ import annotations

QUICK_READ = 256 * 1024  # bytes that one request may bring beside the metadata
QUICK_ROOM = 1024 * 1024  # bytes that may be on their way there, of all such requests together


def is_quick(expected: int, outstanding: int) -> bool:
    """Whether a request for about `expected` bytes of chunks travels with the metadata.

    `outstanding` bytes are awaited there already.
    """
    return expected <= QUICK_READ and outstanding + expected <= QUICK_ROOM
