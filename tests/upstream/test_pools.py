"""Which endpoint of a pool, and what of an endpoint outlives a change of the file."""

import asyncio
import logging
from collections import Counter
from pathlib import Path

import pytest
import trustme

from edge.config.settings import Balance, EndpointConfig, PoolConfig
from edge.config.values import parse_url
from edge.errors import UpstreamUnavailable
from edge.upstream.health import Verdict
from edge.upstream.pools import Endpoint, Endpoints, Lease, Member, Pool, tls_context


@pytest.fixture
async def endpoints() -> Endpoints:
    return Endpoints(asyncio.get_running_loop())


def pool_of(endpoints: Endpoints, *weights: int, balance: Balance = "least-loaded", first: int = 0) -> Pool:
    config = PoolConfig(
        "p",
        tuple(EndpointConfig(parse_url(f"http://10.0.0.{first + at}:8000"), w) for at, w in enumerate(weights, 1)),
        balance,
    )
    return Pool(config, [endpoints.member(each.url, None) for each in config.endpoints])


def number(endpoint: Endpoint) -> int:
    return int(endpoint.url.host.rpartition(".")[2])


async def test_round_robin_spreads_weights_smoothly(endpoints: Endpoints) -> None:
    """As nginx does: 5, 1, 1 is a a b a c a a, never five times the same in a row."""
    pool = pool_of(endpoints, 5, 1, 1, balance="round-robin")
    order = [number(pool.lease().endpoint) for _ in range(14)]
    assert order == [1, 1, 2, 1, 3, 1, 1] * 2


async def test_round_robin_takes_turns_among_equals(endpoints: Endpoints) -> None:
    pool = pool_of(endpoints, 1, 1, 1, balance="round-robin")
    assert [number(pool.lease().endpoint) for _ in range(6)] == [1, 2, 3] * 2


async def test_least_loaded_fills_endpoints_by_their_weights(endpoints: Endpoints) -> None:
    pool = pool_of(endpoints, 1, 2, 3)
    for _ in range(600):
        pool.lease().__enter__()
    loads = {number(member.endpoint): member.endpoint.in_flight for member in pool.members}
    assert all(abs(loads[at] - 100 * at) <= 10 for at in (1, 2, 3)), loads


async def test_least_loaded_counts_what_other_pools_send_there(endpoints: Endpoints) -> None:
    """Requests are counted at the address, not at its place in one pool."""
    one, two = pool_of(endpoints, 1, 1), pool_of(endpoints, 1, 1)
    with one.lease() as busy:
        assert {two.lease().endpoint is busy.endpoint for _ in range(30)} == {False}


async def test_equals_are_drawn(endpoints: Endpoints) -> None:
    """Many processes that all begin with the first endpoint would load it together."""
    pool = pool_of(endpoints, 1, 1)
    counts = Counter(number(pool.lease().endpoint) for _ in range(400))
    assert min(counts[1], counts[2]) > 100


@pytest.mark.parametrize("balance", ["least-loaded", "round-robin"])
async def test_tried_endpoints_are_not_asked_again(endpoints: Endpoints, balance: Balance) -> None:
    pool = pool_of(endpoints, 9, 1, 1, balance=balance)
    tried: list[Endpoint] = []
    for _ in range(3):
        tried.append(pool.lease(tried).endpoint)
    assert sorted(map(number, tried)) == [1, 2, 3]
    with pytest.raises(UpstreamUnavailable) as caught:
        pool.lease(tried)
    assert "10.0.0" not in caught.value.message


async def test_lease_counts_while_it_is_held_and_on_every_way_out(endpoints: Endpoints) -> None:
    pool = pool_of(endpoints, 1)
    endpoint = pool.members[0].endpoint
    lease = pool.lease()
    assert endpoint.in_flight == 0
    with lease:
        assert endpoint.in_flight == 1
        with pool.lease():
            assert endpoint.in_flight == 2
    assert endpoint.in_flight == 0
    for error in (ValueError, asyncio.CancelledError, KeyboardInterrupt):
        with pytest.raises(error), pool.lease():
            raise error
        assert endpoint.in_flight == 0


async def test_cancelled_request_gives_its_lease_back(endpoints: Endpoints) -> None:
    pool = pool_of(endpoints, 1)
    held = asyncio.Event()

    async def hold() -> None:
        with pool.lease():
            held.set()
            await asyncio.Event().wait()

    task = asyncio.get_running_loop().create_task(hold())
    await held.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert pool.members[0].endpoint.in_flight == 0


# --- what the log tells


async def test_endpoint_that_its_answers_take_out_and_bring_back_is_told_once_each(
    endpoints: Endpoints, caplog: pytest.LogCaptureFixture
) -> None:
    """One that fails now and then is told of once a minute, not at each change."""
    caplog.set_level(logging.INFO, "edge.upstream.pools")
    [member] = pool_of(endpoints, 1).members
    told = [
        (logging.WARNING, "endpoint 10.0.0.1:8000 failed several times in a row: ejected for 5 s"),
        (logging.INFO, "endpoint 10.0.0.1:8000 answers again"),
    ]
    for verdicts, lines in (
        ([Verdict.FAULT] * 2 + [Verdict.FINE, Verdict.BACKPRESSURE], 0),
        ([Verdict.FAULT] * 5, 1),
        ([Verdict.FINE] * 3, 2),
        ([Verdict.FAULT] * 3 + [Verdict.FINE] + [Verdict.FAULT] * 3, 2),
    ):
        for verdict in verdicts:
            with Lease(member) as lease:
                lease.report(verdict)
        assert [(each.levelno, each.getMessage()) for each in caplog.records] == told[:lines]
    health, later = member.endpoint.health, asyncio.get_running_loop().time() + 60
    member.endpoint.tell(later)  # its time is over, and nobody has tried it
    assert len(caplog.records) == 2
    health.fault(later, health.begin())
    member.endpoint.tell(later)
    assert len(caplog.records) == 3


