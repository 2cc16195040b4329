"""What a client is sent of an upstream's bytes: others read the same answer in both."""

from edge.exchange import End
from tests.fuzz.peers import Message, answer_by_h11, answer_by_llhttp
from tests.fuzz.requests import cut_by_itself
from tests.fuzz.rules import answer_by_rules
from tests.relay.test_relay import Outcome, content_of, relayed

_LAST_EVENT = b"data: [DONE]"


def check(data: bytes) -> None:
    """No answer is framed differently by other parsers: they refuse it, or read what the client is sent.

    By the rules it is nothing else, and what they refuse the client is not sent, but for a stream that broke behind its
    last event.
    """
    got = relayed(cut_by_itself(data), closes=True)
    if got.failure is not None or got.exchange.end is not End.COMPLETE:
        return
    expected = Message(b"", got.head.split(b" ", 2)[1], _content(got))
    sent = got.head + b"\r\n\r\n" + got.body
    for reading in (answer_by_h11(sent), answer_by_llhttp(sent)):
        assert reading == ([expected], "end")
    by_rules = answer_by_rules(data)
    assert by_rules.messages == [expected] or (not by_rules.messages and _LAST_EVENT in expected.body)
    by_h11, by_llhttp = answer_by_h11(data), answer_by_llhttp(data)
    is_cut = by_h11 == ([], "open")
    assert is_cut or by_h11.rest == "refused" or by_h11.messages == [expected]
    assert not is_cut or _LAST_EVENT in expected.body  # behind which no stream misses anything
    ends_with_connection = (is_cut or by_h11.messages) and by_llhttp == ([], "open")
    assert ends_with_connection or by_llhttp.rest == "refused" or by_llhttp.messages[:1] == [expected]


def _content(got: Outcome) -> bytes:
    if b"\r\ntransfer-encoding: chunked" not in got.head:
        return got.body
    content, is_whole = content_of(got.body)
    assert is_whole
    return content
