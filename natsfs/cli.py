"""The command line: `natsfs` for people, and the helpers that mount(8) and umount(8) call."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from natsfs import (
    __version__,
    assembly,
    demo,
    helper,
    libc,
    mount,
    options,
    process,
    recover,
    remount,
    source,
    unmount,
)
from natsfs.errors import NatsfsError, UsageError

UMOUNT_LIMIT = 600.0

# Exit statuses of mount(8) and umount(8), which pass on those of their helpers.
_INCORRECT_INVOCATION = 1
_FAILURE = 32

_MOUNT_EPILOG = f"""\
SOURCE is {source.FORM};
tls:// asks for TLS. Without a bucket every bucket is a directory. Passwords belong into a file
(password_file, token_file, creds, nkey, context) or into NATSFS_PASSWORD or NATSFS_TOKEN.

Options for -o, with [defaults]:

{options.help_text()}"""


_RECOVER_DESCRIPTION = """\
Lists what mounts could not store, each in a line: ID, time, size, name, and why. That is content whose close() or
fsync() failed, and what a daemon had not saved when it was killed, small writes of its last second excepted; not
what a running mount works on.

  natsfs recover                     lists it
  natsfs recover ID --to DIR         copies it out, under its name
  natsfs recover ID --to FILE        or under another one
  natsfs recover --remove ID         drops it
  natsfs recover --all --to DIR --remove

If only a part of a file was written, the rest comes from the version in the store that it was a change to. If that is
gone, the copy has zeros there, the missing bytes are named, and the exit status is 1."""


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    internal = _INTERNAL.get(given[0]) if given else None
    if internal:
        return internal(given[1:])
    parsed = _parser().parse_args(given)
    return _guarded(lambda: int(parsed.run(parsed)), lambda error: error.exit_status)


def mount_helper(arguments: Sequence[str] | None = None) -> int:
    """mount.natsfs SOURCE MOUNTPOINT [-sfnvrw] [-N NAMESPACE] [-t TYPE] [-o OPTIONS], see mount(8)."""
    given = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> int:
        call = parse_helper(given, flags="sfnvrw", valued="Not")
        if len(call.positional) != 2:
            raise UsageError("usage: mount.natsfs SOURCE MOUNTPOINT [-sfnvrw] [-o OPTIONS]")
        place, mountpoint = call.positional
        texts = [*call.options, *[word for flag, word in (("r", "ro"), ("w", "rw")) if flag in call.flags]]
        sloppy, check_only = "s" in call.flags, "f" in call.flags
        if not remount.is_remount(texts):
            mount.mount(place, mountpoint, texts, sloppy=sloppy, check_only=check_only)
        elif not check_only:
            remount.remount(assembly.resolve(mountpoint), texts, sloppy=sloppy)
        return 0

    return _guarded(run, _helper_status)


def umount_helper(arguments: Sequence[str] | None = None) -> int:
    """umount.fuse.natsfs MOUNTPOINT [-fnlvrw] [-N NAMESPACE] [-t TYPE], see umount(8).

    With it umount(8), and so a shutdown, waits until what was written is in the store.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> int:
        call = parse_helper(given, flags="fnlvrws", valued="Not")
        if len(call.positional) != 1:
            raise UsageError("usage: umount.fuse.natsfs MOUNTPOINT [-fnlv]")
        flags = (libc.MNT_FORCE if "f" in call.flags else 0) | (libc.MNT_DETACH if "l" in call.flags else 0)
        return _umount(call.positional[0], UMOUNT_LIMIT, flags)

    return _guarded(run, _helper_status)


@dataclass(slots=True, kw_only=True)
class HelperCall:
    """The arguments of a helper, taken apart."""

    positional: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    options: list[str] = field(default_factory=list)


