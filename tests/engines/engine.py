"""What an engine is to these runs: packages in an environment of their own, servers on loopback, counters."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

INSIDE: Final = Path(__file__).parent / "inside"  # programs that run in an engine's environment
OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass(frozen=True)
class Counts:
    """Tokens; `cached` ones are among those of the prompt."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.prompt + other.prompt, self.cached + other.cached, self.completion + other.completion)

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(self.prompt - other.prompt, self.cached - other.cached, self.completion - other.completion)


@dataclass(frozen=True)
class Counters:
    """The metrics of an engine, by name, each summed over its labels.

    `leaves_out_cached`: tokens that the engine had cached are not counted among those of prompts. `busy`: what is above
    0 while the engine works.
    """

    prompt: str
    completion: str
    busy: tuple[str, ...]
    leaves_out_cached: bool = False

    async def read(self, session: aiohttp.ClientSession, url: str) -> tuple[Counts, bool]:
        """Return what the engine counted since its start, and whether it works on something now."""
        async with session.get(f"{url}/metrics") as answer:
            text = await answer.text()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0) + sample.value
        counts = Counts(int(found.get(self.prompt, 0)), 0, int(found.get(self.completion, 0)))
        return counts, any(found.get(name, 0) for name in self.busy)


@dataclass(frozen=True)
class Server:
    """One process of an engine.

    `command`: its words, by its port; it is started in the directory of the models. `counters`: None for an engine that
    has none, where the usage that it tells its client counts. `paths`: what it is asked. `ready`: answers 200 once it
    can be asked.
    """

    name: str
    command: Callable[[int], list[str]]
    model: str
    paths: frozenset[str]
    counters: Counters | None
    ready: str = "/health"
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Engine:
    """An engine, pinned.

    `dialect`: `engine` of its pool. `steps`: installations by pip, each the arguments of one. `prepare`: what else its
    environment needs. `model`: the program in `inside/` that writes the models into the directory that it is given.
    `cut`: what a request has beside the case's own, if its answer is not read to the end; `fails`: if it is to fail.
    """

    name: str
    title: str
    dialect: str
    steps: tuple[tuple[str, ...], ...]
    model: str
    servers: Callable[[Path], tuple[Server, ...]]
    prepare: Callable[[Path], None] = lambda home: None
    cut: Mapping[str, Any] = field(default_factory=dict)
    fails: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pins(self) -> str:
        """The packages with their versions."""
        return ", ".join(word for step in self.steps for word in step if "==" in word)


def installed(engine: Engine, cache: Path) -> Path:
    """Return the home of an engine in `cache`: its environment `bin/`, its models `models/`; made where it is not."""
    pins = " ".join((sys.implementation.cache_tag or "", *(word for step in engine.steps for word in step)))
    home = cache / f"{engine.name}-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"
    done = home / "installed"
    if not done.exists():
        shutil.rmtree(home, ignore_errors=True)  # of an installation that was ended
        _run(sys.executable, "-m", "venv", home)
        for step in engine.steps:
            _run(home / "bin/python", "-m", "pip", "install", "--quiet", *step)
        engine.prepare(home)
        done.touch()
    shutil.rmtree(home / "models", ignore_errors=True)
    (home / "models").mkdir()
    _run(home / "bin/python", INSIDE / engine.model, home / "models")
    return home


def _run(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
