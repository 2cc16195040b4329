"""The notations inside the strings of routes.toml."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge.config.values import (
    Address,
    Place,
    Url,
    byte_count,
    check_instance,
    check_upstream_name,
    check_upstream_template,
    expand,
    parse_address,
    parse_url,
    samples_of,
    seconds,
    write_duration,
    write_size,
)
from edge.names import fill

ENV = {"A": "a", "B_2": "b", "EMPTY": "", "DOLLAR": "${A}"}


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("", ""),
        ("plain {braces}", "plain {braces}"),
        ("${A}${B_2}", "ab"),
        ("x${A}y", "xay"),
        ("$$", "$"),
        ("$${A}", "${A}"),
        ("$$${A}", "$a"),
        ("${EMPTY}", ""),
        ("${UNSET:-}", ""),
        ("${EMPTY:-default}", "default"),
        ("${A:-default}", "a"),
        ("${UNSET:-a:-b}", "a:-b"),
        ("${UNSET:-http://{service}.{owner}:8000}/v1", "http://{service}.{owner}:8000/v1"),
        ("${UNSET:-${EMPTY:-${A}}}", "a"),
        ("${UNSET:-$$5}", "$5"),
        ("${A:-${NEVER_READ}}", "a"),
        ("${DOLLAR}", "${A}"),
    ],
)
def test_variables_are_replaced_once(text: str, expanded: str) -> None:
    """A default ends at its matching brace; unset or empty takes it; a variable's value is not read again."""
    assert expand(text, ENV) == expanded


@pytest.mark.parametrize(
    "text", ["$", "$A", "a$", "${A", "${A:-{}", "${}", "${:-x}", "${A-x}", "${1A}", "${UNSET}", "$${$"]
)
def test_text_that_is_no_variable_is_refused(text: str) -> None:
    """A dollar that is not meant as a variable is written `$$`: nothing with a dollar is taken literally by chance."""
    with pytest.raises(ValueError, match="write"):
        expand(text, ENV)


@given(st.text())
def test_doubled_dollars_keep_any_text(text: str) -> None:
    """Any text can be written: only the dollar is special."""
    assert expand(text.replace("$", "$$"), {}) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("250ms", 0.25),
        ("1.5s", 1.5),
        ("2s", 2),
        ("5m", 300),
        ("1h", 3600),
        ("1d", 86400),
        ("2w", 14 * 86400),
        ("1.5h", 5400),
        ("0s", 0),
        ("0.1ms", 0.0001),
    ],
)
def test_durations_are_seconds(text: str, value: float) -> None:
    """Each unit, with fractions."""
    assert seconds(text) == value


@pytest.mark.parametrize(
    "text", ["", "2", "2 s", "-1s", "+1s", ".5s", "1.s", "1e3s", "2S", "2sec", "1h30m", "inf", "٢s", "366d"]
)
def test_text_that_is_no_duration_is_refused(text: str) -> None:
    """One number and one unit, in ASCII, and nothing that an event loop cannot wait for."""
    with pytest.raises(ValueError, match="write"):
        seconds(text)


def test_longest_duration_is_the_callers_choice() -> None:
    century_s = 100 * 365 * 86400
    assert seconds("36500d", century_s) == century_s
    with pytest.raises(ValueError, match='write at most "36500d"'):
        seconds("36501d", century_s)
    with pytest.raises(ValueError, match='write at most "365d"'):
        seconds("53w")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0B", 0),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("1.5MiB", 1572864),
        ("2MB", 2_000_000),
        ("1GB", 10**9),
        ("1GiB", 2**30),
    ],
)
def test_sizes_are_bytes(text: str, value: int) -> None:
    """KB, MB, GB count thousands; KiB, MiB, GiB count 1024."""
    assert byte_count(text) == value


@pytest.mark.parametrize("text", ["", "64", "64M", "64mib", "64 MiB", "-1B", "0.5B", "1.0001KB", "1TB"])
def test_text_that_is_no_size_is_refused(text: str) -> None:
    """One number and one unit, that together are whole bytes."""
    with pytest.raises(ValueError, match="write"):
        byte_count(text)


@pytest.mark.parametrize(
    ("value_s", "written"),
    [(0.25, "250ms"), (2, "2s"), (75, "75s"), (300, "300s"), (600, "10m"), (3600, "1h"), (86400, "1d"), (0, "0s")],
)
def test_durations_are_written_as_people_write_them(value_s: float, written: str) -> None:
    assert write_duration(value_s) == written


@pytest.mark.parametrize(
    ("value", "written"), [(64 * 2**20, "64MiB"), (2 * 10**9, "2GB"), (2**30, "1GiB"), (1500, "1500B"), (0, "0B")]
)
def test_sizes_are_written_as_people_write_them(value: int, written: str) -> None:
    assert write_size(value) == written


