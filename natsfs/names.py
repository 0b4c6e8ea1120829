"""Object names and paths: a reversible mapping, and the subjects that metadata travels under.

An object name is any non-empty text; a path is a sequence of file names, each of 1 to 255 bytes without NUL
and "/", and neither "." nor "..". Names that are good paths already map to themselves. The rest is escaped:

======================  ==========================================================================
file name               stands for
======================  ==========================================================================
``%2F``                 an empty component (``/home/u/f`` is ``%2F/home/u/f``, ``a//b`` is ``a/%2F/b``)
``%2E``, ``%2E%2E``     the components ``.`` and ``..``
``%00``                 a NUL character inside a component
``%D800`` … ``%DFFF``   a lone surrogate (text that JSON can carry and UTF-8 cannot)
``NAME%5C/REST``        a component over 255 bytes, continued in the next file name
``a/%03``               the object ``a`` where ``a/...`` makes a directory of it ("the text ends here")
``%24XX``               the text ``%DCXX`` where that would be read as a byte (see below)
======================  ==========================================================================

A file name that is not UTF-8 is stored with ``%DCXX`` for each stray byte. Literal text that looks like one of
these forms gets a ``25`` behind its percent sign, on one side or the other, so that nothing is ambiguous:
an object called ``%2F`` is the file ``%252F``, and ``%252F`` is ``%25252F``. All other percent signs stand
for themselves.
"""

from __future__ import annotations

import base64
import binascii
import errno
import re
from typing import Final

Path = tuple[bytes, ...]

NAME_MAX: Final = 255  # bytes in a file name, linux/limits.h

# A subject has to fit the server's control line (4,096 bytes) together with the reply subject and the sizes,
# in base64 (4/3). A longer one makes the server close the connection.
OBJECT_NAME_MAX: Final = 2800  # bytes of UTF-8

# ADR-6, restricted-term: what a bucket may be called.
BUCKET_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")

SELF: Final = b"%03"
CONTINUED: Final = b"%5C"
_PIECE_MAX: Final = NAME_MAX - len(CONTINUED)
_PIECE_MIN: Final = _PIECE_MAX  # a cut may go back up to three bytes for the sake of a character
_CODE_OF_WHOLE: Final = {"": "2F", ".": "2E", "..": "2E%2E"}
_WHOLE_OF_CODE: Final = {code: text for text, code in _CODE_OF_WHOLE.items()}

_WHOLE = re.compile(r"%((?:25)*)(2F|2E%2E|2E|03)")
_TOKEN = re.compile(r"\x00|[\ud800-\udfff]|%((?:25)*)(00|D[89A-F][0-9A-F]{2}|24[89A-F][0-9A-F])")
_RAW = re.compile(r"DC[89A-F][0-9A-F]")


_URL_SAFE: Final = bytes.maketrans(b"+/", b"-_")


class NameRefused(Exception):
    """A path that stands for no object name; `errno` says why (EINVAL or ENAMETOOLONG)."""

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(f"{errno.errorcode[number]}: {b'/'.join(path)!r}")
        self.errno = number


def _escape_text(component: str, raw_bytes: bool) -> bytes:
    """The encoded form of one component; `raw_bytes` decides what the text ``%DC80`` becomes."""

    def one(match: re.Match[str]) -> str:
        token = match.group()
        if token == "\0":
            return "%00"
        if len(token) == 1:
            return f"%{ord(token):04X}"
        shifts, code = match.groups()
        if _RAW.fullmatch(code):
            if shifts:
                return token
            return chr(int(code, 16)) if raw_bytes else "%24" + code[2:]
        return f"%25{shifts}{code}"

    return _TOKEN.sub(one, component).encode("utf-8", "surrogateescape")


def _unescape_text(text: bytes) -> str:
    def one(match: re.Match[str]) -> str:
        token = match.group()
        if len(token) == 1:  # a byte that is not UTF-8, in Python's surrogateescape form
            return f"%{ord(token):04X}"
        shifts, code = match.groups()
        if _RAW.fullmatch(code):
            return token if shifts else chr(int(code, 16))
        if shifts:
            return f"%{shifts[2:]}{code}"
        if code == "00":
            return "\0"
        return "%DC" + code[2:] if code.startswith("24") else chr(int(code, 16))

    return _TOKEN.sub(one, text.decode("utf-8", "surrogateescape"))


