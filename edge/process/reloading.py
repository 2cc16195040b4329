"""routes.toml read again while the process runs: whole or not at all, at SIGHUP and when a file has changed."""

import asyncio
import gc
import logging
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Final

from edge.config.changes import describe_change, list_restarts
from edge.config.problems import ConfigError
from edge.config.reading import load
from edge.config.settings import Config
from edge.errors import Unusable
from edge.garbage import no_collection
from edge.generation import Generation
from edge.process.admin import Readiness
from edge.process.certificates import listener_tls
from edge.routing import RouteTable
from edge.upstream.endpoints import Endpoints
from edge.upstream.pools import Pool

_log = logging.getLogger(__name__)

_POLL_INTERVAL_S: Final = 1.0  # of routes.toml and the files it names
_SWITCH_INTERVAL_S: Final = 0.0005
_GC_THRESHOLDS: Final = (2000, 10**6, 10**6)
_A_STEP: Final = 50  # pools
_PARTS_A_STEP: Final = 200  # that are freed, in half a millisecond
_MAX_PROBLEMS: Final = 20  # of a file, in the log and on `/readyz`

FileState = tuple[int, int, int]  # time of change (of permissions too) in ns, size, inode; all 0: there is no file


class Reloader:
    """Reads the file again when it changed, and keeps the generation that works.

    Who puts a generation in force reports that to `accept`, or to `refuse` that it could not.
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
        self._change = ""  # what the coming generation changes
        self.coming: Generation | None = None  # that is made ready, or in force already

    async def first(self) -> Generation:
        """Return the first generation; raises `ConfigError` or `Unusable`."""
        with no_collection():  # ten thousand routes are just being made
            generation = self._read(())
        for warning in generation.config.warnings:
            _log.warning("%s:%d: %s", self._path, warning.line, warning)
        await self._fill(generation, {})
        return generation

    async def reload(self, current: Generation) -> Generation:
        """Return the new generation, or the current one when the file is bad or changes what needs a restart.

        The file is read on a thread, and its pools are made in steps: however long it is, the loop is held for
        milliseconds at most.
        """
        named: tuple[Path, ...] = ()
        try:
            with _short_turns():
                generation = await asyncio.to_thread(self._read, (*current.config.watched, *self._seen), current)
                named = generation.config.watched
                self._change = await asyncio.to_thread(_change, current.config, generation.config)
            await self._fill(generation, current.pools)
        except (ConfigError, Unusable) as error:
            self._watch(current.config.watched, error.watched if isinstance(error, ConfigError) else named)
            self.refuse(current, _reason(error))
            return current
        self._watch(named)
        return generation

    def refuse(self, current: Generation, reason: str) -> None:
        """Report that the file is not in force, and why; the current generation goes on."""
        self._readiness.reload_failures += 1
        self._readiness.reload_failed = reason
        _log.error("reload refused, generation %d goes on: %s", current.number, reason)

    def _read(self, watched: Iterable[Path], current: Generation | None = None) -> Generation:
        """Return a generation without its pools; every file is polled before it is read, so a later change is seen.

        Raises: `ConfigError`.
        """
        seen = self._seen = self._poll(watched)
        config = self._adapt(load(self._path, before_file=lambda path: seen.setdefault(path, state_of(path))))
        if current is not None:
            config = config.keeping(current.config)
        number = current.number + 1 if current is not None else 1
        return Generation(number, config, RouteTable(config.routes), {}, time.time())

    def _watch(self, *watched: Iterable[Path]) -> None:
        """Poll the file and these from now on, and no other of those that were polled."""
        self._seen = {path: self._seen[path] for path in dict.fromkeys((self._path, *chain(*watched)))}

    def accept(self, generation: Generation) -> None:
        """Report that a generation is in force."""
        if self._change:
            _log.info("generation %d: %s", generation.number, self._change)
        self._readiness.generation = generation.number
        self._readiness.loaded_at = generation.loaded_at
        self._readiness.reload_failed = ""

    async def _fill(self, generation: Generation, known: Mapping[str, Pool]) -> None:
        """Give a generation its pools, of those that are known the ones that stay as they are; raises `Unusable`."""
        if generation.config.server.tls is not None:
            listener_tls(generation.config.server.tls)
        self.coming = generation
        for at, (name, config) in enumerate(generation.config.pools.items()):
            endpoints = [self._endpoints.member(each.url, config) for each in config.endpoints]
            pool = known.get(name)
            if pool is None or not pool.stays(config, endpoints):
                pool = Pool(config, endpoints, pool)
            generation.pools[name] = pool
            if at % _A_STEP == _A_STEP - 1:
                await asyncio.sleep(0)

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


def retire(generation: Generation) -> None:
    """Have what a generation is made of freed in pieces, once no request has it any more.

    At once, with the last request that began with it, ten thousand routes would hold the loop up for 15 ms.
    """
    freeing = weakref.finalize(generation, _free, generation.parts(), asyncio.get_running_loop())
    freeing.atexit = False


def _free(parts: list[object], loop: asyncio.AbstractEventLoop) -> None:
    """Free some parts, and the others in the loop's next turns; the collector may call this on any thread."""
    del parts[-_PARTS_A_STEP:]
    if parts and not loop.is_closed():
        loop.call_soon_threadsafe(_free, parts, loop)


@contextmanager
def _short_turns() -> Iterator[None]:
    """Let the loop interrupt a thread that computes within half a millisecond; CPython's own interval is 5 ms.

    A collection of garbage is not interrupted: there are many of few objects, and none of what survived.
    """
    interval_s, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    gc.set_threshold(*_GC_THRESHOLDS)
    try:
        yield
    finally:
        sys.setswitchinterval(interval_s)
        gc.set_threshold(*thresholds)


def _change(old: Config, new: Config) -> str:
    """Return what a reload changes; raises `Unusable` for what it cannot."""
    refuse_what_needs_a_restart(old, new)
    return describe_change(old, new)


def _reason(error: ConfigError | Unusable) -> str:
    """Return why a file is not in force; of a file with thousands of problems, the first ones."""
    lines = str(error).splitlines()
    more = len(lines) - _MAX_PROBLEMS
    return "\n".join([*lines[:_MAX_PROBLEMS], f"{more} more: `edge check` lists them"] if more > 0 else lines)


def unexpected(error: Exception) -> str:
    """Return why a file is not in force where that is a fault of the edge's own; the log has its traceback."""
    return (
        f"the edge failed to take it over ({type(error).__name__}, the log has the traceback), which is no fault of "
        "the file: send SIGHUP to have it read again, or restart"
    )


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
