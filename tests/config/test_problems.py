"""How problems are written: keys as in the file, syntax errors as problems of their line."""

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.config.positions import KeyPath
from edge.config.problems import ConfigError, Problem, dotted, nearest, problems_json, read_toml, render_problems


@pytest.mark.parametrize(
    ("path", "written"),
    [
        ((), ""),
        (("server", "listen", 0), "server.listen[0]"),
        (("routes", "public/deepseek-r1"), 'routes."public/deepseek-r1"'),
        (("pools", "qwen2.5", "endpoints", 1, "url"), 'pools."qwen2.5".endpoints[1].url'),
        (("\x7f",), r'"\u007f"'),
        (("a b", "", 'q"'), '"a b"."".' + r'"q\""'),
    ],
)
def test_keys_are_written_as_in_the_file(path: KeyPath, written: str) -> None:
    """What a problem names can be searched in the file; an element's index, from 0, stands in brackets."""
    assert dotted(path) == written


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), min_size=1, max_size=3))
def test_written_keys_read_back_as_themselves(parts: list[str]) -> None:
    """Any key's spelling is valid TOML for that key."""
    table = tomllib.loads(f"{dotted(tuple(parts))} = 1")
    for part in parts:
        assert list(table) == [part]
        table = table[part]


def test_nearest_name_is_one_that_resembles() -> None:
    """A suggestion is made for a slip, not for another word."""
    assert nearest("lisen", ["admin", "listen"]) == "listen"
    assert nearest("verbose", ["admin", "listen"]) is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a = 1\nb = \n", 2),
        ("a = 1\nb = [1,\n2,\n", 3),
        ('a = """\n\n', 1),
        ("\r\n\r\na = b", 3),
        ("[a]\n[a]", 2),
        ("=", 1),
    ],
)
def test_syntax_error_is_one_problem_on_its_line(text: str, line: int) -> None:
    """An error at the end of the text is on the last line that has something."""
    with pytest.raises(ConfigError) as caught:
        read_toml(text, Path("routes.toml"))
    assert [problem.line for problem in caught.value.problems] == [line]
    assert str(caught.value).startswith(f"routes.toml:{line}: not TOML, ")


def test_problems_as_json_carry_the_same_facts() -> None:
    """`edge check --json` is for editors and CI: file, line, key, message and severity of each."""
    problem, warning = Problem(3, "server.admin", "m"), Problem(4, "", "n", "warning")
    assert json.loads(problems_json(Path("a.toml"), [problem, warning])) == [
        {"file": "a.toml", "line": 3, "key": "server.admin", "message": "m", "severity": "error"},
        {"file": "a.toml", "line": 4, "key": "", "message": "n", "severity": "warning"},
    ]
    assert render_problems(Path("a.toml"), [problem, warning]) == "a.toml:3: server.admin: m\na.toml:4: warning: n"
