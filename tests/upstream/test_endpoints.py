"""One address: what is logged of it, what of it outlives a change of the file, and what it is asked."""

import asyncio
import logging
import re
from pathlib import Path

import pytest
import trustme

from edge.config.settings import EndpointConfig, PoolConfig
from edge.config.values import parse_url
from edge.errors import Unusable
from edge.operations import OPERATIONS
from edge.tasks import in_steps
from edge.upstream.endpoints import Endpoints, Lease, Member
from edge.upstream.health import Verdict
from tests.upstream.conftest import pool_of

# --- what is logged


async def test_endpoint_that_its_answers_take_out_and_bring_back_is_logged_once_each(
    endpoints: Endpoints, caplog: pytest.LogCaptureFixture
) -> None:
    """One that fails now and then is logged once a minute, not at each change."""
    caplog.set_level(logging.INFO, "edge.upstream.endpoints")
    [member] = pool_of(endpoints, 1).members
    logged = [
        (logging.WARNING, "endpoint 10.0.0.1:8000 failed several times in a row: ejected for 5 s"),
        (logging.INFO, "endpoint 10.0.0.1:8000 answers again"),
    ]
    for verdicts, lines in (
        ([Verdict.UNREACHABLE] * 2 + [Verdict.FINE, Verdict.BACKPRESSURE], 0),
        ([Verdict.UNREACHABLE] * 5, 1),
        ([Verdict.FINE] * 3, 2),
        ([Verdict.UNREACHABLE] * 3 + [Verdict.FINE] + [Verdict.UNREACHABLE] * 3, 2),
    ):
        for verdict in verdicts:
            with Lease(member) as lease:
                lease.report(verdict)
        assert [(each.levelno, each.getMessage()) for each in caplog.records] == logged[:lines]
    health, later = member.endpoint.health, asyncio.get_running_loop().time() + 60
    member.endpoint.log_state(later, "")  # its time is over, and nobody has tried it
    assert len(caplog.records) == 2
    health.unreachable(later, health.begin())
    member.endpoint.log_state(later, "")
    assert len(caplog.records) == 3


async def test_endpoint_that_fails_one_user_is_logged_with_that_user(
    endpoints: Endpoints, caplog: pytest.LogCaptureFixture
) -> None:
    [member] = pool_of(endpoints, 1).members
    for _ in range(9):
        with Lease(member, "u-1") as lease:
            lease.report(Verdict.FAULT, status=500)
    assert [each.getMessage() for each in caplog.records] == [
        "endpoint 10.0.0.1:8000 failed user u-1 several times in a row: not asked by that user for 5 s"
    ]


@pytest.mark.parametrize(("status", "check"), [(401, "its `api_key`"), (307, "its URL: scheme, host, port and path")])
async def test_endpoint_that_refuses_the_edge_is_logged_with_what_to_check(
    endpoints: Endpoints, caplog: pytest.LogCaptureFixture, status: int, check: str
) -> None:
    """Once a minute, whoever asks and however often."""
    [member] = pool_of(endpoints, 1).members
    for at in range(9):
        with Lease(member, f"u-{at}") as lease:
            lease.report(Verdict.FAULT, status=status)
            lease.report(Verdict.FINE)
    assert [each.getMessage() for each in caplog.records] == [
        f"endpoint 10.0.0.1:8000 answers {status} to the edge: check {check}"
    ]


@pytest.mark.parametrize("verdict", [Verdict.FAULT, Verdict.UNREACHABLE, Verdict.BACKPRESSURE])
async def test_nothing_is_held_against_an_instance(
    endpoints: Endpoints, caplog: pytest.LogCaptureFixture, verdict: Verdict
) -> None:
    """It is asked all the same, and its user could fill the log."""
    for _ in range(9):
        with endpoints.instance("http://s.o.svc:8000") as lease:
            lease.report(verdict, status=401)
    assert not lease.endpoint.health.is_tainted
    assert caplog.records == []


