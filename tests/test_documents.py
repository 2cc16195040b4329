"""The documents against what they describe: a running edge, the commands, the tree."""

import asyncio
import json
import logging
import re
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, Final

import pytest
import trustme
from prometheus_client.parser import text_string_to_metric_families

from edge import errors
from edge.__main__ import main
from edge.config.steering import STEERING
from edge.exchange import End, Phase, UsageSource
from edge.simulator.server import Simulator
from edge.telemetry.process_log import JsonFormatter
from tests.conftest import ROUTES, Edge, RawClient, ScriptedConnection, StartEdge, StartUpstream
from tests.records import finished

ROOT: Final = Path(__file__).parent.parent
DOCUMENTS: Final = (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("loadtest/*.md")))
OPERATING: Final = ROOT / "docs/operating.md"
RUNBOOK: Final = ROOT / "docs/runbook.md"
CONTRIBUTING: Final = ROOT / "docs/contributing.md"

_LINK: Final = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING: Final = re.compile(r"^#+ (.+)$", re.MULTILINE)
_FENCE: Final = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE: Final = re.compile(r"`([^`\n]+)`")


def names(documents: tuple[Path, ...]) -> list[str]:
    return [str(each.relative_to(ROOT)) for each in documents]


def without_fences(text: str) -> str:
    return _FENCE.sub("", text)


def code_in(text: str) -> list[str]:
    """Every line of code: in a fence, without its comment, and within backticks."""
    lines = [line.partition(" #")[0].strip() for block in _FENCE.findall(text) for line in block.splitlines()]
    return [*lines, *(code.replace("\\|", "|") for code in _CODE.findall(without_fences(text)))]


