"""What a reload changes, in words."""

from pathlib import Path

import pytest

from edge.config.changes import describe_change, list_changes, list_restarts
from edge.config.reading import parse
from edge.config.settings import Config

BASE = """
[pools.a]
endpoints = ["http://10.0.0.1:8000", { url = "http://10.0.0.2:8000", weight = 2, api_key = "sk-one-secret" }]
[pools.b]
endpoints = ["http://10.0.0.3:8000"]
[routes.x]
pool = "a"
hosts = ["chat.d.run", "b.d.run"]
[routes.y]
pool = "b"
"""


def read(text: str) -> Config:
    return parse(text, Path("routes.toml"), {})


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ("", "", []),
        ('[routes.y]\npool = "b"\n', "", ["-route y"]),
        ("", '[routes.z]\npool = "b"\nmodel_echo = true\n', ["+route z: match z, pool b, model_echo true"]),
        ('[routes.y]\npool = "b"', '[routes.y]\npool = "a"', ["~route y: pool b -> a"]),
        ('"b.d.run"]', '"c.d.run"]', ["~route x: hosts +c.d.run -b.d.run"]),
        ('["chat.d.run", "b.d.run"]', '["b.d.run", "chat.d.run"]', ["~route x: hosts in another order"]),
        ('hosts = ["chat.d.run", "b.d.run"]', "", ["~route x: hosts chat.d.run, b.d.run -> none"]),
        ("weight = 2", "weight = 3", ["~pool a: endpoint http://10.0.0.2:8000 weight 2 -> 3"]),
        (
            'endpoints = ["http://10.0.0.3:8000"]',
            'endpoints = ["http://10.0.0.4:8000"]\nconnect_timeout = "250ms"',
            ["~pool b: endpoints +http://10.0.0.4:8000 -http://10.0.0.3:8000", "~pool b: connect_timeout 2s -> 250ms"],
        ),
        (
            'endpoints = ["http://10.0.0.3:8000"]',
            'endpoints = ["http://10.0.0.3:8000"]\nhealth = { interval = "9s" }',
            ["~pool b: health none -> (interval 9s)"],
        ),
        ("", '[server]\nmax_body = "1MB"\n', ["~server: max_body 64MiB -> 1MB"]),
        ("", '[keys]\ncache_ttl = "1m"\n', ["~keys: cache_ttl 10s -> 60s"]),
    ],
)
def test_each_changed_value_has_its_line(old: str, new: str, lines: list[str]) -> None:
    text = BASE.replace(old, new) if old else BASE + new
    assert list_changes(read(BASE), read(text)) == lines


def test_secrets_are_said_to_have_changed_and_never_shown() -> None:
    lines = list_changes(read(BASE), read(BASE.replace("sk-one-secret", "sk-two-secret")))
    assert lines == ["~pool a: endpoint http://10.0.0.2:8000 api_key changed"]
    added = "\n".join(
        list_changes(
            read(BASE),
            read(
                BASE
                + BASE.replace(".a]", ".c]")
                .replace(".b]", ".d]")
                .replace(".x]", ".v]")
                .replace(".y]", ".w]")
                .replace("hosts =", 'match = "v"\nhosts =')
            ),
        )
    )
    assert "+pool c" in added
    assert "secret" not in added.replace("(secret)", "")


def test_log_line_names_what_changed() -> None:
    new = read(BASE.replace("weight = 2", "weight = 3").replace("[routes.y]", "[routes.z]"))
    assert describe_change(read(BASE), new) == "+route z, -route y, ~pool a"
    assert describe_change(new, new) == "nothing changed"


WHOLE = """
[server]
listen = "127.0.0.1:1"
max_body = "1MiB"
[keys]
store = "sqlite:a.db"
cache_ttl = "1s"
[jwt]
issuer = "https://a/"
audience = "models"
jwks = "https://a/jwks.json"
leeway = "1s"
[usage]
journal = "a"
sink = "https://a/"
sink_token = "one"
[shared]
redis = "redis://a"
"""


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("127.0.0.1:1", "127.0.0.1:2", ["server.listen"]),
        ("[server]", '[server]\nadmin = "127.0.0.1:3"', ["server.admin"]),
        ("1MiB", "2MiB", []),
        ("sqlite:a.db", "sqlite:b.db", ["keys.store"]),
        ('"1s"', '"2s"', []),
        ("https://a/jwks.json", "https://b/jwks.json", []),
        ("[jwt]", '[jwt]\nca_file = "CA"', ["jwt.ca_file"]),
        ('journal = "a"', 'journal = "b"', ["usage"]),
        ("[usage]", '[usage]\nwhen_full = "refuse"', ["usage"]),
        ('sink_token = "one"', 'sink_token = "two"', []),
        ("redis://a", "redis://b", ["shared"]),
    ],
)
def test_what_needs_a_restart_is_named(old: str, new: str, names: list[str], tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("a certificate")
    changed = (BASE + WHOLE).replace(old, new).replace("CA", str(tmp_path / "ca.pem"))
    assert list_restarts(read(BASE + WHOLE), read(changed)) == names


def test_table_that_needs_a_restart_to_come_or_go_is_named(tmp_path: Path) -> None:
    (tmp_path / "pem").write_text("a certificate")
    tls = f"certificate = '{tmp_path}/pem'\nprivate_key = '{tmp_path}/pem'"
    without, plain = read(BASE), read(BASE + f"[server.tls]\n{tls}\n" + WHOLE.replace("[server]", "[server]\n", 1))
    assert list_restarts(without, plain) == ["server.listen", "server.tls", "keys.store", "jwt", "usage", "shared"]
    other = read(BASE + f"[server.tls]\n{tls.replace('private_key', 'private_key ')}\n" + WHOLE)
    assert list_restarts(plain, other) == []


def test_log_line_of_thousands_names_a_hundred() -> None:
    added = "".join(f'[routes."public/{number}"]\npool = "a"\n' for number in range(150))
    line = describe_change(read(BASE), read(BASE + added))
    assert (line.count("+route"), line.rpartition(", ")[2]) == (100, "50 more")
