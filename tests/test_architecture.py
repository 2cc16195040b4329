"""The shape of the package: imports point one way, every module can be imported alone and has its tests."""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

from edge.journal.sinks.table import SINKS
from edge.keys.stores.table import STORES

ROOT = Path(__file__).parent.parent
EDGE = ROOT / "edge"
MODULES = sorted(path.relative_to(EDGE) for path in EDGE.rglob("*.py"))

# Modules without a test file of their name, and what tests them instead.
TESTED_ELSEWHERE = {
    "attempt.py": "behaviour/test_passthrough.py and test_usage.py: what upstreams are sent",
    "client/addresses.py": "client/test_server.py: what one address may hold, behind a proxy too",
    "client/answers.py": "client/test_connection.py: every error as a whole response",
    "client/arrival.py": "client/test_server.py: connections before their TLS is ready",
    "config/process_settings.py": "config/test_settings.py: each setting by its declaration",
    "client/body.py": "behaviour/test_bad_input.py: bodies that are late, too long or malformed",
    "client/bounds.py": "client/test_connection.py: what the parser refuses",
    "client/head.py": "behaviour/test_api.py and test_bad_input.py: what heads say",
    "client/steps.py": "behaviour/test_bad_input.py: chunks that are refused, and long bodies in chunks",
    "commands/arguments.py": "commands/test_commands.py and behaviour/test_demo.py: exit code 2 of wrong usage",
    "commands/check.py": "behaviour/test_demo.py: as a person runs it",
    "commands/demo.py": "behaviour/test_demo.py: as a person runs it",
    "commands/diff.py": "behaviour/test_explain.py: what a reload would do",
    "commands/event_loop.py": "behaviour/test_demo.py: threads for names whose servers are dead",
    "commands/keys.py": "behaviour/test_keys.py: as a person runs it",
    "commands/schema.py": "behaviour/test_explain.py: what is shipped",
    "commands/serve.py": "behaviour/test_demo.py: as a person runs it",
    "config/delays.py": "config/test_reading.py: the case of hedge_after",
    "config/kinds.py": "config/test_reading.py: golden cases of every kind; test_schema.py and test_manual.py",
    "config/rules.py": "config/test_reading.py: golden cases of every rule",
    "config/steering.py": "envelope/test_steering.py: each member of each list",
    "config/tables.py": "config/test_reading.py: golden cases of what is no table",
    "config/zones.py": "limits/test_periods.py: zones that are known, and that are not",
    "envelope/long_json.py": "envelope/test_json.py: read beside a short body",
    "exchange.py": "holds facts only; every test of the log reads them",
    "forwarding.py": "behaviour/test_retries.py, test_failover.py and test_queue.py: who is asked, and how they wait",
    "generation.py": "behaviour/test_reload.py: what a request keeps while the file changes",
    "hedging.py": "behaviour/test_hedging.py: two servers of one request",
    "journal/ends.py": "commands/test_usage.py and journal/test_index.py: sums agree with what was recorded",
    "journal/following.py": "journal/test_index.py and test_spent.py: the two indexes that follow",
    "journal/rotating.py": "journal/test_journal.py: the journal's files",
    "journal/sinks/protocol.py": "journal/test_sinks.py: one suite over all sinks",
    "journal/sinks/table.py": "journal/test_sinks.py: one suite over all sinks",
    "keys/stores/backup.py": "keys/test_registry.py: what is restored, and what is refused",
    "keys/stores/protocol.py": "keys/test_stores.py: one suite over all stores",
    "keys/stores/table.py": "keys/test_stores.py: one suite over all stores",
    "limits/counters.py": "limits/test_admission.py and test_shared.py: counters are used through both",
    "limits/shared_quotas.py": "limits/test_quotas.py: one suite over the journal and Redis",
    "limits/terms.py": "limits/test_admission.py and test_quotas.py: headers and refusals",
    "own_answers.py": "behaviour/test_paths.py and test_api.py: models, and paths that are not served",
    "sockets.py": "behaviour/test_discovery.py and client/test_connection.py: options that connections have",
    "judgement.py": "behaviour/test_health.py and test_retries.py: every row of the table of upstream/health.py",
    "metering/documents.py": "metering/test_meters.py: one suite over all meters",
    "metering/events.py": "metering/test_meters.py: one suite over all meters",
    "metering/usage_objects.py": "metering/test_meters.py: usage in every dialect, and nonsense",
    "process/quotas.py": "limits/test_quotas.py: one suite over the journal and Redis",
    "process/admin.py": "behaviour/test_admin.py",
    "process/api/documents.py": "behaviour/test_key_api.py",
    "process/api/endpoints.py": "behaviour/test_key_api.py",
    "process/api/guard.py": "behaviour/test_key_api.py: who shows the token, and who does not",
    "process/api/keys.py": "behaviour/test_key_api.py",
    "process/api/openapi.py": "behaviour/test_key_api.py: every answer is held against it",
    "process/deadline.py": "process/test_stop.py: the last moment of a stop",
    "process/drain.py": "behaviour/test_drain.py: a running process that is told to stop",
    "process/ending.py": "process/test_stop.py: parts that hang, and further signals",
    "process/key_uses.py": "behaviour/test_key_api.py: a use that is noted",
    "process/parts.py": "behaviour/test_status.py: all of them are shown",
    "process/reloading.py": "behaviour/test_reload.py: a running process and its file",
    "process/snapshot.py": "behaviour/test_status.py: the document of a running process",
    "process/status.py": "behaviour/test_admin.py: what a running process shows",
    "process/status_page.py": "behaviour/test_status.py: events and files as a browser asks for them",
    "proxy.py": "behaviour tests: it is the order of everything",
    "relay/heads.py": "relay/test_relay.py: heads as clients get them",
    "relay/pace.py": "relay/test_relay.py by a clock of its own, and behaviour/test_backpressure.py",
    "relay/terms.py": "holds what others are given; relay/test_relay.py",
    "relay/verbatim.py": "relay/test_relay.py: every answer in every cut",
    "plan.py": "behaviour/test_plans.py: a kept connection meets what a new one does",
    "resuming.py": "behaviour/test_resume.py: streams that go on, and every reason why one does not",
    "settlement.py": "behaviour/test_ends.py: record, log line and metrics agree on every end",
    "upstream/tokenizer.py": "behaviour/test_resume.py: servers that count, hang, or have no tokenizer",
    "simulator/dialects.py": "simulator/test_server.py: what a simulated server says, as it says it",
    "stage.py": "behaviour/test_drain.py: every stage of a stop",
    "telemetry/line_writer.py": "telemetry/test_access_log.py and test_process_log.py: a stuck reader",
    "tls.py": "keys/test_stores.py and journal/test_sinks.py: a CA file that is none",
    "upstream/cache_metrics.py": "behaviour/test_cache_aware.py: what was predicted, and what was so",
    "upstream/discovery.py": "behaviour/test_discovery.py: pools whose members come and go",
    "upstream/probes.py": "behaviour/test_retries.py: endpoints that are asked",
    "valkey.py": "keys/test_stores.py: a store over it",
}

