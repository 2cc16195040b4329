"""The golden case of every setting, made of its declaration: the reader, the editor and the declaration agree on it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edge.config import reading, schema
from edge.config.kinds import Setting, sections_of, settings_of
from edge.config.positions import Positions
from edge.config.problems import ConfigError
from edge.config.settings import Config
from edge.config.tables import Reader, Table

ENV = {"SET": "value"}
JUDGE = jsonschema.Draft4Validator(schema.routes_schema())


@dataclass(frozen=True)
class Declared:
    """A setting, and the header of a table that holds it."""

    header: str
    setting: Setting

    def __str__(self) -> str:
        return f"{self.header} {self.setting.key}"

    @property
    def sample(self) -> Any:
        """The value that the declaration shows to people."""
        example = self.setting.example
        return self.setting.written_default if example is None else example

    def tree(self, value: object) -> dict[str, Any]:
        """The file that has the value alone."""
        tree: dict[str, Any] = {self.setting.key: value}
        for part in reversed(self.header.strip("[]").split(".")):
            tree = {part: [tree] if part == "endpoints" else tree}
        return tree


def declared() -> Iterator[Declared]:
    def below(holds: type, path: str, is_list: bool = False) -> Iterator[Declared]:
        for setting in settings_of(holds):
            yield Declared(f"[[{path}]]" if is_list else f"[{path}]", setting)
            if setting.holds is not None:
                yield from below(setting.holds, f"{path}.{setting.key}", setting.is_list)

    for section in sections_of(Config):
        yield from below(section.holds, f"{section.key}.some" if section.is_named else section.key)


EACH = pytest.mark.parametrize("case", list(declared()), ids=str)


def complaints(case: Declared, value: object) -> list[str]:
    """What an editor underlines at the setting itself."""
    found: list[jsonschema.ValidationError] = []
    for error in JUDGE.iter_errors(case.tree(value)):
        found += [error, *(error.context or ())]
    return [error.message for error in found if case.setting.key in list(error.absolute_path)]


@EACH
def test_value_that_a_declaration_shows_is_one(case: Declared, tmp_path: Path) -> None:
    """Its example is another than its default, and its default is what the file means by nothing."""
    for name in ("tls.crt", "tls.key", "jwks.json"):
        (tmp_path / name).write_text("text")
    setting, sample = case.setting, case.sample
    reader = Reader(tmp_path / "routes.toml", ENV, Positions(""))
    given, absent = (Table(reader, ("some",), each) for each in ({setting.key: sample}, {}))
    found = setting.read(given, setting)
    assert reader.problems == []
    assert given.data.keys() <= set(given.known)
    if setting.example is not None:
        assert found not in (None, (), "", setting.default)
        assert setting.write(found) is not None
    else:
        assert found == setting.read(absent, setting)
    assert complaints(case, sample) == []


@EACH
def test_value_of_another_kind_is_a_problem_on_its_line_and_for_the_editor(case: Declared) -> None:
    above = "[pools.some]\nqueue = 1" if case.header == "[pools.some.health]" else ""
    with pytest.raises(ConfigError) as caught:
        reading.parse(f"{above}\n{case.header}\n{case.setting.key} = [[1]]\n", Path("routes.toml"), ENV)
    line = 4 if above else 3
    found = [problem for problem in caught.value.problems if problem.line == line and case.setting.key in problem.key]
    assert found
    assert all("write" in problem.message for problem in found)
    assert complaints(case, [[1]])
