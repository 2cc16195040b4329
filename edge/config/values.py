"""The notations inside the strings of routes.toml and of options: variables, durations, sizes, addresses, URLs.

Pure functions from text to value. Each raises `ValueError` with a message for the operator: what is wrong and what to
write. No message repeats a whole value, since a value may hold a password.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Final, Literal
from urllib.parse import SplitResult, urlsplit

from edge.config.slips import meant_duration, meant_size
from edge.names import PLACEHOLDERS, check_placeholders, fill, is_dns_label, is_host_name
from edge.operations import OPERATIONS

_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MS_IN = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
DURATION_PATTERN: Final = rf"([0-9]{{1,12}}(\.[0-9]{{1,9}})?)({'|'.join(_MS_IN)})"
SIZE_PATTERN: Final = rf"([0-9]{{1,12}}(\.[0-9]{{1,9}})?)({'|'.join(_BYTES)})"
LONGEST_S: Final = 365 * 86400  # far over any use, and far under where event loops overflow
_COUNTED_IN_SECONDS_S = 600  # below ten minutes people count seconds: "75s", "300s"
_WRITTEN_TIMES = (("d", 86400), ("h", 3600), ("m", 60))
_WRITTEN_SIZES = ("GiB", "GB", "MiB", "MB", "KiB", "KB")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(\??[^#]*)(#?.*)", re.DOTALL)
_URL_PATH = re.compile(r"(?:/(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})*)*")  # RFC 3986 section 3.3
_DEFAULT_PORTS = {"http": 80, "https": 443}
_OPERATION = re.compile(r"[a-z0-9_-]{1,64}(?:/[a-z0-9_-]{1,64}){0,4}")
_ENDS_OF_OPERATIONS: Final = ("/chat/completions", "/v2/rerank", *(f"/v1/{name}" for name in (*OPERATIONS, "models")))
_MEMBER: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAPPED_BITS = 96  # before an IPv4 address that is written as an IPv6 one (RFC 4291 section 2.5.5.2)
# Signed with a key that only the issuer has. HS256 and its kin would let whoever can verify a token make one.
ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")

Network = IPv4Network | IPv6Network


def expand(text: str, env: Mapping[str, str]) -> str:
    """Return `text` with `${NAME}`, `${NAME:-default}` and `$$` replaced.

    A default ends at its matching brace and may hold further variables; a variable that is unset or empty takes it.
    """
    done = []
    at = 0
    while (dollar := text.find("$", at)) >= 0:
        done.append(text[at:dollar])
        if text.startswith("$$", dollar):
            done.append("$")
            at = dollar + 2
        elif text.startswith("${", dollar):
            end = _matching_brace(text, dollar + 1)
            done.append(_variable(text[dollar + 2 : end], env))
            at = end + 1
        else:
            raise ValueError('a single "$": write "$$" for a dollar sign, "${NAME}" for a variable')
    done.append(text[at:])
    return "".join(done)


def _matching_brace(text: str, opening: int) -> int:
    depth = 0
    for at in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return at
    raise ValueError('"${" without its "}": write "${NAME}" or "${NAME:-default}"')


def _variable(inside: str, env: Mapping[str, str]) -> str:
    name, has_default, default = inside.partition(":-")
    if not _VARIABLE_NAME.fullmatch(name):
        raise ValueError('not a variable\'s name in "${...}": write "${NAME}" or "${NAME:-default}"')
    if value := env.get(name, ""):
        return value
    if has_default:
        return expand(default, env)
    if name in env:
        return ""
    raise ValueError(f'the variable {name} is not set: set it, or write "${{{name}:-default}}"')


def seconds(text: str, longest_s: int = LONGEST_S) -> float:
    """Return a duration such as `"250ms"`, `"1.5s"`, `"5m"`, `"1h"`, `"1d"`, `"2w"` in seconds."""
    match = re.fullmatch(DURATION_PATTERN, text)
    if match is None:
        meant = meant_duration(text)
        hint = f'write a number and ms, s, m, h, d or w, such as "{meant or "2s"}"'
        if meant and not text.isdigit():  # a bare number may mean any unit
            hint = f'write "{meant}"'
        raise ValueError(f"{text!r} is not a duration: {hint}")
    duration_s = Fraction(match[1]) * _MS_IN[match[3]] / 1000
    if duration_s > longest_s:
        raise ValueError(f'{text!r} is too long: write at most "{write_duration(longest_s)}"')
    return float(duration_s)


def write_duration(value_s: float) -> str:
    """Return seconds as routes.toml writes them: `"250ms"`, `"75s"`, `"10m"`."""
    if value_s >= _COUNTED_IN_SECONDS_S:
        for unit, unit_s in _WRITTEN_TIMES:
            if value_s % unit_s == 0:
                return f"{value_s / unit_s:.0f}{unit}"
    return f"{value_s:.0f}s" if value_s == int(value_s) else f"{value_s * 1000:.12g}ms"


def byte_count(text: str, most_bytes: int | None = None) -> int:
    """Return a size such as `"512B"`, `"64KB"` (1000) or `"1.5MiB"` (1024) in bytes."""
    match = re.fullmatch(SIZE_PATTERN, text)
    if match is None:
        meant = meant_size(text)
        hint = f'write "{meant}"' if meant else 'write a number and B, KB, MB, GB, KiB, MiB or GiB, such as "64MiB"'
        raise ValueError(f"{text!r} is not a size: {hint}")
    size = Fraction(match[1]) * _BYTES[match[3]]
    if size.denominator != 1:
        raise ValueError(f'{text!r} is not a whole number of bytes: write "{round(size)}B"')
    if most_bytes is not None and size > most_bytes:
        raise ValueError(f'{text!r} is too much: write at most "{write_size(most_bytes)}"')
    return int(size)


def write_size(value_bytes: int) -> str:
    """Return bytes as routes.toml writes them: `"64MiB"`, `"2GB"`."""
    for unit in _WRITTEN_SIZES:
        if value_bytes and value_bytes % _BYTES[unit] == 0:
            return f"{value_bytes // _BYTES[unit]}{unit}"
    return f"{value_bytes}B"


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: a host and a port (0 lets the kernel choose), or the path of a unix socket."""

    host: str | None
    port: int | None
    path: Path | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"{bracketed(self.host or '')}:{self.port}"

    def collides(self, other: "Address") -> bool:
        """Return whether the two cannot be listened on at once; a wildcard address takes its port on every address."""
        if self.path is not None or other.path is not None:
            return self.path == other.path
        if self.port != other.port or not self.port:
            return False
        hosts = {self.host or "", other.host or ""}
        same_family = len({":" in host for host in hosts}) == 1
        return len(hosts) == 1 or (same_family and not hosts.isdisjoint({"0.0.0.0", "::"}))


