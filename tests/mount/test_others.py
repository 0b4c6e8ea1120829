"""Changes by other clients show up by themselves, at once, and in the right way."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from tests.support import Client, Mount, Mounter, Server, content, holds, noise, opened, raises, run, until


@pytest.mark.semantics("changes-by-others-show")
def test_put_by_another_client(folder: Path, client: Client) -> None:
    """A new object appears, also where the kernel has already been told that there is none."""
    assert not (folder / "f").exists()
    assert os.listdir(folder) == []
    client.put(folder.name, "f", b"new")
    until(lambda: (folder / "f").exists())
    assert (folder / "f").read_bytes() == b"new"
    assert os.listdir(folder) == ["f"]


def test_overwrite_by_another_client(folder: Path, client: Client) -> None:
    """The new content replaces the one in the kernel's page cache."""
    (folder / "f").write_bytes(b"old" * 1000)
    assert (folder / "f").read_bytes() == b"old" * 1000
    for number in range(20):
        data = noise(1000 + number, number)
        client.put(folder.name, "f", data)
        until(partial(holds, folder / "f", data))
        assert (folder / "f").stat().st_size == len(data)


@pytest.mark.semantics("changes-by-others-show")
def test_delete_by_another_client(folder: Path, client: Client) -> None:
    """The name goes, and comes back with the next put."""
    (folder / "f").write_bytes(b"x")
    client.delete(folder.name, "f")
    until(lambda: not (folder / "f").exists())
    assert os.listdir(folder) == []
    client.put(folder.name, "f", b"again")
    until(lambda: content(folder / "f") == b"again")


@pytest.mark.semantics("changes-by-others-show")
def test_rename_by_another_client(folder: Path, client: Client) -> None:
    """Go's way: the new name appears and the old one goes, although its purge is not announced by the stream."""
    (folder / "d").mkdir()
    (folder / "d/a").write_bytes(b"data")
    client.rename(folder.name, "d/a", "d/b")
    until(lambda: (folder / "d/b").exists())
    until(lambda: not (folder / "d/a").exists())
    assert os.listdir(folder / "d") == ["b"]
    assert (folder / "d/b").read_bytes() == b"data"


def test_rename_by_another_client_over_a_file(folder: Path, client: Client) -> None:
    """The old target's content is replaced."""
    (folder / "a").write_bytes(b"from a")
    (folder / "b").write_bytes(b"from b")
    assert (folder / "b").read_bytes() == b"from b"
    client.rename(folder.name, "a", "b")
    until(lambda: content(folder / "b") == b"from a")
    until(lambda: os.listdir(folder) == ["b"])


@pytest.mark.semantics("open-version-stays")
def test_a_handle_keeps_the_bytes_it_opened(folder: Path, client: Client) -> None:
    """After another client's overwrite an open handle reads the old version, a new one the new version."""
    old, new = noise(300_000, 1), noise(250_000, 2)
    (folder / "f").write_bytes(old)
    with opened(folder / "f", os.O_RDONLY) as fd:
        assert os.pread(fd, 300_000, 0) == old
        client.put(folder.name, "f", new)
        until(lambda: content(folder / "f") == new)
        assert os.pread(fd, 300_000, 0) == old
        assert os.fstat(fd).st_size == 300_000


