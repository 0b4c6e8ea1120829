"""The errors that people see.

The message of each is one line that says what is wrong and what to do about it; the command line prints
it as it is and exits with the class's status.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class NatsfsError(Exception):
    """Any failure that natsfs foresaw; its text is one line for the person who reads it."""

    exit_status: ClassVar[int] = 1


class UsageError(NatsfsError):
    """What was typed cannot be understood: a bad SOURCE, an unknown option, a value out of range."""

    exit_status: ClassVar[int] = 2


class MountError(NatsfsError):
    """The mount cannot be made, or could not be taken down."""


class RecoverError(NatsfsError):
    """What is kept cannot be found or copied out."""


class StoreError(NatsfsError):
    """A request to NATS failed. `errno` is what a system call that needed it returns."""

    errno: int = errno.EIO


class Unreachable(StoreError):
    """No answer within the time limit, or no connection. The outcome of a write may be unknown."""

    errno = errno.ETIMEDOUT


class Ending(Unreachable):
    """The mount is being taken down; what every later call on it gets as well."""

    errno = errno.ENOTCONN


class Conflict(StoreError):
    """A compare-and-swap failed: the subject's last sequence is `seq` (0: it holds nothing).

    `doubtful`: an attempt before, whose answer was lost, may have been stored, and replaced by somebody since.
    """

    errno = errno.ESTALE

    def __init__(self, message: str, seq: int) -> None:
        super().__init__(message)
        self.seq = seq
        self.doubtful = False


class BucketFull(StoreError):
    """The stream or the server is at its limit."""

    errno = errno.ENOSPC


class QuotaExceeded(BucketFull):
    """The account is at its limit: other buckets of it count as well."""

    errno = errno.EDQUOT


class ReadOnlyBucket(StoreError):
    """The stream is sealed, a mirror, or does not allow what was asked."""

    errno = errno.EROFS


class BucketGone(StoreError):
    """The stream does not exist (any more)."""

    errno = errno.ESTALE


class BucketExists(StoreError):
    errno = errno.EEXIST


class Denied(StoreError):
    """The account or user may not do this."""

    errno = errno.EACCES


class ChunksGone(StoreError):
    """The version's chunks were purged: the object was replaced, deleted or has expired."""

    errno = errno.ESTALE


class Corrupt(StoreError):
    """What the store holds contradicts the object's metadata (size, count of chunks, digest)."""

    errno = errno.EIO


class TooLarge(StoreError):
    """A message is over the server's or the stream's limit."""

    errno = errno.EFBIG
