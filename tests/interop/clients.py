"""Three official clients behind one interface, for tests that are the same for all of them."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import nats
import natsrpy
from nats.aio.client import Client as Connection
from nats.js.api import ObjectMeta
from nats.js.errors import NotFoundError

from tests.support import CHUNK, REPOSITORY, Loop


class Other(ABC):
    """An object store client that is not natsfs."""

    @abstractmethod
    def put(self, bucket: str, name: str, data: bytes) -> None: ...

    @abstractmethod
    def get(self, bucket: str, name: str) -> bytes | None:
        """The content, checked against its digest by the client; None if there is no such object."""

    @abstractmethod
    def digest(self, bucket: str, name: str) -> str: ...

    @abstractmethod
    def delete(self, bucket: str, name: str) -> None: ...

    @abstractmethod
    def names(self, bucket: str) -> set[str]:
        """Of all live objects."""

    @abstractmethod
    def close(self) -> None: ...


class Rust(Other):
    """async-nats, through natsrpy."""

    def __init__(self, url: str) -> None:
        self._loop = Loop()
        self._nats: Any = natsrpy.Nats([url])
        self._loop.run(self._start())

    async def _start(self) -> None:
        await self._nats.startup()
        self._js = await self._nats.jetstream()

    async def _store(self, bucket: str) -> Any:
        return await self._js.object_store.get(bucket)

    def put(self, bucket: str, name: str, data: bytes) -> None:
        async def work() -> None:
            await (await self._store(bucket)).put(name, data, chunk_size=CHUNK)

        self._loop.run(work())

    def get(self, bucket: str, name: str) -> bytes | None:
        async def work() -> bytes | None:
            store = await self._store(bucket)
            content = io.BytesIO()
            try:
                await store.get(name, content)
            except Exception as error:
                if "not found" in str(error).lower():
                    return None
                raise
            return content.getvalue()

        return self._loop.run(work())

    def digest(self, bucket: str, name: str) -> str:
        async def work() -> str:
            return str((await (await self._store(bucket)).get_info(name)).digest)

        return self._loop.run(work())

    def delete(self, bucket: str, name: str) -> None:
        async def work() -> None:
            await (await self._store(bucket)).delete(name)

        self._loop.run(work())

    def update(self, bucket: str, name: str, description: str) -> None:
        async def work() -> None:
            await (await self._store(bucket)).update_metadata(name, description=description)

        self._loop.run(work())

    def rename(self, bucket: str, old: str, new: str) -> None:
        async def work() -> None:
            await (await self._store(bucket)).update_metadata(old, new_name=new)

        self._loop.run(work())

    def link(self, bucket: str, target: str, name: str) -> None:
        async def work() -> None:
            await (await self._store(bucket)).link_object(target, name)

        self._loop.run(work())

    def names(self, bucket: str) -> set[str]:
        async def work() -> set[str]:
            listing = await (await self._store(bucket)).list()
            return {info.name async for info in listing if not info.deleted}

        return self._loop.run(work())

    def close(self) -> None:
        self._loop.run(self._stop())
        self._loop.close()

    async def _stop(self) -> None:
        await self._nats.shutdown()


class Python(Other):
    """nats-py's own object store."""

    def __init__(self, url: str) -> None:
        self._loop = Loop()
        self._connection = self._loop.run(self._connect(url))
        self._js = self._connection.jetstream()

    @staticmethod
    async def _connect(url: str) -> Connection:
        return await nats.connect(url)

    def put(self, bucket: str, name: str, data: bytes) -> None:
        async def work() -> None:
            await (await self._js.object_store(bucket)).put(name, data)

        self._loop.run(work())

    def get(self, bucket: str, name: str) -> bytes | None:
        async def work() -> bytes | None:
            store = await self._js.object_store(bucket)
            try:
                return (await store.get(name)).data or b""
            except NotFoundError:
                return None

        return self._loop.run(work())

    def digest(self, bucket: str, name: str) -> str:
        async def work() -> str:
            return str((await (await self._js.object_store(bucket)).get_info(name)).digest)

        return self._loop.run(work())

    def delete(self, bucket: str, name: str) -> None:
        async def work() -> None:
            await (await self._js.object_store(bucket)).delete(name)

        self._loop.run(work())

    def update(self, bucket: str, name: str, description: str) -> None:
        async def work() -> None:
            meta = ObjectMeta(name=name, description=description)
            await (await self._js.object_store(bucket)).update_meta(name, meta)

        self._loop.run(work())

    def names(self, bucket: str) -> set[str]:
        async def work() -> set[str]:
            try:
                found = await (await self._js.object_store(bucket)).list(ignore_deletes=True)
            except NotFoundError:  # how it says that there is nothing
                return set()
            return {info.name for info in found}

        return self._loop.run(work())

    def close(self) -> None:
        self._loop.run(self._connection.close())
        self._loop.close()


def javascript_folder() -> Path | None:
    """Where `node_modules` with the JavaScript client is."""
    folder = Path(os.environ.get("NATSFS_JS") or REPOSITORY / ".venv/js")
    installed = (folder / "node_modules/@nats-io/obj").is_dir()
    return folder if installed and shutil.which("node") else None


class JavaScript(Other):
    """@nats-io/obj, in one Node process that takes commands."""

    def __init__(self, url: str) -> None:
        folder = javascript_folder()
        assert folder is not None
        self._folder = Path(tempfile.mkdtemp(prefix="natsfs-test-js-"))
        self._process = subprocess.Popen(
            ["node", REPOSITORY / "tests/js/client.mjs", folder, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _do(self, command: str, **arguments: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the JavaScript client has ended"
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    @property
    def _file(self) -> Path:
        return self._folder / "content"

    def put(self, bucket: str, name: str, data: bytes) -> None:
        self._file.write_bytes(data)
        self._do("put", bucket=bucket, name=name, path=str(self._file))

    def get(self, bucket: str, name: str) -> bytes | None:
        answer = self._do("get", bucket=bucket, name=name, path=str(self._file))
        return None if answer is None else self._file.read_bytes()

    def digest(self, bucket: str, name: str) -> str:
        return str(self._do("get", bucket=bucket, name=name, path=str(self._file))["digest"])

    def delete(self, bucket: str, name: str) -> None:
        self._do("delete", bucket=bucket, name=name)

    def update(self, bucket: str, name: str, description: str) -> None:
        self._do("update", bucket=bucket, name=name, description=description)

    def rename(self, bucket: str, old: str, new: str) -> None:
        self._do("rename", bucket=bucket, old=old, new=new)

    def link(self, bucket: str, target: str, name: str) -> None:
        self._do("link", bucket=bucket, target=target, name=name)

    def names(self, bucket: str) -> set[str]:
        return set(self._do("list", bucket=bucket))

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)


KINDS: dict[str, type[Rust] | type[Python] | type[JavaScript]] = {
    "rust": Rust,
    "python": Python,
    "javascript": JavaScript,
}
