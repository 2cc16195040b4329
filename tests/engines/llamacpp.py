"""llama.cpp's server, as the wheel `xllamacpp` has it."""

from pathlib import Path
from typing import Final

from tests.engines.cases import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES
from tests.engines.engine import INSIDE, Counters, Engine, Server

_COUNTERS: Final = Counters(
    "llamacpp:prompt_tokens_total",
    "llamacpp:tokens_predicted_total",
    ("llamacpp:requests_processing", "llamacpp:requests_deferred"),
    leaves_out_cached=True,
)


def _servers(home: Path) -> tuple[Server, ...]:
    def server(name: str, *paths: str) -> Server:
        program = [str(home / "bin/python"), str(INSIDE / "llamacpp_server.py")]
        return Server(name, lambda port: [*program, str(port), name], "tiny.gguf", frozenset(paths), _COUNTERS)

    return server("write", CHAT, COMPLETIONS, MESSAGES, RESPONSES), server("embed", EMBEDDINGS)


ENGINE: Final = Engine(
    "llamacpp",
    "llama.cpp",
    "llamacpp",
    (("xllamacpp==2026.10.11549", "gguf==0.19.0"),),
    "gguf_model.py",
    _servers,
    cut={"cache_prompt": False},  # of a request that was cut nobody tells how much of it was cached
)
