"""Every key store by the scheme of `keys.store`, and who administers it: a row here for a new one."""

from collections.abc import Callable, Mapping
from typing import Final

from edge.config import redis_urls
from edge.config.process_settings import KeysConfig
from edge.keys.stores.administration import Actor, ReadOnlyStore, Registry
from edge.keys.stores.http import HttpKeyStore
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
