"""What a request would meet, in words; that it is what a live call meets is shown in behaviour/test_explain.py."""

import json
from pathlib import Path

import pytest

from edge.commands.explain import Explanation, explain
from edge.config.reading import parse
from edge.exchange import Principal

CONFIG = parse(
    """
[pools.r1]
endpoints = ["http://10.0.0.1:8000", { url = "http://10.0.0.2:8000", weight = 2, model = "own" }]
[routes."public/deepseek-r1"]
pool = "r1"
model = "deepseek-ai/DeepSeek-R1"
model_echo = false
hosts = ["chat.d.run"]
[routes."public/*"]
pool = "r1"
[routes."u-*"]
instance = "http://{service}.{owner}.svc.cluster.local:8000"
hosts = ["*.d.run", "!chat.d.run"]
""",
    Path("routes.toml"),
    {},
)
KEYS = [
    Principal("k1", "u-1"),
    Principal("k2", "u-2", deny=("public/*",)),
    Principal("k3", "u-3", allow=("u-1/qwen2",)),
    Principal("k4", "u-4", enabled=False),
    Principal("k5", "u-5", expires_at=50.0),
    Principal("k6", "u-6", suspended=True),
    Principal("k7", "u-7", out_of_quota=True),
]


def ask(model: str, host: str = "chat.d.run", key_id: str | None = "k1") -> Explanation:
    return explain(CONFIG, model, host, key_id, KEYS, now=100.0)


@pytest.mark.parametrize(
    ("model", "host", "key_id", "status", "route"),
    [
        ("public/deepseek-r1", "chat.d.run", "k1", 200, "public/deepseek-r1"),
        ("public/deepseek-r1", "CHAT.d.run:443", None, 200, "public/deepseek-r1"),
        ("public/deepseek-r1", "sh-02.d.run", "k1", 200, "public/*"),
        ("u-1/qwen2", "sh-02.d.run", "k1", 200, "u-*"),
        ("u-1/qwen2", "sh-02.d.run", "k2", 404, "u-*"),
        ("u-1/qwen2", "sh-02.d.run", "k3", 200, "u-*"),
        ("u-1/qwen2", "chat.d.run", "k1", 404, None),
        ("u-1/Not_A_Label", "sh-02.d.run", "k1", 404, None),
        ("other", "chat.d.run", "k1", 404, None),
        ("public/deepseek-r1", "chat.d.run", "k2", 403, "public/deepseek-r1"),
        ("public/deepseek-r1", "chat.d.run", "nobody", 401, "public/deepseek-r1"),
        ("public/deepseek-r1", "chat.d.run", "k4", 401, "public/deepseek-r1"),
        ("public/deepseek-r1", "chat.d.run", "k5", 401, "public/deepseek-r1"),
        ("public/deepseek-r1", "chat.d.run", "k6", 401, "public/deepseek-r1"),
        ("public/deepseek-r1", "chat.d.run", "k7", 402, "public/deepseek-r1"),
        ("public/deepseek-r1", "not a host", "k1", 400, None),
    ],
)
def test_status_and_route(model: str, host: str, key_id: str | None, status: int, route: str | None) -> None:
    told = ask(model, host, key_id)
    assert (told.status, told.route) == (status, route)


def test_every_route_says_why_it_wins_or_loses() -> None:
    assert ask("public/deepseek-r1").routes == (
        ("public/deepseek-r1", "wins"),
        ("public/*", "an exact name goes first"),
        ("u-*", "not at this host: hosts are *.d.run, !chat.d.run"),
    )


def test_endpoints_come_with_the_name_each_is_asked_for() -> None:
    told = ask("public/deepseek-r1")
    assert [(each.url, each.weight, each.model) for each in told.endpoints] == [
        ("http://10.0.0.1:8000", 1, "deepseek-ai/DeepSeek-R1"),
        ("http://10.0.0.2:8000", 2, "own"),
    ]
    [instance] = ask("u-1/qwen2", "sh-02.d.run").endpoints
    assert (instance.url, instance.model) == ("http://qwen2.u-1.svc.cluster.local:8000", "u-1/qwen2")


def test_json_has_the_promised_fields() -> None:
    document = json.loads(ask("public/x").as_json())
    assert document == {
        "route": "public/*",
        "status": 200,
        "reason": "goes to the pool r1",
        "pool": "r1",
        "endpoints": ["http://10.0.0.1:8000", "http://10.0.0.2:8000"],
    }


def test_text_says_who_may_use_the_model_and_what_the_pool_is() -> None:
    text = ask("u-1/qwen2", "sh-02.d.run").render()
    assert "keys of u-1" in text
    assert "k1 of u-1" in text
    text = ask("public/deepseek-r1").render()
    assert "every key" in text
    assert "r1: cache-aware, vllm, connect 2s" in text


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("", ["health   not probed, judged by its answers", "retries  none, it has one endpoint"]),
        ('health = { interval = "9s" }', ["health   probed every 9s at the path of its engine"]),
        ('health = { path = "/up" }', ["health   probed every 5s at /up"]),
        ("max_inflight = 4", ["queue    4 requests at each endpoint, none waits"]),
        ("max_inflight = 4\nqueue = 16", ["queue    4 requests at each endpoint, then 16 wait, for 10s"]),
        (
            'endpoints = ["http://a:1", "http://b:1"]',
            [
                "retries  after a refused connection, a 429, 502, 503, 504 or 529, or a refusal of the edge itself, "
                "within 2s; a share of 0.2 at once"
            ],
        ),
        (
            'endpoints = ["http://a:1", "http://b:1"]\nretry_within = "0s"\nretry_after_send = true',
            ["retries  after a refused connection, a connection that died with the request on it; a share"],
        ),
        ('resume = "auto"', ["resume   none, it has one endpoint"]),
        (
            'endpoints = ["http://a:1", "http://b:1"]\nhedge_after = "p95"',
            [
                "hedge    a stream of chat/completions, completions or messages, asked with up to 16KiB, is asked of "
                "a second endpoint after the p95 of the pool, once 100 are measured; within the retries, while none "
                "waits in the queue"
            ],
        ),
        (
            'endpoints = ["http://a:1", "http://b:1"]\nresume = "replay"\nresume_at_most = 50',
            [
                "resume   a stream of chat/completions or completions, of up to 512KiB, is asked again at temperature "
                "0 or with a seed, up to 50 tokens; docs/resume.md has what is refused"
            ],
        ),
        (
            'endpoints = ["http://a:1", "http://b:1"]\nengine = "llamacpp"\nresume = "content"',
            [
                "resume   a stream of chat/completions or completions, of up to 512KiB, is gone on with behind its "
                "text; docs/resume.md"
            ],
        ),
        (
            'endpoints = ["http://a:1", "http://b:1"]\nresume = "auto"',
            [
                "resume   a stream of chat/completions or completions, of up to 512KiB, is gone on with behind its "
                "text, or within and behind thoughts of DeepSeek-R1, or asked again at"
            ],
        ),
    ],
)
def test_text_tells_the_settings_of_a_pool_that_have_an_effect(settings: str, told: list[str]) -> None:
    endpoints = "" if "endpoints" in settings else 'endpoints = ["http://a:1"]\n'
    config = parse(f'[pools.p]\n{endpoints}{settings}\n[routes."public/a"]\npool = "p"\n', Path("routes.toml"), {})
    text = explain(config, "public/a", "chat.d.run", None, (), now=100.0).render()
    assert [line for line in told if f"\n  {line}" not in text] == []
    assert ("\n  queue " in text) == ("max_inflight" in settings)
