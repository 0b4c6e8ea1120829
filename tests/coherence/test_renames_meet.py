"""A rename, and what others do to its two names between its messages."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from natsfs.names import encode_subject
from tests.coherence.proxy import Proxy
from tests.posix.libc import RENAME_EXCHANGE, renameat2
from tests.support import Client, Mount, Mounter, Server, content, until

TOMBSTONE = b'"deleted":true'


class Call(threading.Thread):
    """A call that has to wait; `error` is its errno, 0 if it succeeded."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.error: int | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except OSError as error:
            self.error = error.errno
        else:
            self.error = 0

    def waits_in_the_kernel(self) -> bool:
        """For the directory, which another call has."""
        stat = Path(f"/proc/self/task/{self.native_id}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "D"

    def ended(self) -> int | None:
        self.join(20)
        return self.error


@pytest.fixture
def proxy(nats_server: Server) -> Iterator[Proxy]:
    proxy = Proxy(nats_server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def pair(proxy: Proxy, bucket: str, mount: Mounter, nats_server: Server) -> tuple[Mount, Mount]:
    """Two mounts of a bucket, behind the proxy."""
    behind = Server()
    behind.port = proxy.port
    behind._process, behind._connected = nats_server._process, nats_server.client
    mounts = mount(f"/{bucket}", server=behind), mount(f"/{bucket}", server=behind)
    mounts[0].allow(" WARNING ")  # that the rename met another's change
    return mounts


def fill(slow: Mount, other: Mount, *names: str) -> None:
    """Files with their names as content, known to both mounts."""
    (slow.path / "d").mkdir()
    for name in names:
        (slow.path / name).write_text(name)
    for name in names:
        until(lambda name=name: (other.path / name).exists())  # type: ignore[misc]


def caught_up(slow: Mount, other: Mount) -> None:
    """The first mount has heard of all that the second one did; the kernel, which keeps no such attributes, not."""
    mark = os.urandom(4).hex().encode()
    os.setxattr(other.path / "d", "user.mark", mark)
    until(lambda: "user.mark" in os.listxattr(slow.path / "d"))
    until(lambda: os.getxattr(slow.path / "d", "user.mark") == mark)


def text(path: Path) -> str | None:
    data = content(path)
    return None if data is None else data.decode()


def files(client: Client, bucket: str) -> set[str]:
    return {name for name in client.names(bucket) if not name.endswith("/")}


def forgotten(client: Client, bucket: str, mounts: int) -> None:
    """What the server had for a connection that was cut goes by itself."""

    def bound() -> list[bool]:
        return [bool(consumer.get("push_bound")) for consumer in client.consumers(bucket)]

    until(lambda: bound() == [True] * mounts, 20)


def agree(slow: Mount, other: Mount, client: Client, bucket: str, expected: dict[str, str]) -> None:
    """Both mounts and the store have just `expected`."""
    assert {name: client.read(bucket, name).decode() for name in expected} == expected
    assert files(client, bucket) == expected.keys()
    for path in (slow.path, other.path):
        # By name first: a listing tells the kernel anew what each name leads to.
        until(lambda path=path: {name: text(path / name) for name in expected} == expected)  # type: ignore[misc]
        assert {str(one.relative_to(path)) for one in path.rglob("*") if one.is_file()} == expected.keys()


@contextlib.contextmanager
def renaming(pair: tuple[Mount, Mount], proxy: Proxy) -> Iterator[Callable[[], int | None]]:
    """`f` to `g`: others see the new name, and the removal of the old one waits for the call, which gives the errno."""
    slow, other = pair
    with proxy.holding(TOMBSTONE) as hold:
        rename = Call(lambda: (slow.path / "f").rename(slow.path / "g"))
        assert hold.holds.wait(10)
        until(lambda: text(other.path / "g") == "f")

        def ended() -> int | None:
            hold.release()
            return rename.ended()

        yield ended


@pytest.mark.semantics("renames-over-one-name")
def test_a_file_that_is_renamed_back_at_once(
    pair: tuple[Mount, Mount], proxy: Proxy, client: Client, bucket: str
) -> None:
    """The first rename's end must not bury what the second one has made."""
    slow, other = pair
    fill(slow, other, "f")
    with renaming(pair, proxy) as ended:
        (other.path / "g").rename(other.path / "f")
        assert ended() == 0
    agree(slow, other, client, bucket, {"f": "f"})


@pytest.mark.semantics("renames-over-one-name")
def test_what_a_failed_rename_had_replaced_is_not_lost(
    pair: tuple[Mount, Mount], proxy: Proxy, client: Client, bucket: str
) -> None:
    """Its source was removed meanwhile, and what stood under its target for a moment was renamed on."""
    slow, other = pair
    fill(slow, other, "f", "g")
    with renaming(pair, proxy) as ended:
        (other.path / "f").unlink()
        (other.path / "g").rename(other.path / "h")
        assert ended() == errno.ENOENT
    agree(slow, other, client, bucket, {"g": "g", "h": "f"})


@pytest.mark.semantics("renames-over-one-name")
def test_the_same_rename_elsewhere(
    pair: tuple[Mount, Mount], proxy: Proxy, client: Client, bucket: str
) -> None:
    """The one that comes too late takes nothing back of what the other one has done."""
    slow, other = pair
    fill(slow, other, "f")
    with renaming(pair, proxy) as ended:
        (other.path / "f").rename(other.path / "g")
        assert ended() in (errno.ENOENT, errno.ESTALE)
    agree(slow, other, client, bucket, {"g": "f"})


@pytest.mark.semantics("changes-by-others-show")
@pytest.mark.parametrize("exchange", [False, True], ids=["rename", "exchange"])
def test_what_is_renamed_was_replaced_meanwhile(
    pair: tuple[Mount, Mount], proxy: Proxy, client: Client, bucket: str, exchange: bool
) -> None:
    """The kernel, which had not heard of it, has the old version under the new name then."""
    slow, other = pair
    fill(slow, other, "d/a", "f", "d/g")
    with proxy.holding(b'"name":"d/b"') as hold:
        first = Call(lambda: (slow.path / "d/a").rename(slow.path / "d/b"))
        assert hold.holds.wait(10)
        # It has the outer directory, so that the kernel takes no news of it, and waits for the inner one.
        second = Call(
            lambda: renameat2(slow.path / "f", slow.path / "d/g", RENAME_EXCHANGE if exchange else 0)
        )
        until(second.waits_in_the_kernel)
        (other.path / "f").write_text("new")
        caught_up(slow, other)
        hold.release()
        assert (first.ended(), second.ended()) == (0, 0)
        assert text(slow.path / "d/g") == "new"
        if exchange:
            assert text(slow.path / "f") == "d/g"
    expected = {"d/b": "d/a", "d/g": "new"} | ({"f": "d/g"} if exchange else {})
    agree(slow, other, client, bucket, expected)


@pytest.mark.semantics("changes-by-others-show")
def test_a_name_that_the_kernel_takes_for_another(
    pair: tuple[Mount, Mount], proxy: Proxy, client: Client, bucket: str
) -> None:
    """While a call keeps its directory the kernel cannot hear of a removal: what is written is nobody's then."""
    slow, other = pair
    fill(slow, other, "f", "g", "h")
    assert (slow.path / "h").stat().st_size == 1
    with proxy.holding(b'"name":"g"') as hold:
        rename = Call(lambda: (slow.path / "f").rename(slow.path / "g"))
        assert hold.holds.wait(10)
        (other.path / "h").unlink()
        caught_up(slow, other)
        change = Call(lambda: (slow.path / "h").open("r+").close())
        change.join(0.5)  # without a second look it is over by now, and has opened what is gone
        hold.release()
        assert rename.ended() == 0
        assert change.ended() == errno.ENOENT
    agree(slow, other, client, bucket, {"g": "f"})


def fill_directory(slow: Mount, other: Mount) -> None:
    """A directory `r` with three files and one below it, which the kernel of both mounts knows."""
    (slow.path / "r/s").mkdir(parents=True)
    fill(slow, other, "r/a", "r/b", "r/c", "r/s/t")
    for one in (slow, other):
        assert os.stat(one.path / "r/s/t").st_size == len("r/s/t")


FILLED = {"r/a": "r/a", "r/b": "r/b", "r/c": "r/c", "r/s/t": "r/s/t"}


def moved(files: dict[str, str]) -> dict[str, str]:
    return {name.replace("r/", "e/", 1): text for name, text in files.items()}


def replace_by_rename(path: Path, text: str) -> None:
    new = path.parent.parent / "new"
    new.write_text(text)
    new.rename(path)


@pytest.mark.semantics("directories-renamed-while-changed")
@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda r: (r / "x").write_text("x"), {"r/x": "x"}),
        (lambda r: (r / "n").mkdir() or (r / "n/x").write_text("x"), {"r/n/x": "x"}),
        (lambda r: (r / "s/x").write_text("x"), {"r/s/x": "x"}),
        (lambda r: (r / "a").write_text("new"), {"r/a": "new"}),
        (lambda r: replace_by_rename(r / "a", "new"), {"r/a": "new"}),
        (lambda r: (r / "a").unlink(), {"r/a": None}),
        (lambda r: (r / "a").unlink() or (r / "a").write_text("new"), {"r/a": "new"}),
        (lambda r: (r / "a").chmod(0o640), {}),
        (lambda r: (r / "s").chmod(0o750), {}),
        (lambda r: (r / "a").rename(r / "x"), {"r/a": None, "r/x": "r/a"}),
        (lambda r: (r / "s").rename(r / "n"), {"r/s/t": None, "r/n/t": "r/s/t"}),
        (lambda r: (r / "s/t").unlink() or (r / "s").rmdir(), {"r/s/t": None}),
    ],
    ids=[
        "added",
        "added in a new directory",
        "added below",
        "written",
        "replaced",
        "removed",
        "made again",
        "chmod",
        "chmod of a directory",
        "renamed",
        "directory renamed",
        "directory removed",
    ],
)
def test_a_directory_is_changed_while_it_is_renamed(
    pair: tuple[Mount, Mount],
    proxy: Proxy,
    client: Client,
    bucket: str,
    change: Callable[[Path], object],
    changed: dict[str, str | None],
) -> None:
    """What others did to it goes with it; the next call by the new path is for what it leads to."""
    slow, other = pair
    fill_directory(slow, other)
    with proxy.holding(TOMBSTONE) as hold:
        rename = Call(lambda: (slow.path / "r").rename(slow.path / "e"))
        assert hold.holds.wait(10)
        change(other.path / "r")
        caught_up(slow, other)
        hold.release()
        assert rename.ended() == 0
    expected = moved({name: text for name, text in {**FILLED, **changed}.items() if text is not None})
    assert {name: text(slow.path / name) for name in expected} == expected
    assert not (slow.path / "r").exists()
    agree(slow, other, client, bucket, expected)
    for one in pair:
        assert sorted(os.listdir(one.path)) == ["d", "e"]
        if not changed:
            assert {(one.path / name).stat().st_mode & 0o777 for name in ("e/a", "e/s")} & {0o640, 0o750}


