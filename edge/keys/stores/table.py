"""Every key store by the scheme of `keys.store`, and who administers it: a row here for a new one."""

from collections.abc import Callable, Mapping
from typing import Final

from edge.config import redis_urls
from edge.config.process_settings import KeysConfig
from edge.keys.stores.administration import Actor, ReadOnlyStore, Registry
from edge.keys.stores.http import HttpKeyStore
from edge.keys.stores.keyfile import KeptConnection
from edge.keys.stores.protocol import KeyStore
from edge.keys.stores.redis import RedisKeyStore
from edge.keys.stores.redis_registry import RedisRegistry
from edge.keys.stores.registry import KeyRegistry
from edge.keys.stores.sqlite import SqliteKeyStore

STORES: Final[Mapping[str, Callable[[KeysConfig], KeyStore]]] = {
    "sqlite": SqliteKeyStore,
    "http": HttpKeyStore,
    "https": HttpKeyStore,
    **dict.fromkeys(redis_urls.SCHEMES, RedisKeyStore),
}


def key_store(config: KeysConfig) -> KeyStore:
    """Return the store that `keys.store` names, not open yet."""
    return STORES[config.store.scheme](config)


def registry_of(config: KeysConfig, actor: Actor | None = None, *, makes: bool = False) -> Registry:
    """Return who administers the store that `keys.store` names; an empty one is a new one if it `makes` one.

    Raises `ReadOnlyStore` where keys are kept by somebody else.
    """
    if config.store.path is not None:
        return KeyRegistry(config.store.path, makes=makes, actor=actor)
    if STORES[config.store.scheme] is RedisKeyStore:
        return RedisRegistry(config, actor, makes=makes)
    raise ReadOnlyStore(f"keys.store is {config.store}: its keys are made and listed there, not here")


class Registries:
    """Administers a store for one thread, again and again, and keeps the embedded one open in between."""

    def __init__(self) -> None:
        self._kept: KeptConnection | None = None

    def registry(self, config: KeysConfig, actor: Actor) -> Registry:
        """Return who administers the store of a configuration now, as `registry_of` does."""
        path = config.store.path
        if path is None:
            return registry_of(config, actor)
        if self._kept is None or self._kept.path != path:
            self.close()
            self._kept = KeptConnection(path)
        return KeyRegistry(path, makes=False, actor=actor, kept=self._kept)

    def close(self) -> None:
        """Let go of the file."""
        if self._kept is not None:
            self._kept.close()