def parse_helper(arguments: Sequence[str], *, flags: str, valued: str) -> HelperCall:
    """Letters may be joined (-sfn), values may be (-oro); of the values only those of -o are kept."""
    call = HelperCall()
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-") or argument == "-":
            call.positional.append(argument)
            continue
        letters = argument[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter in valued:
                value = letters or next(rest, None)
                if value is None:
                    raise UsageError(f"-{letter} needs a value")
                if letter == "o":
                    call.options.append(value)
                break
            if letter not in flags:
                raise UsageError(f"unknown option -{letter}")
            call.flags.add(letter)
    return call


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="natsfs",
        description="Mounts NATS JetStream Object Store buckets as a file system.",
        epilog="natsfs COMMAND --help tells more.",
    )
    parser.add_argument("--version", action="version", version=f"natsfs {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser(
        "mount",
        help="mount a bucket, or all of them",
        usage="natsfs mount [-f] [-o OPTION[,OPTION...]]... SOURCE MOUNTPOINT",
        description="Mounts SOURCE at MOUNTPOINT and returns when it can be used.",
        epilog=_MOUNT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "source", metavar="SOURCE", help="server and bucket, for instance nats://localhost/music"
    )
    command.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing directory")
    command.add_argument(
        "-f", "--foreground", action="store_true", help="stay in the foreground, log to stderr"
    )
    command.add_argument(
        "-o", dest="options", action="append", default=[], metavar="OPTION[,...]", help="see below"
    )
    command.set_defaults(run=_run_mount)

    command = commands.add_parser(
        "umount",
        help="unmount, and wait until everything is saved",
        description="Unmounts MOUNTPOINT and waits until everything written there is in the store. "
        "What could not be saved is listed, and the exit status is then 1.",
    )
    command.add_argument("mountpoint", metavar="MOUNTPOINT")
    command.add_argument(
        "--timeout",
        type=float,
        default=UMOUNT_LIMIT,
        metavar="SECONDS",
        help="how long to wait for the saving, which goes on afterwards (default %(default)g)",
    )
    command.set_defaults(run=_run_umount)

    command = commands.add_parser(
        "recover",
        help="list and copy out what could not be stored",
        usage="natsfs recover [--spool-dir DIR] [ID... | --all] [--to DIR|FILE [--force]] [--remove]",
        description=_RECOVER_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "ids", nargs="*", metavar="ID", help="as listed; its first characters do. Alone: tells more"
    )
    command.add_argument("--all", action="store_true", dest="everything", help="everything that is listed")
    command.add_argument(
        "--to", metavar="DIR|FILE", help="copy it into this directory, or to this file, which must not exist"
    )
    command.add_argument("--force", action="store_true", help="with --to: replace a file that exists")
    command.add_argument(
        "--remove", action="store_true", help="drop it; with --to only what was copied whole"
    )
    command.add_argument(
        "--spool-dir",
        type=options.parse_path,
        default=options.default_spool_dir(),
        metavar="DIR",
        help="the spool_dir of the mount (default: %(default)s)",
    )
    command.add_argument(
        "-o",
        dest="options",
        action="append",
        default=[],
        metavar="OPTION[,...]",
        help="how to log in to the server (creds=, user= ...), if not as the mount did",
    )
    command.set_defaults(run=_run_recover)

    command = commands.add_parser(
        "demo",
        help="try natsfs with a private server",
        description="Starts a NATS server of its own, mounts it at DIR, and ends both on Ctrl-C.",
    )
    command.add_argument(
        "directory", nargs="?", default=demo.DEFAULT_DIRECTORY, metavar="DIR", help="default: %(default)s"
    )
    command.add_argument(
        "--data", metavar="DIR", help=f"where the server keeps its data (default: {demo.data_text()})"
    )
    command.set_defaults(run=lambda parsed: demo.run(parsed.directory, parsed.data))

    command = commands.add_parser(
        "install-helper",
        help="let mount(8) and /etc/fstab know the type natsfs",
        description="Puts " + ", ".join(helper.NAMES) + " where mount(8) and umount(8) look for them.",
    )
    command.add_argument(
        "--dir", default=helper.DEFAULT_DIRECTORY, metavar="DIR", help="default: %(default)s"
    )
    command.add_argument("--remove", action="store_true", help="take them away again")
    command.set_defaults(run=_run_install_helper)
    return parser


def _run_mount(parsed: argparse.Namespace) -> int:
    if remount.is_remount(parsed.options):
        raise UsageError("to change a mount use mount(8): mount -o remount,ro MOUNTPOINT")
    mount.mount(parsed.source, parsed.mountpoint, parsed.options, foreground=parsed.foreground)
    return 0


def _run_umount(parsed: argparse.Namespace) -> int:
    return _umount(parsed.mountpoint, parsed.timeout, 0)


def _run_recover(parsed: argparse.Namespace) -> int:
    return recover.run(
        recover.Request(
            spool_dir=parsed.spool_dir,
            ids=parsed.ids,
            everything=parsed.everything,
            to=parsed.to,
            force=parsed.force,
            remove=parsed.remove,
            options=parsed.options,
        )
    )


def _run_install_helper(parsed: argparse.Namespace) -> int:
    for line in helper.remove(parsed.dir) if parsed.remove else helper.install(parsed.dir):
        print(line)
    return 0


def _umount(mountpoint: str, limit: float, flags: int) -> int:
    shown = False

    def waiting(pid: int, seconds: float) -> None:
        nonlocal shown
        if sys.stderr.isatty():
            shown = True
            print(
                f"\rwaiting for natsfs (pid {pid}) to save: {seconds:.0f} s ",
                end="",
                file=sys.stderr,
                flush=True,
            )

    try:
        outcome = unmount.unmount(assembly.resolve(mountpoint), limit=limit, flags=flags, waiting=waiting)
    finally:
        if shown:
            print(file=sys.stderr)
    if outcome.note:
        print(f"natsfs: note: {outcome.note}", file=sys.stderr)
    for line in outcome.unsaved:
        print(f"natsfs: not saved: {line}", file=sys.stderr)
    return 1 if outcome.unsaved else 0


def _guarded(run: Callable[[], int], status: Callable[[NatsfsError], int]) -> int:
    try:
        return run()
    except NatsfsError as error:
        print(f"natsfs: {error}", file=sys.stderr)
        return status(error)
    except KeyboardInterrupt:
        print("natsfs: interrupted", file=sys.stderr)
        return 130


def _helper_status(error: NatsfsError) -> int:
    return _INCORRECT_INVOCATION if isinstance(error, UsageError) else _FAILURE


def _launch(arguments: Sequence[str]) -> int:
    """The rest of `natsfs mount` after it has rid itself of a secret in its arguments."""
    descriptor = int(arguments[1])

    def run() -> int:
        mount.launch(mount.read_config(descriptor))
        return 0

    return _guarded(run, lambda error: error.exit_status)


# Commands that natsfs gives itself and its helpers; they are in no help text.
_INTERNAL: dict[str, Callable[[Sequence[str]], int]] = {
    "daemon": process.main,
    "launch": _launch,
    "mount-helper": mount_helper,
    "umount-helper": umount_helper,
}
