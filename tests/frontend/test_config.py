from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natsfs import assembly, context
from natsfs.config import Config, Credentials
from natsfs.errors import UsageError
from natsfs.options import Options

SECRET = "hunter2"


def configure(source: str, *options: str, **environ: str) -> Config:
    return assembly.configure(source, "/mnt/x", options, environ)


@pytest.fixture
def write_context(tmp_path: Path) -> dict[str, str]:
    """An environment with the contexts `full` and `minimal`."""
    folder = tmp_path / "nats" / "context"
    folder.mkdir(parents=True)
    full = {
        "description": "",
        "url": "nats://n1:4222,tls://n2",
        "user": "ctx",
        "password": SECRET,
        "token": "",
        "ca": "/ca.pem",
        "cert": "/cert.pem",
        "key": "~/key.pem",
        "jetstream_domain": "leaf",
        "color_scheme": "red",
    }
    (folder / "full.json").write_text(json.dumps(full))
    (folder / "minimal.json").write_text("{}")
    (folder / "token.json").write_text(json.dumps({"url": "n1", "token": SECRET}))
    (folder / "url-user.json").write_text(json.dumps({"url": f"nats://ctx:{SECRET}@n1"}))
    (folder / "url-token.json").write_text(json.dumps({"url": f"nats://{SECRET}@n1"}))
    (folder / "creds.json").write_text(json.dumps({"url": "n1", "creds": "/c", "nkey": "/n", "token": "t"}))
    (folder / "nkey.json").write_text(json.dumps({"url": "n1", "nkey": "/n"}))
    (folder / "broken.json").write_text("{")
    (folder / "list.json").write_text("[]")
    (folder / "number.json").write_text('{"user": 1}')
    (folder / "bad-url.json").write_text('{"url": "ws://h"}')
    (folder / "latin1.json").write_bytes(b'{"user": "\xe4"}')
    for key in context.UNSUPPORTED:
        (folder / f"{key}.json").write_text(json.dumps({key: "x"}))
    return {"XDG_CONFIG_HOME": str(tmp_path), "HOME": "/home/u"}


@given(
    st.builds(Credentials, user=st.none() | st.text(), password=st.none() | st.text(), tls=st.booleans()),
    st.builds(Options, kernel_options=st.lists(st.text()).map(tuple), timeout=st.floats(1, 1e6)),
    st.lists(st.text()).map(tuple),
    st.text(st.characters()),
)
def test_json_and_back(
    credentials: Credentials, options: Options, servers: tuple[str, ...], mountpoint: str
) -> None:
    config = Config(
        servers=servers,
        bucket=None,
        prefix="a/b",
        mountpoint=mountpoint,
        display_source="nats://h",
        credentials=credentials,
        options=options,
    )
    assert Config.from_json(config.to_json()) == config


def test_repr_shows_no_secret() -> None:
    config = configure(f"nats://u:{SECRET}@h")
    assert config.credentials.password == SECRET
    assert SECRET not in repr(config)
    assert SECRET not in repr(configure(f"nats://{SECRET}@h"))
    assert config.credentials.secrets == (SECRET,)


def test_nobody() -> None:
    assert configure("nats://h/b").credentials == Credentials()


@pytest.mark.parametrize(
    ("source", "options", "environ", "expected"),
    [
        ("nats://u:p@h", "", {}, Credentials(user="u", password="p")),
        ("nats://u:@h", "", {}, Credentials(user="u", password="")),
        ("nats://t@h", "", {}, Credentials(token="t")),
        ("nats://u@h", "password_file=FILE", {}, Credentials(user="u", password=SECRET)),
        ("nats://u@h", "", {"NATSFS_PASSWORD": "e"}, Credentials(user="u", password="e")),
        (
            "nats://u@h",
            "password_file=FILE",
            {"NATSFS_PASSWORD": "e"},
            Credentials(user="u", password=SECRET),
        ),
        (
            "nats://u:p@h",
            "",
            {"NATSFS_PASSWORD": "e", "NATSFS_TOKEN": "t"},
            Credentials(user="u", password="p"),
        ),
        ("nats://h", "user=u,password_file=FILE", {}, Credentials(user="u", password=SECRET)),
        ("nats://h", "user=u", {"NATSFS_PASSWORD": "e"}, Credentials(user="u", password="e")),
        ("nats://h", "token_file=FILE", {"NATSFS_TOKEN": "e"}, Credentials(token=SECRET)),
        ("nats://h", "", {"NATSFS_TOKEN": "e"}, Credentials(token="e")),
        ("nats://h", "", {"NATSFS_PASSWORD": "e"}, Credentials()),
        ("nats://h", "creds=/c", {"NATSFS_TOKEN": "e"}, Credentials(creds_file="/c")),
        ("nats://h", "nkey=/n", {}, Credentials(nkey_file="/n")),
        ("tls://h", "", {}, Credentials(tls=True)),
        ("nats://h", "tls_ca=/ca", {}, Credentials(tls=True, tls_ca="/ca")),
        ("nats://h", "tls_cert=/c,tls_key=/k", {}, Credentials(tls=True, tls_cert="/c", tls_key="/k")),
    ],
)
def test_who_natsfs_is(
    source: str, options: str, environ: dict[str, str], expected: Credentials, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\nsecond line\n")
    assert configure(source, options.replace("FILE", f"{tmp_path}/secret"), **environ).credentials == expected


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ("nats://u:p@h", "creds=/c", "a user in SOURCE and creds= say who you are"),
        ("nats://u:p@h", "user=u", "a user in SOURCE and user= say"),
        ("nats://h", "creds=/c,nkey=/n", "creds= and nkey= say"),
        ("nats://h", "creds=/c,token_file=FILE", "creds= and token_file= say"),
        ("nats://h", "creds=/c,password_file=FILE", "password_file= does not go with creds="),
        ("nats://u:p@h", "password_file=FILE", "SOURCE has a password and password_file="),
        ("nats://h", "password_file=FILE", "password_file= needs a user"),
        ("nats://h", "user=u", "user=u has no password"),
        ("nats://h", "tls_key=/k", "give tls_cert=FILE, too"),
        ("nats://h", "token_file=/", "cannot be read: Is a directory"),
        ("nats://h", "token_file=EMPTY", "is empty"),
        ("nats://h", "token_file=BINARY", "not a text file"),
    ],
)
def test_contradictions(source: str, options: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "FILE").write_text(SECRET)
    (tmp_path / "EMPTY").write_text("\n")
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe")
    for name in ("FILE", "EMPTY", "BINARY"):
        options = options.replace(f"={name}", f"={tmp_path}/{name}")
    with pytest.raises(UsageError, match=expected) as caught:
        configure(source, options)
    assert SECRET not in str(caught.value)


