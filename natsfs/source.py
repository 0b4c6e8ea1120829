"""SOURCE, the first argument of a mount: nats://[user[:password]@]host[:port][,host...][/bucket[/prefix]]."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from natsfs.errors import UsageError
from natsfs.names import BUCKET_NAME

DEFAULT_PORT = 4222
FORM = "nats://[user[:password]@]host[:port][,host...][/bucket[/prefix]]"

_SCHEMES = ("nats", "tls")
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_.])?")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """Where to connect. A user without a password may be a token, so neither shows in repr()."""

    urls: tuple[str, ...]
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A parsed SOURCE. `display` is the text as typed, without user and password."""

    servers: Servers
    bucket: str | None
    prefix: str
    display: str


def parse(text: str) -> Source:
    """Without a host (nats:///bucket) `servers.urls` is empty: a context must name the servers."""
    scheme, authority, slash, path = _cut(text)
    # A slash in an unencoded password ends the authority too early. What then looks like a host or a
    # bucket may be part of the secret, so no message about it may show it.
    misplaced = "@" in path
    try:
        servers = _servers(scheme, authority) if authority else Servers(urls=())
        bucket, prefix = _path(path)
    except UsageError:
        if misplaced:
            raise UsageError(
                f"SOURCE has an '@' behind a '/': in a user or password '/' is %2F and '@' is %40 ({FORM})"
            ) from None
        raise
    host_part = authority.rpartition("@")[2]
    return Source(
        servers=servers,
        bucket=bucket,
        prefix=prefix,
        display=f"{scheme}://{host_part}{slash}{path}",
    )


def parse_servers(text: str) -> Servers:
    """The `url` of a context: URLs or bare host[:port], separated by commas; the first user given counts."""
    found = Servers(urls=())
    for part in filter(None, (part.strip() for part in text.split(","))):
        scheme, authority, _, path = _cut(part if "://" in part else f"nats://{part}")
        if path or not authority:
            raise UsageError("a server must be given as nats://host:port")
        one = _servers(scheme, authority)
        if found.user is None:
            found = Servers(urls=found.urls + one.urls, user=one.user, password=one.password)
        else:
            found = Servers(urls=found.urls + one.urls, user=found.user, password=found.password)
    return found


def redact(text: str) -> str:
    """`text` without anything that could be a secret, whether or not it parses as a SOURCE."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        return text.rpartition("@")[2]
    return f"{scheme}://{rest.rpartition('@')[2]}"


def _cut(text: str) -> tuple[str, str, str, str]:
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise UsageError(f"SOURCE {redact(text)!r} is not of the form {FORM}")
    scheme = scheme.lower()
    if scheme not in _SCHEMES:
        raise UsageError(f"SOURCE must begin with nats:// or tls://, not {scheme}://")
    return scheme, *rest.partition("/")


def _servers(scheme: str, authority: str) -> Servers:
    user_info, at, hosts = authority.rpartition("@")
    user: str | None = None
    password: str | None = None
    if at:
        raw_user, colon, raw_password = user_info.partition(":")
        user = _decode(raw_user, "the user in SOURCE")
        password = _decode(raw_password, "the password in SOURCE") if colon else None
        if not user:
            raise UsageError("SOURCE has an '@' but no user before it")
    urls = tuple(f"{scheme}://{_host_and_port(host)}" for host in hosts.split(","))
    return Servers(urls=urls, user=user, password=password)


def _host_and_port(text: str) -> str:
    if text.startswith("["):
        address, bracket, rest = text[1:].partition("]")
        try:
            ipaddress.IPv6Address(address)
        except ValueError:
            bracket = ""
        if not bracket or (rest and not rest.startswith(":")):
            raise UsageError(f"{text!r} in SOURCE is not an IPv6 address in brackets, such as [::1]:4222")
        host, port = f"[{address}]", rest[1:]
        colon = bool(rest)
    else:
        host, separator, port = text.partition(":")
        colon = bool(separator)
        if ":" in port:
            raise UsageError(f"{text!r} in SOURCE: write an IPv6 address in brackets, such as [::1]:4222")
        if _HOST.fullmatch(host) is None:
            raise UsageError(f"{host!r} in SOURCE is not a host name or address (form: {FORM})")
    if not colon:
        return f"{host}:{DEFAULT_PORT}"
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise UsageError(f"{port!r} in SOURCE is not a port: give a number from 1 to 65535")
    return f"{host}:{int(port)}"


def _path(path: str) -> tuple[str | None, str]:
    raw_bucket, _, raw_prefix = path.partition("/")
    raw_prefix = raw_prefix.rstrip("/")
    if not raw_bucket:
        if raw_prefix:
            raise UsageError(f"SOURCE has an empty bucket name before /{raw_prefix}")
        return None, ""
    if BUCKET_NAME.fullmatch(raw_bucket) is None:
        raise UsageError(f"{raw_bucket!r} in SOURCE is not a bucket name: letters, digits, '-' and '_' only")
    prefix = _decode(raw_prefix, "the prefix in SOURCE")
    if "\0" in prefix or (prefix and any(part in ("", ".", "..") for part in prefix.split("/"))):
        raise UsageError(
            f"the prefix {raw_prefix!r} in SOURCE must be a path such as a/b, without '', '.' or '..'"
        )
    return raw_bucket, prefix


def _decode(text: str, what: str) -> str:
    """Percent-decoding that refuses a lone '%', because it means that nothing was encoded."""
    if _BAD_ESCAPE.search(text):
        raise UsageError(f"{what} has a '%' that starts no escape: write it as %25")
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise UsageError(f"{what} is not UTF-8 after percent-decoding") from None
