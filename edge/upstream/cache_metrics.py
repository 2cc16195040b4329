"""What is so of endpoints and pools, and how well `cache-aware` ones knew what was cached, for operators."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from edge.upstream.endpoints import OTHER, Endpoints
from edge.upstream.health import HEALTHY
from edge.upstream.pools import Pool

_A_STEP: Final = 100  # members in a step of a scrape


def upstream_metrics(endpoints: Endpoints, pools: Mapping[str, Pool], max_labels: int) -> Iterator[Metric | None]:
    """Yield what is so of endpoints and pools, and what is known of their caches; None after each hundred."""
    yield from endpoints.metrics(pools, max_labels)
    yield from _states(pools, max_labels)
    yield from cache_metrics(pools, max_labels)
    yield from _hedges(pools, max_labels)


def _states(pools: Mapping[str, Pool], max_labels: int) -> Iterator[Metric | None]:
    """Yield how many members of each pool are in which state; those that are well are told also where none is."""
    members = GaugeMetricFamily("edge_pool_members", "Members of a pool by state.", labels=("pool", "state"))
    others, number = Counter({HEALTHY: 0}), 0
    for at, (name, pool) in enumerate(list(pools.items())):
        states = Counter({HEALTHY: 0})
        for member in pool.members:
            states[member.endpoint.health.state(member.endpoint.connections.loop.time())] += 1
            number += 1
            if number % _A_STEP == 0:
                yield None
        if at >= max_labels:
            others.update(states)
            continue
        for state, count in states.items():
            members.add_metric((name, state), count)
    if len(pools) > max_labels:
        for state, count in others.items():
            members.add_metric((OTHER, state), count)
    yield members


def _hedges(pools: Mapping[str, Pool], max_labels: int) -> Iterator[Metric]:
    """Yield when each pool asks a second endpoint, and what became of that; pools past `max_labels` have no series."""
    after = GaugeMetricFamily("edge_pool_hedge_after_seconds", "After which a second is asked.", labels=("pool",))
    text = "Streams whose first byte was late, by what became of asking a second endpoint."
    hedges = CounterMetricFamily("edge_pool_hedges", text, labels=("pool", "outcome"))
    for name, pool in list(pools.items())[:max_labels]:
        if (after_s := pool.hedge_after_s) is not None:
            after.add_metric((name,), after_s)
        for outcome, count in pool.hedges.items():
            hedges.add_metric((name, outcome), count)
    yield from (after, hedges)


def cache_metrics(pools: Mapping[str, Pool], max_labels: int) -> Iterator[Metric | None]:
    """Yield what was predicted and what was cached by member, and what the pools know; None after each hundred.

    The first `max_labels` members have series of their own.
    """
    member, pool_of = ("pool", "endpoint"), ("pool",)
    families: tuple[CounterMetricFamily | GaugeMetricFamily, ...] = (
        CounterMetricFamily("edge_prefix_prompt_tokens", "Of prompts, where cached tokens are told.", labels=member),
        CounterMetricFamily("edge_prefix_predicted_tokens", "Of them, what was taken to be cached.", labels=member),
        CounterMetricFamily("edge_prefix_cached_tokens", "Of them, what was cached.", labels=member),
        GaugeMetricFamily("edge_prefix_backlog_bytes", "Of prompts that were sent and not begun.", labels=member),
    )
    entries = GaugeMetricFamily("edge_prefix_entries", "Marks of prompts that are known.", labels=pool_of)
    trust = GaugeMetricFamily("edge_prefix_trust", "Of what is taken to be cached, the part that is.", labels=pool_of)
    foreign = GaugeMetricFamily("edge_prefix_foreign", "Of turns, those that others began.", labels=pool_of)
    others, number = [0, 0, 0, 0], 0
    for name, pool in list(pools.items()):
        caches = pool.caches
        if caches is None or len(pool.members) < 2:  # which has nothing to choose
            continue
        if number < max_labels:
            entries.add_metric((name,), len(caches.index))
            trust.add_metric((name,), caches.trust)
            foreign.add_metric((name,), caches.foreign)
        for each in pool.members:
            seat = each.seat
            assert seat is not None  # of every member of such a pool
            counts = (seat.prompt, seat.predicted, seat.cached, seat.pending)
            number += 1
            if number > max_labels:
                others = [sum(pair) for pair in zip(others, counts, strict=True)]
            else:
                for family, count in zip(families, counts, strict=True):
                    family.add_metric((name, each.name), count)
            if number % _A_STEP == 0:
                yield None
    if number > max_labels:
        for family, count in zip(families, others, strict=True):
            family.add_metric((OTHER, OTHER), count)
    yield from (*families, entries, trust, foreign)
