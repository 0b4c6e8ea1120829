"""Where the daemon's log goes, and that no secret goes there."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import sys
from collections.abc import Iterable
from urllib.parse import quote

from natsfs.config import Config

_FALLBACK_SIZE = 1 << 20


class Redactor:
    """Replaces known secrets, as they are and percent-encoded, by asterisks."""

    def __init__(self, secrets: Iterable[str]) -> None:
        forms = {form for secret in secrets for form in (secret, quote(secret, safe=""))}
        # Longest first: one secret may be a part of another.
        self._forms = sorted(forms, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for form in self._forms:
            text = text.replace(form, "***")
        return text


class RedactingFormatter(logging.Formatter):
    """Works on the finished text, so that arguments, tracebacks and other libraries' messages are covered."""

    def __init__(self, form: str, redact: Redactor) -> None:
        super().__init__(form)
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        return self._redact(super().format(record))


def is_news(record: logging.LogRecord) -> bool:
    """False for one thing: the kernel did not wait for the answer to a release, which it drops when it unmounts."""
    return record.name != "pyfuse3" or not record.getMessage().startswith(
        "fuse_release(): fuse_reply_* failed with No such file or directory"
    )


def setup(config: Config, *, foreground: bool, fallback: str) -> None:
    """Set up the root logger: log_file, else standard error (foreground), else syslog, else `fallback`.

    `fallback` is a file for machines without /dev/log (containers). It is bounded, and only created when
    something is logged.
    """
    handler: logging.Handler
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    if config.options.log_file:
        handler = logging.FileHandler(config.options.log_file, encoding="utf-8", errors="backslashreplace")
    elif foreground:
        handler = logging.StreamHandler(sys.stderr)
        if "JOURNAL_STREAM" in os.environ:  # the journal has its own clock
            form = "%(levelname)s %(name)s: %(message)s"
    elif os.path.exists("/dev/log"):
        handler = logging.handlers.SysLogHandler(
            address="/dev/log", facility=logging.handlers.SysLogHandler.LOG_DAEMON
        )
        form = f"natsfs[{os.getpid()}]: %(levelname)s %(name)s: %(message)s"
    else:
        handler = logging.handlers.RotatingFileHandler(
            fallback,
            maxBytes=_FALLBACK_SIZE,
            backupCount=1,
            encoding="utf-8",
            errors="backslashreplace",
            delay=True,
        )
    handler.addFilter(is_news)
    handler.setFormatter(RedactingFormatter(form, Redactor(config.credentials.secrets)))
    # A log that cannot be written (disk full) must not put tracebacks on a standard error that nobody reads.
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    logging.basicConfig(level=config.options.log_level.upper(), handlers=[handler], force=True)


def discard(fallback: str) -> None:
    """Remove the fallback log of a mount that ended well, so that such files do not gather."""
    for path in (fallback, f"{fallback}.1"):
        with contextlib.suppress(OSError):
            os.unlink(path)
