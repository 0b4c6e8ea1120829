"""`natsfs recover` on folders of the spool as daemons leave them. No server is there."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

import pytest

from natsfs.catalog.metadata import Metadata
from natsfs.files.manifest import Manifest
from natsfs.files.spool import Spool
from natsfs.options import recover_command
from natsfs.store.segments import Kept, Segment, Spooled, Zeros
from tests.frontend.conftest import Natsfs

FIRST, SECOND, THIRD = "AAAAAAAAAAAAAAAAAAAAAA", "AAAAAAABBBBBBBBBBBBBBB", "CCCCCCCCCCCCCCCCCCCCCC"
REASON = "'n' was replaced\nby somebody else"


def manifest(name: str, segments: tuple[Segment, ...], second: int = 0, base: int = 0) -> Manifest:
    return Manifest(
        source="nats://127.0.0.1:1/music",
        options={},
        bucket="music",
        name=name,
        size=segments[-1].end if segments else 0,
        base=Metadata(name=name, bucket="music", nuid="N", size=base) if base else None,
        below=base,
        segments=segments,
        attributes={
            "mode": "104750",
            "mtime": "2020-01-02T03:04:05.123456789Z",
            "atime": "1970-01-01T00:00:07Z",
        },
        description=None,
        headers=None,
        reason=REASON,
        time_ns=1_700_000_000_000_000_000 + second * 1_000_000_000,
    )


def put_aside(spool: Path, name: str, data: bytes, about: Manifest | None) -> None:
    (spool / "failed").mkdir(parents=True, exist_ok=True)
    (spool / "failed" / f"{name}.data").write_bytes(data)
    if about is not None:
        (spool / "failed" / f"{name}.json").write_text(about.encode())


@pytest.fixture
def spool(natsfs: Natsfs) -> Path:
    """The default one, with two files of one name, the younger one first in the folder, and one without a manifest."""
    root = natsfs.home / "cache" / "natsfs"
    put_aside(root, FIRST, b"younger", manifest("a/song", (Spooled(0, 7),), 9))
    put_aside(root, SECOND, b"older", manifest("b/song", (Spooled(0, 5),), 1))
    put_aside(root, THIRD, b"what", None)
    return root


@pytest.mark.semantics("recover")
def test_the_list(natsfs: Natsfs, spool: Path) -> None:
    """One line for each, the oldest first, with all there is to know; nothing is changed by that."""
    before = sorted(spool.rglob("*"))
    done = natsfs("recover", "--spool-dir", spool, environ={"TZ": "UTC"})
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    about = "'n' was replaced by somebody else"
    assert lines[0] == f"AAAAAAAB  2023-11-14 22:13:21       5  nats://127.0.0.1:1/music/b/song  {about}"
    assert lines[1] == f"AAAAAAAA  2023-11-14 22:13:29       7  nats://127.0.0.1:1/music/a/song  {about}"
    assert re.fullmatch(r"CCCCCCCC  \S+ \S+       4  \(unknown\)  nothing tells what this is", lines[2])
    assert len(lines) == 3
    told = natsfs("recover", "--spool-dir", spool, FIRST[:8]).out
    assert f"kept in {spool}/failed/{FIRST}.data" in told
    assert sorted(spool.rglob("*")) == before


@pytest.mark.semantics("recover")
def test_the_default_folder_is_that_of_the_daemon(natsfs: Natsfs, spool: Path) -> None:
    """For root that is one folder for the whole machine: what is in it is not looked at here."""
    done = natsfs("recover", environ={"XDG_CACHE_HOME": str(spool.parent)})
    shown = done.out + done.err
    if os.getuid():
        assert "AAAAAAAB" in shown
    else:
        assert "(default: /var/cache/natsfs)" in natsfs("recover", "--help").out
    assert recover_command(str(spool), "X") == f"natsfs recover --spool-dir {spool} X"


@pytest.mark.semantics("recover")
def test_copies_out(natsfs: Natsfs, spool: Path, tmp_path: Path) -> None:
    """To a file or into a folder, with permissions and times, and never over a file without --force."""
    folder = tmp_path / "out"
    folder.mkdir()
    done = natsfs("recover", "--spool-dir", spool, FIRST, "--to", folder)
    assert (done.status, done.err, done.out) == (0, "", f"{FIRST[:8]} -> {folder}/song\n")
    status = (folder / "song").stat()
    assert (folder / "song").read_bytes() == b"younger"
    assert oct(status.st_mode) == oct(0o100750), "no set-user-ID for whoever makes the copy"
    assert status.st_mtime_ns == 1_577_934_245_123_456_789
    assert status.st_atime_ns == 7_000_000_000
    assert status.st_uid == os.getuid()

    done = natsfs("recover", "--spool-dir", spool, SECOND, "--to", folder)
    assert (done.status, done.out) == (1, "")
    assert done.error == f"{folder}/song exists; --force replaces it"
    done = natsfs("recover", "--spool-dir", spool, SECOND, "--to", folder / "song")
    assert done.status == 1
    assert (folder / "song").read_bytes() == b"younger"
    assert natsfs("recover", "--spool-dir", spool, SECOND, "--to", folder, "--force").status == 0
    assert (folder / "song").read_bytes() == b"older"
    assert os.listdir(folder) == ["song"]
    assert natsfs("recover", "--spool-dir", spool, THIRD[:3], "--to", tmp_path / "file").status == 0
    assert (tmp_path / "file").read_bytes() == b"what"

    done = natsfs("recover", "--spool-dir", spool, "--all", "--to", tmp_path / "all")
    assert (done.status, done.err) == (0, "")
    found = {path.name: path.read_bytes() for path in (tmp_path / "all").iterdir()}
    assert found == {"song.AAAAAAAA": b"younger", "song.AAAAAAAB": b"older", "CCCCCCCC": b"what"}
    assert len(list((spool / "failed").iterdir())) == 5, "all is still kept"


def test_a_copy_that_fails_leaves_nothing(natsfs: Natsfs, spool: Path, tmp_path: Path) -> None:
    """Here the kept file has lost its end; the old file stays what it was."""
    put_aside(spool, FIRST, b"you", manifest("a/song", (Spooled(0, 7),)))
    (tmp_path / "there").write_bytes(b"before")
    for words in ([tmp_path / "new"], [tmp_path / "there", "--force"], [tmp_path / "nowhere" / "f"]):
        done = natsfs("recover", "--spool-dir", spool, FIRST, "--to", *words)
        assert done.status == 1
        assert f"{FIRST[:8]} cannot be copied to" in done.error
    assert (tmp_path / "there").read_bytes() == b"before"
    assert not [name for name in os.listdir(tmp_path) if name not in ("there", "home")]


@pytest.mark.semantics("recover")
def test_holes_stay_holes(natsfs: Natsfs, spool: Path, tmp_path: Path) -> None:
    """Names that are no file names, too."""
    size = 1 << 40
    put_aside(spool, FIRST, b"", manifest("x/..", (Zeros(0, size - 4), Spooled(size - 4, size))))
    with (spool / "failed" / f"{FIRST}.data").open("r+b") as file:
        file.seek(size - 4)
        file.write(b"tail")
    assert natsfs("recover", "--spool-dir", spool, FIRST, "--to", f"{tmp_path}/").status == 0
    copy = tmp_path / "%2E%2E"
    assert copy.stat().st_size == size
    assert copy.stat().st_blocks < 100
    with copy.open("rb") as file:
        assert os.pread(file.fileno(), 100, size - 6) == b"\0\0tail"


@pytest.mark.semantics("recover-whole")
def test_what_is_missing_is_named(natsfs: Natsfs, spool: Path, tmp_path: Path) -> None:
    """Only the written parts are here, and the server is not: zeros, the ranges, the reason, status 1, not removed."""
    parts = (Kept(0, 100), Spooled(100, 104), Kept(104, 200), Zeros(200, 300))
    put_aside(spool, FIRST, bytes(100) + b"mine", manifest("n", parts, base=200))
    assert "; written: 4, the rest is in the version before" in natsfs("recover", "--spool-dir", spool).out
    told = natsfs("recover", "--spool-dir", spool, FIRST).out
    assert "bytes of the stored version N: 0-99, 104-199" in told
    done = natsfs("recover", "--spool-dir", spool, FIRST, "--to", tmp_path / "f", "--remove")
    assert done.status == 1
    assert f"{tmp_path}/f is not whole: bytes 0-99, 104-199 are zeros in the copy" in done.error
    assert "cannot reach a NATS server at nats://127.0.0.1:1" in done.error
    assert (tmp_path / "f").read_bytes() == bytes(100) + b"mine" + bytes(196)
    assert (spool / "failed" / f"{FIRST}.json").exists()


@pytest.mark.semantics("full-spool")
def test_what_is_lost_is_named(natsfs: Natsfs, spool: Path, tmp_path: Path) -> None:
    """The disk of the spool was full: zeros, the range, status 1, not removed."""
    about = manifest("n", (Spooled(0, 10), Zeros(10, 12))).without(4, 10)
    put_aside(spool, FIRST, b"mine", about)
    lost = "bytes 4-9 are zeros in the copy: the disk of the spool did not take them"
    assert lost in natsfs("recover", "--spool-dir", spool, FIRST).out
    done = natsfs("recover", "--spool-dir", spool, FIRST, "--to", tmp_path / "f", "--remove")
    assert (done.status, f"{tmp_path}/f is not whole: {lost}" in done.error) == (1, True)
    assert (tmp_path / "f").read_bytes() == b"mine" + bytes(8)
    assert (spool / "failed" / f"{FIRST}.json").exists()


@pytest.mark.semantics("recover")
def test_drops_what_was_named(natsfs: Natsfs, spool: Path, tmp_path: Path) -> None:
    done = natsfs("recover", "--spool-dir", spool, "--remove", FIRST, THIRD)
    assert (done.status, done.out, done.err) == (0, "", "")
    assert sorted(os.listdir(spool / "failed")) == [f"{SECOND}.data", f"{SECOND}.json"]
    done = natsfs("recover", "--spool-dir", spool, "--all", "--remove", "--to", tmp_path / "out")
    assert done.status == 0
    assert (tmp_path / "out" / "song").read_bytes() == b"older"
    assert natsfs("recover", "--spool-dir", spool).error == f"nothing is kept in {spool}"


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--remove"], 2, "say which"),
        (["--to", "x"], 2, "say which"),
        (["-o", "cerds=/x", FIRST, "--to", "x"], 2, "did you mean creds=FILE?"),
        (["nope"], 1, "nothing with the ID 'nope' is kept"),
        (["AAAAAAA"], 1, "'AAAAAAA' begins several IDs: "),
        ([""], 1, "nothing with the ID ''"),
    ],
)
def test_bad_arguments(natsfs: Natsfs, spool: Path, arguments: list[str], status: int, expected: str) -> None:
    done = natsfs("recover", "--spool-dir", spool, *arguments)
    assert done.status == status
    assert expected in done.error
    assert len(list((spool / "failed").iterdir())) == 5


@pytest.mark.semantics("recover-after-a-kill")
def test_folders_of_daemons(natsfs: Natsfs, tmp_path: Path) -> None:
    """What a living daemon works on is not touched; what a dead one left is, and its empty files are not shown."""
    spool = tmp_path / "spool"
    for folder in ("mount-1", "mount-2"):
        (spool / folder).mkdir(parents=True)
        (spool / folder / (THIRD if folder == "mount-1" else FIRST)).write_bytes(b"content")
    (spool / "mount-2" / f"{FIRST}.json").write_text(manifest("n", (Spooled(0, 2),)).encode())
    (spool / "mount-2" / SECOND).touch()
    alive = os.open(spool / "mount-1", os.O_RDONLY)
    try:
        fcntl.flock(alive, fcntl.LOCK_EX)
        done = natsfs("recover", "--spool-dir", spool)
        assert [line.split("  ", 1)[0] for line in done.out.splitlines()] == [FIRST[:8]]
        assert "nats://127.0.0.1:1/music/n  its daemon ended before this was saved" in done.out
        assert natsfs("recover", "--spool-dir", spool, THIRD, "--remove").status == 1
    finally:
        os.close(alive)
    done = natsfs("recover", "--spool-dir", spool, FIRST, THIRD, "--to", tmp_path / "out", "--remove")
    assert (done.status, done.err) == (0, "")
    # All of it, whatever was written since the note was made.
    assert (tmp_path / "out" / "n").read_bytes() == b"content"
    assert (tmp_path / "out" / THIRD[:8]).read_bytes() == b"content"
    assert [str(path.relative_to(spool)) for path in sorted(spool.rglob("*"))] == [
        "mount-2",
        f"mount-2/{SECOND}",
    ]


def test_the_folder_of_a_daemon_with_the_same_number(tmp_path: Path) -> None:
    """In a container the next daemon has the number of the killed one: what that left stays to be found."""
    left = tmp_path / f"mount-{os.getpid()}"
    left.mkdir()
    (left / FIRST).write_bytes(b"content")
    alive = os.open(left, os.O_RDONLY)
    try:
        fcntl.flock(alive, fcntl.LOCK_EX)
        spool = Spool(str(tmp_path), 0)
        file = spool.create()
        assert [path.name for path in sorted(tmp_path.glob("mount-*"))] == [left.name, f"{left.name}-1"]
        file.discard()
        spool.close()
    finally:
        os.close(alive)
    assert [path.name for path in tmp_path.iterdir()] == [left.name]
    assert (left / FIRST).read_bytes() == b"content"
