"""Metadata messages of every client, read and written; POSIX attributes and times in them."""

from __future__ import annotations

import contextlib
import json
import stat
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from natsfs.catalog.attributes import Attributes, Defaults, compact, expand, format_time, named_ns, parse_time
from natsfs.catalog.metadata import (
    DEFAULT_CHUNK_SIZE,
    NUID,
    Link,
    MalformedMetadata,
    Metadata,
    decode,
    encode,
    new_nuid,
    pack,
    pack_record,
    plain,
    tombstone,
    unpack,
)
from natsfs.names import encode_subject

SUBJECT = "$O.gob.M.aGVsbG8="
NOW = "2026-01-02T03:04:05.678901234Z"


def read(body: str | bytes | dict[str, Any]) -> Metadata:
    text = json.dumps(body) if isinstance(body, dict) else body
    data = text.encode() if isinstance(text, str) else text
    return decode(data, subject=SUBJECT, seq=7, time_ns=123, op=None)


# --- what other clients write -----------------------------------------------------------------------------------


def test_an_object_of_the_go_client() -> None:
    meta = read(
        '{"name":"hello","description":"go","headers":{"X-H":["1","2"]},"metadata":{"k":"v"},"options":'
        '{"max_chunk_size":131072},"bucket":"gob","nuid":"wfgWabcdefghijklmnopqr","size":1000000,"mtime":'
        '"0001-01-01T00:00:00Z","chunks":8,"digest":"SHA-256=A3_M="}'
    )
    assert (meta.name, meta.bucket, meta.nuid, meta.size, meta.chunks) == (
        "hello",
        "gob",
        "wfgWabcdefghijklmnopqr",
        1000000,
        8,
    )
    assert (meta.description, meta.headers, meta.attributes) == ("go", {"X-H": ["1", "2"]}, {"k": "v"})
    assert meta.chunk_size == 131072
    assert meta.time_ns == 123, "the message's time, and not the zero that Go writes"
    assert not meta.deleted


def test_a_tombstone_of_the_go_client() -> None:
    meta = read(
        '{"name":"hello","options":{"max_chunk_size":131072},"bucket":"gob","nuid":"w","size":0,'
        '"mtime":"0001-01-01T00:00:00Z","chunks":0,"deleted":true}'
    )
    assert meta.deleted


def test_a_tombstone_of_nats_py_with_its_empty_time() -> None:
    assert read(
        '{"name":"hello","bucket":"gob","nuid":"w","mtime":"","size":0,"chunks":0,"deleted":true}'
    ).deleted


def test_links() -> None:
    go = read(
        '{"name":"lnk","options":{"link":{"bucket":"gob","name":"hello"}},"bucket":"gob","nuid":"x","size":0,'
        '"mtime":"0001-01-01T00:00:00Z","chunks":0}'
    )
    assert go.link == Link("gob", "hello")
    javascript = read('{"name":"lnk","bucket":"target","options":{"link":{"bucket":"target","name":"o"}}}')
    assert javascript.link == Link("target", "o")
    assert (javascript.nuid, javascript.size, javascript.chunks) == ("", 0, 0)
    assert javascript.bucket == "gob", "the bucket that the message lies in, not the link's"
    whole = read('{"name":"lnk","bucket":"gob","options":{"link":{"bucket":"target"}}}')
    assert whole.link == Link("target", "")


def test_dotnet_leaves_out_zeros_and_java_the_time() -> None:
    dotnet = read('{"name":"empty","bucket":"gob","nuid":"x","options":{"max_chunk_size":131072}}')
    assert (dotnet.size, dotnet.chunks, dotnet.deleted) == (0, 0, False)
    java = read('{"name":"j","bucket":"gob","nuid":"x","size":5,"chunks":1,"digest":"SHA-256=A="}')
    assert (java.size, java.chunk_size) == (5, DEFAULT_CHUNK_SIZE)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"null",
        b"[]",
        b"3",
        b"{}",
        b'{"name":""}',
        b'{"name":5}',
        b"\xff\xfe\x00",
        b'{"name":null}',
    ],
)
def test_what_names_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedMetadata):
        read(body)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
flat = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=5), scalars, max_size=3)
json_values = flat | st.lists(flat, max_size=3) | st.dictionaries(st.text(max_size=5), flat, max_size=3)
KEYS = [
    *("name", "description", "headers", "metadata", "options", "bucket", "nuid", "size", "mtime", "chunks"),
    *("digest", "deleted", "more"),
]