def parse_address(text: str, base: Path) -> Address:
    """Return the address of `"host:port"`, `"[::1]:8080"` or `"unix:PATH"`, a PATH being relative to `base`."""
    if text.startswith("unix:"):
        if not text.removeprefix("unix:") or "\0" in text:
            raise ValueError('no path: write "unix:edge.sock"')
        return Address(None, None, base / text.removeprefix("unix:"))
    scheme, is_url, rest = text.partition("://")
    if is_url and scheme in _DEFAULT_PORTS:
        raise ValueError(f'an address has no scheme: write "{rest.partition("/")[0]}"')
    host, colon, port = text.rpartition(":")
    if not colon:
        sample = f"0.0.0.0:{text}" if text.isascii() and text.isdigit() else "127.0.0.1:8080"
        raise ValueError(f'write "host:port", such as "{sample}", or "unix:PATH"')
    if host in ("", "*"):
        raise ValueError(f'no host: write "0.0.0.0:{port}" for every address, "127.0.0.1:{port}" for this machine only')
    return Address(_host(host), _port(port, lowest=0))


@dataclass(frozen=True, slots=True)
class Url:
    """The URL of an upstream; `path` is '' when there is none, '/' for the root, and else does not end in '/'."""

    scheme: Literal["http", "https"]
    host: str
    port: int
    path: str = ""

    @property
    def authority(self) -> str:
        """The value of the Host header: the port only when it is not the scheme's own, IPv6 in brackets."""
        default = self.port == _DEFAULT_PORTS[self.scheme]
        return bracketed(self.host) if default else f"{bracketed(self.host)}:{self.port}"

    @property
    def base(self) -> str:
        """What stands before the path of an operation: `/v1`, or a path in its place; nothing for a mere `/`."""
        return self.path.rstrip("/") if self.path else "/v1"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"


def parse_url(text: str) -> Url:
    """Return the URL of `text`, which has no user info, query or fragment.

    A host that ends in a number and is no IP address is refused: resolvers read `2130706433` and `0x7f.1` as addresses.
    """
    if any(each.isspace() for each in text.strip()) or text.count("://") > 1:
        raise ValueError('more than one URL, or a space in one: write each as a text of its own, "http://host:port"')
    if text != text.strip():
        raise ValueError("a space before or behind the URL: remove it")
    match = _URL.fullmatch(text)
    if match is None:
        raise ValueError('not a URL: write "http://host:port"')
    scheme, authority, path, query, fragment = match.groups()
    if "@" in authority:
        raise ValueError('user info in a URL: write "http://host:port" and put the key in api_key or api_key_file')
    if query or fragment:
        raise ValueError("a query or fragment in a URL: remove what follows the path")
    host, colon, port = authority.rpartition(":")
    if not colon or authority.endswith("]") or (":" in host and not host.endswith("]")):
        host, port = authority, ""  # no port, or an IPv6 address without brackets
    if not _URL_PATH.fullmatch(path):
        raise ValueError("the path has a character that a URL cannot have: write it as %XX")
    match scheme.lower():
        case "http" | "https" as known:
            number = _port(port, lowest=1) if port else _DEFAULT_PORTS[known]
            return Url(known, _host(host), number, path.rstrip("/") or path[:1])
        case other:
            raise ValueError(f'the scheme {other!r} is not served: write "http://host:port" or "https://host"')


