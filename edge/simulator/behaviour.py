"""How a simulated model server answers, and what it refuses: the words of the simulator's other modules."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, get_args

import msgspec

Dialect = Literal["vllm", "sglang", "llamacpp", "openai"]
Fault = Literal["error", "error_first", "error_mid", "reset", "cut", "stall", "rubbish", "no_done"]
Framing = Literal["chunked", "length", "close"]
RequestIds = Literal["any", "uuid", "answered"]
Text = Literal["plain", "prompt"]
FASTAPI: Final[tuple[Dialect, ...]] = ("vllm", "sglang")  # servers on one framework, alike in much

MAX_BODY_BYTES: Final = 64 * 2**20  # as much as the edge lets through by default
MAX_TOKENS: Final = 100_000  # the frames of an answer are kept in memory: about 25 MB at this length


@dataclass(eq=False)
class Refusal(Exception):
    """A request that a real server would not answer either.

    `kind` is the engine's own name for the error where the status does not give it, `code` is OpenAI's; `members` are
    further members of the error's object. `late`: SGLang tells it in the stream of a message, if one was asked for.
    """

    status: int
    message: str
    param: str | None = None
    kind: str | None = None
    code: str | None = None
    members: Mapping[str, Any] = field(default_factory=dict)
    late: bool = False


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the simulator answers; one that exists is valid.

    `ttft_ms` runs from the end of the request to the first frame, `interval_ms` from one frame to the next (0: back to
    back); an answer that is no stream takes the sum. `jitter` (0 to 1) is the share by which an interval varies; equal
    requests vary equally. `tokens` is the number of frames with content, and in usage; the request's own limit and the
    context lower it. `framing` None is `chunked` for streams and `length` for the rest. `served` None serves any model;
    else others are refused where the dialect refuses them. `context_length` is in tokens.

    - `only_chat`: the model is a chat model, so paths of other kinds of models answer as the engine does then
    - `uneven`: of eight tokens one ends within a character, which comes with the next (with an empty frame before it
      from vLLM), and of vLLM's two come together, as they do when its API process lags
    - `prefix_cache`: prompts that began like earlier ones have cached tokens, and the flags that tell them are set
    - `cache_tokens`: how much is remembered of prompts, the longest unused goes first; 0 is 250,000
    - `bytes_per_token`: a prompt has a token for so many bytes; 0: it has `prompt_tokens`, whatever it is
    - `prefill_rate`: tokens a second at which prompts are read, one after another, but for what is cached; 0: at once
    - `batch_ms`: what each further answer that is being written adds to `interval_ms`
    - `request_ids`: `any` X-Request-Id will do; `uuid` refuses others with an empty 400, as llama-cpp-python 0.3.36
      does; `answered` makes the id of the answer of it, as vLLM does. Without `answered` equal requests get equal bytes
    - `ping_ms`: how long a stream of llama.cpp is silent before it sends a comment
    - `text`: `plain` says the same to everybody; `prompt` what follows from the prompt, and from a seed or chance where
      the temperature is not 0, in chat and text completions: its tokens are counted, and `tokenize` knows them
    - `weights`: another number is another model, which says something else
    - `ignores_flags`: an assistant's message at the end is not gone on with, whatever flags say, and ids are not read
    - `trims`: a template that takes the space around such a message away
    - `thinks`: so many tokens of a text that depends on its prompt are thoughts, which a parser tells apart, one more
      token ends them; DeepSeek-R1's template opens them. 0: there are none
    - `once`: the fault meets the first request of this name in the process only, at whichever server

    Faults:
    - `error`: an error of `status` in place of the answer
    - `error_first`: status 200, and the error where the first token belongs
    - `error_mid`: an error after `after` frames, told as the dialect tells it
    - `reset`, `cut`, `stall`: RST, FIN, or silence until the client goes, after the head, `after` frames and
      `after_bytes` bytes of what would follow; `after` -1 is before the head. A body that is no stream is one frame
    - `rubbish`: bytes that are no HTTP in place of the answer, then FIN
    - `no_done`: a clean end without `[DONE]`

    Raises: `ValueError` when a value is out of range; the message names the field and what it may be.
    """

    dialect: Dialect = "vllm"
    ttft_ms: float = 0
    interval_ms: float = 0
    tokens: int = 16
    jitter: float = 0
    fault: Fault | None = None
    status: int = 500
    after: int = 0
    after_bytes: int = 0
    framing: Framing | None = None
    prompt_tokens: int = 12
    served: tuple[str, ...] | None = None
    context_length: int = 32_768
    only_chat: bool = False
    uneven: bool = False
    prefix_cache: bool = False
    cache_tokens: int = 0
    bytes_per_token: float = 0
    prefill_rate: float = 0
    batch_ms: float = 0
    request_ids: RequestIds = "any"
    ping_ms: float = 30_000  # llama.cpp's default
    text: Text = "plain"
    weights: int = 0
    ignores_flags: bool = False
    trims: bool = False
    thinks: int = 0
    once: str = ""

    def __post_init__(self) -> None:
        _require_choice("dialect", self.dialect, get_args(Dialect))
        _require_choice("fault", self.fault, (None, *get_args(Fault)))
        _require_choice("framing", self.framing, (None, *get_args(Framing)))
        _require_choice("request_ids", self.request_ids, get_args(RequestIds))
        _require_choice("text", self.text, get_args(Text))
        _require_range("ttft_ms", self.ttft_ms, 0, 86_400_000)
        _require_range("interval_ms", self.interval_ms, 0, 86_400_000)
        _require_range("tokens", self.tokens, 0, MAX_TOKENS)
        _require_range("jitter", self.jitter, 0, 1)
        _require_range("status", self.status, 400, 599)
        _require_range("after", self.after, -1, MAX_TOKENS * 2)
        _require_range("after_bytes", self.after_bytes, 0, MAX_BODY_BYTES)
        _require_range("prompt_tokens", self.prompt_tokens, 0, 10_000_000)
        _require_range("context_length", self.context_length, 1, 10_000_000)
        _require_range("cache_tokens", self.cache_tokens, 0, 100_000_000)
        _require_range("bytes_per_token", self.bytes_per_token, 0, 1_000)
        _require_range("prefill_rate", self.prefill_rate, 0, 1e9)
        _require_range("batch_ms", self.batch_ms, 0, 86_400_000)
        _require_range("thinks", self.thinks, 0, MAX_TOKENS)
        _require_range("ping_ms", self.ping_ms, 1, 86_400_000)

    def steered(self, simulate: Mapping[str, Any] | None) -> "Behaviour":
        """Return this behaviour with the members of a request's `simulate` object in place of its own.

        Raises: `Refusal` when a member is unknown or has a wrong value.
        """
        if not simulate:
            return self
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        if unknown := sorted(set(simulate) - set(own)):
            raise Refusal(400, f"simulate: unknown {', '.join(unknown)}; use {', '.join(own)}", "simulate")
        try:
            return msgspec.convert(own | dict(simulate), Behaviour)
        except msgspec.ValidationError as error:
            raise Refusal(400, f"simulate: {error}", "simulate") from None


def _require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(str(c) for c in choices if c)}, not {value!r}")


def _require_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {value!r}")
