"""Every object name has one path, every path one object name."""

from __future__ import annotations

import errno

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from natsfs.names import NAME_MAX, SELF, NameRefused, decode_subject, encode_subject, name_of, path_of

SNIPPETS = st.one_of(
    st.sampled_from(
        [
            "%",
            "25",
            "2F",
            "2E",
            "03",
            "00",
            "DC80",
            "DCC3",
            "DCA9",
            "24C3",
            "5C",
            "D800",
            "/",
            "//",
            ".",
            "..",
            "a",
            "%5C",
        ]
    ),
    st.sampled_from(["\0", "é", "😀", "\udc80", "\ud83d", "\udcff", "x" * 249, "é" * 126, "\n", " "]),
)
ODD_TEXT = st.lists(SNIPPETS, min_size=1, max_size=12).map("".join)
OBJECT_NAMES = st.one_of(
    ODD_TEXT,
    st.text(st.characters(), min_size=1),
    st.text(st.characters(categories=["Cs", "Ll"]), min_size=1),
).filter(lambda name: len(name.encode("utf-8", "surrogatepass")) < 2800)
FILE_NAMES = (
    st.one_of(
        st.binary(min_size=1, max_size=NAME_MAX),
        ODD_TEXT.map(
            lambda text: text.encode("utf-8", "surrogateescape" if "\ud83d" not in text else "replace")
        ),
    )
    .map(lambda name: name.replace(b"/", b"").replace(b"\0", b"")[:NAME_MAX])
    .filter(lambda name: name not in (b"", b".", b".."))
)


@given(OBJECT_NAMES)
@example("%DCC3%DCA9")
@example("%DCC3")
@example("x" * 249 + "%5C")
@example("x" * 252 + "%5C")
@example("x" * 253 + "..")
@example("a/%03")
@example("é" * 127 + "%5C")
def test_every_object_name_has_one_path(name: str) -> None:
    path = path_of(name)
    assert all(0 < len(part) <= NAME_MAX for part in path)
    assert not any(b"/" in part or b"\0" in part or part in (b".", b"..") for part in path)
    assert name_of(path) == name


@given(OBJECT_NAMES, OBJECT_NAMES)
def test_two_object_names_never_share_a_path(one: str, other: str) -> None:
    assert (path_of(one) == path_of(other)) == (one == other)


@given(FILE_NAMES)
@example(b"100%")
@example(b"%41")
@example(b"caf\xe9")
@example(b"%25")
@example(b"%252525")
@example(b"%C3%A9.html")
@example(b"%DC80")
@example(b"%25DC80\x80")
def test_every_file_name_comes_back(name: bytes) -> None:
    if name.endswith(b"%5C") or b"%24" in name:
        # The only names that may be refused: the continuation mark on a full-length name, and the form that
        # stands for text which would read as a byte, where it would not. SELF has a meaning of its own.
        try:
            stored = name_of((b"dir", name))
        except NameRefused:
            return
    else:
        stored = name_of((b"dir", name))
    assert path_of(stored) == ((b"dir",) if name == SELF else (b"dir", name))


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_ordinary_names_are_unchanged(name: str) -> None:
    if "%" not in name and name not in (".", ".."):
        assert path_of(name) == (name.encode(),)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/home/u/f", (b"%2F", b"home", b"u", b"f")),
        ("a//b", (b"a", b"%2F", b"b")),
        ("a/../b", (b"a", b"%2E%2E", b"b")),
        ("./a", (b"%2E", b"a")),
        ("a/", (b"a", b"%2F")),
        ("nul\0", (b"nul%00",)),
        ("%2F", (b"%252F",)),
        ("%2F%2F", (b"%2F%2F",)),
        ("100%", (b"100%",)),
        ("%41", (b"%41",)),
        ("x" * 300, (b"x" * 252 + b"%5C", b"x" * 48)),
        ("\ud800", (b"%D800",)),
        ("%DC80", (b"\x80",)),
    ],
)
def test_the_table(name: str, path: tuple[bytes, ...]) -> None:
    assert path_of(name) == path
    assert name_of(path) == name


def test_the_object_beside_a_directory() -> None:
    assert name_of((b"a", SELF)) == "a"
    assert path_of("a/%03") == (b"a", b"%2503")
    with pytest.raises(NameRefused):
        name_of((b"a", SELF, b"b"))


def test_a_name_that_the_server_would_not_take_is_too_long() -> None:
    with pytest.raises(NameRefused) as refused:
        name_of(tuple(b"d" * 200 for _ in range(20)))
    assert refused.value.errno == errno.ENAMETOOLONG


def test_subjects_are_padded_base64url_of_utf8() -> None:
    assert encode_subject("~~~???>>>") == "fn5-Pz8_Pj4-"
    assert encode_subject("é") == "w6k="


@given(OBJECT_NAMES)
def test_a_subject_leads_back_to_its_name(name: str) -> None:
    assert decode_subject(encode_subject(name)) == name
