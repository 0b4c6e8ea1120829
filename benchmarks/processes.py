"""What the kernel tells about processes: CPU time, memory, bytes; and how they are started and ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def say(text: str) -> None:
    """Progress, beside the table."""
    print(f"bench: {time.strftime('%T')} {text}", file=sys.stderr, flush=True)


_shields = 0
_interrupted = False


def _interrupt(number: int, frame: object) -> None:
    global _interrupted
    if not _shields:
        raise KeyboardInterrupt
    _interrupted = True


def handle_signals() -> None:
    """Ctrl-C and its relatives raise KeyboardInterrupt, wherever nothing is being set up or taken down."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """An interrupt waits for the end of the block: what is half set up would stay behind."""
    global _shields, _interrupted
    _shields += 1
    # Ctrl-C reaches the commands of the block, too, unless they inherit this.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        _shields -= 1
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if _interrupted and not _shields:
            _interrupted = False
            raise KeyboardInterrupt


def cpu(pids: Iterable[int]) -> float:
    """Seconds of CPU time that these processes have used."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / _TICK


def forget_peak(pids: Iterable[int]) -> None:
    """From now on `peak` counts anew."""
    for pid in pids:
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak(pids: Iterable[int]) -> int:
    """The most resident memory of these processes, in bytes, their peaks added."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
            total += int(match[1]) * 1024 if match else 0
    return total


def written(pid: int) -> int:
    """Bytes that a process has handed to the kernel, for files and sockets."""
    match = re.search(r"^wchar: (\d+)$", Path(f"/proc/{pid}/io").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


def start(command: list[str], log: Path, environ: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A program in the background, in a session of its own, so that Ctrl-C does not reach it."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=os.environ | (environ or {}),
        )


def end(process: subprocess.Popen[bytes], limit: float = 20.0) -> None:
    """Ask it to end, and make it."""
    process.terminate()
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(limit)


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_mounted(path: Path) -> bool:
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
        return any(line.split(" ")[1] == str(path) for line in mounts)


def wait_for_mount(path: Path, process: subprocess.Popen[bytes], log: Path, limit: float = 30.0) -> None:
    deadline = time.monotonic() + limit
    while not is_mounted(path):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no mount: {log.read_text(errors='replace')[-500:].strip()}")
        time.sleep(0.02)
    os.stat(path)


def unmount(path: Path) -> None:
    """If it is mounted still, whatever holds it."""
    if is_mounted(path):
        command = ["umount", "-l"] if os.getuid() == 0 else ["fusermount3", "-u", "-z"]
        subprocess.run([*command, path], check=False, capture_output=True, timeout=30)


def can_drop_caches() -> bool:
    return os.access("/proc/sys/vm/drop_caches", os.W_OK)


def drop_caches(folder: Path) -> None:
    """Of the kernel: pages, names and inodes. Dirty pages are written first, or they would stay."""
    sync(folder)
    if can_drop_caches():
        Path("/proc/sys/vm/drop_caches").write_text("3\n")


def sync(folder: Path) -> None:
    """What earlier work left dirty is not written back during the next measurement."""
    subprocess.run(["sync", "-f", str(folder)], check=False, timeout=300)
