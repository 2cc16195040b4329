"""routes.toml read again while the process runs: whole or not at all, at SIGHUP and when a file has changed."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Final

from edge.config.changes import describe_change, list_restarts
from edge.config.problems import ConfigError
from edge.config.reading import load
from edge.config.settings import Config
from edge.errors import Unusable
from edge.generation import Generation
from edge.process.admin import Readiness
from edge.process.listeners import listener_tls
from edge.routing import RouteTable
from edge.upstream.endpoints import Endpoints
from edge.upstream.pools import Pool

_log = logging.getLogger(__name__)

_POLL_INTERVAL_S: Final = 1.0  # of routes.toml and the files it names

FileState = tuple[int, int, int]  # time of change (of permissions too) in ns, size, inode; all 0: there is no file


class Reloader:
    """Reads the file again when it changed, and keeps the generation that works.

    `adapt` is what the command line changes of the file. A bad file is reported in the log and in `readiness`.
    """

    def __init__(
        self, path: Path, adapt: Callable[[Config], Config], endpoints: Endpoints, readiness: Readiness
    ) -> None:
        self._path = path
        self._adapt = adapt
        self._endpoints = endpoints
        self._readiness = readiness
        self._seen: dict[Path, FileState] = {}

    def first(self) -> Generation:
        """Return the first generation; raises `ConfigError` or `Unusable`."""
        config = self._adapt(self._read(()))
        for warning in config.warnings:
            _log.warning("%s:%d: %s", self._path, warning.line, warning)
        return self._accept(self._build(config, 1))

    def reload(self, current: Generation) -> Generation:
        """Return the new generation, or the current one when the file is bad or changes what needs a restart."""
        named: tuple[Path, ...] = ()
        try:
            config = self._adapt(self._read((*current.config.watched, *self._seen)))
            named = config.watched
            refuse_what_needs_a_restart(current.config, config)
            generation = self._build(config, current.number + 1)
        except (ConfigError, Unusable) as error:
            self._watch(current.config.watched, error.watched if isinstance(error, ConfigError) else named)
            self.refuse(current, str(error))
            return current
        self._watch(config.watched)
        _log.info("generation %d: %s", generation.number, describe_change(current.config, config))
        return self._accept(generation)

    def refuse(self, current: Generation, reason: str) -> None:
        """Report that the file is not in force, and why; the current generation goes on."""
        self._readiness.reload_failures += 1
        self._readiness.reload_failed = reason
        self._readiness.generation, self._readiness.loaded_at = current.number, current.loaded_at
        _log.error("reload refused, generation %d goes on: %s", current.number, reason)

    def _read(self, watched: Iterable[Path]) -> Config:
        """Return the configuration, whose files are polled before they are read, so that a later change is seen.

        The file is read again when it names one that was not polled. Raises: `ConfigError`.
        """
        self._seen = self._poll(watched)
        try:
            config = load(self._path)
            named = config.watched
        except ConfigError as error:
            if self._seen.keys() >= set(error.watched):
                raise
            named = error.watched
        else:
            if self._seen.keys() >= set(named):
                return config
        return self._read((*self._seen, *named))

    def _watch(self, *watched: Iterable[Path]) -> None:
        """Poll the file and these from now on, and no other of those that were polled."""
        self._seen = {path: self._seen[path] for path in dict.fromkeys((self._path, *chain(*watched)))}

    def _accept(self, generation: Generation) -> Generation:
        self._readiness.generation = generation.number
        self._readiness.loaded_at = generation.loaded_at
        self._readiness.reload_failed = ""
        return generation

    def _build(self, config: Config, number: int) -> Generation:
        pools = {}
        for name, pool in config.pools.items():
            pools[name] = Pool(pool, [self._endpoints.member(each.url, pool) for each in pool.endpoints])
        if config.server.tls is not None:
            listener_tls(config.server.tls)
        return Generation(number, config, RouteTable(config.routes), pools, time.time())

    async def changed(self) -> None:
        """Return when the file or one it names has changed, and is the same in two polls."""
        previous = self._seen
        while True:
            await asyncio.sleep(_POLL_INTERVAL_S)
            now = await asyncio.to_thread(self._poll, tuple(self._seen))
            if now != self._seen and now == previous:
                return
            previous = now

    def _poll(self, watched: Iterable[Path]) -> dict[Path, FileState]:
        return {path: state_of(path) for path in (self._path, *watched)}


def state_of(path: Path) -> FileState:
    """Return what differs between two states of a file; `stat` follows the links of ConfigMaps."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ctime_ns, found.st_size, found.st_ino


def refuse_what_needs_a_restart(old: Config, new: Config) -> None:
    """Raise `Unusable` for a change that a running process cannot make."""
    changed = list_restarts(old, new)
    if changed:
        raise Unusable(f"{', '.join(changed)} changed: that needs a restart")
    if not {route.name for route in old.routes} & {route.name for route in new.routes}:
        raise Unusable("routes: every route of before is gone: restart if that is meant")
