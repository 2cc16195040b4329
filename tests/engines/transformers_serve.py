"""`transformers serve`, which has no counters: what it tells its client counts."""

from pathlib import Path
from typing import Final

from tests.engines.cases import CHAT, COMPLETIONS, RESPONSES
from tests.engines.engine import OFFLINE, Engine, Server


def _servers(home: Path) -> tuple[Server, ...]:
    words = [str(home / "bin/python"), "-m", "transformers.cli.transformers", "serve", "./tiny", "--device", "cpu"]
    words += ["--host", "127.0.0.1", "--port"]
    paths = frozenset((CHAT, COMPLETIONS, RESPONSES))
    environment = OFFLINE | {"OMP_NUM_THREADS": "1"}
    return (Server("write", lambda port: [*words, str(port)], "./tiny", paths, None, "/health", environment),)


ENGINE: Final = Engine(
    "transformers",
    "transformers serve",
    "openai",
    (("torch==2.13.0", "transformers[serving]==5.24.0", "accelerate==1.15.0"),),
    "transformers_model.py",
    _servers,
    cut={"max_tokens": 60},  # it writes on when its client has left
    fails={"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 0},
)
