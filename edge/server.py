"""The process: listeners, reload, drain. The only place that wires the parts together."""

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import jwt
import orjson
from aiohttp import http_parser, web
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from edge.admin import Health, admin_handler
from edge.admission import Admission
from edge.changes import describe_change
from edge.client import BodyMemory, ClientServer
from edge.config import Address, Config, ConfigError, KeysConfig, TlsConfig, UsageConfig, load
from edge.credentials import Authenticator
from edge.discovery import Discovery
from edge.journal import Journal
from edge.keys_http import HttpKeyStore
from edge.keys_redis import RedisKeyStore
from edge.keys_sqlite import SqliteKeyStore
from edge.keystores import Changes, KeyStore
from edge.probes import HealthProbes
from edge.proxy import Generation, Proxy, new_request_id
from edge.relay import Relay
from edge.revocations import RevocationChannel, connect, disconnect, reason_of
from edge.routing import RouteTable
from edge.shared_limits import SharedLimits
from edge.shipping import Shipper, Sink
from edge.sink_http import HttpSink
from edge.sink_redis import RedisSink
from edge.telemetry import AccessLog, Metrics, counter, gauge
from edge.tokens import TokenVerifier
from edge.upstream import Endpoint, Endpoints, Pool

_log = logging.getLogger(__name__)

_BACKLOG: Final = 4096  # connections the kernel holds while the loop is busy; capped by net.core.somaxconn
_LOOK_INTERVAL_S: Final = 1.0  # at routes.toml and the files it names
_SPARE_DESCRIPTORS: Final = 64  # for the store, the log, the listeners
_FIRST_PASSED_DESCRIPTOR: Final = 3  # sd_listen_fds(3)
_SHARED_TIMEOUT_S: Final = 2.0
_DRAIN_INTERVAL_S: Final = 0.1  # of the journal's buffer
_DRAINS_A_SYNC: Final = 10  # a second: what a crash of the machine can take
_SHIP_PATIENCE_S: Final = 2.0  # for the last records at a stop; what is left is shipped by the next start
_NOT_CONNECTED: Final = "not connected yet"
_CUT_GRACE_S: Final = 1.0  # for the last bytes of cut answers

FileState = tuple[str, int, int, int]  # path, time of change in ns, size, inode


class StartError(Exception):
    """The process cannot start; the message tells an operator what to change."""


