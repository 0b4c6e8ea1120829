"""Everybody who may change an object beside the mount that looks at it, behind one interface."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

from tests.interop.clients import JavaScript, Python, Rust
from tests.support import Server, new_nuid

DESCRIPTION = "changed"


class Writer(ABC):
    """What a kind cannot do at all raises `NotImplementedError`; the tests know who can do what."""

    def __init__(self, server: Server, mount: Path) -> None:
        self.server = server
        self.mount = mount

    @abstractmethod
    def put(self, bucket: str, name: str, data: bytes) -> None: ...

    @abstractmethod
    def delete(self, bucket: str, name: str) -> None: ...

    def change(self, bucket: str, name: str) -> None:
        """Change the metadata only: the description becomes `DESCRIPTION`."""
        raise NotImplementedError

    def rename(self, bucket: str, old: str, new: str) -> None:
        raise NotImplementedError

    def link(self, bucket: str, target: str, name: str) -> None:
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give back what the client holds."""


class ViaMount(Writer):
    """A natsfs mount of its own."""

    def put(self, bucket: str, name: str, data: bytes) -> None:
        (self.mount / bucket / name).write_bytes(data)

    def delete(self, bucket: str, name: str) -> None:
        (self.mount / bucket / name).unlink()

    def change(self, bucket: str, name: str) -> None:
        os.setxattr(self.mount / bucket / name, "user.nats.description", DESCRIPTION.encode())

    def rename(self, bucket: str, old: str, new: str) -> None:
        (self.mount / bucket / old).rename(self.mount / bucket / new)

    def link(self, bucket: str, target: str, name: str) -> None:
        (self.mount / bucket / name).symlink_to(target)


class Go(Writer):
    """The messages that the Go and .NET clients send: a rename is a put of the metadata and a silent purge."""

    def put(self, bucket: str, name: str, data: bytes) -> None:
        self.server.client.put(bucket, name, data)

    def delete(self, bucket: str, name: str) -> None:
        self.server.client.delete(bucket, name)

    def change(self, bucket: str, name: str) -> None:
        client = self.server.client
        client.publish_meta(client.stored(bucket, name) | {"description": DESCRIPTION})

    def rename(self, bucket: str, old: str, new: str) -> None:
        self.server.client.rename(bucket, old, new)

    def link(self, bucket: str, target: str, name: str) -> None:
        self.server.client.publish_meta(
            {
                "name": name,
                "options": {"link": {"bucket": bucket, "name": target}},
                "bucket": bucket,
                "nuid": new_nuid(),
                "size": 0,
                "mtime": "0001-01-01T00:00:00Z",
                "chunks": 0,
            }
        )


class ViaClient(Writer):
    client: Python | Rust | JavaScript

    def put(self, bucket: str, name: str, data: bytes) -> None:
        self.client.put(bucket, name, data)

    def delete(self, bucket: str, name: str) -> None:
        self.client.delete(bucket, name)

    def change(self, bucket: str, name: str) -> None:
        self.client.update(bucket, name, DESCRIPTION)

    def close(self) -> None:
        self.client.close()


class ViaPython(ViaClient):
    """nats-py: it has no links, and its rename always fails."""

    def __init__(self, server: Server, mount: Path) -> None:
        super().__init__(server, mount)
        self.client = Python(server.url)


class ViaFullClient(ViaClient):
    client: Rust | JavaScript

    def rename(self, bucket: str, old: str, new: str) -> None:
        self.client.rename(bucket, old, new)

    def link(self, bucket: str, target: str, name: str) -> None:
        self.client.link(bucket, target, name)


class ViaRust(ViaFullClient):
    def __init__(self, server: Server, mount: Path) -> None:
        super().__init__(server, mount)
        self.client = Rust(server.url)


class ViaJavaScript(ViaFullClient):
    def __init__(self, server: Server, mount: Path) -> None:
        super().__init__(server, mount)
        self.client = JavaScript(server.url)


WRITERS: dict[str, type[Writer]] = {
    "natsfs": ViaMount,
    "go": Go,
    "python": ViaPython,
    "rust": ViaRust,
    "javascript": ViaJavaScript,
}
