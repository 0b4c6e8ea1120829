"""The login, by nats-py: the first connection, which finds out whether it works, and the CONNECT line of all others.

nats-py knows every form of credentials. It runs on asyncio, in a thread, for as long as the first connection takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import ssl
from typing import Any

import nats.errors
import trio
from nats.aio.client import Client

from natsfs.config import Credentials
from natsfs.errors import MountError

ATTEMPTS = 4  # at each server, before it is given up
LIMIT = 10.0  # seconds, all servers together


def tls_context(credentials: Credentials) -> ssl.SSLContext | None:
    if not (credentials.tls or credentials.tls_ca or credentials.tls_cert):
        return None
    try:
        context = ssl.create_default_context(cafile=credentials.tls_ca)
        if credentials.tls_cert:
            context.load_cert_chain(credentials.tls_cert, credentials.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise MountError(f"cannot use the TLS files: {error}; check tls_ca, tls_cert and tls_key") from None
    return context


class _Client(Client):
    """nats-py goes on in plain text where the server offers no TLS, and would tell it the password."""

    def _connect_command(self) -> bytes:
        if self.options.get("tls") and not self._server_info.get("tls_required"):
            raise nats.errors.Error("TLS was asked for, and this server offers none")
        command: bytes = super()._connect_command()
        return command


def _is_refusal(error: Exception) -> bool:
    """Whether another attempt would end the same way."""
    text = str(error).lower()
    return isinstance(error, ssl.SSLError) or any(
        word in text for word in ("authorization", "authentication", "tls")
    )


class Login:
    """What a wire needs to get in: the TLS context, if TLS is wanted, and the CONNECT line for a server's INFO."""

    def __init__(self, servers: tuple[str, ...], credentials: Credentials) -> None:
        """Raises `MountError` if the TLS files cannot be used."""
        self.tls = tls_context(credentials)
        self._servers = servers
        self._credentials = credentials
        self._client = _Client()
        self._last_error: Exception | None = None
        self._failures = 0

    async def check(self) -> None:
        """Log in once. Raises `MountError` with the reason in one line."""
        # A thread that is left to itself ends by its own limits, or with the process.
        await trio.to_thread.run_sync(lambda: asyncio.run(self._check()), abandon_on_cancel=True)

    def connect(self, info: dict[str, Any], name: str) -> bytes:
        # On a copy: the client signs the nonce of its own server.
        client = copy.copy(self._client)
        client._server_info = info
        client.options = {**client.options, "name": name}
        return client._connect_command()

    async def _check(self) -> None:
        credentials = self._credentials
        options: dict[str, Any] = {
            "user": credentials.user,
            "password": credentials.password,
            "token": credentials.token,
            "user_credentials": credentials.creds_file,
            "nkeys_seed": credentials.nkey_file,
            "tls": self.tls,
        }
        where = ", ".join(self._servers)
        hopeless = asyncio.Event()  # every server has failed

        async def note(error: Exception) -> None:
            self._last_error = error
            self._failures += 1
            # A server that refuses credentials closes at once, and its word for it may be lost with the connection.
            if _is_refusal(error) or self._failures >= ATTEMPTS * len(self._servers):
                hopeless.set()

        connect = asyncio.ensure_future(
            self._client.connect(
                servers=list(self._servers),
                name="natsfs login",
                error_cb=note,
                connect_timeout=4,
                reconnect_time_wait=0,
                max_reconnect_attempts=ATTEMPTS,
                **{key: value for key, value in options.items() if value is not None},
            )
        )
        given_up = asyncio.ensure_future(hopeless.wait())
        try:
            both: set[asyncio.Future[Any]] = {connect, given_up}
            await asyncio.wait(both, timeout=LIMIT, return_when=asyncio.FIRST_COMPLETED)
            if not connect.done():
                connect.cancel()
                await asyncio.wait([connect], timeout=2)
                raise self._last_error or TimeoutError
            connect.result()
        except (OSError, nats.errors.Error, TimeoutError, ValueError, asyncio.CancelledError) as error:
            reason = self._last_error or error
            if isinstance(reason, ConnectionError) and self._client._auth_configured:
                reason = nats.errors.Error(f"authorization: {reason}")
            raise MountError(_reason(where, reason)) from None
        finally:
            given_up.cancel()
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._client.close(), 2)


def _reason(where: str, error: BaseException) -> str:
    text = str(error)
    if "authorization" in text.lower() or "authentication" in text.lower():
        return (
            f"the NATS server at {where} refuses these credentials ({text}); "
            "give others, see the section on credentials in `natsfs mount --help`"
        )
    if isinstance(error, ssl.SSLError) or "tls" in text.lower() or "certificate" in text.lower():
        return f"TLS with the NATS server at {where} failed ({text}); check tls_ca, tls_cert and tls_key"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"cannot read {error.filename}: {error.strerror}"
    if isinstance(error, TimeoutError):
        text = "no answer"
    why = text or type(error).__name__
    return f"cannot reach a NATS server at {where} ({why}); is it running, is the port right?"
