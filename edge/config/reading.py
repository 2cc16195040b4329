"""Turn routes.toml into an immutable, valid `Config`, or list everything that is wrong with it, line by line.

`load` reads the file and the secrets it names; `parse` takes its text.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from edge.config import process_settings, rules, settings
from edge.config.kinds import read_table, settings_of
from edge.config.positions import Positions
from edge.config.problems import ConfigError, Problem, read_toml
from edge.config.tables import Reader, Table

T = TypeVar("T")


def load(
    path: Path,
    env: Mapping[str, str] = os.environ,
    *,
    place: Path | None = None,
    before_file: Callable[[Path], object] = lambda path: None,
) -> settings.Config:
    """Return the configuration of the file at `path`, as it would be at `place`.

    `before_file` is called with each file that it names, before that is read. Raises: `ConfigError`, also for a file
    that cannot be read or is not UTF-8.
    """
    text, digest = _text_of(path)
    return replace(_read(text, place or path, env, _config, before_file), digest=digest)


def load_keys(path: Path, env: Mapping[str, str] = os.environ) -> process_settings.KeysConfig:
    """Return `[keys]` alone: what else is wrong with a file keeps no key from being revoked. Raises `ConfigError`."""
    return _read(_text_of(path)[0], path, env, _keys)


def parse(text: str, path: Path, env: Mapping[str, str]) -> settings.Config:
    """Return the configuration of `text`, whose paths start at the directory of `path`; raises `ConfigError`."""
    return _read(text, path, env, _config)


def _text_of(path: Path) -> tuple[str, str]:
    """Return the text of a file, and its SHA-256 as `sha256sum` shows it."""
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig"), hashlib.sha256(content).hexdigest()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(path, [Problem(line, "", "not UTF-8: save the file as UTF-8")]) from None
    except FileNotFoundError:
        message = "there is no such file: write a first one with `edge init`, or name another"
        raise ConfigError(path, [Problem(1, "", message)]) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        message = f"cannot be read ({reason}): name a readable file"
        raise ConfigError(path, [Problem(1, "", message)]) from None


def _read(
    text: str,
    path: Path,
    env: Mapping[str, str],
    read: Callable[[Table], T],
    before_file: Callable[[Path], object] = lambda path: None,
) -> T:
    try:
        data = read_toml(text, path)
        reader = Reader(path, env, Positions(text), before_file)
        found = read(Table(reader, (), data))
    except RecursionError:
        raise ConfigError(path, [Problem(1, "", "nested too deeply: write fewer brackets within brackets")]) from None
    if reader.problems:
        watched = tuple(dict.fromkeys(reader.watched))
        raise ConfigError(path, sorted(reader.problems, key=lambda problem: problem.line), watched)
    return found


def _config(root: Table) -> settings.Config:
    reader = root.reader
    if not root.data.get("routes"):
        reader.problem(("routes",), 'no routes, so nothing is served: write [routes."public/name"] with pool = "..."')
    jwt = root.table("jwt")
    limits = _named(settings.LimitConfig, root.section("limits"), rules.check_limit)
    pools = _named(settings.PoolConfig, root.section("pools"), rules.check_pool)
    routes = _named(
        settings.RouteConfig, root.section("routes"), partial(rules.check_route, pools=pools, limits=limits)
    )
    rules.refuse_ties(reader, tuple(routes.values()))
    rules.warn_of_unused(reader, "pool", pools, {route.pool for route in routes.values()})
    rules.warn_of_unused(reader, "limit", limits, {route.limit for route in routes.values()})
    server = _checked(process_settings.ServerConfig, root.section("server"), rules.check_server)
    rules.warn_of_loops(reader, server, pools)
    found = settings.Config(
        path=reader.path,
        server=rules.fit_server(server),
        keys=_keys(root),
        jwt=None if jwt is None else _checked(process_settings.JwtConfig, jwt, rules.check_jwt),
        usage=_checked(process_settings.UsageConfig, root.section("usage"), rules.check_usage),
        shared=_checked(process_settings.SharedConfig, root.section("shared"), rules.check_shared),
        limits=limits,
        pools=pools,
        routes=tuple(routes.values()),
    )
    root.close()
    warnings = sorted(reader.warnings, key=lambda warning: warning.line)
    return replace(found, watched=tuple(dict.fromkeys(reader.watched)), warnings=tuple(warnings))


def _keys(root: Table) -> process_settings.KeysConfig:
    return _checked(process_settings.KeysConfig, root.section("keys"), rules.check_keys)


def _checked(kind: type[T], table: Table, check: Callable[[T, Table], None] | None = None, **name: str) -> T:
    found = read_table(kind, table, **name)
    if check is not None:
        check(found, table)
    table.close()
    return found


def _named(kind: type[T], table: Table, check: Callable[[T, Table], None]) -> Mapping[str, T]:
    declared: type = kind
    keys = {setting.key for setting in settings_of(declared)}
    return MappingProxyType({name: _checked(kind, below, check, name=name) for name, below in table.tables(keys)})
