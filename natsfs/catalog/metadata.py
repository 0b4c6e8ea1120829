"""The metadata message of an object (ADR-20), read tolerantly and written strictly."""

from __future__ import annotations

import json
import marshal
import re
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from natsfs.catalog.attributes import compact, expand, format_time
from natsfs.names import encode_subject

_NUID_DIGITS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
NUID_LENGTH: Final = 22
# What may stand in a chunk subject. Anything else is never purged by: a wildcard would take all chunks along.
NUID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")

DEFAULT_CHUNK_SIZE: Final = 131072  # what every client assumes where options.max_chunk_size is missing

# Keys of the body that `Metadata` holds in fields of its own; everything else is carried along unread.
_KNOWN: Final = frozenset(
    {"name", "description", "headers", "metadata", "options", "bucket"}
    | {"nuid", "size", "mtime", "chunks", "digest", "deleted"}
)
_KNOWN_OPTIONS: Final = frozenset({"link", "max_chunk_size"})


class MalformedMetadata(ValueError):
    """A metadata message that names no object. The caller logs it and goes on."""


@dataclass(frozen=True, slots=True)
class Link:
    """`name` is empty for a link to a whole bucket."""

    bucket: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """One version of an object's metadata, with the coordinates of its message in the stream.

    `size` is in bytes; `chunks` counts messages without the empty one that the .NET client may add.
    `time_ns` is the message's time, which is the object's modification time by ADR-20. `op` is the
    operation id of the natsfs that wrote it, if one did.
    """

    name: str
    bucket: str
    nuid: str
    size: int = 0
    chunks: int = 0
    chunk_size: int = DEFAULT_CHUNK_SIZE
    digest: str | None = None
    deleted: bool = False
    link: Link | None = None
    description: str | None = None
    headers: dict[str, list[str]] | None = None
    attributes: dict[str, str] | None = None
    other: dict[str, Any] | None = None
    subject: str = ""
    seq: int = 0
    time_ns: int = 0
    op: str | None = None

    @property
    def is_marker(self) -> bool:
        """Whether this is the marker of a directory and not an object that merely ends in a slash."""
        if self.size or self.link is not None or not self.name.endswith("/"):
            return False
        mode = (self.attributes or {}).get("mode", "")
        try:
            return stat.S_IFMT(int(mode, 8)) in (0, stat.S_IFDIR)
        except ValueError:
            return True


# What of a message is kept, packed, for as long as nobody asks for more: sequence, time, name, nuid, size, chunks,
# chunk size, digest, attributes (mostly what `compact` made of them), description, headers, and what else there is.
Record = tuple[
    int, int, str, str, int, int, int, str | None, dict[str, str] | bytes | None,
    str | None, dict[str, list[str]] | None, dict[str, Any] | None,
]  # fmt: skip


def pack(meta: Metadata) -> bytes | None:
    """`meta` in a quarter of its memory, for as long as nobody asks; None if it is not of the common kind.

    What operation wrote it is of no use any more.
    """
    subject = f"$O.{meta.bucket}.M.{encode_subject(meta.name)}"
    if meta.deleted or meta.link is not None or meta.subject != subject:
        return None
    attributes = meta.attributes and (compact(meta.attributes) or meta.attributes)
    of_content = (meta.nuid, meta.size, meta.chunks, meta.chunk_size, meta.digest)
    record: Record = (
        *(meta.seq, meta.time_ns, meta.name, *of_content),
        *(attributes, meta.description, meta.headers, meta.other),
    )
    try:
        return pack_record(record)
    except ValueError:  # nested too deep
        return None


def pack_record(record: Record) -> bytes:
    return marshal.dumps(record)


def peek(packed: bytes) -> Record:
    """What is packed, without a `Metadata`."""
    record: Record = marshal.loads(packed)
    return record


def unpack(packed: bytes, bucket: str) -> Metadata:
    """What `pack` made this of."""
    # fmt: off
    (
        seq, time_ns, name, nuid, size, chunks, chunk_size, digest, attributes,
        description, headers, other,
    ) = peek(packed)
    # fmt: on
    return Metadata(
        name=name,
        bucket=bucket,
        nuid=nuid,
        size=size,
        chunks=chunks,
        chunk_size=chunk_size,
        digest=digest,
        description=description,
        headers=headers,
        attributes=expand(attributes) if isinstance(attributes, bytes) else attributes,
        other=other,
        subject=f"$O.{bucket}.M.{encode_subject(name)}",
        seq=seq,
        time_ns=time_ns,
    )


class Stored(Protocol):
    """A metadata message as a consumer delivers it."""

    subject: bytes
    data: bytes
    seq: int
    time_ns: int