@pytest.mark.semantics("directories-renamed-while-changed")
def test_both_names_of_a_directory_are_used_while_it_is_renamed(
    pair: tuple[Mount, Mount], proxy: Proxy, client: Client, bucket: str
) -> None:
    """What others put under the new name stays there; what they put under the old one later stays there."""
    slow, other = pair
    fill_directory(slow, other)
    with proxy.holding(TOMBSTONE) as hold:
        rename = Call(lambda: (slow.path / "r").rename(slow.path / "e"))
        assert hold.holds.wait(10)
        until((other.path / "e/s/t").exists)
        (other.path / "e/z").write_text("z")
        (other.path / "e/s/z").write_text("z")
        caught_up(slow, other)
        hold.release()
        assert rename.ended() == 0
    # The directory that the kernel has moved is the one that the new path leads to, at once.
    (slow.path / "e/new").write_text("new")
    (slow.path / "e/s/t").unlink()
    (slow.path / "e/b").rename(slow.path / "e/s/b")
    until(lambda: not (other.path / "r").exists())
    (other.path / "r").mkdir()
    (other.path / "r/a").write_text("later")
    expected = moved(FILLED) | {"e/z": "z", "e/s/z": "z", "e/new": "new", "e/s/b": "r/b", "r/a": "later"}
    del expected["e/s/t"], expected["e/b"]
    agree(slow, other, client, bucket, expected)


