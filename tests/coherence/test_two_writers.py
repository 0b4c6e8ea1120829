"""Two mounts, and other clients, write the same files at the same time."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from tests.coherence.proxy import Proxy
from tests.coherence.test_seen_at_once import Writers, entry, whole
from tests.posix.libc import RENAME_NOREPLACE, renameat2
from tests.support import Client, Mount, Mounter, Server, content, noise, opened, raises, run, until


@pytest.fixture(params=["natsfs", "go", "rust", "javascript", "python"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.semantics("replacing-wins")
def test_the_last_replacement_wins(
    folders: tuple[Path, Path], writers: Writers, mounts: tuple[Mount, Mount], kind: str
) -> None:
    """Of two that write a file anew the one that closes last has its content there; the other one got no error."""
    here, there = folders
    writer = writers(kind, mounts[1])
    (here / "f").write_bytes(noise(200_000))
    until(lambda: (there / "f").exists())
    for flags in (os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_CREAT | os.O_TRUNC):
        with opened(here / "f", flags) as fd:
            os.write(fd, b"mine" * 50_000)
            writer.put(here.name, "f", b"theirs" * 10)
        until(lambda: entry(there / "f") == whole(b"mine" * 50_000))
        assert entry(here / "f") == whole(b"mine" * 50_000)
        writer.put(here.name, "f", b"last")
        until(lambda: entry(here / "f") == whole(b"last"))


@pytest.mark.semantics("building-on-old-fails")
@pytest.mark.parametrize("then", ["put", "delete"])
def test_a_change_of_what_is_gone(
    folders: tuple[Path, Path],
    writers: Writers,
    mounts: tuple[Mount, Mount],
    kind: str,
    then: str,
    mount: Mounter,
) -> None:
    """Who changed a part of a file that somebody else replaced or removed: ESTALE at close, their data is kept."""
    here, there = folders
    writer = writers(kind, mounts[1])
    loser = mount(f"/{here.name}")
    loser.allow("replaced by somebody else|are gone|removed")
    loser.allow_failed()
    (there / "f").write_bytes(noise(3_000_000))
    until(lambda: (loser.path / "f").exists())
    fd = os.open(loser.path / "f", os.O_RDWR)
    os.pwrite(fd, b"mine", 1000)
    if then == "put":
        writer.put(here.name, "f", b"theirs")
    else:
        writer.delete(here.name, "f")
    with raises(errno.ESTALE):
        os.close(fd)
    kept = loser.failed()
    assert [manifest["name"] for manifest in kept] == ["f"]
    assert Path(kept[0]["data"]).read_bytes()[1000:1004] == b"mine"
    expected = whole(b"theirs") if then == "put" else None
    until(lambda: entry(loser.path / "f") == expected)
    assert entry(here / "f") == expected


# One process for each mount: it appends its lines, each with one write(2).
APPENDER = """
import os, sys
path, who, count, how = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
fd = os.open(path, flags) if how == "hold" else -1
for number in range(count):
    line = f"{who} {number} {'x' * (number % 90)}\\n".encode()
    if how == "hold":
        os.write(fd, line)
        if number % 5 == 4:
            os.fsync(fd)
    else:
        fd = os.open(path, flags)
        os.write(fd, line)
        os.close(fd)
if how == "hold":
    os.close(fd)
"""


def lines_of(who: int, count: int) -> list[str]:
    return [f"{who} {number} {'x' * (number % 90)}" for number in range(count)]


@pytest.mark.semantics("appends-from-several-machines")
def test_two_append_to_a_file_that_is_new_here_and_elsewhere(
    folders: tuple[Path, Path], client: Client
) -> None:
    here, there = folders
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with opened(here / "log", flags) as one:
        os.write(one, b"one\n")
        with opened(here / "log", flags) as two, opened(there / "log", flags) as other:
            os.write(two, b"two\n")
            os.write(other, b"other\n")
            os.fsync(other)
    assert client.read(here.name, "log") == b"other\none\ntwo\n"


@pytest.mark.semantics("appends-from-several-machines")
@pytest.mark.parametrize(
    ("how", "first", "count"),
    [("hold", "", 500), ("hold", "first\n", 125), ("close", "", 125), ("close", "first\n", 125)],
    ids=["hold-new", "hold-existing", "close-new", "close-existing"],
)
def test_appends_on_four_mounts(
    bucket: str, mount: Mounter, client: Client, how: str, first: str, count: int
) -> None:
    """O_APPEND on four mounts loses no line, tears none, and keeps each writer's order."""
    mounted = [mount(f"/{bucket}") for _ in range(4)]
    if first:
        (mounted[0].path / "log").write_text(first)
    for one in mounted:
        until(lambda one=one: (one.path / "log").exists() == bool(first))  # type: ignore[misc]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", APPENDER, one.path / "log", str(who), str(count), how],
            stderr=subprocess.PIPE,
            text=True,
        )
        for who, one in enumerate(mounted)
    ]
    said = [process.communicate(timeout=100)[1] for process in running]
    assert said == [""] * 4
    text = client.read(bucket, "log").decode()
    lines = text.splitlines()
    assert text.startswith(first)
    for who in range(4):
        assert [line for line in lines if line.startswith(f"{who} ")] == lines_of(who, count)
    assert len(lines) == bool(first) + 4 * count
    for one in mounted:
        until(lambda one=one: (one.path / "log").read_text() == text)  # type: ignore[misc]