@given(st.integers(0, 365 * 86400 * 1000), st.integers(0, 10**12 - 1))
def test_what_is_written_reads_back_as_itself(value_ms: int, value_bytes: int) -> None:
    assert seconds(write_duration(value_ms / 1000)) == value_ms / 1000
    assert byte_count(write_size(value_bytes)) == value_bytes


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("0.0.0.0:8080", Address("0.0.0.0", 8080), "0.0.0.0:8080"),
        ("[::1]:80", Address("::1", 80), "[::1]:80"),
        ("[0:0::1]:80", Address("::1", 80), "[::1]:80"),
        ("LocalHost:0", Address("localhost", 0), "localhost:0"),
        ("unix:edge.sock", Address(None, None, Path("/etc/edge/edge.sock")), "unix:/etc/edge/edge.sock"),
        ("unix:/run/edge.sock", Address(None, None, Path("/run/edge.sock")), "unix:/run/edge.sock"),
    ],
)
def test_addresses_are_hosts_with_ports_or_sockets(text: str, address: Address, shown: str) -> None:
    """Relative paths start at the file; the text of an address is what one writes in the file."""
    assert parse_address(text, Path("/etc/edge")) == address
    assert str(address) == shown


@pytest.mark.parametrize(
    ("one", "other", "collides"),
    [
        ("0.0.0.0:80", "127.0.0.1:80", True),
        ("[::]:80", "[::1]:80", True),
        ("a:80", "a:80", True),
        ("unix:/a", "unix:/a", True),
        ("[::]:80", "127.0.0.1:80", False),
        ("127.0.0.1:80", "127.0.0.2:80", False),
        ("127.0.0.1:80", "127.0.0.1:81", False),
        ("127.0.0.1:0", "127.0.0.1:0", False),
        ("unix:/a", "unix:/b", False),
        ("unix:/a", "127.0.0.1:80", False),
    ],
)
def test_addresses_collide_where_the_kernel_refuses_the_second(one: str, other: str, collides: bool) -> None:
    """A wildcard takes its port on every address of its family; port 0 is a new port each time."""
    first, second = parse_address(one, Path()), parse_address(other, Path())
    assert first.collides(second) is collides
    assert second.collides(first) is collides


@pytest.mark.parametrize(
    ("text", "url", "shown"),
    [
        ("http://a", Url("http", "a", 80), "http://a"),
        ("HTTP://A:80/", Url("http", "a", 80, "/"), "http://a/"),
        ("http://a//", Url("http", "a", 80, "/"), "http://a/"),
        ("https://a:443/v1/", Url("https", "a", 443, "/v1"), "https://a/v1"),
        ("https://a:80", Url("https", "a", 80), "https://a:80"),
        ("http://[2001:DB8::1]:8000", Url("http", "2001:db8::1", 8000), "http://[2001:db8::1]:8000"),
        ("http://10.0.0.1:8000/a/b%20c", Url("http", "10.0.0.1", 8000, "/a/b%20c"), "http://10.0.0.1:8000/a/b%20c"),
        ("http://my_service.local.:1", Url("http", "my_service.local.", 1), "http://my_service.local.:1"),
    ],
)
def test_urls_are_kept_in_one_spelling(text: str, url: Url, shown: str) -> None:
    """Equal addresses compare equal: lower case, shortest IPv6, the scheme's port, no last slash but the root's."""
    assert parse_url(text) == url
    assert str(url) == shown
    assert parse_url(shown) == url


@pytest.mark.parametrize(
    ("text", "base"), [("http://a", "/v1"), ("http://a/", ""), ("http://a/api/", "/api"), ("http://a/v1", "/v1")]
)
def test_path_takes_the_place_of_v1_and_a_mere_slash_is_the_root(text: str, base: str) -> None:
    assert parse_url(text).base == base


@given(st.text(alphabet="htps:/.@?#[]{}%a1-_ \n", max_size=20).map(lambda tail: "http://" + tail))
@example("http://_/@")
def test_every_accepted_url_reads_back_as_itself(text: str) -> None:
    """What is accepted has one meaning: no blank, user info, query or fragment is left in it."""
    try:
        url = parse_url(text)
    except ValueError:
        return
    assert parse_url(str(url)) == url
    assert not set(str(url)) & set("?#{} \n")
    assert "@" not in url.authority, "in a path it is a character as any other (RFC 3986 section 3.3)"


def test_places_are_listed_as_people_list_them() -> None:
    file, server, redis = Place(("a",), '"a:FILE"'), Place(("b",), "a URL"), Place(("c",), '"c://HOST"')
    assert samples_of((file, server)) == '"a:FILE" or a URL'
    assert samples_of((file, server, redis)) == '"a:FILE", a URL, or "c://HOST"'


@pytest.mark.parametrize(
    "template",
    ["http://{service}.{owner}.svc.cluster.local:8000", "https://{owner}-{service}.example/v1", "http://10.0.0.1:8000"],
)
def test_instance_templates_become_urls(template: str) -> None:
    """With any owner and service a template is a URL; it may have no placeholder."""
    check_instance(template)
    assert parse_url(fill(template, "u-1", "qwen2")).host


@pytest.mark.parametrize(
    "template",
    [
        "http://{name}",
        "http://{}",
        "http://{owner",
        "http://owner}",
        "http://{{owner}}",
        "http://a/{service}",
        "http://a?{service}",
        "http://a:{service}",
        "{owner}://a",
        "http://{owner}@a",
        "",
    ],
)
def test_instance_templates_hold_placeholders_only_in_the_host(template: str) -> None:
    """The caller chooses owner and service, so they may choose a host below the operator's names and nothing else."""
    with pytest.raises(ValueError, match=r"write|remove"):
        check_instance(template)


def test_name_of_an_endpoint_may_have_braces_and_a_template_only_placeholders() -> None:
    check_upstream_name("a{1}")
    check_upstream_template("{owner}--{service}")
    with pytest.raises(ValueError, match="no placeholder"):
        check_upstream_template("a{1}")