# --- over generations


async def test_endpoint_is_the_same_for_the_same_scheme_address_and_tls(endpoints: Endpoints, tmp_path: Path) -> None:
    """Its path, weight, model and key belong to its place in a pool, not to the address."""
    ca = tmp_path / "ca.pem"
    ca.write_bytes(trustme.CA().cert_pem.bytes())
    plain, private = PoolConfig("plain", ()), PoolConfig("private", (), ca_file=ca)
    first = endpoints.member(parse_url("http://10.0.0.1:8000"), plain)
    assert endpoints.member(parse_url("http://10.0.0.1:8000/other/path"), plain) is first
    assert endpoints.member(parse_url("http://10.0.0.1:8001"), plain) is not first
    url = parse_url("https://10.0.0.1:8000")
    secure, own = endpoints.member(url, plain), endpoints.member(url, private)
    assert len({first, secure, own}) == 3
    assert endpoints.member(url, private) is own
    new = tmp_path / "new.pem"
    new.write_bytes(trustme.CA().cert_pem.bytes())
    new.rename(ca)
    assert endpoints.member(url, private) is not own


async def test_endpoint_keeps_its_state_while_any_pool_names_it(endpoints: Endpoints) -> None:
    old = pool_of(endpoints, 1, 1)
    kept, gone = (member.endpoint for member in old.members)
    with old.lease([gone]):
        new = pool_of(endpoints, 7)
        await in_steps(endpoints.keep_only([new]))
        assert new.members[0].endpoint is kept
        assert kept.in_flight == 1
        assert list(endpoints.states()) == [kept]
        assert (kept.connections._closed, gone.connections._closed) == (False, True)
    assert kept.in_flight == 0


async def test_instances_outlive_every_change_of_the_file(endpoints: Endpoints) -> None:
    instance = endpoints.instance("http://a.b.svc:8000").endpoint
    await in_steps(endpoints.keep_only([]))
    assert endpoints.instance("http://a.b.svc:8000").endpoint is instance
    assert not instance.connections._closed