@given(
    st.dictionaries(st.sampled_from(KEYS), json_values),
    st.dictionaries(st.sampled_from(["link"]), json_values),
)
def test_nonsense_in_every_field_is_survived(fields: dict[str, Any], options: dict[str, Any]) -> None:
    meta = read(fields | {"name": "n", "options": options})
    again = read(encode(meta, mtime=NOW))
    assert (again.name, again.size, again.chunks, again.link) == ("n", meta.size, meta.chunks, meta.link)
    assert meta.size >= 0
    assert meta.chunk_size > 0
    assert isinstance(meta.is_marker, bool)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    with contextlib.suppress(MalformedMetadata):
        read(body)


# --- what most messages are -------------------------------------------------------------------------------------

BODY = {"nuid": "x" * 22, "size": 5, "mtime": NOW, "chunks": 1, "digest": "SHA-256=A3_M=", "bucket": "gob"}
CHUNKED = {"options": {"max_chunk_size": 131072}}
WRITTEN = Attributes(0o100644, 1, 2, 0, 3, -4, 5, 6, 7).encode(None)


@dataclass
class Message:
    """As `Stored`."""

    data: bytes
    subject: bytes = SUBJECT.encode()
    seq: int = 7
    time_ns: int = 123


@pytest.mark.parametrize(
    "body",
    [
        BODY | CHUNKED,
        BODY | CHUNKED | {"deleted": False},  # nats-py
        BODY | CHUNKED | {"metadata": WRITTEN},
        BODY | CHUNKED | {"metadata": {"k": "v"}},
        BODY | CHUNKED | {"metadata": {}},
    ],
)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_what_most_clients_write_is_read_in_short(body: dict[str, Any], separators: tuple[str, str]) -> None:
    data = json.dumps({"name": "hello"} | body, separators=separators).encode()
    record = plain(Message(data))
    assert record is not None
    assert unpack(pack_record(record), "gob") == read(data)


NEARLY = (
    *(
        0,
        1,
        -1,
        2**70,
        True,
        False,
        1.0,
        None,
        "",
        "x",
        "\ud800",
        [],
        ["x"],
        {},
        {"k": "v"},
        {"k": 1},
        WRITTEN,
    ),
    *({"max_chunk_size": value} for value in (1, 0, -1, True, 1.0, None, "1")),
    *({"max_chunk_size": 1, "more": 2}, {"max_chunk_size": 1, "link": {"bucket": "b"}}),
)


@pytest.mark.parametrize("key", KEYS)
def test_what_is_read_in_short_is_what_is_read_at_length(key: str) -> None:
    """Whatever one key is, or if it is not there."""
    whole = {"name": "hello", "metadata": WRITTEN} | BODY | CHUNKED
    bodies = [whole | {key: value} for value in NEARLY]
    bodies.append({other: value for other, value in whole.items() if other != key})
    for body in bodies:
        data = json.dumps(body).encode()
        record = plain(Message(data))
        if record is not None:
            subject = f"$O.gob.M.{encode_subject(record[2])}"
            assert unpack(pack_record(record), "gob") == replace(read(data), subject=subject), body


def test_what_is_not_as_clients_write_it_is_left_alone() -> None:
    data = json.dumps({"name": "hello"} | BODY | CHUNKED).encode()
    assert plain(Message(data)) is not None
    for other in (data + b" ", data + b"x", b" " + data, data[:-1], data.replace(b"hello", b"hell\xff")):
        assert plain(Message(other)) is None


@given(st.binary(max_size=60))
@example(b'{"name":"a"} ')
@example(b"[" * 100_000)
@example(b"9" * 5_000)
def test_any_bytes_are_left_alone(body: bytes) -> None:
    assert plain(Message(body)) is None


# --- what natsfs writes -----------------------------------------------------------------------------------------

texts = st.text(max_size=20)
names = st.text(min_size=1, max_size=30)
metadatas = st.builds(
    Metadata,
    name=names,
    bucket=st.just("gob"),
    nuid=st.just("x" * 22),
    size=st.integers(0, 2**63),
    chunks=st.integers(0, 2**32 - 1),
    chunk_size=st.integers(1, 2**32 - 1),
    digest=st.none() | st.just("SHA-256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU="),
    deleted=st.booleans(),
    link=st.none() | st.builds(Link, st.text(min_size=1, max_size=5), texts),
    description=st.none() | st.text(min_size=1, max_size=20),
    headers=st.none() | st.dictionaries(texts, st.lists(texts, max_size=2), min_size=1, max_size=2),
    attributes=st.none() | st.dictionaries(texts, texts, min_size=1, max_size=3),
    other=st.none() | st.just({"revision": 3, "options": {"more": [1]}}),
    subject=st.just(SUBJECT),
    seq=st.just(7),
    time_ns=st.just(123),
)


