"""The commands. Exit codes: 0 done, 1 failed or found problems, 2 wrong usage."""

import argparse
import os
import select
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import orjson
import uvloop

from edge.commands import usage as usage_report
from edge.commands.explain import LOCAL_HOST, explain
from edge.config import schema
from edge.config.changes import list_changes
from edge.config.settings import (
    Address,
    Config,
    ConfigError,
    KeysConfig,
    KeyStoreAddress,
    SharedConfig,
    UsageConfig,
    load,
    load_keys,
    parse,
    problems_json,
    render_problems,
)
from edge.config.values import parse_address, parse_url
from edge.errors import Unusable
from edge.keys.stores.registry import KeyRecord, KeyRegistry, parse_lifetime, restore
from edge.process.reloading import refuse_what_needs_a_restart
from edge.process.server import Server, listening_on
from edge.simulator import server as simulator
from edge.simulator.dialects import Behaviour
from edge.telemetry.process_log import log_to_stderr, send_nowhere

_STDOUT: Final = 1
_DEMO_USER: Final = "u-1100a15812cc"
_DEMO_ADDRESS: Final = Address("127.0.0.1", 8080)
_NO_PREFERENCE: Final = Address("127.0.0.1", 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _open_standard_files()
    parsed = _parser().parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    except (Unusable, ValueError, OSError) as error:
        if not isinstance(error, BrokenPipeError) or _has_reader():
            print(f"edge: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1
    try:
        sys.stdout.flush()
    except OSError as error:
        if _has_reader():
            print(f"edge: {error}", file=sys.stderr)
            send_nowhere(_STDOUT)  # else the interpreter complains at its end
        return 1
    return code if _has_reader() else 1


def _open_standard_files() -> None:
    """Fill 0, 1 and 2 when who started us had closed them: else a socket, or the loop's own, takes their place.

    What is printed to a closed standard error would go to standard output.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def _has_reader() -> bool:
    """Say whether standard output is still read: who does, as `head` does, may have enough."""
    output = select.poll()
    output.register(1, 0)  # an error is told whatever is asked for
    has_reader = not any(events & select.POLLERR for _, events in output.poll(0))
    if not has_reader:
        send_nowhere(_STDOUT)  # else the interpreter complains at its end
    return has_reader


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edge", description="The HTTP edge of d.run's model platform.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    serve = command("serve", "run the edge", _serve)
    _add_config(serve)
    serve.add_argument("--listen", type=_address, metavar="ADDR", help="instead of server.listen: host:port, unix:PATH")
    serve.add_argument("--admin", type=_address, metavar="ADDR", help="instead of server.admin")

    demo = command("demo", "run the edge with every upstream simulated, and a key to try it", _demo)
    _add_config(demo)
    demo.add_argument("--listen", type=_address, default=_DEMO_ADDRESS, metavar="ADDR", help="default 127.0.0.1:8080")

    simulate = command("simulate", "run the simulated model server alone", _simulate)
    simulator.add_arguments(simulate)

    check = command("check", "list every problem of a routes.toml", _check)
    check.add_argument("file", nargs="?", type=Path, default=None, metavar="FILE", help="default: that of --config")
    _add_config(check)
    _add_json(check)

    explanation = command("explain", "say which route a model's name takes, who may use it, and why", _explain)
    explanation.add_argument("model", metavar="MODEL", help="the name that a client would ask for")
    explanation.add_argument("--host", default=LOCAL_HOST, metavar="H", help="the Host asked; default: this machine's")
    explanation.add_argument("--key-id", metavar="ID", help="a key of `edge keys list`; default: one that may")
    _add_config(explanation)
    _add_json(explanation)

    diff = command("diff", "list what a reload would change, or refuse", _diff)
    diff.add_argument("old", type=Path, metavar="OLD", help="the file that is served")
    diff.add_argument("new", type=Path, metavar="NEW", help="what would stand in its place; relative paths start there")

    command("schema", "print the JSON Schema of routes.toml, for editors", _schema)

    usage = command("usage", "add up what the journal says was used", _usage)
    usage_report.add_arguments(usage)
    _add_config(usage)

    _add_keys(command("keys", "create, list and revoke API keys", lambda parsed: int(parsed.run_keys(parsed))))
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, default=Path("routes.toml"), metavar="FILE", help="default routes.toml in this directory"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _address(text: str) -> Address:
    try:
        return parse_address(text, Path.cwd())
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# --- serve, demo, simulate


def _serve(parsed: argparse.Namespace) -> int:
    async def run() -> None:
        await Server(parsed.config, listening_on(parsed.listen, parsed.admin)).run()

    with log_to_stderr():
        return _run(run())


def _demo(parsed: argparse.Namespace) -> int:
    with log_to_stderr(), tempfile.TemporaryDirectory(prefix="edge-demo-") as directory:
        return _run(_demonstrate(parsed.config, parsed.listen, Path(directory)))


async def _demonstrate(path: Path, listen: Address, directory: Path) -> None:
    models = simulator.Simulator(Behaviour(ttft_ms=200, interval_ms=20, tokens=64), keep_requests=0)
    await models.start()
    try:
        with KeyRegistry(directory / "keys.db") as registry:
            key, _ = registry.create(_DEMO_USER, name="demo")

        def adapt(config: Config) -> Config:
            config = listening_on(listen, _NO_PREFERENCE)(config)
            return _simulated(config, models.url, directory)

        await Server(path, adapt).run(lambda server: _invite(server, key))
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


def _simulate(parsed: argparse.Namespace) -> int:
    host, port = parsed.listen
    return _run(simulator.run(host, port, simulator.behaviour_from(parsed)))


def _run(main: Coroutine[Any, Any, None]) -> int:
    # Names are resolved on libuv's threads, and one whose server is dead holds its thread for as long as the resolver
    # is patient: of the four that there are else, a few such requests would take every other name's.
    os.environ.setdefault("UV_THREADPOOL_SIZE", "64")
    uvloop.run(main)
    return 0


# --- check


def _check(parsed: argparse.Namespace) -> int:
    path = parsed.file or parsed.config
    try:
        config = load(path)
    except ConfigError as error:
        problems, failed = error.problems, True
    else:
        problems, failed = config.warnings, False
    shown = _printable(path)
    if parsed.json:
        print(problems_json(shown, problems).decode())
    elif problems:
        print(render_problems(shown, problems))
    if not failed and not parsed.json:
        print(f"{shown}: ok, {len(config.routes)} routes, {len(config.pools)} pools")
    return int(failed)


def _printable(path: Path) -> Path:
    """Return a path for people: bytes in it that are no UTF-8, which no JSON can hold, are replaced."""
    return Path(os.fsencode(path).decode("utf-8", "replace"))


# --- explain, diff, schema


def _explain(parsed: argparse.Namespace) -> int:
    config = load(parsed.config)
    keys: list[KeyRecord] = []
    if parsed.key_id is not None:
        path = _key_file(config.keys)
        if path.exists():  # a registry would make the file
            with KeyRegistry(path) as registry:
                keys = registry.list()
    explanation = explain(config, parsed.model, parsed.host, parsed.key_id, keys, time.time())
    print(explanation.as_json().decode() if parsed.json else explanation.render())
    return 0


def _usage(parsed: argparse.Namespace) -> int:
    return usage_report.main(load(parsed.config).usage.journal, parsed)


def _diff(parsed: argparse.Namespace) -> int:
    configs: list[Config] = []
    for path in (parsed.old, parsed.new):
        try:
            configs.append(_load_in_place(path, parsed.old))
        except ConfigError as error:
            print(render_problems(_printable(path), error.problems))
    if len(configs) < 2:
        return 1
    old, new = configs
    print("\n".join(list_changes(old, new)) or "nothing changed")
    try:
        refuse_what_needs_a_restart(old, new)
    except Unusable as error:
        print(f"a reload would be refused: {error}")
    return 0


def _load_in_place(path: Path, place: Path) -> Config:
    """Return the configuration of the file at `path` as it would be at `place`; raises `ConfigError`."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError):
        return load(path)  # which says what is wrong with it
    return parse(text, place, os.environ)


def _schema(parsed: argparse.Namespace) -> int:
    print(schema.render(), end="")
    return 0


# --- keys


def _add_keys(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, text: str, run: Callable[[KeyRegistry, argparse.Namespace], None]) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run_keys=lambda parsed: _with_registry(parsed, run))
        _add_config(sub)
        return sub

    create = verb("create", "make a key; it is shown once", _create_key)
    create.add_argument("--user", required=True, metavar="U", help="the namespace that owns it, such as u-1100a15812cc")
    create.add_argument("--name", default="", metavar="N", help="for people")
    globs: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "metavar": "GLOB"}
    create.add_argument("--allow", **globs, help="instead of public/** and the user's own; as often as wanted")
    create.add_argument("--deny", **globs, help="models refused whatever is allowed")
    create.add_argument("--expires", type=_lifetime, metavar="TIME", help="a lifetime such as 12h or 30d")
    create.add_argument("--limit", metavar="NAME", help="a table of [limits]")
    _add_json(create)
    listing = verb("list", "show the keys, never the secrets", _list_keys)
    listing.add_argument("--user", metavar="U", help="of this user only")
    _add_json(listing)
    verb("revoke", "end a key for good", _revoke_key).add_argument("id", metavar="ID")
    quota = verb("quota", "say whether a user has used up what was paid", _set_quota)
    quota.add_argument("--user", required=True, metavar="U")
    state = quota.add_mutually_exclusive_group(required=True)
    state.add_argument("--spent", action="store_true", help="requests get a 402 from now on")
    state.add_argument("--ok", dest="spent", action="store_false", help="they are served again")
    text = "put a backup in place of all keys; what was changed since it was made is undone, revocations too"
    restored = verbs.add_parser("restore", help=text, description=text)
    restored.add_argument("file", type=Path, metavar="FILE", help="a copy of the key store, as `.backup` makes it")
    restored.set_defaults(run_keys=_restore_keys)
    _add_config(restored)
    for name, text, one, whole in (
        ("enable", "let a key, or all keys of a user, work again", KeyRegistry.enable, KeyRegistry.enable_user),
        ("disable", "stop a key, or all keys of a user", KeyRegistry.disable, KeyRegistry.disable_user),
    ):
        sub = verb(name, text, _switch(one, whole))
        which = sub.add_mutually_exclusive_group(required=True)
        which.add_argument("id", nargs="?", metavar="ID")
        which.add_argument("--user", metavar="U")


