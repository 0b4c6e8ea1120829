"""What other users may do on a mount with allow_other: the same as on a local file system, call by call."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.posix.actor import Actor
from tests.posix.both import Both
from tests.support import Mount, Mounter, Server, opened, raises

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")

# User, group and supplementary groups.
USERS: dict[str, tuple[int, int, list[int]]] = {
    "owner": (1001, 1001, []),
    "member": (1002, 1002, [1001, 2000]),
    "primary": (1004, 1001, []),
    "other": (1003, 1003, []),
    "root": (0, 0, []),
}
Step = tuple[Any, ...]


@pytest.fixture(scope="module")
def everything(nats_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """As the usual one, for all users of the machine."""
    mount = Mount.make(nats_server, tmp_path_factory.mktemp("everything"), "", "allow_other")
    yield mount
    problems = mount.finish()
    assert not problems, "\n".join(problems)


def play(top: Path, *steps: Step) -> list[Any]:
    """Each step is a user, a call and its arguments, in the directory `top`; the answers of all, in their order."""
    answers: list[Any] = []
    os.chmod(top, 0o755)
    with ExitStack() as stack:
        actors: dict[str, Actor] = {}
        for user, call, *arguments in steps:
            if user not in actors:
                actors[user] = stack.enter_context(Actor(top, user=USERS[user], umask=0o022))
            answers.append((user, call, *arguments, actors[user](call, *arguments)))
    return answers


def make(name: str, mode: int, user: str = "owner") -> list[Step]:
    uid, gid, _ = USERS[user]
    return [
        ("root", "create", name, "text"),
        ("root", "chown", name, uid, gid),
        ("root", "chmod", name, mode),
    ]


def make_directory(name: str, mode: int, user: str = "owner") -> list[Step]:
    uid, gid, _ = USERS[user]
    return [("root", "mkdir", name), ("root", "chown", name, uid, gid), ("root", "chmod", name, mode)]


@pytest.mark.semantics("permissions")
def test_modes_of_files(both: Both) -> None:
    """Owner, group, supplementary group, others and root: who may read, write and run what."""
    steps: list[Step] = []
    for mode in (
        0o000,
        0o400,
        0o200,
        0o600,
        0o040,
        0o020,
        0o060,
        0o004,
        0o002,
        0o006,
        0o644,
        0o077,
        0o755,
        0o111,
    ):
        name = f"f{mode:o}"
        steps += make(name, mode)
        for user in USERS:
            steps += [
                (user, "content", name),
                (user, "append", name),
                (user, "truncate", name, 3),
                *((user, "access", name, how) for how in (os.F_OK, os.R_OK, os.W_OK, os.X_OK)),
                (user, "attributes", name),
            ]
    both.same(lambda top: play(top, *steps))


@pytest.mark.semantics("permissions")
def test_modes_of_directories(both: Both) -> None:
    """r lists, x leads in, w and x together change entries; one without the other does not."""
    steps: list[Step] = []
    for mode in (0o000, 0o700, 0o500, 0o300, 0o100, 0o400, 0o070, 0o030, 0o005, 0o001, 0o007, 0o755, 0o777):
        name = f"d{mode:o}"
        steps += make_directory(name, 0o755)
        steps += [*make(f"{name}/f", 0o666), ("root", "mkdir", f"{name}/e"), ("root", "chmod", name, mode)]
        for user in USERS:
            steps += [
                (user, "listdir", name),
                (user, "content", f"{name}/f"),
                (user, "append", f"{name}/f"),
                (user, "attributes", f"{name}/f"),
                (user, "attributes", f"{name}/none"),
                (user, "create", f"{name}/{user}"),
                (user, "mkdir", f"{name}/{user}.d"),
                (user, "symlink", "x", f"{name}/{user}.l"),
                (user, "readlink", f"{name}/{user}.l"),
                (user, "rename", f"{name}/{user}", f"{name}/{user}.r"),
                (user, "rename", f"{name}/{user}.r", f"{name}/e/{user}"),
                (user, "unlink", f"{name}/{user}.r"),
                (user, "rmdir", f"{name}/{user}.d"),
                (user, "access", name, os.W_OK),
                (user, "access", name, os.X_OK),
                (user, "access", f"{name}/f", os.R_OK),
            ]
    both.same(lambda top: sorted_lists(play(top, *steps)))


def sorted_lists(answers: list[Any]) -> list[Any]:
    return [
        (*call, sorted(answer) if call[1] == "listdir" and isinstance(answer, list) else answer)
        for *call, answer in answers
    ]


@pytest.mark.semantics("permissions")
def test_sticky_directories(both: Both) -> None:
    """In a sticky directory only the owner of an entry, of the directory, and root remove or rename it."""
    steps = [*make_directory("t", 0o1777), *make_directory("t/d", 0o755, "member")]
    for number, user in enumerate(("owner", "other", "member", "root")):
        steps += make(f"t/f{number}", 0o666, "member")
        steps += make(f"t/g{number}", 0o666, user)
        steps += [
            (user, "unlink", f"t/f{number}"),
            (user, "rename", f"t/f{number}", f"t/h{number}"),
            (user, "rename", f"t/g{number}", f"t/f{number}"),
            (user, "rename", "t/d", f"t/d{number}"),
            (user, "rename", f"t/d{number}", "t/d"),
            (user, "create", f"t/own{number}"),
            (user, "unlink", f"t/own{number}"),
            (user, "rmdir", "t/d"),
        ]
    steps += [*make_directory("u", 0o1777, "root"), *make("u/f", 0o666, "member")]
    steps += [(user, "unlink", "u/f") for user in ("owner", "other", "member")]
    both.same(lambda top: [*play(top, *steps), sorted(os.listdir(top / "t"))])


@pytest.mark.semantics("permissions")
def test_chmod_and_chown(both: Both) -> None:
    """Only the owner and root change a mode; only root an owner; the owner a group, to one of the own."""
    steps: list[Step] = []
    for number, user in enumerate(USERS):
        name = f"f{number}"
        steps += make(name, 0o666, "member" if number % 2 else "owner")
        for path in (name, f"d{number}"):
            steps += make_directory(path, 0o777, "member") if path[0] == "d" else []
            steps += [
                (user, "chmod", path, 0o640),
                (user, "attributes", path),
                (user, "chown", path, USERS[user][0], -1),
                (user, "chown", path, 1003, -1),
                (user, "attributes", path),
                (user, "chown", path, -1, 2000),
                (user, "attributes", path),
                (user, "chown", path, -1, 1001),
                (user, "chown", path, -1, 3000),
                (user, "attributes", path),
                (user, "chown", path, USERS["member"][0], 2000),
                (user, "attributes", path),
                (user, "chmod", path, 0o7777),
                (user, "attributes", path),
            ]
    # The set-group-ID bit of somebody who is not in the group.
    steps += [*make("g", 0o755, "owner"), ("root", "chown", "g", 1001, 2000), ("owner", "chmod", "g", 0o2755)]
    steps += [("owner", "attributes", "g"), ("root", "chmod", "g", 0o2755), ("owner", "attributes", "g")]
    both.same(lambda top: play(top, *steps))


@pytest.mark.semantics("set-id-bits")
def test_set_id_bits_go(both: Both) -> None:
    """chown, and a write or truncation by others than root, take set-user-ID and set-group-ID away."""
    steps: list[Step] = []
    number = itertools.count()
    for mode in (0o4777, 0o2777, 0o6777, 0o4766):
        for user in ("owner", "member", "other", "root"):
            for call in (
                ("append",),
                ("append", ""),
                ("overwrite",),
                ("truncate", 2),
                ("truncate", 4),
                ("chown", USERS[user][0], USERS[user][1]),
                ("chown", -1, USERS[user][1]),
                ("chown", 1003, 1003),
                ("chmod", mode),
                ("content",),
            ):
                name = f"f{next(number)}"
                steps += [*make(name, mode), (user, call[0], name, *call[1:]), (user, "attributes", name)]
        steps += make_directory(f"d{mode:o}", 0o777)
        for user in USERS:
            name = f"d{mode:o}/{user}"
            steps += [(user, "create_anew", name, mode), (user, "attributes", name)]
    both.same(lambda top: play(top, *steps))


@pytest.mark.semantics("set-group-id-directories")
def test_set_group_id_directories(both: Both) -> None:
    """What is made in a set-group-ID directory gets its group, a directory also the bit."""
    steps: list[Step] = [
        *make_directory("d", 0o2777),
        ("root", "chown", "d", 1001, 2000),
        *make_directory("n", 0o777),
    ]
    steps += [("root", "chmod", "d", 0o2777)]
    for user in USERS:
        for top in ("d", "n"):
            steps += [
                (user, "create", f"{top}/{user}", "", 0o2775),
                (user, "create", f"{top}/{user}.x", "", 0o6777),
                (user, "mkdir", f"{top}/{user}.d"),
                (user, "symlink", "x", f"{top}/{user}.l"),
                (user, "mkfifo", f"{top}/{user}.p"),
                *((user, "attributes", f"{top}/{user}{end}") for end in ("", ".x", ".d", ".l", ".p")),
                (user, "create", f"{top}/{user}.d/f"),
                (user, "attributes", f"{top}/{user}.d/f"),
                (user, "rename", f"n/{user}.d", f"d/{user}.moved"),
                (user, "attributes", f"d/{user}.moved"),
            ]
    both.same(lambda top: play(top, *steps))


@pytest.mark.semantics("permissions")
def test_who_may_set_times(both: Both) -> None:
    """Times of one's choice: owner and root. The present: whoever may write."""
    steps: list[Step] = []
    for mode in (0o644, 0o666, 0o444):
        name = f"f{mode:o}"
        steps += make(name, mode)
        for user in USERS:
            steps += [(user, "utime", name), (user, "set_times", name, 5, 5)]
    both.same(lambda top: play(top, *steps))


