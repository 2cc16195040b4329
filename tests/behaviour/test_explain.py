"""`edge explain`, `diff` and `schema`: what is told is what happens."""

import json
import random
import time
from pathlib import Path

import pytest

from edge.commands.explain import explain
from edge.keys.stores.registry import KeyRegistry
from edge.simulator.server import Simulator
from tests.command import edge as run
from tests.conftest import StartEdge

ROUTES = """
[pools.one]
endpoints = ["{upstream}"]
[pools.two]
endpoints = [{ url = "{upstream}", model = "own" }]
[routes."public/a"]
pool = "one"
hosts = ["chat.d.run"]
[routes."public/a*"]
pool = "two"
hosts = ["chat.d.run", "sh-02.d.run"]
[routes."public/*"]
pool = "one"
hosts = ["*.d.run", "!sh-03.d.run"]
[routes."region"]
match = "public/b"
pool = "two"
hosts = ["sh-03.d.run"]
[routes."u-1/own"]
pool = "two"
hosts = ["sh-02.d.run", "chat.d.run"]
[routes."u-1/*"]
pool = "one"
hosts = ["*.d.run", "!chat.d.run"]
[routes."u-*"]
instance = "{upstream}"
model = "{owner}-{service}"
model_echo = false
hosts = ["*.d.run", "!chat.d.run"]
[routes."odd"]
pool = "one"
hosts = ["10.0.0.9"]
"""
HOSTS = [
    "chat.d.run", "sh-02.d.run", "sh-03.d.run", "SH-03.d.run.:443", "a.b.d.run", "d.run", "10.0.0.9", "x y",
    "127.0.0.1",
]  # fmt: skip
MODELS = [
    "public/a", "public/ab", "public/b", "public/", "public", "u-1/own", "u-1/x", "u-2/x", "u-2/X", "u-2/a/b", "u-2/",
    "u-2", "u-", "odd", "odd ", "", "é", "u-1/own\u2028", "u-3/-a", 'public/"a"', "public/a\\",
]  # fmt: skip


def make_keys(path: Path) -> dict[str, str]:
    """Make keys of every kind; return their secrets by id, an id that is no key's among them."""
    secrets = {"key_that_is_not": "sk-" + "x" * 45}
    with KeyRegistry(path) as registry:
        made = {}
        for name, user, allow, deny in (
            ("plain", "u-1", (), ()),
            ("second", "u-2", (), ()),
            ("denied", "u-2", (), ("public/a",)),
            ("narrow", "u-3", ("public/b",), ()),
            ("guest", "u-3", ("u-1/own", "public/**"), ("public/b*",)),
            ("wide", "u-2", ("**",), ()),
            ("disabled", "u-4", (), ()),
            ("suspended", "u-5", (), ()),
            ("poor", "u-6", (), ()),
        ):
            secret, record = registry.create(user, name=name, allow=allow, deny=deny)
            secrets[record.id] = secret
            made[name] = record.id
        registry.change(made["disabled"], enabled=False)
        registry.mark_user("u-5", suspended=True)
        registry.mark_user("u-6", out_of_quota=True)
    return secrets


async def test_explain_of_a_thousand_triples_is_what_a_live_call_meets(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url))
    secrets = make_keys(edge.keys_path)
    with KeyRegistry(edge.keys_path) as registry:
        records = registry.list()
    draw = random.Random(4)
    client = await edge.connect()
    seen = set()
    for number in range(1000):
        key_id, host, model = draw.choice(list(secrets)), draw.choice(HOSTS), draw.choice(MODELS)
        told = explain(edge.server.generation.config, model, host, key_id, records, time.time())
        asked = {"model": model, "messages": []}
        client.send(edge.request(asked, host=host, key=secrets[key_id], headers=(f"x-request-id: n{number}",)))
        status, headers, _ = await client.response()
        assert told.status == status, (key_id, host, model, told)
        seen.add(status)
        if headers.get("connection") == "close":
            client = await edge.connect()
    assert seen == {200, 400, 401, 402, 403, 404, 421}
    lines = {line["request_id"]: line for line in await edge.log()}
    draw = random.Random(4)
    for number in range(1000):  # the same triples again, now with what the log says of each
        key_id, host, model = draw.choice(list(secrets)), draw.choice(HOSTS), draw.choice(MODELS)
        told = explain(edge.server.generation.config, model, host, key_id, records, time.time())
        line = lines[f"n{number}"]
        if line["status"] == 200:
            assert (line["route"], line["upstream_model"]) == (told.route, told.endpoints[0].model)
            assert line["endpoint"] == told.endpoints[0].url.removeprefix("http://")


def test_explain_tells_a_person_and_a_program(tmp_path: Path) -> None:
    path = tmp_path / "routes.toml"
    path.write_text('[keys]\nstore = "sqlite:keys.db"\n' + ROUTES.replace("{upstream}", "http://10.0.0.1:8000"))
    with KeyRegistry(tmp_path / "keys.db") as registry:
        _, record = registry.create("u-1", deny=("public/b",))
    done = run("explain", "public/b", "--host", "sh-02.d.run", "--key-id", record.id, "--config", path)
    assert done.code == 0
    assert "403, a deny pattern of the key names this model" in done.out
    done = run("explain", "u-1/own", "--json", "--config", path)
    told = json.loads(done.out)
    assert (told["route"], told["status"], told["pool"]) == ("u-1/own", 200, "two")
    assert told["endpoints"] == ["http://10.0.0.1:8000"]
    done = run("explain", "public/b", "--config", tmp_path / "nowhere.toml")
    assert (done.code, done.out) == (1, "")
    assert "nowhere.toml" in done.err
    assert not (tmp_path / "edge.db").exists()


BEFORE = '[pools.a]\nendpoints = ["http://10.0.0.1:1"]\n[routes.x]\npool = "a"\n'


@pytest.mark.parametrize(
    ("new", "code", "said"),
    [
        (BEFORE, 0, "nothing changed"),
        (BEFORE.replace(":1", ":2"), 0, "~pool a: endpoints +http://10.0.0.1:2 -http://10.0.0.1:1"),
        (BEFORE + '[server]\nlisten = "127.0.0.1:1"\n', 0, "a reload would be refused: server.listen changed"),
        (BEFORE.replace("routes.x", "routes.y"), 0, "a reload would be refused: routes: every route of before is gone"),
        (BEFORE + "nonsense = 1\n", 1, "new.toml:5: routes.x.nonsense"),
        ("", 1, "new.toml:1: "),
    ],
)
def test_diff_tells_what_a_reload_would_do(tmp_path: Path, new: str, code: int, said: str) -> None:
    (tmp_path / "old.toml").write_text(BEFORE)
    (tmp_path / "new.toml").write_text(new)
    done = run("diff", tmp_path / "old.toml", tmp_path / "new.toml")
    assert (done.code, done.err) == (code, "")
    assert said in done.out


def test_diff_of_a_missing_file_names_no_option_that_it_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "old.toml").write_text(BEFORE)
    done = run("diff", tmp_path / "old.toml", tmp_path / "new.toml")
    assert done.code == 1
    assert "new.toml:1: there is no such file: write a first one with `edge init`, or name another\n" in done.out
    assert "--config" not in done.out


def test_schema_prints_what_is_shipped() -> None:
    done = run("schema")
    assert done.code == 0
    assert done.out == (Path(__file__).parents[2] / "edge/routes.schema.json").read_text()