@given(metadatas)
@example(Metadata(name="\ud800", bucket="gob", nuid="x" * 22, subject=SUBJECT, seq=7, time_ns=123))
def test_what_is_written_is_read_again(meta: Metadata) -> None:
    body = encode(meta, mtime=NOW)
    assert decode(body, subject=SUBJECT, seq=7, time_ns=123) == meta
    body.decode("utf-8")


@given(metadatas)
def test_what_is_packed_is_there_again(meta: Metadata) -> None:
    plain_subject = replace(meta, subject=f"$O.gob.M.{encode_subject(meta.name)}")
    packed = pack(plain_subject)
    assert (packed is None) == (meta.deleted or meta.link is not None)
    assert packed is None or unpack(packed, "gob") == plain_subject


@given(metadatas)
def test_other_clients_find_what_they_need(meta: Metadata) -> None:
    data = json.loads(encode(meta, mtime=NOW))
    assert data["mtime"] == NOW, "an empty one makes the name unusable for the Go client"
    assert data["nuid"]
    assert data["bucket"] == "gob"
    assert data["options"]["max_chunk_size"] == meta.chunk_size
    assert all(isinstance(values, list) for values in data.get("headers", {}).values())
    assert ("deleted" in data) == meta.deleted, (
        "false may not be written: JavaScript's readers ask for presence"
    )


@given(metadatas)
def test_a_tombstone_has_a_nuid_of_its_own(meta: Metadata) -> None:
    grave = tombstone(meta)
    assert (grave.name, grave.subject, grave.deleted, grave.size, grave.chunks) == (
        meta.name,
        meta.subject,
        True,
        0,
        0,
    )
    assert grave.nuid not in ("", meta.nuid), "most clients purge the nuid of a tombstone"
    assert grave.digest is None
    assert grave.link is None
    assert read(encode(grave, mtime=NOW)).deleted


def test_nuids() -> None:
    nuids = {new_nuid() for _ in range(1000)}
    assert len(nuids) == 1000
    assert all(len(nuid) == 22 and NUID.fullmatch(nuid) for nuid in nuids)
    for wildcard in (">", "*", "a.b", "", "a b", "\n"):
        assert NUID.fullmatch(wildcard) is None


@pytest.mark.semantics("directories")
@pytest.mark.parametrize(
    ("name", "size", "attributes", "marker"),
    [
        ("a/", 0, None, True),
        ("a/", 0, {"mode": "40755"}, True),
        ("a/", 0, {"mode": "755"}, True),
        ("a/", 0, {"mode": "nonsense"}, True),
        ("a/", 0, {"mode": "100644"}, False),
        ("a/", 1, None, False),
        ("a", 0, None, False),
        ("a", 0, {"mode": "40755"}, False),
        ("/", 0, None, True),
    ],
)
def test_markers(name: str, size: int, attributes: dict[str, str] | None, marker: bool) -> None:
    meta = Metadata(name=name, bucket="b", nuid="n", size=size, attributes=attributes)
    assert meta.is_marker is marker
    assert not replace(meta, link=Link("b", "o")).is_marker


# --- attributes and times ---------------------------------------------------------------------------------------

FIRST, LAST = -62135596800 * 10**9, 253402300799 * 10**9 + 999_999_999
times = st.integers(FIRST, LAST)


@given(times)
@example(0)
@example(-1)
@example(FIRST)
@example(LAST)
def test_times_are_exact_to_the_nanosecond(time_ns: int) -> None:
    text = format_time(time_ns)
    assert parse_time(text) == time_ns
    # Python's own reader knows microseconds.
    expected = datetime.fromtimestamp(0, UTC).timestamp() + time_ns // 10**9
    assert datetime.fromisoformat(text[:19] + "+00:00").timestamp() == expected


@given(st.integers(-(10**30), 10**30))
def test_times_outside_of_the_calendar_are_brought_into_it(time_ns: int) -> None:
    parsed = parse_time(format_time(time_ns))
    assert parsed is not None
    assert FIRST <= parsed <= LAST


@pytest.mark.parametrize(
    ("text", "time_ns"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T01:00:00+01:00", 0),
        ("1969-12-31T18:30:00-05:30", 0),
        ("1970-01-01T00:00:00.5Z", 500_000_000),
        ("1970-01-01T00:00:00.123456789123Z", 123_456_789),
        ("1970-01-01t00:00:01z", 10**9),
        ("1970-01-01 00:00:01Z", 10**9),
        ("0001-01-01T00:00:00Z", FIRST),
        ("2016-12-31T23:59:60Z", 1483228800 * 10**9),
        ("", None),
        ("yesterday", None),
        ("1970-13-01T00:00:00Z", None),
        ("1970-01-01T00:00:00", None),
        ("1970-01-01T25:00:00Z", None),
        ("0000-01-01T00:00:00Z", None),
    ],
)
def test_the_forms_of_a_time(text: str, time_ns: int | None) -> None:
    assert parse_time(text) == time_ns