def plain(message: Stored) -> Record | None:
    """What `pack` makes of an object as most are, without a `Metadata` in between. None of all others.

    Nothing is looked at that does not need to be: `decode` reads what is not as every client writes it.
    """
    try:
        text = message.data.decode()
        data, end = _scan(text, 0)
        name, nuid, size, chunks = data["name"], data["nuid"], data["size"], data["chunks"]
        digest, options = data["digest"], data["options"]
        chunk_size = options["max_chunk_size"]
        attributes = data.get("metadata")
        kept: dict[str, str] | bytes | None = compact(attributes) if attributes else None
    except (StopIteration, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    known = 6 + ("bucket" in data) + ("mtime" in data) + ("metadata" in data) + ("deleted" in data)
    if kept is None and "metadata" in data:
        if type(attributes) is not dict or not set(map(type, attributes.values())) <= _TEXT_ONLY:
            return None
        kept = attributes or None
    if (
        end != len(text)
        or len(data) != known
        or data.get("deleted", False) is not False
        or len(options) != 1
        or not type(name) is type(nuid) is type(digest) is str
        or not type(size) is type(chunks) is type(chunk_size) is int
        or not name
        or not digest
        or size < 0
        or chunks < 0
        or chunk_size <= 0
    ):
        return None
    of_content = (name, nuid, size, chunks, chunk_size, digest)
    return message.seq, message.time_ns, *of_content, kept, None, None, None


def new_nuid() -> str:
    """A unique id in the form that all NATS clients use, drawn at random: 22 digits of base 62."""
    number = secrets.randbits(130)
    digits = []
    for _ in range(NUID_LENGTH):
        number, digit = divmod(number, 62)
        digits.append(_NUID_DIGITS[digit])
    return "".join(digits)


_parse: Final = json.JSONDecoder().decode
_scan: Final[Callable[[str, int], tuple[Any, int]]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
_TEXT_ONLY: Final = frozenset({str})


def _integer(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def decode(body: bytes, *, subject: str, seq: int, time_ns: int, op: str | None = None) -> Metadata:
    """Read a metadata message of any client.

    JavaScript links come without nuid, size and chunks, .NET leaves out what is zero, and clients disagree about
    ``mtime`` (facts, section 2). Only a name is indispensable. Raises `MalformedMetadata`.
    """
    try:
        data = _parse(body.decode("utf-8", "surrogatepass")) if body.startswith(b'{"') else json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedMetadata(f"not JSON: {error}") from None
    if not isinstance(data, dict):
        raise MalformedMetadata("not a JSON object")
    name = _text(data.get("name"))
    if not name:
        raise MalformedMetadata("no name")
    # Where the message lies, and not what it says: in links, and after a restore under another name, they differ.
    tokens = subject.split(".")
    bucket = tokens[1] if len(tokens) == 4 and tokens[0] == "$O" else _text(data.get("bucket"))
    options = data.get("options")
    options = options if isinstance(options, dict) else {}
    raw_link = options.get("link")
    link = None
    if isinstance(raw_link, dict) and _text(raw_link.get("bucket")):
        link = Link(_text(raw_link.get("bucket")), _text(raw_link.get("name")))
    raw_attributes = data.get("metadata")
    attributes = None
    if isinstance(raw_attributes, dict):
        attributes = {key: value for key, value in raw_attributes.items() if isinstance(value, str)} or None
    raw_headers = data.get("headers")
    other: dict[str, Any] = {}
    if not data.keys() <= _KNOWN:
        other = {key: value for key, value in data.items() if key not in _KNOWN}
    if not options.keys() <= _KNOWN_OPTIONS:
        other["options"] = {key: value for key, value in options.items() if key not in _KNOWN_OPTIONS}
    return Metadata(
        name=name,
        bucket=bucket,
        nuid=_text(data.get("nuid")),
        size=_integer(data.get("size")),
        chunks=_integer(data.get("chunks")),
        chunk_size=_integer(options.get("max_chunk_size")) or DEFAULT_CHUNK_SIZE,
        digest=_text(data.get("digest")) or None,
        deleted=data.get("deleted") is True,
        link=link,
        description=_text(data.get("description")) or None,
        headers=raw_headers if isinstance(raw_headers, dict) and raw_headers else None,
        attributes=attributes,
        other=other or None,
        subject=subject,
        seq=seq,
        time_ns=time_ns,
        op=op,
    )


def encode(meta: Metadata, *, mtime: str) -> bytes:
    """The body of a metadata message that every official client reads.

    `mtime` is the current time in RFC 3339: ADR-20 has readers use the message's time, but JavaScript, Rust and
    nats-py read this field, and an empty one makes a name unusable for the Go client.
    """
    options: dict[str, Any] = {"max_chunk_size": meta.chunk_size}
    data: dict[str, Any] = {"name": meta.name}
    if meta.description:
        data["description"] = meta.description
    if meta.headers:
        data["headers"] = meta.headers
    if meta.attributes:
        data["metadata"] = meta.attributes
    if meta.other:
        other = dict(meta.other)
        options |= other.pop("options", {})
        data |= other
    if meta.link is not None:
        options["link"] = {"bucket": meta.link.bucket}
        if meta.link.name:
            options["link"]["name"] = meta.link.name
    data |= {
        "options": options,
        "bucket": meta.bucket,
        "nuid": meta.nuid,
        "size": meta.size,
        "mtime": mtime,
        "chunks": meta.chunks,
    }
    if meta.digest:
        data["digest"] = meta.digest
    if meta.deleted:
        data["deleted"] = True
    return json.dumps(data, separators=(",", ":"), ensure_ascii=not _is_utf8(meta)).encode()


def _is_utf8(meta: Metadata) -> bool:
    """Whether the texts can go out as UTF-8; lone surrogates in them need JSON's escapes."""
    try:
        meta.name.encode()
        json.dumps([meta.description, meta.headers, meta.attributes, meta.other], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def tombstone(meta: Metadata, time_ns: int | None = None) -> Metadata:
    """What marks the name of `meta` as deleted, at `time_ns`: the directory's time of change, after a remount too.

    It carries a nuid of its own: most clients purge the nuid of a tombstone when the name is used again, and after
    a rename that would be the live object's.
    """
    return replace(
        meta,
        nuid=new_nuid(),
        size=0,
        chunks=0,
        digest=None,
        deleted=True,
        link=None,
        description=None,
        headers=None,
        attributes=None if time_ns is None else {"ctime": format_time(time_ns)},
        other=None,
    )
