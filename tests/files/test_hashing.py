"""Digests that a thread computes beside the event loop."""

from __future__ import annotations

import hashlib
import threading

import trio

from natsfs.files.hashing import BACKLOG, THREAD, Hasher
from tests.support import noise, until

CHUNK = 128 * 1024


def hashing() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


def test_contents_side_by_side() -> None:
    """Each digest is that of its own content, in order; who waits for one has it whole."""
    contents = [noise(size, size) for size in (CHUNK, 5 * CHUNK + 1, 40 * CHUNK)]

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            hasher = Hasher(nursery)
            await hasher.caught_up()  # of nothing

            async def one(content: bytes) -> None:
                sha = hashlib.sha256()
                for start in range(0, len(content), CHUNK):
                    hasher.update(sha, content[start : start + CHUNK])
                    await trio.lowlevel.checkpoint()
                await hasher.caught_up()
                assert hashing()
                assert sha.digest() == hashlib.sha256(content).digest()

            async with trio.open_nursery() as contents_read:
                for content in contents:
                    contents_read.start_soon(one, content)
            nursery.cancel_scope.cancel()

    trio.run(work)
    until(lambda: not hashing())


def test_a_reader_that_is_faster_has_to_wait() -> None:
    """What waits for the thread is bounded by whoever asks, and is digested all the same."""
    block = noise(BACKLOG, 7)

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            hasher, sha = Hasher(nursery), hashlib.sha256()
            assert not hasher.is_behind
            for _ in range(3):
                hasher.update(sha, block)
            assert hasher.is_behind
            await hasher.caught_up()
            assert not hasher.is_behind
            assert sha.digest() == hashlib.sha256(3 * block).digest()
            nursery.cancel_scope.cancel()

    trio.run(work)
    until(lambda: not hashing())
