"""The shape of the package: imports point one way, every module can be imported alone and has its tests."""

import fnmatch
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(path.stem for path in (ROOT / "edge").glob("*.py"))

# Modules without a tests/unit/test_<module>.py, and what tests them instead.
TESTED_ELSEWHERE = {
    "__init__": "holds no code",
    "__main__": "commands are run as processes",
    "admin": "behaviour/test_admin.py",
    "dialects": "unit/test_simulator.py: what a simulated server says, as it says it",
    "discovery": "behaviour/test_discovery.py: pools whose members come and go",
    "document_meters": "unit/test_metering.py: one suite over all meters",
    "event_meters": "unit/test_metering.py: one suite over all meters",
    "exchange": "holds facts only; every test of the log reads them",
    "probes": "behaviour/test_retries.py: endpoints that are asked",
    "reloading": "behaviour/test_reload.py: a running process and its file",
    "sink_http": "unit/test_sinks.py: one suite over both sinks",
    "sink_redis": "unit/test_sinks.py: one suite over both sinks",
    "usage_objects": "unit/test_metering.py: usage in every dialect, and nonsense",
    "proxy": "behaviour tests: it is the order of everything",
    "status": "behaviour/test_admin.py: what a running process shows",
}


def test_imports_point_down_the_request_path() -> None:
    """The contracts of pyproject.toml; a cycle or a framework in the pure core is an error."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_module_has_its_tests_or_a_reason() -> None:
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "unit").glob("test_*.py")}
    missing = [module for module in MODULES if module not in tested and module not in TESTED_ELSEWHERE]
    assert missing == []
    assert sorted(set(TESTED_ELSEWHERE) - set(MODULES)) == []


def test_map_of_the_package_names_every_module() -> None:
    text = (ROOT / "edge" / "__init__.py").read_text()
    named = {name for pattern in re.findall(r"[a-z_*]+\.py", text) for name in fnmatch.filter(MODULES, pattern[:-3])}
    assert sorted(set(MODULES) - named) == ["__init__"]


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__"])
def test_module_imports_alone_without_a_warning(module: str) -> None:
    """In an interpreter of its own, so that no other import has prepared the ground."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import edge.{module}"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_package_starts_nothing() -> None:
    """No thread, no event loop, no file: whatever runs is started by a command."""
    code = (
        "import threading, asyncio, edge.server, edge.simulator\n"
        "assert threading.active_count() == 1\n"
        "assert asyncio.get_event_loop_policy()._local._loop is None"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_package_is_typed() -> None:
    spec = importlib.util.find_spec("edge")
    assert spec is not None
    assert spec.origin is not None
    assert (Path(spec.origin).parent / "py.typed").exists()
