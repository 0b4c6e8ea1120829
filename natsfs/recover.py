"""`natsfs recover`: what could not be stored is listed, copied out, and dropped."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from natsfs import assembly
from natsfs import options as mount_options
from natsfs.errors import NatsfsError, RecoverError, UsageError
from natsfs.files import kept as spooled
from natsfs.files.kept import KeptFile
from natsfs.files.manifest import Range
from natsfs.files.spool import ID_SHOWN
from natsfs.names import path_of

RANGES_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """`ids` are as they were typed. `options` are mount options that say how to log in."""

    spool_dir: str
    ids: Sequence[str]
    everything: bool = False
    to: str | None = None
    force: bool = False
    remove: bool = False
    options: Sequence[str] = ()


def run(request: Request) -> int:
    # Names may hold what the terminal cannot show; and what the connection logs is in the messages here.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger().addHandler(logging.NullHandler())
    if (request.to is not None or request.remove) and not (request.ids or request.everything):
        raise UsageError("say which: `natsfs recover` lists the IDs, --all takes all of them")
    mount_options.settings(request.options)  # what is wrong with them is told before anything is done
    root = Path(request.spool_dir)
    with contextlib.ExitStack() as locks:
        try:
            found = spooled.find(root, locks)
        except OSError as error:
            raise RecoverError(f"{error.filename or root} cannot be read: {error.strerror}") from None
        chosen = found if request.everything or not request.ids else choose(found, request.ids)
        if not found:
            print(f"natsfs: nothing is kept in {root}", file=sys.stderr)
        elif request.to is not None:
            return _copy_out(chosen, request)
        elif request.remove:
            for kept in chosen:
                _remove(kept)
        elif request.ids:
            for kept in chosen:
                print("\n".join(details(kept)))
        else:
            for kept in chosen:
                print(line(kept))
            if sys.stdout.isatty():
                command = mount_options.recover_command(request.spool_dir)
                size = short_size(spooled.room(kept.path for kept in chosen))
                print(
                    f"\n{_files(len(chosen))}, {size} on the disk\n"
                    f"{command} ID --to DIR copies one out\n{command} --remove ID drops it",
                    file=sys.stderr,
                )
    return 0


def summary(spool_dir: str) -> str:
    """What a mount that uses this folder has to tell about what is kept there; empty if nothing is.

    Raises OSError if the folder cannot be read.
    """
    count, size = spooled.count(Path(spool_dir))
    if not count:
        return ""
    command = mount_options.recover_command(spool_dir)
    return (
        f"{_files(count)} that could not be stored, {short_size(size)} on the disk, "
        f"{'is' if count == 1 else 'are'} kept in {spool_dir}; to list: {command}"
    )


def choose(found: Sequence[KeptFile], ids: Sequence[str]) -> list[KeptFile]:
    """Those whose ids begin with what was typed, each of which has to fit one."""
    chosen: dict[str, KeptFile] = {}
    for typed in ids:
        fitting = [kept for kept in found if typed and kept.id.startswith(typed)]
        if not fitting:
            raise RecoverError(f"nothing with the ID {typed!r} is kept; `natsfs recover` lists what is")
        if len(fitting) > 1:
            raise RecoverError(f"{typed!r} begins several IDs: {', '.join(kept.id for kept in fitting)}")
        chosen[fitting[0].id] = fitting[0]
    return list(chosen.values())


# --- telling --------------------------------------------------------------------------------------------------


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def line(kept: KeptFile) -> str:
    when = datetime.fromtimestamp(kept.time_ns / 1e9).strftime("%Y-%m-%d %H:%M:%S")
    parts = (kept.id[:ID_SHOWN], when, f"{short_size(kept.content.size):>6}", name(kept), why(kept))
    return "  ".join(parts)


def details(kept: KeptFile) -> Iterator[str]:
    yield line(kept)
    yield f"  kept in {kept.path}"
    if kept.manifest is not None:
        yield f"  described in {kept.path.with_suffix('.json')}"
    content = kept.content
    if content.kept and kept.manifest is not None and kept.manifest.base is not None:
        yield f"  written here: {content.written} of {content.size} bytes"
        yield f"  bytes of the stored version {kept.manifest.base.nuid}: {ranges_text(content.kept)}"
    if content.unsure:
        yield f"  {_unsure_text(content.unsure)}"
    if content.lost:
        yield f"  {_lost_text(content.lost)}"


def name(kept: KeptFile) -> str:
    """Where the content belongs, as an address of one line."""
    if kept.manifest is None:
        return "(unknown)"
    scheme, _, rest = kept.manifest.source.partition("://")
    return _printable(
        f"{scheme}://{rest.partition('/')[0]}/{kept.manifest.bucket or '?'}/{kept.manifest.name}"
    )


def why(kept: KeptFile) -> str:
    if kept.saved:
        return "is in the store; its daemon ended before it was closed"
    if kept.killed:
        reason = "its daemon ended before this was saved"
    else:
        reason = " ".join(kept.manifest.reason.split()) if kept.manifest else "nothing tells what this is"
    if kept.content.kept:
        reason += f"; written: {short_size(kept.content.written)}, the rest is in the version before"
    return _printable(reason)


def short_size(size: int) -> str:
    """As ls -h has it: 1023, 1.5K, 20M."""
    value = float(size)
    for unit in ("", "K", "M", "G"):
        if value < 1024:
            return f"{value:.1f}{unit}" if unit and value < 10 else f"{value:.0f}{unit}"
        value /= 1024
    return f"{value:.1f}T"


def ranges_text(ranges: Sequence[Range]) -> str:
    """First and last bytes."""
    shown = ", ".join(f"{start}-{end - 1}" for start, end in ranges[:RANGES_SHOWN])
    more = len(ranges) - RANGES_SHOWN
    return f"{shown} and {more} more ranges" if more > 0 else shown


def _unsure_text(unsure: Sequence[Range]) -> str:
    return (
        f"bytes {ranges_text(unsure)} were being written when the daemon was killed: "
        "a zero there may stand for a byte of the version before"
    )


def _lost_text(lost: Sequence[Range]) -> str:
    return f"bytes {ranges_text(lost)} are zeros in the copy: the disk of the spool did not take them"


def _printable(text: str) -> str:
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


# --- doing ----------------------------------------------------------------------------------------------------


def _copy_out(chosen: Sequence[KeptFile], request: Request) -> int:
    assert request.to is not None
    status = 0
    for kept, path in targets(chosen, request.to, several=request.everything or len(chosen) > 1):
        try:
            problems = _copy(kept, path, request)
        except FileExistsError:
            problems = [f"{path} exists; --force replaces it"]
        except OSError as error:
            problems = [f"{kept.id[:ID_SHOWN]} cannot be copied to {path}: {error.strerror or error}"]
        else:
            print(f"{kept.id[:ID_SHOWN]} -> {_printable(str(path))}")
        for problem in problems:
            print(f"natsfs: {_printable(problem)}", file=sys.stderr)
        if problems:
            status = RecoverError.exit_status
        elif request.remove:
            _remove(kept)
    return status


def targets(chosen: Sequence[KeptFile], to: str, *, several: bool) -> list[tuple[KeptFile, Path]]:
    """Where each copy goes: to the file `to`, or, if that is a directory or they may be `several`, into it."""
    place = Path(to)
    if not (several or to.endswith("/") or place.is_dir()):
        return [(chosen[0], place)]
    try:
        place.mkdir(exist_ok=True)
    except OSError as error:
        raise RecoverError(f"{place} is not a directory for the copies: {error.strerror}") from None
    names = [_file_name(kept) for kept in chosen]
    taken = {one for one, count in Counter(names).items() if count > 1}
    return [
        (kept, place / (f"{one}.{kept.id[:ID_SHOWN]}" if one in taken else one))
        for kept, one in zip(chosen, names, strict=True)
    ]


def _file_name(kept: KeptFile) -> str:
    if kept.manifest is None or not kept.manifest.name:
        return kept.id[:ID_SHOWN]
    return os.fsdecode(path_of(kept.manifest.name)[-1])


def _copy(kept: KeptFile, path: Path, request: Request) -> list[str]:
    """Returns what the copy lacks."""
    problems: list[str] = []
    with spooled.new_file(path, replace=request.force) as fd:
        spooled.copy(kept, fd)
        if kept.content.kept:
            missing, reason = _from_store(kept, fd, request)
            if missing:
                problems.append(
                    f"{path} is not whole: bytes {ranges_text(missing)} are zeros in the copy. They were not written "
                    f"to but those of the version before, and that cannot be read: {reason}"
                )
        if kept.content.unsure:
            problems.append(f"{path} may not be whole: {_unsure_text(kept.content.unsure)}")
        if kept.content.lost:
            problems.append(f"{path} is not whole: {_lost_text(kept.content.lost)}")
        spooled.set_attributes(kept, fd)
    return problems


def _from_store(kept: KeptFile, fd: int, request: Request) -> tuple[tuple[Range, ...], str]:
    from natsfs import rebuild  # it loads all of the store, which listing has no use for

    manifest, ranges = kept.manifest, kept.content.kept
    if manifest is None or manifest.base is None:
        return ranges, "nothing tells which version it was"
    try:
        config = assembly.log_in_again(manifest.source, manifest.options, request.options, os.environ)
    except NatsfsError as error:
        return ranges, str(error)
    return rebuild.fetch(config, manifest.base, ranges, lambda data, at: spooled.write_at(fd, data, at))


def _remove(kept: KeptFile) -> None:
    try:
        kept.remove()
    except OSError as error:
        raise RecoverError(f"{kept.path} cannot be removed: {error.strerror}") from None
