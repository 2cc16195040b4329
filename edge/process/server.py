"""The process: listeners, reload, drain. The only place that wires the parts together."""

import asyncio
import gc
import logging
import signal
import ssl
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edge.client.body import BodyMemory
from edge.client.server import MOST_REFUSED, ClientServer
from edge.config.process_settings import ServerConfig, UsageConfig
from edge.config.redis_urls import names_at
from edge.config.settings import Config
from edge.errors import Unusable
from edge.forwarding import Forwarder
from edge.generation import Generation
from edge.journal.index import UsageIndex
from edge.journal.journal import Journal
from edge.journal.shipping import Shipper
from edge.journal.sinks.protocol import Sink
from edge.journal.sinks.table import sink_of
from edge.keys.authenticator import Authenticator
from edge.keys.revocations import RevocationChannel
from edge.keys.stores.protocol import Invalidation
from edge.keys.stores.table import key_store
from edge.keys.tokens import token_verifier
from edge.limits.admission import IDLE_INTERVAL_S, Admission
from edge.limits.shared import SharedLimits
from edge.own_answers import OwnAnswers
from edge.process.admin import Readiness, admin_handler, basic_routes
from edge.process.api.keys import KeyApi
from edge.process.certificates import Certificates, listener_tls, load_certificate
from edge.process.drain import GRACE_S, Drain
from edge.process.ending import Ending
from edge.process.key_uses import KeyUses
from edge.process.listeners import (
    AdminListener,
    bind,
    name_of,
    passed_sockets,
    raise_descriptor_limit,
)
from edge.process.parts import Parts
from edge.process.quotas import JournalQuotas
from edge.process.reloading import Reloader, retire, unexpected
from edge.process.snapshot import Snapshots
from edge.process.start_checks import check_interpreter
from edge.process.status import report_all
from edge.process.status_page import status_routes
from edge.process.supervisor import notify
from edge.proxy import Proxy
from edge.stage import Lifecycle
from edge.tasks import Hung, in_steps, keep_running, repeat_in_steps
from edge.telemetry.access_log import AccessLog
from edge.telemetry.loop_lag import LoopLag
from edge.telemetry.metrics import FOLD_INTERVAL_S, Metrics
from edge.telemetry.tracing import Tracing
from edge.tls import client_tls
from edge.upstream.catalogue import Catalogue
from edge.upstream.discovery import Discovery
from edge.upstream.endpoints import Endpoints
from edge.upstream.kept_responses import KeptResponses
from edge.upstream.probes import HealthProbes
from edge.valkey import connect, disconnect, reason_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

_log = logging.getLogger(__name__)

_BACKLOG: Final = 4096  # connections the kernel holds while the loop is busy; capped by net.core.somaxconn
_SPARE_DESCRIPTORS: Final = 64  # for the store, the log, the listeners, and connections that are being refused
_SHARED_TIMEOUT_S: Final = 2.0
_DRAIN_INTERVAL_S: Final = 0.1  # of the journal's buffer
_DRAINS_A_SYNC: Final = 10  # a second: what a crash of the machine can take
_SHIP_PATIENCE_S: Final = 2.0  # for the last records at a stop; what is left is shipped by the next start
_LOG_PATIENCE_S: Final = 2.0  # for the last lines of the access log, when its reader is stuck
_PART_PATIENCE_S: Final = 2.5  # for parts to close
_HANDLER_PATIENCE_S: Final = 1.0  # for requests to take their closing step
_GC_THRESHOLDS: Final = (50_000, 20, 50)  # it looks less often than it would by itself


