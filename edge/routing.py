"""Find the route of a host and a model's name: hosts filter first, then an exact name, then the longest prefix.

Built once per generation from a valid `Config`; matching is a look-up in a dict of the host's own table.
"""

import functools
import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from edge.config.settings import RouteConfig
from edge.errors import InvalidRequest
from edge.names import fill, host_matches, is_instance_name

_MAX_HOSTS: Final = 1024  # tables kept by host; any client can name hosts, so the memory of it is bounded
_MAX_PORT: Final = 65535
_HOST: Final = re.compile(r"(?:([A-Za-z0-9._-]{1,255})|\[([0-9A-Fa-f:.]{2,45})\])(?::([0-9]{0,5}))?")


@functools.lru_cache(maxsize=1024)
def host_name(authority: str) -> str:
    """Return the host of a Host header, in lower case and without its port; raises `InvalidRequest`."""
    match = _HOST.fullmatch(authority)
    if match is None or int(match[3] or 0) > _MAX_PORT:
        if not authority:  # as of HTTP/1.0, and of who asks for a target without a host (RFC 9112 section 3.2)
            return ""
        raise InvalidRequest("the Host header is not a host name")
    return (match[1] or match[2]).lower().removesuffix(".")


@functools.lru_cache(maxsize=4096)
def is_loopback(host: str) -> bool:
    """Return whether a host is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class Match:
    """The route that won and, for an instance, the two halves of the name."""

    route: RouteConfig
    owner: str = ""
    service: str = ""

    def filled(self, template: str) -> str:
        """Return a template of the route with its placeholders replaced."""
        return fill(template, self.owner, self.service)


class HostTable:
    """The routes that one host can reach."""

    def __init__(self, routes: Iterable[RouteConfig]) -> None:
        routes = list(routes)
        self.exact: dict[str, Match | None] = {}
        for route in routes:  # where loopback lets every host list match, the first in the file wins
            if not route.pattern.endswith("*"):
                self.exact.setdefault(route.pattern, _match(route, route.pattern))
        prefixes = [(route.pattern[:-1], route) for route in routes if route.pattern.endswith("*")]
        self.prefixes = sorted(prefixes, key=lambda item: len(item[0]), reverse=True)

    def __bool__(self) -> bool:
        return bool(self.exact or self.prefixes)

    def find(self, model: str) -> Match | None:
        """Return the route of `model`, or None; an instance's owner and service are DNS labels or nothing matches."""
        if model in self.exact:
            return self.exact[model]
        for prefix, route in self.prefixes:
            if model.startswith(prefix):
                return _match(route, model)
        return None

    def names(self) -> Iterator[str]:
        """Yield the names that can be listed: exact routes, and what a prefix route lists."""
        yield from self.exact
        for _, route in self.prefixes:
            yield from route.list


class RouteTable:
    """All routes of a generation, by host."""

    def __init__(self, routes: tuple[RouteConfig, ...]) -> None:
        self._routes = routes
        self._everything = HostTable(routes)
        self._hosts: dict[str, HostTable] = {}

    def for_host(self, host: str, loopback: bool) -> HostTable:
        """Return the routes of a host (lower case, no port); a loopback host on a loopback connection reaches all."""
        if loopback:
            return self._everything
        table = self._hosts.get(host)
        if table is None:
            if len(self._hosts) >= _MAX_HOSTS:
                self._hosts.clear()
            table = HostTable(route for route in self._routes if host_matches(route.hosts, host))
            self._hosts[host] = table
        return table


def _match(route: RouteConfig, model: str) -> Match | None:
    """Return the match of a route whose pattern fits `model`; one with placeholders needs an instance's name."""
    if route.instance is None and (route.model is None or "{" not in route.model):
        return Match(route)
    if not is_instance_name(model):
        return None
    owner, _, service = model.partition("/")
    return Match(route, owner, service)
