"""The mount options, as data.

`ROWS` is the only list of them. From it come the parser of `-o`, the help text of `natsfs mount`, and the
tables in docs/configuration.md (printed by `python -m natsfs.options`). `Options` is what the rest of natsfs
reads.
"""

from __future__ import annotations

import difflib
import grp
import os
import pwd
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from natsfs.errors import UsageError

LOG_LEVELS = ("debug", "info", "warning", "error")

Exclusivity = Literal["cluster", "local"]
LogLevel = Literal["debug", "info", "warning", "error"]


def default_spool_dir(environ: Mapping[str, str] | None = None, uid: int | None = None) -> str:
    """Where dirty files are kept: for root /var/cache/natsfs, else natsfs in $XDG_CACHE_HOME or ~/.cache."""
    env = os.environ if environ is None else environ
    if (os.getuid() if uid is None else uid) == 0:
        return "/var/cache/natsfs"
    cache = env.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        cache = os.path.join(env.get("HOME") or os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "natsfs")


def recover_command(spool_dir: str, *words: str) -> str:
    """What to type to get at content in `spool_dir`."""
    place = () if spool_dir == default_spool_dir() else ("--spool-dir", spool_dir)
    return shlex.join(["natsfs", "recover", *place, *words])


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was asked for with `-o`, with defaults. It holds names of files with secrets, never a secret."""

    read_only: bool = False
    allow_other: bool = False
    default_permissions: bool = True
    uid: int | None = None
    gid: int | None = None
    file_mode: int = 0o644
    dir_mode: int = 0o755
    chunk_size: int = 128 * 1024
    cache_size: int = 64 * 1024 * 1024
    disk_cache: str | None = None
    disk_cache_size: int = 4 * 1024 * 1024 * 1024
    read_ahead: int = 1024 * 1024
    spool_dir: str = field(default_factory=default_spool_dir)
    spool_size: int = 0
    timeout: float = 60.0
    purge_grace: float = 60.0
    excl: Exclusivity = "cluster"
    domain: str | None = None
    log_level: LogLevel = "info"
    log_file: str | None = None
    kernel_options: tuple[str, ...] = ()
    creds: str | None = None
    nkey: str | None = None
    user: str | None = None
    password_file: str | None = None
    token_file: str | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    context: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One option as people type it. Without `parse` it is a flag, which sets `field` to `value`."""

    name: str
    field: str
    group: str
    help: str
    default: str = ""
    metavar: str = ""
    parse: Callable[[str], object] | None = None
    value: object = None

    @property
    def usage(self) -> str:
        return f"{self.name}={self.metavar}" if self.parse else self.name


# --- parsers of values: each takes the text behind `=` and raises ValueError with what was expected ---