@pytest.mark.semantics("directories-renamed-while-changed")
def test_a_directory_is_not_renamed_over_what_others_have_put_there(
    pair: tuple[Mount, Mount], proxy: Proxy, client: Client, bucket: str
) -> None:
    slow, other = pair
    fill_directory(slow, other)
    with proxy.holding(b'"name":"e/') as hold:
        rename = Call(lambda: (slow.path / "r").rename(slow.path / "e"))
        assert hold.holds.wait(10)
        (other.path / "e").mkdir()
        (other.path / "e/b").write_text("theirs")
        hold.release()
        assert rename.ended() == errno.ENOTEMPTY
    agree(slow, other, client, bucket, FILLED | {"e/b": "theirs"})


@pytest.mark.semantics("directories-renamed-while-changed")
def test_what_was_moved_stays_where_its_old_name_is_in_use_again(
    pair: tuple[Mount, Mount], proxy: Proxy, client: Client, bucket: str
) -> None:
    """A directory's rename fails when others have found one of the old names free: that file has its new name only."""
    slow, other = pair
    fill_directory(slow, other)
    with proxy.holding(TOMBSTONE) as first:
        rename = Call(lambda: (slow.path / "r").rename(slow.path / "e"))
        assert first.holds.wait(10)
        (other.path / "r/a").write_text("new")  # comes along in a second round
        until((other.path / "e/s/t").exists)
        with proxy.holding(b'"name":"e/a"') as second:
            first.release()
            assert second.holds.wait(10)
            until(lambda: not (other.path / "r/b").exists())
            (other.path / "r/b").write_text("theirs")
            (other.path / "e/a").unlink()
            second.release()
            assert rename.ended() == errno.ENOTEMPTY
    agree(slow, other, client, bucket, FILLED | {"r/a": "new", "r/b": "theirs", "e/b": "r/b"})