@pytest.mark.semantics("appends-from-several-machines")
def test_an_append_to_what_another_client_replaced(
    folders: tuple[Path, Path], writers: Writers, mounts: tuple[Mount, Mount], kind: str
) -> None:
    """Appended bytes follow on what another client has put meanwhile; the mount that appended shows the same."""
    here, there = folders
    mounts[0].allow("are gone")
    writer = writers(kind, mounts[1])
    for number, size in enumerate((10, 200_000, 3_000_000)):
        (here / "f").write_bytes(noise(size, 1))
        until(lambda size=size: entry(there / "f") == whole(noise(size, 1)))  # type: ignore[misc]
        fd = os.open(here / "f", os.O_WRONLY | os.O_APPEND)
        os.write(fd, b"mine")
        theirs = noise(size // 2 + number, 2)
        writer.put(here.name, "f", theirs)
        os.write(fd, b" and more")
        os.close(fd)
        expected = theirs + b"mine and more"
        assert entry(here / "f") == whole(expected)
        until(lambda expected=expected: entry(there / "f") == whole(expected))  # type: ignore[misc]
        with opened(here / "f", os.O_WRONLY | os.O_APPEND) as fd:
            for part in (b"1", b"2", b"3"):
                os.write(fd, part)
                os.fsync(fd)
                writer.put(here.name, "f", theirs + part)
        until(lambda: entry(here / "f") == entry(there / "f"))
        assert entry(here / "f") == whole(theirs + b"3")


@pytest.mark.semantics("appends-from-several-machines")
def test_what_was_not_only_appended_is_not_moved(
    folders: tuple[Path, Path], client: Client, mount: Mounter
) -> None:
    """One write that was not at the end, and the change is refused with ESTALE: it was about the old content."""
    here, _ = folders
    loser = mount(f"/{here.name}")
    loser.allow("replaced by somebody else|are gone")
    loser.allow_failed()
    (here / "f").write_bytes(b"0123456789")
    until(lambda: (loser.path / "f").exists())
    appending = os.open(loser.path / "f", os.O_WRONLY | os.O_APPEND)
    changing = os.open(loser.path / "f", os.O_WRONLY)
    os.write(appending, b"end")
    os.pwrite(changing, b"X", 3)
    client.put(here.name, "f", b"theirs")
    with raises(errno.ESTALE):
        os.close(appending)
    with raises(errno.ESTALE):
        os.close(changing)
    until(lambda: entry(loser.path / "f") == whole(b"theirs"))
    assert client.read(here.name, "f") == b"theirs"


@pytest.mark.semantics("exclusive-everywhere")
def test_a_lock_file(folders: tuple[Path, Path]) -> None:
    """A lock file made with O_EXCL and removed again excludes between two mounts: the counter it guards is right.

    Who has it next sees what was done under it before.
    """
    here, there = folders
    (here / "counter").write_text("0")
    until(lambda: (there / "counter").exists())
    script = """
import os, sys, time
folder, count = sys.argv[1], int(sys.argv[2])
def take(path):
    while True:
        try:
            return os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            time.sleep(0.001)
for _ in range(count):
    take(folder + "/lock")
    try:
        os.close(os.open(folder + "/inside", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.unlink(folder + "/inside")
        with open(folder + "/total", "a") as total:
            total.write("x")
        with open(folder + "/counter") as counter:
            value = int(counter.read())
        with open(folder + "/counter", "w") as counter:
            counter.write(str(value + 1))
    finally:
        os.unlink(folder + "/lock")
"""
    count = 40
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, folder, str(count)], stderr=subprocess.PIPE, text=True
        )
        for folder in folders
    ]
    assert [process.communicate(timeout=100)[1] for process in running] == ["", ""]
    until(lambda: (here / "total").read_text() == "x" * 2 * count)
    assert [(folder / "counter").read_text() for folder in folders] == [str(2 * count)] * 2


