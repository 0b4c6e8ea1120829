"""The connection for watches, through nats-py, with an inbox of its own; and the login for the wires beside it.

When it is lost everybody who waits hears it at once: an answer to what was sent before cannot be relied on.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from natsfs.config import Credentials
from natsfs.errors import Denied, MountError, StoreError, TooLarge, Unreachable
from natsfs.store.jetstream import NoResponders, api_error

log = logging.getLogger(__name__)

FIRST_ATTEMPTS = 4  # at each server, before the first connection is given up
CONNECT_LIMIT = 10.0  # seconds for the first connection, all servers together
Handler = Callable[[Msg], None]
Lost = Callable[[], None]


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
    """What a wire needs to get in as nats-py did: the TLS context, and the CONNECT line for a server's INFO."""

    def __init__(self, client: _Client, tls: ssl.SSLContext | None) -> None:
        self.tls = tls
        self._client = client

    def connect(self, info: dict[str, Any], name: str) -> bytes:
        # On a copy: the client signs the nonce of its own server.
        client = copy.copy(self._client)
        client._server_info = info
        client.options = {**client.options, "name": name}
        return client._connect_command()


@dataclass(slots=True)
class _Waiter:
    handler: Handler
    lost: Lost
    subject: str


class Connection:
    """One NATS connection. `generation` rises with every reconnect."""

    def __init__(
        self,
        name: str,
        servers: tuple[str, ...],
        credentials: Credentials,
        on_reconnect: Callable[[], None],
    ) -> None:
        self.name = name
        self.generation = 0
        self._servers = servers
        self._credentials = credentials
        self._on_reconnect = on_reconnect
        self._client = _Client()
        self._waiters: dict[str, _Waiter] = {}
        self._next = 0
        self._inbox = ""
        self._up = asyncio.Event()
        self._last_error: Exception | None = None
        self._closing = False
        self._failures = 0
        self._hopeless = asyncio.Event()  # every server has failed once at the first connection

    def login(self) -> Login:
        return Login(self._client, tls_context(self._credentials))

    @property
    def stands(self) -> bool:
        return self._up.is_set()

    async def open(self) -> None:
        """Connect, or raise `MountError` with the reason in one line."""
        credentials = self._credentials
        options: dict[str, Any] = {
            "user": credentials.user,
            "password": credentials.password,
            "token": credentials.token,
            "user_credentials": credentials.creds_file,
            "nkeys_seed": credentials.nkey_file,
            "tls": tls_context(credentials),
        }
        where = ", ".join(self._servers)
        connect = asyncio.ensure_future(
            self._client.connect(
                servers=list(self._servers),
                name=f"natsfs {self.name}",
                error_cb=self._error,
                disconnected_cb=self._disconnected,
                reconnected_cb=self._reconnected,
                connect_timeout=4,
                reconnect_time_wait=0,
                max_reconnect_attempts=FIRST_ATTEMPTS,
                ping_interval=10,
                pending_size=8 * 1024 * 1024,
                skip_subject_validation=True,
                **{key: value for key, value in options.items() if value is not None},
            )
        )
        hopeless = asyncio.ensure_future(self._hopeless.wait())
        try:
            both: set[asyncio.Future[Any]] = {connect, hopeless}
            await asyncio.wait(both, timeout=CONNECT_LIMIT, return_when=asyncio.FIRST_COMPLETED)
            if not connect.done():
                connect.cancel()
                await asyncio.wait([connect], timeout=2)
                raise self._last_error or TimeoutError
            connect.result()
        except (OSError, nats.errors.Error, TimeoutError, ValueError, asyncio.CancelledError) as error:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._client.close(), 2)
            if isinstance(error, asyncio.CancelledError) and self._last_error is None:
                raise
            reason = self._last_error or error
            if isinstance(reason, ConnectionError) and self._client._auth_configured:
                reason = nats.errors.Error(f"authorization: {reason}")
            raise MountError(self._reason(where, reason)) from None
        finally:
            hopeless.cancel()
        # From here on a lost server is waited for: reads are served from the caches meanwhile.
        self._client.options["max_reconnect_attempts"] = -1
        self._client.options["reconnect_time_wait"] = 0.25
        self._inbox = self._client.new_inbox() + "."
        await self._client.subscribe(
            self._inbox + "*", cb=self._dispatch, pending_msgs_limit=0, pending_bytes_limit=0
        )
        self._up.set()

    @staticmethod
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

    async def close(self) -> None:
        self._closing = True
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._client.close(), 5)

    # --- what nats-py tells -----------------------------------------------------------------------------------

    async def _error(self, error: Exception) -> None:
        self._last_error = error
        if not self._up.is_set():
            self._failures += 1
            # A server that refuses credentials closes at once, and its word for it may be lost with the connection.
            if _is_refusal(error) or self._failures >= FIRST_ATTEMPTS * len(self._servers):
                self._hopeless.set()
        text = str(error).lower()
        if "permissions violation" in text:
            for waiter in list(self._waiters.values()):
                if waiter.subject and waiter.subject.lower() in text:
                    waiter.handler(_denied(str(error)))
        if not self._closing and self._up.is_set():
            log.warning("NATS connection %r: %s", self.name, str(error) or type(error).__name__)

    async def _disconnected(self) -> None:
        if self._up.is_set() and not self._closing:
            log.warning("NATS connection %r is lost; trying again until it is back", self.name)
        self._up.clear()
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters.values():
            waiter.lost()

    async def _reconnected(self) -> None:
        self.generation += 1
        self._up.set()
        log.warning("NATS connection %r is back", self.name)
        self._on_reconnect()

    async def _dispatch(self, msg: Msg) -> None:
        waiter = self._waiters.get(msg.subject[len(self._inbox) :])
        if waiter is not None:
            waiter.handler(msg)

    # --- sending and waiting ----------------------------------------------------------------------------------

    async def up(self, limit: float) -> None:
        """Wait until the connection stands. Raises `Unreachable` after `limit` seconds."""
        if self._up.is_set():
            return
        try:
            await asyncio.wait_for(self._up.wait(), limit)
        except TimeoutError:
            raise Unreachable(f"the NATS server has been out of reach for {limit:.0f} s") from None

    def register(self, handler: Handler, lost: Lost, subject: str = "") -> str:
        """A reply subject whose messages go to `handler`, until `unregister`. `lost` replaces them on a loss."""
        self._next += 1
        token = str(self._next)
        self._waiters[token] = _Waiter(handler, lost, subject)
        return self._inbox + token

    def unregister(self, reply: str) -> None:
        self._waiters.pop(reply[len(self._inbox) :], None)

    @asynccontextmanager
    async def listening(self, handler: Handler, lost: Lost) -> AsyncIterator[str]:
        """A subscription of its own, for a consumer: what it delivers arrives under the messages' own subjects."""
        subject = self._client.new_inbox()

        async def receive(msg: Msg) -> None:
            handler(msg)

        self._next += 1
        token = f"listening {self._next}"
        self._waiters[token] = _Waiter(handler, lost, subject)
        subscription = await self._client.subscribe(
            subject, cb=receive, pending_msgs_limit=0, pending_bytes_limit=0
        )
        try:
            yield subject
        finally:
            self._waiters.pop(token, None)
            with contextlib.suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()

    async def publish(
        self,
        subject: str,
        payload: bytes | memoryview,
        reply: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        if not self._client.is_connected:
            raise Unreachable("the connection to the NATS server is lost")
        try:
            await self._client.publish(subject, payload, reply, headers)  # type: ignore[arg-type]
        except nats.errors.MaxPayloadError:
            raise TooLarge(f"a message of {len(payload)} bytes is over the server's max_payload") from None
        except (nats.errors.Error, OSError) as error:
            raise Unreachable(f"the connection to the NATS server is lost: {error}") from None

    async def subscribe(self, subject: str, callback: Callable[[Msg], Awaitable[None]]) -> None:
        await self._client.subscribe(subject, cb=callback)

    async def send(
        self, subject: str, payload: bytes | memoryview, headers: dict[str, str] | None = None
    ) -> asyncio.Future[Msg]:
        """Publish with a reply subject; the future gets the single reply, `Unreachable` or `Denied`."""
        future: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()

        def handler(msg: Msg) -> None:
            self.unregister(reply)
            if future.done():
                return
            status = (msg.headers or {}).get("Status")
            if status == "503":
                future.set_exception(
                    NoResponders(f"nobody answers on {subject}: JetStream is off or starting")
                )
            elif status == "403":
                future.set_exception(Denied(msg.data.decode("utf-8", "replace")))
            else:
                future.set_result(msg)

        def lost() -> None:
            if not future.done():
                future.set_exception(Unreachable("the connection to the NATS server was lost"))

        reply = self.register(handler, lost, subject)
        future.add_done_callback(lambda _: self.unregister(reply))
        # Somebody may give up before the answer; an exception nobody asks for any more is no news.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await self.publish(subject, payload, reply, headers)
        except StoreError:
            self.unregister(reply)
            raise
        return future

    async def request(
        self, subject: str, payload: bytes, limit: float, headers: dict[str, str] | None = None
    ) -> Msg:
        """One request, one reply, one attempt."""
        await self.up(limit)
        future = await self.send(subject, payload, headers)
        try:
            return await asyncio.wait_for(future, limit)
        except TimeoutError:
            raise Unreachable(f"no answer on {subject} within {limit:.0f} s") from None

    async def api(self, subject: str, body: dict[str, Any] | None, limit: float) -> dict[str, Any]:
        """A request to the JetStream API. Raises the exception of its error, if it answers with one."""
        payload = json.dumps(body).encode() if body is not None else b""
        reply = await self.request(subject, payload, limit)
        data: dict[str, Any] = json.loads(reply.data)
        if "error" in data:
            raise api_error(data["error"])
        return data


def _denied(text: str) -> Msg:
    """A reply that stands for the server's word that a subject is forbidden; it sends none of its own."""
    return Msg(_client=None, data=text.encode(), headers={"Status": "403"})  # type: ignore[arg-type]