def test_context(write_context: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    config = configure("nats:///b/p", "context=full", **write_context)
    assert config.servers == ("nats://n1:4222", "tls://n2:4222")
    assert (config.bucket, config.prefix, config.display_source) == ("b", "p", "nats:///b/p")
    assert config.options.domain == "leaf"
    assert config.credentials == Credentials(
        user="ctx",
        password=SECRET,
        tls=True,
        tls_ca="/ca.pem",
        tls_cert="/cert.pem",
        tls_key="/home/u/key.pem",
    )


def test_source_and_options_win_over_the_context(write_context: dict[str, str]) -> None:
    config = configure("nats://u:p@mine/b", "context=full,domain=d,tls_ca=/own.pem", **write_context)
    assert config.servers == ("nats://mine:4222",)
    assert config.options.domain == "d"
    assert (config.credentials.user, config.credentials.password) == ("u", "p")
    assert (config.credentials.tls_ca, config.credentials.tls_cert) == ("/own.pem", "/cert.pem")


@pytest.mark.parametrize(
    ("name", "environ", "expected"),
    [
        ("minimal", {}, Credentials()),
        ("token", {}, Credentials(token=SECRET)),
        ("token", {"NATSFS_TOKEN": "e"}, Credentials(token="e")),
        ("url-user", {}, Credentials(user="ctx", password=SECRET)),
        ("url-token", {}, Credentials(token=SECRET)),
        ("creds", {}, Credentials(creds_file="/c")),
        ("nkey", {}, Credentials(nkey_file="/n")),
    ],
)
def test_credentials_of_contexts(
    write_context: dict[str, str], name: str, environ: dict[str, str], expected: Credentials
) -> None:
    config = configure("nats:///b", f"context={name}", **write_context, **environ)
    assert config.credentials == expected
    assert SECRET not in repr(config)


def test_a_context_without_a_server_means_this_machine(write_context: dict[str, str]) -> None:
    assert configure("nats://", "context=minimal", **write_context).servers == ("nats://127.0.0.1:4222",)


def test_the_login_of_an_earlier_mount(write_context: dict[str, str]) -> None:
    """What was recorded of its options, unless another login is given; all else is of no interest."""

    def again(known: dict[str, object], *options: str, **environ: str) -> Config:
        return assembly.log_in_again("nats:///b/p", known, options, write_context | environ)

    before = configure("nats:///b/p", "context=full", **write_context)
    known: dict[str, object] = {"context": "full", "spool_dir": "/nowhere"}
    found = again(known)
    assert (found.servers, found.credentials, found.options) == (
        before.servers,
        before.credentials,
        before.options,
    )
    other = again(known | {"domain": "d"}, "user=bob,context=minimal", NATSFS_PASSWORD=SECRET)
    assert (other.credentials.user, other.credentials.password) == ("bob", SECRET)
    assert (other.servers, other.options.domain) == (("nats://127.0.0.1:4222",), "d")
    with pytest.raises(UsageError, match="names no host"):
        again({})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nope", "does not exist"),
        ("broken", "not a JSON object"),
        ("list", "not a JSON object"),
        ("number", "'user' is not a text"),
        ("bad-url", "url: .*nats:// or tls://"),
        ("latin1", "not UTF-8"),
        *((key, f"uses '{key}', which natsfs does not support") for key in context.UNSUPPORTED),
    ],
)
def test_contexts_that_cannot_be_used(write_context: dict[str, str], name: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        configure("nats:///b", f"context={name}", **write_context)


def test_folder_of_contexts() -> None:
    assert context.folder({"HOME": "/h"}) == "/h/.config/nats/context"
    assert context.folder({"HOME": "/h", "XDG_CONFIG_HOME": "/c"}) == "/c/nats/context"


def test_mount_point_is_what_the_mount_table_will_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real" / "mnt").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "direct").symlink_to("real/mnt")
    monkeypatch.chdir(tmp_path)
    expected = str(tmp_path / "real" / "mnt")
    assert [assembly.resolve(path) for path in ("link/mnt", "direct", "real/../real/mnt/", expected)] == [
        expected
    ] * 4
    assert assembly.resolve("/") == "/"
