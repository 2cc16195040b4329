"""The rules of routes.toml: golden cases of problems, the values that come out, and the file that is shipped."""

import sys
from itertools import cycle
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge import names
from edge.config import reading, rules
from edge.config.positions import Positions
from edge.config.problems import ConfigError, Problem, render_problems
from edge.config.process_settings import KEY_STORES, SINKS
from edge.config.settings import Config, EndpointConfig, Engine, RouteConfig
from edge.config.tables import Reader, Table
from edge.config.values import Url, samples_of
from edge.envelope import json as envelope
from edge.errors import ModelNotFound
from tests.profiles import examples

ROOT = Path(__file__).parents[2]
CASES = sorted((ROOT / "tests/cases/config").glob("*.toml"))
DASHES = "-" * 10 + "\n"
ENV = {"SET": "value", "EMPTY": ""}
# What grows with every engine, store and sink, as the cases write it.
LISTS = {
    "<ENGINES>": ", ".join(get_args(Engine)),
    "<KEY_STORES>": samples_of(KEY_STORES),
    "<SINKS>": samples_of(SINKS),
}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the directory of routes.toml, with the files that the cases name."""
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "secret": b"\n sk-from-file \r\n",
        "empty": b" \n",
        "two_lines": b"sk-1\nsk-2\n",
        "tls.crt": b"certificate",
        "tls.key": b"key",
    }.items():
        Path(name).write_bytes(content)
    Path("directory").mkdir()
    return tmp_path


def findings(text: str, path: Path = Path("routes.toml")) -> tuple[Problem, ...]:
    """List all problems of a text, or the warnings of a valid one."""
    try:
        return reading.parse(text, path, ENV).warnings
    except ConfigError as error:
        return error.problems


def parsed(text: str) -> Config:
    """Read a text to which one route and its pool are added."""
    return reading.parse(
        text + '\n[routes.r]\npool = "p"\n[pools.p]\nendpoints = ["http://p"]', Path("routes.toml"), ENV
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
@pytest.mark.usefixtures("directory")
def test_every_problem_is_reported_with_its_line(case: Path) -> None:
    """Everything wrong is listed at once, by line, at the deepest key that is there, with what to write."""
    text, expected = case.read_text().split(DASHES)
    for written, listed in LISTS.items():
        expected = expected.replace(written, listed)
    assert [f"{problem.line}: {problem}" for problem in findings(text)] == expected.splitlines()


@pytest.mark.usefixtures("directory")
def test_every_message_says_what_to_do() -> None:
    """A message names what to change: it holds a hint, and never only a complaint."""
    verbs = ("write", "remove", "did you mean", "close", "put", "give", "stands in quotes", "set it", "keep")
    messages = [problem.message for case in CASES for problem in findings(case.read_text().split(DASHES)[0])]
    assert [message for message in messages if not any(verb in message for verb in verbs)] == []


NO_SERVERS = ["h:99999", "h:0", "h:x", "a..c", "[zz]", "[::1", r"h\\x", "a b", "a%20b", "1.2.3.4.5", r"h\u0000", ""]
SERVER_SETTINGS = [
    ("keys", "store", "https"),
    ("keys", "store", "redis"),
    ("usage", "sink", "http"),
    ("usage", "sink", "rediss"),
    ("shared", "redis", "redis"),
    ("jwt", "jwks", "https"),
]


@pytest.mark.parametrize(
    ("server", "table", "key", "scheme"),
    [(server, *setting) for server, setting in zip(NO_SERVERS, cycle(SERVER_SETTINGS), strict=False)],
)
def test_server_that_cannot_be_one_is_a_problem(table: str, key: str, scheme: str, server: str) -> None:
    """It would be found out at the first request, or never; the message repeats nothing, as it may be a password."""
    more = 'issuer = "i"\naudience = "a"' if table == "jwt" else ""
    pool = '[routes.r]\npool = "p"\n[pools.p]\nendpoints = ["http://p"]'
    (problem,) = findings(f'[{table}]\n{key} = "{scheme}://{server}/0"\n{more}\n{pool}')
    assert (problem.line, problem.key) == (2, f"{table}.{key}")
    assert "write" in problem.message
    assert not server or server not in problem.message


@pytest.mark.parametrize(
    ("server", "is_one"),
    [
        ("127.0.0.1", True),
        (":secret@[::1]:6379/15", True),
        ("user:p@ss@redis_1.svc./", True),
        ("h/\u00b2", False),
        (f"h/{'9' * 5000}", False),
        ("h/-1", False),
        ("h/0/0", False),
        (":pass/word@h:1", False),
    ],
)
def test_database_of_a_redis_is_a_small_number(server: str, is_one: bool) -> None:
    text = f'[shared]\nredis = "redis://{server}"\n[routes.r]\npool = "p"\n[pools.p]\nendpoints = ["http://p"]'
    assert (findings(text) == ()) is is_one


def test_longest_name_of_a_route_is_that_of_a_request() -> None:
    longest = "m" * names.MAX_MODEL_LENGTH
    names.check_model_name(longest)
    assert envelope.read_json(b'{"model":"%b"}' % longest.encode()).model == longest
    with pytest.raises(ValueError, match="longer"):
        names.check_model_name(longest + "m")
    with pytest.raises(ModelNotFound):
        envelope.read_json(b'{"model":"%bm"}' % longest.encode())


def test_shipped_file_is_valid_and_warns_of_nothing() -> None:
    """routes.toml works as it is, without one variable set: the public models on chat.d.run, instances elsewhere."""
    shipped = reading.load(ROOT / "routes.toml", {})
    assert shipped.warnings == ()
    assert [route.name for route in shipped.routes] == [
        "public/deepseek-r1",
        "public/deepseek-v3",
        "public/qwen2.5-7b-instruct",
        "public/qwen2.5-72b-instruct-awq",
        "public/llama-3.2-11b-vision-instruct",
        "public/glm-4-9b-chat",
        "u-*",
    ]
    urls = [str(endpoint.url) for pool in shipped.pools.values() for endpoint in pool.endpoints]
    assert urls == ["http://127.0.0.1:9001"] * 6
    assert {route.hosts for route in shipped.routes} == {("chat.d.run",), ("*.d.run", "!chat.d.run")}


def test_shipped_file_takes_upstreams_from_the_environment() -> None:
    """An operator points the shipped file at real servers without editing it."""
    template = "http://{service}.{owner}.svc.cluster.local:8000"
    shipped = reading.load(ROOT / "routes.toml", {"DEEPSEEK_R1_URL": "https://r1.example", "INSTANCE_URL": template})
    assert shipped.pools["deepseek-r1"].endpoints[0].url == Url("https", "r1.example", 443)
    assert shipped.routes[-1].instance == template


def test_shipped_file_states_the_defaults() -> None:
    """A value that the shipped file shows, commented out or not, is what its absence means."""
    text = (ROOT / "routes.toml").read_text()
    settings = [line.removeprefix("# ") for line in text.splitlines() if "=" in line]
    shown = [line for line in settings if line.split(" = ")[0] in {*SERVER_NAMES, *KEYS_NAMES}]
    server = "\n".join(line for line in shown if line.split(" = ")[0] in SERVER_NAMES)
    keys = "\n".join(line for line in shown if line.split(" = ")[0] in KEYS_NAMES)
    assert len(shown) == len(SERVER_NAMES) + len(KEYS_NAMES)
    stated, absent = parsed(f"[server]\n{server}\n[keys]\n{keys}"), parsed("")
    assert (stated.server, stated.keys) == (absent.server, absent.keys)


SERVER_NAMES = {
    "listen",
    "admin",
    "max_body",
    "body_memory",
    "header_timeout",
    "body_timeout",
    "client_idle_timeout",
    "min_client_rate",
    "drain_timeout",
    "shutdown_delay",
}
KEYS_NAMES = {"store", "cache_ttl", "negative_ttl", "stale_for", "cache_entries"}


def test_values_come_out_in_the_units_of_their_names(directory: Path) -> None:
    """Durations are seconds, sizes are bytes, whatever unit the file uses; paths start at the file."""
    text = (ROOT / "tests/cases/config/everything.toml").read_text().split(DASHES)[0]
    result = reading.parse(text, directory / "routes.toml", ENV)
    server, keys, pool = result.server, result.keys, result.pools["a"]
    assert [str(address) for address in server.listen] == ["0.0.0.0:8080", "[::]:8080", f"unix:{directory}/edge.sock"]
    assert (server.max_body_bytes, server.body_memory_bytes) == (1536 * 1024, 2 * 10**9)
    assert (server.header_timeout_s, server.body_timeout_s, server.client_idle_timeout_s) == (1.5, 30, 3600)
    assert (server.min_client_rate_bytes_per_s, server.max_connections, server.drain_timeout_s) == (0, 1000, 0)
    assert (keys.store.path, keys.cache_ttl_s, keys.negative_ttl_s) == (directory / "data/edge.db", 86400, 0.001)
    assert (pool.connect_timeout_s, pool.first_byte_timeout_s, pool.idle_timeout_s) == (0.25, 3600, 120)
    assert [str(endpoint.url) for endpoint in pool.endpoints] == [
        "http://10.0.0.1:8000",
        "https://example.com/v1",
        "http://[::1]",
    ]
    assert [endpoint.api_key for endpoint in pool.endpoints] == [None, "value", "sk-from-file"]


def test_every_named_file_is_watched(directory: Path) -> None:
    """A reload must notice a change of any secret, TLS or CA file, so each is listed, once."""
    text = (ROOT / "tests/cases/config/everything.toml").read_text().split(DASHES)[0]
    result = reading.parse(text, directory / "routes.toml", ENV)
    assert sorted(path.name for path in result.watched) == ["secret", "tls.crt", "tls.key"]


def test_missing_file_is_watched_after_a_failed_read() -> None:
    """A secret that is mounted late must be noticed, though the file that names it was refused."""
    with pytest.raises(ConfigError) as caught:
        reading.parse('[pools.a]\nendpoints = [{ url = "http://a", api_key_file = "late" }]', Path("x/routes.toml"), {})
    assert caught.value.watched == (Path("x/late"),)


def test_nothing_in_a_config_can_be_changed() -> None:
    """A request keeps the generation it began with, so a generation never changes."""
    result = parsed("")
    with pytest.raises(AttributeError):
        result.server.max_body_bytes = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        result.pools["q"] = result.pools["p"]  # type: ignore[index]


def test_secret_is_in_no_representation() -> None:
    """A config may be logged whole: its repr holds no API key."""
    assert "sk-hidden" not in repr(EndpointConfig(Url("http", "a", 80), api_key="sk-hidden"))


@pytest.mark.parametrize(
    "line",
    [
        'endpoints = [{ url = "http://a", api_key = sk-hidden }]',
        'endpoints = [{ url = "http://a", api_key = "sk-hidden\n }]',
        'endpoints = [{ url = "http://a", api_key = "sk-hidden é" }]',
        'endpoints = ["http://sk-hidden@a"]',
        'endpoints = ["http://a?key=sk-hidden"]',
        'endpoints = ["redis://sk-hidden@a"]',
    ],
)
def test_secret_is_in_no_message(line: str) -> None:
    """Problems are shown to operators and logged, so they repeat no value that may hold a secret."""
    found = findings(f"[pools.a]\n{line}")
    assert found
    assert "sk-hidden" not in render_problems(Path("routes.toml"), found)


def test_unreadable_file_is_one_problem(directory: Path) -> None:
    """A path that is wrong, a directory and bytes that are no UTF-8 are told like any other problem."""
    Path("latin.toml").write_bytes(b"[server]\n# caf\xe9\n")
    rendered = []
    for name in ("missing.toml", "directory", "latin.toml", "nul\0"):
        with pytest.raises(ConfigError) as caught:
            reading.load(directory / name, {})
        rendered.append(str(caught.value).removeprefix(str(directory)))
    assert rendered == [
        "/missing.toml:1: there is no such file: write a first one with `edge init`, or name another",
        "/directory:1: cannot be read (Is a directory): name a readable file",
        "/latin.toml:2: not UTF-8: save the file as UTF-8",
        "/nul\0:1: cannot be read (embedded null byte): name a readable file",
    ]


def test_byte_order_mark_is_no_problem(directory: Path) -> None:
    """Editors on Windows begin a UTF-8 file with U+FEFF."""
    Path("bom.toml").write_text('\ufeffpools.p.endpoints = ["http://p"]\r\nroutes.r.pool = "p"\r\n', newline="")
    assert reading.load(directory / "bom.toml", {}).routes == (RouteConfig("r", "r", "p"),)


SEEDS = [case.read_text().split(DASHES)[0] for case in CASES] + [(ROOT / "routes.toml").read_text()]
SCRAPS = st.sampled_from(
    ["[", "]", "{", "}", '"', "'", '"""', "=", ".", ",", "\n", "#", "$", "${", "*", "/", "\\", "\0", "é"]
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """One of the cases with some spans replaced by scraps of syntax, spans of another case or any text."""
    text, other = draw(st.sampled_from(SEEDS)), draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(1, 5))):
        start, length = draw(st.integers(0, len(text))), draw(st.integers(0, 20))
        begin = draw(st.integers(0, len(other)))
        scrap = draw(SCRAPS | st.text(max_size=5) | st.just(other[begin : begin + 30]))
        text = text[:start] + scrap + text[start + length :]
    return text


