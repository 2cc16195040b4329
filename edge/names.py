"""What models, users, hosts and patterns may be called, and what matches them.

Each `check_` raises `ValueError` with a message for the operator: what is wrong and what to write.
"""

import re
from ipaddress import ip_address

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
        raise ValueError(f'a host stands here without port or scheme: write "chat.d.run", not {text!r}')
    if host.endswith("."):
        raise ValueError(f'a host stands here without trailing dot: write "{text.rstrip(".")}"')
    if _is_ip(host) and host != str(ip_address(host)):  # as clients write it, if they follow RFC 5952
        raise ValueError(f'an IPv6 address stands here in its shortest form: write "{ip_address(host)}"')
    labels = host.split(".")
    if any("*" in label and label != "*" for label in labels):
        raise ValueError(f'in {text!r} the "*" is not one whole label: write "*.d.run"')
    if not (_is_ip(host) or is_host_name(".".join("x" if label == "*" else label for label in labels))):
        raise ValueError(f'{text!r} is not a host: write a DNS name such as "chat.d.run" or "*.d.run"')


def hosts_overlap(first: tuple[str, ...], second: tuple[str, ...]) -> bool:
    """Return whether two lists of `hosts` let through one same host.

    A list lets a host through that one of its names matches (any host, when it has only exclusions) and no exclusion
    does. Exact: a fresh label can always stand for a `*`, so exclusions empty a meeting only when one covers it whole.
    """
    (ours, excluded), (theirs, also_excluded) = _parted(first), _parted(second)
    if not ours and not theirs:
        return True
    meetings = [_meet(one, other) for one in ours for other in theirs] if ours and theirs else ours or theirs
    return any(meeting and not _any_covers(excluded + also_excluded, meeting) for meeting in meetings)


def exclusion_of(host: str, hosts: tuple[str, ...]) -> str | None:
    """Return the exclusion in a list of `hosts` that lets nothing of one of its names through, None when none does."""
    labels = host.split(".")
    return next((each for each in hosts if each.startswith("!") and _covers(each[1:].split("."), labels)), None)


def host_matches(hosts: tuple[str, ...], host: str) -> bool:
    """Return whether a `hosts` list lets `host` through; no list lets every host through."""
    names, excluded = _parted(hosts)
    labels = host.split(".")
    return not _any_covers(excluded, labels) and (not names or _any_covers(names, labels))


def _parted(hosts: tuple[str, ...]) -> tuple[list[list[str]], list[list[str]]]:
    """Return the labels of each name that is let through, and of each that is excluded."""
    names = [host.split(".") for host in hosts if not host.startswith("!")]
    return names, [host[1:].split(".") for host in hosts if host.startswith("!")]


def _meet(one: list[str], other: list[str]) -> list[str] | None:
    """Return the pattern of the hosts that both patterns match, or None."""
    if len(one) != len(other) or any(a != b and "*" not in (a, b) for a, b in zip(one, other, strict=True)):
        return None
    return [b if a == "*" else a for a, b in zip(one, other, strict=True)]


def _any_covers(patterns: list[list[str]], labels: list[str]) -> bool:
    return any(_covers(pattern, labels) for pattern in patterns)


def _covers(pattern: list[str], other: list[str]) -> bool:
    return len(pattern) == len(other) and all(p in ("*", o) for p, o in zip(pattern, other, strict=True))


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
