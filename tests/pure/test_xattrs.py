"""The mapping between extended attributes and the metadata map, by property."""

from __future__ import annotations

import base64
import errno
import json
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from natsfs.catalog import xattrs
from natsfs.catalog.attributes import OWN_KEYS, SYMLINK_KEY
from natsfs.catalog.metadata import Metadata, decode, encode
from natsfs.catalog.xattrs import NAME_MAX, PREFIX, Edit
from tests.support import raises

OWN = (*OWN_KEYS, SYMLINK_KEY)
BLANK = Metadata(name="f", bucket="b", nuid="N")
_PIECES = st.sampled_from(
    [
        "user.",
        "nats.",
        "name~",
        "key~",
        "mode",
        "symlink",
        "ff",
        "c3",
        "00",
        "0" * 32,
        "a",
        "é",
        "%",
        " ",
        "=",
    ]
)
LOOKALIKES = st.lists(_PIECES, min_size=1, max_size=5).map("".join)
TEXTS = st.text(st.characters(), max_size=20) | LOOKALIKES
NAMES = st.one_of(
    st.binary(min_size=1, max_size=NAME_MAX).map(lambda name: name.replace(b"\0", b"x")),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50).map(
        lambda text: text.replace("\0", "x").encode()
    ),
    LOOKALIKES.map(str.encode),
    st.sampled_from([b"\xff" * NAME_MAX, b"x" * NAME_MAX, b"user." * 50, *(key.encode() for key in OWN)]),
)
VALUES = st.binary(max_size=60) | st.binary(max_size=30).map(lambda data: b"0s" + base64.b64encode(data))
KEYS = TEXTS | st.sampled_from(["", "\0", "\ud800", "x" * 251, "é" * 126, "nats." + "x" * 245, *OWN])
MAPS = st.dictionaries(KEYS, TEXTS, max_size=8)


def is_free(name: bytes) -> bool:
    return not name.startswith((b"nats.", b"user.key~"))


@given(st.dictionaries(NAMES.filter(is_free), VALUES, max_size=6), MAPS)
@example({b"mode": b"1", b"user.mode": b"2", b"user.user.mode": b"3"}, {"mode": "100644", "user.mode": "x"})
@example({b"\xff": b"1", b"name~ff": b"2", b"user.name~ff": b"3", b"user.user.name~ff": b"4"}, {})
@example({b"user.nats.size": b"1", b"user.user.nats.size": b"2", b"nats": b"3"}, {"nats.size": "x"})
def test_every_attribute_comes_back(wanted: dict[bytes, bytes], before: dict[str, str]) -> None:
    """Whatever was set is read, listed and removed again, through the wire format, and leaves the rest alone."""
    meta = replace(BLANK, attributes=before)
    for name, value in wanted.items():
        meta = xattrs.change(PREFIX + name, value, meta).apply(meta)
    meta = decode(encode(meta, mtime=""), subject="$O.b.M.Zg==", seq=1, time_ns=0)
    assert {name: xattrs.get(PREFIX + name, meta, meta) for name in wanted} == wanted
    listed = xattrs.names(meta)
    assert len(set(listed)) == len(listed)
    assert {PREFIX + name for name in wanted} <= set(listed)
    after = meta.attributes or {}
    assert {key: after.get(key) for key in OWN} == {key: before.get(key) for key in OWN}
    for name in wanted:
        meta = xattrs.change(PREFIX + name, None, meta).apply(meta)
    overwritten = {xattrs.key_of(name, before) for name in wanted}
    assert (meta.attributes or {}) == {key: text for key, text in before.items() if key not in overwritten}


@given(MAPS)
@example({"user.name~ff": "1", "user.user.name~ff": "2", "name~ff": "3", "user.name~61": "4"})
@example({xattrs._unnamed("").decode(): "1", "": "2", "user." + xattrs._unnamed("").decode(): "3"})
def test_every_foreign_entry_is_shown(values: dict[str, str]) -> None:
    """An entry of any client has a legal name of its own, through which it can be read, changed and removed."""
    meta = replace(BLANK, attributes=values)
    shown = {key: xattrs.name_of(key) for key in values if key not in OWN}
    names = xattrs.names(meta)
    assert sorted(names) == sorted(PREFIX + (name or b"") for name in shown.values())
    assert len(set(names)) == len(names)
    assert all(len(name) <= 255 and b"\0" not in name for name in names)
    for key, name in shown.items():
        assert name is not None
        assert not name.startswith(b"nats.")
        assert xattrs.get(PREFIX + name, meta, meta) == xattrs.decode_value(values[key])
        changed = xattrs.change(PREFIX + name, b"new", meta).apply(meta)
        assert changed.attributes == values | {key: "new"}
        removed = xattrs.change(PREFIX + name, None, meta).apply(meta)
        assert (removed.attributes or {}) == {k: v for k, v in values.items() if k != key}


@given(st.sampled_from(OWN), MAPS)
def test_own_keys_are_neither_shown_nor_touched(key: str, values: dict[str, str]) -> None:
    """What natsfs keeps in the map itself is no attribute, and an attribute of that name lies elsewhere."""
    meta = replace(BLANK, attributes={key: "theirs"} | {k: v for k, v in values.items() if k in OWN})
    name = PREFIX + key.encode()
    assert xattrs.names(meta) == []
    with raises(errno.ENODATA):
        xattrs.get(name, meta, meta)
    changed = xattrs.change(name, b"mine", meta).apply(meta)
    assert changed.attributes == (meta.attributes or {}) | {f"user.{key}": "mine"}


