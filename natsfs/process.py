"""The daemon's process around natsfs.daemon.serve: configuration in, status out, record, log, end."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict

from natsfs import log, mounttable, recover, registry, systemd, unmount
from natsfs.config import Config
from natsfs.errors import MountError, NatsfsError, UsageError
from natsfs.mount import read_config
from natsfs.options import recover_command

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """The hidden command `natsfs daemon`; descriptors are inherited from natsfs.mount."""
    parser = argparse.ArgumentParser(prog="natsfs daemon")
    parser.add_argument("--config-fd", type=int, required=True)
    parser.add_argument("--status-fd", type=int)
    parser.add_argument("--lock-fd", type=int)
    parser.add_argument("--foreground", action="store_true")
    parser.add_argument("source")
    parser.add_argument("mountpoint")
    given = parser.parse_args(arguments)
    for descriptor in (given.status_fd, given.lock_fd):
        if descriptor is not None:
            os.set_inheritable(descriptor, False)  # fusermount3 must not keep them open
    config = read_config(given.config_fd)
    return _Process(config, status=given.status_fd, lock=given.lock_fd, foreground=given.foreground).run()


class _Process:
    def __init__(self, config: Config, *, status: int | None, lock: int | None, foreground: bool) -> None:
        self._config = config
        self._redact = log.Redactor(config.credentials.secrets)
        self._status = status
        self._lock = lock
        self._foreground = foreground
        self._folder = ""
        self._record: registry.Record | None = None

    def run(self) -> int:
        os.chdir("/")
        os.umask(0o077)  # spool files and logs are nobody else's; modes of files on the mount are set by FUSE
        try:
            self._folder = registry.folder()
            registry.prune(self._folder, mounttable.devices())
            fallback = registry.log_path(self._folder, self._config.mountpoint)
            is_new = not os.path.exists(fallback)
            log.setup(self._config, foreground=self._foreground, fallback=fallback)
        except OSError as error:
            return self._failed(MountError(f"{error}"))
        try:
            unsaved = self._serve()
        except NatsfsError as error:
            if self._record is None and is_new:
                # The error is on its way to the person who waits for it; the log would be left over.
                log.discard(fallback)
            return self._failed(error)
        except Exception as error:
            logger.exception("natsfs ends with an internal error")
            line = f"natsfs at {self._config.mountpoint} ended with an internal error ({error!r})"
            command = recover_command(self._config.options.spool_dir)
            self._report((f"{line}; to see what it had not saved: {command}",))
            return self._failed(MountError(line))
        finally:
            self._clean_up()
        for line in unsaved:
            logger.error("not saved: %s", line)
        if self._record is None:
            message = f"the mount at {self._config.mountpoint} was taken down before it was ready"
            logger.info("%s", message)
            self._say({"state": "error", "message": message, "usage": False})
        if not unsaved:
            log.discard(fallback)
        return 1 if unsaved else 0

    def _serve(self) -> tuple[str, ...]:
        try:
            # Here and not above: it loads libfuse, and a failure of that must reach the status pipe.
            from natsfs.daemon import serve
        except ImportError as error:
            raise MountError(
                f"natsfs cannot be loaded: {error}; are libfuse3 and all packages installed?"
            ) from error
        try:
            unsaved = serve(self._config, self._ready).unsaved
        except NatsfsError as error:
            self._report((str(error),))
            raise
        self._report(unsaved)
        return unsaved

    def _ready(self) -> bool:
        """If the mount is there: say so to everybody who waits for it."""
        entry = mounttable.at(self._config.mountpoint)
        if entry is None or not entry.is_natsfs:
            return False
        pid = os.getpid()
        self._record = registry.Record(
            pid=pid,
            start=registry.start_time(pid) or 0,
            device=entry.device,
            mountpoint=self._config.mountpoint,
            source=self._config.display_source,
            options=asdict(self._config.options),
        )
        registry.write(self._folder, self._record)
        logger.info("%s is mounted at %s", self._config.display_source, self._config.mountpoint)
        systemd.notify("READY=1")
        note = self._kept()
        if note:
            logger.info("%s", note)
            if self._foreground and self._config.options.log_file:
                print(f"natsfs: note: {note}", file=sys.stderr, flush=True)
        self._say({"state": "ready", "note": note})
        if not self._foreground:
            self._let_go_of_output()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        return True

    def _kept(self) -> str:
        try:
            return recover.summary(self._config.options.spool_dir)
        except OSError as error:
            logger.warning("what is kept in the spool folder cannot be told: %s", error)
            return ""

    def _say(self, word: dict[str, object]) -> None:
        if self._status is None:
            return
        status, self._status = self._status, None
        try:
            os.write(status, json.dumps(word).encode() + b"\n")
        except BrokenPipeError:
            # Who asked for the mount was killed and will not learn of it: take it down again.
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.close(status)

    def _let_go_of_output(self) -> None:
        path = self._config.options.log_file or os.devnull
        target = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.close(target)

    def _failed(self, error: NatsfsError) -> int:
        message = self._redact(" ".join(str(error).split()))
        if self._foreground:
            print(f"natsfs: {message}", file=sys.stderr)
        elif self._record is not None:
            logger.error("%s", message)
        self._say({"state": "error", "message": message, "usage": isinstance(error, UsageError)})
        return error.exit_status

    def _report(self, unsaved: tuple[str, ...]) -> None:
        """Leave for `natsfs umount` what it shall tell; it waits for this process to end."""
        if unsaved and self._record is not None:
            report = registry.Report(
                pid=self._record.pid,
                start=self._record.start,
                mountpoint=self._config.mountpoint,
                unsaved=tuple(map(self._redact, unsaved)),
            )
            try:
                registry.write_report(self._folder, report)
            except OSError as error:
                logger.error("the report for umount cannot be written: %s", error)

    def _clean_up(self) -> None:
        systemd.notify("STOPPING=1")
        # After an error the mount may still be there; without a daemon every access would fail.
        with contextlib.suppress(OSError):
            entry = mounttable.at(self._config.mountpoint)
            if self._record and entry and entry.device == self._record.device:
                unmount.detach(self._config.mountpoint)
        if self._record is not None:
            registry.remove(self._folder, self._record.pid)
