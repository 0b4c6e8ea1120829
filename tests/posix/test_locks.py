"""flock(2) and fcntl(2) locks between processes on one mount, step by step as on a local file system."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.posix.actor import Actor
from tests.posix.both import Both
from tests.support import Client, Mounter, until

Scene = Callable[[Path, list[Actor]], list[Any]]


def played(both: Both, scene: Scene, count: int = 2) -> list[Any]:
    """Run a scene with processes of its own on both sides; process ids in the answers become A, B, C."""

    def steps(top: Path) -> list[Any]:
        (top / "f").write_bytes(b"0123456789")
        with ExitStack() as stack:
            actors = [stack.enter_context(Actor(top)) for _ in range(count)]
            names = {actor.pid: "ABC"[number] for number, actor in enumerate(actors)}

            def named(answer: Any) -> Any:
                return [names.get(part, part) for part in answer] if isinstance(answer, list) else answer

            return [named(answer) for answer in scene(top, actors)]

    result: list[Any] = both.same(steps)
    return result


@pytest.mark.semantics("locks")
def test_flock(both: Both) -> None:
    """Exclusive keeps all others out, shared keeps exclusive ones out; unlocking and closing let the next one in."""

    def scene(top: Path, actors: list[Actor]) -> list[Any]:
        a, b = actors
        fa, fb = a("open", "f", os.O_RDWR), b("open", "f", os.O_RDONLY)
        return [
            a("flock", fa, "LOCK_EX"),
            b("flock", fb, "LOCK_EX"),
            b("flock", fb, "LOCK_SH"),
            a("flock", fa, "LOCK_SH"),
            b("flock", fb, "LOCK_SH"),
            a("flock", fa, "LOCK_EX"),
            b("flock", fb, "LOCK_UN"),
            a("flock", fa, "LOCK_EX"),
            a("flock", a("open", "f", os.O_RDONLY), "LOCK_SH"),
            a("close", fa),
            b("flock", fb, "LOCK_EX"),
            b("flock", fb, "LOCK_EX"),
        ]

    answers = played(both, scene)
    assert answers[:3] == [None, "EAGAIN", "EAGAIN"]


@pytest.mark.semantics("locks")
def test_flock_belongs_to_the_open_file(both: Both) -> None:
    """A duplicate shares the lock, and it goes with the last of them."""

    def scene(top: Path, actors: list[Actor]) -> list[Any]:
        a, b = actors
        fa, fb = a("open", "f", os.O_RDWR), b("open", "f", os.O_RDWR)
        duplicate = a("dup", fa)
        return [
            a("flock", fa, "LOCK_EX"),
            a("close", fa),
            b("flock", fb, "LOCK_EX"),
            a("flock", duplicate, "LOCK_SH"),
            b("flock", fb, "LOCK_SH"),
            a("close", duplicate),
            b("flock", fb, "LOCK_EX"),
        ]

    played(both, scene)


@pytest.mark.semantics("locks")
def test_record_locks(both: Both) -> None:
    """Ranges: overlap excludes, neighbours do not; F_GETLK tells who is in the way; parts can be given back."""

    def scene(top: Path, actors: list[Actor]) -> list[Any]:
        a, b = actors
        fa, fb = a("open", "f", os.O_RDWR), b("open", "f", os.O_RDWR)
        return [
            a("lock", fa, "F_WRLCK", 0, 10),
            b("lock", fb, "F_WRLCK", 9, 1),
            b("lock", fb, "F_RDLCK", 0, 1),
            b("lock", fb, "F_WRLCK", 10, 10),
            b("lock", fb, "F_WRLCK", 0, 0, "F_GETLK"),
            a("lock", fa, "F_WRLCK", 12, 1, "F_GETLK"),
            a("lock", fa, "F_WRLCK", 30, 1, "F_GETLK"),
            a("lock", fa, "F_UNLCK", 3, 4),
            b("lock", fb, "F_WRLCK", 0, 0, "F_GETLK"),
            b("lock", fb, "F_WRLCK", 3, 4),
            b("lock", fb, "F_WRLCK", 7, 1, "F_GETLK"),
            a("lock", fa, "F_RDLCK", 0, 3),
            b("lock", fb, "F_RDLCK", 0, 3),
            b("lock", fb, "F_WRLCK", 0, 3),
            # Unlike flock: closing any descriptor of the file gives all locks of the process back.
            a("close", a("open", "f", os.O_RDONLY)),
            b("lock", fb, "F_WRLCK", 0, 0),
            a("lock", a("open", "f", os.O_RDONLY), "F_WRLCK", 100, 1),
            b("lock", b("open", "f", os.O_WRONLY), "F_RDLCK", 100, 1),
        ]

    played(both, scene)


@pytest.mark.semantics("locks")
def test_open_file_description_locks(both: Both) -> None:
    """OFD locks exclude other descriptions, of the same process too, and record locks; they survive other closes."""

    def scene(top: Path, actors: list[Actor]) -> list[Any]:
        a, b = actors
        one, other, fb = a("open", "f", os.O_RDWR), a("open", "f", os.O_RDWR), b("open", "f", os.O_RDWR)
        return [
            a("lock", one, "F_WRLCK", 0, 5, "F_OFD_SETLK"),
            a("lock", other, "F_WRLCK", 4, 5, "F_OFD_SETLK"),
            b("lock", fb, "F_WRLCK", 4, 5, "F_OFD_SETLK"),
            b("lock", fb, "F_RDLCK", 0, 1),
            b("lock", fb, "F_RDLCK", 0, 0, "F_OFD_GETLK"),
            b("lock", fb, "F_RDLCK", 0, 0, "F_GETLK"),
            a("close", other),
            b("lock", fb, "F_WRLCK", 4, 5, "F_OFD_SETLK"),
            a("close", one),
            b("lock", fb, "F_WRLCK", 4, 5, "F_OFD_SETLK"),
        ]

    played(both, scene)


@pytest.mark.semantics("locks")
@pytest.mark.parametrize("kind", ["flock", "record", "ofd"])
def test_locks_of_a_killed_process(both: Both, kind: str) -> None:
    """They are gone with it, and who waits for one gets it."""

    def scene(top: Path, actors: list[Actor]) -> list[Any]:
        a, b = actors
        fa, fb = a("open", "f", os.O_RDWR), b("open", "f", os.O_RDWR)
        if kind == "flock":
            taken = a("flock", fa, "LOCK_EX")
            refused = b("flock", fb, "LOCK_EX")
            b.send("flock", fb, "LOCK_EX", True)
        else:
            command = "F_OFD_SETLK" if kind == "ofd" else "F_SETLK"
            taken = a("lock", fa, "F_WRLCK", 0, 0, command)
            refused = b("lock", fb, "F_WRLCK", 0, 0, command)
            b.send("lock", fb, "F_WRLCK", 0, 0, command + "W")
        until(lambda: waits(top / "f"), what="the second process waits")
        a.kill()
        return [taken, refused, b.answer()]

    answers = played(both, scene)
    assert answers[1] == "EAGAIN"


def waits(path: Path) -> bool:
    """Whether the kernel knows of somebody who waits for a lock of the file."""
    end = f":{path.stat().st_ino}"
    return any(
        "->" in (parts := line.split()) and any(part.endswith(end) for part in parts) for line in locks()
    )


def locks() -> list[str]:
    return Path("/proc/locks").read_text().splitlines()


@pytest.mark.semantics("locks")
@pytest.mark.parametrize("kind", ["flock", "record"])
def test_locks_follow_the_file(both: Both, kind: str) -> None:
    """After a rename the lock is found under the new name; a new file under the old name is free."""

    def scene(top: Path, actors: list[Actor]) -> list[Any]:
        def lock(actor: Actor, fd: int) -> Any:
            return actor("flock", fd, "LOCK_EX") if kind == "flock" else actor("lock", fd, "F_WRLCK")

        a, b = actors
        (top / "d").mkdir()
        fa = a("open", "f", os.O_RDWR)
        answers = [lock(a, fa)]
        os.rename(top / "f", top / "d/g")
        answers.append(lock(b, b("open", "d/g", os.O_RDWR)))
        os.rename(top / "d", top / "e")
        answers.append(lock(b, b("open", "e/g", os.O_RDWR)))
        (top / "f").write_text("another")
        answers.append(lock(b, b("open", "f", os.O_RDWR)))
        # Written through the locked descriptor: a new version in the store, the same file here.
        answers.append(a("truncate", "e/g", 3))
        answers.append(lock(b, b("open", "e/g", os.O_RDWR)))
        os.unlink(top / "e/g")
        (top / "e/g").write_text("new")
        answers.append(lock(b, b("open", "e/g", os.O_RDWR)))
        return answers

    assert played(both, scene) == [None, "EAGAIN", "EAGAIN", None, None, "EAGAIN", None]


@pytest.mark.semantics("locks")
def test_counting_under_a_lock(both: Both) -> None:
    """Three processes add to a number in a file under a lock: no addition is lost."""

    def scene(top: Path, actors: list[Actor]) -> list[Any]:
        (top / "f").write_text("0")
        for actor in actors:
            actor.send("count", "f", 30)
        answers = [actor.answer() for actor in actors]
        return [*answers, (top / "f").read_text()]

    assert played(both, scene, 3)[-1] == "90"


@pytest.mark.semantics("no-locks-between-machines")
def test_two_mounts_do_not_see_each_others_locks(bucket: str, mount: Mounter, client: Client) -> None:
    client.put(bucket, "f", b"x")
    roots = [mount(f"/{bucket}").path for _ in range(2)]
    with (roots[0] / "f").open("r+b") as one, (roots[1] / "f").open("r+b") as two:
        for file in (one, two):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
