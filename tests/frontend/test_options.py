from __future__ import annotations

import contextlib
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natsfs import options
from natsfs.errors import UsageError
from natsfs.options import Options


def test_rows_and_dataclass_have_the_same_fields() -> None:
    assert {row.field for row in options.ROWS} == {field.name for field in fields(Options)}


def test_names_are_unique_and_groups_are_known() -> None:
    names = [row.name for row in options.ROWS]
    assert len(names) == len(set(names))
    assert {row.group for row in options.ROWS} == set(options.GROUPS)


def test_defaults_in_the_rows_are_those_of_the_dataclass() -> None:
    """A documented default that can be typed must give what leaving the option out gives."""
    for row in options.ROWS:
        if row.parse is None or not row.default or " " in row.default or "$" in row.default:
            continue
        assert options.parse([f"{row.name}={row.default}"]) == Options(), row.name
    for row in options.ROWS:
        if row.parse is None and row.default and row.field != "kernel_options":
            assert options.parse([row.name]) == Options(), row.name


def test_no_option_is_also_ignored() -> None:
    # "user" is both: alone it is fstab's, with a value it is the NATS user.
    assert options.IGNORED & {row.name for row in options.ROWS} == {"user"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Options()),
        ("ro", Options(read_only=True)),
        ("ro,rw", Options()),
        (
            "rw,_netdev,nofail,noauto,defaults,user,users,x-systemd.automount,comment=x,noatime",
            Options(kernel_options=("noatime",)),
        ),
        ("user,user=bob", Options(user="bob")),
        ("allow_other,no_default_permissions", Options(allow_other=True, default_permissions=False)),
        ("uid=0,gid=root", Options(uid=0, gid=0)),
        ("file_mode=600,dir_mode=0700", Options(file_mode=0o600, dir_mode=0o700)),
        (
            "chunk_size=256K,cache_size=1g,spool_size=10MiB",
            Options(chunk_size=256 << 10, cache_size=1 << 30, spool_size=10 << 20),
        ),
        ("timeout=1.5,purge_grace=2m", Options(timeout=1.5, purge_grace=120.0)),
        ("excl=local,domain=leaf,log_level=debug", Options(excl="local", domain="leaf", log_level="debug")),
        ("suid,nosuid,dev,exec", Options(kernel_options=("nosuid", "dev", "exec"))),
        ("noexec,sync,async,noexec", Options(kernel_options=("async", "noexec"))),
        (r"creds=/a\,b,ro", Options(creds="/a,b", read_only=True)),
        ("lazytime,relatime,dev", Options(kernel_options=("dev",))),
    ],
)
def test_what_options_mean(text: str, expected: Options) -> None:
    assert options.parse([text]) == expected


def test_later_arguments_win() -> None:
    assert options.parse(["ro,timeout=5", "timeout=6"]) == Options(read_only=True, timeout=6.0)


def test_paths_are_absolute_and_know_the_home_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/x")
    parsed = options.parse(["creds=a/b,nkey=~/n,spool_dir=."])
    assert (parsed.creds, parsed.nkey, parsed.spool_dir) == (
        str(tmp_path / "a/b"),
        "/home/x/n",
        str(tmp_path),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cahe_size=1M", r"unknown option 'cahe_size': did you mean cache_size=SIZE\?"),
        ("alow_other", r"did you mean allow_other\?"),
        ("zzz", "natsfs mount --help lists them all"),
        ("ro=1", "takes no value"),
        ("creds", "needs a value: -o creds=FILE"),
        ("creds=", "expected a path"),
        ("chunk_size=x", "expected a size"),
        ("chunk_size=1", "from 1K to 8M"),
        ("timeout=0", "at least 1 s"),
        ("timeout=500ms", "at least 1 s"),
        ("timeout=1e9", "at least 1 s"),
        ("purge_grace=-1", "at least 0 s"),
        ("uid=no-such-user-here", "user on this machine"),
        ("uid=4294967295", "user on this machine"),
        ("gid=-1", "group on this machine"),
        ("file_mode=8", "octal mode"),
        ("file_mode=77777", "octal mode"),
        ("excl=always", "one of cluster, local"),
        ("log_level=loud", "one of debug, info, warning, error"),
        ("domain=a.b", "JetStream domain"),
        ("context=../x", "name of a context"),
        ("context=a..b", "name of a context"),
    ],
)
def test_what_is_refused(text: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        options.parse([text])


@pytest.mark.parametrize("name", ["password", "pass", "token"])
def test_secrets_are_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(UsageError, match=r"_file=FILE, or set NATSFS_") as caught:
        options.parse([f"{name}=hunter2"])
    assert "hunter2" not in str(caught.value)


def test_sloppy_passes_over_unknown_names_only() -> None:
    assert options.parse(["zzz=1,ro"], sloppy=True) == Options(read_only=True)
    with pytest.raises(UsageError):
        options.parse(["timeout=x"], sloppy=True)


@given(st.lists(st.text(alphabet=st.characters(exclude_characters="\0"), min_size=1), max_size=5))
def test_any_value_can_be_escaped(values: list[str]) -> None:
    text = ",".join("user=" + value.replace("\\", "\\\\").replace(",", "\\,") for value in values)
    assert options.split(text) == [f"user={value}" for value in values]


@given(st.text())
def test_any_text_parses_or_is_a_usage_error(text: str) -> None:
    for typed in (text, f"cache_size={text}", f"timeout={text}", f"uid={text}", f"file_mode={text}"):
        with contextlib.suppress(UsageError):
            options.parse([typed])


@given(st.integers(1, 1 << 45))
def test_formatted_sizes_read_back(size: int) -> None:
    assert options.parse_size(options.format_size(size)) == size


@pytest.mark.parametrize(
    ("environ", "uid", "expected"),
    [
        ({"HOME": "/home/u"}, 0, "/var/cache/natsfs"),
        ({"HOME": "/home/u"}, 7, "/home/u/.cache/natsfs"),
        ({"HOME": "/home/u", "XDG_CACHE_HOME": "/c"}, 7, "/c/natsfs"),
        ({"HOME": "/home/u", "XDG_CACHE_HOME": "relative"}, 7, "/home/u/.cache/natsfs"),
    ],
)
def test_spool_directory(environ: dict[str, str], uid: int, expected: str) -> None:
    assert options.default_spool_dir(environ, uid) == expected


def test_default_spool_directory_is_computed_for_this_user() -> None:
    assert Options().spool_dir == options.default_spool_dir(os.environ, os.getuid())
    assert replace(Options(), spool_dir="/x").spool_dir == "/x"
