"""An answer in chunks of our own."""

import pytest

from edge.metering.meters import Metering
from edge.operations import OPERATIONS
from edge.relay.echo import EventEcho
from edge.relay.framed import Framed
from edge.wire.http1 import Chunked, Framing, Length, UntilClose
from tests.streams import chunk

LAST = b"0\r\n\r\n"


def framed_from(framing: Framing, *, bare: bool = False, echo: EventEcho | None = None) -> Framed:
    return Framed(
        framing, Metering(OPERATIONS["chat/completions"]).events(), bare=bare, whole_events=echo is not None, echo=echo
    )


@pytest.mark.parametrize(
    ("framing", "data"),
    [(Chunked, b"3;a=1\r\none\r\n3\r\ntwo\r\n0\r\nx: y\r\n\r\n"), (lambda: Length(6), b"onetwo")],
)
def test_content_is_framed_anew_and_ends(framing: type[Chunked], data: bytes) -> None:
    for bare in [False, True]:
        assert framed_from(framing(), bare=bare).feed(data) == (b"onetwo" if bare else chunk(b"onetwo") + LAST)


def test_what_is_not_understood_is_kept_until_it_is() -> None:
    framed = framed_from(Chunked(), bare=False)
    assert (framed.feed(b"3\r\none\r\n5"), framed.left) == (chunk(b"one"), b"5")
    assert (framed.feed(b"\r\n12345\r\n"), framed.left, framed.broken) == (chunk(b"12345"), b"", False)


def test_broken_rule_is_told_behind_what_was_understood() -> None:
    framed = framed_from(Chunked(), bare=False)
    assert framed.feed(b"3\r\none\r\nzz\r\n") == chunk(b"one")
    assert framed.broken


@pytest.mark.parametrize("framing", [Chunked(), Length(100), UntilClose()])
def test_place_between_events_is_known_in_every_framing(framing: Framing) -> None:
    framed = framed_from(framing, bare=False)
    assert not framed.between_events
    for content, between in ((b"data: 1\n", False), (b"\n", True), (b": x\r\n", False), (b"\r\n", True)):
        framed.feed(chunk(content) if framing.chunked else content)
        assert framed.between_events == between
        assert framed.within_event == (not between)


def test_client_of_an_echo_is_always_between_events() -> None:
    framed = framed_from(UntilClose(), echo=EventEcho("new"))
    assert framed.between_events
    assert framed.feed(b'data: {"model":"m"}\n') == b""
    assert framed.between_events
    assert framed.within_event
    assert framed.feed(b"\n") == chunk(b'data: {"model":"new"}\n\n')
    assert not framed.within_event
    assert framed.end() == LAST


def test_unfinished_event_of_a_complete_answer_is_not_lost() -> None:
    framed = framed_from(Length(19), echo=EventEcho("new"))
    assert framed.feed(b'data: {"model":"m"}') == chunk(b'data: {"model":"new"}') + LAST