@given(mutated())
@examples(400)
def test_no_text_makes_reading_fail_but_by_config_error(text: str) -> None:
    """Whatever the operator saves, the running edge gets problems with lines of the file, never another exception."""
    for problem in findings(text, Path("/nowhere/routes.toml")):
        assert 1 <= problem.line <= text.count("\n") + 1
        assert problem.message


@pytest.mark.parametrize("text", ["x = " + "[" * 3000, "a = " + "9" * 5000, "a." * 3000, "x = 0x" + "f" * 9000])
def test_absurd_nesting_and_numbers_are_problems(text: str) -> None:
    """The TOML parser's limits (recursion, digits of an int) are problems of the file too."""
    assert findings(text)


def test_deep_variables_are_a_problem() -> None:
    """Defaults nest as deep as anyone writes, and a machine's depth is refused, not a crash."""
    depth = sys.getrecursionlimit()
    assert findings('server.listen = "' + "${A:-" * depth + "}" * depth + '"')


def test_ties_among_thousands_are_found_without_comparing_all_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pattern at three thousand hosts, one that has the others but these, and one that ties with one of them."""
    compared: list[object] = []
    real = rules.hosts_overlap
    monkeypatch.setattr(rules, "hosts_overlap", lambda *both: compared.append(both) or real(*both))
    hosts = [f"t{number}.d.run" for number in range(3000)]
    routes = [RouteConfig(name, "x/*", "p", hosts=(name,)) for name in hosts]
    routes.append(RouteConfig("rest", "x/*", "p", hosts=("*.d.run", *(f"!{name}" for name in hosts))))
    routes.append(RouteConfig("tied", "x/*", "p", hosts=("*.*.run", "!t0.d.run")))
    reader = Reader(Path("routes.toml"), {}, Positions(""))
    rules.refuse_ties(reader, routes)
    assert [problem.key for problem in reader.problems] == ["routes.tied"]
    assert len(compared) <= 3 * len(hosts)


def test_a_table_costs_what_stands_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A route has twenty settings, of which a file states two or three; and no line is looked for without a problem."""
    taken: list[str] = []
    real = Table.take

    def take(table: Table, key: str) -> object:
        taken.append(key)
        return real(table, key)

    monkeypatch.setattr(Table, "take", take)
    monkeypatch.setattr("edge.config.positions._Scanner", None)
    parsed("".join(f'[routes."public/{number}"]\npool = "p"\nmetered = true\n' for number in range(100)))
    assert len(taken) < 4 * 100 + 50


def test_misspelt_names_among_thousands_are_guessed_for_the_first_ones_only() -> None:
    pools = "".join(f'[pools.p{number}]\nendpoints = ["http://h"]\n' for number in range(400))
    routes = "".join(f'[routes."public/{number}"]\npool = "p{number}x"\n' for number in range(400))
    found = [problem.message for problem in findings(pools + routes)]
    assert len(found) == 400
    assert sum("did you mean" in message for message in found) == 250


MISTAKES = [
    (title, *case.split("----\n"))
    for title, _, case in (
        block.partition("\n") for block in (ROOT / "tests/cases/mistakes.txt").read_text().split("\n==== ")[1:]
    )
]


@pytest.mark.parametrize(("text", "expected"), [each[1:] for each in MISTAKES], ids=[each[0] for each in MISTAKES])
@pytest.mark.usefixtures("directory")
def test_mistake_gets_the_message_that_mends_it(text: str, expected: str) -> None:
    """What people write by mistake, one a case: the message repeats their number or name as it has to be written."""
    assert [f"{problem.line}: {problem}" for problem in findings(text)] == expected.strip("\n").splitlines()


def test_there_are_mistakes_of_every_table() -> None:
    assert len(MISTAKES) == 62