def escape_component(component: str) -> bytes:
    """The file name of one component, before it is cut to `NAME_MAX`."""
    if component in _CODE_OF_WHOLE:
        return b"%" + _CODE_OF_WHOLE[component].encode()
    if component.isascii() and "%" not in component and "\0" not in component:
        return component.encode()
    if match := _WHOLE.fullmatch(component):
        return f"%25{match[1]}{match[2]}".encode()
    escaped = _escape_text(component, raw_bytes=True)
    if _unescape_text(escaped) != component:
        escaped = _escape_text(component, raw_bytes=False)
    return escaped


def unescape_component(name: bytes) -> str:
    if b"%" not in name and name.isascii():
        return name.decode()
    if match := _WHOLE.fullmatch(name.decode("utf-8", "surrogateescape")):
        shifts, code = match.groups()
        return f"%{shifts[2:]}{code}" if shifts else _WHOLE_OF_CODE[code]
    return _unescape_text(name)


def _is_continued(name: bytes) -> bool:
    return len(name) >= _PIECE_MIN and name.endswith(CONTINUED)


def _pieces(encoded: bytes) -> list[bytes]:
    pieces = []
    while len(encoded) > NAME_MAX or _is_continued(encoded):
        cut = min(_PIECE_MAX, len(encoded) - 1)
        for back in range(4):
            if encoded[cut - back] & 0xC0 != 0x80:
                cut -= back
                break
        pieces.append(encoded[:cut] + CONTINUED)
        encoded = encoded[cut:]
    pieces.append(encoded)
    return pieces


def file_name(component: str) -> bytes | None:
    """The file name of a whole component; None of one that takes several."""
    encoded = escape_component(component)
    return encoded if len(encoded) < _PIECE_MIN else None


def path_of(name: str) -> Path:
    """The path of the object `name`, as a file; a directory's marker ``a/b/`` is asked for as ``a/b``."""
    parts: list[bytes] = []
    for component in name.split("/"):
        encoded = escape_component(component)
        if len(encoded) < _PIECE_MIN:
            parts.append(encoded)
        else:
            parts.extend(_pieces(encoded))
    return tuple(parts)


def name_of(path: Path) -> str:
    """The object name that `path` stands for. Raises `NameRefused` for a path that stands for none."""
    if not path:
        raise NameRefused(errno.EINVAL, path)
    plain = path[:-1] if path[-1] == SELF and len(path) > 1 else path
    components: list[str] = []
    pending = b""
    for part in plain:
        if _is_continued(part):
            pending += part[: -len(CONTINUED)]
        elif pending:
            components.append(unescape_component(pending + part))
            pending = b""
        elif part == SELF:
            raise NameRefused(errno.EINVAL, path)
        else:
            components.append(unescape_component(part))
    if pending:
        raise NameRefused(errno.ENAMETOOLONG, path)
    name = "/".join(components)
    if path_of(name) != plain:
        raise NameRefused(errno.EINVAL, path)
    if not name:
        raise NameRefused(errno.EINVAL, path)
    if len(name.encode("utf-8", "surrogatepass")) > OBJECT_NAME_MAX:
        raise NameRefused(errno.ENAMETOOLONG, path)
    return name


def marker_of(path: Path) -> str:
    """The name of a directory's marker. The directory `%2F`, which no object can be, has the marker ``/``."""
    return "/" if path == path_of("") else name_of(path) + "/"


def encode_subject(name: str) -> str:
    """The last token of a new object's metadata subject: padded base64url of UTF-8 (ADR-20, as Go does it)."""
    token = binascii.b2a_base64(name.encode("utf-8", "surrogatepass"), newline=False)
    return token.translate(_URL_SAFE).decode()


def decode_subject(token: str) -> str:
    """The name that `encode_subject` made `token` of. Raises ValueError for what another encoding made."""
    return base64.b64decode(token, b"-_", validate=True).decode("utf-8", "surrogatepass")