class Server:
    """One edge process, from its file to its end.

    `adapt` is what the command line changes of the file, `log_to` the descriptor of the access log, `within` sets the
    last moment of the process, in seconds from the call.
    """

    def __init__(
        self,
        path: Path,
        adapt: Callable[[Config], Config] = lambda config: config,
        log_to: int = 1,
        within: Callable[[float], None] = lambda patience_s: None,
    ) -> None:
        check_interpreter()
        self._loop = asyncio.get_running_loop()
        self.lifecycle = Lifecycle()
        self.readiness = Readiness(self.lifecycle)
        self.metrics = Metrics()
        self.certificates, self.loop_lag = Certificates(), LoopLag()
        self.endpoints = Endpoints(self._loop)
        self._access_log = AccessLog(log_to)
        self._reloader = Reloader(path, adapt, self.endpoints, self.readiness)
        self._within = within
        self._drain = Drain(self.lifecycle, within)
        self._owned: list[asyncio.Task[None]] = []  # the background parts of the process
        self._reload_now = asyncio.Event()
        self._following = asyncio.Lock()  # of who lets endpoints and probes follow the pools
        self._tls: ssl.SSLContext | None = None
        self._shared_client: Redis | None = None
        self._channel: RevocationChannel | None = None
        self.shared_limits: SharedLimits | None = None
        self._sink: Sink | None = None
        self._shipper: Shipper | None = None
        self._listeners: list[asyncio.Server] = []
        self._admin: AdminListener | None = None
        self.addresses: list[str] = []
        self.admin_address = ""

    @property
    def generation(self) -> Generation:
        """The configuration that new requests get."""
        return self.proxy.generation

    async def run(self, ready: Callable[["Server"], None] = lambda server: None) -> None:
        """Serve until `stop`.

        Raises: `ConfigError`, `Unusable` when it cannot start, `Hung` when something of it does not end.
        """
        self._descriptors = raise_descriptor_limit()
        gc.set_threshold(*_GC_THRESHOLDS)
        generation = await self._reloader.first()
        self._reloader.accept(generation)
        config = generation.config
        self.metrics.max_labels = config.server.max_metric_labels
        store = self._store = key_store(config.keys)
        self._tokens = token_verifier(config.jwt, self._loop.time)
        self.authenticator = Authenticator(config.keys, store, self._loop.time, time.time, self._tokens)
        self.memory = BodyMemory(config.server.body_memory_bytes)
        self.admission = Admission(config.limits, _steady_unix_time())
        self.key_uses = KeyUses(self.authenticator, config.keys)
        self.journal = self._open_journal(config.usage, config.server.region)
        self.usage_index = UsageIndex(config.usage.journal)
        self.quotas = JournalQuotas(self.journal, self.admission, lambda: self.loop_lag.clock_step_s)
        self.catalogue = Catalogue()
        shared = config.shared
        if shared.redis_ca_file is not None:
            client_tls(shared.redis_ca_file, "shared.redis_ca_file")  # the client would find out at each connection
        if shared.redis:
            self._shared_client = connect(shared.redis, _SHARED_TIMEOUT_S, shared.redis_ca_file)
        self.kept_responses = KeptResponses(self._loop.time, self._shared_client, names_at(shared.redis))
        self.proxy = Proxy(
            generation,
            self.lifecycle,
            self.authenticator,
            self.admission,
            Forwarder(self.endpoints, self.kept_responses, self.authenticator),
            self.kept_responses,
            self.catalogue,
            self.journal,
            self.memory,
            self.metrics,
            self._access_log,
            OwnAnswers(self.catalogue, self.admission, self.usage_index),
        )
        if config.server.traces:
            self.proxy.tracing = Tracing(config.server.traces, config.server.trace_share)
        self.clients = ClientServer(
            self.proxy.handle, self.lifecycle, config.server, self._most_connections(config.server)
        )
        self.probes = HealthProbes()
        self.discovery = Discovery(self.endpoints, self._follow)
        # Before anybody can connect: who is told to stop in its first milliseconds drains too.
        for name, act in ((signal.SIGTERM, self.stop), (signal.SIGINT, self.stop), (signal.SIGHUP, self.reload)):
            self._loop.add_signal_handler(name, act)
        try:
            if await self._starts(generation):
                await self._serve(ready)
        finally:
            hung = await self._end()
        if hung:
            raise Hung(hung)

    async def _starts(self, generation: Generation) -> bool:
        """Open every part and listen; return whether that was done before the process was asked to stop."""
        starting = self._loop.create_task(self._start(generation), name="start")
        asked = self._loop.create_task(self._drain.asked(), name="wait for SIGTERM")
        self._owned += (starting, asked)
        await asyncio.wait((starting, asked), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
        return starting.done()

    async def _start(self, generation: Generation) -> None:
        config, pools = generation.config, generation.pools.values()
        await self._store.open()
        await self._share(config)
        await self.quotas.start()
        if self._tokens is not None:
            await self._tokens.open()
        self._report()
        await self.certificates.read(config)
        await self.discovery.learn(pools)
        await self._listen(config)
        gc.freeze()  # what lives for ever; a look through it now would find nothing
        self.discovery.apply(pools)
        await in_steps(self.catalogue.apply(pools))
        await self._follow()

    def _most_connections(self, server: ServerConfig) -> int:
        """Return how many clients there may be: as the file says, else as many as descriptors allow, two for each."""
        if server.max_connections is None:
            return max((self._descriptors - _SPARE_DESCRIPTORS) // 2 - 1, 1)
        most = max(self._descriptors - _SPARE_DESCRIPTORS - MOST_REFUSED, 1)
        if server.max_connections > most:
            _log.warning(
                "server.max_connections: %d are more than the limit of open files has room for: %d are accepted",
                server.max_connections, most,
            )  # fmt: skip
        return min(server.max_connections, most)

    async def _serve(self, ready: Callable[["Server"], None]) -> None:
        parts = {"access log": self._access_log.run, "reload": self._watch_file, "journal": self._keep_journal}
        parts |= {"uses of keys": self.key_uses.run, "loop lag": self.loop_lag.run, "quotas": self.quotas.run}
        parts["metrics"] = partial(repeat_in_steps, FOLD_INTERVAL_S, self.metrics.fold)
        parts["limits"] = partial(repeat_in_steps, IDLE_INTERVAL_S, self.admission.forget_idle)
        if self._shipper is not None:
            parts["shipper"] = self._shipper.run
        if self.shared_limits is not None:
            parts |= {"shared limits": self.shared_limits.run, "kept responses": self.kept_responses.run}
        self._owned += [self._loop.create_task(keep_running(name, run), name=name) for name, run in parts.items()]
        _log.info("listening on %s, admin on %s", ", ".join(self.addresses), self.admin_address)
        ready(self)
        notify("READY=1")
        await self._drain.asked()
        notify("STOPPING=1")
        await self._drain.run(self.generation.config.server, self.clients, self._listeners)

    def stop(self) -> None:
        """Begin to drain; each further call ends what is waited for."""
        self._drain.stop()

    def reload(self) -> None:
        """Read the file again at once."""
        self._reload_now.set()

    # --- listeners

    async def _listen(self, config: Config) -> None:
        server = config.server
        if server.tls is not None:
            self.clients.tls = self._tls = listener_tls(server.tls)
        try:
            for sock in passed_sockets() or [bind(address) for address in server.listen]:
                listener = await self._loop.create_server(
                    self.clients, sock=sock, backlog=_BACKLOG, start_serving=False
                )
                self._listeners.append(listener)
                self.addresses.append(name_of(sock))
            admin_socket = bind(server.admin)
        except OSError as error:
            raise Unusable(f"cannot listen: {error.strerror or error}") from None
        self.admin_address = name_of(admin_socket)
        routes = basic_routes(self.readiness, self.metrics, self.purge) | status_routes(Snapshots(self._parts))
        self._key_api = KeyApi(lambda: self.generation.config, self.purge, self.usage_index)
        self._admin = AdminListener(self._loop, admin_socket, admin_handler(routes, self._key_api))
        for listener in self._listeners:
            await listener.start_serving()

    async def _watch_file(self) -> None:
        while True:
            changed = self._loop.create_task(self._reloader.changed(), name="watch routes.toml")
            asked = self._loop.create_task(self._reload_now.wait(), name="wait for SIGHUP")
            try:
                await asyncio.wait((changed, asked), return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
                asked.cancel()
            self._reload_now.clear()
            try:
                generation = await self._reloader.reload(self.generation)
                await self.discovery.learn(generation.pools.values())
                await self._apply(generation)
            except Exception as error:
                self._reloader.refuse(self.generation, unexpected(error))
                raise

    async def _apply(self, generation: Generation) -> None:
        """Let new requests have a generation; running requests keep theirs.

        What a request may see of it changes in one step of the loop; what is long is done before it or after, in steps.
        """
        if generation is self.generation:
            return
        server = generation.config.server
        if self._tls is not None and server.tls is not None:
            try:
                listener_tls(server.tls)  # proved when it was built, and perhaps half replaced in the meantime
                load_certificate(self._tls, server.tls)
            except Unusable as error:
                self._reloader.refuse(self.generation, str(error))
                return
        pools = generation.pools.values()
        await in_steps(self.catalogue.apply(pools))  # in force in the step that begins here
        retire(self.generation)
        self.proxy.generation = generation
        self.discovery.apply(pools)
        self.authenticator.reconfigure(generation.config.keys)
        self.admission.reconfigure(generation.config.limits)
        if self._sink is not None:
            self._sink.reconfigure(generation.config.usage)
        if self._tokens is not None and generation.config.jwt is not None:
            self._tokens.reconfigure(generation.config.jwt)
        self.memory.limit_bytes = server.body_memory_bytes
        self.metrics.max_labels = server.max_metric_labels
        self.clients.reconfigure(server, self._most_connections(server))
        self._reloader.accept(generation)
        await self.certificates.read(generation.config)
        await self._follow()

    async def _follow(self) -> None:
        """Let endpoints and probes be those of the pools in force, after a reload or when DNS names other members."""
        async with self._following:
            pools, coming = self.generation.pools.values(), self._reloader.coming
            await in_steps(self.endpoints.keep_only((*pools, *(coming.pools.values() if coming is not None else ()))))
            await in_steps(self.probes.apply(pools))
            self.metrics.upstreams.keep_only(self.generation.members())

    # --- usage

    def _open_journal(self, config: UsageConfig, region: str) -> Journal:
        """Return the journal, and have it shipped where the file says so."""
        self._sink = sink_of(config)
        ships, keeps = self._sink is not None, config.keep_s is not None
        journal = Journal(
            config.journal, config.rotate_bytes, config.when_full, ships=ships, region=region, leaves_notes=keeps
        )
        if self._sink is not None:
            adopted, more = journal.adopted.locks, journal.adopt_more
            self._shipper = Shipper(config.journal, journal.token, adopted, self._sink, more=more, keep_s=config.keep_s)
        return journal

    async def _keep_journal(self) -> None:
        while True:
            for _ in range(_DRAINS_A_SYNC):
                await asyncio.sleep(_DRAIN_INTERVAL_S)
                self.journal.drain()
            await asyncio.to_thread(self.journal.sync)
            self.journal.retry()
            if self._shipper is None:  # which else asks for more when it has delivered what there was
                await asyncio.to_thread(self.journal.adopt_more)

    # --- what is shared

    async def _share(self, config: Config) -> None:
        """Listen to what other processes publish of keys, and count with them."""
        if self._shared_client is not None:
            self.shared_limits = SharedLimits(self._shared_client, self.admission, names_at(config.shared.redis))
            self._channel = RevocationChannel(self._shared_client)
            self._channel.on_change = self.authenticator.forget
            self._channel.open()

    def _report(self) -> None:
        """Have `/metrics`, `/readyz?verbose` and `/status` ask every part."""
        self._parts = Parts(
            self.readiness, self.certificates, self.loop_lag, self.proxy, self.clients, self.memory, self.endpoints,
            self.discovery, self.authenticator, self._tokens, self._channel, self.admission, self.shared_limits,
            self.quotas, self.kept_responses, self.journal, self._shipper, self._access_log, self.metrics,
        )  # fmt: skip
        report_all(self._parts, self.metrics)

    async def purge(self, invalidation: Invalidation) -> dict[str, object]:
        """Forget keys here and, over `shared.redis`, everywhere; return how many, and how many processes heard."""
        done: dict[str, object] = {"forgotten": self.authenticator.forget(invalidation)}
        if self._channel is not None:
            try:
                done["processes"] = await self._channel.publish(invalidation)
            except Exception as error:  # redis-py's own are not imported where it may be absent
                done["processes"] = 1
                done["problem"] = f"other processes could not be told: {reason_of(error)}"
        return done

    # --- the end

    async def _end(self) -> Sequence[str]:
        """Close every part, the journal last; return what hung."""
        self._within(GRACE_S)
        for listener in self._listeners:
            listener.close()
        ending = Ending(self._drain)
        await ending.end(self._owned)
        parts = {
            "key look-ups": self.authenticator.close(),
            "uses of keys": self.key_uses.close(),
            "usage index": self.usage_index.close(),
            "quotas": self.quotas.close(),
            "key store": self._store.close(),
            "dns": self.discovery.close(),
            "probes": self.probes.close(),
            "catalogue": self.catalogue.close(),
            "kept responses": self.kept_responses.close(),
        }
        if self._tokens is not None:
            parts["tokens"] = self._tokens.close()
        if self._channel is not None:
            parts["revocations"] = self._channel.close()
        if self.shared_limits is not None:
            parts["shared limits"] = self.shared_limits.leave()
        if self._admin is not None:
            self._admin.close()
            parts |= {"admin": self._admin.shutdown(0.1), "key api": self._key_api.close()}
        await ending.close(_PART_PATIENCE_S, parts)
        self.endpoints.close()
        parts = {"requests": self.proxy.wait_idle()}  # cancelled handlers take their closing step
        if self._shared_client is not None:
            parts["shared.redis"] = disconnect(self._shared_client)
        await ending.close(_HANDLER_PATIENCE_S, parts)
        self.journal.retry()
        parts = {"access log": self._access_log.close(_LOG_PATIENCE_S)}
        if self._shipper is not None:
            parts["usage sink"] = self._shipper.flush(_SHIP_PATIENCE_S)
        await ending.finish(_PART_PATIENCE_S, parts)
        if self.proxy.tracing is not None:
            await ending.finish(_HANDLER_PATIENCE_S, {"traces": self.proxy.tracing.close()})
        if self._sink is not None:
            await ending.finish(_HANDLER_PATIENCE_S, {"usage sink": self._sink.close()})
        self.journal.close()
        if ending.hung:
            _log.error("stop: these do not end and are left behind: %s", ", ".join(ending.hung))
        return ending.hung


def _steady_unix_time() -> Callable[[], float]:
    """Return a clock of Unix seconds that no correction of the machine's clock moves."""
    offset_s = time.time() - time.monotonic()
    return lambda: time.monotonic() + offset_s
