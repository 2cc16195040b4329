"""Find the route of a host and a model's name: hosts filter first, then an exact name, then the longest prefix.

Built once per generation from a valid `Config`: one index by pattern, which all hosts share. A host is a set of lists
of `hosts`, those that let it through; a match is a look-up in the index, and whether the route's list is in that set.
"""

import functools
import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from edge.config.settings import RouteConfig
from edge.errors import InvalidRequest
from edge.names import HostIndex, fill, is_instance_name, named_hosts

_MAX_HOSTS: Final = 1024  # remembered with their tables; any client can name hosts, so the memory of it is bounded
_MAX_HELD: Final = 100_000  # numbers in these tables, about 60 bytes each
_FEW: Final = 8  # routes of one pattern that are looked through in order
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
    """The route that won, the number of its list of `hosts`, and for an instance the two halves of the name."""

    route: RouteConfig
    hosts: int = 0
    owner: str = ""
    service: str = ""

    def filled(self, template: str) -> str:
        """Return a template of the route with its placeholders replaced."""
        return fill(template, self.owner, self.service)


class HostTable:
    """The routes that one host can reach: those whose list of `hosts` lets it through; without `lists`, all.

    It holds no route: all hosts share the generation's index, so that who makes up hosts makes up no tables.
    """

    __slots__ = ("_index", "_lists")

    def __init__(self, index: "_Index", lists: frozenset[int] | None = None) -> None:
        self._index = index
        self._lists = lists

    def __bool__(self) -> bool:
        return self._lists is None or bool(self._lists)

    def find(self, model: str) -> Match | None:
        """Return the route of `model`, or None; an instance's owner and service are DNS labels or nothing matches."""
        index = self._index
        found = index.exact.get(model)
        if found is not None and (match := self._first(found)) is not None:
            return match
        for length in index.lengths:
            found = index.prefixes.get(model[:length]) if length <= len(model) else None
            if found is not None and (match := self._first(found)) is not None:
                return _match(match.route, model, match.hosts)
        return None

    def _first(self, rivals: "Match | _Rivals") -> Match | None:
        """Return the one of a pattern's routes that is here; where loopback lets all be, the first in the file wins."""
        lists = self._lists
        if isinstance(rivals, Match):
            return rivals if lists is None or rivals.hosts in lists else None
        if lists is None:
            return next(iter(rivals.values()))
        if len(lists) < len(rivals) > _FEW:  # each tenant has its own, at its own host
            return next((rivals[each] for each in lists if each in rivals), None)
        for each in rivals:
            if each in lists:
                return rivals[each]
        return None

    def names(self) -> Iterator[str]:
        """Yield the names that can be listed, in order: exact routes, and what a prefix route lists."""
        for name, rivals in self._index.names:
            if self._first(rivals) is not None:
                yield name


_Rivals = dict[int, Match]  # routes of one pattern, by the number of their list of hosts, as in the file
# Mostly there is one, and one object less for each is less for the garbage collector to walk through at once.
_Patterns = dict[str, Match | _Rivals]


class _Index:
    """The routes of a generation by pattern, whatever their hosts."""

    def __init__(self, routes: Iterable[RouteConfig]) -> None:
        self.numbers: dict[tuple[str, ...], int] = {}  # of the lists of hosts
        self.exact: _Patterns = {}
        self.prefixes: _Patterns = {}
        shown: _Patterns = {}
        for route in routes:
            number = self.numbers.setdefault(route.hosts, len(self.numbers))
            if route.pattern.endswith("*"):
                _add(self.prefixes, route.pattern[:-1], Match(route, number))
                for name in route.list:
                    _add(shown, name, Match(route, number))
            elif match := _match(route, route.pattern, number):
                _add(self.exact, route.pattern, match)
                _add(shown, route.pattern, match)
        self.lengths = sorted({len(prefix) for prefix in self.prefixes}, reverse=True)
        self.names = sorted(shown.items(), key=lambda item: item[0])


def _add(patterns: _Patterns, pattern: str, match: Match) -> None:
    """Add a route to those of its pattern, unless there is one with the same hosts."""
    there = patterns.setdefault(pattern, match)
    if isinstance(there, dict):
        there.setdefault(match.hosts, match)
    elif there.hosts != match.hosts:
        patterns[pattern] = {there.hosts: there, match.hosts: match}


class RouteTable:
    """All routes of a generation, by host."""

    def __init__(self, routes: tuple[RouteConfig, ...]) -> None:
        self._index = _Index(routes)
        self._everything = HostTable(self._index)
        named = [(name, number) for hosts, number in self._index.numbers.items() for name in named_hosts(hosts)]
        excluded = [
            (name[1:], number)
            for hosts, number in self._index.numbers.items()
            for name in hosts
            if name.startswith("!")
        ]
        self._named, self._excluded = HostIndex(named), HostIndex(excluded)
        self._nameless = frozenset(self._index.numbers.values()) - {number for _, number in named}
        self._tables: dict[frozenset[int], HostTable] = {}
        self._hosts: dict[str, HostTable] = {}
        self._held = 0  # numbers of lists in the tables

    def parts(self) -> Iterator[object]:
        """Yield what it is made of in large numbers, routes excepted."""
        yield from self._tables
        yield from self._index.exact.values()
        yield from self._index.prefixes.values()
        yield from self._index.names

    def for_host(self, host: str, loopback: bool) -> HostTable:
        """Return the routes of a host (lower case, no port); a loopback host on a loopback connection reaches all."""
        if loopback:
            return self._everything
        table = self._hosts.get(host)
        if table is None:
            if len(self._hosts) >= _MAX_HOSTS or self._held >= _MAX_HELD:
                self._hosts.clear()
                self._tables.clear()
                self._held = 0
            table = self._hosts[host] = self._table(host)
        return table

    def _table(self, host: str) -> HostTable:
        """Return the table of a host; hosts that the same lists let through share it."""
        lists = self._nameless.union(self._named.covering(host)).difference(self._excluded.covering(host))
        table = self._tables.get(lists)
        if table is None:
            table = self._tables[lists] = HostTable(self._index, lists)
            self._held += len(lists)
        return table


def _match(route: RouteConfig, model: str, hosts: int) -> Match | None:
    """Return the match of a route whose pattern fits `model`; one with placeholders needs an instance's name."""
    if route.instance is None and (route.model is None or "{" not in route.model):
        return Match(route, hosts)
    if not is_instance_name(model):
        return None
    owner, _, service = model.partition("/")
    return Match(route, hosts, owner, service)
