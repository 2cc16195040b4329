"""Pools of endpoints that nobody connects to."""

import asyncio

import pytest

from edge.config.settings import Balance, EndpointConfig, PoolConfig
from edge.config.values import parse_url
from edge.upstream.endpoints import Endpoints
from edge.upstream.pools import Pool


@pytest.fixture
async def endpoints() -> Endpoints:
    return Endpoints(asyncio.get_running_loop())


def pool_of(endpoints: Endpoints, *weights: int, balance: Balance = "least-loaded", first: int = 0) -> Pool:
    config = PoolConfig(
        "p",
        tuple(EndpointConfig(parse_url(f"http://10.0.0.{first + at}:8000"), w) for at, w in enumerate(weights, 1)),
        balance,
    )
    return Pool(config, [endpoints.member(each.url, config) for each in config.endpoints])
