"""Engines: an engine that the file may name has all of its parts, or these fail and no start does."""

from pathlib import Path
from typing import get_args

import pytest

from edge.config.problems import ConfigError
from edge.config.reading import load
from edge.config.settings import WITHOUT_HEALTH_PATH, Engine
from edge.simulator.dialects import Dialect
from edge.upstream.engines import ENGINES


def test_every_engine_has_its_facts_and_its_dialect() -> None:
    assert set(ENGINES) == set(get_args(Engine)) == set(get_args(Dialect))


def test_rule_of_health_paths_names_the_engines_that_have_none() -> None:
    assert {engine for engine, facts in ENGINES.items() if not facts.health_paths} == WITHOUT_HEALTH_PATH


@pytest.mark.parametrize("engine", get_args(Engine))
def test_file_needs_a_health_path_where_an_engine_has_none(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "routes.toml"
    pool = f'[pools.p]\nendpoints = ["http://h"]\nengine = "{engine}"\nhealth = {{}}\n[routes.m]\npool = "p"\n'
    path.write_text(f'[keys]\nstore = "sqlite:keys.db"\n{pool}')
    if ENGINES[engine].health_paths:
        load(path)
    else:
        with pytest.raises(ConfigError, match="health"):
            load(path)
