"""`./dev bench` works from end to end, at a size that says nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from natsfs import mounttable
from tests.support import REPOSITORY, until

BEGIN, END = (f"<!-- written by ./dev bench --write: {word} -->" for word in ("begin", "end"))
FRAME = f"# Title\n\n{BEGIN}\nearlier\n{END}\n\nKept.\n"


def start(folder: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "benchmarks", "--size", "tiny", "--dir", folder, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )


def mounted_in(folder: Path) -> list[str]:
    return [entry.mountpoint for entry in mounttable.read() if entry.mountpoint.startswith(str(folder))]


def processes_of(folder: Path) -> list[str]:
    """The command lines of all processes that were given a path in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"{folder}/" in line:
            found.append(line)
    return found


def test_a_small_table_is_written(tmp_path: Path) -> None:
    """Rows and columns that were asked for are there, what people wrote stays, and nothing is left behind."""
    work, document = tmp_path / "work", tmp_path / "benchmarks.md"
    work.mkdir()
    document.write_text(FRAME)
    bench = start(
        *(work, "--subjects", "natsfs,local", "--only", "small-writes,cp,ls"),
        *("--write", "--document", document),
    )
    out, err = bench.communicate(timeout=100)
    assert bench.returncode == 0, err
    text = document.read_text()
    assert text.startswith("# Title\n\n<!--")
    assert text.endswith("-->\n\nKept.\n")
    assert "earlier" not in text
    assert out.strip() in text
    assert "| work | unit | natsfs | local directory | x | floor | goal |" in out
    for row in ("write in 4 KiB writes", "`cp -r` of 4 KiB files", "`ls -lR` of them, cold"):
        line = next(line for line in out.splitlines() if line.startswith(f"| {row}"))
        assert all(float(figure.replace(",", "")) > 0 for figure in line.split("|")[3:5])
    assert "`rm -r`" not in out
    assert list(work.iterdir()) == []
    assert mounted_in(work) == []
    assert processes_of(work) == []


def test_interrupted_it_takes_everything_down(tmp_path: Path) -> None:
    bench = start(tmp_path, "--subjects", "natsfs", "--only", "visibility", "--trials", "1000")
    until(lambda: mounted_in(tmp_path), 60, "the first mount")
    time.sleep(0.1)  # anywhere in its work
    bench.send_signal(signal.SIGINT)
    _, err = bench.communicate(timeout=60)
    assert bench.returncode == 130, err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
    assert mounted_in(tmp_path) == []
    assert processes_of(tmp_path) == []
