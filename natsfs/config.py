"""Everything the daemon needs to know: one immutable value, which the command hands to it as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from natsfs.options import Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Who natsfs is to the server: by user and password, or token, or creds_file, or nkey_file, or nobody.

    Secrets are left out of repr(), so that no traceback or log line shows them.
    """

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    creds_file: str | None = None
    nkey_file: str | None = None
    tls: bool = False
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None

    @property
    def secrets(self) -> tuple[str, ...]:
        """The texts that must appear in no log."""
        return tuple(secret for secret in (self.password, self.token) if secret)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One mount. `prefix` is "" or "a/b", the part of the bucket that is shown; no bucket means all."""

    servers: tuple[str, ...]
    bucket: str | None
    prefix: str
    mountpoint: str
    display_source: str
    credentials: Credentials
    options: Options

    def to_json(self) -> str:
        """With the secrets: only for the memory file that the daemon inherits."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Config:
        data: dict[str, Any] = json.loads(text)
        options = data.pop("options")
        options["kernel_options"] = tuple(options["kernel_options"])
        return cls(
            **data | {"servers": tuple(data["servers"]), "credentials": Credentials(**data["credentials"])},
            options=Options(**options),
        )