@pytest.fixture
def third(pair: tuple[Mount, Mount], bucket: str, mount: Mounter, nats_server: Server) -> Mount:
    """One more mount of the bucket, which does not stand behind the proxy."""
    server = pair[0].server
    port, server.port = server.port, nats_server.port
    try:
        return mount(f"/{bucket}", server=server)
    finally:
        server.port = port


@pytest.mark.semantics("directories-renamed-while-changed")
def test_the_answer_to_a_removal_is_lost_and_the_name_is_in_use_again(
    pair: tuple[Mount, Mount], third: Mount, proxy: Proxy, client: Client, bucket: str
) -> None:
    """As above: what was moved from there stays, although nobody knows that its old name was gone."""
    slow, _ = pair
    for one in pair:
        one.allow(" WARNING ")
    fill_directory(slow, third)
    with proxy.holding(TOMBSTONE) as first:
        rename = Call(lambda: (slow.path / "r").rename(slow.path / "e"))
        assert first.holds.wait(10)
        until((third.path / "e/s/t").exists)
        (third.path / "r/x").write_text("x")
        (third.path / "e/x").write_text("theirs")
        caught_up(slow, third)
        with proxy.holding(b'{"stream":"OBJ_', answers=True) as second:
            first.release()
            assert second.holds.wait(10)
            until(lambda: not (third.path / "r/b").exists())
            (third.path / "r/b").write_text("theirs")
            time.sleep(0.3)  # until the mount behind the proxy has heard of it
            proxy.cut()
            second.release()
            assert rename.ended() == errno.ENOTEMPTY
    expected = FILLED | {"r/x": "x", "e/x": "theirs", "r/b": "theirs", "e/b": "r/b"}
    until(lambda: files(client, bucket) == expected.keys(), 10)
    agree(slow, third, client, bucket, expected)
    forgotten(client, bucket, 3)


