"""`edge simulate`: run the simulated model server alone."""

import argparse
from dataclasses import fields
from typing import Final, get_args

from edge.commands.arguments import address, checked
from edge.commands.event_loop import run_to_end
from edge.config.values import Address, seconds
from edge.simulator import server as simulator
from edge.simulator.behaviour import Behaviour, Dialect, Fault, Framing, RequestIds, Text

_ADDRESS: Final = Address("127.0.0.1", 9001)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `edge simulate`."""
    add = parser.add_argument
    add("--listen", type=checked(_address), default=_ADDRESS, metavar="HOST:PORT", help="default 127.0.0.1:9001")
    add("--dialect", choices=get_args(Dialect), default="vllm", help="whose habits (default vllm)")
    to_first = "to the first token (default 200ms)"
    add("--ttft", dest="ttft_ms", type=checked(_milliseconds), default=200.0, metavar="TIME", help=to_first)
    rate = "tokens a second of one stream (default 50); 0: no pause"
    add("--rate", type=float, default=50.0, metavar="N", help=rate)
    add("--tokens", type=int, default=64, metavar="N", help="tokens of an answer (default 64)")
    jitter = "0 to 1 of the pause between tokens (default 0)"
    add("--jitter", type=float, default=0.0, metavar="SHARE", help=jitter)
    add("--prompt-tokens", type=int, default=12, metavar="N", help="of the prompt, in usage (default 12)")
    add("--fault", choices=get_args(Fault), help="fail every answer in this way")
    add("--status", type=int, default=500, metavar="CODE", help="of --fault error (default 500)")
    after = "sent before the fault (default 0: the head only); -1: not even the head"
    add("--after", type=int, default=0, metavar="FRAMES", help=after)
    after_bytes = "of what follows, sent before the fault (default 0)"
    add("--after-bytes", type=int, default=0, metavar="N", help=after_bytes)
    framing = "of every answer (default: chunked for streams, else length)"
    add("--framing", choices=get_args(Framing), help=framing)
    context = "tokens of a prompt and its answer (default 32768)"
    add("--context-length", type=int, default=32_768, metavar="N", help=context)
    uneven = "tokens end within a character, or come together (default: off)"
    add("--uneven", action="store_true", help=uneven)
    cache = "remember how prompts began, and tell cached tokens (default: off)"
    add("--prefix-cache", action="store_true", help=cache)
    tokens = "tokens of prompts that are remembered, the longest unused goes first (default 250000)"
    add("--cache-tokens", type=int, default=0, metavar="N", help=tokens)
    per_token = "bytes of a prompt that are a token, in place of --prompt-tokens (default 0: none)"
    add("--bytes-per-token", type=float, default=0.0, metavar="N", help=per_token)
    prefill = "tokens a second at which prompts are read, one after another (default 0: at once)"
    add("--prefill-rate", type=float, default=0.0, metavar="N", help=prefill)
    batch = "what each further answer that is being written adds to the pause between tokens (default 0ms)"
    add("--batch", dest="batch_ms", type=checked(_milliseconds), default=0.0, metavar="TIME", help=batch)
    only_chat = "refuse paths of other kinds of models, as the engine does (default: off)"
    add("--only-chat", action="store_true", help=only_chat)
    text = "the same to everybody, or what follows from the prompt (default plain)"
    add("--text", choices=get_args(Text), default="plain", help=text)
    add("--thinks", type=int, default=0, metavar="N", help="tokens of such a text that are thoughts (default 0)")
    ids = "X-Request-Id that is taken: any, a uuid, or any and answered with (default any)"
    add("--request-ids", choices=get_args(RequestIds), default="any", help=ids)
    add("--model", action="append", metavar="NAME", help="serve this name only; may be repeated")


def run(parsed: argparse.Namespace) -> int:
    """Answer as a model server until a signal ends it."""
    return run_to_end(simulator.run(parsed.listen.host, parsed.listen.port, behaviour_from(parsed)))


def behaviour_from(parsed: argparse.Namespace) -> Behaviour:
    """Return the behaviour that the options ask for; raises `ValueError` that names a value out of range."""
    if not 0 <= parsed.rate <= 1_000_000:
        raise ValueError(f"rate must be between 0 and 1000000 tokens a second, not {parsed.rate!r}")
    given = {field.name: getattr(parsed, field.name) for field in fields(Behaviour) if hasattr(parsed, field.name)}
    interval_ms = 1000 / parsed.rate if parsed.rate else 0
    return Behaviour(**given, interval_ms=interval_ms, served=tuple(parsed.model) if parsed.model else None)


def _milliseconds(text: str) -> float:
    return seconds(text) * 1000


def _address(text: str) -> Address:
    found = address(text)
    if found.path is not None:
        raise ValueError('a simulator listens on no unix socket: write "host:port"')
    return found
