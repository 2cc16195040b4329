"""The manual of the settings, which is printed from their declarations."""

from pathlib import Path

from edge.config import manual
from edge.config.kinds import sections_of, settings_of
from edge.config.settings import Config
from tests.command import edge


def test_shipped_manual_is_what_the_command_prints() -> None:
    """When it is not: `edge schema --manual > docs/settings.md`."""
    assert edge("schema", "--manual").out == (Path(__file__).parents[2] / "docs/settings.md").read_text()


def test_every_setting_has_its_place_in_the_manual() -> None:
    printed = manual.render()
    for section in sections_of(Config):
        assert f"## `[{section.key}{'.NAME' if section.is_named else ''}]`" in printed
        for setting in settings_of(section.holds):
            assert f"- `{setting.key}` ({setting.kind}" in printed
            assert setting.text in printed
