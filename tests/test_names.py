"""What models, users, hosts and patterns may be called, and what matches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.names import (
    check_host_pattern,
    check_placeholders,
    hosts_overlap,
    is_dns_label,
    is_host_name,
    is_instance_name,
    is_metadata_address,
)


@pytest.mark.parametrize("label", ["a", "u-1100a15812cc", "0", "a" * 63])
def test_dns_labels(label: str) -> None:
    """RFC 1123 section 2.1: letters, digits and inner hyphens, 63 at most."""
    assert is_dns_label(label)


@pytest.mark.parametrize("label", ["", "A", "-a", "a-", "a.b", "a_b", "é", "a" * 64, "a\n"])
def test_texts_that_are_no_dns_label(label: str) -> None:
    """An owner or service that is none of these must never become part of an address."""
    assert not is_dns_label(label)


@pytest.mark.parametrize(
    "name", ["2130706433", "0x7f000001", "127.1", "a.0x7f", "10.0.0.256", "1.2.3.4.5", "a..b", "." * 3]
)
def test_numbers_are_no_host_names(name: str) -> None:
    """Resolvers read a name that ends in a number as an IPv4 address: a service called so could be this machine."""
    assert not is_host_name(name)


@pytest.mark.parametrize(
    "entry", ["chat.d.run", "*.d.run", "!chat.d.run", "a.*.run", "!*", "10.0.0.1", "::1", "localhost"]
)
def test_entries_of_hosts(entry: str) -> None:
    """Names, `*` for one label, `!` to exclude, IP addresses without brackets."""
    check_host_pattern(entry)


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ((), (), True),
        ((), ("a",), True),
        (("a",), ("a", "b"), True),
        (("a",), ("b",), False),
        (("*.d.run",), ("chat.d.run",), True),
        (("*.d.run", "!chat.d.run"), ("chat.d.run",), False),
        (("*.d.run", "!chat.d.run"), ("*.d.run",), True),
        (("*.d.run",), ("d.run",), False),
        (("*.d.run",), ("a.b.d.run",), False),
        (("*.d.run",), ("chat.*.run",), True),
        (("*.d.run", "!chat.*.run"), ("chat.*.run",), False),
        (("*.d.run",), ("*.*.run", "!*.d.run"), False),
        (("!chat.d.run",), ("chat.d.run",), False),
        (("!chat.d.run",), ("sh.d.run",), True),
        (("!a",), ("!b",), True),
        (("!a",), (), True),
        (("!*",), ("a",), False),
    ],
)
def test_host_lists_overlap_where_one_host_passes_both(
    one: tuple[str, ...], other: tuple[str, ...], overlap: bool
) -> None:
    """Two routes of one pattern may stand side by side only when no host lets both win."""
    assert hosts_overlap(one, other) is overlap
    assert hosts_overlap(other, one) is overlap


LABELS = st.sampled_from(["a", "b"])
ENTRIES = st.builds(
    lambda mark, labels: mark + ".".join(labels),
    st.sampled_from(["", "", "!"]),
    st.lists(LABELS | st.just("*"), min_size=1, max_size=2),
)
HOSTS = [[x] for x in "abc"] + [[x, y] for x in "abc" for y in "abc"] + [["c", "c", "c"]]


def passes(hosts: list[str], labels: list[str]) -> bool:
    """Say by trial whether a host passes a list."""

    def matches(entry: str) -> bool:
        pattern = entry.split(".")
        return len(pattern) == len(labels) and all(p in ("*", label) for p, label in zip(pattern, labels, strict=True))

    included = [entry for entry in hosts if not entry.startswith("!")]
    excluded = [entry[1:] for entry in hosts if entry.startswith("!")]
    return (not included or any(map(matches, included))) and not any(map(matches, excluded))


@given(st.lists(ENTRIES, max_size=4), st.lists(ENTRIES, max_size=4))
def test_overlap_agrees_with_trying_every_host(one: list[str], other: list[str]) -> None:
    """Exact, not cautious: "c" stands for any label that no list names."""
    tried = any(passes(one, labels) and passes(other, labels) for labels in HOSTS)
    assert hosts_overlap(tuple(one), tuple(other)) is tried


@pytest.mark.parametrize(
    ("name", "is_instance"),
    [
        ("u-1/qwen2", True),
        ("u-1", False),
        ("/a", False),
        ("a/", False),
        ("a/b/c", False),
        ("u-1/qwen2.5", False),
        ("U/a", False),
    ],
)
def test_instance_names_are_two_dns_labels(name: str, is_instance: bool) -> None:
    """Owner and service are the parts before and after the first `/`."""
    assert is_instance_name(name) is is_instance


def test_placeholders_of_a_model_are_owner_and_service() -> None:
    """The name sent upstream may be made of both parts."""
    check_placeholders("{owner}--{service}")
    with pytest.raises(ValueError, match="write"):
        check_placeholders("{model}")


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("169.254.169.254", True), ("169.254.0.1", True), ("169.254.1.1", True), ("fe80::1", True),
        ("fe80::1%eth0", True), ("::ffff:169.254.169.254", True), ("::FFFF:A9FE:A9FE", True), ("fd00:ec2::254", True),
        ("fd20:ce::254", True), ("100.100.100.200", True), ("::ffff:100.100.100.200", True), ("168.63.129.16", True),
        ("192.0.0.192", True), ("fd00:42::42", True), ("10.0.0.1", False), ("169.253.1.1", False), ("::1", False),
        ("127.0.0.1", False), ("100.100.100.20", False), ("fd00::1", False), ("169.254.example", False), ("a:b", False),
        ("metadata.example", False), ("", False),
    ],
)  # fmt: skip
def test_addresses_at_which_clouds_keep_credentials_are_known(text: str, is_one: bool) -> None:
    assert is_metadata_address(text) is is_one