@given(st.text(max_size=40))
def test_any_text_is_a_time_or_none(text: str) -> None:
    assert parse_time(text) is None or isinstance(parse_time(text), int)


DEFAULTS = Defaults(uid=11, gid=22, file_mode=0o640, dir_mode=0o750)
numbers = st.integers(0, 2**32 - 1)
file_types = st.sampled_from(
    [stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK]
)
attributes = st.builds(
    lambda kind, mode, *rest: Attributes(kind | mode, *rest),
    file_types,
    st.integers(0, 0o7777),
    numbers,
    numbers,
    numbers,
    times,
    times,
    times,
    times,
)


@given(attributes, st.dictionaries(texts, texts, max_size=3))
def test_attributes_survive_and_leave_the_rest_alone(given_: Attributes, others: dict[str, str]) -> None:
    stored = given_.encode(others)
    assert Attributes.decode(stored, stat.S_IFREG, 5, DEFAULTS) == given_
    for key, value in others.items():
        if key not in given_.encode(None):
            assert stored[key] == value


SPELLED = (
    *("0", "-1", "007", "+7", " 7", "1_0", "\u0663", str(2**63 - 1), str(2**63), "", "x"),
    *("2026-01-02T03:04:05.678901234Z", "9999-01-02T03:04:05.678901234Z", "1812-01-02T03:04:05.678901234Z"),
    *("2026-02-30T03:04:05.678901234Z", "2026-01-02T24:04:05.678901234Z", "2026-01-02T03:04:60.678901234Z"),
    *("2026-01-02t03:04:05.678901234Z", "2026-01-02 03:04:05.678901234Z", "2026-01-02T03:04:05.6789012+1Z"),
    *("202\u0666-01-02T03:04:05.678901234Z", "2026-01-02T03:04:05.67890123\u0664Z"),
)


def test_what_natsfs_wrote_is_kept_in_short() -> None:
    """Exactly, and read as it would be at length; what is spelled otherwise is left alone."""
    for key in (*WRITTEN, "named", "rdev", "k"):
        for text in SPELLED:
            values = WRITTEN | {key: text}
            packed = compact(values)
            if packed is not None:
                assert list(expand(packed).items()) == list(values.items())
                assert Attributes.of(packed, 5, DEFAULTS) == Attributes.decode(
                    values, stat.S_IFREG, 5, DEFAULTS
                )
                assert named_ns(packed) == named_ns(values)


@given(attributes, st.integers(1, 2**63 - 1))
def test_natsfs_writes_what_can_be_kept_in_short(given_: Attributes, ino: int) -> None:
    values = replace(given_, rdev=0, ino=ino).encode(None)
    packed = compact(values)
    since_1678 = all(
        abs(time) < 2**63 for time in (given_.atime_ns, given_.mtime_ns, given_.ctime_ns, given_.btime_ns)
    )
    assert (packed is not None) == since_1678
    if packed is not None:
        assert expand(packed) == values
        assert Attributes.of(packed, 5, DEFAULTS) == Attributes.decode(values, stat.S_IFREG, 5, DEFAULTS)


def test_a_directory_stays_one_whatever_its_map_says() -> None:
    decoded = Attributes.decode({"mode": "100600"}, stat.S_IFDIR, 5, DEFAULTS)
    assert decoded.mode == stat.S_IFDIR | 0o600
    assert Attributes.decode({"mode": "40755"}, stat.S_IFREG, 5, DEFAULTS).mode == stat.S_IFREG | 0o755


def test_defaults() -> None:
    for values in (None, {}, {"mode": "9", "uid": "-1", "gid": "x", "mtime": "", "rdev": "zz"}):
        decoded = Attributes.decode(values, stat.S_IFREG, 5, DEFAULTS)
        assert decoded == Attributes(stat.S_IFREG | 0o640, 11, 22, 0, 5, 5, 5, 5)
    assert Attributes.decode(None, stat.S_IFDIR, 5, DEFAULTS).mode == stat.S_IFDIR | 0o750


@given(
    st.dictionaries(st.sampled_from(["mode", "uid", "gid", "rdev", "mtime", "atime"]), st.text(max_size=8))
)
def test_any_attributes_are_survived(values: dict[str, str]) -> None:
    decoded = Attributes.decode(values, stat.S_IFREG, 5, DEFAULTS)
    assert stat.S_IFMT(decoded.mode)
    assert 0 <= decoded.uid < 2**32
