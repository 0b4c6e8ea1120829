"""A call keeps a directory, so that the kernel takes no news of it; nobody else waits for that."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from tests.coherence.proxy import Proxy
from tests.coherence.test_renames_meet import Call, keeping
from tests.coherence.test_storm import meanwhile
from tests.support import Client, Mounter, Server, until

NAMES = 20
# The directory is kept until the calls have ended: who waits for it has no answer at all.
ANSWER = 5.0


def replace(path: Path) -> None:
    path.with_name("new").write_text("mine")
    path.with_name("new").rename(path)


def cut(path: Path) -> None:
    os.truncate(path, 1)
    assert path.read_text() == "f"


CALLS: dict[str, Callable[[Path], object]] = {
    "getattr": lambda top: os.listxattr(top / "f0"),
    "lookup": lambda top: (top / "nobody").exists(),
    "open and read": lambda top: (top / "f1").read_text(),
    "write": lambda top: (top / "f1").write_text("mine"),
    "readdir": os.listdir,
    "create": lambda top: (top / "made").write_text("mine"),
    "create exclusively": lambda top: (top / "lock").touch(exist_ok=False),
    "append": lambda top: (top / "f2").open("a").close(),
    "truncate": lambda top: cut(top / "f3"),
    "mkdir": lambda top: (top / "s").mkdir(),
    "rename": lambda top: replace(top / "f4"),
    "rename a directory": lambda top: (top / "s").rename(top / "t"),
    "chmod": lambda top: (top / "f5").chmod(0o600),
    "rmdir": lambda top: (top / "t").rmdir(),
    "unlink": lambda top: (top / "f6").unlink(),
    "statvfs": os.statvfs,
}


@pytest.mark.semantics("changes-by-others-show")
def test_calls_elsewhere_while_news_wait_for_the_kernel(
    proxied: tuple[Server, Proxy], bucket: str, client: Client, mount: Mounter
) -> None:
    """Handlers answer, whatever of the directory in use the kernel has still to hear."""
    server, proxy = proxied
    mounted = mount(f"/{bucket}", server=server)
    folders = [mounted.path / f"d{number}" for number in range(4)]
    for folder in folders:
        folder.mkdir()
        for number in range(7):
            (folder / f"f{number}").write_text("f")
    for number in range(NAMES):
        (mounted.path / f"old{number}").write_text("old")
    rained = count()
    drops = 0

    def rain() -> None:
        nonlocal drops
        drops = next(rained)
        client.put(bucket, f"old{drops % NAMES}", b"theirs")
        if drops > 3:
            client.delete(bucket, f"old{(drops - 3) % NAMES}")

    took: dict[str, float] = {}
    with keeping(mounted, proxy, bucket), meanwhile(rain):
        until(lambda: drops > NAMES, 20)
        for folder in folders:
            for name, call in CALLS.items():
                began = time.monotonic()
                made = Call(lambda call=call, folder=folder: call(folder))  # type: ignore[misc]
                made.join(ANSWER)
                assert made.error == 0, f"{name} has not been answered" if made.error is None else name
                took[name] = max(took.get(name, 0), time.monotonic() - began)
    print({name: f"{most * 1000:.0f} ms" for name, most in took.items()})
