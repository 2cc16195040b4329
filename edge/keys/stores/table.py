"""Every key store, by the scheme of `keys.store`. A new one is a row here, beside its module and its setting's rule."""

from collections.abc import Callable, Mapping
from typing import Final

from edge.config.settings import KeysConfig
from edge.keys.stores.http import HttpKeyStore
from edge.keys.stores.protocol import KeyStore
from edge.keys.stores.redis import RedisKeyStore
from edge.keys.stores.sqlite import SqliteKeyStore

STORES: Final[Mapping[str, Callable[[KeysConfig], KeyStore]]] = {
    "sqlite": SqliteKeyStore,
    "http": HttpKeyStore,
    "https": HttpKeyStore,
    "redis": RedisKeyStore,
    "rediss": RedisKeyStore,
}


def key_store(config: KeysConfig) -> KeyStore:
    """Return the store that `keys.store` names, not open yet."""
    return STORES[config.store.scheme](config)
