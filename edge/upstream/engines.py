"""What the edge must know of an engine. One more is its name in `config.settings.Engine`, a row here, and a dialect."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from edge.config.settings import Engine


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What differs from engine to engine.

    `health_paths` are asked in turn, and the first that is there (not a 404) counts; without one the file has to name
    a path. `tokenizes_at_root`: `tokenize` and `detokenize` are served at the root, not under the base path.
    `lists_while_busy`: to list its models it interrupts nothing that it generates.
    """

    health_paths: tuple[str, ...]
    tokenizes_at_root: bool = True
    lists_while_busy: bool = True


ENGINES: Final[Mapping[Engine, EngineFacts]] = {
    "vllm": EngineFacts(("/health",)),
    "sglang": EngineFacts(("/ready", "/health")),  # its /health answers while it loads its model
    "llamacpp": EngineFacts(("/health",), lists_while_busy=False),  # not so llama-cpp-python, which goes by its name
    "openai": EngineFacts((), tokenizes_at_root=False),  # a hosted API: all of it is under its base
}