def anchors(text: str) -> set[str]:
    """The names of a document's headings, as GitHub makes them."""
    headings = _HEADING.findall(without_fences(text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(document: Path, heading: str, *, deep: bool = False) -> list[list[str]]:
    """The cells of every table under a heading, and with `deep` under those below it; no head of a table."""
    text = document.read_text()
    found = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    assert found is not None, f"{document.name} has no {heading!r}"
    levels = f"{{1,{len(found[1])}}}" if deep else "+"
    end = re.search(rf"^#{levels} ", text[found.end() :], re.MULTILINE)
    part = text[found.end() :][: end.start() if end is not None else None]
    lines = [re.split(r"(?<!\\)\|", line.strip("|")) for line in part.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    rules = [at for at, line in enumerate(cells) if set(line[0]) <= set("-:")]
    return [line for at, line in enumerate(cells) if at not in rules and at + 1 not in rules]


def first_cells(document: Path, heading: str) -> list[str]:
    """What stands in backticks in the first column."""
    return [line[0].strip("`") for line in rows(document, heading)]


def helped(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str]:
    """The exit code of a command's `--help`, and what it prints."""
    try:
        status: object = main([*words, "--help"])
    except SystemExit as ended:
        status = ended.code
    return status, capsys.readouterr().out


# --- links, paths, commands


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_every_link_to_another_document_leads_somewhere(document: Path) -> None:
    dead = []
    for target in _LINK.findall(without_fences(document.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_every_path_that_is_named_exists(document: Path) -> None:
    here = re.compile(r"(?:edge|tests|loadtest|docs)/[\w./]*")
    found = {code for code in code_in(document.read_text()) if here.fullmatch(code)}
    assert sorted(each for each in found if not (ROOT / each).exists()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_every_command_that_is_named_exists_with_its_options(
    document: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for code in code_in(document.read_text()):
        command = re.fullmatch(r"(?:\.venv/bin/)?edge((?: [a-z]+)*)((?: .*)?)", code)
        if command is None:
            continue
        words = command[1].split()[: 2 if command[1].startswith(" keys") else 1]
        status, shown = helped(capsys, *words)
        assert status == 0, code
        assert [each for each in re.findall(r"--[a-z-]+", command[2]) if each not in shown] == [], code


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_every_setting_that_is_named_exists(document: Path) -> None:
    schema = json.loads((ROOT / "edge/routes.schema.json").read_text())["properties"]
    known = set()
    for section, table in schema.items():
        inner = table.get("additionalProperties") or table  # of a table of tables each has a name
        prefix = section if inner is table else f"{section}.NAME"
        known |= {f"{prefix}.{key}" for key in inner["properties"]}
    some = re.compile(rf"(?:{'|'.join(schema)})\.(?:NAME\.)?[a-z_]+")
    found = {code for code in code_in(document.read_text()) if some.fullmatch(code)} - {"routes.toml"}
    assert sorted(found - known) == []


def test_readme_is_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8000


def test_readme_has_a_row_for_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    commands = set(re.findall(r"^    ([a-z]+) ", helped(capsys)[1], re.MULTILINE))
    named = {cell.split()[1] for cell in first_cells(ROOT / "README.md", "Run it") if cell.startswith("edge ")}
    assert commands
    assert commands - named == set()


def test_readme_has_the_two_commands_of_a_fresh_machine() -> None:
    lines = code_in((ROOT / "README.md").read_text())
    assert "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/edge demo" in lines
    assert "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest" in lines


async def test_every_page_of_the_admin_listener_is_described_and_no_other(edge: Edge) -> None:
    offered = re.findall(r"/[a-z./]+", await asked_of_admin(edge, "/"))
    described = re.findall(r"/[a-z./]+", " ".join(line[0] for line in rows(OPERATING, "The admin listener")))
    files = {"/status/page.css", "/status/page.js"}  # what the page is made of
    with_token = {"/keys", "/users", "/openapi.json"}
    assert sorted(set(described) - with_token) == sorted(set(offered) - files)


def test_newest_version_of_the_changes_is_that_of_the_package() -> None:
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "docs/changes.md").read_text(), re.MULTILINE)
    assert released[0] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


# --- what a running edge shows


async def asked_of_admin(edge: Edge, path: str) -> str:
    client = RawClient(*await asyncio.open_connection("127.0.0.1", edge.admin_port))
    client.send(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    try:
        return (await client.response())[2].decode()
    finally:
        client.close()


def broken_rules(exposition: str) -> list[str]:
    """What `promtool check metrics` finds too: https://prometheus.io/docs/practices/naming/."""
    families = list(text_string_to_metric_families(exposition))
    names = [f"{each.name}_total" if each.type == "counter" else each.name for each in families]
    return [
        *(f"{name} twice" for name, count in Counter(names).items() if count > 1),
        *(f"{each.name} without a text" for each in families if not each.documentation),
        *(f"{each.name} is a {each.type}" for each in families if each.type not in ("counter", "gauge", "histogram")),
        *(name for name in names if not re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", name)),
        *(name for name in names if re.search(r"_(ms|milliseconds|us|minutes|kb|mb|percent|ratio)\b", name)),
        *(name for name in names if re.search(r"_(count|sum|bucket|gauge|counter|histogram)$", name)),
        *(each.name for each in families if each.type != "counter" and each.name.endswith("_total")),
    ]


async def test_every_metric_is_described_with_its_type_and_labels(
    start_upstream: StartUpstream, start_edge: StartEdge, simulator: Simulator, unused_tcp_port: int, tmp_path: Path
) -> None:
    """Of an edge that has every part with metrics: tokens, a sink, a Redis, which need not answer."""

    async def acknowledge(connection: ScriptedConnection) -> None:
        await connection.send(b"HTTP/1.1 204 No Content\r\n\r\n")

    sink = await start_upstream(acknowledge)
    (tmp_path / "jwks").write_text('{"keys": []}')
    text = f"""
[jwt]
issuer = "https://console.example/"
audience = "models"
jwks = "{tmp_path}/jwks"
[usage]
sink = "{sink.url}/"
[shared]
redis = "redis://127.0.0.1:{unused_tcp_port}/0"
[pools.two]
endpoints = ["{simulator.url}", "http://127.0.0.1:{unused_tcp_port}"]
ca_file = "{tmp_path}/ca.pem"
hedge_after = "1s"
"""
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    resumes = ROUTES.replace("[pools.r1]", '[pools.r1]\nresume = "replay"')
    edge = await start_edge(resumes.replace("{upstream}", simulator.url) + text)
    await edge.ask({"model": "public/deepseek-r1", "stream": True, "simulate": {"fault": "cut", "after": 2}})
    await edge.ask({"model": "public/deepseek-r1"}, key="sk-wrong")
    edge.server.metrics.observe(finished(pool="two", queued_s=1.0))
    edge.server.generation.pools["two"].hedges["won"] += 1
    await edge.idle()
    exposition = await asked_of_admin(edge, "/metrics")
    assert broken_rules(exposition) == []
    shown = {}
    for family in text_string_to_metric_families(exposition):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        shown[name] = (family.type, labels)
    described = rows(OPERATING, "Metrics", deep=True)
    assert {line[0].strip("`"): (line[1], set(_CODE.findall(line[2]))) for line in described} == shown


RARE_FIELDS = {"resumes", "resumed_from", "resumed_usage", "hedges", "hedge"}  # of what went on, or went elsewhere too


async def test_every_field_of_the_access_log_and_of_a_record_is_described(edge: Edge) -> None:
    await edge.ask({"model": "public/deepseek-r1"})
    await edge.idle()
    (logged,), (first,), (last,) = await edge.log(), edge.records(ended=False), edge.records()
    assert first_cells(OPERATING, "The access log") == list(logged)
    described = {line[0].strip("`"): line[2] for line in rows(OPERATING, "The fields of a record")}
    assert set(described) == set(last) | RARE_FIELDS
    assert {field for field, line in described.items() if line == "both"} == set(first)
    (example,) = (block for block in _FENCE.findall(OPERATING.read_text()) if '"usage_source"' in block)
    assert list(json.loads(example)) == list(last)


def test_every_field_of_the_process_log_is_described() -> None:
    try:
        raise ValueError
    except ValueError:
        record = logging.LogRecord("edge", logging.ERROR, __file__, 1, "a defect", None, sys.exc_info())
    assert first_cells(OPERATING, "The process log") == list(json.loads(JsonFormatter().format(record)))


@pytest.mark.parametrize(
    ("heading", "values"),
    [
        ("How a request ends", {each.value for each in End} | {"crashed"}),
        ("Where the counts come from", {each.value for each in UsageSource}),
        ("Phases", {each.value for each in Phase}),
    ],
)
def test_every_value_of_a_closed_vocabulary_is_described(heading: str, values: set[str]) -> None:
    described = first_cells(OPERATING, heading)
    assert sorted(described) == sorted(values)


def test_every_error_is_described_with_its_status() -> None:
    kinds: list[type[Any]] = [each for each in vars(errors).values() if isinstance(each, type)]
    known = {
        (kind.status, kind.code)
        for kind in kinds
        if issubclass(kind, errors.EdgeError) and kind is not errors.EdgeError and not kind.__name__.startswith("_")
    } - {(422, "invalid_request_error")}  # an upstream's, on the row of 400
    described = {(int(line[0]), line[1].strip("`")) for line in rows(OPERATING, "Errors that callers get")}
    assert described == known | {(400, "context_length_exceeded")}  # whose class is that of the other 400


def test_every_member_that_steers_an_engine_is_listed() -> None:
    text = OPERATING.read_text()
    for engine, table in STEERING.items():
        cells = [", ".join(f"`{name}`" for name, kind in table.items() if kind == each) for each in ("refuse", "drop")]
        assert f"| `{engine}` | {cells[0]} | {cells[1]} |" in text


def test_runbook_quotes_the_process_log_as_it_is() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "edge").rglob("*.py"))
    quoted = re.findall(r"process log (`[^`]+`(?: or `[^`]+`)*)", RUNBOOK.read_text())
    words = [each for group in quoted for each in _CODE.findall(group)]
    assert words
    assert [each for each in words if each not in source] == []


def test_runbook_names_metrics_that_exist() -> None:
    text = RUNBOOK.read_text() + OPERATING.read_text()
    described = {line[0].strip("`") for line in rows(OPERATING, "Metrics", deep=True)}
    assert sorted(set(re.findall(r"`(edge_\w+)`", text)) - described) == []


# --- the map


def test_map_names_every_folder_and_module_of_the_package() -> None:
    """As `edge/__init__.py` does; the two say it in different words to different readers."""
    named = set(re.findall(r"^(\w+(?:\.py|/))  ", CONTRIBUTING.read_text(), re.MULTILINE))
    in_package = set(re.findall(r"^    (\w+(?:\.py|/)) ", (ROOT / "edge/__init__.py").read_text(), re.MULTILINE))
    assert named == in_package
