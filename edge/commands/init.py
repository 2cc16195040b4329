"""`edge init`: write a first routes.toml, for one pool, with comments that say what to change."""

import argparse
from pathlib import Path
from typing import Final, get_args

from edge.commands.arguments import add_config, checked
from edge.config.reading import parse
from edge.config.settings import WITHOUT_HEALTH_PATH, Engine
from edge.config.values import parse_base
from edge.errors import Unusable
from edge.names import check_model_name

_FILE: Final = """\
# What the edge serves. `edge check` proves this file, and a running edge follows it within two seconds.
# Durations: ms s m h d. Sizes: KiB MiB GiB. "${{NAME}}" takes an environment variable. Paths are relative to this file.

[server]
listen = "127.0.0.1:8080"  # where clients connect; "0.0.0.0:8080" for other machines too
admin = "127.0.0.1:9090"   # /status, /readyz and /metrics: no key is asked for, so keep it off public addresses
# tls = {{ certificate = "tls.crt", private_key = "tls.key" }}

[keys]
store = "sqlite:edge.db"   # made by the first `edge keys create`

[usage]
journal = "usage"          # a directory: who used what, two lines for each request

# [limits.standard]        # for each route with limit = "standard"
# requests_per_minute = 60
# tokens_per_minute = 100_000

[pools.{pool}]
endpoints = [
    "{url}",  # a path in it takes the place of /v1
    # {{ url = "https://models.example", api_key = "${{UPSTREAM_KEY}}" }},
]
engine = "{engine}"            # one of {engines}
# max_inflight = 64        # requests at once at each endpoint; further ones go to another, or wait in the queue
# queue = 100
{health}
[routes."{model}"]  # the name that clients ask for
pool = "{pool}"
{upstream}metered = true             # tokens are counted for billing and limits
"""
_HEALTH: Final = """
[pools.{pool}.health]      # an endpoint that fails two probes gets no requests until it passes one
interval = "5s"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `edge init`."""
    add = parser.add_argument
    add("url", nargs="?", type=checked(_url), default="http://127.0.0.1:8000", metavar="URL",
        help="of the model's server; default %(default)s")  # fmt: skip
    add("--model", type=checked(_model), default="public/my-model", metavar="NAME", help="default %(default)s")
    add("--upstream-model", type=checked(_plain), metavar="NAME", help="what the server calls it; default: the same")
    add("--engine", choices=get_args(Engine), default="vllm", help="what runs there; default %(default)s")
    add_config(parser)


def run(parsed: argparse.Namespace) -> int:
    """Write the file, and print what comes next; raises `Unusable` where there is one already."""
    path: Path = parsed.config
    text = first_file(parsed.url, parsed.model, parsed.upstream_model, parsed.engine)
    parse(text, path, {"UPSTREAM_KEY": ""})
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise Unusable(f"{path} is there already: remove it, or write another --config") from None
    option = "" if path == Path("routes.toml") else f" --config {path}"
    print(
        f"{path} is written. Next:\n"
        f"  edge check {path}\n"
        f"  edge keys create{option} --user u-1100a15812cc --name laptop\n"
        f"  edge serve{option}\n"
        f"  edge status{option}"
    )
    return 0


def first_file(url: str, model: str, upstream_model: str | None, engine: Engine) -> str:
    """Return the text of a first routes.toml."""
    upstream = f'model = "{upstream_model}"\nmodel_echo = true         # answers carry the name that was asked for\n'
    return _FILE.format(
        url=url,
        model=model,
        pool="models",
        engine=engine,
        engines=", ".join(get_args(Engine)),
        upstream=upstream if upstream_model else "",
        health="" if engine in WITHOUT_HEALTH_PATH else _HEALTH.format(pool="models"),
    )


def _url(text: str) -> str:
    parse_base(text)
    return _plain(text)


def _model(text: str) -> str:
    check_model_name(text)
    if not text or "*" in text:
        raise ValueError("no model's name: write one such as public/my-model")
    return _plain(text)


def _plain(text: str) -> str:
    """Return text that stands as it is in quotes of TOML."""
    if '"' in text or "\\" in text or "$" in text or not text.isprintable():
        raise ValueError("a character that has a meaning in routes.toml: write it into the file by hand")
    return text