LOCKS: dict[str, Callable[[Path], object]] = {
    "O_EXCL": lambda path: os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)),
    "mkdir": lambda path: path.mkdir(),
    "symlink": lambda path: path.symlink_to("x"),
    "mknod": os.mknod,
    "RENAME_NOREPLACE": lambda path: renameat2(path.with_name("mine"), path, RENAME_NOREPLACE),
}


@pytest.mark.semantics("exclusive-everywhere")
@pytest.mark.parametrize("how", LOCKS)
def test_a_lock_of_which_nothing_was_heard(
    proxied: tuple[Server, Proxy], nats_server: Server, bucket: str, mount: Mounter, how: str
) -> None:
    """It was taken and given back elsewhere; what was written under it shows to who has it next."""
    behind, proxy = proxied
    here, there = (mount(f"/{bucket}", server=server).path for server in (behind, nats_server))
    (here / "index").write_text("old")
    (here / "mine").write_bytes(b"")
    until(lambda: content(there / "index") == b"old")
    assert not (here / "lock").exists()
    with proxy.holding(b'"name":"lock', answers=True) as hold:
        LOCKS["mkdir" if how == "mkdir" else "O_EXCL"](there / "lock")
        assert hold.holds.wait(10)
        (there / "index").write_text("new")
        if how == "mkdir":
            (there / "lock").rmdir()
        else:
            (there / "lock").unlink()

        def take() -> bytes | None:
            while True:
                try:
                    LOCKS[how](here / "lock")
                    return content(here / "index")
                except FileExistsError:
                    time.sleep(0.001)

        with ThreadPoolExecutor() as threads:
            taken = threads.submit(take)
            wait([taken], 0.5)  # one that waits for nothing is over by now
            hold.release()
            assert taken.result(20) == b"new"


@pytest.mark.semantics("exclusive-everywhere")
def test_exclusive_calls(folders: tuple[Path, Path]) -> None:
    """O_EXCL, mkdir, symlink, mknod and RENAME_NOREPLACE at once on two mounts: one succeeds, each time."""
    number = 25
    here, there = folders
    for root in folders:
        for n in range(number):
            (root / f"source {root.parent.parent.name} {n}").write_bytes(b"")
            (root / f"directory {root.parent.parent.name} {n}").mkdir()
    for root, other in ((here, there), (there, here)):
        until(lambda root=root, other=other: len(os.listdir(root)) == 4 * number)  # type: ignore[misc]
    script = """
import ctypes, os, sys, threading
folder, number, own = sys.argv[1], int(sys.argv[2]), sys.argv[3]
libc = ctypes.CDLL(None, use_errno=True)
def rename(source, target):
    if libc.renameat2(-100, os.fsencode(f"{folder}/{source}"), -100, os.fsencode(f"{folder}/{target}"), 1):
        raise OSError(ctypes.get_errno(), "rename")
calls = {
    "e": lambda n: os.close(os.open(f"{folder}/e{n}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)),
    "d": lambda n: os.mkdir(f"{folder}/d{n}"),
    "l": lambda n: os.symlink("x", f"{folder}/l{n}"),
    "n": lambda n: os.mknod(f"{folder}/n{n}"),
    "p": lambda n: os.mkfifo(f"{folder}/p{n}"),
    "r": lambda n: rename(f"source {own} {n}", f"r{n}"),
    "m": lambda n: rename(f"directory {own} {n}", f"m{n}"),
}
print("ready", flush=True)
sys.stdin.readline()
for n in range(number):
    for what, call in calls.items():
        try:
            call(n)
        except FileExistsError:
            continue
        print(f"{what}{n}")
"""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, root, str(number), root.parent.parent.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for root in folders
    ]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    made: list[str] = []
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        made += process.communicate(timeout=60)[0].split()
    assert Counter(made) == Counter(f"{what}{n}" for what in "edlnprm" for n in range(number))