async def test_instances_are_bounded_by_dropping_unused_ones(
    endpoints: Endpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any key can name instances that do not exist."""
    monkeypatch.setattr("edge.upstream.endpoints._MAX_INSTANCES", 10)
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
        ("http://h/api/v1", "v2/rerank", b"POST /api/v2/rerank HTTP/1.1\r\nHost: h\r\n"),
        ("http://h", "v2/rerank", b"POST /v2/rerank HTTP/1.1\r\nHost: h\r\n"),
        ("http://h:7997", "embeddings", b"POST /v1/embeddings HTTP/1.1\r\nHost: h:7997\r\n"),
        ("http://h:7997/", "embeddings", b"POST /embeddings HTTP/1.1\r\nHost: h:7997\r\n"),
        ("http://h/", "v2/rerank", b"POST /v2/rerank HTTP/1.1\r\nHost: h\r\n"),
        ("http://h/", "tokenize", b"POST /tokenize HTTP/1.1\r\nHost: h\r\n"),
        ("http://h/api/", "tokenize", b"POST /tokenize HTTP/1.1\r\nHost: h\r\n"),
        ("https://[::1]:443/v1", "detokenize", b"POST /detokenize HTTP/1.1\r\nHost: [::1]\r\n"),
    ],
)
async def test_path_upstream_is_the_edges_own(endpoints: Endpoints, url: str, operation: str, line: bytes) -> None:
    """A path replaces /v1, a mere / is the root; tokenize and detokenize go to the root, another version beside /v1."""
    member = endpoints.instance(url).member
    head = member.head(OPERATIONS[operation])
    assert head.startswith(line)
    assert b"Authorization" not in head
    assert head is member.head(OPERATIONS[operation])


async def test_endpoints_own_key_is_sent_and_is_part_of_no_other_head(endpoints: Endpoints) -> None:
    url = parse_url("http://h:1")
    endpoint = endpoints.member(url, PoolConfig("p", ()))
    members = [Member(endpoint, EndpointConfig(url, api_key=key)) for key in (None, "one", "two")]
    heads = [member.head(OPERATIONS["completions"]) for member in members]
    assert [b"Authorization: Bearer one\r\n" in head for head in heads] == [False, True, False]
    assert len(set(heads)) == 3


async def test_tls_is_always_verified(endpoints: Endpoints, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(trustme.CA().cert_pem.bytes())
    url = parse_url("https://h")
    public, private = (endpoints.member(url, PoolConfig("p", (), ca_file=each)).connections.tls for each in (None, ca))
    assert public is not None
    assert private is not None
    for context in (public, private):
        assert context.check_hostname
        assert context.verify_mode.name == "CERT_REQUIRED"
    assert private.cert_store_stats()["x509_ca"] == 1


@pytest.mark.parametrize("content", [None, "no certificate\n"])
async def test_authority_that_is_none_is_unusable(endpoints: Endpoints, tmp_path: Path, content: str | None) -> None:
    ca = tmp_path / "ca.pem"
    if content is not None:
        ca.write_text(content)
    with pytest.raises(Unusable, match=rf"^pools\.p\.ca_file: {re.escape(str(ca))} cannot be used"):
        endpoints.member(parse_url("https://h"), PoolConfig("p", (), ca_file=ca))


async def test_instances_share_the_settings_of_tls(endpoints: Endpoints) -> None:
    """Any user may ask for any number of names, and one context takes 20 ms and 0.8 MB."""
    contexts = {endpoints.instance(f"https://s{at}.a.svc").endpoint.connections.tls for at in range(3)}
    assert len(contexts) == 1
    assert None not in contexts


async def test_endpoints_and_pools_past_the_bound_are_one_sum_which_keeps_what_it_counted(endpoints: Endpoints) -> None:
    pools = {"p1": pool_of(endpoints, 1), "p2": pool_of(endpoints, 1, 1, 1, first=1)}

    def ejections() -> dict[str, float]:
        found = [family for family in endpoints.metrics(pools, 1) if family is not None]
        labels = {family.name: [*(each.labels.popitem()[1] for each in family.samples)] for family in found}
        assert labels["edge_pool_waiting"] == ["p1", "(other)"]
        [family] = [each for each in endpoints.metrics(pools, 1) if each is not None and "ejections" in each.name]
        return {each.labels["endpoint"]: each.value for each in family.samples}

    for endpoint in endpoints.states():
        for user in ("u-1", "u-2", "u-3"):
            endpoint.health.fault(0.0, 0, user)
    assert ejections() == {"10.0.0.1:8000": 1, "(other)": 3}
    await in_steps(endpoints.keep_only([pools["p1"]]))
    assert ejections() == {"10.0.0.1:8000": 1, "(other)": 3}


async def test_walk_through_thousands_of_pools_goes_in_steps_and_keeps_what_is_asked_for_meanwhile(
    endpoints: Endpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name's addresses may change between two steps of a reload: those are no pool's of before."""
    monkeypatch.setattr("edge.upstream.endpoints._A_STEP", 10)
    pools = [pool_of(endpoints, 1, first=number) for number in range(100)]
    gone = [pool_of(endpoints, 1, first=number).members[0].endpoint for number in range(100, 200)]
    steps = endpoints.keep_only(pools)
    next(steps)
    late = pool_of(endpoints, 1, first=250).members[0].endpoint
    also = endpoints.keep_only(pools[:40])  # as DNS changes the members of another pool
    assert len(list(also)) == 4 + 20
    assert late not in endpoints.states()  # which this walk began after
    again = pool_of(endpoints, 1, first=250).members[0].endpoint
    list(steps)
    assert set(endpoints.states()) == {again, *(member.endpoint for pool in pools[:40] for member in pool.members)}
    assert all(endpoint.connections._closed for endpoint in gone)
