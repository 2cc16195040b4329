"""What `edge simulate` can be given, in the notations of routes.toml."""

import argparse

import pytest

from edge.commands.simulate import add_arguments, behaviour_from
from edge.simulator.dialects import Behaviour


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    return parser.parse_args(words)


def test_options_become_behaviour() -> None:
    """A rate is the inverse of the interval; 0 is as fast as it goes."""
    args = parsed(
        *("--listen", "[::1]:8000", "--dialect", "sglang", "--ttft", "1.5s", "--rate", "40", "--tokens", "9"),
        *("--jitter", "0.2", "--fault", "cut", "--after", "-1", "--model", "a", "--model", "b"),
    )
    assert (args.listen.host, args.listen.port) == ("::1", 8000)
    assert behaviour_from(args) == Behaviour(
        dialect="sglang",
        ttft_ms=1500,
        interval_ms=25,
        tokens=9,
        jitter=0.2,
        fault="cut",
        after=-1,
        served=("a", "b"),
    )
    assert behaviour_from(parsed("--rate", "0")).interval_ms == 0


def test_help_has_every_default() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    missing = [action.dest for action in parser._actions if "default" not in (action.help or "")]
    assert missing == ["fault", "model"]  # which have none


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ttft", "200"), "write a number and ms, s, m, h, d or w"),
        (("--ttft", "fasts"), "write a number and ms, s, m, h, d or w"),
        (("--listen", "9001"), 'write "host:port"'),
        (("--listen", "x:99999"), "write host:port"),
        (("--listen", "unix:x"), 'write "host:port"'),
        (("--dialect", "none"), "invalid choice"),
    ],
)
def test_options_that_cannot_be_read_say_what_to_write(words: tuple[str, ...], said: str) -> None:
    """The message names the value and a right form."""
    with pytest.raises(argparse.ArgumentError, match=said):
        parsed(*words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rate", "-1"), "rate must be between"),
        (("--jitter", "2"), "jitter must be between 0 and 1"),
        (("--tokens", "-1"), "tokens must be between"),
        (("--status", "200"), "status must be between 400 and 599"),
        (("--thinks", "-1"), "thinks must be between"),
    ],
)
def test_options_out_of_range_say_the_range(words: tuple[str, ...], said: str) -> None:
    """Behaviour checks itself, so the JSON body and the command line share one rule."""
    with pytest.raises(ValueError, match=said):
        behaviour_from(parsed(*words))