def _with_registry(parsed: argparse.Namespace, act: Callable[[KeyRegistry, argparse.Namespace], None]) -> int:
    with KeyRegistry(_key_file(load_keys(parsed.config))) as registry:
        act(registry, parsed)
    return 0


def _restore_keys(parsed: argparse.Namespace) -> int:
    keys, users = restore(_key_file(load_keys(parsed.config)), parsed.file)
    print(f"{keys} keys of {users} users restored from {parsed.file}; every edge knows within a second")
    return 0


def _key_file(config: KeysConfig) -> Path:
    """Return the file of the embedded key store; raises `ValueError` when keys are kept elsewhere."""
    if config.store.path is None:
        raise ValueError(f"keys.store is {config.store}: its keys are made and listed there, not by this command")
    return config.store.path


def _lifetime(text: str) -> float:
    try:
        return parse_lifetime(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _switch(
    one: Callable[[KeyRegistry, str], None], whole: Callable[[KeyRegistry, str], int]
) -> Callable[[KeyRegistry, argparse.Namespace], None]:
    def act(registry: KeyRegistry, parsed: argparse.Namespace) -> None:
        done = one.__name__ + "d"
        if parsed.user is None:
            one(registry, parsed.id)
            print(f"{parsed.id} {done}; every edge knows within a second")
        else:
            _tell_of_user(parsed.user, whole(registry, parsed.user), done)

    return act


def _tell_of_user(user: str, keys: int, done: str) -> None:
    misspelt = "" if keys else " (is the name right?)"
    print(f"{user} {done}, with {keys} keys{misspelt}; every edge knows within a second")


def _revoke_key(registry: KeyRegistry, parsed: argparse.Namespace) -> None:
    registry.revoke(parsed.id)
    print(f"{parsed.id} revoked; every edge knows within a second")


def _set_quota(registry: KeyRegistry, parsed: argparse.Namespace) -> None:
    keys = registry.set_out_of_quota(parsed.user, parsed.spent)
    _tell_of_user(parsed.user, keys, "out of quota" if parsed.spent else "within quota")


def _create_key(registry: KeyRegistry, parsed: argparse.Namespace) -> None:
    if parsed.limit is not None and parsed.limit not in (limits := load(parsed.config).limits):
        raise ValueError(f"there is no limit {parsed.limit!r} in {parsed.config}: use {', '.join(limits) or 'none'}")
    key, record = registry.create(
        parsed.user, parsed.name, parsed.allow, parsed.deny, parsed.expires, limit=parsed.limit
    )
    if parsed.json:
        print(orjson.dumps({**record.as_json(), "key": key}).decode())
        return
    print(f"{record.id}  {record.user}  {record.name}", file=sys.stderr)
    print("The key is shown this once:", file=sys.stderr)
    print(key)


def _list_keys(registry: KeyRegistry, parsed: argparse.Namespace) -> None:
    records = [record for record in registry.list() if parsed.user in (None, record.user)]
    if parsed.json:
        print(orjson.dumps([record.as_json() for record in records], option=orjson.OPT_INDENT_2).decode())
        return
    now = time.time()
    rows = [("ID", "USER", "NAME", "STATE", "EXPIRES", "ALLOW", "DENY"), *(_row(record, now) for record in records)]
    widths = [max(map(_columns, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell + " " * (width - _columns(cell)) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _columns(text: str) -> int:
    """Return how many columns of a terminal a text takes: Chinese characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(each) else 1 + (unicodedata.east_asian_width(each) in "WF") for each in text)


def _row(record: KeyRecord, now: float) -> tuple[str, ...]:
    is_over = record.expires_at is not None and record.expires_at <= now
    states = ("disabled", not record.enabled), ("suspended", record.suspended), ("expired", is_over)
    state = ", ".join(name for name, holds in states if holds) or "enabled"
    state += ", out of quota" if record.out_of_quota else ""
    expires = record.as_json()["expires_at"] or "never"
    return record.id, record.user, record.name, state, expires, " ".join(record.allow), " ".join(record.deny)


if __name__ == "__main__":
    sys.exit(main())
