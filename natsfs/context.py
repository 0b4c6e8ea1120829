"""Contexts of the `nats` command line tool: JSON files in ~/.config/nats/context (or $XDG_CONFIG_HOME)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from natsfs import source
from natsfs.errors import UsageError

# Ways of connecting that natsfs does not have. Going on without them would connect otherwise than the tool.
UNSUPPORTED = (
    "nsc",
    "user_jwt",
    "user_seed",
    "socks_proxy",
    "tls_first",
    "jetstream_api_prefix",
    "inbox_prefix",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What natsfs takes from a context; a setting that the file leaves empty is None."""

    name: str
    servers: source.Servers
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    creds: str | None = None
    nkey: str | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    domain: str | None = None


def folder(environ: Mapping[str, str]) -> str:
    parent = environ.get("XDG_CONFIG_HOME") or os.path.join(
        environ.get("HOME") or os.path.expanduser("~"), ".config"
    )
    return os.path.join(parent, "nats", "context")


def load(name: str, environ: Mapping[str, str]) -> Context:
    path = os.path.join(folder(environ), f"{name}.json")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        raise UsageError(
            f"context {name!r} does not exist: there is no {path} (nats context ls shows them)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"context {name!r} cannot be read from {path}: {_reason(error)}") from None
    return parse(name, text)


def parse(name: str, text: str) -> Context:
    try:
        data = json.loads(text)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise UsageError(f"context {name!r} is not a JSON object; nats context edit {name} shows it")
    for key in UNSUPPORTED:
        if data.get(key):
            raise UsageError(
                f"context {name!r} uses {key!r}, which natsfs does not support; give the options instead"
            )

    def setting(key: str) -> str | None:
        value = data.get(key)
        if value is not None and not isinstance(value, str):
            raise UsageError(f"context {name!r}: {key!r} is not a text")
        return value or None

    def path(key: str) -> str | None:
        value = setting(key)
        return os.path.abspath(os.path.expanduser(value)) if value else None

    try:
        servers = source.parse_servers(setting("url") or "nats://127.0.0.1:4222")
    except UsageError as error:
        raise UsageError(f"context {name!r}, url: {error}") from None
    return Context(
        name=name,
        servers=servers,
        user=setting("user"),
        password=setting("password"),
        token=setting("token"),
        creds=path("creds"),
        nkey=path("nkey"),
        tls_ca=path("ca"),
        tls_cert=path("cert"),
        tls_key=path("key"),
        domain=setting("jetstream_domain"),
    )


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8"