@contextlib.contextmanager
def same_renames(
    slow: Mount, other: Mount, proxy: Proxy, client: Client, bucket: str
) -> Iterator[tuple[Callable[[], int | None], Callable[[], int | None]]]:
    """Both mounts rename `r` to `e`. They have published the new names, and each removes the old ones when told."""
    fill_directory(slow, other)
    other.allow(" WARNING ")
    (other.path / "k").mkdir()
    with proxy.holding(b'"name":"d/gate/"') as gate:
        # It keeps the names of the bucket: the rename, which has found its target free, waits for them.
        mkdir = Call((other.path / "d/gate").mkdir)
        assert gate.holds.wait(10)
        same = Call(lambda: (other.path / "r").rename(other.path / "e"))
        time.sleep(0.5)
        with proxy.holding(TOMBSTONE) as first:
            rename = Call(lambda: (slow.path / "r").rename(slow.path / "e"))
            assert first.holds.wait(10)
            client.put(bucket, "k/heard", b"")
            until(lambda: os.listdir(other.path / "k") == ["heard"])
            with proxy.holding(TOMBSTONE) as second:
                gate.release()
                assert mkdir.ended() == 0
                assert second.holds.wait(10)

                def end_first() -> int | None:
                    first.release()
                    return rename.ended()

                def end_second() -> int | None:
                    second.release()
                    return same.ended()

                yield end_first, end_second
    client.delete(bucket, "k/heard")


@pytest.mark.semantics("directories-renamed-while-changed")
def test_the_same_rename_of_a_directory_elsewhere(
    pair: tuple[Mount, Mount], proxy: Proxy, client: Client, bucket: str
) -> None:
    """What is put under an old name when one of the two is done with it is no new version of what both have moved."""
    slow, other = pair
    with same_renames(slow, other, proxy, client, bucket) as (end_first, end_second):
        assert end_first() == 0
        client.put(bucket, "r/b", b"theirs")
        assert end_second() == 0
    agree(slow, other, client, bucket, moved(FILLED) | {"r/b": "theirs"})


@pytest.mark.semantics("directories-renamed-while-changed")
@pytest.mark.parametrize("order", [1, -1], ids=["first", "second"])
@pytest.mark.parametrize("change", ["chmod", "written"])
def test_a_file_is_changed_during_the_same_rename_of_two(
    pair: tuple[Mount, Mount],
    third: Mount,
    proxy: Proxy,
    client: Client,
    bucket: str,
    order: int,
    change: str,
) -> None:
    """It comes along, whoever ends first, and nothing has two names in the end."""
    slow, other = pair
    with same_renames(slow, other, proxy, client, bucket) as ends:
        until((third.path / "r/s/t").exists)
        if change == "chmod":
            (third.path / "r/a").chmod(0o640)
        else:
            with (third.path / "r/a").open("r+") as file:
                file.write("new")
        time.sleep(0.3)  # until both have heard of it
        results = {end() for end in ends[::order]}
    assert 0 in results
    assert results <= {0, errno.ENOENT, errno.ENOTEMPTY}
    expected = moved(FILLED) | ({"e/a": "new"} if change == "written" else {})
    agree(slow, third, client, bucket, expected)