class Reloader:
    """Reads the file again when it changed, and keeps the generation that works.

    `adapt` is what the command line changes of the file. Raises nothing: a bad file is told in the log and in `health`.
    """

    def __init__(self, path: Path, adapt: Callable[[Config], Config], endpoints: Endpoints, health: Health) -> None:
        self._path = path
        self._adapt = adapt
        self._endpoints = endpoints
        self._health = health
        self._seen: tuple[FileState, ...] = ()
        self.failures = 0

    def first(self) -> Generation:
        """Return the first generation; raises `ConfigError` or `StartError`."""
        config = self._adapt(load(self._path))
        self._seen = self._look(config.watched)
        for warning in config.warnings:
            _log.warning("%s:%d: %s", self._path, warning.line, warning)
        return self._accept(self._build(config, 1))

    def reload(self, current: Generation) -> Generation:
        """Return the new generation, or the current one when the file is bad or changes what needs a restart."""
        before = {state[0]: state for state in self._look(self._watched(current))}
        try:
            config = self._adapt(load(self._path))
            refuse_what_needs_a_restart(current.config, config)
            generation = self._build(config, current.number + 1)
        except (ConfigError, StartError) as error:
            self.failures += 1
            self._health.reload_failed = str(error)
            watched = (*current.config.watched, *(error.watched if isinstance(error, ConfigError) else ()))
            self._note(watched, before)
            _log.error("reload refused, generation %d goes on: %s", current.number, error)
            return current
        self._note(config.watched, before)
        _log.info("generation %d: %s", generation.number, describe_change(current.config, config))
        return self._accept(generation)

    def _note(self, watched: Sequence[Path], before: Mapping[str, FileState]) -> None:
        """Remember the files as they were before they were read, so that a change since then is seen."""
        self._seen = tuple(before.get(state[0], state) for state in self._look(watched))

    def _accept(self, generation: Generation) -> Generation:
        self._health.generation = generation.number
        self._health.loaded_at = generation.loaded_at
        self._health.reload_failed = ""
        return generation

    def _build(self, config: Config, number: int) -> Generation:
        pools = {}
        for name, pool in config.pools.items():
            try:
                pools[name] = Pool(pool, [self._endpoints.member(each.url, pool.ca_file) for each in pool.endpoints])
            except OSError as error:
                raise StartError(f"pools.{name}.ca_file: cannot be used as PEM certificates ({error})") from None
        if config.server.tls is not None:
            _listener_tls(config.server.tls)
        return Generation(number, config, RouteTable(config.routes), pools, time.time())

    async def changed(self, current: Generation) -> None:
        """Return when the file or one it names has changed and two looks agree."""
        previous = self._seen
        while True:
            await asyncio.sleep(_LOOK_INTERVAL_S)
            now = await asyncio.to_thread(self._look, self._watched(current))
            if now != self._seen and now == previous:
                return
            previous = now

    def _watched(self, current: Generation) -> Sequence[Path]:
        known = [Path(name) for name, *_ in self._seen[1:]]
        return tuple(dict.fromkeys((*current.config.watched, *known)))

    def _look(self, watched: Sequence[Path]) -> tuple[FileState, ...]:
        """Return what tells one state of the files from another; `stat` follows the links of ConfigMaps."""
        return tuple(_look_at(path) for path in (self._path, *dict.fromkeys(watched)))


def _look_at(path: Path) -> FileState:
    try:
        found = path.stat()
    except OSError:
        return str(path), 0, 0, 0
    return str(path), found.st_mtime_ns, found.st_size, found.st_ino


def refuse_what_needs_a_restart(old: Config, new: Config) -> None:
    """Raise `StartError` for a change that a running process cannot make."""
    changed = [
        name
        for name, before, after in (
            ("server.listen", old.server.listen, new.server.listen),
            ("server.admin", old.server.admin, new.server.admin),
            ("server.tls", old.server.tls is None, new.server.tls is None),
            ("keys.store", old.keys.store, new.keys.store),
            ("keys.store_ca_file", old.keys.store_ca_file, new.keys.store_ca_file),
            ("jwt", old.jwt is None, new.jwt is None),
            ("jwt.ca_file", old.jwt and old.jwt.ca_file, new.jwt and new.jwt.ca_file),
            ("usage", replace(old.usage, sink_token=None), replace(new.usage, sink_token=None)),
            ("shared", old.shared, new.shared),
        )
        if before != after
    ]
    if changed:
        raise StartError(f"{', '.join(changed)} changed: that needs a restart")
    if not {route.name for route in old.routes} & {route.name for route in new.routes}:
        raise StartError("routes: every route of before is gone: restart if that is meant")