def parse_base(text: str) -> Url:
    """Return the URL of an upstream, before the path of an operation is added to it."""
    url = parse_url(text)
    if url.path.endswith(_ENDS_OF_OPERATIONS):
        raise ValueError("ends in the path of an operation, which the edge adds: write it as in http://host:port/v1")
    return url


def bracketed(host: str) -> str:
    """Return a host as it stands in front of a port."""
    return f"[{host}]" if ":" in host else host


def _port(text: str, lowest: int) -> int:
    if re.fullmatch("[0-9]{1,5}", text) and lowest <= int(text) <= 65535:
        return int(text)
    raise ValueError(f"the port {text!r} is not a number of {lowest} to 65535: write host:port")


def _host(text: str) -> str:
    """Return the host of a URL or address: a DNS name, an IPv4 address, or an IPv6 address in brackets."""
    if text.startswith("[") and text.endswith("]"):
        try:
            return str(IPv6Address(text[1:-1]))
        except ValueError:
            raise ValueError(f'{text!r} is not an IPv6 address: write one such as "[::1]:8080"') from None
    if ":" in text:
        raise ValueError('an IPv6 address needs brackets: write one such as "[::1]:8080"')
    # A trailing dot keeps a name from being searched in other domains; container names may have an underscore.
    if not is_host_name(text.lower().removesuffix(".").replace("_", "x")):
        raise ValueError(f"{text!r} is not a host: write a DNS name or an IP address")
    return text.lower()


@dataclass(frozen=True, slots=True)
class KeyStoreAddress:
    """Where keys are kept: a file, or the URL of a server; exactly one of the two. A URL may hold a password."""

    path: Path | None = None
    url: str = field(default="", repr=False)
    format: str = "sqlite"  # the scheme of a file

    def __str__(self) -> str:
        if self.path is not None:
            return f"{self.format}:{self.path}"
        scheme, _, rest = self.url.partition("://")
        if scheme.startswith("redis"):  # behind "?" is a password
            rest = rest.partition("?")[0]
        return f"{scheme}://{rest.rpartition('@')[2]}"

    @property
    def scheme(self) -> str:
        """One of those of `process_settings.KEY_STORES`."""
        return self.format if self.path is not None else self.url.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Place:
    """Where keys are kept or records are shipped: the schemes that lead there, and how a person writes it.

    `check` returns the URL of a server, or raises `ValueError`; without it, a file's path follows the scheme.
    """

    schemes: tuple[str, ...]
    sample: str
    check: Callable[[str], str] | None = None


def pattern_of(places: Sequence[Place]) -> str:
    """Return the regular expression by which an editor knows what leads to one of the places."""
    ends = ((scheme, "://" if place.check else ":.") for place in places for scheme in place.schemes)
    return f"^({'|'.join(re.escape(scheme) + end for scheme, end in ends)})"


def samples_of(places: Sequence[Place]) -> str:
    """Return how a person writes each of the places: `A or B`, `A, B, or C`."""
    *others, last = (place.sample for place in places)
    return f"{', '.join(others)}{',' if others[1:] else ''} or {last}"


def _place_of(text: str, what: str, places: Sequence[Place]) -> tuple[Place, str]:
    """Return the place that the scheme of a text leads to, and what follows the scheme."""
    scheme, _, rest = text.partition(":")
    names_file = rest and not rest.startswith(("//", ":")) and "\0" not in rest
    for place in places:
        if scheme in place.schemes and (place.check or names_file):
            return place, rest
    raise ValueError(f"not a {what}: write {samples_of(places)}")


def parse_store(text: str, base: Path, places: Sequence[Place]) -> KeyStoreAddress:
    """Return the key store of a URL, or of a scheme and a file, whose path is relative to `base`."""
    place, name = _place_of(text, "key store", places)
    if place.check is not None:
        return KeyStoreAddress(url=place.check(text))
    return KeyStoreAddress(base / name, format=text.partition(":")[0])


