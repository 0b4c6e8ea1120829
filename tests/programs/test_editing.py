"""Programs that change files: editors, filters that write back, and those that keep a file open."""

from __future__ import annotations

import contextlib
import mailbox
import os
import shelve
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support import Client, noise, run, until

VIM = ("vim.tiny", "-u", "NONE", "-i", "NONE", "-es")


def vim(path: Path, settings: str, *commands: str, status: int = 0) -> None:
    """Edit without a terminal. vim makes no backups of files in /tmp unless it is told to."""
    options = [part for command in commands for part in ("-c", command)]
    run(*VIM, "--cmd", f"set backupskip= {settings}", *options, path, status=status)


@pytest.mark.semantics("editors-work")
@pytest.mark.parametrize("copy", ["yes", "no"])
def test_vim_with_backups(folder: Path, client: Client, copy: str) -> None:
    """vim writes a file, with the old one as a backup, by copying it or by renaming it; the mode is kept."""
    path = folder / "file"
    path.write_text("one\ntwo\n")
    path.chmod(0o640)
    for number in range(2):
        vim(path, f"backup writebackup backupcopy={copy}", "1s/$/!/", "wq")
        assert path.read_text() == "one" + "!" * (number + 1) + "\ntwo\n"
        assert (folder / "file~").read_text() == "one" + "!" * number + "\ntwo\n"
        assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(folder)) == ["file", "file~"]
    assert client.names(folder.name) == {"file", "file~"}
    assert client.read(folder.name, "file") == b"one!!\ntwo\n"


@pytest.mark.semantics("editors-work")
def test_vim_without_backups(folder: Path) -> None:
    """Without a kept backup nothing but the file is left, whatever vim makes while it writes."""
    path = folder / "file"
    path.write_text("one\n")
    for settings in ("nobackup writebackup", "nobackup nowritebackup", "nobackup writebackup backupcopy=no"):
        vim(path, settings, "1s/$/!/", "wq")
    assert path.read_text() == "one!!!\n"
    assert os.listdir(folder) == ["file"]


@pytest.mark.semantics("editors-work")
def test_vim_is_killed(folder: Path) -> None:
    """The swap file of an editor that was killed brings back what was not saved."""
    path = folder / "file"
    path.write_text("one\n")
    vim(path, "swapfile updatecount=1", "1s/$/ and more/", "preserve", "!kill -9 $PPID", status=-9)
    assert path.read_text() == "one\n"
    assert (folder / ".file.swp").is_file()
    run(*VIM, "-r", path, "-c", "wq! recovered", cwd=folder)
    assert (folder / "recovered").read_text() == "one and more\n"


@pytest.mark.semantics("editors-work")
def test_sed_sort_and_patch(folder: Path) -> None:
    """`sed -i`, `sort -o` onto its own input, and `patch` with a backup leave the new content and the old mode."""
    path = folder / "file"
    path.write_text("".join(f"line {number:05}\n" for number in reversed(range(20_000))))
    path.chmod(0o600)
    run("sort", "-o", path, path)
    assert path.read_text().splitlines() == [f"line {number:05}" for number in range(20_000)]
    run("sed", "--in-place=.old", "s/line 0*7$/seven/", path)
    changed = path.read_text()
    assert "\nseven\n" in changed
    assert (folder / "file.old").read_text() == changed.replace("seven", "line 00007")

    difference = run("diff", "-u", folder / "file.old", path, status=1).stdout
    (folder / "patch").write_text(difference)
    run("patch", "--backup", "--input", folder / "patch", folder / "file.old")
    assert (folder / "file.old").read_text() == changed
    assert (folder / "file.old.orig").read_text() == changed.replace("seven", "line 00007")
    run("patch", "--reverse", "--input", folder / "patch", folder / "file.old")
    assert (folder / "file.old").read_bytes() == (folder / "file.old.orig").read_bytes()
    assert {entry.stat().st_mode & 0o777 for entry in folder.glob("file*")} == {0o600}


WRITER = """
import sys
log = open("log", "a", buffering=1)
for line in sys.stdin:
    if line == "reopen\\n":
        log = open("log", "a", buffering=1)
    else:
        log.write(line)
    print("done", flush=True)
"""