class Server:
    """One edge process, from its file to its end."""

    def __init__(self, path: Path, adapt: Callable[[Config], Config] = lambda config: config, log_to: int = 1) -> None:
        if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
            raise StartError(
                "aiohttp runs without its C parser, which is lenient where an edge must not be: reinstall it"
            )
        self._loop = asyncio.get_running_loop()
        self.health = Health()
        self.metrics = Metrics()
        self.endpoints = Endpoints(self._loop)
        self._access_log = AccessLog(log_to)
        self._reloader = Reloader(path, adapt, self.endpoints, self.health)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._reload_now = asyncio.Event()
        self._tls: ssl.SSLContext | None = None
        self._channel: RevocationChannel | None = None
        self._shared_lost = _NOT_CONNECTED
        self.shared_limits: SharedLimits | None = None
        self._sink: Sink | None = None
        self._shipper: Shipper | None = None
        self._listeners: list[asyncio.Server] = []
        self.addresses: list[str] = []
        self.admin_address = ""

    @property
    def generation(self) -> Generation:
        """The configuration that new requests get."""
        return self.proxy.generation

    async def run(self, ready: Callable[["Server"], None] = lambda server: None) -> None:
        """Serve until `stop`.

        Raises: `ConfigError`, `StartError`, `KeyStoreUnusable`, `JournalUnusable` when it cannot start.
        """
        limit = _raise_descriptor_limit()
        generation = self._reloader.first()
        config = generation.config
        store = self._store = _key_store(config.keys)
        self._tokens = _token_verifier(config, self._loop.time)
        self.authenticator = Authenticator(config.keys, store, self._loop.time, time.time, self._tokens)
        self.memory = BodyMemory(config.server.body_memory_bytes)
        self._unix_time = _steady_unix_time()
        self.admission = Admission(config.limits, self._unix_time)
        self.journal = self._record(config.usage)
        self.proxy = Proxy(
            generation,
            self.authenticator,
            self.admission,
            self.endpoints,
            self.journal,
            self.memory,
            self.metrics,
            self._access_log,
        )
        self.clients = ClientServer(
            self.proxy.handle,
            new_request_id=new_request_id,
            client_idle_timeout_s=config.server.client_idle_timeout_s,
            header_timeout_s=config.server.header_timeout_s,
            max_connections=config.server.max_connections or max((limit - _SPARE_DESCRIPTORS) // 2 - 1, 1),
        )
        self.probes = HealthProbes()
        self.discovery = Discovery(self.endpoints, self._members_changed)
        self.metrics.gauges.append(self._gauges)
        self.health.details = self._details
        # Before anybody can connect: who is told to stop in its first milliseconds drains too.
        for name, act in ((signal.SIGTERM, self.stop), (signal.SIGINT, self.stop), (signal.SIGHUP, self.reload)):
            self._loop.add_signal_handler(name, act)
        try:
            await store.open()
            await self._share(config)
            if self._tokens is not None:
                await self._tokens.open()
            await self.discovery.learn(generation.pools.values())
            await self._listen(config)
            _spare_the_collector()
            self.discovery.apply(generation.pools.values())
            self.probes.apply(generation.pools.values())
            await self._serve(ready)
        finally:
            await self._end()

    async def _serve(self, ready: Callable[["Server"], None]) -> None:
        async with asyncio.TaskGroup() as tasks:
            owned = [
                tasks.create_task(self._access_log.run(), name="access log"),
                tasks.create_task(self._watch_file(), name="reload"),
                tasks.create_task(self._keep_journal(), name="journal"),
            ]
            if self._shipper is not None:
                owned.append(tasks.create_task(self._shipper.run(), name="shipper"))
            if self.shared_limits is not None:
                owned.append(tasks.create_task(self.shared_limits.run(), name="shared limits"))
            _log.info("listening on %s, admin on %s", ", ".join(self.addresses), self.admin_address)
            ready(self)
            await self._stop.wait()
            await self.drain()
            for task in owned:
                task.cancel()

    def stop(self) -> None:
        """Begin to drain; a second call ends the wait for the balancer and for running answers."""
        if self._stop.is_set():
            self._hurry.set()
        else:
            self._stop.set()

    def reload(self) -> None:
        """Read the file again at once."""
        self._reload_now.set()

    # --- listeners

    async def _listen(self, config: Config) -> None:
        server = config.server
        if server.tls is not None:
            self._tls = _listener_tls(server.tls)
        try:
            for sock in _passed_sockets() or [_bind(address) for address in server.listen]:
                listener = await self._loop.create_server(
                    self.clients, sock=sock, ssl=self._tls, backlog=_BACKLOG, start_serving=False
                )
                self._listeners.append(listener)
                self.addresses.append(_name_of(sock))
            admin_socket = _bind(server.admin)
        except OSError as error:
            raise StartError(f"cannot listen: {error.strerror or error}") from None
        self.admin_address = _name_of(admin_socket)
        handler = admin_handler(self.health, self.metrics, self.purge)
        self._admin_server = web.Server(handler, access_log=None)
        self._admin = await self._loop.create_server(self._admin_server, sock=admin_socket)
        for listener in self._listeners:
            await listener.start_serving()

    async def _watch_file(self) -> None:
        while True:
            changed = self._loop.create_task(self._reloader.changed(self.generation), name="watch routes.toml")
            asked = self._loop.create_task(self._reload_now.wait(), name="wait for SIGHUP")
            try:
                await asyncio.wait((changed, asked), return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
                asked.cancel()
            self._reload_now.clear()
            generation = self._reloader.reload(self.generation)
            await self.discovery.learn(generation.pools.values())
            self._apply(generation)

    def _apply(self, generation: Generation) -> None:
        """Let new requests have a generation; one reference is swapped, and running requests keep theirs."""
        if generation is self.generation:
            return
        server = generation.config.server
        self.proxy.generation = generation
        self.endpoints.keep_only(generation.pools.values())
        self.discovery.apply(generation.pools.values())
        self.probes.apply(generation.pools.values())
        self.authenticator.reconfigure(generation.config.keys)
        self.admission.reconfigure(generation.config.limits)
        if isinstance(self._store, HttpKeyStore):
            self._store.reconfigure(generation.config.keys)
        if isinstance(self._sink, HttpSink):
            self._sink.reconfigure(generation.config.usage.sink_token)
        if self._tokens is not None and generation.config.jwt is not None:
            self._tokens.reconfigure(generation.config.jwt)
        self.memory.limit_bytes = server.body_memory_bytes
        self.clients.reconfigure(server.client_idle_timeout_s, server.header_timeout_s, server.max_connections)
        if self._tls is not None and server.tls is not None:
            self._tls.load_cert_chain(server.tls.certificate, server.tls.private_key)  # proved when it was built

    # --- usage

    def _record(self, config: UsageConfig) -> Journal:
        """Return the journal, and have it shipped where the file says so."""
        if config.sink:
            self._sink = _sink(config)
        journal = Journal(config.journal, config.rotate_bytes, config.when_full, ships=self._sink is not None)
        if self._sink is not None:
            self._shipper = Shipper(config.journal, journal.token, journal.adopted, self._sink)
        return journal

    async def _keep_journal(self) -> None:
        while True:
            for _ in range(_DRAINS_A_SYNC):
                await asyncio.sleep(_DRAIN_INTERVAL_S)
                self.journal.drain()
            await asyncio.to_thread(self.journal.sync)
            self.journal.retry()

    async def _end_journal(self) -> None:
        """Deliver what is left, as far as that goes quickly, and close the journal: the last thing that is done."""
        self.journal.retry()
        if self._shipper is not None:
            await self._shipper.flush(_SHIP_PATIENCE_S)
        if self._sink is not None:
            await self._sink.close()
        self.journal.close()

    # --- what is shared

    async def _share(self, config: Config) -> None:
        """Listen to what other processes say of keys, and count with them."""
        if config.shared.redis:
            self._shared_client = connect(config.shared.redis, _SHARED_TIMEOUT_S)
            self.shared_limits = SharedLimits(self._shared_client, self.admission, self._unix_time)
            self._channel = RevocationChannel(self._shared_client)
            self._channel.changed = self.authenticator.forget
            self._channel.outage = self._shared_outage
            self._channel.open()

    def _shared_outage(self, reason: str) -> None:
        """Note whether news of keys arrives; that Redis itself is gone is told where limits are shared."""
        self._shared_lost = reason

    async def purge(self, changes: Changes) -> dict[str, object]:
        """Forget keys here and, over `shared.redis`, everywhere; return how many, and how many processes heard."""
        done: dict[str, object] = {"forgotten": self.authenticator.forget(changes)}
        if self._channel is not None:
            try:
                done["processes"] = await self._channel.publish(changes)
            except Exception as error:  # redis-py's own are not imported where it may be absent
                done["processes"] = 1
                done["problem"] = f"other processes could not be told: {reason_of(error)}"
        return done

    def _members_changed(self) -> None:
        """Take over the members that DNS names now."""
        self.endpoints.keep_only(self.generation.pools.values())
        self.probes.apply(self.generation.pools.values())

    # --- the end

    async def drain(self) -> None:
        """Stop without hurting anybody: be unready, take no new connection, wait for answers, cut what is too long."""
        config = self.generation.config.server
        self.health.draining = self.proxy.draining = True
        _log.info("draining: %d requests, %d connections", self.proxy.in_flight, len(self.clients.clients))
        await self._hurried(asyncio.sleep(config.shutdown_delay_s))
        for listener in self._listeners:
            listener.close()
        for client in list(self.clients.clients):
            client.close_if_idle()
        if await self._hurried(asyncio.wait_for(self.clients.wait_empty(), config.drain_timeout_s)):
            return
        clients = list(self.clients.clients)
        _log.warning("drain: %d connections are cut", len(clients))
        for client in clients:
            if isinstance(client.answering, Relay):
                client.answering.cut()
        try:
            await asyncio.wait_for(self.clients.wait_empty(), _CUT_GRACE_S)
        except TimeoutError:
            self.proxy.cutting = True
            for client in list(self.clients.clients):
                client.abort()
            await self.clients.wait_empty()

    async def _hurried(self, waiting: Any) -> bool:
        """Wait, unless a second signal ends it; return whether it came to its own end."""
        task = self._loop.create_task(waiting, name="drain")
        hurry = self._loop.create_task(self._hurry.wait(), name="second signal")
        await asyncio.wait((task, hurry), return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not task.done():
            task.cancel()
            return False
        return task.exception() is None

    async def _end(self) -> None:
        for listener in self._listeners:
            listener.close()
        await self.authenticator.close()
        if self._tokens is not None:
            await self._tokens.close()
        if self._channel is not None:
            await self._channel.close()
            await disconnect(self._shared_client)
        await self._store.close()
        await self.discovery.close()
        await self.probes.close()
        self.endpoints.close()
        if hasattr(self, "_admin"):
            self._admin.close()
            await self._admin_server.shutdown(0.1)
        await self.proxy.wait_idle()  # cancelled handlers take their closing step
        await self._access_log.close()
        await self._end_journal()

    # --- what is shown

    def _details(self) -> list[tuple[str, str]]:
        return [
            ("routes", str(len(self.generation.config.routes))),
            ("requests in flight", str(self.proxy.in_flight)),
            ("connections", str(len(self.clients.clients))),
            ("key store", f"down: {self.authenticator.outage}" if self.authenticator.outage else "ok"),
            *(
                ()
                if self._tokens is None
                else (("token keys", f"{self._tokens.key_count} {self._tokens.outage}".strip()),)
            ),
            *(() if self._channel is None else (("shared redis", self._shared_lost or "ok"),)),
            (
                "journal",
                f"{self.journal.outage}, {self.journal.lines_waiting} lines wait in memory"
                if self.journal.outage
                else "ok",
            ),
            *(
                ()
                if self._shipper is None
                else (("usage sink", self._shipper.outage or f"ok, {self._shipper.lag_bytes} bytes to go"),)
            ),
            *((f"endpoint {each.authority}", each.health.describe(self._loop.time())) for each in self._unwell()),
        ]

    def _unwell(self) -> list[Endpoint]:
        now = self._loop.time()
        return [each for each in self.endpoints.states() if not each.health.admits(now)]

    def _gauges(self) -> Iterable[Metric]:
        counts = self.authenticator.counts
        yield gauge("edge_requests_in_flight", "Requests being answered.", self.proxy.in_flight)
        yield gauge("edge_client_connections", "Open connections of clients.", len(self.clients.clients))
        yield counter("edge_connections_accepted", "Connections accepted.", self.clients.accepted_connections)
        yield counter("edge_connections_refused", "Connections over max_connections.", self.clients.refused_connections)
        yield counter("edge_malformed_requests", "Requests that are no HTTP.", self.clients.malformed_requests)
        yield gauge("edge_request_body_bytes", "Request bodies held now.", self.memory.used_bytes)
        yield counter("edge_key_cache_hits", "Keys found in the cache.", counts.hits)
        yield counter("edge_key_cache_negative_hits", "Keys known to be unknown.", counts.negative_hits)
        yield counter("edge_key_lookups", "Keys asked of the store.", counts.misses)
        yield counter("edge_key_lookup_failures", "Look-ups the store could not answer.", counts.failures)
        declined = "Keys told to come back without a look-up: the store is down, or too many are guessed."
        yield counter("edge_key_lookups_declined", declined, counts.declined)
        yield counter("edge_key_stale_answers", "Known keys that went on while the store was down.", counts.stale)
        yield gauge("edge_key_store_up", "1, or 0 while the key store does not answer.", not self.authenticator.outage)
        if self._tokens is not None:
            yield gauge("edge_token_keys", "Keys of the issuer that can prove tokens.", self._tokens.key_count)
            yield gauge("edge_token_keys_up", "1, or 0 while jwt.jwks cannot be had.", not self._tokens.outage)
        if self._channel is not None:
            yield gauge("edge_shared_redis_up", "1, or 0 while shared.redis does not answer.", not self._shared_lost)
        yield gauge(
            "edge_limit_counters",
            "Users and keys that are counted now, by limit and route.",
            self.admission.counter_count,
        )
        if self.shared_limits is not None:
            shared_up = not self.shared_limits.outage
            yield gauge("edge_shared_limits_up", "1, or 0 while limits count this process alone.", shared_up)
        journal, shipper = self.journal, self._shipper
        yield counter("edge_usage_records_opened", "Requests accepted and recorded.", journal.records_open)
        yield counter("edge_usage_records_closed", "Records that say how a request ended.", journal.records_closed)
        yield counter("edge_usage_records_recovered", "Records ended for a process that crashed.", journal.recovered)
        yield counter("edge_usage_write_errors", "Writes to the journal that failed.", journal.write_errors)
        yield gauge("edge_usage_lines_waiting", "Lines in memory, for a disk with room.", journal.lines_waiting)
        yield counter("edge_usage_bad_lines", "Lines of crashed processes that cannot be read.", journal.bad_lines)
        if shipper is not None:
            yield counter("edge_usage_shipped", "Records that the sink has acknowledged.", shipper.shipped)
            yield gauge("edge_usage_unshipped_bytes", "What stands in the journal only.", shipper.lag_bytes)
            yield gauge("edge_usage_unshipped_age_seconds", "The oldest record that is not delivered.", shipper.lag_s)
            yield gauge("edge_usage_sink_up", "1, or 0 while the sink does not acknowledge.", not shipper.outage)
        yield counter("edge_access_log_dropped", "Log lines dropped for a stuck reader.", self._access_log.dropped)
        yield gauge(
            "edge_config_last_reload_successful", "1, or 0 when the file is bad.", not self.health.reload_failed
        )
        yield counter("edge_config_reload_failures", "Reloads refused.", self._reloader.failures)
        yield gauge("edge_config_last_reload_success_timestamp_seconds", "Unix time.", self.health.loaded_at)
        yield gauge("edge_config_generation", "Configurations loaded since the start.", self.health.generation)
        in_flight = GaugeMetricFamily("edge_upstream_in_flight", "Requests at an endpoint.", labels=("endpoint",))
        idle = GaugeMetricFamily("edge_upstream_idle_connections", "Idle connections.", labels=("endpoint",))
        out = GaugeMetricFamily("edge_upstream_out", "1 while an endpoint is not asked.", labels=("endpoint",))
        ejections = CounterMetricFamily("edge_upstream_ejections", "Times it was ejected.", labels=("endpoint",))
        now = self._loop.time()
        totals: dict[str, list[int]] = {}
        for endpoint in self.endpoints.states():
            total = totals.setdefault(endpoint.authority, [0, 0, 0, 0])
            total[0] += endpoint.in_flight
            total[1] += len(endpoint.connections)
            total[2] |= not endpoint.health.admits(now)
            total[3] += endpoint.health.total_ejections
        for name, numbers in totals.items():
            in_flight.add_metric((name,), numbers[0])
            idle.add_metric((name,), numbers[1])
            out.add_metric((name,), numbers[2])
            ejections.add_metric((name,), numbers[3])
        waiting = GaugeMetricFamily("edge_pool_waiting", "Requests that wait for a place.", labels=("pool",))
        for name, pool in self.generation.pools.items():
            waiting.add_metric((name,), pool.waiting)
        yield from (in_flight, idle, out, ejections, waiting)


def _key_store(config: KeysConfig) -> KeyStore:
    """Return the store that `keys.store` names."""
    if config.store.path is not None:
        return SqliteKeyStore(config.store.path)
    return HttpKeyStore(config) if config.store.scheme.startswith("http") else RedisKeyStore(config)


def _sink(config: UsageConfig) -> Sink:
    """Return the sink that `usage.sink` names."""
    if config.sink.startswith("http"):
        return HttpSink(config.sink, config.sink_token, config.sink_ca_file)
    return RedisSink(config.sink, config.sink_ca_file)


def _token_verifier(config: Config, clock: Callable[[], float]) -> TokenVerifier | None:
    """Return what verifies tokens, None when there are to be none; raises `StartError`."""
    if config.jwt is None:
        return None
    missing = [name for name in config.jwt.algorithms if name not in jwt.algorithms.get_default_algorithms()]
    if missing:
        raise StartError(f'jwt: {", ".join(missing)} needs the package cryptography: pip install "edge[jwt]"')
    return TokenVerifier(config.jwt, clock)


def _steady_unix_time() -> Callable[[], float]:
    """Return a clock of Unix seconds that no correction of the machine's clock moves."""
    offset_s = time.time() - time.monotonic()
    return lambda: time.monotonic() + offset_s


def _raise_descriptor_limit() -> int:
    """Raise the limit of open descriptors to its hard value and return it; every stream holds two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _spare_the_collector() -> None:
    """Keep what lives for ever out of the garbage collector's sight, and let it look less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _passed_sockets() -> list[socket.socket]:
    """Return the listening sockets that systemd hands over (sd_listen_fds(3)): no connection is lost at a restart."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    sockets = [socket.socket(fileno=_FIRST_PASSED_DESCRIPTOR + index) for index in range(count)]
    for sock in sockets:
        sock.setblocking(False)
    return sockets


def _bind(address: Address) -> socket.socket:
    if address.path is not None:
        if address.path.is_socket():
            address.path.unlink()
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(address.path))
    else:
        family, kind, protocol, _, at = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(at)
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"{address}: {error.strerror}") from None
    sock.setblocking(False)
    return sock


def _name_of(sock: socket.socket) -> str:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    return str(Address(name[0], name[1]))


def _listener_tls(tls: TlsConfig) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(tls.certificate, tls.private_key)
    except (OSError, ssl.SSLError) as error:
        raise StartError(f"server.tls: the certificate and key cannot be used ({error})") from None
    return context


# --- the log of the process itself


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "event": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return orjson.dumps(line).decode()


def log_to_stderr() -> None:
    """Send the process's own log to standard error, one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def listening_on(listen: Address | None, admin: Address | None) -> Callable[[Config], Config]:
    """Return what the command line's addresses make of a file."""

    def adapt(config: Config) -> Config:
        server = config.server
        server = replace(server, listen=(listen,) if listen else server.listen, admin=admin or server.admin)
        return replace(config, server=server)

    return adapt