@pytest.mark.semantics("renames-and-lost-answers")
def test_what_others_took_away_does_not_come_back_with_a_rename_that_ended_with_a_timeout(
    pair: tuple[Mount, Mount],
    third: Mount,
    proxy: Proxy,
    client: Client,
    bucket: str,
    mount: Mounter,
) -> None:
    """The new names are published, and the removal of the old ones never reaches the server."""
    slow = mount(f"/{bucket}", "timeout=4", server=pair[0].server)
    for one in (*pair, slow):
        one.allow(" WARNING ")
    fill_directory(slow, third)
    with proxy.holding(TOMBSTONE) as hold:
        rename = Call(lambda: (slow.path / "r").rename(slow.path / "e"))
        assert hold.holds.wait(10)
        until((third.path / "e/s/t").exists)
        proxy.away = True
        proxy.cut()
        (third.path / "r/a").unlink()
        (third.path / "r/b").rename(third.path / "z")
        hold.release()
        assert rename.ended() == errno.ETIMEDOUT
    proxy.away = False
    expected = {"r/c": "r/c", "r/s/t": "r/s/t", "z": "r/b"}
    until(lambda: files(client, bucket) == expected.keys(), 20)
    agree(slow, third, client, bucket, expected)
    forgotten(client, bucket, 4)


@contextlib.contextmanager
def keeping(slow: Mount, proxy: Proxy, bucket: str) -> Iterator[None]:
    """The kernel keeps the root for a rename that waits for an upload, and takes no news of it."""
    with (
        (slow.path / "large").open("wb", buffering=0) as large,
        proxy.holding(f"$O.{bucket}.C.".encode()) as hold,
    ):
        large.write(bytes(300_000))
        rename = Call(lambda: (slow.path / "large").rename(slow.path / "moved"))
        assert hold.holds.wait(10)
        yield
        hold.release()
        assert rename.ended() == 0


@pytest.mark.semantics("changes-by-others-show")
def test_a_directory_that_is_in_use_does_not_delay_the_news_of_others(
    pair: tuple[Mount, Mount], proxy: Proxy, client: Client, bucket: str
) -> None:
    slow, other = pair
    directories = [f"d{number}" for number in range(12)]
    for one in directories:
        (slow.path / one).mkdir()
    fill(slow, other, *(f"{one}/{name}" for one in directories for name in ("gone", "old")))
    assert not any((slow.path / one / "new").exists() for one in directories)
    with keeping(slow, proxy, bucket):
        client.put(bucket, "in-root", b"")
        for one in directories:
            client.put(bucket, f"{one}/new", b"")
            client.put(bucket, f"{one}/old", b"newer")
            client.delete(bucket, f"{one}/gone")
        for one in directories:
            until((slow.path / one / "new").exists, 1)
            until(lambda one=one: text(slow.path / one / "old") == "newer", 1)  # type: ignore[misc]
            until(lambda one=one: not (slow.path / one / "gone").exists(), 1)  # type: ignore[misc]
    until((slow.path / "in-root").exists)


@pytest.mark.semantics("changes-by-others-show")
def test_removals_in_a_directory_that_is_in_use_do_not_delay_other_news(
    pair: tuple[Mount, Mount], proxy: Proxy, client: Client, bucket: str
) -> None:
    """Each waited for the kernel to take what it cannot take meanwhile."""
    slow, other = pair
    fill(slow, other, *(f"old{number}" for number in range(30)))
    assert os.listdir(slow.path / "d") == []
    with keeping(slow, proxy, bucket):
        for number in range(30):
            client.put(bucket, f"new{number}", b"")
            client.delete(bucket, f"old{number}")
        client.put(bucket, "d/f", b"")
        until(lambda: os.listdir(slow.path / "d") == ["f"], 1)
    until(lambda: {*os.listdir(slow.path)} == {"d", "moved", *(f"new{number}" for number in range(30))})


