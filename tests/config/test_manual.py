"""The manual of the settings, which is printed from their declarations."""

import subprocess
import sys
from pathlib import Path

from edge.config import manual
from edge.config.kinds import sections_of, settings_of
from edge.config.settings import Config


def test_shipped_manual_is_what_the_command_prints() -> None:
    """When it is not: `edge schema --manual > docs/settings.md`."""
    done = subprocess.run([sys.executable, "-m", "edge", "schema", "--manual"], capture_output=True, text=True)
    assert done.stdout == (Path(__file__).parents[2] / "docs/settings.md").read_text()


def test_every_setting_has_its_place_in_the_manual() -> None:
    printed = manual.render()
    for section in sections_of(Config):
        assert f"## `[{section.key}{'.NAME' if section.is_named else ''}]`" in printed
        for setting in settings_of(section.holds):
            assert f"- `{setting.key}` ({setting.kind}" in printed
            assert setting.text in printed