@pytest.mark.semantics("excl-local")
def test_excl_local(bucket: str, mount: Mounter, client: Client) -> None:
    """excl=local: O_EXCL looks at what this mount knows only, and writes nothing until the file is closed."""
    mounted = mount(f"/{bucket}", "excl=local")
    fd = os.open(mounted.path / "f", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    assert client.subjects(bucket, "M") == {}
    client.put(bucket, "f", b"theirs")
    os.write(fd, b"mine")
    os.close(fd)
    until(lambda: entry(mounted.path / "f") == whole(b"mine"))
    with raises(errno.EEXIST):
        os.open(mounted.path / "f", os.O_CREAT | os.O_EXCL | os.O_WRONLY)


@pytest.mark.semantics("excl-local")
def test_what_stays_exclusive_with_excl_local(
    proxied: tuple[Server, Proxy], bucket: str, mount: Mounter
) -> None:
    """Of names that others have taken, and of which nothing was heard here: O_EXCL takes them, nothing else does."""
    behind, proxy = proxied
    there = mount(f"/{bucket}").path
    here = mount(f"/{bucket}", "excl=local", server=behind).path
    (here / "mine").write_bytes(b"mine")
    until(lambda: (there / "mine").exists())
    for how, take in LOCKS.items():
        name = f"lock {how}"
        with proxy.holding(f'"name":"{name}'.encode(), answers=True) as hold, ThreadPoolExecutor() as threads:
            (there / name).mkdir() if how == "mkdir" else (there / name).write_bytes(b"theirs")
            assert hold.holds.wait(10)
            taken = threads.submit(take, here / name)
            wait([taken], 0.5)  # one that asks the store waits for what is held
            hold.release()
            problem = taken.exception(20)
        assert (problem is None) == (how == "O_EXCL")
        assert problem is None or isinstance(problem, FileExistsError)
    assert (here / "mine").read_bytes() == b"mine"


@pytest.mark.semantics("renames-over-one-name")
def test_renames_over_one_name(folders: tuple[Path, Path], client: Client) -> None:
    """Two mounts rename over the same file at once: it is one of the two, whole, and the chunks of both are kept."""
    bucket = folders[0].name
    (folders[0] / "target").write_bytes(noise(200_000))
    until(lambda: (folders[1] / "target").exists())
    for number in range(15):
        contents = [noise(200_000 + who, 2 * number + who) for who in range(2)]
        barrier = threading.Barrier(2)
        problems: list[str] = []

        def work(
            who: int,
            contents: list[bytes] = contents,
            barrier: threading.Barrier = barrier,
            number: int = number,
            problems: list[str] = problems,
        ) -> None:
            path = folders[who] / f"new{who}.{number}"
            path.write_bytes(contents[who])
            barrier.wait()
            try:
                path.rename(folders[who] / "target")
            except OSError as error:
                problems.append(str(error))

        threads = [threading.Thread(target=work, args=(who,)) for who in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert problems == []
        stored = client.read(bucket, "target")
        assert stored in contents
        for folder in folders:
            until(lambda folder=folder: entry(folder / "target") == whole(stored))  # type: ignore[misc]  # noqa: B023
            until(lambda folder=folder: os.listdir(folder) == ["target"])  # type: ignore[misc]


@pytest.mark.semantics("renames-over-one-name")
def test_one_file_renamed_twice(folders: tuple[Path, Path], client: Client) -> None:
    """Two mounts rename the same file to two names at once: its content is under one or both of them, never lost."""
    bucket = folders[0].name
    for number in range(15):
        data = noise(150_000, number)
        (folders[0] / "f").write_bytes(data)
        until(lambda data=data: entry(folders[1] / "f") == whole(data))  # type: ignore[misc]
        barrier = threading.Barrier(2)
        done: list[str] = []

        def work(who: int, barrier: threading.Barrier = barrier, done: list[str] = done) -> None:
            barrier.wait()
            try:
                (folders[who] / "f").rename(folders[who] / f"to{who}")
            except (FileNotFoundError, OSError) as error:
                assert error.errno in (errno.ENOENT, errno.ESTALE), error  # noqa: PT017
                return
            done.append(f"to{who}")

        threads = [threading.Thread(target=work, args=(who,)) for who in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(done) == 1
        assert client.names(bucket) == set(done)
        assert client.read(bucket, done[0]) == data
        for folder in folders:
            until(lambda folder=folder: os.listdir(folder) == done)  # type: ignore[misc]  # noqa: B023
            assert entry(folder / done[0]) == whole(data)
        run("rm", folders[0] / done[0])
        until(lambda: os.listdir(folders[1]) == [])
