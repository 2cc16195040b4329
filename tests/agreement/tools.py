"""How each benchmark is called, and where its result has the numbers that are compared."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.agreement.server import TOKENS

ROOT: Final = Path(__file__).parents[2]
# `vllm bench serve` without the other commands, which want what only a server needs.
_VLLM: Final = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\nadd_cli_args(parser)\nmain(parser.parse_args())"
)
_WORDS: Final = ("word", "time", "year", "people", "way", "day", "man", "thing")


@dataclass(frozen=True, slots=True)
class Load:
    """What each tool is asked to send: so many requests, evenly, at a rate."""

    url: str
    scenario: str
    requests: int
    rate: float
    directory: Path


Numbers = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Tool:
    """A benchmark: its command, given a program, and its numbers; `offline`: it finds a local tokenizer even then."""

    command: Callable[[str, Load], list[str]]
    read: Callable[[Path], Numbers]
    offline: bool = True


def tokenizer(directory: Path) -> None:
    """Write what the others want: a tokenizer of a few words, each a token, and prompts of them."""
    vocabulary = {f"▁{word}": number for number, word in enumerate(_WORDS)} | {"<unk>": len(_WORDS)}
    document = {
        "version": "1.0",
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
        "added_tokens": [],
        "normalizer": None,
        "post_processor": None,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    }
    (directory / "tokenizer.json").write_text(json.dumps(document))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "model_max_length": 100_000}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    prompts = [{"prompt": " ".join(_WORDS), "text": " ".join(_WORDS), "output_tokens": TOKENS} for _ in range(2000)]
    (directory / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))


def _loadtest(program: str, load: Load) -> list[str]:
    return [
        *(program, "-m", "loadtest", "run", "--target", load.url, "--model", load.scenario),
        *("--num-prompts", str(load.requests), "--request-rate", str(load.rate), "--burstiness", "1000"),
        *("--output-len", str(TOKENS), "--save-result", str(load.directory / "result.json")),
    ]


def _read_loadtest(directory: Path) -> Numbers:
    told = json.loads((directory / "result.json").read_text())
    return _as_vllm(told, "ttft") | {"first event": told["mean_vllm_ttft_ms"], "void": float(bool(told["void"]))}


def _vllm(program: str, load: Load) -> list[str]:
    return [
        *(program, "-c", _VLLM, "--backend", "openai-chat", "--base-url", load.url),
        *("--endpoint", "/v1/chat/completions", "--model", load.scenario, "--tokenizer", str(load.directory)),
        *("--dataset-name", "custom", "--dataset-path", str(load.directory / "prompts.jsonl"), "--skip-chat-template"),
        *("--custom-output-len", str(TOKENS), "--num-prompts", str(load.requests), "--disable-tqdm"),
        *("--request-rate", str(load.rate), "--burstiness", "1000", "--percentile-metrics", "ttft,tpot,itl,e2el"),
        *("--save-result", "--result-dir", str(load.directory), "--result-filename", "result.json"),
    ]


def _read_vllm(directory: Path) -> Numbers:
    told = json.loads((directory / "result.json").read_text())
    return _as_vllm(told, "ttft") | {"first event": told["mean_ttft_ms"]}


def _as_vllm(told: Mapping[str, Any], ttft: str) -> Numbers:
    return {
        "TTFT": told[f"mean_{ttft}_ms"],
        "TPOT": told["mean_tpot_ms"],
        "E2EL": told["mean_e2el_ms"],
        "tok/s": told["output_throughput"],
        "failed": told["failed"],
    }


def _guidellm(program: str, load: Load) -> list[str]:
    return [
        *(program, "run", "--disable-console"),
        *("--backend", f"kind=openai_http,target={load.url},model={load.scenario},max_tokens={TOKENS}"),
        *("--profile", f"kind=constant,rate={load.rate}"),
        *("--constraint", f"kind=max_requests,count={load.requests}"),
        *("--data", f"kind=json_file,path={load.directory / 'prompts.jsonl'}"),
        *("--tokenizer", f"kind=hf_auto,model={load.directory}"),
        *("--output", f"kind=json,path={load.directory / 'result.json'}"),
    ]


def _read_guidellm(directory: Path) -> Numbers:
    metrics = json.loads((directory / "result.json").read_text())["benchmarks"][0]["metrics"]

    def mean(name: str) -> float:
        return float(metrics[name]["successful"]["mean"])

    return {
        "TTFT": mean("time_to_first_token_ms"),
        "TPOT": mean("inter_token_latency_ms"),  # without the first token, as TPOT of the others
        "E2EL": mean("request_latency") * 1e3,
        "tok/s": mean("output_tokens_per_second"),
        "failed": metrics["request_totals"]["errored"],
    }


def _aiperf(program: str, load: Load) -> list[str]:
    return [
        *(program, "profile", "--model", load.scenario, "--url", load.url, "--endpoint-type", "chat", "--streaming"),
        *("--tokenizer", str(load.directory), "--input-file", str(load.directory / "prompts.jsonl")),
        *("--custom-dataset-type", "single_turn", "--request-count", str(load.requests)),
        *("--request-rate", str(load.rate), "--arrival-pattern", "constant", "--ui-type", "none"),
        *("--output-artifact-dir", str(load.directory / "artifacts"), "--use-server-token-count"),
    ]


def _read_aiperf(directory: Path) -> Numbers:
    [path] = directory.glob("artifacts/**/profile_export_aiperf.json")
    told = json.loads(path.read_text())

    def mean(name: str) -> float | None:
        return told[name]["avg"] if told.get(name) else None

    return {
        "TTFT": mean("time_to_first_token"),
        "TPOT": mean("inter_token_latency"),
        "E2EL": mean("request_latency"),
        "tok/s": mean("output_token_throughput"),
        "failed": mean("error_request_count") or 0.0,
    }


TOOLS: Final = {
    "loadtest": Tool(_loadtest, _read_loadtest),
    "vllm": Tool(_vllm, _read_vllm),
    "guidellm": Tool(_guidellm, _read_guidellm),
    "aiperf": Tool(_aiperf, _read_aiperf, offline=False),
}


def measure(name: str, program: str, load: Load, timeout_s: float) -> Numbers:
    """Run a tool; raises `RuntimeError` with what it wrote last when it fails or writes no result."""
    tool = TOOLS[name]
    tokenizer(load.directory)
    environment = {**os.environ, "OPENAI_API_KEY": "none"}
    if tool.offline:
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        ran = subprocess.run(
            tool.command(program, load),
            cwd=ROOT if name == "loadtest" else load.directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(str(error)) from None
    try:
        return tool.read(load.directory)
    except (OSError, KeyError, ValueError, TypeError) as error:
        said = (ran.stdout + ran.stderr)[-600:]
        raise RuntimeError(f"{type(error).__name__}: {error}\n{said}") from error


def own_program() -> str:
    """Return the program that runs `loadtest`."""
    return sys.executable


def apart(ours: float, theirs: float) -> float:
    """Return by which share two numbers differ."""
    middle = statistics.fmean((ours, theirs))
    return abs(ours - theirs) / middle if middle else 0.0
