"""`edge demo`: run the edge with every upstream simulated, and a key to try it."""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

from edge.commands.arguments import add_config, address, checked, listening_on
from edge.commands.event_loop import run_to_end
from edge.config.process_settings import KeysConfig, SharedConfig, UsageConfig
from edge.config.settings import Config
from edge.config.values import Address, KeyStoreAddress, parse_url
from edge.keys.stores.registry import KeyRegistry
from edge.process.deadline import Deadline
from edge.process.server import Server
from edge.simulator.dialects import Behaviour
from edge.simulator.server import Simulator
from edge.telemetry.process_log import log_to_stderr

_USER: Final = "u-1100a15812cc"
_ADDRESS: Final = Address("127.0.0.1", 8080)
_NO_PREFERENCE: Final = Address("127.0.0.1", 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `edge demo`."""
    add_config(parser)
    parser.add_argument(
        "--listen", type=checked(address), default=_ADDRESS, metavar="ADDR", help="default 127.0.0.1:8080"
    )


def run(parsed: argparse.Namespace) -> int:
    """Serve the demonstration until a signal ends it; it leaves nothing behind."""
    with log_to_stderr(), tempfile.TemporaryDirectory(prefix="edge-demo-") as directory:
        return run_to_end(_demonstrate(parsed.config, parsed.listen, Path(directory)))


async def _demonstrate(path: Path, listen: Address, directory: Path) -> None:
    models = Simulator(Behaviour(ttft_ms=200, interval_ms=20, tokens=64), keep_requests=0)
    await models.start()
    try:
        with KeyRegistry(directory / "keys.db") as registry:
            key, _ = registry.create(_USER, name="demo")

        def adapt(config: Config) -> Config:
            config = listening_on(listen, _NO_PREFERENCE)(config)
            return _simulated(config, models.url, directory)

        await Server(path, adapt, within=Deadline().within).run(lambda server: _invite(server, key))
    finally:
        await models.close()


def _simulated(config: Config, url: str, directory: Path) -> Config:
    """Return the configuration with every upstream played by the simulator at `url`; what is kept is in `directory`."""
    target = parse_url(url)
    pools = {
        name: replace(pool, endpoints=tuple(replace(each, url=target, api_key=None) for each in pool.endpoints[:1]))
        for name, pool in config.pools.items()
    }
    routes = tuple(replace(route, instance=route.instance and url) for route in config.routes)
    server = replace(config.server, shutdown_delay_s=0, tls=None)
    return replace(
        config,
        server=server,
        keys=KeysConfig(KeyStoreAddress(directory / "keys.db")),
        jwt=None,
        usage=UsageConfig(directory / "usage"),
        shared=SharedConfig(),
        pools=pools,
        routes=routes,
    )


def _invite(server: Server, key: str) -> None:
    """Print what can be pasted; the model is the first that the file names."""
    address = server.addresses[0]
    model = next((each.pattern for each in server.generation.config.routes if each.pool), "public/deepseek-r1")
    print(
        f"""
The edge listens on http://{address}, every model is simulated. API key: {key}
Health and metrics: http://{server.admin_address}/readyz?verbose and /metrics. Stop with Ctrl-C.

curl -N http://{address}/v1/chat/completions \\
  -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\
  -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}'

# Python, with the current SDK (pip install openai)
from openai import OpenAI

client = OpenAI(base_url="http://{address}/v1", api_key="{key}")
stream = client.chat.completions.create(
    model="{model}", messages=[{{"role": "user", "content": "Hello"}}], stream=True
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

# One request a line follows.
""",
        flush=True,
    )