@given(VALUES)
@example(b"")
@example(b"0s")
@example(b"0sMHM=")
@example(b"a\0")
def test_every_value_comes_back(value: bytes) -> None:
    assert xattrs.decode_value(xattrs.encode_value(value)) == value


def test_values_are_stored_readable() -> None:
    """Text as it is, anything else in the form of getfattr."""
    assert xattrs.encode_value("rot und grün\n".encode()) == "rot und grün\n"
    assert xattrs.encode_value(b"\xff\x00") == "0s/wA="
    assert xattrs.encode_value(b"0sabc") == "0s" + base64.b64encode(b"0sabc").decode()


@given(TEXTS)
def test_foreign_text_is_shown_as_it_is(text: str) -> None:
    """Unless it is just what natsfs would have written for bytes."""
    shown = xattrs.decode_value(text)
    assert shown == text.encode("utf-8", "surrogatepass") or xattrs.encode_value(shown) == text


def test_a_key_that_can_be_no_name_cannot_be_made_up() -> None:
    with raises(errno.EPERM):
        xattrs.change(PREFIX + xattrs._unnamed("x" * 300), b"1", BLANK)


HEADERS = st.dictionaries(
    st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=":"), min_size=1),
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"))),
    min_size=1,
    max_size=4,
)


@given(HEADERS)
def test_headers_come_back(headers: dict[str, list[str]]) -> None:
    meta = xattrs.change(b"user.nats.headers", json.dumps(headers).encode(), BLANK).apply(BLANK)
    assert meta.headers == headers
    assert json.loads(xattrs.get(b"user.nats.headers", meta, None)) == headers
    for name, values in headers.items():
        lines = xattrs.get(f"user.nats.header.{name}".encode(), meta, None)
        assert lines == "\n".join(values).encode()
        again = xattrs.change(f"user.nats.header.{name}".encode(), lines, meta).apply(meta)
        assert (again.headers or {})[name] == (values or [""])
        meta = xattrs.change(f"user.nats.header.{name}".encode(), None, meta).apply(meta)
    assert meta.headers is None


NO_HEADERS = '|x|[]|1|{"a": "b"}|{"a": [1]}|{"a b": ["c"]}|{"a:": ["c"]}|{"": ["c"]}|{"a": ["b\\n"]}|{"a": ["\\ud800"]}'


@pytest.mark.parametrize("text", [*NO_HEADERS.encode().split(b"|"), b"\xff", b"[" * 100_000])
def test_other_headers_are_refused(text: bytes) -> None:
    with raises(errno.EINVAL):
        xattrs.change(b"user.nats.headers", text, BLANK)


@given(
    st.dictionaries(TEXTS, st.none() | st.integers() | TEXTS | st.lists(st.integers() | TEXTS), max_size=4)
)
def test_whatever_others_have_for_headers_can_be_read(headers: dict[str, object]) -> None:
    meta = replace(BLANK, headers=headers)  # type: ignore[arg-type]
    if headers:
        assert json.loads(xattrs.get(b"user.nats.headers", meta, None)) == headers
    for name, value in headers.items():
        if value is not None and name.isascii():
            lines = xattrs.get(b"user.nats.header." + name.encode(), meta, None)
            assert not isinstance(value, str) or lines == value.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize(
    "what", ["nuid", "digest", "chunks", "chunk_size", "size", "seq", "metadata", "other", ""]
)
def test_what_nats_decides_is_read_only(what: str) -> None:
    for value in (b"1", None):
        with raises(errno.EPERM):
            xattrs.change(f"user.nats.{what}".encode(), value, BLANK)
    with raises(errno.ENODATA):
        xattrs.get(f"user.nats.{what}".encode(), BLANK, None)


EDITS = st.builds(Edit, st.just("entry"), st.sampled_from("ab"), st.none() | st.text(max_size=2)) | st.builds(
    Edit, st.just("header"), st.sampled_from("AB"), st.none() | st.lists(st.text(max_size=2), min_size=1)
)
ALL_EDITS = EDITS | st.builds(
    Edit, st.just("headers"), st.just(""), st.none() | st.dictionaries(st.sampled_from("AB"), st.just(["x"]))
)


@given(st.lists(ALL_EDITS, max_size=8))
def test_a_later_edit_takes_the_place_of_an_earlier_one(edits: list[Edit]) -> None:
    """The shortened list of edits has the same outcome as all of them in order, and does not grow for ever."""
    short: tuple[Edit, ...] = ()
    for edit in edits:
        short = xattrs.add(short, edit)
    assert xattrs.edited(BLANK, short) == xattrs.edited(BLANK, tuple(edits))
    assert len({(edit.kind, edit.key) for edit in short}) == len(short)


def test_names_are_checked() -> None:
    for call in (lambda: xattrs.get(b"user.", BLANK, None), lambda: xattrs.change(b"user.", b"x", BLANK)):
        with raises(errno.EINVAL):
            call()
