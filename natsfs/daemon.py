"""The daemon: connect, mount, serve until unmounted or told to stop, commit, report."""

from __future__ import annotations

import errno
import faulthandler
import logging
import os
import resource
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyfuse3
import trio

from natsfs import mounttable, unmount, workers
from natsfs.config import Config
from natsfs.errors import MountError
from natsfs.files.files import Files
from natsfs.fs import FileSystem
from natsfs.namespace import Namespace
from natsfs.volume import Volume

log = logging.getLogger(__name__)

WORKERS = 200  # requests of the kernel that are answered at the same time


@dataclass(frozen=True, slots=True)
class ServeReport:
    """`unsaved`: for people, a line for each file that could not be committed, with where its data is."""

    unsaved: tuple[str, ...]


def serve(config: Config, ready: Callable[[], bool]) -> ServeReport:
    """Mount and serve; raises `MountError` if there is no mount.

    `ready` is called once the mount answers, unless it is taken down before. It returns whether the mount is there.
    """
    faulthandler.enable()
    # Each file that is being written has its spool file open; 1,024 of them would be all.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # The two threads hand the interpreter to each other for every request; the default of 5 ms is an age.
    sys.setswitchinterval(0.0005)
    return trio.run(_serve, config, ready)


async def _serve(config: Config, ready: Callable[[], bool]) -> ServeReport:
    failure: MountError | None = None
    unsaved: list[str] = []
    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as nursery:
            volume = Volume(config, nursery)
            files = Files(volume, nursery)
            try:
                with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
                    if await _started(volume, connections, signals):
                        nursery.start_soon(files.commit_what_stays_open)
                        nursery.start_soon(files.note_what_stays_open)
                        await _mounted(config, volume, files, ready, signals)
            except MountError as error:
                failure = error
            finally:
                with trio.CancelScope(shield=True):
                    await files.close()
                    unsaved = files.unsaved
                    # What runs in the background ends before the connection that it uses.
                    nursery.cancel_scope.cancel()
                    await volume.close()
        connections.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return ServeReport(tuple(unsaved))


async def _started(volume: Volume, connections: trio.Nursery, signals: AsyncIterator[int]) -> bool:
    """Whether no signal came first. Raises `MountError`."""
    stopped, failure = False, None

    async def stop() -> None:
        nonlocal stopped
        number = await anext(signals)
        stopped = True
        log.info("%s: ending before anything is mounted", signal.Signals(number).name)
        starting.cancel_scope.cancel()

    async with trio.open_nursery() as starting:
        starting.start_soon(stop)
        try:
            await volume.start(connections)
        except MountError as error:
            failure = error
        starting.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return not stopped


async def _mounted(
    config: Config, volume: Volume, files: Files, ready: Callable[[], bool], signals: AsyncIterator[int]
) -> None:
    operations = FileSystem(volume, Namespace(volume, files), files)
    _mount(operations, config)
    try:
        volume.notifier.start()
        async with trio.open_nursery() as serving:
            serving.start_soon(_announce, config, ready)
            # Only as long as the session lives: libfuse frees it below, and ending it then is a crash. What was
            # signalled before waits in the receiver.
            serving.start_soon(_stop_on_signal, signals, config.mountpoint, volume, files)
            await workers.main(idle=4, most=WORKERS, on_end=volume.end_loads)
            serving.cancel_scope.cancel()
    finally:
        # What was written under the mount is in the spool; the mount itself goes first, so that nothing is added.
        volume.notifier.stop()
        pyfuse3.close(unmount=mounttable.at(config.mountpoint) is not None)


def _mount(operations: FileSystem, config: Config) -> None:
    # libfuse takes a comma for the end of an option (fuse_opt.c).
    source = config.display_source.replace("\\", "\\\\").replace(",", "\\,")
    options = {f"fsname={source}", "subtype=natsfs"}
    if config.options.default_permissions:
        options.add("default_permissions")
    if config.options.allow_other:
        options.add("allow_other")
    if config.options.read_only:
        options.add("ro")
    options.update(config.options.kernel_options)
    with _captured_stderr() as said:
        try:
            pyfuse3.init(operations, config.mountpoint, options)
        except RuntimeError as error:
            reason = said() or str(error)
            raise MountError(f"cannot mount on {config.mountpoint}: {reason}") from None


@contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """libfuse says why a mount failed on file descriptor 2 only."""
    with tempfile.TemporaryFile() as capture:
        saved = os.dup(2)
        os.dup2(capture.fileno(), 2)

        def said() -> str:
            capture.seek(0)
            return " ".join(capture.read().decode("utf-8", "replace").split())

        try:
            yield said
        finally:
            os.dup2(saved, 2)
            os.close(saved)


async def _announce(config: Config, ready: Callable[[], bool]) -> None:
    """Tell that the mount answers once it does; one that is gone by then needs nobody who serves it."""
    try:
        await trio.to_thread.run_sync(os.stat, config.mountpoint, abandon_on_cancel=True)
    except OSError as error:
        log.info("%s does not answer: %s", config.mountpoint, error.strerror)
    else:
        _read_far_ahead(config)
        if ready():
            return
    pyfuse3.terminate()


def _read_far_ahead(config: Config) -> None:
    """The kernel asks for 128 KiB at a time unless it is told otherwise, and a request costs the same for 1 MiB."""
    entry = mounttable.at(config.mountpoint)
    try:
        if entry is not None:
            # sysfs-class-bdi; it is for root alone.
            Path(f"/sys/class/bdi/{entry.device}/read_ahead_kb").write_text(
                str(config.options.read_ahead // 1024)
            )
    except OSError as error:
        log.info("the kernel's read-ahead stays as it is: %s", error)


async def _stop_on_signal(signals: AsyncIterator[int], mountpoint: str, volume: Volume, files: Files) -> None:
    """Commit what is open and unmount; a program that holds a file loses it, after its commit."""
    async for number in signals:
        log.info("%s: committing open files and unmounting", signal.Signals(number).name)
        await files.commit_all()
        try:
            await trio.to_thread.run_sync(unmount.detach, mountpoint, abandon_on_cancel=True)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT):
                log.warning("cannot unmount %s: %s", mountpoint, error)
        volume.end_loads()
        pyfuse3.terminate()
