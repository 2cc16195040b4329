"""The files of docs/deploy against what they are for: metrics, settings and paths that exist."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from edge.config.reading import parse
from edge.config.values import seconds
from tests.test_documents import OPERATING, code_in, rows

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "docs/deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/edge.json").read_text())
PARTS = ("_bucket", "_sum", "_count")  # of a histogram


def metrics() -> set[str]:
    """Every metric that operating.md describes, which another test compares with a running edge."""
    cells = [line[0] for line in rows(OPERATING, "Metrics", deep=True)]
    return set(re.findall(r"(?:edge|gen_ai)_[a-z_]+", " ".join(cells)))


def metrics_in(text: str) -> set[str]:
    found = set(re.findall(r"\b(?:edge|gen_ai)_[a-z_]+", text))
    return {next((name.removesuffix(part) for part in PARTS if name.endswith(part)), name) for name in found}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_metric_that_is_asked_for_exists(path: Path) -> None:
    assert metrics_in(path.read_text()) - metrics() == set()


def test_dashboard_asks_for_something_in_every_panel() -> None:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert len(panels) > 10
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in panels:
        assert all(metrics_in(target["expr"]) for target in panel["targets"]), panel["title"]


def test_ends_that_count_as_failures_are_ends() -> None:
    """A label that no request has would make an alert that never comes."""
    rules = (DEPLOY / "prometheus/edge.rules.yml").read_text()
    [pattern] = set(re.findall(r'end=~"([^"]+)"', rules + json.dumps(DASHBOARD).replace('\\"', '"')))
    ends = {line[0].strip("`") for line in rows(OPERATING, "How a request ends")}
    assert {end for end in ends if re.fullmatch(pattern, end)} == {
        "upstream_cut", "upstream_error", "first_byte_timeout", "idle_timeout", "internal_error",
    }  # fmt: skip


def test_every_alert_is_tried() -> None:
    alerts = re.findall(r"alert: (\w+)", (DEPLOY / "prometheus/edge.rules.yml").read_text())
    tried = re.findall(r"alertname: (\w+)", (DEPLOY / "prometheus/edge.rules.test.yml").read_text())
    assert set(tried) == set(alerts)


def test_file_of_the_config_map_is_sound_and_its_pod_waits_for_a_drain() -> None:
    manifest = (DEPLOY / "kubernetes/edge.yaml").read_text()
    [block] = re.findall(r"  routes\.toml: \|\n((?:    .*\n)+)", manifest)
    text = re.sub(r"^    ", "", block, flags=re.MULTILINE)
    config = parse(text, Path("/etc/edge/routes.toml"), {"REDIS_URL": "redis://redis:6379/0"})
    assert config.warnings == ()
    patience_s = int(re.findall(r"terminationGracePeriodSeconds: (\d+)", manifest)[0])
    assert patience_s > config.server.shutdown_delay_s + config.server.drain_timeout_s + 10


def test_unit_waits_for_a_drain_and_systemd_for_its_word() -> None:
    unit = (DEPLOY / "systemd/edge@.service").read_text()
    config = parse('pools.p.endpoints = ["http://p"]\nroutes.r.pool = "p"\n', Path("routes.toml"), {})
    patience_s = seconds(re.findall(r"TimeoutStopSec=(\d+)", unit)[0] + "s")
    assert patience_s > config.server.shutdown_delay_s + config.server.drain_timeout_s + 10
    assert "Type=notify" in unit


def test_readme_names_every_file() -> None:
    text = (DEPLOY / "README.md").read_text()
    named = {target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("..")}
    assert named == {str(path.relative_to(DEPLOY)) for path in FILES} - {"README.md"}
    assert {
        code for code in code_in(text) if code.startswith("docs/") and not (ROOT / code.split()[0]).exists()
    } == set()
