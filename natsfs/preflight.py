"""Everything about a mount that can be checked before a daemon is started, one clear line for each."""

from __future__ import annotations

import errno
import os
import shutil
import stat

from natsfs import probe, unmount
from natsfs.config import Config
from natsfs.errors import MountError

FUSE_DEVICE = "/dev/fuse"
FUSE_CONF = "/etc/fuse.conf"


def check(config: Config) -> None:
    """Raise MountError for the first thing that stands in the way. A dead natsfs mount is taken away."""
    probe.clear_dead(config.mountpoint)
    _check_mountpoint(config.mountpoint)
    _check_fuse()
    if config.options.allow_other and os.geteuid() != 0 and not _user_allow_other():
        raise MountError(
            f"allow_other needs root, or a line user_allow_other in {FUSE_CONF}; add the line or leave it out"
        )
    _check_files(config)
    _check_places(config)


def _check_mountpoint(path: str) -> None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise MountError(f"mount point {path} does not exist; create it with: mkdir -p {path}") from None
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            raise MountError(
                f"{path} is a dead mount of another program; remove it with: umount -l {path}"
            ) from None
        raise MountError(f"mount point {path} cannot be used: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise MountError(f"mount point {path} is not a directory; give an existing empty directory")
    if os.geteuid() != 0 and not os.access(path, os.W_OK):
        raise MountError(f"mount point {path} is not writable for you; use a directory of your own")


def _check_fuse() -> None:
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except (FileNotFoundError, NotADirectoryError):
        raise MountError(
            f"{FUSE_DEVICE} is missing; load the module with: modprobe fuse (in a container give it "
            f"--device {FUSE_DEVICE} --cap-add SYS_ADMIN)"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):
            raise MountError(f"{FUSE_DEVICE} has no driver; load it with: modprobe fuse") from None
        if os.geteuid() != 0:
            raise MountError(
                f"{FUSE_DEVICE} cannot be opened ({error.strerror}); as root: chmod 666 {FUSE_DEVICE}"
            ) from None
        raise MountError(
            f"{FUSE_DEVICE} cannot be opened ({error.strerror}); in a container give it "
            f"--device {FUSE_DEVICE} --cap-add SYS_ADMIN"
        ) from None
    if os.geteuid() != 0 and shutil.which(unmount.FUSERMOUNT) is None:
        raise MountError(f"{unmount.FUSERMOUNT} is not installed; without root it is needed (package fuse3)")


def _user_allow_other() -> bool:
    try:
        with open(FUSE_CONF, encoding="utf-8", errors="replace") as file:
            return any(line.strip() == "user_allow_other" for line in file)
    except OSError:
        return False


def _check_files(config: Config) -> None:
    credentials = config.credentials
    for option, path in (
        ("creds", credentials.creds_file),
        ("nkey", credentials.nkey_file),
        ("tls_ca", credentials.tls_ca),
        ("tls_cert", credentials.tls_cert),
        ("tls_key", credentials.tls_key),
    ):
        if path is None:
            continue
        try:
            with open(path, "rb") as file:
                file.read(1)
        except OSError as error:
            raise MountError(f"{option} file {path} cannot be read: {error.strerror}") from None


def _check_places(config: Config) -> None:
    """Where the daemon writes. Inside the mount it would wait for itself."""
    options = config.options
    for option, path in (
        ("spool_dir", options.spool_dir),
        ("disk_cache", options.disk_cache),
        ("log_file", options.log_file),
    ):
        if path and os.path.commonpath([os.path.realpath(path), config.mountpoint]) == config.mountpoint:
            raise MountError(f"{option} {path} lies inside the mount point; choose another place")
    for option, path in (("spool_dir", options.spool_dir), ("disk_cache", options.disk_cache)):
        if not path:
            continue
        existing = _existing(path)
        if not os.path.isdir(existing) or not os.access(existing, os.W_OK | os.X_OK):
            raise MountError(f"{option} {path} is not a writable directory; give another: -o {option}=DIR")
    if options.log_file:
        try:
            os.close(os.open(options.log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640))
        except OSError as error:
            raise MountError(f"log_file {options.log_file} cannot be written: {error.strerror}") from None


def _existing(path: str) -> str:
    """The nearest ancestor that exists: the daemon makes what is missing."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path
