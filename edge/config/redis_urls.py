"""The URL of a Redis or Valkey: a single server, the Sentinels of a primary, or nodes of a Cluster.

`redis://USER:PASSWORD@HOST:PORT/DATABASE` is the form that is registered with IANA. It names one server; the other two
are what Python's rate limiters write (https://limits.readthedocs.io/en/stable/storage.html):

- `redis+sentinel://USER:PASSWORD@HOST:26379,HOST:26379/SERVICE/DATABASE`: user and password are those of the primary.
  Sentinels that ask for some have `?sentinel_username=USER&sentinel_password=PASSWORD`, by go-redis's names.
- `redis+cluster://USER:PASSWORD@HOST:6379,HOST:6379`: any nodes; they name the others.

With `rediss` each speaks TLS, Sentinels too. A character that a URL cannot have is written as %XX.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, cast
from urllib.parse import parse_qsl, unquote

from edge.config.values import bracketed, parse_url

Mode = Literal["single", "sentinel", "cluster"]

SCHEMES: Final = tuple(f"{scheme}{mode}" for mode in ("", "+sentinel", "+cluster") for scheme in ("redis", "rediss"))
PATTERN: Final = r"^rediss?(\+sentinel|\+cluster)?://"
SAMPLE: Final = '"redis://HOST:PORT/0", redis+sentinel:// or redis+cluster://'

TAG: Final = "{edge}"  # what stands in braces decides of the slot, as it does alone

_URL: Final = re.compile(r"(rediss?)(?:\+(sentinel|cluster))?://(?:([^/?#]*)@)?([^/?#@]*)([^?#]*)(?:\?([^#]*))?")
_PATH_OF_SINGLE: Final = re.compile(r"(?:/([0-9]{1,5})?)?")
_PATH_OF_SERVICE: Final = re.compile(r"/([A-Za-z0-9._-]{1,128})(?:/([0-9]{1,5})?)?")  # as Sentinel allows names
_PATH_OF_CLUSTER: Final = re.compile(r"/?(0?)")
_PORTS: Final = {"single": 6379, "sentinel": 26379, "cluster": 6379}
_OF_SENTINELS: Final = ("sentinel_username", "sentinel_password")
_SENTINEL: Final = "redis+sentinel://:${PASSWORD}@HOST:26379,HOST:26379/SERVICE/0"
_CLUSTER: Final = "redis+cluster://:${PASSWORD}@HOST:6379,HOST:6379"
_NOT_ONE: Final = 'not the URL of a Redis: write "redis://:${PASSWORD}@HOST:PORT/0", or rediss:// for TLS'


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """Where a Redis is: `hosts` are the server, the Sentinels or some nodes of the Cluster, each a host and a port."""

    mode: Mode
    is_tls: bool
    hosts: tuple[tuple[str, int], ...]
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    service: str = ""  # by which Sentinels know the primary
    database: int = 0
    sentinel_username: str | None = field(default=None, repr=False)
    sentinel_password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """Return where it is, without what may be secret."""
        return ",".join(f"{bracketed(host)}:{port}" for host, port in self.hosts)


def parse_redis(text: str) -> RedisUrl:
    """Return the Redis of a URL; raises `ValueError`, whose message repeats nothing of it."""
    match = _URL.fullmatch(text)
    if match is None:
        raise ValueError(_NOT_ONE)
    scheme, kind, user_info, servers, path, query = match.groups()
    mode = cast(Mode, kind or "single")
    hosts = tuple(_server(each, _PORTS[mode]) for each in servers.split(","))
    if mode == "single" and len(hosts) > 1:
        raise ValueError(f'several hosts: write "{_SENTINEL}" or "{_CLUSTER}"')
    service, database = _path_of(path, mode)
    username, password = _user(user_info)
    sentinel_username, sentinel_password = _query_of(query, mode)
    return RedisUrl(
        mode, scheme == "rediss", hosts, username, password, service, database, sentinel_username, sentinel_password
    )


def check_redis(text: str) -> str:
    """Return the URL of a Redis or Valkey; raises `ValueError`."""
    parse_redis(text)
    return text


def names_at(url: str) -> Callable[[str], str]:
    """Return what finds out how something `edge:...` is called at a URL.

    A Cluster keeps a name by the slot of what stands in braces, and a script or a transaction knows one slot alone. So
    the names there begin with `{edge}:`. https://valkey.io/topics/cluster-spec/#hash-tags
    """
    begin = TAG if "+cluster" in url.partition("://")[0] else "edge"
    return lambda name: begin + name.removeprefix("edge")


def _server(text: str, default_port: int) -> tuple[str, int]:
    try:
        parse_url(f"http://{text}")
    except ValueError:  # which repeats the text
        raise ValueError(_NOT_ONE) from None
    host, _, port = text.rpartition(":") if re.search(r":[0-9]+$", text) else (text, "", default_port)
    return host.strip("[]").lower(), int(port)


def _path_of(path: str, mode: Mode) -> tuple[str, int]:
    """Return the service, "" where there is none, and the number of the database."""
    if mode == "sentinel":
        match = _PATH_OF_SERVICE.fullmatch(path)
        if match is None:
            raise ValueError(f'the name that Sentinels have for the primary is missing: write "{_SENTINEL}"')
        return match[1], int(match[2] or 0)
    match = (_PATH_OF_SINGLE if mode == "single" else _PATH_OF_CLUSTER).fullmatch(path)
    if match is None:
        raise ValueError(_NOT_ONE if mode == "single" else f'a Cluster has one database: write "{_CLUSTER}"')
    return "", int(match[1] or 0)


def _user(text: str | None) -> tuple[str | None, str | None]:
    if text is None:
        return None, None
    username, _, password = text.partition(":")
    return unquote(username) or None, unquote(password) or None


def _query_of(query: str | None, mode: Mode) -> list[str | None]:
    """Return the name and the password for Sentinels."""
    given = dict(parse_qsl(query or "", keep_blank_values=True))
    if query is not None and (mode != "sentinel" or not given or given.keys() - set(_OF_SENTINELS)):
        fit = "sentinel_username and sentinel_password alone" if mode == "sentinel" else "nothing"
        raise ValueError(f'the query is not for a Redis: write {fit} behind "?"')
    return [given.get(name) or None for name in _OF_SENTINELS]