@pytest.mark.semantics("log-rotation-by-rename")
def test_log_is_rotated(folder: Path, client: Client) -> None:
    """A program goes on writing into its log after that was renamed, until it opens the new one; no line is lost."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None

        def tell(line: str) -> None:
            writer.stdin.write(line)  # type: ignore[union-attr]
            writer.stdin.flush()  # type: ignore[union-attr]
            assert writer.stdout.readline() == "done\n"  # type: ignore[union-attr]

        for turn in range(3):
            tell(f"{turn} before\n")
            for old in range(turn, 0, -1):
                (folder / f"log.{old}").rename(folder / f"log.{old + 1}")
            (folder / "log").rename(folder / "log.1")
            tell(f"{turn} after\n")
            tell("reopen\n")
        tell("last\n")
        assert (folder / "log").read_text() == "last\n"
        writer.stdin.close()
        assert writer.wait(20) == 0
    expected = {f"log.{3 - turn}": f"{turn} before\n{turn} after\n" for turn in range(3)} | {"log": "last\n"}
    assert {entry.name: entry.read_text() for entry in folder.iterdir()} == expected
    assert client.names(folder.name) == expected.keys()
    assert {name: client.read(folder.name, name).decode() for name in expected} == expected


@pytest.mark.semantics("log-rotation-by-rename")
def test_log_is_copied_and_truncated(folder: Path) -> None:
    """After `cp` and `truncate` a program that appends goes on at the start of the file."""
    with (folder / "log").open("ab", buffering=0) as log:
        log.write(b"before\n")
        run("cp", "-p", folder / "log", folder / "log.1")
        run("truncate", "--size=0", folder / "log")
        log.write(b"after\n")
    assert (folder / "log").read_bytes() == b"after\n"
    assert (folder / "log.1").read_bytes() == b"before\n"


@pytest.mark.semantics("mail-and-database-files")
def test_mailboxes_and_shelves(folder: Path) -> None:
    """Mailboxes (with their lock files), Maildirs, dbm files and temporary files of Python's library work."""
    for kind in (mailbox.mbox, mailbox.Maildir):
        path = folder / kind.__name__
        for number in range(3):
            box = kind(path)
            box.lock()
            box.add(f"Subject: {number}\n\ntext\n")
            box.flush()
            box.unlock()
            box.close()
        with contextlib.closing(kind(path)) as box:
            assert sorted(message["Subject"] for message in box) == ["0", "1", "2"]
    for number in range(3):
        with shelve.open(folder / "shelf") as shelf:
            shelf[str(number)] = list(range(number))
    with shelve.open(folder / "shelf", flag="r") as shelf:
        assert dict(shelf) == {"0": [], "1": [0], "2": [0, 1]}
    with tempfile.TemporaryFile(dir=folder) as unnamed, tempfile.NamedTemporaryFile(dir=folder) as named:
        for file in (unnamed, named):
            file.write(noise(100_000))
            file.seek(0)
            assert file.read() == noise(100_000)
    assert not list(folder.glob("tmp*")) + list(folder.glob("*.lock"))


@pytest.mark.semantics("tail-follows")
@pytest.mark.parametrize("how", ["-f", "-F"])
def test_tail_follows(folder: Path, tmp_path: Path, how: str) -> None:
    """`tail -f` prints what another process appends, whether or not that closes the file in between."""
    path, printed = folder / "log", tmp_path / "printed"
    path.write_bytes(b"first\n")
    with printed.open("wb") as out:
        tail = subprocess.Popen(["tail", how, "--sleep-interval=0.02", "--lines=+1", path], stdout=out)
    try:
        until(lambda: printed.read_bytes() == b"first\n", 20, "tail prints what is there")
        expected = b"first\n"
        with path.open("ab", buffering=0) as log:
            for number in range(5):
                line = b"%d %s\n" % (number, noise(1000).hex().encode())
                log.write(line)
                expected += line
                until(lambda expected=expected: printed.read_bytes() == expected, 20, "it follows")  # type: ignore[misc]
        for number in range(3):
            with path.open("ab") as log:
                log.write(b"closed %d\n" % number)
            expected += b"closed %d\n" % number
            until(lambda expected=expected: printed.read_bytes() == expected, 20, "it follows")  # type: ignore[misc]
    finally:
        tail.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            tail.wait(20)