_SIZE = re.compile(r"(\d{1,15})([kmgt]?)(?:i?b)?", re.IGNORECASE)
_SIZE_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|)")
_DURATION_FACTORS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_size(text: str) -> int:
    """`131072`, `128K`, `64M`, `2GiB`: bytes; the suffixes are powers of 1024."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError("a size such as 128K, 64M or a number of bytes")
    return int(match[1]) * _SIZE_FACTORS[match[2].lower()]


def size_between(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        size = parse_size(text)
        if not low <= size <= high:
            raise ValueError(f"a size from {format_size(low)} to {format_size(high)}")
        return size

    return parse


def format_size(size: int) -> str:
    for suffix, factor in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if size and size % factor == 0:
            return f"{size // factor}{suffix}"
    return str(size)


def seconds_from(low: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        match = _DURATION.fullmatch(text)
        value = float(match[1]) * _DURATION_FACTORS[match[2]] if match else -1.0
        if value < low:
            raise ValueError(f"a time of at least {low:g} s, such as 30, 1.5s, 500ms or 2m")
        return value

    return parse


def parse_mode(text: str) -> int:
    if re.fullmatch(r"[0-7]{1,5}", text) is None or int(text, 8) > 0o7777:
        raise ValueError("an octal mode such as 644 or 0755")
    return int(text, 8)


def _account_number(text: str, look_up: Callable[[str], int], kind: str) -> int:
    if text.isascii() and text.isdigit():
        number = int(text)
        if number < 2**32 - 1:  # the last one means "no change" to chown(2)
            return number
    else:
        try:
            return look_up(text)
        except KeyError:
            pass
    raise ValueError(f"the number or the name of a {kind} on this machine")


def parse_uid(text: str) -> int:
    return _account_number(text, lambda name: pwd.getpwnam(name).pw_uid, "user")


def parse_gid(text: str) -> int:
    return _account_number(text, lambda name: grp.getgrnam(name).gr_gid, "group")


def parse_path(text: str) -> str:
    """An absolute path; `~` is the home directory. The daemon runs in `/`, so nothing may stay relative."""
    if not text or "\0" in text:
        raise ValueError("a path")
    return os.path.abspath(os.path.expanduser(text))


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return text

    return parse


def matching(pattern: str, expected: str) -> Callable[[str], str]:
    compiled = re.compile(pattern)

    def parse(text: str) -> str:
        if compiled.fullmatch(text) is None:
            raise ValueError(expected)
        return text

    return parse


def _kernel(name: str, help: str, default: str = "") -> Row:
    return Row(name=name, field="kernel_options", group="Kernel", help=help, default=default, value=name)


GROUPS = ("Access", "Credentials", "Performance", "Behaviour", "Logging", "Kernel")

ROWS: tuple[Row, ...] = (
    Row(name="ro", field="read_only", group="Access", value=True, help="Mount read-only."),
    Row(
        name="rw",
        field="read_only",
        group="Access",
        value=False,
        default="set",
        help="Mount for reading and writing.",
    ),
    Row(
        name="allow_other",
        field="allow_other",
        group="Access",
        value=True,
        help="Let other users of this machine in. All but root also need user_allow_other in /etc/fuse.conf.",
    ),
    Row(
        name="default_permissions",
        field="default_permissions",
        group="Access",
        value=True,
        default="set",
        help="The kernel checks modes and owners, as on a local file system.",
    ),
    Row(
        name="no_default_permissions",
        field="default_permissions",
        group="Access",
        value=False,
        help="Modes and owners are shown but not enforced; whoever may enter the mount may do everything.",
    ),
    Row(
        name="uid",
        field="uid",
        group="Access",
        metavar="USER",
        parse=parse_uid,
        default="the mounting user",
        help="Owner of objects that carry none (number or name).",
    ),
    Row(
        name="gid",
        field="gid",
        group="Access",
        metavar="GROUP",
        parse=parse_gid,
        default="the mounting user's group",
        help="Group of objects that carry none (number or name).",
    ),
    Row(
        name="file_mode",
        field="file_mode",
        group="Access",
        metavar="MODE",
        parse=parse_mode,
        default="0644",
        help="Mode of files that carry none (octal).",
    ),
    Row(
        name="dir_mode",
        field="dir_mode",
        group="Access",
        metavar="MODE",
        parse=parse_mode,
        default="0755",
        help="Mode of directories that carry none (octal).",
    ),
    Row(
        name="context",
        field="context",
        group="Credentials",
        metavar="NAME",
        parse=matching(r"(?!.*\.\.)[^/\0]+", "the name of a context of the nats command line tool"),
        help="Take server and credentials from this context of the nats command line tool.",
    ),
    Row(
        name="creds",
        field="creds",
        group="Credentials",
        metavar="FILE",
        parse=parse_path,
        help="Credentials file (user JWT and key, as written by nsc).",
    ),
    Row(
        name="nkey",
        field="nkey",
        group="Credentials",
        metavar="FILE",
        parse=parse_path,
        help="File with the seed of a user nkey.",
    ),
    Row(
        name="user",
        field="user",
        group="Credentials",
        metavar="NAME",
        parse=matching(r"[^\0]+", "the name of a NATS user"),
        help="NATS user; the password comes from password_file or NATSFS_PASSWORD.",
    ),
    Row(
        name="password_file",
        field="password_file",
        group="Credentials",
        metavar="FILE",
        parse=parse_path,
        help="File whose first line is the password of the NATS user.",
    ),
    Row(
        name="token_file",
        field="token_file",
        group="Credentials",
        metavar="FILE",
        parse=parse_path,
        help="File whose first line is the token.",
    ),
    Row(
        name="tls_ca",
        field="tls_ca",
        group="Credentials",
        metavar="FILE",
        parse=parse_path,
        default="the system's authorities",
        help="Certificate authorities that the server's certificate must come from (PEM). Turns TLS on.",
    ),
    Row(
        name="tls_cert",
        field="tls_cert",
        group="Credentials",
        metavar="FILE",
        parse=parse_path,
        help="Client certificate (PEM). Turns TLS on.",
    ),
    Row(
        name="tls_key",
        field="tls_key",
        group="Credentials",
        metavar="FILE",
        parse=parse_path,
        help="Private key of the client certificate (PEM, without a pass phrase).",
    ),
    Row(
        name="chunk_size",
        field="chunk_size",
        group="Performance",
        metavar="SIZE",
        parse=size_between(1 << 10, 8 << 20),
        default="128K",
        help="Size of the chunks of new content; it must fit the server's max_payload.",
    ),
    Row(
        name="cache_size",
        field="cache_size",
        group="Performance",
        metavar="SIZE",
        parse=size_between(1 << 20, 1 << 40),
        default="64M",
        help="Memory for chunks that were read.",
    ),
    Row(
        name="disk_cache",
        field="disk_cache",
        group="Performance",
        metavar="DIR",
        parse=parse_path,
        help="Keep chunks that were read in this directory, too, for later mounts and times without the server.",
    ),
    Row(
        name="disk_cache_size",
        field="disk_cache_size",
        group="Performance",
        metavar="SIZE",
        parse=size_between(1 << 20, 1 << 44),
        default="4G",
        help="Most that one mount keeps in disk_cache.",
    ),
    Row(
        name="read_ahead",
        field="read_ahead",
        group="Performance",
        metavar="SIZE",
        parse=size_between(128 << 10, 16 << 20),
        default="1M",
        help="How far the kernel reads ahead in a file, where natsfs runs as root; else it is the kernel's 128K.",
    ),
    Row(
        name="spool_dir",
        field="spool_dir",
        group="Performance",
        metavar="DIR",
        parse=parse_path,
        default="$XDG_CACHE_HOME/natsfs or ~/.cache/natsfs; for root /var/cache/natsfs",
        help="Where content waits until the server has it, and where it stays if the server refuses it.",
    ),
    Row(
        name="spool_size",
        field="spool_size",
        group="Performance",
        metavar="SIZE",
        parse=parse_size,
        default="0 (no limit)",
        help="Most content that may wait there; a write beyond it fails with ENOSPC. What was refused does not count.",
    ),
    Row(
        name="timeout",
        field="timeout",
        group="Behaviour",
        metavar="TIME",
        parse=seconds_from(1.0),
        default="60s",
        help="Longest wait without progress for the server, before a call fails.",
    ),
    Row(
        name="purge_grace",
        field="purge_grace",
        group="Behaviour",
        metavar="TIME",
        parse=seconds_from(0.0),
        default="60s",
        help="How long content that was replaced or removed stays for those who still read it elsewhere.",
    ),
    Row(
        name="excl",
        field="excl",
        group="Behaviour",
        metavar="cluster|local",
        parse=one_of("cluster", "local"),
        default="cluster",
        help="Between whom O_EXCL holds: all clients of the bucket, or (faster) the programs on this mount.",
    ),
    Row(
        name="domain",
        field="domain",
        group="Behaviour",
        metavar="NAME",
        parse=matching(r"[^\s.*>]+", "a JetStream domain (no dots, blanks or wildcards)"),
        help="JetStream domain, for instance that of a leaf node.",
    ),
    Row(
        name="log_level",
        field="log_level",
        group="Logging",
        metavar="LEVEL",
        parse=one_of(*LOG_LEVELS),
        default="info",
        help="debug, info, warning or error.",
    ),
    Row(
        name="log_file",
        field="log_file",
        group="Logging",
        metavar="FILE",
        parse=parse_path,
        default="syslog; with -f standard error",
        help="Append the log to this file.",
    ),
    _kernel("nosuid", "Ignore set-user-id bits.", default="set"),
    _kernel("suid", "Honour set-user-id bits (root only)."),
    _kernel("nodev", "Ignore device files.", default="set"),
    _kernel("dev", "Honour device files (root only)."),
    _kernel("noexec", "Run no programs from the mount."),
    _kernel("exec", "Programs may be run from the mount.", default="set"),
    _kernel("sync", "Send every write to the daemon at once."),
    _kernel("async", "Let the kernel gather writes.", default="set"),
    _kernel("dirsync", "Make changes of directories synchronous."),
    _kernel("noatime", "Do not touch access times (reading never does, with or without it)."),
)

_BY_NAME = {row.name: row for row in ROWS}

# Fields of Options that say how to get into a server.
LOGIN = tuple(row.field for row in ROWS if row.group == "Credentials" or row.name == "domain")

# Of each pair only the last one given counts.
_OPPOSITES = {
    first: second
    for pair in (("nosuid", "suid"), ("nodev", "dev"), ("noexec", "exec"), ("sync", "async"))
    for first, second in (pair, pair[::-1])
}

# What mount(8), systemd and fstab(5) may pass on and which means nothing to the mount itself. The times are
# among them because FUSE never updates an access time by itself, and libfuse refuses most of their names.
IGNORED = frozenset(
    {
        "_netdev",
        "auto",
        "noauto",
        "nofail",
        "defaults",
        "user",
        "nouser",
        "users",
        "nousers",
        "owner",
        "noowner",
        "group",
        "nogroup",
        "atime",
        "diratime",
        "nodiratime",
        "relatime",
        "norelatime",
        "strictatime",
        "nostrictatime",
        "lazytime",
        "nolazytime",
        "iversion",
        "noiversion",
        "mand",
        "nomand",
        "silent",
        "loud",
    }
)
_IGNORED_PREFIXES = ("x-", "X-", "comment=", "user_id=", "group_id=")

# Names of secrets that people try to give; the value would be in /etc/fstab and in every process list.
_SECRETS = {
    "password": "put it into a file and give password_file=FILE, or set NATSFS_PASSWORD",
    "pass": "put it into a file and give password_file=FILE, or set NATSFS_PASSWORD",
    "token": "put it into a file and give token_file=FILE, or set NATSFS_TOKEN",
}


def split(text: str) -> list[str]:
    r"""The items of an `-o` argument; in a value `\,` is a comma and `\\` a backslash. Empty: dropped."""
    items = [""]
    characters = iter(text)
    for character in characters:
        if character == ",":
            items.append("")
        elif character == "\\":
            items[-1] += next(characters, "\\")
        else:
            items[-1] += character
    return [item for item in items if item]


def parse(texts: Iterable[str], *, sloppy: bool = False) -> Options:
    """The options from any number of `-o` arguments; the last word on each counts.

    `sloppy` (mount -s) passes over unknown names, but not over bad values.
    """
    return replace(Options(), **settings(texts, sloppy=sloppy))


def settings(texts: Iterable[str], *, sloppy: bool = False) -> dict[str, Any]:
    """Like parse(), but only what was named: field of Options -> value."""
    values: dict[str, Any] = {}
    kernel: list[str] = []
    for item in (item for text in texts for item in split(text)):
        name, equals, text = item.partition("=")
        if (not equals and name in IGNORED) or item.startswith(_IGNORED_PREFIXES):
            continue
        if name in _SECRETS:
            # The value is not repeated: this line may end up in a log.
            raise UsageError(
                f"-o {name}= would show the secret to everyone on this machine: {_SECRETS[name]}"
            )
        row = _BY_NAME.get(name)
        if row is None:
            if sloppy:
                continue
            raise _unknown(name)
        value = _value(row, equals, text)
        if row.field == "kernel_options":
            kernel = [known for known in kernel if known not in (name, _OPPOSITES.get(name))] + [name]
            value = tuple(kernel)
        values[row.field] = value
    return values


def _value(row: Row, equals: str, text: str) -> object:
    if row.parse is None:
        if equals:
            raise UsageError(f"option {row.name} takes no value; write -o {row.name}")
        return row.value
    if not equals:
        raise UsageError(f"option {row.name} needs a value: -o {row.usage}")
    try:
        return row.parse(text)
    except ValueError as error:
        raise UsageError(f"option {row.name}={text}: expected {error}") from None


def _unknown(name: str) -> UsageError:
    near = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.5)
    advice = f"did you mean {_BY_NAME[near[0]].usage}?" if near else "natsfs mount --help lists them all"
    return UsageError(f"unknown option {name!r}: {advice}")


def help_text() -> str:
    """All options for `natsfs mount --help`."""
    lines: list[str] = []
    for group in GROUPS:
        lines.append(f"{group}:")
        for row in ROWS:
            if row.group == group:
                default = f" [{row.default}]" if row.default else ""
                lines.append(f"  {row.usage:<24} {row.help}{default}")
        lines.append("")
    return "\n".join(lines)


def markdown() -> str:
    """The tables of docs/configuration.md."""
    lines: list[str] = []
    for group in GROUPS:
        lines += [f"### {group}", "", "| Option | Default | Meaning |", "| --- | --- | --- |"]
        for row in ROWS:
            if row.group == group:
                usage = row.usage.replace("|", "\\|")
                lines.append(f"| `{usage}` | {row.default} | {row.help} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
