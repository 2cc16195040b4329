"""`edge keys`: create, list and revoke API keys."""

import argparse
import asyncio
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from edge.commands.arguments import add_config, add_json, checked
from edge.config.reading import load, load_keys
from edge.config.settings import KeysConfig
from edge.keys.stores.protocol import hash_key
from edge.keys.stores.registry import KeyRecord, KeyRegistry, new_key, parse_lifetime, restore

_Act = Callable[[KeyRegistry, argparse.Namespace], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `edge keys` and their arguments."""
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, text: str, act: _Act | None) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(act=act)
        add_config(sub)
        return sub

    create = verb("create", "make a key; it is shown once", _create_key)
    create.add_argument("--user", required=True, metavar="U", help="the namespace that owns it, such as u-1100a15812cc")
    create.add_argument("--name", default="", metavar="N", help="for people")
    globs: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "metavar": "GLOB"}
    create.add_argument("--allow", **globs, help="instead of public/** and the user's own; as often as wanted")
    create.add_argument("--deny", **globs, help="models refused whatever is allowed")
    create.add_argument("--expires", type=checked(parse_lifetime), metavar="TIME", help="a lifetime such as 12h or 30d")
    create.add_argument("--limit", metavar="NAME", help="a table of [limits]")
    add_json(create)
    verb("init", "say that the store is whole as it is: a new one without keys, or a Redis whose keys are back", _init)
    listing = verb("list", "show the keys, never the secrets", _list_keys)
    listing.add_argument("--user", metavar="U", help="of this user only")
    add_json(listing)
    verb("revoke", "end a key for good", _revoke_key).add_argument("id", metavar="ID")
    quota = verb("quota", "say whether a user has used up what was paid", _set_quota)
    quota.add_argument("--user", required=True, metavar="U")
    state = quota.add_mutually_exclusive_group(required=True)
    state.add_argument("--spent", action="store_true", help="requests get a 402 from now on")
    state.add_argument("--ok", dest="spent", action="store_false", help="they are served again")
    text = "put a backup in place of all keys; what was changed since it was made is undone, revocations too"
    backup = "a copy of the key store, as `.backup` makes it"
    verb("restore", text, None).add_argument("file", type=Path, metavar="FILE", help=backup)
    for name, text, one, whole in (
        ("enable", "let a key, or all keys of a user, work again", KeyRegistry.enable, KeyRegistry.enable_user),
        ("disable", "stop a key, or all keys of a user", KeyRegistry.disable, KeyRegistry.disable_user),
    ):
        sub = verb(name, text, _switch(one, whole))
        which = sub.add_mutually_exclusive_group(required=True)
        which.add_argument("id", nargs="?", metavar="ID")
        which.add_argument("--user", metavar="U")


def run(parsed: argparse.Namespace) -> int:
    """Do what the verb says, in the key store that the file names."""
    config = load_keys(parsed.config)
    if config.store.scheme in ("redis", "rediss") and parsed.act in (_create_key, _init):
        return _run_at_redis(config, parsed)
    path = key_file(config)
    if parsed.act is None:  # a registry would open what is to be replaced
        keys, users = restore(path, parsed.file)
        print(f"{keys} keys of {users} users restored from {parsed.file}; every edge knows within a second")
        return 0
    with KeyRegistry(path, makes=parsed.act is not _list_keys) as registry:
        parsed.act(registry, parsed)
    return 0


def _run_at_redis(config: KeysConfig, parsed: argparse.Namespace) -> int:
    """Do one of the two verbs that a Redis needs before others fill it."""
    from edge.keys.stores import redis_admin

    if parsed.act is _init:
        asyncio.run(redis_admin.mark(config))
        print("the key store is whole; every edge knows within a second")
        return 0
    key, record = new_key(*_arguments_of(parsed))
    is_marked = asyncio.run(redis_admin.add_key(config, hash_key(key), record))
    _show_key(key, record, parsed)
    if not is_marked:
        print("Whether all other keys are there is not known. If they are: `edge keys init`", file=sys.stderr)
    return 0


def key_file(config: KeysConfig) -> Path:
    """Return the file of the embedded key store; raises `ValueError` when keys are kept elsewhere."""
    if config.store.scheme != "sqlite":
        raise ValueError(f"keys.store is {config.store}: its keys are made and listed there, not by this command")
    assert config.store.path is not None
    return config.store.path


def _switch(one: Callable[[KeyRegistry, str], None], whole: Callable[[KeyRegistry, str], int]) -> _Act:
    def act(registry: KeyRegistry, parsed: argparse.Namespace) -> None:
        done = one.__name__ + "d"
        if parsed.user is None:
            one(registry, parsed.id)
            print(f"{parsed.id} {done}; every edge knows within a second")
        else:
            _report_user(parsed.user, whole(registry, parsed.user), done)

    return act


def _report_user(user: str, keys: int, done: str) -> None:
    misspelt = "" if keys else " (is the name right?)"
    print(f"{user} {done}, with {keys} keys{misspelt}; every edge knows within a second")


def _revoke_key(registry: KeyRegistry, parsed: argparse.Namespace) -> None:
    registry.revoke(parsed.id)
    print(f"{parsed.id} revoked; every edge knows within a second")


def _set_quota(registry: KeyRegistry, parsed: argparse.Namespace) -> None:
    keys = registry.set_out_of_quota(parsed.user, parsed.spent)
    _report_user(parsed.user, keys, "out of quota" if parsed.spent else "within quota")


def _init(registry: KeyRegistry, parsed: argparse.Namespace) -> None:
    print("the key store is there; every edge knows within a second")


def _create_key(registry: KeyRegistry, parsed: argparse.Namespace) -> None:
    _show_key(*registry.create(*_arguments_of(parsed)), parsed)


def _arguments_of(parsed: argparse.Namespace) -> tuple[Any, ...]:
    """Return what a key is made of; raises `ValueError` for a limit that there is not."""
    if parsed.limit is not None and parsed.limit not in (limits := load(parsed.config).limits):
        raise ValueError(f"there is no limit {parsed.limit!r} in {parsed.config}: use {', '.join(limits) or 'none'}")
    return parsed.user, parsed.name, parsed.allow, parsed.deny, parsed.expires, parsed.limit


def _show_key(key: str, record: KeyRecord, parsed: argparse.Namespace) -> None:
    if parsed.json:
        print(orjson.dumps({**record.as_json(), "key": key}).decode())
        return
    print(f"{record.id}  {record.user}  {record.name}", file=sys.stderr)
    print("The key is shown this once:", file=sys.stderr)
    print(key)


def _list_keys(registry: KeyRegistry, parsed: argparse.Namespace) -> None:
    records = [record for record in registry.list() if parsed.user in (None, record.user)]
    if parsed.json:
        print(orjson.dumps([record.as_json() for record in records], option=orjson.OPT_INDENT_2).decode())
        return
    now = time.time()
    rows = [("ID", "USER", "NAME", "STATE", "EXPIRES", "ALLOW", "DENY"), *(_row(record, now) for record in records)]
    widths = [max(map(_columns, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell + " " * (width - _columns(cell)) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _columns(text: str) -> int:
    """Return how many columns of a terminal a text takes: Chinese characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(each) else 1 + (unicodedata.east_asian_width(each) in "WF") for each in text)


def _row(record: KeyRecord, now: float) -> tuple[str, ...]:
    states = ("disabled", not record.enabled), ("suspended", record.suspended), ("expired", record.has_expired(now))
    state = ", ".join(name for name, holds in states if holds) or "enabled"
    state += ", out of quota" if record.out_of_quota else ""
    expires = record.as_json()["expires_at"] or "never"
    return record.id, record.user, record.name, state, expires, " ".join(record.allow), " ".join(record.deny)
