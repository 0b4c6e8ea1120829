"""Extended attributes: how they lie in an object's ``metadata`` map, and what of NATS they show.

A free attribute ``user.NAME`` is the entry NAME of the map, so that every client sees it. The mapping is reversible
both ways; what has no place of its own on the other side is moved behind a prefix:

==========================  ==================================================================================
attribute                   entry of the map
==========================  ==================================================================================
``user.colour``             ``colour``
``user.mode``               ``user.mode`` (natsfs keeps attributes of its own under ``mode``)
``user.user.nats.x``        ``nats.x`` (``user.nats.`` shows what is no entry of the map)
``user.`` + not UTF-8       ``user.name~`` and the name in hexadecimal digits
``user.user.key~DIGEST``    an entry whose key can be no name: empty, over 250 bytes, with NUL or lone surrogates
==========================  ==================================================================================

A name or key that looks like one of these forms gets one more ``user.`` on the other side. Values that are no text
are stored as ``0s`` and base64, as getfattr(1) prints them, and so is text that begins with ``0s``.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from natsfs.catalog.attributes import APPENDS_KEY, OWN_KEYS, SYMLINK_KEY
from natsfs.catalog.metadata import Metadata

PREFIX: Final = b"user."
NAME_MAX: Final = 255 - len(PREFIX)  # bytes behind the prefix, linux/limits.h

_BINARY: Final = "0s"
_HIDDEN: Final = b"nats."
_HEADER: Final = "header."
_OWN = re.compile("(?:user[.])*(?:" + "|".join((*OWN_KEYS, SYMLINK_KEY, APPENDS_KEY)) + ")")
_RAW = re.compile(r"((?:user\.)*)name~((?:[0-9a-f]{2})+)")
_NATS = re.compile(r"((?:user\.)*)nats\.", re.DOTALL)
_UNNAMED = re.compile(r"((?:user\.)+)key~[0-9a-f]{32}")
# ADR-4: a header's name is printable ASCII without a colon; clients refuse objects with others.
_HEADER_NAME = re.compile(r"[!-9;-~]+")


def _refuse(number: int) -> OSError:
    return OSError(number, os.strerror(number))


# --- names ----------------------------------------------------------------------------------------------------


def _is_raw(text: str) -> re.Match[str] | None:
    """Whether `text` is the key of a name that is not UTF-8, or one that looks like it."""
    match = _RAW.fullmatch(text)
    if match is None:
        return None
    name = bytes.fromhex(match[2])
    return match if len(name) <= NAME_MAX and b"\0" not in name and not _is_utf8(name) else None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _unnamed(key: str) -> bytes:
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
    return b"user.key~" + digest[:32].encode()


def name_of(key: str) -> bytes | None:
    """The name, behind ``user.``, that shows an entry of the map; None for what natsfs keeps there itself."""
    if _OWN.fullmatch(key):
        return key.removeprefix("user.").encode() if key.startswith("user.") else None
    raw = _is_raw(key)
    if raw is not None and raw[1] == "user.":
        return bytes.fromhex(raw[2])
    text = key
    if raw is not None and raw[1]:
        text = key.removeprefix("user.")
    elif _NATS.match(key) or _UNNAMED.fullmatch(key):
        text = "user." + key
    try:
        name = text.encode()
    except UnicodeEncodeError:
        return _unnamed(key)
    return name if 0 < len(name) <= NAME_MAX and b"\0" not in name else _unnamed(key)


def key_of(name: bytes, values: Mapping[str, str]) -> str | None:
    """The key in the map `values` of the attribute `name`; None where the name stands for a key unknown there."""
    try:
        text = name.decode()
    except UnicodeDecodeError:
        return f"user.name~{name.hex()}"
    if _OWN.fullmatch(text):
        return "user." + text
    raw = _is_raw(text)
    if raw is not None and raw[1]:
        return "user." + text
    if (match := _NATS.match(text)) and match[1]:
        return text.removeprefix("user.")
    if (match := _UNNAMED.fullmatch(text)) is not None:
        if match[1] != "user.":
            return text.removeprefix("user.")
        return next((key for key in values if name_of(key) == name), None)
    return text


# --- values ---------------------------------------------------------------------------------------------------


def encode_value(value: bytes) -> str:
    """The text that stands for a value in the map."""
    if b"\0" not in value and not value.startswith(_BINARY.encode()) and _is_utf8(value):
        return value.decode()
    return _BINARY + base64.b64encode(value).decode()


def decode_value(text: str) -> bytes:
    if text.startswith(_BINARY):
        try:
            value = base64.b64decode(text.removeprefix(_BINARY).encode("ascii"), validate=True)
        except ValueError:
            value = b""
        if encode_value(value) == text:
            return value
    return text.encode("utf-8", "surrogatepass")


# --- changes --------------------------------------------------------------------------------------------------

Kind = Literal["entry", "description", "header", "headers"]


@dataclass(frozen=True, slots=True)
class Edit:
    """One change by setxattr(2), or removexattr(2) where `value` is None, to be made to whatever is stored by then."""

    kind: Kind
    key: str = ""
    value: str | list[str] | dict[str, list[str]] | None = None

    def apply(self, meta: Metadata) -> Metadata:
        value = self.value
        match self.kind:
            case "entry":
                return replace(meta, attributes=_changed(meta.attributes, self.key, value))
            case "description":
                return replace(meta, description=value if isinstance(value, str) and value else None)
            case "header":
                return replace(meta, headers=_changed(meta.headers, self.key, value))
            case "headers":
                return replace(meta, headers=value if isinstance(value, dict) and value else None)


def _changed(values: Mapping[str, Any] | None, key: str, value: object) -> dict[str, Any] | None:
    changed = {k: v for k, v in (values or {}).items() if k != key}
    if value is not None:
        changed[key] = value
    return changed or None


def add(edits: tuple[Edit, ...], edit: Edit) -> tuple[Edit, ...]:
    """`edits` and then `edit`, which takes the place of an earlier one of the same thing."""
    return (*(old for old in edits if (old.kind, old.key) != (edit.kind, edit.key)), edit)


def edited(meta: Metadata, edits: tuple[Edit, ...]) -> Metadata:
    for edit in edits:
        meta = edit.apply(meta)
    return meta


# --- calls ----------------------------------------------------------------------------------------------------


def names(current: Metadata) -> list[bytes]:
    """listxattr(2): the free attributes. What NATS knows besides is not in the list, so that no program copies it."""
    found = [name_of(key) for key in current.attributes or {}]
    return [PREFIX + name for name in found if name is not None]


def get(name: bytes, current: Metadata, stored: Metadata | None) -> bytes:
    """getxattr(2): of the state `current`, of which `stored` is what the store holds, if it holds anything."""
    name = _behind_prefix(name)
    if name.startswith(_HIDDEN):
        shown = _shown(_text(name.removeprefix(_HIDDEN), errno.ENODATA), current, stored)
        if shown is None:
            raise _refuse(errno.ENODATA)
        return shown
    values = current.attributes or {}
    key = key_of(name, values)
    if key is None or key not in values:
        raise _refuse(errno.ENODATA)
    return decode_value(values[key])


def _behind_prefix(name: bytes) -> bytes:
    name = name.removeprefix(PREFIX)
    if not name:
        raise _refuse(errno.EINVAL)
    return name


def _shown(what: str, current: Metadata, stored: Metadata | None) -> bytes | None:
    headers = current.headers or {}
    if what == "description":
        return _bytes(current.description) if current.description else None
    if what == "headers":
        return to_json(headers) if headers else None
    if what.startswith(_HEADER):
        return _header(headers.get(what.removeprefix(_HEADER)))
    if stored is None:
        return None
    match what:
        case "nuid":
            return _bytes(stored.nuid) or None
        case "digest":
            return _bytes(stored.digest) if stored.digest else None
        case "chunks" | "chunk_size" | "size" | "seq":
            return str(getattr(stored, what)).encode()
        case "metadata":
            return to_json(stored.attributes or {})
    return None


def _header(values: object) -> bytes | None:
    """All values, a line each; clients that put something else there have it shown as it is."""
    if values is None:
        return None
    lines = values if isinstance(values, list) else [values]
    return b"\n".join(_bytes(one) if isinstance(one, str) else to_json(one) for one in lines)


def change(name: bytes, value: bytes | None, current: Metadata) -> Edit:
    """setxattr(2), or removexattr(2) where `value` is None. Raises OSError."""
    name = _behind_prefix(name)
    if name.startswith(_HIDDEN):
        return _change_shown(_text(name.removeprefix(_HIDDEN), errno.EPERM), value, current)
    values = current.attributes or {}
    key = key_of(name, values)
    if value is None and (key is None or key not in values):
        raise _refuse(errno.ENODATA)
    if key is None:
        raise _refuse(errno.EPERM)  # a digest does not say which key it was made of
    return Edit("entry", key, None if value is None else encode_value(value))


def _change_shown(what: str, value: bytes | None, current: Metadata) -> Edit:
    header = what.removeprefix(_HEADER) if what.startswith(_HEADER) else None
    if header is None and what not in ("description", "headers"):
        raise _refuse(errno.EPERM)
    if value is None:
        if _shown(what, current, None) is None:
            raise _refuse(errno.ENODATA)
        return Edit(*_target(what, header))
    text = _text(value, errno.EINVAL)
    if header is not None:
        lines = text.split("\n")
        _check_headers({header: lines})
        return Edit("header", header, lines)
    if what == "description":
        return Edit("description", "", text)
    try:
        headers = json.loads(text)
    except (ValueError, RecursionError):
        raise _refuse(errno.EINVAL) from None
    _check_headers(headers)
    return Edit("headers", "", headers)


def _target(what: str, header: str | None) -> tuple[Kind, str]:
    if header is not None:
        return "header", header
    return ("description", "") if what == "description" else ("headers", "")


def _check_headers(headers: object) -> None:
    """Raises EINVAL for what is no headers of ADR-4: names to lists of values of one line each."""
    fits = isinstance(headers, dict) and all(
        _HEADER_NAME.fullmatch(name)
        and isinstance(values, list)
        and all(isinstance(one, str) and not re.search(r"[\r\n\0\ud800-\udfff]", one) for one in values)
        for name, values in headers.items()
    )
    if not fits:
        raise _refuse(errno.EINVAL)


def _text(data: bytes, number: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _refuse(number) from None


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def to_json(value: object) -> bytes:
    text = json.dumps(value, ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError:  # lone surrogates stay JSON's escapes
        return json.dumps(value).encode()
