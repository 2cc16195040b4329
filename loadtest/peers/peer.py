"""What a peer is: a program that may be installed, how it is started in a scene, and what is measured of it.

A program is looked for in `<directory>/<peer>/bin` of the directories given, and in `node_modules/.bin` there (one
environment a peer, since their dependencies conflict), beside this interpreter, and on the PATH.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import orjson

KEY: Final = "sk-loadtest-0123456789abcdef0123456789abcdef"
MODEL: Final = "public/deepseek-r1"
HOST: Final = "chat.d.run"
ROOT: Final = Path(__file__).parent.parent.parent
MAX_CONNECTIONS: Final = 8000
_SYSTEM_PLACES: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # where nginx and haproxy are, on no user's PATH
_NODE_MODULES: Final = "node_modules/.bin"
_BELOW_ENVIRONMENT: Final = ("bin", _NODE_MODULES)
_VERSION = re.compile(r"[0-9]+\.[0-9]+(?:\.[0-9]+)?(?:[.a-z0-9-]*)")


@dataclass(frozen=True, slots=True)
class Certificate:
    """The files, in PEM, of a certificate and its key."""

    path: Path
    key_path: Path


@dataclass(frozen=True, slots=True)
class Scene:
    """Where a peer runs: a directory of its own, its port, one more for what it wants beside it, the upstream's.

    nginx and HAProxy send the upstream a key of its own, unless they `keep_key`, the client's. With a certificate the
    port speaks TLS.
    """

    directory: Path
    port: int
    second_port: int
    upstream_port: int
    keep_key: bool = False
    certificate: Certificate | None = None

    @property
    def upstream(self) -> str:
        """The URL of the upstream."""
        return f"http://127.0.0.1:{self.upstream_port}"

    def file(self, name: str, text: str) -> str:
        """Write a file of the peer's and return its path."""
        path = self.directory / name
        path.write_text(text)
        return str(path)


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a peer, the key it wants to see, and the fields that each request needs besides."""

    command: list[str]
    key: str = KEY
    environment: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Peer:
    """One proxy.

    `program` of None is this interpreter. `package` is the package whose version is meant, when the program tells
    none. `load_divisor`: it gets so many times less load, because the whole would be far beyond one core of it;
    costs are per unit of work and stay comparable, latencies then flatter it. `tls`: it can serve TLS. `only`: the
    measures that it is there for, empty for all. `streams`: it passes streams on.
    """

    name: str
    text: str
    launch: Callable[[str, Scene], Launch]
    program: str | None = None
    package: str = ""
    version_argument: str = ""
    install: str = ""
    checks_keys: bool = False
    load_divisor: int = 1
    tls: bool = False
    only: frozenset[str] = frozenset()
    streams: bool = True

    def find(self, directories: Sequence[Path]) -> str | None:
        """Return the path of the program, or None."""
        if self.program is None:
            return sys.executable
        names = dict.fromkeys((self.name, self.package or self.name))
        places = [
            str(directory / name / below) for directory in directories for name in names for below in _BELOW_ENVIRONMENT
        ]
        places += [str(directory) for directory in directories]
        places += [str(Path(sys.executable).parent), *os.get_exec_path(), *_SYSTEM_PLACES]
        return shutil.which(self.program, path=os.pathsep.join(places))

    def version(self, program: str) -> str:
        """Return the version of what was found."""
        if self.program is None:
            return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in self.package.split())
        if _NODE_MODULES in program:
            return _npm_version(Path(program).resolve())
        if self.version_argument:
            done = _run([program, *self.version_argument.split()])
        else:
            # A console script says in its first line which interpreter has the package.
            interpreter = Path(program).read_text().partition("\n")[0].removeprefix("#!").strip()
            code = f"import importlib.metadata as m; print(m.version({self.package!r}))"
            done = _run([interpreter, "-c", code])
        found = _VERSION.search(done)
        return found[0] if found else "version unknown"


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def _npm_version(script: Path) -> str:
    """Return the version of the package that a script is of."""
    for directory in script.parents:
        if (package := directory / "package.json").is_file():
            return str(orjson.loads(package.read_bytes()).get("version", "version unknown"))
    return "version unknown"


def directories(given: Sequence[Path]) -> list[Path]:
    """Return the directories of peers: those given, then `$LOADTEST_PEERS`."""
    told = os.environ.get("LOADTEST_PEERS", "")
    return [path.absolute() for path in (*given, *(Path(each) for each in told.split(os.pathsep) if each))]
