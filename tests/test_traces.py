"""What a `traceparent` says (W3C Trace Context, sections 3.2 and 4.3)."""

import pytest

from edge.ids import new_upstream_id
from edge.traces import Trace, read_trace, span_id

ID, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        (f"00-{ID}-{PARENT}-01", 1),
        (f"00-{ID}-{PARENT}-00", 0),
        (f"00-{ID}-{PARENT}-ff", 3),  # what is not known of them is not passed on
        (f"01-{ID}-{PARENT}-01", 1),  # a newer version is read as far as this one goes
        (f"cc-{ID}-{PARENT}-01-what-comes-later", 1),
    ],
)
def test_trace_is_read(given: str, flags: int) -> None:
    assert read_trace(given) == Trace(ID, PARENT, flags)


@pytest.mark.parametrize(
    "given",
    [
        "", "x", f"ff-{ID}-{PARENT}-01", f"00-{ID}-{PARENT}-01-more", f"00-{'0' * 32}-{PARENT}-01",
        f"00-{ID}-{'0' * 16}-01", f"00-{ID.upper()}-{PARENT}-01", f"00-{ID}-{PARENT}", f"cc-{ID}-{PARENT}-01more",
        f" 00-{ID}-{PARENT}-01", f"00-{ID}-{PARENT}-01\n", f"00-{ID}-{PARENT[:-1]}-01", f"00-{ID}-{PARENT}-1",
    ],
)  # fmt: skip
def test_what_is_none_is_none(given: str) -> None:
    assert read_trace(given) is None


def test_each_attempt_has_a_span_of_its_own_in_the_same_trace() -> None:
    trace, ids = Trace(ID, PARENT, 1), [new_upstream_id() for _ in range(9)]
    lines = {trace.line(each) for each in ids}
    assert len(lines) == 9
    for each in ids:
        again = read_trace(trace.line(each).removeprefix("traceparent: ").removesuffix("\r\n"))
        assert again == Trace(ID, span_id(each), 1)
