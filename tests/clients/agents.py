"""Coding agents at the edge: real programs take a whole turn and broken turns, direct and through the edge.

    npm install node@22 @anthropic-ai/claude-code@latest @openai/codex@latest @qwen-code/qwen-code@latest opencode-ai
    python tests/clients/agents.py --agents DIR --edge .venv/bin/edge

npm has to run the packages' install scripts. A scripted model server stands on loopback, and an edge in front of it.
Each agent runs without a terminal, in an empty git repository and with a home of its own. It reaches nothing else: its
proxy is a gate that refuses and notes.

In a turn `whole` the server answers to the end. In a turn `once` it closes the connection in the middle of the first
answer, in a turn `always` in the middle of each. A line tells of each run how it ended for the user, what was printed
(the first characters of stdout, the last ones of stderr), how often the model was asked, and every path that was asked
with its status. Words in capitals are failures: half an answer was taken for a whole one, or a whole one was lost.
Exit codes: 0 no turn failed at the edge, 1 some did.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "public/agent-model"
PROMPT = "What is the capital of France? Answer in one short sentence and use no tool."
ANSWERS = Path(__file__).with_name("agents")  # what the model says, as a stream and as a document
LAST_HALF = "Paris"  # what only the second half of each answer has
TURNS = ("whole", "once", "always")


# --- servers of loopback: the model's, and the gate


class Server(ThreadingHTTPServer):
    """A server of loopback that runs until `stop`."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None: ...  # a client left

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """A connection whose requests are kept, not printed."""

    def log_message(self, format: str, *args: object) -> None: ...


