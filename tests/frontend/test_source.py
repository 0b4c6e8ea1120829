from __future__ import annotations

import contextlib
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natsfs import source
from natsfs.errors import UsageError


@pytest.mark.parametrize(
    ("text", "urls", "bucket", "prefix"),
    [
        ("nats://localhost", ("nats://localhost:4222",), None, ""),
        ("nats://localhost/", ("nats://localhost:4222",), None, ""),
        ("nats://localhost/music", ("nats://localhost:4222",), "music", ""),
        ("nats://localhost/music/", ("nats://localhost:4222",), "music", ""),
        ("nats://localhost:1/music/live/1969/", ("nats://localhost:1",), "music", "live/1969"),
        (
            "NATS://n1,n2:4333,10.0.0.1/b-_9",
            ("nats://n1:4222", "nats://n2:4333", "nats://10.0.0.1:4222"),
            "b-_9",
            "",
        ),
        ("tls://nats.example.org/b", ("tls://nats.example.org:4222",), "b", ""),
        ("nats://[::1]/b", ("nats://[::1]:4222",), "b", ""),
        ("nats://[::1]:5,h/b", ("nats://[::1]:5", "nats://h:4222"), "b", ""),
        ("nats://u:p@h1,h2/b/a%20b/%C3%A4", ("nats://h1:4222", "nats://h2:4222"), "b", "a b/ä"),
        ("nats://h/b/we@home", ("nats://h:4222",), "b", "we@home"),
        ("nats:///music", (), "music", ""),
        ("nats://", (), None, ""),
    ],
)
def test_what_a_source_means(text: str, urls: tuple[str, ...], bucket: str | None, prefix: str) -> None:
    parsed = source.parse(text)
    assert (parsed.servers.urls, parsed.bucket, parsed.prefix) == (urls, bucket, prefix)


@pytest.mark.parametrize(
    ("text", "user", "password"),
    [
        ("nats://h", None, None),
        ("nats://token@h", "token", None),
        ("nats://u:@h", "u", ""),
        ("nats://u:p%40%2F%3a@h", "u", "p@/:"),
        ("nats://u:p@ss@h", "u", "p@ss"),
        ("nats://u:a:b@h", "u", "a:b"),
    ],
)
def test_user_and_password(text: str, user: str | None, password: str | None) -> None:
    servers = source.parse(text).servers
    assert (servers.user, servers.password) == (user, password)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not of the form"),
        ("/srv/data", "not of the form"),
        ("localhost/b", "not of the form"),
        ("http://localhost/b", "must begin with nats:// or tls://"),
        ("nats://h:0", "not a port"),
        ("nats://h:65536", "not a port"),
        ("nats://h:/b", "not a port"),
        ("nats://h:4a", "not a port"),
        ("nats://::1/b", "in brackets"),
        ("nats://[::1/b", "in brackets"),
        ("nats://[::1]4222/b", "in brackets"),
        ("nats://[h]/b", "in brackets"),
        ("nats://a,,b/b", "not a host name"),
        ("nats://a b/b", "not a host name"),
        ("nats://-a/b", "not a host name"),
        ("nats://@h", "no user before"),
        ("nats://u%zz@h", "write it as %25"),
        ("nats://u:50%@h", "write it as %25"),
        ("nats://%ff@h", "not UTF-8"),
        ("nats://h/a.b", "not a bucket name"),
        ("nats://h/a b", "not a bucket name"),
        ("nats://h/ä", "not a bucket name"),
        ("nats://h//x", "empty bucket name"),
        ("nats://h/b/x//y", "must be a path"),
        ("nats://h/b/../y", "must be a path"),
        ("nats://h/b/%2e", "must be a path"),
        ("nats://h/b/%00", "must be a path"),
    ],
)
def test_what_is_refused(text: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        source.parse(text)


@pytest.mark.parametrize(
    ("typed", "display"),
    [
        ("nats://u:secret@h1,h2:5/b/p", "nats://h1,h2:5/b/p"),
        ("nats://secret@h/", "nats://h/"),
        ("nats://h", "nats://h"),
        ("nats:///b", "nats:///b"),
    ],
)
def test_display_is_what_was_typed_without_user_and_password(typed: str, display: str) -> None:
    assert source.parse(typed).display == display


_SECRET = "hunter2"


@given(
    st.text(alphabet=":/@%,[]? ", max_size=4),
    st.text(alphabet=":/@%,[]?.- ", max_size=4),
    st.sampled_from(["h", "h:4222", "h:x", "[::1]", ":", ""]),
    st.sampled_from(["", "/b", "/b.c", "/b//c"]),
)
def test_no_message_and_no_repr_shows_a_password(before: str, after: str, host: str, path: str) -> None:
    text = f"nats://user:{before}{_SECRET}{after}@{host}{path}"
    try:
        parsed = source.parse(text)
    except UsageError as error:
        shown = str(error)
    else:
        # With an unencoded '/' in it, the rest of a password can look like a bucket and a prefix.
        if "/" in before + after:
            return
        shown = parsed.display + repr(parsed)
    assert _SECRET not in shown
    assert _SECRET not in source.redact(text)


@given(st.text(min_size=1), st.text())
def test_any_user_and_password_can_be_written(user: str, password: str) -> None:
    try:
        typed = f"nats://{quote(user, safe='')}:{quote(password, safe='')}@h/b"
    except UnicodeEncodeError:
        return
    servers = source.parse(typed).servers
    assert (servers.user, servers.password) == (user, password)


@given(st.text())
def test_any_text_parses_or_is_a_usage_error(text: str) -> None:
    for typed in (text, f"nats://{text}", f"nats://h/{text}"):
        with contextlib.suppress(UsageError):
            parsed = source.parse(typed)
            assert source.parse(parsed.display).servers.urls == parsed.servers.urls


@pytest.mark.parametrize(
    ("text", "urls", "user"),
    [
        ("localhost", ("nats://localhost:4222",), None),
        ("demo.nats.io:4222", ("nats://demo.nats.io:4222",), None),
        ("nats://u:p@a:1, tls://b:2", ("nats://a:1", "tls://b:2"), "u"),
        ("", (), None),
    ],
)
def test_servers_of_a_context(text: str, urls: tuple[str, ...], user: str | None) -> None:
    servers = source.parse_servers(text)
    assert (servers.urls, servers.user) == (urls, user)


def test_servers_of_a_context_have_no_path() -> None:
    with pytest.raises(UsageError, match="nats://host:port"):
        source.parse_servers("nats://h/b")
