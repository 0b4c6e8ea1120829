"""JetStream's errors as exceptions (server/errors.json in nats-server)."""

from __future__ import annotations

import re
from typing import Any

from natsfs.errors import (
    BucketExists,
    BucketFull,
    BucketGone,
    Conflict,
    QuotaExceeded,
    ReadOnlyBucket,
    StoreError,
    TooLarge,
    Unreachable,
)

TOO_FAST = 10167  # messages arrive faster than they can be stored
NO_STORE = 10049  # the stream's folder could not be made
NOT_BEHIND = 10070  # the stream's last message has not the id that was expected


class NoResponders(Unreachable):
    """Nobody listens on the subject: JetStream is off, starting up, or out of reach."""


class ApiError(StoreError):
    """A JetStream error that has no class of its own."""

    def __init__(self, code: int, err_code: int, description: str) -> None:
        super().__init__(f"JetStream: {description} (error {err_code})")
        self.code = code
        self.err_code = err_code


def api_error(error: dict[str, Any]) -> StoreError:
    """The exception for the `error` object of a JetStream reply."""
    err_code = int(error.get("err_code") or 0)
    description = str(error.get("description") or "unknown error")
    match err_code:
        case 10071:
            found = re.search(r"(\d+)\s*$", description)
            return Conflict(description, int(found[1]) if found else -1)
        case 10002 | 10027:
            return QuotaExceeded(f"the account is at its limit: {description}")
        case 10077 | 10047 | 10023 | 10028:
            return BucketFull(f"no space: {description}")
        case 10109 | 10110 | 10111 | 10135:
            return ReadOnlyBucket(f"read-only: {description}")
        case 10059:
            return BucketGone(f"the bucket does not exist: {description}")
        case 10058 | 10065:
            return BucketExists(f"the bucket exists: {description}")
        case 10054 | 10053:
            return TooLarge(description)
    return ApiError(int(error.get("code") or 0), err_code, description)