@pytest.mark.semantics("one-version")
@pytest.mark.parametrize("size", [400_000, 3_000_000])
@pytest.mark.parametrize("kind", ["client", "natsfs"])
def test_no_reader_sees_two_versions_mixed(
    folder: Path, client: Client, shared: Mount, mount: Mounter, kind: str, size: int
) -> None:
    """While another client, or another mount, overwrites all the time, each whole reading is one version.

    A client purges what it replaces at once, so there a reading can end with ESTALE, which says so; a mount does not.
    """
    if kind == "client":
        shared.allow("are gone")
    versions = {bytes([number]) * size for number in range(10)}
    there = mount(f"/{folder.name}").path / "f" if kind == "natsfs" else None

    def put(number: int) -> None:
        data = bytes([number % 10]) * size
        if there is None:
            client.put(folder.name, "f", data)
        else:
            there.write_bytes(data)

    put(0)
    until(lambda: (folder / "f").exists())
    stop = threading.Event()
    problems: list[str] = []
    readings = [0]

    def read() -> None:
        while not stop.is_set():
            try:
                data = (folder / "f").read_bytes()
            except OSError as error:
                if kind == "natsfs" or error.errno != errno.ESTALE:
                    problems.append(str(error))
                continue
            readings[0] += 1
            if data not in versions:
                problems.append(f"{len(data)} bytes of {set(data)}")

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    try:
        for number in count():
            if (number >= 20 and readings[0] > 5) or time.monotonic() > deadline:
                break
            put(number)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert problems == []
    assert readings[0] > 5


def test_attributes_changed_by_another_mount(bucket: str, mount: Mounter) -> None:
    """chmod, chown and utimensat on one machine are seen on the other, in the same inode."""
    one, two = mount(f"/{bucket}").path, mount(f"/{bucket}").path
    (one / "f").write_bytes(b"x")
    until(lambda: (two / "f").exists())
    inode = (two / "f").stat().st_ino
    (one / "f").chmod(0o640)
    os.utime(one / "f", ns=(1, 1_000_000_001))
    until(lambda: (two / "f").stat().st_mtime_ns == 1_000_000_001)
    assert (two / "f").stat().st_mode & 0o777 == 0o640
    assert (two / "f").stat().st_ino == inode


def test_two_mounts_of_one_bucket(bucket: str, mount: Mounter) -> None:
    """What one does, the other sees: files, directories, renames, removals."""
    one, two = mount(f"/{bucket}").path, mount(f"/{bucket}").path
    (one / "d").mkdir()
    until(lambda: (two / "d").is_dir())
    (two / "d/f").write_bytes(b"from two")
    until(lambda: content(one / "d/f") == b"from two")
    (one / "d").rename(one / "e")
    until(lambda: content(two / "e/f") == b"from two")
    until(lambda: not (two / "d").exists())
    (two / "e/f").unlink()
    until(lambda: os.listdir(one / "e") == [])
    (one / "e").rmdir()
    until(lambda: os.listdir(two) == [])


