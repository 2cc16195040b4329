"""Ids of requests: random, and upstream a UUID."""

import re
import uuid

from edge.ids import new_request_id, new_upstream_id


def test_no_id_comes_twice_or_counts_up() -> None:
    ids = [new_request_id() for _ in range(2000)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("req_[0-9a-f]{32}", each) for each in ids)
    firsts = {each[4:8] for each in ids}
    assert len(firsts) > 1900  # nothing that all ids of a process begin with


def test_upstream_gets_a_random_uuid() -> None:
    for _ in range(2000):
        parsed = uuid.UUID(new_upstream_id())
        assert (parsed.version, parsed.variant) == (4, uuid.RFC_4122)
