"""What is counted of members of pools, as a scrape sees it."""

from prometheus_client.parser import text_string_to_metric_families

from edge.exchange import End, Exchange, Tried, Usage
from edge.telemetry.alike import alike
from edge.telemetry.exposition import lines_of
from edge.telemetry.upstreams import Upstreams
from tests.records import finished

Found = dict[tuple[str, ...], float]


def samples(upstreams: Upstreams) -> Found:
    text = b"".join(line for family in upstreams.families() if family is not None for line in lines_of(family))
    order = ("pool", "endpoint", "status", "outcome", "le")
    heads, unique = [], {}
    for line in text.decode().splitlines():
        if not line.startswith("#"):
            heads.append(line)
        unique[line] = None
    return {
        (each.name, *(each.labels[name] for name in order if name in each.labels)): each.value
        for family in text_string_to_metric_families("\n".join(unique) + "\n")
        for each in family.samples
    }


def observe(upstreams: Upstreams, exchange: Exchange) -> None:
    for requests in alike([exchange]):
        upstreams.count(requests)


def asked(found: Found) -> dict[tuple[str, ...], float]:
    return {key[1:]: value for key, value in found.items() if key[0] == "edge_upstream_requests_total"}


AT = {"pool": "p", "endpoint": "h:1", "asked_at": 100.0}


def test_answer_is_counted_at_its_member_with_the_times_that_it_took() -> None:
    upstreams = Upstreams()
    observe(upstreams, finished(**AT, stream=True, first_byte=100.5, finished=102.5, usage=Usage(5, 21)))
    observe(upstreams, finished(**AT, first_byte=100.5, usage=Usage(5, 1)))
    found = samples(upstreams)
    assert asked(found) == {("p", "h:1", "200", "complete"): 2}
    assert found["gen_ai_server_time_to_first_token_seconds_sum", "p", "h:1"] == 1.0
    assert found["gen_ai_server_request_duration_seconds_sum", "p", "h:1"] == 5.0
    assert found["edge_upstream_completion_tokens_total", "p", "h:1"] == 22
    # twenty gaps in two seconds; one token has none
    assert found["gen_ai_server_time_per_output_token_seconds_sum", "p", "h:1"] == 0.1
    assert found["gen_ai_server_time_per_output_token_seconds_count", "p", "h:1"] == 1


def test_each_member_that_failed_is_counted_beside_the_one_that_answered() -> None:
    upstreams = Upstreams()
    failures = [Tried("h:2", 503, "upstream_error", "busy", 1.0), Tried("h:3", 0, "connect_refused", "refused", 1.0)]
    observe(upstreams, finished(**AT, retries=2, failures=failures))
    assert asked(samples(upstreams)) == {
        ("p", "h:1", "200", "complete"): 1,
        ("p", "h:2", "503", "upstream_error"): 1,
        ("p", "h:3", "0", "connect_refused"): 1,
    }


def test_request_that_failed_at_its_last_member_is_counted_once() -> None:
    upstreams = Upstreams()
    failures = [Tried("h:1", 500, "upstream_error", "oh", 1.0)]
    observe(upstreams, finished(**AT, status=502, end=End.UPSTREAM_ERROR, failures=failures))
    found = samples(upstreams)
    assert asked(found) == {("p", "h:1", "500", "upstream_error"): 1}
    assert found["gen_ai_server_request_duration_seconds_count", "p", "h:1"] == 0


def test_instances_have_one_series_and_members_past_the_bound_another() -> None:
    upstreams = Upstreams(max_labels=3)
    for number in range(5):
        observe(upstreams, finished(endpoint=f"s{number}:1", asked_at=100.0))
        observe(upstreams, finished(pool="p", endpoint=f"h:{number}", asked_at=100.0))
        observe(upstreams, finished(pool=f"p{number}", queued_s=0.2))
    found = samples(upstreams)
    assert asked(found) == {
        ("", "instances", "200", "complete"): 5,
        ("p", "h:0", "200", "complete"): 1,
        ("p", "h:1", "200", "complete"): 1,
        ("(other)", "(other)", "200", "complete"): 3,
    }
    assert found["edge_pool_wait_seconds_count", "(other)"] == 2


def test_members_that_are_gone_make_room_for_others() -> None:
    upstreams = Upstreams(max_labels=1)
    observe(upstreams, finished(**AT))
    upstreams.keep_only([("p", "h:2")])
    observe(upstreams, finished(pool="p", endpoint="h:2", asked_at=100.0))
    assert asked(samples(upstreams)) == {("p", "h:2", "200", "complete"): 1}