@dataclass(slots=True)
class Asked:
    """One request that the model server got; `answered` is the status, with `broken` if the answer broke off."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    answered: str = ""


class ModelServer(Server):
    """Answers as an engine does, and breaks off in the middle of its first `breaks` answers.

    Only answers to requests that offer tools break: an agent asks for more than the turn, for a title for example.
    """

    def __init__(self, breaks: float) -> None:
        super().__init__(ModelHandler)
        self.breaks = breaks
        self.asked: list[Asked] = []


class ModelHandler(Handler):
    """One connection of the model server."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ModelServer

    def do_POST(self) -> None:
        asked = self._note()
        operation = self.path.partition("?")[0].removeprefix("/v1/")
        if operation in ("chat/completions", "messages", "responses"):
            self._answer(asked, operation.replace("/", "_"))
        elif operation == "messages/count_tokens":
            self._document(asked, {"input_tokens": 9})
        else:
            self._document(asked, {"error": {"message": "Not Found", "type": "NotFoundError", "code": 404}}, 404)

    def do_GET(self) -> None:
        asked = self._note()
        if self.path.partition("?")[0] == "/v1/models":
            model = {"id": MODEL, "object": "model", "created": 1, "owned_by": "script"}
            self._document(asked, {"object": "list", "data": [model]})
        else:
            self._document(asked, {"detail": "Not Found"}, 404)

    do_HEAD = do_PUT = do_DELETE = do_GET

    def _note(self) -> Asked:
        data = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.command, self.path, headers, json.loads(data) if data else None)
        self.server.asked.append(asked)
        return asked

    def _document(self, asked: Asked, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self._head(asked, status, "application/json", "content-length", str(len(data)))
        self.wfile.write(data if self.command != "HEAD" else b"")

    def _head(self, asked: Asked, status: int, kind: str, framing: str, value: str) -> None:
        asked.answered = str(status)
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header(framing, value)
        self.end_headers()

    def _answer(self, asked: Asked, name: str) -> None:
        streams = bool(asked.body.get("stream"))
        text = (ANSWERS / f"{name}.{'sse' if streams else 'json'}").read_text()
        half = text.rindex("\n\n", 0, text.index(LAST_HALF)) + 2 if streams else text.index(LAST_HALF)
        breaks = self.server.breaks > 0 and bool(asked.body.get("tools"))
        said = text[:half] if breaks else text
        if streams:
            self._head(asked, 200, "text/event-stream; charset=utf-8", "transfer-encoding", "chunked")
            for event in said.split("\n\n")[:-1]:
                time.sleep(0.01)  # as tokens come: each event in a packet of its own
                self.wfile.write(f"{len(event) + 2:x}\r\n{event}\n\n\r\n".encode())
        else:
            self._head(asked, 200, "application/json", "content-length", str(len(text)))
            self.wfile.write(said.encode())
        if breaks:
            self.server.breaks -= 1
            asked.answered = "200 broken"
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif streams:
            self.wfile.write(b"0\r\n\r\n")


class Gate(Server):
    """The proxy that an agent is given for all hosts but loopback: it refuses, and notes what was wanted."""

    def __init__(self) -> None:
        super().__init__(GateHandler)
        self.wanted: Counter[str] = Counter()


class GateHandler(Handler):
    """One connection of the gate."""

    server: Gate

    def do_CONNECT(self) -> None:
        self.server.wanted[self.path] += 1
        self.send_error(403)

    do_GET = do_POST = do_HEAD = do_CONNECT


# --- the edge in front


class Edge:
    """`edge serve` in a directory of its own, with one model and one key."""

    def __init__(self, program: Path, directory: Path, upstream: str) -> None:
        self._port, admin = free_ports(2)
        self.url = f"http://127.0.0.1:{self._port}"
        config = directory / "routes.toml"
        config.write_text(
            f'[server]\nlisten = "127.0.0.1:{self._port}"\nadmin = "127.0.0.1:{admin}"\ndrain_timeout = "3s"\n'
            f'shutdown_delay = "0s"\n[keys]\nstore = "sqlite:keys.db"\n[usage]\njournal = "usage"\n'
            f'[pools.model]\nendpoints = ["{upstream}"]\n[routes."{MODEL}"]\npool = "model"\nmetered = true\n'
        )
        make = [str(program), "keys", "create", "--config", str(config), "--user", "u-1100a15812cc", "--json"]
        self.key: str = json.loads(subprocess.run(make, check=True, capture_output=True).stdout)["key"]
        self._out = directory / "out"
        with self._out.open("wb") as out, (directory / "err").open("wb") as err:
            serve = [str(program), "serve", "--config", str(config)]
            self._process = subprocess.Popen(serve, stdout=out, stderr=err, cwd=directory)
        until = time.monotonic() + 20
        while not answers(f"http://127.0.0.1:{admin}/readyz"):
            if self._process.poll() is not None or time.monotonic() > until:
                raise SystemExit("the edge did not start: " + (directory / "err").read_text())
            time.sleep(0.05)

    def stop(self) -> list[dict[str, Any]]:
        """End it; return its access log."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)
        return [json.loads(line) for line in self._out.read_bytes().splitlines()]


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody listens at."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(urllib.request.urlopen(url, timeout=2).status == 200)
    return False


# --- the agents


@dataclass(frozen=True, slots=True)
class Agent:
    """A coding agent: `prepare` writes its files below a home and returns its environment.

    `prompt` is the last argument of its command, and `shows` is in what it prints when all went well.
    """

    name: str
    command: tuple[str, ...]
    prepare: Callable[[Path, str, str], dict[str, str]]
    prompt: str = PROMPT
    shows: str = LAST_HALF
    turns: tuple[str, ...] = TURNS


def claude(home: Path, url: str, key: str) -> dict[str, str]:
    """Claude Code: the base URL has no /v1, and the models of a gateway are asked for."""
    return {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": key,
        "ANTHROPIC_MODEL": MODEL,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": MODEL,
        "CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY": "1",
        **dict.fromkeys(("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "DISABLE_AUTOUPDATER", "DISABLE_TELEMETRY"), "1"),
    }


def codex_with(provider: str) -> Callable[[Path, str, str], dict[str, str]]:
    """Codex with a provider: `script` is one of our own, `openai` the one that it brings, with another base URL.

    The one that it brings asks over a WebSocket first.
    """

    def prepare(home: Path, url: str, key: str) -> dict[str, str]:
        own = f'[model_providers.script]\nname = "script"\nenv_key = "CODEX_API_KEY"\nbase_url = "{url}/v1"\n'
        (home / ".codex").mkdir()
        (home / ".codex/config.toml").write_text(
            f'model = "{MODEL}"\nmodel_provider = "{provider}"\nopenai_base_url = "{url}/v1"\n'
            f"check_for_update_on_startup = false\n{own if provider == 'script' else ''}"
            "[analytics]\nenabled = false\n[feedback]\nenabled = false\n[features]\nplugins = false\n"
        )
        return {"CODEX_API_KEY": key, "CODEX_HOME": str(home / ".codex")}

    return prepare


def qwen(home: Path, url: str, key: str) -> dict[str, str]:
    """Prepare qwen-code."""
    (home / ".qwen").mkdir()
    settings = {
        "security": {"auth": {"selectedType": "openai"}},
        "general": {"enableAutoUpdate": False},
        "privacy": {"usageStatisticsEnabled": False},
    }
    (home / ".qwen/settings.json").write_text(json.dumps(settings))
    return {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": key, "OPENAI_MODEL": MODEL}


def opencode(home: Path, url: str, key: str) -> dict[str, str]:
    """Prepare opencode: its provider's package is part of the program."""
    options = {"baseURL": f"{url}/v1", "apiKey": key}
    provider = {"npm": "@ai-sdk/openai-compatible", "options": options, "models": {MODEL: {}}}
    config = {"provider": {"script": provider}, "model": f"script/{MODEL}", "small_model": f"script/{MODEL}"}
    (home / ".config/opencode").mkdir(parents=True)
    (home / ".config/opencode/opencode.json").write_text(json.dumps({**config, "share": "disabled"}))
    switches = ("AUTOUPDATE", "MODELS_FETCH", "LSP_DOWNLOAD", "DEFAULT_PLUGINS")
    return {f"OPENCODE_DISABLE_{name}": "1" for name in switches}


CODEX = ("codex", "exec", "--skip-git-repo-check", "--sandbox", "read-only")
AGENTS = (
    Agent("claude", ("claude", "-p"), claude),
    Agent("claude-context", ("claude", "-p"), claude, "/context", "Context Usage", ("whole",)),  # counts tokens
    Agent("codex", CODEX, codex_with("script")),
    Agent("codex-openai", CODEX, codex_with("openai")),
    Agent("qwen", ("qwen", "-p"), qwen),
    Agent("opencode", ("opencode", "run"), opencode),
)


# --- a run


@dataclass(slots=True)
class Run:
    """One turn of one agent; `exit_code` is None if it had to be ended."""

    agent: str
    version: str
    turn: str
    way: str
    shows: str
    exit_code: int | None = None
    took_s: float = 0
    stdout: str = ""
    stderr: str = ""
    asked: list[Asked] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    outside: dict[str, int] = field(default_factory=dict)

    @property
    def paths(self) -> Counter[str]:
        """What was asked, with its status: of the edge if there is one, of the model's server else."""
        if self.way == "direct":
            return Counter(f"{one.method} {one.path} {one.answered}" for one in self.asked)
        ends = [(line, "" if line["end"] == "complete" else f" {line['error'] or line['end']}") for line in self.log]
        return Counter(f"{line['method']} {line['path']} {line['status']}{end}" for line, end in ends)

    @property
    def verdict(self) -> str:
        """How the turn ended for the user."""
        whole = self.shows in self.stdout and self.exit_code == 0
        if self.exit_code is None:
            return "TIMED OUT"
        if self.turn == "always":
            return "FAILURE HIDDEN" if self.exit_code == 0 else "reported"
        if self.turn == "once" and self.exit_code != 0:
            return "reported"
        return ("whole" if self.turn == "whole" else "retried") if whole else "ANSWER MISSING"

    def line(self) -> str:
        """What there is to see."""
        paths = "; ".join(f"{what} x{count}" for what, count in self.paths.items())
        out, err = " ".join(self.stdout.split())[:200], " ".join(self.stderr.split())[-200:]
        model = sum(one.method == "POST" for one in self.asked)
        return (
            f"{self.agent} {self.version} | {self.turn} {self.way} | {self.verdict} | exit {self.exit_code} "
            f"in {self.took_s:.1f} s | stdout {out!r} | stderr {err!r} | {model} posts reached the model | {paths}"
            + (f" | wanted outside: {self.outside}" if self.outside else "")
        )


def run(agent: Agent, version: str, turn: str, way: str, options: argparse.Namespace) -> Run:
    """Let an agent take a turn."""
    result = Run(agent.name, version, turn, way, agent.shows)
    server = ModelServer({"whole": 0, "once": 1, "always": float("inf")}[turn])
    gate = Gate()
    with tempfile.TemporaryDirectory(prefix="agent-", ignore_cleanup_errors=True) as name:
        home, work, edges = (Path(name) / part for part in ("home", "work", "edge"))
        for directory in (home, work, edges):
            directory.mkdir()
        subprocess.run(["git", "init", "-q", str(work)], check=True)
        edge = Edge(options.edge, edges, server.url) if way == "edge" else None
        url, key = (edge.url, edge.key) if edge else (server.url, "sk-script")
        environment = base_environment(options.agents, home, gate.url) | agent.prepare(home, url, key)
        begun, command = time.monotonic(), [*agent.command, agent.prompt]
        try:
            result.exit_code, result.stdout, result.stderr = ended(command, environment, work, options.timeout_s)
        finally:
            result.took_s = time.monotonic() - begun
            result.log = edge.stop() if edge else []
    server.stop()
    gate.stop()
    result.asked, result.outside = server.asked, dict(gate.wanted)
    return result


def base_environment(agents: Path, home: Path, gate: str) -> dict[str, str]:
    """Return an environment that holds nothing of the caller's but where programs are."""
    proxies = {name: gate for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
    loopback = "127.0.0.1,localhost"
    path = f"{agents / 'node_modules/.bin'}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(home), "TERM": "dumb", "NO_PROXY": loopback, "no_proxy": loopback, **proxies}


def ended(command: list[str], environment: dict[str, str], work: Path, timeout_s: float) -> tuple[int | None, str, str]:
    """Run a program, and end what it leaves running; return exit code, stdout and stderr."""
    program = subprocess.Popen(
        command, env=environment, cwd=work, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        out, err = program.communicate(timeout=timeout_s)
        return program.returncode, out, err
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)
        return None, *program.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)


def version_of(agent: Agent, agents: Path) -> str:
    """Return the version that an agent says it has; raises `FileNotFoundError` for one that is not installed."""
    with tempfile.TemporaryDirectory(prefix="agent-", ignore_cleanup_errors=True) as name:
        environment = base_environment(agents, Path(name), "http://127.0.0.1:9")
        _, out, _ = ended([agent.command[0], "--version"], environment, Path(name), 60)
    return next((word for word in out.split() if word[0].isdigit()), "of no version")


def main() -> int:
    """Run what was asked for; print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [agent.name for agent in AGENTS]
    parser.add_argument("--agents", type=Path, required=True, help="where npm installed them")
    parser.add_argument("--edge", type=Path, default=Path(sys.executable).with_name("edge"), help="the edge's program")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these agents")
    parser.add_argument("--turns", nargs="+", choices=TURNS, default=TURNS, help="these turns")
    parser.add_argument("--ways", nargs="+", choices=("direct", "edge"), default=("direct", "edge"))
    parser.add_argument("--timeout-s", type=float, default=300, help="seconds before an agent is ended")
    parser.add_argument("--record", type=Path, help="a file for all that was asked and said, a JSON line for each run")
    options = parser.parse_args()
    options.agents, options.edge = options.agents.absolute(), options.edge.absolute()
    wrong = 0
    for agent in (agent for agent in AGENTS if agent.name in options.only):
        version = version_of(agent, options.agents)
        turns = [turn for turn in agent.turns if turn in options.turns]
        for turn, way in itertools.product(turns, options.ways):
            result = run(agent, version, turn, way, options)
            wrong += way == "edge" and result.verdict.isupper()
            print(result.line(), flush=True)
            if options.record:
                with options.record.open("a") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