def check_server(text: str) -> str:
    """Return the URL of a server that is asked over HTTP: it may have a query, and no password."""
    parts = _split(text)
    if parts is not None and "@" in parts.netloc:
        raise ValueError("a password does not belong into a URL, where logs show it: write it as a setting of its own")
    if parts is None or parts.fragment or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError('not a URL: write "https://HOST:PORT/PATH"')
    return text


def check_sink(text: str, places: Sequence[Place]) -> str:
    """Return the URL of a sink for usage records."""
    place, _ = _place_of(text, "sink", places)
    return place.check(text) if place.check else text


def _split(text: str) -> SplitResult | None:
    """Return the parts of a URL, None when its host or port cannot be; the reason may hold a password."""
    try:
        parts = urlsplit(text)
        parse_url(f"http://{parts.netloc.rpartition('@')[2]}")
    except ValueError:
        return None
    return parts


def parse_dns(text: str) -> Url:
    """Return the URL of `"name:port"`, whose addresses are the members of a pool."""
    name, _, port = text.rpartition(":")
    if not name or not port.isdigit() or "/" in text:
        raise ValueError(f'{text!r} is not a name and a port: write one such as "vllm.pool.svc:8000"')
    return parse_url(f"http://{text}")


def parse_network(text: str) -> Network:
    """Return the network of an address or of a range such as `"10.0.0.0/8"`."""
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f'{text!r} is not a network: write an address or a range such as "10.0.0.0/8"') from None
    if ip_address(text.partition("/")[0]) != network.network_address:
        raise ValueError(f'{text!r} is not the beginning of its range: write "{network}"')
    mapped = network.network_address.ipv4_mapped if isinstance(network, IPv6Network) else None
    if mapped is not None and network.prefixlen >= _MAPPED_BITS:  # an IPv4 client is one on every listener
        return IPv4Network((mapped, network.prefixlen - _MAPPED_BITS))
    return network


def check_instance(template: str) -> None:
    """Accept the URL of an instance route: valid with a DNS label put in, placeholders only in its host."""
    check_placeholders(template)
    match = _URL.fullmatch(template)
    if match and any(name in match[3] for name in PLACEHOLDERS):
        raise ValueError('a placeholder outside the host: write "http://{service}.{owner}.svc.cluster.local:8000"')
    parse_base(fill(template, "x", "x"))


def check_upstream_name(text: str) -> None:
    """Accept the name of a model that is sent upstream."""
    if not text:
        raise ValueError("is empty: write the name sent upstream, or remove it to send it as asked")


def check_upstream_template(text: str) -> None:
    """Accept a name that is sent upstream once `{owner}` and `{service}` are filled in."""
    check_placeholders(text)
    check_upstream_name(text)


def check_operation(text: str) -> None:
    """Accept the path of an operation behind /v1, unless the edge has it, or means something else by it."""
    if not _OPERATION.fullmatch(text):
        raise ValueError(f'{text!r} is not a path: write it as in "classify", without /v1 and in lower case')
    first = text.partition("/")[0]
    if first in ("v1", "v2", "openai", "anthropic"):
        raise ValueError(f"{text!r} begins with {first}: write the path behind /v1")
    if text in OPERATIONS or first in ("models", "limits", "usage", "responses", "messages", "health"):
        raise ValueError(f"{text!r} is served already: remove it")


def check_member(text: str) -> None:
    """Accept the name of a member of a body, of the top level."""
    if not _MEMBER.fullmatch(text):
        raise ValueError(f'{text!r} is not the name of a member: write it as in "cache_salt", of 64 characters at most')
    if text.lower() == "model":
        raise ValueError("every body has a model: remove it")


def check_region(text: str) -> None:
    """Accept the name of a region."""
    if not is_dns_label(text):
        raise ValueError('is not the name of a region: write a-z, 0-9 and -, such as "cn-shanghai-1"')


def check_claim(text: str) -> None:
    """Accept the name of a token's claim."""
    if not text:
        raise ValueError("is empty: write the name of a claim, or remove it")


def check_algorithm(text: str) -> None:
    """Accept an algorithm of signatures (RFC 7518 section 3.1) that proves who signed."""
    if text not in ALGORITHMS:
        hint = f"write one of {', '.join(ALGORITHMS)}"
        raise ValueError(f"{text!r} is not an algorithm that only the issuer can sign with: {hint}")


def check_path(text: str) -> None:
    """Accept the path of a health check."""
    if not (text.startswith("/") and text.isascii() and text.isprintable() and " " not in text):
        raise ValueError('is not a path: write one such as "/health", or remove it for the engine\'s own')


def parse_directory(text: str, base: Path) -> Path:
    """Return a directory that may not be there yet, relative to `base`."""
    if not text or "\0" in text:
        raise ValueError('is not a directory: write one such as "usage"')
    return base / text
