"""How Ctrl-C and SIGTERM act on the commands; the daemon has its own handlers."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import NoReturn

_ENDING = (signal.SIGINT, signal.SIGTERM)


def interruptible() -> contextlib.AbstractContextManager[None]:
    """SIGTERM is treated as Ctrl-C: it must not leave half-made things behind."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    return _handled(interrupt)


def uninterrupted() -> contextlib.AbstractContextManager[None]:
    """For cleaning up, which has time limits of its own."""
    return _handled(lambda number, frame: None)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """A signal acts only at the end of the block, so that what is made there is known to those who clean up."""
    received: list[int] = []
    with _handled(lambda number, frame: received.append(number)):
        yield
    for number in received:
        signal.raise_signal(number)


@contextlib.contextmanager
def _handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in _ENDING}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
