"""From what was typed to a Config: SOURCE, `-o`, two environment variables, files with secrets, a context."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from natsfs import context as contexts
from natsfs import mounttable
from natsfs import options as mount_options
from natsfs import source as sources
from natsfs.config import Config, Credentials
from natsfs.context import Context
from natsfs.errors import UsageError
from natsfs.options import Options

PASSWORD_VARIABLE = "NATSFS_PASSWORD"
TOKEN_VARIABLE = "NATSFS_TOKEN"

# Longer than any password; a path that was mistaken for a password file is not read to its end.
_SECRET_LIMIT = 64 * 1024


def configure(
    source: str, mountpoint: str, options: Iterable[str], environ: Mapping[str, str], *, sloppy: bool = False
) -> Config:
    """Reads the files with secrets, the context, and the mount table."""
    return _configure(source, resolve(mountpoint), mount_options.parse(options, sloppy=sloppy), environ)


def log_in_again(
    source: str, known: Mapping[str, Any], options: Iterable[str], environ: Mapping[str, str]
) -> Config:
    """For the server of an earlier mount, of which `known` options are left; those given anew come first."""
    given = mount_options.settings(options)
    if given.keys() & set(mount_options.LOGIN) - {"domain"}:
        known = {name: value for name, value in known.items() if name == "domain"}
    usable = {name: value for name, value in known.items() if name in mount_options.LOGIN}
    return _configure(source, "/", replace(Options(), **{**usable, **given}), environ)


def _configure(source: str, mountpoint: str, chosen: Options, environ: Mapping[str, str]) -> Config:
    parsed = sources.parse(source)
    context = contexts.load(chosen.context, environ) if chosen.context else None
    urls = parsed.servers.urls or (context.servers.urls if context else ())
    if not urls:
        raise UsageError(
            f"SOURCE {parsed.display} names no host: give nats://host/bucket, or -o context=NAME"
        )
    credentials = combine(
        parsed.servers,
        chosen,
        password=_first_line(chosen.password_file, "password_file") or environ.get(PASSWORD_VARIABLE) or None,
        token_from_file=_first_line(chosen.token_file, "token_file"),
        token_from_environ=environ.get(TOKEN_VARIABLE) or None,
        context=context,
    )
    if any(url.startswith("tls://") for url in urls):
        credentials = replace(credentials, tls=True)
    if context and chosen.domain is None:
        chosen = replace(chosen, domain=context.domain)
    return Config(
        servers=urls,
        bucket=parsed.bucket,
        prefix=parsed.prefix,
        mountpoint=mountpoint,
        display_source=parsed.display,
        credentials=credentials,
        options=chosen,
    )


def resolve(mountpoint: str) -> str:
    """The absolute path as the kernel's mount table shows it.

    The last component is looked at only if nothing is mounted there: lstat(2) would go into a file system whose
    daemon may be dead or stuck.
    """
    parent, name = os.path.split(os.path.abspath(mountpoint))
    path = os.path.join(os.path.realpath(parent), name)
    return path if mounttable.at(path) else os.path.realpath(path)


def combine(
    servers: sources.Servers,
    options: Options,
    *,
    password: str | None,
    token_from_file: str | None,
    token_from_environ: str | None,
    context: Context | None,
) -> Credentials:
    """One way of saying who we are: SOURCE and `-o` first, then the environment, then the context.

    A user in SOURCE without a password is a token, as for the official clients, unless a password was given
    apart.
    """
    tls_ca = options.tls_ca or (context.tls_ca if context else None)
    tls_cert = options.tls_cert or (context.tls_cert if context else None)
    tls_key = options.tls_key or (context.tls_key if context else None)
    if tls_key and not tls_cert:
        raise UsageError("tls_key= needs the certificate that belongs to it: give tls_cert=FILE, too")
    base = Credentials(
        tls=bool(
            tls_ca or tls_cert or (context and any(url.startswith("tls://") for url in context.servers.urls))
        ),
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
    )
    named = [
        name
        for name, given in (
            ("a user in SOURCE", servers.user),
            ("user=", options.user),
            ("creds=", options.creds),
            ("nkey=", options.nkey),
            ("token_file=", options.token_file),
        )
        if given
    ]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} say who you are in different ways: give only one")
    if options.password_file and named and named[0] not in ("a user in SOURCE", "user="):
        raise UsageError(f"password_file= does not go with {named[0]}: give only one")
    if options.creds or options.nkey:
        return replace(base, creds_file=options.creds, nkey_file=options.nkey)
    if token_from_file:
        return replace(base, token=token_from_file)
    user = servers.user or options.user
    if user:
        if servers.password is not None and options.password_file:
            raise UsageError("SOURCE has a password and password_file= is given: give only one")
        secret = servers.password if servers.password is not None else password
        if secret is not None:
            return replace(base, user=user, password=secret)
        if servers.user:
            return replace(base, token=user)
        raise UsageError(f"user={user} has no password: give password_file=FILE or set {PASSWORD_VARIABLE}")
    if token_from_environ:
        return replace(base, token=token_from_environ)
    if context:
        return _of_context(base, context, password)
    if options.password_file:
        raise UsageError("password_file= needs a user: give user=NAME or nats://NAME@host")
    return base


def _of_context(base: Credentials, context: Context, password: str | None) -> Credentials:
    """In the order in which the `nats` tool looks at its settings."""
    if context.user:
        return replace(base, user=context.user, password=password or context.password or "")
    if context.creds or context.nkey:
        return replace(base, creds_file=context.creds, nkey_file=None if context.creds else context.nkey)
    if context.token:
        return replace(base, token=context.token)
    if context.servers.user:
        secret = context.servers.password
        if secret is None:
            return replace(base, token=context.servers.user)
        return replace(base, user=context.servers.user, password=secret)
    return base


def _first_line(path: str | None, option: str) -> str | None:
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            line = file.read(_SECRET_LIMIT).split("\n", 1)[0].rstrip("\r")
    except OSError as error:
        raise UsageError(f"{option}={path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{option}={path} is not a text file in UTF-8") from None
    if not line:
        raise UsageError(f"{option}={path} is empty: its first line must hold the secret")
    return line