@pytest.mark.semantics("permissions")
def test_access_asks_for_the_real_user(both: Both) -> None:
    """access(2) goes by the real ids, open(2) by the effective ones, as in a set-user-ID program."""
    steps: list[Step] = [*make("f", 0o600), ("root", "setresuid", 1003, 1001, 0)]
    steps += [("root", "access", "f", os.R_OK), ("root", "content", "f"), ("root", "append", "f")]
    steps += [
        ("root", "setresuid", 1001, 1003, 0),
        ("root", "access", "f", os.R_OK),
        ("root", "content", "f"),
    ]
    both.same(lambda top: play(top, *steps))


@pytest.mark.semantics("permissions")
def test_a_descriptor_keeps_what_it_was_opened_for(both: Both) -> None:
    """A mode that changes afterwards does not matter to open files; a new one is created for writing with mode 0."""
    steps: list[Step] = [*make_directory("d", 0o777)]
    for user in ("owner", "other"):
        steps += [
            (user, "open", f"d/{user}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0),
            (user, "truncate", f"d/{user}", 0),
            (user, "content", f"d/{user}"),
        ]

    def write(top: Path) -> list[Any]:
        with Actor(top, user=USERS["owner"]) as actor:
            fd = actor("open", "mode0", os.O_RDWR | os.O_CREAT, 0)
            answers = [actor("ftruncate", fd, 100), actor("pread", fd, 5, 0), actor("fchmod", fd, 0o400)]
            return [*answers, actor("ftruncate", fd, 7), actor("close", fd), actor("attributes", "mode0")]

    def steps_and_write(top: Path) -> list[Any]:
        answers = play(top, *steps)
        os.chmod(top, 0o777)
        # The numbers of descriptors say nothing.
        return [
            ("done" if call[1] == "open" and isinstance(call[-1], int) else call) for call in answers
        ] + write(top)

    both.same(steps_and_write)


# --- nosuid, nodev ------------------------------------------------------------------------------------------------


def run_as_other(top: Path) -> str:
    """The effective user of a set-user-ID program of root, run by somebody else."""
    shutil.copy(shutil.which("id") or "id", top / "id")
    os.chmod(top / "id", 0o4755)
    with Actor(top, user=USERS["other"]) as actor:
        return str(actor("execute", "./id", "-u"))


def make_null(top: Path) -> None:
    os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert (top / "null").stat().st_rdev == os.makedev(1, 3)


@pytest.mark.semantics("nosuid-and-nodev")
def test_nosuid_and_nodev(folder: Path) -> None:
    """By default a set-user-ID program gains nothing, and a device cannot be opened."""
    assert run_as_other(folder) == "1003"
    make_null(folder)
    with raises(errno.EACCES):
        os.open(folder / "null", os.O_RDONLY)


@pytest.mark.semantics("nosuid-and-nodev")
def test_suid_and_dev(bucket: str, mount: Mounter) -> None:
    """-o suid,dev: as on a local file system."""
    top = mount(f"/{bucket}", "allow_other", "suid", "dev").path
    assert run_as_other(top) == "0"
    make_null(top)
    with opened(top / "null", os.O_RDWR) as fd:
        assert os.read(fd, 10) == b""
        assert os.write(fd, b"gone") == 4


@pytest.mark.semantics("permissions")
def test_without_allow_other(bucket: str, mount: Mounter) -> None:
    """Nobody else may enter, root's processes neither if they are somebody else's."""
    top = mount(f"/{bucket}").path
    (top / "f").write_text("text")
    with Actor(top.parent) as actor:
        assert actor("setresuid", 1003, 1003, 0) is None
        assert actor("listdir", "mnt") == "EACCES"
        assert actor("attributes", "mnt/f") == "EACCES"
