"""What models, users, hosts and patterns may be called, and what matches them.

Each `check_` raises `ValueError` with a message for the operator: what is wrong and what to write.
"""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from itertools import chain
from typing import Any

_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NUMERIC_LABEL = re.compile(r"[0-9]+|0x[0-9a-f]*")
_BRACES = re.compile(r"\{[^{}]*\}|[{}]")
_STARS = re.compile(r"(\*\*|\*)")
MAX_MODEL_LENGTH = 512  # characters; the longest published names have under 100
PLACEHOLDERS = ("{owner}", "{service}")


def is_dns_label(text: str) -> bool:
    """Return whether `text` is one lower-case DNS label (RFC 1123 section 2.1), as Kubernetes names its services."""
    return _LABEL.fullmatch(text) is not None


def is_host_name(text: str) -> bool:
    """Return whether `text` is a lower-case DNS name without trailing dot, or an IPv4 address."""
    labels = text.split(".")
    if _NUMERIC_LABEL.fullmatch(labels[-1]):
        return _is_ip(text)
    return len(text) <= 253 and all(is_dns_label(label) for label in labels)


def _is_ip(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


# Not link-local, and the same thing all the same: the metadata services of Alibaba Cloud, Amazon EC2 over IPv6, Azure,
# Google Cloud over IPv6, Oracle Cloud and Scaleway over IPv6, each by its vendor's documentation.
_METADATA = frozenset(map(ip_address, (
    "100.100.100.200", "fd00:ec2::254", "168.63.129.16", "fd20:ce::254", "192.0.0.192", "fd00:42::42",
)))  # fmt: skip
_METADATA_BEGINS = ("169.254.", "100.100.100.200", "168.63.129.16", "192.0.0.192")


def is_metadata_address(text: str) -> bool:
    """Return whether this is an IP address at which clouds keep a machine's credentials: link-local, or of a few more.

    Whoever is led to ask there gives them to who led it (OWASP, "Server-Side Request Forgery"; RFC 3927, RFC 4291
    section 2.5.6). A name is none.
    """
    if not text.startswith(_METADATA_BEGINS) and ":" not in text:  # at once: ten thousand are looked at in a start
        return False
    try:
        address = ip_address(text)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_link_local or (mapped or address) in _METADATA


def check_pattern(pattern: str) -> None:
    """Raise `ValueError` with advice unless this is a pattern over model names, such as `public/*`."""
    if not pattern:
        raise ValueError("a pattern is empty: leave it out, or write ** for every name")
    if any(not "!" <= character <= "~" for character in pattern):
        raise ValueError(f"pattern {pattern!r}: only visible ASCII characters, no spaces; one pattern per value")
    if "***" in pattern:
        raise ValueError(f"pattern {pattern!r}: write * for one level of a name or ** for any number")
    if wrong := set(pattern) & set("?[]{}!,"):
        raise ValueError(
            f"pattern {pattern!r}: {min(wrong)} means nothing here: the globs are * and **, "
            "several patterns are several values, and what is excluded is a deny pattern"
        )


def is_pattern(text: str) -> bool:
    """Return whether this is a pattern over model names."""
    try:
        check_pattern(text)
    except ValueError:
        return False
    return True


def check_host_pattern(text: str) -> None:
    """Accept an entry of `hosts`: `chat.d.run`, `*.d.run` (`*` is one label), `!chat.d.run`, an IP address."""
    host = text.removeprefix("!")
    if host != host.lower():
        raise ValueError(f'host names are compared in lower case: write "{text.lower()}"')
    if host.startswith("[") and host.endswith("]") and _is_ip(host[1:-1]):
        raise ValueError(f'an IPv6 address stands here without brackets: write "{host[1:-1]}"')
    if ":" in host and not _is_ip(host):
        bare = host.rpartition("://")[2].partition("/")[0].partition(":")[0]
        what = "a host stands here without port or scheme"
        raise ValueError(f'{what}: write "{text[: len(text) - len(host)]}{bare or "chat.d.run"}", not {text!r}')
    if host.endswith("."):
        raise ValueError(f'a host stands here without trailing dot: write "{text.rstrip(".")}"')
    if _is_ip(host) and host != str(ip_address(host)):  # as clients write it, if they follow RFC 5952
        raise ValueError(f'an IPv6 address stands here in its shortest form: write "{ip_address(host)}"')
    labels = host.split(".")
    if any("*" in label and label != "*" for label in labels):
        raise ValueError(f'in {text!r} the "*" is not one whole label: write "*.d.run"')
    if not (_is_ip(host) or is_host_name(".".join("x" if label == "*" else label for label in labels))):
        raise ValueError(f'{text!r} is not a host: write a DNS name such as "chat.d.run" or "*.d.run"')


class HostIndex:
    """Host patterns, each with a number, found by what they match: a few look-ups, however many there are.

    A tree of labels from the last to the first, below their count; a leaf holds the numbers of one pattern.
    """

    __slots__ = ("_roots",)

    def __init__(self, patterns: Iterable[tuple[str, int]] = ()) -> None:
        self._roots: dict[int, dict[str, Any]] = {}
        for pattern, number in patterns:
            self.add(pattern, number)

    def add(self, pattern: str, number: int) -> None:
        """Add a pattern without its `!`."""
        first, *others = pattern.split(".")
        node = self._roots.setdefault(len(others), {})
        for label in reversed(others):
            node = node.setdefault(label, {})
        node.setdefault(first, []).append(number)

    def covering(self, host: str) -> Iterator[int]:
        """Yield the numbers of the patterns that match a host, or all hosts of a pattern."""
        return self._below(host, meets=False)

    def meeting(self, pattern: str) -> Iterator[int]:
        """Yield the numbers of the patterns that match a host which this pattern matches too."""
        return self._below(pattern, meets=True)

    def _below(self, host: str, *, meets: bool) -> Iterator[int]:
        labels = host.split(".")
        nodes: list[Any] = [self._roots.get(len(labels) - 1, {})]
        for label in reversed(labels):
            if meets and label == "*":
                nodes = [below for node in nodes for below in node.values()]
            else:
                nodes = [node[each] for node in nodes for each in {label, "*"} if each in node]
            if not nodes:
                break
        return chain.from_iterable(nodes)


@lru_cache(maxsize=256)
def _exclusions(hosts: tuple[str, ...]) -> HostIndex:
    """Return the exclusions of a list, each with its place there."""
    return HostIndex((host[1:], at) for at, host in enumerate(hosts) if host.startswith("!"))


def named_hosts(hosts: tuple[str, ...]) -> list[str]:
    """Return the names in a list of `hosts` without its exclusions."""
    return [host for host in hosts if not host.startswith("!")]


def hosts_overlap(first: tuple[str, ...], second: tuple[str, ...]) -> bool:
    """Return whether two lists of `hosts` let through one same host.

    A list lets a host through that one of its names matches (any host, when it has only exclusions) and no exclusion
    does. Exact: a fresh label can always stand for a `*`, so exclusions empty a meeting only when one covers it whole.
    """
    ours, theirs = named_hosts(first), named_hosts(second)
    if not ours and not theirs:
        return True
    if ours and theirs:
        index = HostIndex((host, at) for at, host in enumerate(ours))
        meetings = [_meeting(ours[at], other) for other in theirs for at in index.meeting(other)]
    else:
        meetings = ours or theirs
    return any(exclusion_of(host, first) is None and exclusion_of(host, second) is None for host in meetings)


def exclusion_of(host: str, hosts: tuple[str, ...]) -> str | None:
    """Return the exclusion in a list of `hosts` that lets nothing of one of its names through, None when none does."""
    at = min(_exclusions(hosts).covering(host), default=None)
    return None if at is None else hosts[at]


def host_matches(hosts: tuple[str, ...], host: str) -> bool:
    """Return whether a `hosts` list lets `host` through; no list lets every host through."""
    names = named_hosts(hosts)
    is_named = not names or any(True for _ in HostIndex((name, 0) for name in names).covering(host))
    return is_named and exclusion_of(host, hosts) is None


def _meeting(one: str, other: str) -> str:
    """Return the pattern of the hosts that both of two patterns match, which have some in common."""
    return ".".join(b if a == "*" else a for a, b in zip(one.split("."), other.split("."), strict=True))


def is_model_name(name: str) -> bool:
    """Return whether a model can be called so: what else is asked for is not repeated to anybody, nor logged."""
    return 0 < len(name) <= MAX_MODEL_LENGTH and name.isprintable()  # a lone surrogate is not


def check_model_name(text: str) -> None:
    """Raise `ValueError` for what is no name of a model, or beginning of one, that a request could have."""
    if len(text) > MAX_MODEL_LENGTH:
        raise ValueError(f"is longer than any name a request may have: write at most {MAX_MODEL_LENGTH} characters")
    if not text.isprintable():
        raise ValueError("has a character that no name in a request may have: write printable ones only")


def is_instance_name(name: str) -> bool:
    """Return whether a model's name is `owner/service`, split at the first `/`, both DNS labels."""
    owner, _, service = name.partition("/")
    return is_dns_label(owner) and is_dns_label(service)


def check_placeholders(text: str) -> None:
    """Accept a template whose only braces are `{owner}` and `{service}`."""
    for braces in _BRACES.findall(text):
        if braces not in PLACEHOLDERS:
            raise ValueError(f"{braces} is no placeholder: write {{owner}} or {{service}}, and no other braces")


def fill(template: str, owner: str, service: str) -> str:
    """Return `template` with its placeholders replaced."""
    return template.replace("{owner}", owner).replace("{service}", service)


class Glob:
    """A pattern over names: `*` stays within one `/` level, `**` crosses, everything else means itself.

    Patterns come from the owners of keys and tokens, and a regular expression tries every way to share a name among its
    stars: a short pattern could hold the process for hours. Here all states are followed at once, a bit each: bit n is
    set when the first n literal characters were seen. A step costs a few operations on one integer, whatever the
    pattern. Source: Navarro and Raffinot, Flexible Pattern Matching in Strings, chapter 4.
    """

    __slots__ = ("_crossing", "_last", "_staying", "_steps")

    def __init__(self, pattern: str) -> None:
        steps: dict[str, int] = {}
        crossing = staying = 0  # the states with a `**`, and those with either star: they also remain as they are
        state = 1
        for part in _STARS.split(pattern):
            if part == "**":
                crossing |= state
            if part in ("*", "**"):
                staying |= state
                continue
            for character in part:
                steps[character] = steps.get(character, 0) | state
                state <<= 1
        self._steps, self._crossing, self._staying, self._last = steps, crossing, staying, state

    def matches(self, name: str) -> bool:
        """Return whether the whole of a name is as the pattern wants it."""
        steps, crossing, staying = self._steps, self._crossing, self._staying
        states = 1
        for character in name:
            states = (states & steps.get(character, 0)) << 1 | states & (crossing if character == "/" else staying)
            if not states:
                return False
        return bool(states & self._last)
