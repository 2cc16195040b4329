"""The clients: which packages they need, pinned, and where those are installed."""

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_DRIVERS: Final = Path(__file__).parent / "drivers"


@dataclass(frozen=True)
class Client:
    """One SDK in one API.

    `packages`: what pip or npm installs. `driver`: its program in `drivers/`; what ends in `.mjs` is for Node.
    `own`: the packages whose exceptions its users know, as opposed to those of the HTTP library below.
    """

    name: str
    packages: tuple[str, ...]
    driver: str
    own: tuple[str, ...]
    api: str = "chat"

    @property
    def is_node(self) -> bool:
        """Whether Node runs it."""
        return self.driver.endswith(".mjs")


_OPENAI: Final = ("openai==3.57.0",)
_OPENAI_NODE: Final = ("openai@7.59.0",)
CLIENTS: Final = (
    Client("openai-0.28.1", ("openai==0.28.1",), "openai_028_chat.py", ("openai",)),
    # httpx 0.28 took away an argument that 1.0.0 gives.
    Client("openai-1.0.0", ("openai==1.0.0", "httpx==0.27.2"), "openai_chat.py", ("openai",)),
    Client("openai", _OPENAI, "openai_chat.py", ("openai",)),
    Client("openai-responses", _OPENAI, "openai_responses.py", ("openai",), "responses"),
    Client("anthropic", ("anthropic==2.14.0",), "anthropic_messages.py", ("anthropic",), "messages"),
    Client("langchain-openai", ("langchain-openai==1.7.4",), "langchain_chat.py", ("langchain_openai", "openai")),
    # Never 1.82.7, 1.82.8 or 1.107.0: these releases are known bad.
    Client("litellm", ("litellm==1.106.2",), "litellm_chat.py", ("litellm",)),
    Client("pydantic-ai", ("pydantic-ai-slim[openai]==2.68.0",), "pydantic_ai_chat.py", ("pydantic_ai",)),
    Client("node-openai", _OPENAI_NODE, "openai_chat.mjs", ("openai",)),
    Client("node-openai-responses", _OPENAI_NODE, "openai_responses.mjs", ("openai",), "responses"),
    Client("node-anthropic", ("@anthropic-ai/sdk@1.14.0",), "anthropic_messages.mjs", ("anthropic",), "messages"),
    Client("ai-sdk", ("ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92"), "ai_chat.mjs", ("ai",)),
    Client("ai-sdk-responses", ("ai@7.0.173", "@ai-sdk/openai@4.0.118"), "ai_responses.mjs", ("ai",), "responses"),
)  # fmt: skip


def installed(client: Client, cache: Path) -> list[str]:
    """Return the command that runs a client's driver; what it needs is installed once in `cache`."""
    pins = " ".join((sys.implementation.cache_tag or "", *client.packages))
    home = cache / hashlib.sha256(pins.encode()).hexdigest()[:16]
    done = home / "installed"
    if not done.exists():
        shutil.rmtree(home, ignore_errors=True)  # of an installation that was ended
        home.mkdir(parents=True)
        if client.is_node:
            _run("npm", "install", "--prefix", home, "--no-audit", "--no-fund", "--ignore-scripts", *client.packages)
        else:
            _run(sys.executable, "-m", "venv", home)
            _run(home / "bin/python", "-m", "pip", "install", "--quiet", *client.packages)
        done.touch()
    if not client.is_node:
        return [str(home / "bin/python"), str(_DRIVERS / client.driver)]
    for driver in _DRIVERS.glob("*.mjs"):  # Node looks for packages beside the file that imports them
        shutil.copy(driver, home)
    return ["node", str(home / client.driver)]


def _run(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed: {done.stdout}{done.stderr}")
