"""Every state of an answer with every event: the table of `edge/relay/answer.py`, walked cell by cell."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from edge.errors import EdgeError, UpstreamError, UpstreamTimeout, UpstreamUnavailable
from edge.exchange import End, Exchange
from edge.metering.meters import Metering
from edge.operations import OPERATIONS
from edge.relay import answer as module
from edge.relay.answer import Answer, State
from edge.relay.terms import Attempt, StaleConnection, Timeouts, UpstreamAnsweredError

SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
EVENT = b"data: 1\n\n"
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
ECHO = "public/asked"

# What an upstream has sent when its answer is in a state.
REACHED = {
    State.HEAD: b"",
    State.OPENING: SSE + CHUNKED,
    State.COLLECTING: JSON + CHUNKED + b"1\r\n{\r\n",
    State.REFUSED: b"HTTP/1.1 500 Oh\r\ncontent-length: 9\r\n\r\nno",
    State.VERBATIM: SSE + CHUNKED + CHUNK,
    State.FRAMED: SSE + b"\r\n" + EVENT,
}


@dataclass
class Connection:
    receive: Callable[[bytes], None] = lambda data: None

    def first_step(self, data: bytes) -> bytes:
        """A long read is taken at once here."""
        return data


@dataclass
class Recorder:
    """The owner, the client and the connection of one answer; `done` is what was made to happen, in its order."""

    state: State
    reached: bytes | None = None
    last: bool = False
    bare: bool = False
    paused: bool = False
    metering: Metering = Metering(OPERATIONS["chat/completions"])  # noqa: RUF009  # frozen
    done: list[str] = field(default_factory=list)
    failure: Exception | None = None
    written: bytes = b""

    def __post_init__(self) -> None:
        self.exchange = Exchange("req_1", "POST", 0.0, 0.0)
        echo = ECHO if self.state is State.COLLECTING else None
        attempt = self.attempt = Attempt(b"", (), 0, self.metering, Timeouts(1, 1, 1, 0), lambda: None, 0, echo)
        self.connection = Connection()
        self.answer = Answer(self, self.exchange, self, attempt, self.connection)
        reached = REACHED[self.state] if self.reached is None else self.reached
        if reached:
            self.connection.receive(reached)
        assert self.answer.state is self.state
        self.done.clear()

    def open(self, status: int) -> Callable[[bytes], None]:
        self.done.append(f"open {status}")
        return self._write

    def _write(self, data: bytes) -> None:
        self.written += data

    def began(self) -> None:
        self.done.append("began")

    def let_go(self) -> None:
        self.attempt.let_go()

    def interrupt(self, end: End) -> bool:
        return False

    def settle(self, end: End) -> None:
        self.exchange.ended(end)
        self.done.append(f"settle {end.value}")

    def leave(self, idle_s: float) -> None:
        self.answer.state = State.ENDED
        self.done.append("keep" if idle_s else "drop")

    def fail(self, error: Exception, idle_s: float = 0.0) -> None:
        self.answer.state = State.ENDED
        self.failure = error
        self.done.append("fail")

    def reset(self) -> None:
        self.done.append("reset")

    @property
    def status(self) -> int:
        assert self.failure is not None
        return self.failure.status if isinstance(self.failure, EdgeError | UpstreamAnsweredError) else 0


BYTES: dict[State, list[tuple[bytes, State]]] = {
    State.HEAD: [
        (SSE + CHUNKED, State.OPENING),
        (b"HTTP/1.1 500 Oh\r\ncontent-length: 2\r\n\r\n", State.REFUSED),
        (b"HTTP/1.1 100 Continue\r\n\r\n", State.HEAD),
        (b"HTTP/1.1 2", State.HEAD),
    ],
    State.OPENING: [
        (CHUNK, State.VERBATIM),
        (b"9;a=1\r\n" + EVENT + b"\r\n", State.FRAMED),
        (b'e\r\ndata: {"error"\r\n', State.REFUSED),
        (b"9\r\n", State.OPENING),
    ],
    State.COLLECTING: [
        (b"1\r\n}\r\n0\r\n\r\n", State.ENDED),
        (b"%x\r\n%b\r\n" % (2**20 + 1, b" " * (2**20 + 1)), State.FRAMED),
        (b"1\r\n \r\n", State.COLLECTING),
    ],
    State.REFUSED: [(b" reason", State.ENDED), (b" rea", State.REFUSED)],
    State.VERBATIM: [
        (CHUNK, State.VERBATIM),
        (b"9;a=1\r\n" + EVENT + b"\r\n", State.FRAMED),
        (b"0\r\n\r\n", State.ENDED),
        (b"zz\r\n", State.ENDED),
    ],
    State.FRAMED: [(EVENT, State.FRAMED)],
}


@pytest.mark.parametrize("state", BYTES, ids=lambda state: state.value)
def test_bytes_lead_from_each_state_to_those_of_the_table(state: State) -> None:
    for data, expected in BYTES[state]:
        answer = Recorder(state)
        answer.connection.receive(data)
        assert answer.answer.state is expected, (data[:40], answer.done)


WAITING = (State.HEAD, State.OPENING, State.COLLECTING, State.REFUSED)
LOST: dict[State, type[Exception]] = {
    State.HEAD: UpstreamError,
    State.OPENING: UpstreamError,
    State.COLLECTING: UpstreamError,
    State.REFUSED: UpstreamAnsweredError,
}


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("state", WAITING, ids=lambda state: state.value)
def test_upstream_that_ends_before_its_answer_began_is_a_failure(state: State, in_order: bool) -> None:
    answer = Recorder(state)
    answer.answer.closed(in_order=in_order, stale=False)
    assert isinstance(answer.failure, LOST[state])
    assert answer.status == (500 if state is State.REFUSED else 502)
    assert (answer.done, answer.written) == (["fail"], b"")


@pytest.mark.parametrize("in_order", [True, False])
def test_reused_connection_that_dies_before_it_gave_a_byte_is_stale_and_no_other(in_order: bool) -> None:
    answer = Recorder(State.HEAD)
    answer.answer.closed(in_order=in_order, stale=True)
    assert isinstance(answer.failure, StaleConnection)
    for state in (State.OPENING, State.COLLECTING):
        answer = Recorder(state)
        answer.answer.closed(in_order=in_order, stale=True)
        assert isinstance(answer.failure, UpstreamError)
    answer = Recorder(State.HEAD)
    answer.connection.receive(b"HTTP/1.1 2")
    answer.answer.closed(in_order=in_order, stale=True)
    assert isinstance(answer.failure, UpstreamError)


def test_answer_that_the_close_ends_is_done_by_it_in_every_state_behind_its_head() -> None:
    for state, reached in ((State.OPENING, SSE + b"\r\n"), (State.COLLECTING, JSON + b"\r\n{}")):
        answer = Recorder(state, reached)
        answer.answer.closed(in_order=True, stale=False)
        assert answer.done[:3] == ["open 200", "settle complete", "drop"]
        assert answer.written.startswith(b"HTTP/1.1 200 OK\r\n")
        lost = Recorder(state, reached)
        lost.answer.closed(in_order=False, stale=False)
        assert isinstance(lost.failure, UpstreamError)


def test_framed_answer_ends_with_its_last_chunk() -> None:
    answer = Recorder(State.FRAMED, SSE + CHUNKED + b"9;a=1\r\n" + EVENT + b"\r\n")
    answer.connection.receive(b"0\r\n\r\n")
    assert answer.done == ["settle complete", "keep"]


def test_framed_answer_is_done_by_the_close_between_two_events_and_cut_within_one() -> None:
    whole, within, lost = (Recorder(State.FRAMED) for _ in range(3))
    whole.answer.closed(in_order=True, stale=False)
    assert whole.done == ["settle complete", "drop"]
    assert whole.written.endswith(b"0\r\n\r\n")
    within.connection.receive(b"data: 2")
    within.answer.closed(in_order=True, stale=False)
    assert within.done == ["settle upstream_cut", "drop"]
    assert (within.last, within.written.endswith(b"0\r\n\r\n")) == (True, False)
    lost.answer.closed(in_order=False, stale=False)
    assert lost.done == ["settle upstream_cut", "drop"]
    assert b"upstream_disconnected" in lost.written


@pytest.mark.parametrize("in_order", [True, False])
def test_verbatim_answer_is_cut_by_any_end_of_its_connection(in_order: bool) -> None:
    answer = Recorder(State.VERBATIM)
    answer.answer.closed(in_order=in_order, stale=True)
    assert answer.done == ["settle upstream_cut", "drop"]
    assert b"upstream_disconnected" in answer.written


@pytest.mark.parametrize("state", REACHED, ids=lambda state: state.value)
def test_overdue_is_a_504_before_the_answer_and_breaks_it_after(state: State) -> None:
    answer = Recorder(state)
    answer.answer.overdue()
    if state in WAITING:
        assert isinstance(answer.failure, UpstreamTimeout)
        idle = state is State.COLLECTING
        assert answer.exchange.end is (End.IDLE_TIMEOUT if idle else End.FIRST_BYTE_TIMEOUT)
    else:
        assert answer.done == ["settle idle_timeout", "drop"]
        assert b"stopped sending" in answer.written


@pytest.mark.parametrize("state", REACHED, ids=lambda state: state.value)
def test_drain_is_a_503_before_the_answer_and_breaks_it_after(state: State) -> None:
    answer = Recorder(state)
    answer.answer.drain()
    assert answer.exchange.end is End.DRAINED
    if state in WAITING:
        assert isinstance(answer.failure, UpstreamUnavailable)
    else:
        assert answer.done == ["settle drained", "drop"]
        assert b"had to restart" in answer.written


@pytest.mark.parametrize("state", [State.VERBATIM, State.FRAMED], ids=lambda state: state.value)
def test_broken_answer_within_an_event_ends_without_an_end_and_its_connection_with_it(state: State) -> None:
    for bare in (False, True):
        answer = Recorder(state)
        answer.bare = bare
        answer.connection.receive(b"9\r\ndata:" if state is State.VERBATIM else b"data:")
        before = answer.written
        answer.answer.drain()
        assert (answer.last, answer.written) == (True, before)
        assert answer.done == ["settle drained", *(["reset"] if bare else []), "drop"]


def test_chunk_with_a_wrong_end_breaks_an_answer_of_which_events_are_hidden() -> None:
    """Its content is not all there, and what follows must not be taken for the rest of it."""
    for state, reached in ((State.OPENING, SSE + CHUNKED), (State.VERBATIM, SSE + CHUNKED + CHUNK)):
        answer = Recorder(state, reached, metering=Metering(OPERATIONS["chat/completions"], hide_usage=True))
        answer.connection.receive(b"9\r\n" + EVENT + b"XX")
        if state is State.OPENING:
            assert answer.status == 502
        else:
            assert answer.done == ["settle upstream_cut", "drop"]
        assert answer.answer.state is State.ENDED


def test_no_heartbeat_goes_out_while_the_body_of_an_error_is_collected() -> None:
    """It would make the status 200, and no other endpoint could be asked."""
    for reached in (REACHED[State.REFUSED], SSE + CHUNKED + b'e\r\ndata: {"error"\r\n'):
        assert not Recorder(State.REFUSED, reached).answer.may_beat()
    assert Recorder(State.OPENING).answer.may_beat()


def test_heartbeat_lets_go_of_the_bytes_that_were_asked() -> None:
    answer = Recorder(State.OPENING)
    answer.attempt.body = (b"{}",)
    answer.answer.beat()
    assert answer.attempt.body == ()


def test_nothing_happens_to_an_answer_that_has_ended() -> None:
    answer = Recorder(State.VERBATIM)
    answer.connection.receive(b"0\r\n\r\n")
    assert answer.done == ["settle complete", "keep"]
    answer.answer._break(End.IDLE_TIMEOUT)
    assert answer.done == ["settle complete", "keep"]


# By `REACHED`, and by an answer of its own.
SHOWN_ABOVE = {"HEAD": {"COLLECTING"}, "FRAMED": {"ENDED"}}


def test_table_in_the_module_has_a_row_for_each_state_and_names_the_states_that_bytes_lead_to() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (module.__doc__ or "").splitlines()
        if re.match(r"\| [A-Z]{2}", line)
    ]
    assert [row[0] for row in rows] == [state.name for state in State if state is not State.ENDED]
    for name, leads_to, *_ in rows:
        reached = {state.name for _, state in BYTES[State[name]]} | SHOWN_ABOVE.get(name, set())
        assert reached - {name} == set(leads_to.replace(",", "").split())


def test_state_is_the_name_of_the_method_that_receives_its_bytes() -> None:
    for state in State:
        if state is not State.ENDED:
            assert callable(getattr(Answer, state.name.lower()))