@pytest.mark.semantics("exclusive-everywhere")
def test_exclusive_creation_between_two_mounts(bucket: str, mount: Mounter) -> None:
    """Lock files work between machines: of two attempts at the same time exactly one succeeds, every time."""
    roots = [mount(f"/{bucket}").path, mount(f"/{bucket}").path]
    for number in range(20):
        barrier = threading.Barrier(2)
        won: list[Path] = []

        def attempt(
            root: Path, barrier: threading.Barrier = barrier, won: list[Path] = won, n: int = number
        ) -> None:
            barrier.wait()
            try:
                os.close(os.open(root / f"lock{n}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                return
            won.append(root)

        threads = [threading.Thread(target=attempt, args=(root,)) for root in roots]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1


@pytest.mark.semantics("exclusive-everywhere")
def test_mkdir_between_two_mounts(bucket: str, mount: Mounter) -> None:
    """mkdir is exclusive between machines too."""
    roots = [mount(f"/{bucket}").path, mount(f"/{bucket}").path]
    command = "for n in $(seq 30); do mkdir d$n 2>/dev/null && echo $n; done; true"
    running = [
        subprocess.Popen(["sh", "-c", command], cwd=root, stdout=subprocess.PIPE, text=True) for root in roots
    ]
    made = [number for process in running for number in process.communicate(timeout=60)[0].split()]
    assert sorted(made, key=int) == [str(number) for number in range(1, 31)]


@pytest.mark.semantics("building-on-old-fails")
def test_a_change_that_was_overtaken(bucket: str, mount: Mounter, client: Client) -> None:
    """A change in the middle of a file that another client replaced meanwhile: ESTALE, and their content stays."""
    mounted = mount(f"/{bucket}")
    mounted.allow("replaced by somebody else|chunks of 'f' are gone")
    mounted.allow_failed()
    file = mounted.path / "f"
    file.write_bytes(noise(200_000))
    fd = os.open(file, os.O_RDWR)
    os.pwrite(fd, b"mine", 1000)
    client.put(bucket, "f", b"theirs")
    with raises(errno.ESTALE):
        os.close(fd)
    until(lambda: content(file) == b"theirs")
    assert client.read(bucket, "f") == b"theirs"
    kept = mounted.failed()
    assert [manifest["name"] for manifest in kept] == ["f"]
    assert Path(kept[0]["data"]).read_bytes()[1000:1004] == b"mine"


@pytest.mark.semantics("replacing-wins")
def test_a_replacement_wins_if_it_is_last(folder: Path, client: Client) -> None:
    """A file written anew over one that another client put meanwhile replaces it."""
    (folder / "f").write_bytes(b"old")
    with opened(folder / "f", os.O_WRONLY | os.O_TRUNC) as fd:
        os.write(fd, b"mine")
        client.put(folder.name, "f", b"theirs")
    assert client.read(folder.name, "f") == b"mine"
    until(lambda: content(folder / "f") == b"mine")


def test_listing_costs_no_request(fresh_server: Server, mount: Mounter) -> None:
    """`ls -lR` and `find` of a loaded bucket send nothing to the server."""
    client = fresh_server.client
    client.create_bucket("loaded")
    client.put_many("loaded", [f"d{number % 10}/e{number % 3}/f{number}" for number in range(500)])
    mounted = mount(server=fresh_server)
    assert len(run("find", mounted.path / "loaded", "-type", "f").stdout.splitlines()) == 500
    # A new directory entry cache: the kernel asks again for everything.
    time.sleep(0.3)
    before = fresh_server.received()
    for _ in range(3):
        assert run("ls", "-lR", mounted.path / "loaded").stdout.count("\n") > 500
        run("find", mounted.path / "loaded", "-newer", "/dev/null")
        assert not (mounted.path / "loaded/missing").exists()
    assert fresh_server.received() == before
    assert mounted.finish() == []


@pytest.mark.parametrize("backwards", [False, True])
def test_small_files_are_fetched_ahead(fresh_server: Server, mount: Mounter, backwards: bool) -> None:
    """Small files read one after the other cost a fraction of a request each; at random a request for each."""
    client = fresh_server.client
    client.create_bucket("b")
    names = [f"d/{number:03}" for number in range(200)]
    contents = {name: noise(100 + 97 * number % 5000, seed=number) for number, name in enumerate(names)}
    for name in reversed(names):
        client.put("b", name, contents[name])
    # Other clients replace what was fetched by then, or is about to be.
    replaced = {names[n]: noise(3000, seed=1000 + n) for n in (30, 31, 120, 199)}
    mounted = mount("/b", server=fresh_server)
    folder = mounted.path
    before = fresh_server.received()
    for number, name in enumerate(reversed(names) if backwards else names):
        if number == 29:
            for other, data in replaced.items():
                client.put("b", other, data)
            until(lambda: all((folder / name).stat().st_size == 3000 for name in replaced))
        wanted = contents[name] if number < 29 else replaced.get(name, contents[name])
        assert (folder / name).read_bytes() == wanted
    assert fresh_server.received() - before < len(names) // 4
    assert mounted.finish() == []


@pytest.mark.parametrize("size", [100_000, 300_000])
def test_files_of_some_chunks_are_fetched_ahead(
    fresh_server: Server, mount: Mounter, tmp_path: Path, size: int
) -> None:
    """Whoever opens the next one finds it in memory, also behind many of them."""
    client = fresh_server.client
    client.create_bucket("b")
    contents = {f"d/{number:03}": noise(size, seed=number) for number in range(60)}
    for name, data in contents.items():
        client.put("b", name, data)
    mounted = mount("/b", server=fresh_server)
    for place, (name, data) in enumerate(contents.items()):
        assert (mounted.path / name).read_bytes() == data
        if place in (20, 40):
            known = [f"d/{following:03}" for following in range(place + 1, place + 6)]
            asked = -1
            while asked != (asked := fresh_server.received()):
                time.sleep(0.3)
            fresh_server.pause()
            try:
                for other in known:
                    (tmp_path / "expected").write_bytes(contents[other])
                    run("cmp", mounted.path / other, tmp_path / "expected", limit=5)
            finally:
                fresh_server.resume()
    assert mounted.finish() == []


@pytest.mark.parametrize(("options", "expected"), [("", 1024), ("read_ahead=256K", 256)])
def test_how_far_the_kernel_reads_ahead(bucket: str, mount: Mounter, options: str, expected: int) -> None:
    mounted = mount(f"/{bucket}", options)
    device = mounted.path.stat().st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    assert int(setting.read_text()) == expected


def test_an_idle_mount_is_quiet(fresh_server: Server, mount: Mounter) -> None:
    """A loaded bucket that nobody uses sends nothing for some seconds: no polling."""
    fresh_server.client.create_bucket("idle")
    mounted = mount("/idle", server=fresh_server)
    time.sleep(1)
    before = fresh_server.received()
    time.sleep(4)
    assert fresh_server.received() - before <= 1
    assert mounted.finish() == []


@pytest.mark.semantics("directory-rename-elsewhere")
def test_a_directory_that_is_renamed_elsewhere(bucket: str, mount: Mounter) -> None:
    """Every file in it is found under its old or its new name at any time, and with its content."""
    here, there = mount(f"/{bucket}").path, mount(f"/{bucket}").path
    names = [f"{number:02}" for number in range(40)]
    (here / "a").mkdir()
    for name in names:
        (here / "a" / name).write_text(name)
    until(lambda: len(os.listdir(there / "a")) == len(names))
    stop = threading.Event()
    lost: list[str] = []
    looks = renames = 0

    def look() -> None:
        nonlocal looks
        while not stop.is_set():
            for name in names:
                before = renames
                # The one that it moves to is looked at last, and the one that it comes from again behind it.
                found = any((there / directory / name).exists() for directory in "aba")
                # A name that moves twice between two looks is rightly missed by each of them.
                if renames == before:
                    looks += 1
                    if not found:
                        lost.append(name)

    def rename(old: str, new: str) -> None:
        nonlocal renames
        renames += 1
        (here / old).rename(here / new)
        until(lambda: not (there / old).exists() and sorted(os.listdir(there / new)) == names)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(10):
            rename("a", "b")
            rename("b", "a")
    finally:
        stop.set()
        thread.join()
    assert looks > len(names)
    assert not lost
    assert [(there / "a" / name).read_text() for name in names] == names


@pytest.mark.semantics("read-again")
def test_what_was_read_is_here_again_before_anybody_asks(fresh_server: Server, mount: Mounter) -> None:
    """The new version of a small file that was read needs no server when it is opened."""
    client = fresh_server.client
    client.create_bucket("b")
    names = ("read", "not-read", "replaced-twice")
    for name in names:
        client.put("b", name, b"first")
    mounted = mount("/b", "timeout=2", server=fresh_server)
    mounted.allow("NATS connection|is lost|interrupted|out of reach")
    for name in ("read", "replaced-twice"):
        assert (mounted.path / name).read_bytes() == b"first"
    for name in names:
        client.put("b", name, b"second!")
    for name in names:
        until(lambda: (mounted.path / name).stat().st_size == 7)  # noqa: B023
    time.sleep(0.3)
    client.put("b", "replaced-twice", b"third one")
    until(lambda: (mounted.path / "replaced-twice").stat().st_size == 9)
    time.sleep(0.3)
    fresh_server.stop()
    assert (mounted.path / "read").read_bytes() == b"second!"
    for name in ("not-read", "replaced-twice"):
        with pytest.raises(OSError):
            (mounted.path / name).read_bytes()