# The rows of a table, which one suite tests; it fails where a row lacks what the suite needs.
TESTED_ELSEWHERE |= {
    row.__module__.removeprefix("edge.").replace(".", "/") + ".py": suite
    for table, suite in ((STORES, "keys/test_stores.py"), (SINKS, "journal/test_sinks.py"))
    for row in table.values()
}


def test_imports_point_down_the_request_path() -> None:
    """The contracts of pyproject.toml; a cycle or a framework in the pure core is an error."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_module_has_its_tests_or_a_reason() -> None:
    tested = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}

    def is_tested(module: Path) -> bool:
        folder = Path(module.parts[0]) if len(module.parts) > 1 else Path()
        return module.name in ("__init__.py", "__main__.py") or folder / f"test_{module.name}" in tested

    assert [str(each) for each in MODULES if not is_tested(each) and str(each) not in TESTED_ELSEWHERE] == []
    assert sorted(set(TESTED_ELSEWHERE) - set(map(str, MODULES))) == []


# A model server, and what four dialects say.
LONG = {"edge/simulator/server.py", "edge/simulator/dialects.py"}
TREES = {module: ast.parse((EDGE / module).read_text()) for module in MODULES}


def test_no_module_is_longer_than_a_sitting() -> None:
    paths = [*EDGE.rglob("*.py"), *(ROOT / "loadtest").rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert {module: count for module, count in lines.items() if count > 450 and module not in LONG} == {}


def test_no_class_does_the_work_of_two() -> None:
    """At most 30 methods and 20 slots."""
    classes = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    methods = {each.name: sum(isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) for part in each.body)
               for each in classes}  # fmt: skip
    assert {name: count for name, count in methods.items() if count > 30} == {}
    slots = {
        each.name: len(part.value.elts)
        for each in classes
        for part in each.body
        if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "__slots__"
        if isinstance(part.value, ast.Tuple)
    }
    assert {name: count for name, count in slots.items() if count > 20} == {}


def test_an_answer_is_relayed_by_what_six_things_say_at_most() -> None:
    from edge.relay.relay import relay

    assert len(inspect.signature(relay).parameters) <= 6


def test_exchange_alone_writes_how_and_when_a_request_ended() -> None:
    writers = {
        f"{module}:{node.lineno}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr in ("end", "finished")
    }
    assert {place.partition(":")[0] for place in writers} <= {"exchange.py"}


def test_map_of_the_package_names_every_folder_and_module() -> None:
    named = set(re.findall(r"^    (\w+(?:\.py|/)) ", (EDGE / "__init__.py").read_text(), re.MULTILINE))
    there = {f"{each.parts[0]}/" if len(each.parts) > 1 else each.name for each in MODULES}
    assert named == there - {"__init__.py"}


def test_every_module_imports_alone_without_a_warning() -> None:
    """Each in a fork of an interpreter that has what is not ours, so that no other import has prepared the ground."""
    names = [".".join(("edge", *each.with_suffix("").parts)).removesuffix(".__init__") for each in MODULES]
    code = """
import gc, importlib, os, sys
gc.disable()  # which would touch every page in each fork
import aiocache, aiohttp.web, jwt, msgspec, orjson, prometheus_client, redis.asyncio, uvloop
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        importlib.import_module(name)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(name)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, *names], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_package_starts_nothing() -> None:
    """No thread, no event loop, no file: whatever runs is started by a command."""
    code = (
        "import threading, asyncio, edge.process.server, edge.simulator.server\n"
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