async def test_instance_that_fails_is_not_told_of(endpoints: Endpoints, caplog: pytest.LogCaptureFixture) -> None:
    """It is asked all the same, and its user could fill the log."""
    for _ in range(9):
        with endpoints.instance("http://s.o.svc:8000") as lease:
            lease.report(Verdict.FAULT)
    assert lease.endpoint.health.total_ejections
    assert caplog.records == []


# --- over generations


async def test_endpoint_is_the_same_for_the_same_scheme_address_and_tls(endpoints: Endpoints, tmp_path: Path) -> None:
    """Its path, weight, model and key belong to its place in a pool, not to the address."""
    ca = tmp_path / "ca.pem"
    ca.write_bytes(trustme.CA().cert_pem.bytes())
    first = endpoints.member(parse_url("http://10.0.0.1:8000"), None)
    assert endpoints.member(parse_url("http://10.0.0.1:8000/other/path"), None) is first
    assert endpoints.member(parse_url("http://10.0.0.1:8001"), None) is not first
    secure = endpoints.member(parse_url("https://10.0.0.1:8000"), None)
    assert secure is not first
    private = endpoints.member(parse_url("https://10.0.0.1:8000"), ca)
    assert private is not secure
    assert endpoints.member(parse_url("https://10.0.0.1:8000"), ca) is private
    new = tmp_path / "new.pem"
    new.write_bytes(trustme.CA().cert_pem.bytes())
    new.rename(ca)
    assert endpoints.member(parse_url("https://10.0.0.1:8000"), ca) is not private


async def test_endpoint_keeps_its_state_while_any_pool_names_it(endpoints: Endpoints) -> None:
    old = pool_of(endpoints, 1, 1)
    kept, gone = (member.endpoint for member in old.members)
    with old.lease([gone]):
        new = pool_of(endpoints, 7)
        endpoints.keep_only([new])
        assert new.members[0].endpoint is kept
        assert kept.in_flight == 1
        assert list(endpoints.states()) == [kept]
        assert (kept.connections._closed, gone.connections._closed) == (False, True)
    assert kept.in_flight == 0


async def test_instances_outlive_every_change_of_the_file(endpoints: Endpoints) -> None:
    instance = endpoints.instance("http://a.b.svc:8000").endpoint
    endpoints.keep_only([])
    assert endpoints.instance("http://a.b.svc:8000").endpoint is instance
    assert not instance.connections._closed


async def test_instances_are_bounded_by_dropping_unused_ones(
    endpoints: Endpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any key can name instances that do not exist."""
    monkeypatch.setattr("edge.upstream.pools._MAX_INSTANCES", 10)
    with endpoints.instance("http://s.busy.svc:8000") as busy:
        for at in range(95):
            endpoints.instance(f"http://s{at}.o.svc:8000")
        assert len(list(endpoints.states())) <= 10
        assert endpoints.instance("http://s.busy.svc:8000").endpoint is busy.endpoint


@pytest.mark.parametrize(
    "address", ["http://a..b:8000", "http://a b", "ftp://a", "http://0x7f.1", "http://a:99999", ""]
)
async def test_instance_at_no_possible_address_is_refused(endpoints: Endpoints, address: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        endpoints.instance(address)
    assert list(endpoints.states()) == []


@pytest.mark.parametrize(
    ("url", "operation", "line"),
    [
        ("http://h:1", "chat/completions", b"POST /v1/chat/completions HTTP/1.1\r\nHost: h:1\r\n"),
        ("http://h/api/v3", "embeddings", b"POST /api/v3/embeddings HTTP/1.1\r\nHost: h\r\n"),
        ("http://h/api/", "tokenize", b"POST /tokenize HTTP/1.1\r\nHost: h\r\n"),
        ("https://[::1]:443/v1", "detokenize", b"POST /detokenize HTTP/1.1\r\nHost: [::1]\r\n"),
    ],
)
async def test_path_upstream_is_the_edges_own(endpoints: Endpoints, url: str, operation: str, line: bytes) -> None:
    """A URL that has a path replaces /v1; tokenize and detokenize go to the root."""
    member = endpoints.instance(url).member
    head = member.head(operation)
    assert head.startswith(line)
    assert b"Authorization" not in head
    assert head is member.head(operation)


async def test_endpoints_own_key_is_sent_and_is_part_of_no_other_head(endpoints: Endpoints) -> None:
    url = parse_url("http://h:1")
    endpoint = endpoints.member(url, None)
    members = [Member(endpoint, EndpointConfig(url, api_key=key)) for key in (None, "one", "two")]
    heads = [member.head("completions") for member in members]
    assert [b"Authorization: Bearer one\r\n" in head for head in heads] == [False, True, False]
    assert len(set(heads)) == 3


async def test_tls_is_always_verified(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(trustme.CA().cert_pem.bytes())
    for context in (tls_context(None), tls_context(ca)):
        assert context.check_hostname
        assert context.verify_mode.name == "CERT_REQUIRED"
    assert tls_context(ca).cert_store_stats()["x509_ca"] == 1
    with pytest.raises(FileNotFoundError):
        tls_context(tmp_path / "missing.pem")


async def test_instances_share_the_settings_of_tls() -> None:
    """Any user may ask for any number of names, and one context takes 20 ms and 0.8 MB."""
    endpoints = Endpoints(asyncio.get_running_loop())
    contexts = {endpoints.instance(f"https://s{at}.a.svc").endpoint.connections.tls for at in range(3)}
    assert len(contexts) == 1
    assert None not in contexts
