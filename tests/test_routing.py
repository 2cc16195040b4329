"""Which route wins: by a table of cases, and against a second, slow reading of the rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.config.settings import RouteConfig
from edge.names import host_matches
from edge.routing import Match, RouteTable


def route(name: str, *hosts: str, match: str | None = None, **more: object) -> RouteConfig:
    target = {} if "instance" in more else {"pool": "p"}
    return RouteConfig(name=name, pattern=name if match is None else match, hosts=hosts, **target, **more)  # type: ignore[arg-type]


def found(routes: list[RouteConfig], model: str, host: str = "chat.d.run", loopback: bool = False) -> str | None:
    match = RouteTable(tuple(routes)).for_host(host, loopback).find(model)
    return match and match.route.name


EVERYTHING = [
    route("*"),
    route("public/*"),
    route("public/deepseek-*"),
    route("public/deepseek-r1"),
    route("public/deepseek-r1*"),
    route("public/a/b"),
]


@pytest.mark.parametrize(
    ("model", "winner"),
    [
        ("public/deepseek-r1", "public/deepseek-r1"),
        ("public/deepseek-r1-distill", "public/deepseek-r1*"),
        ("public/deepseek-v3", "public/deepseek-*"),
        ("public/deepseek-", "public/deepseek-*"),
        ("public/deepseek", "public/*"),
        ("public/a/b", "public/a/b"),
        ("public/a/b/c/d", "public/*"),
        ("public/", "public/*"),
        ("public", "*"),
        ("Public/deepseek-r1", "*"),
        ("public/deepseek-r1 ", "public/deepseek-r1*"),
        ("", "*"),
        ("*", "*"),
        ("public/*", "public/*"),
    ],
)
def test_exact_name_then_longest_prefix_wins_in_any_order(model: str, winner: str) -> None:
    """A name is compared as it stands: case and blanks count, and `*` crosses `/`."""
    for order in [1, -1]:
        assert found(EVERYTHING[::order], model) == winner


def test_no_route_is_none() -> None:
    assert found([route("public/a"), route("u-*")], "public/b") is None


@pytest.mark.parametrize(
    ("hosts", "host", "through"),
    [
        ((), "anything", True),
        ((), "", True),
        (("chat.d.run",), "chat.d.run", True),
        (("chat.d.run",), "xchat.d.run", False),
        (("chat.d.run",), "chat.d.run.example", False),
        (("chat.d.run",), "chatxd.run", False),
        (("*.d.run",), "sh-02.d.run", True),
        (("*.d.run",), "d.run", False),
        (("*.d.run",), "a.b.d.run", False),
        (("*.d.run",), ".d.run", True),
        (("sh.*.run",), "sh.d.run", True),
        (("*.*.run",), "sh.d.run", True),
        (("*.d.run", "!chat.d.run"), "chat.d.run", False),
        (("!chat.d.run", "*.d.run"), "chat.d.run", False),
        (("*.d.run", "!chat.d.run"), "sh-02.d.run", True),
        (("chat.d.run", "!*.d.run"), "chat.d.run", False),
        (("!chat.d.run",), "chat.d.run", False),
        (("!chat.d.run",), "anything.example", True),
        (("chat.d.run",), "", False),
    ],
)
def test_host_list(hosts: tuple[str, ...], host: str, through: bool) -> None:
    """`*` is one label, `!name` excludes wherever it stands, a list of exclusions alone lets the rest through."""
    assert host_matches(hosts, host) is through


def test_hosts_filter_before_names_are_compared() -> None:
    """A route of another host is not there, so a less exact one of this host wins."""
    routes = [route("public/a", "chat.d.run"), route("public/*", "*.d.run")]
    assert found(routes, "public/a", "chat.d.run") == "public/a"
    assert found(routes, "public/a", "sh-02.d.run") == "public/*"
    assert found(routes, "public/a", "elsewhere.example") is None


def test_one_name_has_a_route_per_host() -> None:
    routes = [
        route("a in chat", "chat.d.run", match="public/a"),
        route("a in regions", "*.d.run", "!chat.d.run", match="public/a"),
    ]
    assert found(routes, "public/a", "chat.d.run") == "a in chat"
    assert found(routes, "public/a", "sh-02.d.run") == "a in regions"
    assert found(routes, "a in chat", "chat.d.run") is None


def test_loopback_reaches_every_route_and_the_first_of_equals() -> None:
    """Local use needs no tricks; a host name alone is not enough, since any client can send one."""
    routes = [route("x", "chat.d.run", match="public/a"), route("y", "sh-02.d.run", match="public/a"), route("z", "q")]
    assert found(routes, "public/a", "localhost", loopback=True) == "x"
    assert found(routes, "z", "127.0.0.1", loopback=True) == "z"
    assert found(routes, "public/a", "localhost") is None


def test_host_without_routes_is_told_from_a_host_without_the_model() -> None:
    table = RouteTable((route("public/a", "chat.d.run"),))
    assert not table.for_host("elsewhere.example", loopback=False)
    assert table.for_host("chat.d.run", loopback=False)
    assert table.for_host("elsewhere.example", loopback=True)


def test_any_number_of_host_names_costs_bounded_memory() -> None:
    """Whoever sends requests can name hosts; the answer stays right for the old ones."""
    table = RouteTable((route("public/a", "*.d.run"),))
    for number in range(5000):
        assert table.for_host(f"h{number}.d.run", loopback=False)
        assert not table.for_host(f"h{number}.example", loopback=False)
    assert len(table._hosts) <= 1024
    assert table.for_host("h0.d.run", loopback=False).find("public/a")


def test_hosts_that_reach_the_same_routes_share_one_table() -> None:
    """A table of its own for each made-up host cost 25 ms and a megabyte with ten thousand routes."""
    table = RouteTable((route("public/a", "*.d.run"), route("public/b"), route("public/c", "!h1.d.run")))
    known = {id(table.for_host(f"h{number}.d.run", loopback=False)) for number in range(2, 500)}
    unknown = {id(table.for_host(f"h{number}.example", loopback=False)) for number in range(500)}
    assert (len(known), len(unknown), len(known | unknown)) == (1, 1, 2)
    assert list(table.for_host("h1.d.run", loopback=False).names()) == ["public/a", "public/b"]


def test_lists_that_tables_remember_are_bounded() -> None:
    """Each host is let through by all these lists but one, so that no two hosts share a table."""
    table = RouteTable(tuple(route(f"{number}", f"!h{number}.d.run", match="x") for number in range(300)))
    for number in range(300):
        assert table.for_host(f"h{number}.d.run", loopback=False)
        assert sum(len(each._lists or ()) for each in table._tables.values()) <= 100_300


def test_thousands_of_tenants_have_one_pattern_each_at_a_host_of_its_own() -> None:
    routes = [route(f"of {number}", f"t{number}.d.run", match="x/*") for number in range(3000)]
    table = RouteTable((*routes, route("x/plain", "*.d.run"), route("x/y*")))
    for number in (0, 7, 2999):
        there = table.for_host(f"t{number}.d.run", loopback=False)
        found = [match and match.route.name for match in map(there.find, ("x/a", "x/plain", "x/yes"))]
        assert found == [f"of {number}", "x/plain", "x/y*"]
    assert table.for_host("t3000.d.run", loopback=False).find("x/a") is None


INSTANCES = [route("u-*", instance="http://{service}.{owner}.svc.cluster.local:8000")]


@pytest.mark.parametrize("model", ["u-1100a15812cc/qwen2", "u-a/b", "u-a/0", "u-a/" + "s" * 63])
def test_instance_is_found_by_owner_and_service(model: str) -> None:
    match = RouteTable(tuple(INSTANCES)).for_host("sh-02.d.run", loopback=False).find(model)
    assert match is not None
    owner, _, service = model.partition("/")
    assert (match.owner, match.service) == (owner, service)
    assert match.filled("http://{service}.{owner}:1") == f"http://{service}.{owner}:1"


@pytest.mark.parametrize(
    "model",
    [
        "u-a", "u-a/", "u-/b", "u-a/b/c", "u-a//b", "u-a/B", "u-A/b", "u-a/b.c", "u-a.b/c", "u-a/b:80", "u-a/b@c",
        "u-a/-b", "u-a/b-", "u-a/" + "s" * 64, "u-a/b#", "u-a/b?", "u-a/..", "u-a/%2e", "u-a/b\n", "u-a/ü",
        "u-a/{owner}",
    ],
)  # fmt: skip
def test_name_that_is_no_owner_and_service_reaches_nobody(model: str) -> None:
    """Each half is a DNS label or there is no such model: a name must never steer a request somewhere."""
    assert found(INSTANCES, model, "sh-02.d.run") is None


def test_pool_whose_model_is_filled_needs_owner_and_service_too() -> None:
    routes = [route("u-*", model="{owner}-{service}")]
    assert found(routes, "u-a/b") == "u-*"
    assert found(routes, "u-a/b.c") is None
    assert found([route("u-*", model="fixed")], "u-a/b.c") == "u-*"


def test_listed_names_are_those_of_this_host() -> None:
    routes = (
        route("public/a", "chat.d.run"),
        route("public/*", list=("public/b", "public/c")),
        route("u-*", "*.d.run", "!chat.d.run", instance="http://gateway", list=("u-a/b",)),
    )
    assert sorted(RouteTable(routes).for_host("chat.d.run", loopback=False).names()) == [
        "public/a", "public/b", "public/c",
    ]  # fmt: skip
    assert sorted(RouteTable(routes).for_host("sh-02.d.run", loopback=False).names()) == [
        "public/b", "public/c", "u-a/b",
    ]  # fmt: skip


# --- against a second reading of the rules

LABELS = st.sampled_from(["a", "b"])
HOSTS = st.lists(LABELS, min_size=1, max_size=3).map(".".join)
HOST_PATTERNS = st.builds(
    lambda mark, labels: mark + ".".join(labels),
    st.sampled_from(["", "", "!"]),
    st.lists(st.sampled_from(["a", "b", "*"]), min_size=1, max_size=3),
)
MODELS = st.text("ab/", max_size=5)
PATTERNS = st.one_of(MODELS.filter(bool), MODELS.map(lambda prefix: prefix + "*"))


def slow_find(routes: list[RouteConfig], model: str, host: str) -> str | None:
    """Return the winner as section 4 of the rules says it, without a table."""

    def same(pattern: str, name: str) -> bool:
        if not pattern or not name:
            return pattern == name
        head, _, tail = pattern.partition(".")
        name_head, _, name_tail = name.partition(".")
        return head in ("*", name_head) and ("." in pattern) == ("." in name) and same(tail, name_tail)

    there = []
    for each in routes:
        wanted = [pattern for pattern in each.hosts if pattern[0] != "!"]
        if any(same(pattern[1:], host) for pattern in each.hosts if pattern[0] == "!"):
            continue
        if not wanted or any(same(pattern, host) for pattern in wanted):
            there.append(each)
    best: RouteConfig | None = None
    for each in there:
        if each.pattern == model and not each.pattern.endswith("*"):
            return each.name
        fits = each.pattern.endswith("*") and model[: len(each.pattern) - 1] == each.pattern[:-1]
        if fits and (best is None or len(each.pattern) > len(best.pattern)):
            best = each
    return best.name if best else None


@given(st.lists(st.tuples(PATTERNS, st.lists(HOST_PATTERNS, max_size=3)), max_size=8), MODELS, HOSTS)
def test_table_agrees_with_the_rules_read_slowly(written: list[tuple[str, list[str]]], model: str, host: str) -> None:
    """Routes of one pattern are kept apart by name; where two could win the first in the file does."""
    routes = [route(f"{number}", *hosts, match=pattern) for number, (pattern, hosts) in enumerate(written)]
    table = RouteTable(tuple(routes))
    for asked in (host, host):  # the second time from the table that was kept
        match: Match | None = table.for_host(asked, loopback=False).find(model)
        assert (match and match.route.name) == slow_find(routes, model, host)
