"""The life of a mount with the real daemon and a real server, from its start to what is left of it: nothing."""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nkeys
import pytest

from natsfs import helper, libc, mounttable, registry
from tests.frontend.conftest import (
    JETSTREAM,
    ConfiguredServer,
    Natsfs,
    daemons,
    leftovers,
    mounts,
    program,
    records,
)

SECRET = "hunter2-4711"
StartServer = Callable[[str], ConfiguredServer]


@pytest.fixture
def mounted(natsfs: Natsfs, mountpoint: Path, plain_server: ConfiguredServer) -> Iterator[Path]:
    """A mount of all buckets, of which there is one, `b`."""
    result = natsfs.mount(plain_server.url, mountpoint)
    assert (result.status, result.out, result.err) == (0, "", "")
    (mountpoint / "b").mkdir()
    yield mountpoint
    if mounts(mountpoint):
        assert natsfs("umount", mountpoint).status == 0


def until(condition: Callable[[], object], limit: float = 20.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "this did not happen in time"
        time.sleep(0.05)


def everything_shown(folder: Path) -> str:
    """Whatever others can see of the processes and mounts of a test, and its logs and records."""
    shown = [Path("/proc/mounts").read_text(), Path("/proc/self/mountinfo").read_text()]
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and int(name) != os.getpid():
                shown.append(Path("/proc", name, "cmdline").read_text(errors="replace"))
        except OSError:
            continue
    for pid in daemons(folder):
        shown.append(Path("/proc", str(pid), "environ").read_text(errors="replace"))
    for path in [*folder.rglob("log*"), *folder.rglob("*.log"), *Path("/run/natsfs").glob("*")]:
        if path.is_file() and "server" not in path.name:
            shown.append(path.read_text(errors="replace"))
    return "\n".join(shown)


# --- a mount that works ---


def test_mount_and_umount(natsfs: Natsfs, mounted: Path, plain_server: ConfiguredServer) -> None:
    entry = mounttable.at(str(mounted))
    assert entry is not None
    assert (entry.fstype, entry.source) == ("fuse.natsfs", plain_server.url)
    (record,) = records(mounted)
    assert [record.pid] == daemons(mounted)
    assert (record.device, record.source) == (entry.device, plain_server.url)
    (mounted / "b" / "file").write_text("hello\n")
    result = natsfs("umount", mounted)
    assert (result.status, result.out, result.err) == (0, "", "")
    assert leftovers(mounted) == []
    assert list(mounted.iterdir()) == []

    assert natsfs.mount(f"{plain_server.url}/b", mounted).status == 0
    assert (mounted / "file").read_text() == "hello\n"


def test_the_daemon_stands_alone(mounted: Path) -> None:
    """A session of its own, in /, with no file of the command open but the log."""
    (pid,) = daemons(mounted)
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    links = {name: os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
    assert links["0"] == "/dev/null"
    assert links["1"] == links["2"] == str(mounted.parent / "home" / "log")
    assert not [link for link in links.values() if "memfd" in link]


def test_several_servers_and_a_prefix(natsfs: Natsfs, mounted: Path, plain_server: ConfiguredServer) -> None:
    """The comma must survive the way through libfuse's option parser, and so must a backslash."""
    (mounted / "b" / "a b" / "c,d").mkdir(parents=True)
    (mounted / "b" / "a b" / "c,d" / "file").write_text("x")
    assert natsfs("umount", mounted).status == 0
    source = f"nats://127.0.0.1:{plain_server.port},127.0.0.1:1/b/a%20b/c,d/"
    result = natsfs.mount(source, mounted)
    assert result.err == ""
    assert os.listdir(mounted) == ["file"]
    entry = mounttable.at(str(mounted))
    assert entry is not None
    assert entry.source == source


def test_options_for_the_kernel(natsfs: Natsfs, mounted: Path, plain_server: ConfiguredServer) -> None:
    assert natsfs("umount", mounted).status == 0
    options = "user,_netdev,ro,noexec,noatime,nodiratime,sync,dirsync,suid,dev,allow_other"
    result = natsfs.mount(f"{plain_server.url}/b", mounted, options)
    assert result.err == ""
    entry = mounttable.at(str(mounted))
    assert entry is not None
    assert {"ro", "noexec", "noatime"} <= set(entry.options)
    assert not {"nosuid", "nodev"} & set(entry.options)
    assert {"allow_other", "default_permissions", "sync", "dirsync"} <= set(entry.super_options)
    with pytest.raises(OSError) as caught:
        (mounted / "file").touch()
    assert caught.value.errno == errno.EROFS


def test_umount_by_other_paths(natsfs: Natsfs, mounted: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(mounted)
    assert natsfs("umount", f"{tmp_path}/link/../mnt//").status == 0


def test_a_context(natsfs: Natsfs, mountpoint: Path, start_server: StartServer) -> None:
    server = start_server(JETSTREAM + f"authorization: {{ user: u, password: {SECRET} }}")
    folder = natsfs.home / ".config" / "nats" / "context"
    folder.mkdir(parents=True)
    (folder / "work.json").write_text(f'{{"url": "{server.url}", "user": "u", "password": "{SECRET}"}}')
    result = natsfs.mount("nats:///", mountpoint, "context=work")
    assert result.err == ""
    (mountpoint / "b").mkdir()
    assert SECRET not in everything_shown(natsfs.home.parent)
    assert natsfs("umount", mountpoint).status == 0


# --- starts that fail ---


def test_unreachable_server(natsfs: Natsfs, mountpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    result = natsfs.mount(f"nats://u:{SECRET}@127.0.0.1:{port}/b", mountpoint)
    assert result.status == 1
    assert f"127.0.0.1:{port}" in result.error
    assert SECRET not in result.error


def test_unknown_host(natsfs: Natsfs, mountpoint: Path) -> None:
    result = natsfs.mount("nats://no-such-host.invalid/b", mountpoint)
    assert result.status == 1
    assert "no-such-host.invalid" in result.error


def test_something_else_listens(natsfs: Natsfs, mountpoint: Path) -> None:
    """A listener that never says a word: the wait has a limit."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        result = natsfs.mount(f"nats://127.0.0.1:{silent.getsockname()[1]}/b", mountpoint, "timeout=2")
    assert result.status == 1
    assert result.error


def test_bucket_does_not_exist(natsfs: Natsfs, mountpoint: Path, plain_server: ConfiguredServer) -> None:
    result = natsfs.mount(f"{plain_server.url}/nope", mountpoint)
    assert result.status == 1
    assert "'nope' does not exist" in result.error


def test_no_jetstream(natsfs: Natsfs, mountpoint: Path, start_server: StartServer) -> None:
    server = start_server("")
    for source in (server.url, f"{server.url}/b"):
        result = natsfs.mount(source, mountpoint)
        assert result.status == 1
        assert "JetStream" in result.error


def test_a_mount_that_ended_well_leaves_no_log(
    natsfs: Natsfs, mountpoint: Path, plain_server: ConfiguredServer
) -> None:
    """On a machine without syslog the log lies beside the records."""
    path = Path(registry.log_path(registry.folder(), str(mountpoint)))
    assert natsfs("mount", "-o", f"spool_dir={natsfs.home}/spool", plain_server.url, mountpoint).status == 0
    assert path.exists() != Path("/dev/log").exists()
    assert natsfs("umount", mountpoint).status == 0
    assert not path.exists()


@pytest.mark.parametrize("foreground", [[], ["-f"]])
def test_a_failed_start_leaves_nothing(
    natsfs: Natsfs, mountpoint: Path, plain_server: ConfiguredServer, foreground: list[str]
) -> None:
    before = set(os.listdir("/run/natsfs"))
    result = natsfs(
        "mount", *foreground, "-o", f"spool_dir={natsfs.home}/spool", f"{plain_server.url}/nope", mountpoint
    )
    assert result.status == 1
    assert "'nope' does not exist" in result.err.splitlines()[-1]
    # Mounts of others may come and go meanwhile; a log and a record of this one would be new.
    new = set(os.listdir("/run/natsfs")) - before
    assert not [
        name for name in new if str(mountpoint) in Path("/run/natsfs", name).read_text(errors="replace")
    ]


def test_mount_point_is_busy(natsfs: Natsfs, mounted: Path, plain_server: ConfiguredServer) -> None:
    result = natsfs.mount(plain_server.url, mounted)
    assert result.status == 1
    assert result.error == (
        f"{mounted} is busy: {plain_server.url} is mounted there by natsfs; to end that: natsfs umount {mounted}"
    )
    assert len(mounts(mounted)) == 1


def test_two_starts_at_once(natsfs: Natsfs, mountpoint: Path, plain_server: ConfiguredServer) -> None:
    starts = [
        natsfs.start("mount", "-o", f"spool_dir={natsfs.home}/spool", plain_server.url, mountpoint)
        for _ in range(3)
    ]
    outcomes = [(start.communicate(timeout=60)[1], start.returncode) for start in starts]
    assert sorted(status for _, status in outcomes) == [0, 1, 1]
    assert all("is busy" in error for error, status in outcomes if status == 1)
    assert len(mounts(mountpoint)) == len(daemons(mountpoint)) == 1
    assert natsfs("umount", mountpoint).status == 0


def test_the_daemon_is_killed_while_it_starts(natsfs: Natsfs, mountpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        command = natsfs.start("mount", f"nats://127.0.0.1:{silent.getsockname()[1]}/b", mountpoint)
        silent.settimeout(20)
        connection, _ = silent.accept()
        with connection:
            (pid,) = daemons(mountpoint)
            os.kill(pid, signal.SIGKILL)
            error = command.communicate(timeout=30)[1]
    assert command.returncode == 1
    assert "natsfs was killed by SIGKILL before the mount was ready" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_is_interrupted_while_it_waits(
    natsfs: Natsfs, mountpoint: Path, number: signal.Signals
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        command = natsfs.start("mount", f"nats://127.0.0.1:{silent.getsockname()[1]}/b", mountpoint)
        silent.settimeout(20)
        connection, _ = silent.accept()
        with connection:
            command.send_signal(number)
            error = command.communicate(timeout=30)[1]
    assert command.returncode == 1
    assert error == "natsfs: interrupted; nothing is mounted\n"


def test_the_command_is_killed_while_it_waits(
    natsfs: Natsfs, mountpoint: Path, plain_server: ConfiguredServer
) -> None:
    """Nobody will learn that the mount is there, so the daemon takes it down again."""
    command = natsfs.start("mount", "-o", f"log_file={natsfs.home}/log", plain_server.url, mountpoint)
    until(lambda: daemons(mountpoint))
    command.kill()
    command.communicate(timeout=30)
    until(lambda: not leftovers(mountpoint))
    assert "is mounted at" in (natsfs.home / "log").read_text()


EARLY = """\
import sys

if "daemon" in sys.orig_argv:
    from natsfs import handshake, libc

    finish = handshake.Handshake.finish

    def late(self):
        for flags in FLAGS:
            try:
                libc.umount(sys.orig_argv[-1], flags)
            except OSError:
                pass
        finish(self)

    handshake.Handshake.finish = late
"""


@pytest.mark.parametrize("foreground", [[], ["-f"]])
@pytest.mark.parametrize("flags", [(libc.MNT_DETACH,), (libc.MNT_FORCE, libc.MNT_DETACH)])
def test_unmounted_before_the_first_answer(
    natsfs: Natsfs,
    mountpoint: Path,
    plain_server: ConfiguredServer,
    tmp_path: Path,
    foreground: list[str],
    flags: tuple[int, ...],
) -> None:
    """By somebody who is faster than the daemon; with MNT_FORCE the kernel does not take the answer either."""
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "sitecustomize.py").write_text(EARLY.replace("FLAGS", repr(flags)))
    arguments: list[str | Path] = [
        *foreground,
        "-o",
        f"log_file={natsfs.home}/log",
        plain_server.url,
        mountpoint,
    ]
    python_path = f"{natsfs.environ['PYTHONPATH']}:{tmp_path}/early"
    result = natsfs("mount", *arguments, environ={"PYTHONPATH": python_path})
    if foreground:
        assert (result.status, "Traceback" in result.err) == (0, False)
    else:
        assert (result.status, result.error) == (
            1,
            f"the mount at {mountpoint} was taken down before it was ready",
        )
    text = (natsfs.home / "log").read_text()
    assert f"the mount at {mountpoint} was taken down before it was ready" in text
    assert not re.search("WARNING|ERROR|Traceback", text), text


# --- credentials ---


@pytest.mark.parametrize("source", ["nats://PORT/b", "nats://u:wrong@PORT/b", "nats://wrong@PORT/b"])
def test_wrong_credentials(natsfs: Natsfs, mountpoint: Path, start_server: StartServer, source: str) -> None:
    server = start_server(JETSTREAM + f"authorization: {{ user: u, password: {SECRET} }}")
    result = natsfs.mount(source.replace("PORT", f"127.0.0.1:{server.port}"), mountpoint)
    assert result.status == 1
    assert re.search("authori[sz]ation|credentials|refused", result.error, re.IGNORECASE)
    assert "wrong@" not in result.error


@pytest.mark.parametrize("arguments", [["mount"], ["mount", "-f"]])
def test_no_secret_is_shown_while_the_command_waits(
    natsfs: Natsfs, mountpoint: Path, arguments: list[str]
) -> None:
    """Neither that of SOURCE nor that of the environment; also not in that of the daemon."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(20)
        command = natsfs.start(
            *arguments,
            "-o",
            f"log_file={natsfs.home}/log",
            f"nats://u:{SECRET}@127.0.0.1:{silent.getsockname()[1]}/b",
            mountpoint,
            environ={"NATSFS_PASSWORD": SECRET, "NATSFS_TOKEN": SECRET},
        )
        connection, _ = silent.accept()
        with connection:
            assert daemons(mountpoint)
            assert SECRET not in everything_shown(natsfs.home.parent)
            command.terminate()
            error = command.communicate(timeout=60)[1]
            assert SECRET not in error


@pytest.mark.parametrize(
    ("authorization", "user_info", "options", "environ"),
    [
        (f"user: u, password: {SECRET}", f"u:{SECRET}@", "", {}),
        (f"user: u, password: {SECRET}", "u@", "password_file=FILE", {}),
        (f"user: u, password: {SECRET}", "", "user=u", {"NATSFS_PASSWORD": SECRET}),
        (f"token: {SECRET}", f"{SECRET}@", "", {}),
        (f"token: {SECRET}", "", "token_file=FILE", {}),
        (f"token: {SECRET}", "", "", {"NATSFS_TOKEN": SECRET}),
    ],
)
def test_right_credentials(
    natsfs: Natsfs,
    mountpoint: Path,
    start_server: StartServer,
    authorization: str,
    user_info: str,
    options: str,
    environ: dict[str, str],
) -> None:
    server = start_server(JETSTREAM + f"authorization: {{ {authorization} }}")
    (natsfs.home / "secret").write_text(f"{SECRET}\n")
    given = f"log_file={natsfs.home}/log,log_level=debug," + options.replace("FILE", f"{natsfs.home}/secret")
    source = f"nats://{user_info}127.0.0.1:{server.port}"
    result = natsfs("mount", "-o", given, source, mountpoint, environ=environ)
    assert result.err == ""
    (mountpoint / "b").mkdir()
    (mountpoint / "b" / "file").write_text("x")
    assert SECRET not in everything_shown(natsfs.home.parent)
    assert natsfs("umount", mountpoint).status == 0
    assert SECRET not in (natsfs.home / "log").read_text()


def _token(signer: nkeys.KeyPair, subject: str, kind: str, claims: dict[str, object]) -> str:
    """A JWT as `nsc` writes it (nats.io/jwt, version 2)."""

    def part(data: object) -> bytes:
        text = data if isinstance(data, bytes) else json.dumps(data).encode()
        return base64.urlsafe_b64encode(text).rstrip(b"=")

    body = {
        "jti": secrets.token_hex(16),
        "iat": int(time.time()),
        "iss": signer.public_key.decode(),
        "name": kind,
        "sub": subject,
        "nats": {**claims, "type": kind, "version": 2},
    }
    signed = part({"typ": "JWT", "alg": "ed25519-nkey"}) + b"." + part(body)
    return (signed + b"." + part(signer.sign(signed))).decode()


def test_creds_file(natsfs: Natsfs, mountpoint: Path, start_server: StartServer) -> None:
    """A server in operator mode lets the user of the file in, and nobody else."""
    kinds = (nkeys.PREFIX_BYTE_OPERATOR, *[nkeys.PREFIX_BYTE_ACCOUNT] * 2, nkeys.PREFIX_BYTE_USER)
    seeds = [nkeys.encode_seed(os.urandom(32), kind) for kind in kinds]
    keys = [nkeys.from_seed(bytearray(seed)) for seed in seeds]
    operator, account, _, _ = keys
    names = [key.public_key.decode() for key in keys]
    everything = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1)
    storage = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
    account_token = _token(
        operator, names[1], "account", {"limits": {**everything, **storage, "wildcards": True}}
    )
    system_token = _token(operator, names[2], "account", {"limits": everything})
    user_token = _token(account, names[3], "user", {"subs": -1, "data": -1, "payload": -1})
    server = start_server(
        JETSTREAM
        + f"operator: {_token(operator, names[0], 'operator', {})}\n"
        + f"system_account: {names[2]}\nresolver: MEMORY\n"
        + f"resolver_preload: {{ {names[1]}: {account_token}, {names[2]}: {system_token} }}\n"
    )
    file = natsfs.home / "user.creds"
    file.write_text(
        f"-----BEGIN NATS USER JWT-----\n{user_token}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seeds[3].decode()}\n------END USER NKEY SEED------\n"
    )
    assert "credentials" in natsfs.mount(server.url, mountpoint).error
    assert natsfs.mount(server.url, mountpoint, f"creds={file}").status == 0
    (mountpoint / "b").mkdir()
    (mountpoint / "b/f").write_text("x")
    assert natsfs("umount", mountpoint).status == 0


def test_nkey(natsfs: Natsfs, mountpoint: Path, start_server: StartServer) -> None:
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    public = nkeys.from_seed(bytearray(seed)).public_key.decode()
    server = start_server(JETSTREAM + f"authorization: {{ users: [ {{ nkey: {public} }} ] }}")
    (natsfs.home / "seed").write_bytes(seed)
    result = natsfs.mount(server.url, mountpoint, f"nkey={natsfs.home}/seed")
    assert result.err == ""
    (mountpoint / "b").mkdir()
    assert natsfs("umount", mountpoint).status == 0
    (natsfs.home / "seed").write_text("nonsense")
    result = natsfs.mount(server.url, mountpoint, f"nkey={natsfs.home}/seed")
    assert result.status == 1
    assert result.error


def _openssl(*arguments: str | Path) -> None:
    subprocess.run([program("openssl"), *arguments], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, and from it server.pem for 127.0.0.1 and client.pem, each with its .key."""
    folder = tmp_path_factory.mktemp("certificates")
    key: list[str | Path] = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    _openssl("req", "-x509", *key, "-subj", "/CN=ca", "-keyout", folder / "ca.key", "-out", folder / "ca.pem")
    for name in ("server", "client"):
        authority: list[str | Path] = ["-CA", folder / "ca.pem", "-CAkey", folder / "ca.key"]
        address: list[str | Path] = [
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-addext",
            "basicConstraints=critical,CA:FALSE",
        ]
        files: list[str | Path] = ["-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem"]
        _openssl("req", "-x509", *authority, *key, "-subj", f"/CN={name}", *address, *files)
    return folder


def test_tls(natsfs: Natsfs, mountpoint: Path, start_server: StartServer, certificates: Path) -> None:
    server = start_server(
        JETSTREAM
        + f'tls: {{ cert_file: "{certificates}/server.pem", key_file: "{certificates}/server.key" }}'
    )
    secure = server.url.replace("nats://", "tls://")
    for source in (secure, server.url):
        result = natsfs.mount(source, mountpoint)
        assert result.status == 1
        assert re.search("certificate|TLS", result.error)

        result = natsfs.mount(source, mountpoint, f"tls_ca={certificates}/ca.pem")
        assert result.err == ""
        assert natsfs("umount", mountpoint).status == 0


def test_tls_with_a_client_certificate(
    natsfs: Natsfs, mountpoint: Path, start_server: StartServer, certificates: Path
) -> None:
    server = start_server(
        JETSTREAM
        + f'tls: {{ cert_file: "{certificates}/server.pem", key_file: "{certificates}/server.key", '
        + f'ca_file: "{certificates}/ca.pem", verify: true }}'
    )
    authority = f"tls_ca={certificates}/ca.pem"
    result = natsfs.mount(server.url, mountpoint, authority)
    assert result.status == 1
    assert result.error
    own = f"tls_cert={certificates}/client.pem,tls_key={certificates}/client.key"
    result = natsfs.mount(server.url, mountpoint, authority, own)
    assert result.err == ""
    assert natsfs("umount", mountpoint).status == 0


def test_tls_is_not_given_up_when_the_server_has_none(
    natsfs: Natsfs, mountpoint: Path, plain_server: ConfiguredServer, certificates: Path
) -> None:
    """Else whoever sits between could read the password."""
    secure = plain_server.url.replace("nats://", "tls://")
    for source, option in ((secure, "rw"), (plain_server.url, f"tls_ca={certificates}/ca.pem")):
        result = natsfs.mount(source, mountpoint, option)
        assert result.status == 1
        assert "TLS" in result.error


# --- the end of a mount ---


def test_umount_of_a_busy_mount_names_who_holds_it(natsfs: Natsfs, mounted: Path) -> None:
    with subprocess.Popen(["sleep", "60"], cwd=mounted / "b") as holder:
        try:
            result = natsfs("umount", mounted)
            assert result.status == 1
            assert result.error == (
                f"{mounted} is busy: in use by sleep ({holder.pid}); end that and try again"
            )
        finally:
            holder.kill()
    assert natsfs("umount", mounted).status == 0


def test_umount_below_a_bind_mount(natsfs: Natsfs, mounted: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", mounted / "b"], check=True)
    try:
        result = natsfs("umount", mounted)
        assert result.status == 1
        assert f"{mounted}/b is mounted below it" in result.error
    finally:
        subprocess.run(["umount", mounted / "b"], check=True)
    assert natsfs("umount", mounted).status == 0


def test_umount_waits_for_the_daemon(natsfs: Natsfs, mounted: Path) -> None:
    (pid,) = daemons(mounted)
    os.kill(pid, signal.SIGSTOP)
    try:
        result = natsfs("umount", "--timeout", "1.5", mounted)
        assert result.status == 1
        assert result.error == (
            f"{mounted} is unmounted, but natsfs (pid {pid}) is still saving after 1.5 s; "
            "it goes on and ends by itself"
        )
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: not leftovers(mounted))


def test_umount_returns_when_the_daemon_has_ended(natsfs: Natsfs, mounted: Path) -> None:
    (pid,) = daemons(mounted)
    os.kill(pid, signal.SIGSTOP)
    command = natsfs.start("umount", mounted)
    until(lambda: not mounts(mounted))
    with pytest.raises(subprocess.TimeoutExpired):
        command.wait(1)
    os.kill(pid, signal.SIGCONT)
    assert command.communicate(timeout=30) == ("", "")
    assert command.returncode == 0
    assert leftovers(mounted) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_daemon(mounted: Path, number: signal.Signals) -> None:
    (mounted / "b" / "file").write_text("x")
    (pid,) = daemons(mounted)
    os.kill(pid, number)
    until(lambda: not leftovers(mounted))


def test_a_signal_ends_a_mount_that_is_busy(mounted: Path) -> None:
    (pid,) = daemons(mounted)
    with subprocess.Popen(["sleep", "60"], cwd=mounted / "b") as holder:
        try:
            os.kill(pid, signal.SIGTERM)
            until(lambda: not leftovers(mounted))
        finally:
            holder.kill()


def test_a_dead_mount_is_taken_over(natsfs: Natsfs, mounted: Path, plain_server: ConfiguredServer) -> None:
    (pid,) = daemons(mounted)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not daemons(mounted))
    with pytest.raises(OSError) as caught:
        os.statvfs(mounted)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    result = natsfs.mount(plain_server.url, mounted)
    assert (result.status, result.err) == (0, "")
    assert len(mounts(mounted)) == 1
    assert (mounted / "b").is_dir()
    assert [record.pid for record in records(mounted)] == daemons(mounted)


def test_a_dead_mount_is_unmounted(
    natsfs: Natsfs, mounted: Path, tmp_path: Path, plain_server: ConfiguredServer
) -> None:
    """Also when another mount was made and taken down meanwhile."""
    (record,) = records(mounted)
    os.kill(record.pid, signal.SIGKILL)
    until(lambda: not daemons(mounted))
    other = tmp_path / "other"
    other.mkdir()
    assert natsfs.mount(plain_server.url, other).status == 0
    assert natsfs("umount", other).status == 0
    result = natsfs("umount", mounted)
    assert (result.status, result.error) == (
        0,
        f"note: the daemon behind {mounted} had died; to see what it had not saved: "
        f"natsfs recover --spool-dir {natsfs.home}/spool",
    )
    assert leftovers(mounted) == []


def test_what_could_not_be_saved_is_told_by_umount(
    natsfs: Natsfs, mountpoint: Path, plain_server: ConfiguredServer
) -> None:
    assert natsfs.mount(plain_server.url, mountpoint, "timeout=2").status == 0
    (mountpoint / "b").mkdir()
    file = os.open(mountpoint / "b" / "precious", os.O_WRONLY | os.O_CREAT)
    os.write(file, b"data")
    plain_server.stop()
    with pytest.raises(OSError):
        os.close(file)
    result = natsfs("umount", mountpoint, limit=90)
    assert result.status == 1
    assert "natsfs: not saved: " in result.err
    assert "precious" in result.err
    assert str(natsfs.home / "spool") in result.err
    command = result.err.strip().rpartition("to copy it out: natsfs ")[2].split(" ")
    assert natsfs(*command[:-1], mountpoint / "copy").status == 0
    assert (mountpoint / "copy").read_bytes() == b"data"
    # Told once, and not kept.
    assert "not mounted" in natsfs("umount", mountpoint).error


@pytest.mark.semantics("kept-is-told")
def test_a_mount_tells_what_is_kept(natsfs: Natsfs, mountpoint: Path, plain_server: ConfiguredServer) -> None:
    """Of failed commits and of daemons that were killed; not what another mount works on, nor empty files."""
    spool = natsfs.home / "spool"
    for path in ("failed/A.data", "mount-1/B", "mount-2/C"):
        (spool / path).parent.mkdir(parents=True, exist_ok=True)
        (spool / path).write_bytes(bytes(10_000))
    (spool / "failed" / "A.json").touch()
    (spool / "mount-1" / "D").touch()
    command = f"natsfs recover --spool-dir {spool}"
    alive = os.open(spool / "mount-2", os.O_RDONLY)
    try:
        fcntl.flock(alive, fcntl.LOCK_EX)
        result = natsfs.mount(plain_server.url, mountpoint)
    finally:
        os.close(alive)
    told = rf"2 files that could not be stored, 2\dK on the disk, are kept in {spool}; to list: {command}"
    assert re.fullmatch(f"note: {told}", result.error)
    assert result.status == 0
    assert natsfs("umount", mountpoint).status == 0
    assert re.search(told, (natsfs.home / "log").read_text())
    assert natsfs("recover", "--spool-dir", spool, "--all", "--remove").status == 0
    result = natsfs.mount(plain_server.url, mountpoint)
    assert (result.status, result.err) == (0, "")
    assert natsfs("umount", mountpoint).status == 0


# --- in the foreground, as a service ---


def test_foreground_reports_to_systemd(
    natsfs: Natsfs, mountpoint: Path, plain_server: ConfiguredServer, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        service = natsfs.start(
            "mount",
            "-f",
            "-o",
            f"spool_dir={natsfs.home}/spool",
            plain_server.url,
            mountpoint,
            environ={"NOTIFY_SOCKET": str(tmp_path / "notify")},
        )
        assert manager.recv(100) == b"READY=1"
        assert daemons(mountpoint) == [service.pid]
        assert "is busy" in natsfs.mount(plain_server.url, mountpoint).error
        (mountpoint / "b").mkdir()
        service.terminate()
        assert manager.recv(100) == b"STOPPING=1"
        error = service.communicate(timeout=30)[1]
    assert service.returncode == 0
    assert f"{plain_server.url} is mounted at {mountpoint}" in error


# --- mount(8) and umount(8) ---

# The helpers go into an empty /sbin of a mount namespace, and fstab is the test's own. umount(8) looks for a helper
# only if mount(8) noted something about the mount in /run/mount/utab, as it does for _netdev, user and x-*.
_IN_NAMESPACE = """
set -eu
mount -t tmpfs none "$(readlink -f /sbin)"
"$PYTHON" -m natsfs install-helper
trap 'umount "$MNT" 2>/dev/null || true' EXIT
printf '%s %s natsfs noauto,user,_netdev,x-x=y,spool_dir=%s 0 0\\n' "$URL" "$MNT" "$SPOOL" > "$HOME/fstab"
mount -T "$HOME/fstab" "$MNT"
grep " $MNT fuse.natsfs rw" /proc/mounts
mkdir "$MNT/b"
echo one > "$MNT/b/file"
mount -o remount,ro "$MNT"
if echo two > "$MNT/b/file"; then echo "written although read-only"; fi
mount -o remount,rw,noexec "$MNT"
echo three > "$MNT/b/file"
grep " $MNT fuse.natsfs rw,.*noexec" /proc/mounts
if mount -o remount,cache_size=3M "$MNT"; then echo "changed although fixed"; fi
umount "$MNT"
ps -e -o args | grep "[n]atsfs daemon.*$MNT" && echo "umount did not wait"
mount -t natsfs -o "ro,spool_dir=$SPOOL" "$URL/b" "$MNT"
cat "$MNT/file"
if mount -o remount,rw "$MNT"; then echo "writable although started with ro"; fi
umount "$MNT"
mount -t natsfs "$URL/nope" "$MNT" || echo "status $?"
mount -t fuse.natsfs -o "spool_dir=$SPOOL" "$URL" "$MNT"
ls "$MNT"
"""


def test_mount_and_umount_know_natsfs(
    natsfs: Natsfs, mountpoint: Path, plain_server: ConfiguredServer
) -> None:
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", _IN_NAMESPACE],
        env=natsfs.environ
        | {
            "PYTHON": sys.executable,
            "URL": plain_server.url,
            "MNT": str(mountpoint),
            "SPOOL": str(natsfs.home / "spool"),
        },
        cwd=natsfs.home,
        capture_output=True,
        text=True,
        timeout=100,
    )
    lines = [line for line in done.stdout.splitlines() if " fuse.natsfs rw" not in line]
    assert lines == [*(f"installed /sbin/{name}" for name in helper.NAMES), "three", "status 32", "b"], (
        done.stderr
    )
    assert len(done.stdout.splitlines()) == len(lines) + 2
    until(lambda: not daemons(mountpoint))
    assert "cache_size cannot be changed by remount" in done.stderr
    assert "natsfs was started with ro and stays so" in done.stderr
    assert "'nope' does not exist" in done.stderr


# --- not root ---

NOBODY = 65534

# udev gives /dev/fuse to everybody, which a container may lack. The capability to read is kept because the
# interpreter may lie in root's home; fusermount3 does not inherit it.
_AS_NOBODY = f"""
set -eu
mknod fuse c 10 229 && chmod 666 fuse && mount --bind fuse /dev/fuse && cd /
exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups --inh-caps=-all,+dac_read_search \\
    --ambient-caps=-all,+dac_read_search sh -uc "$SCRIPT"
"""


def test_another_user(natsfs: Natsfs, tmp_path: Path, start_server: StartServer) -> None:
    """Through fusermount3: mount, the record in a folder of its own, the dead mount, umount, and what is refused."""
    server = start_server(JETSTREAM)
    for parent in [tmp_path, *tmp_path.parents][:3]:
        parent.chmod(0o755)
    home = tmp_path / "nobody"
    mountpoint = home / "mnt"
    mountpoint.mkdir(parents=True)
    for path in (home, mountpoint):
        os.chown(path, NOBODY, NOBODY)
    script = """
    natsfs() { "$PYTHON" -P -m natsfs "$@"; }
    natsfs mount -o allow_other "$URL" "$MNT"
    natsfs mount "$URL" /root
    natsfs install-helper
    natsfs mount "$URL" "$MNT" && mkdir "$MNT/b" && echo text > "$MNT/b/file"
    grep -c " $MNT fuse.natsfs rw,nosuid,nodev" /proc/mounts
    stat -c %U "$MNT/b/file"
    (cd "$MNT/b"; natsfs umount "$MNT")
    kill -9 $(basename "$XDG_RUNTIME_DIR"/natsfs/*.json .json)
    natsfs mount "$URL" "$MNT" && cat "$MNT/b/file"
    natsfs umount "$MNT" && ls "$MNT" "$XDG_RUNTIME_DIR"/natsfs | grep json
    """
    (tmp_path / "run").mkdir()
    os.chown(tmp_path / "run", NOBODY, NOBODY)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", _AS_NOBODY],
        env=natsfs.environ
        | {
            "HOME": str(home),
            "PYTHON": sys.executable,
            "URL": server.url,
            "MNT": str(mountpoint),
            "XDG_RUNTIME_DIR": str(tmp_path / "run"),
            "SCRIPT": script,
        },
        cwd=natsfs.home,
        capture_output=True,
        text=True,
        timeout=100,
    )
    errors = done.stderr.splitlines()
    assert "allow_other needs root" in errors[0]
    assert "/root is not writable" in errors[1]
    assert "sudo" in errors[2]
    assert re.search(r"is busy: in use by .*sh \(\d+\)", errors[3])
    assert len(errors) == 4, done.stderr
    assert done.stdout.splitlines() == ["1", "nobody", "text"]