@pytest.mark.semantics("one-truth")
@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "free"])
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "rename"])
def test_what_is_renamed_is_replaced_between_two_attempts(
    pair: tuple[Mount, Mount],
    proxy: Proxy,
    client: Client,
    bucket: str,
    exchange: bool,
    kept: bool,
    times: int,
) -> None:
    """The kernel would have what it looked up under the other name, where it never was stored."""
    slow, other = pair
    fill(slow, other, "m0", "m1", "x")
    for name in ("m0", "m1", "x"):
        assert text(slow.path / name) == name
    held = b'"name":".natsfs-exchange-' if exchange else b'"name":"m1"'
    seen: list[str | None] = []

    def call() -> None:
        renameat2(slow.path / "m0", slow.path / "m1", RENAME_EXCHANGE if exchange else 0)
        began = time.monotonic()
        while time.monotonic() - began < 0.3:
            seen.append(text(slow.path / "m1"))

    with contextlib.ExitStack() as holds:
        hold = holds.enter_context(proxy.holding(held))
        first = Call(call)
        for number in range(times):
            assert hold.holds.wait(10)
            (other.path / "m0").write_text(f"new{number}")
            if not exchange:
                (other.path / "m1").write_text(f"other{number}")
            caught_up(slow, other)
            if number + 1 < times:
                again = holds.enter_context(proxy.holding(held))
                hold.release()
                hold = again
        if kept:
            # Another call has the directory as soon as the kernel has been told of m0.
            second = Call((slow.path / "x").unlink)
            until(second.waits_in_the_kernel)
            unlinks = holds.enter_context(proxy.holding(b'"name":"x"'))
            hold.release()
            assert unlinks.holds.wait(10)
            first.join(1)  # it has ended, or waits for the directory to ask for its names again
            unlinks.release()
            assert second.ended() == 0
        else:
            hold.release()
        assert first.ended() == 0
    assert {*seen} == {f"new{times - 1}"}
    expected = {"m1": f"new{times - 1}"} | ({"m0": "m1"} if exchange else {}) | ({} if kept else {"x": "x"})
    agree(slow, other, client, bucket, expected)


@pytest.mark.semantics("purges-show-at-once")
def test_a_purge_behind_news_that_wait(
    pair: tuple[Mount, Mount], proxy: Proxy, client: Client, bucket: str
) -> None:
    """The word of a purge does not come before the message that was purged: nothing else would tell of it."""
    slow, other = pair
    fill(slow, other, *(f"old{number}" for number in range(8)))
    for _ in range(5):
        with keeping(slow, proxy, bucket):
            for number in range(8):
                client.put(bucket, f"new{number}", b"")
                client.delete(bucket, f"old{number}")
            client.put(bucket, "ghost", b"")
            client.api(f"STREAM.PURGE.OBJ_{bucket}", {"filter": f"$O.{bucket}.M.{encode_subject('ghost')}"})
            time.sleep(0.3)
        until(lambda: not (slow.path / "old7").exists())
        until(lambda: "ghost" not in os.listdir(slow.path), 3)
        for number in range(8):
            client.put(bucket, f"old{number}", b"")
            client.delete(bucket, f"new{number}")
        until(lambda: (slow.path / "old7").exists() and not (slow.path / "new7").exists())


@pytest.mark.semantics("own-changes")
def test_a_close_in_a_directory_that_is_in_use(pair: tuple[Mount, Mount], proxy: Proxy, bucket: str) -> None:
    """It gives its file the name back; while a call keeps the directory the kernel cannot hear of that."""
    slow, other = pair
    fill(slow, other, "f")
    fd = os.open(slow.path / "f", os.O_WRONLY | os.O_TRUNC)
    os.write(fd, b"mine")
    (other.path / "f").write_text("theirs")
    until(lambda: text(slow.path / "f") == "theirs")
    with (
        (slow.path / "large").open("wb", buffering=0) as large,
        proxy.holding(f"$O.{bucket}.C.".encode()) as hold,
    ):
        large.write(bytes(300_000))
        rename = Call(lambda: (slow.path / "large").rename(slow.path / "moved"))
        assert hold.holds.wait(10)
        close = Call(lambda: os.close(fd))
        close.join(0.5)
        assert close.error is None or text(slow.path / "f") == "mine"
        hold.release()
        assert (rename.ended(), close.ended()) == (0, 0)
        assert text(slow.path / "f") == "mine"
