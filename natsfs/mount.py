"""Starting a mount: the command checks, starts the daemon as a process of its own, and waits for its word.

The daemon gets its configuration through a memory file that it inherits, because arguments and environment of
a process can be read by others. It answers on a pipe with one line of JSON. When SOURCE carries a password,
the command replaces itself by the same program without it, so that it does not stay in the process list while
the command waits.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from natsfs import assembly, mounttable, preflight, probe, registry, signals
from natsfs.config import Config
from natsfs.errors import MountError, NatsfsError, UsageError
from natsfs.log import Redactor

# On top of `-o timeout`, which limits the daemon's own waits: for starting Python, and for answering.
_START_ALLOWANCE = 30.0
_ANSWER_LIMIT = 15.0
_STOP_LIMIT = 10.0
_OUTPUT_SHOWN = 4096


def mount(
    source: str,
    mountpoint: str,
    options: Sequence[str],
    *,
    foreground: bool = False,
    sloppy: bool = False,
    check_only: bool = False,
) -> None:
    """Mount, and return when the mount answers. With `foreground` this process becomes the daemon."""
    config = assembly.configure(source, mountpoint, options, os.environ, sloppy=sloppy)
    if check_only:
        preflight.check(config)
    elif foreground:
        preflight.check(config)
        lock = _lock(config.mountpoint)
        arguments = ["daemon", "--foreground", "--config-fd", str(_memory_file(config))]
        if lock is not None:
            os.set_inheritable(lock, True)
            arguments += ["--lock-fd", str(lock)]
        _become(arguments, config)
    elif config.display_source != source:
        _become(["launch", "--config-fd", str(_memory_file(config))], config)
    else:
        launch(config)


def launch(config: Config) -> None:
    """Check, start the daemon, wait for it; after a failure nothing of it is left."""
    preflight.check(config)
    with _exclusive(config.mountpoint), signals.interruptible():
        for report in registry.take_reports(registry.folders(os.getuid()), mountpoint=config.mountpoint):
            for line in report.unsaved:
                print(f"natsfs: note from the last mount at {config.mountpoint}: {line}", file=sys.stderr)
        before = os.stat(config.mountpoint).st_dev
        daemon = _Daemon(config)
        try:
            note = daemon.wait_until_ready(config.options.timeout + _START_ALLOWANCE)
            daemon.wait_until_answering(before)
        except BaseException as error:
            with signals.uninterrupted():
                daemon.stop()
                # What clear_dead can find is the mount of somebody else who was faster; that stays.
                with contextlib.suppress(NatsfsError):
                    probe.clear_dead(config.mountpoint)
            if isinstance(error, KeyboardInterrupt):
                raise MountError("interrupted; nothing is mounted") from None
            raise
    if note:
        print(f"natsfs: note: {note}", file=sys.stderr)


class _Daemon:
    """The daemon's process as seen by the command that started it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._redact = Redactor(config.credentials.secrets)
        self._output = os.memfd_create("natsfs-output")
        self._status, status_for_daemon = os.pipe2(os.O_CLOEXEC)
        config_file = _memory_file(config)
        arguments = ["daemon", "--config-fd", str(config_file), "--status-fd", str(status_for_daemon)]
        try:
            self._process = subprocess.Popen(
                _command(arguments, config),
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                cwd="/",
                env=_environment(),
                pass_fds=(config_file, status_for_daemon),
                start_new_session=True,
            )
        finally:
            os.close(config_file)
            os.close(status_for_daemon)

    def wait_until_ready(self, limit: float) -> str:
        """Until the daemon says that it is ready, and what else there is to know, which is returned.

        Its error, or its end without a word, is raised.
        """
        deadline = time.monotonic() + limit
        poll = select.poll()
        poll.register(self._status, select.POLLIN)
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise MountError(
                    f"natsfs was not ready after {limit:g} s; -f -o log_level=debug shows what it waits for"
                )
            data = os.read(self._status, 65536)
            if not data:
                raise self._died()
            line += data
        word: dict[str, Any] = json.loads(line)
        if word["state"] == "error":
            kind = UsageError if word["usage"] else MountError
            raise kind(word["message"])
        return str(word["note"])

    def wait_until_answering(self, before: int) -> None:
        mountpoint = self._config.mountpoint
        try:
            probe.wait_until_mounted(mountpoint, before, _ANSWER_LIMIT)
        except TimeoutError as error:
            raise MountError(f"{error}; -f -o log_level=debug shows what natsfs waits for") from None
        except OSError as error:
            if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                raise self._died() from None
            raise MountError(f"{mountpoint} was mounted but does not answer: {error.strerror}") from None

    def stop(self) -> None:
        """End the process, first politely, and do not leave before it is gone."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_STOP_LIMIT)

    def _died(self) -> MountError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_LIMIT)
        code = self._process.returncode
        if code is None:
            how = "closed its status pipe but goes on"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with status {code}"
        size = os.fstat(self._output).st_size
        raw = os.pread(self._output, _OUTPUT_SHOWN, max(0, size - _OUTPUT_SHOWN))
        lines = [line.strip() for line in self._redact(raw.decode(errors="replace")).splitlines()]
        last = next((line for line in reversed(lines) if line), "it printed nothing")
        return MountError(f"natsfs {how} before the mount was ready: {last}")


# --- processes ---


def _command(arguments: Sequence[str], config: Config) -> list[str]:
    """-P: no file of the current directory is taken for a module. The last two are for readers of ps."""
    return [sys.executable, "-P", "-m", "natsfs", *arguments, config.display_source, config.mountpoint]


def _environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Without the secrets, and so that the same natsfs is found, wherever this one was imported from."""
    hidden = (assembly.PASSWORD_VARIABLE, assembly.TOKEN_VARIABLE)
    package_parent = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = [package_parent, *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))]
    kept = {name: value for name, value in environ.items() if name not in hidden}
    return kept | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}


def _become(arguments: Sequence[str], config: Config) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, _command(arguments, config), _environment())


def _memory_file(config: Config) -> int:
    """An inheritable file in memory, at its beginning, with the configuration."""
    descriptor = os.memfd_create("natsfs-config", 0)
    with open(descriptor, "w", encoding="utf-8", closefd=False) as file:
        file.write(config.to_json())
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def read_config(descriptor: int) -> Config:
    """The other end of the memory file; it is closed, so that nothing the daemon starts inherits it."""
    with open(descriptor, encoding="utf-8") as file:
        return Config.from_json(file.read())


# --- one start at a time ---


def _lock(mountpoint: str) -> int | None:
    """A lock on the directory itself, which leaves nothing behind; None if the directory is not readable."""
    try:
        descriptor = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between the check and the lock another start may have come to its end.
        entry = mounttable.at(mountpoint)
        if entry is not None and entry.is_natsfs:
            raise BlockingIOError
    except BlockingIOError:
        os.close(descriptor)
        raise MountError(
            f"{mountpoint} is busy: another natsfs is being mounted there; wait for it"
        ) from None
    return descriptor


@contextlib.contextmanager
def _exclusive(mountpoint: str) -> Iterator[None]:
    descriptor = _lock(mountpoint)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
