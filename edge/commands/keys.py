"""`edge keys`: create, list, rotate and revoke API keys."""

import argparse
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson

from edge.commands.arguments import add_config, add_json, checked
from edge.config.reading import load, load_keys
from edge.keys.stores.administration import KeyRecord, Registry, UserMarks, parse_lifetime, rfc_3339
from edge.keys.stores.backup import restore
from edge.keys.stores.redis_registry import RedisRegistry
from edge.keys.stores.table import registry_of

_Act = Callable[[Registry, argparse.Namespace], None]
_SOON = "; every edge knows within a second"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `edge keys` and their arguments."""
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, text: str, act: _Act | None, *, json: bool = False) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(act=act)
        add_config(sub)
        if json:
            add_json(sub)
        return sub

    create = verb("create", "make a key; it is shown once", _create_key, json=True)
    create.add_argument("--user", required=True, metavar="U", help="the namespace that owns it, such as u-1100a15812cc")
    create.add_argument("--name", default="", metavar="N", help="for people")
    globs: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "metavar": "GLOB"}
    create.add_argument("--allow", **globs, help="instead of public/** and the user's own; as often as wanted")
    create.add_argument("--deny", **globs, help="models refused whatever is allowed")
    lifetime = checked(parse_lifetime)
    create.add_argument("--expires", type=lifetime, metavar="TIME", help="a lifetime such as 12h or 30d")
    create.add_argument("--limit", metavar="NAME", help="a table of [limits]")
    create.add_argument(
        "--share", type=int, metavar="N", help="of the tokens in the queue of a pool: 1 to 1000; default: its limit's"
    )
    verb("init", "say that the store is whole as it is: a new one without keys, or a Redis whose keys are back", _init)
    listing = verb("list", "show the keys, never the secrets", _list_keys, json=True)
    listing.add_argument("--user", metavar="U", help="of this user only")
    listing.add_argument("--all", action="store_true", help="revoked ones too")
    rotate = verb("rotate", "make a key that takes the place of another; it is shown once", _rotate_key, json=True)
    rotate.add_argument("id", metavar="ID")
    rotate.add_argument(
        "--grace", type=lifetime, default=0.0, metavar="TIME", help="how long the old one still works; default: not"
    )
    verb("revoke", "end a key for good", _revoke_key).add_argument("id", metavar="ID")
    quota = verb("quota", "say whether a user has used up what was paid", _set_quota)
    quota.add_argument("--user", required=True, metavar="U")
    state = quota.add_mutually_exclusive_group(required=True)
    state.add_argument("--spent", action="store_true", help="requests get a 402 from now on")
    state.add_argument("--ok", dest="spent", action="store_false", help="they are served again")
    audit = verb("audit", "show who changed what, and when", _show_audit, json=True)
    audit.add_argument("--user", metavar="U", help="of this user only")
    audit.add_argument("--id", metavar="ID", help="of this key only")
    text = "put a backup in place of all keys; what was changed since it was made is undone, revocations too"
    backup = "a copy of the key store, as `.backup` makes it"
    verb("restore", text, None).add_argument("file", type=Path, metavar="FILE", help=backup)
    for name, text, enabled in (
        ("enable", "let a key, or all keys of a user, work again", True),
        ("disable", "stop a key, or all keys of a user", False),
    ):
        sub = verb(name, text, _switch(enabled))
        which = sub.add_mutually_exclusive_group(required=True)
        which.add_argument("id", nargs="?", metavar="ID")
        which.add_argument("--user", metavar="U")


def run(parsed: argparse.Namespace) -> int:
    """Do what the verb says, in the key store that the file names."""
    config = load_keys(parsed.config)
    if parsed.act is None:  # a registry would open what is to be replaced
        if config.store.path is None:
            raise ValueError(f"keys.store is {config.store}: put its backup back there, not by this command")
        keys, users = restore(config.store.path, parsed.file)
        print(f"{keys} keys of {users} users restored from {parsed.file}{_SOON}")
        return 0
    with registry_of(config, makes=parsed.act not in (_list_keys, _show_audit)) as registry:
        parsed.act(registry, parsed)
    return 0


def _switch(enabled: bool) -> _Act:
    done = "enabled" if enabled else "disabled"

    def act(registry: Registry, parsed: argparse.Namespace) -> None:
        if parsed.user is None:
            registry.change(parsed.id, enabled=enabled)
            print(f"{parsed.id} {done}{_SOON}")
        else:
            _mark_user(registry, parsed.user, {"suspended": not enabled}, done)

    return act


def _mark_user(registry: Registry, user: str, marks: UserMarks, done: str) -> None:
    keys = registry.mark_user(user, **marks)
    misspelt = "" if keys else " (is the name right?)"
    print(f"{user} {done}, with {keys} keys{misspelt}{_SOON}")


def _revoke_key(registry: Registry, parsed: argparse.Namespace) -> None:
    registry.revoke(parsed.id)
    print(f"{parsed.id} revoked{_SOON}")


def _set_quota(registry: Registry, parsed: argparse.Namespace) -> None:
    marks: UserMarks = {"out_of_quota": parsed.spent}
    _mark_user(registry, parsed.user, marks, "out of quota" if parsed.spent else "within quota")


def _init(registry: Registry, parsed: argparse.Namespace) -> None:
    if isinstance(registry, RedisRegistry):
        registry.init()
        print(f"the key store is whole{_SOON}")
    else:
        print(f"the key store is there{_SOON}")


def _create_key(registry: Registry, parsed: argparse.Namespace) -> None:
    if parsed.limit is not None and parsed.limit not in (limits := load(parsed.config).limits):
        raise ValueError(f"there is no limit {parsed.limit!r} in {parsed.config}: use {', '.join(limits) or 'none'}")
    key, record = registry.create(
        parsed.user, parsed.name,
        allow=parsed.allow, deny=parsed.deny, expires_in_s=parsed.expires, limit=parsed.limit, share=parsed.share,
    )  # fmt: skip
    _show_key(key, record, parsed)
    if isinstance(registry, RedisRegistry) and not registry.is_marked:
        print("Whether all other keys are there is not known. If they are: `edge keys init`", file=sys.stderr)


def _rotate_key(registry: Registry, parsed: argparse.Namespace) -> None:
    key, record = registry.rotate(parsed.id, parsed.grace)
    _show_key(key, record, parsed)
    ends_at = rfc_3339(registry.find(parsed.id).expires_at or time.time())
    print(f"{parsed.id} ends at {ends_at}", file=sys.stderr)


def _show_key(key: str, record: KeyRecord, parsed: argparse.Namespace) -> None:
    if parsed.json:
        print(orjson.dumps({**record.as_json(), "key": key}).decode())
        return
    print(f"{record.id}  {record.user}  {record.name}", file=sys.stderr)
    print("The key is shown this once:", file=sys.stderr)
    print(key)


def _list_keys(registry: Registry, parsed: argparse.Namespace) -> None:
    records = registry.page(parsed.user, revoked=parsed.all)
    if parsed.json:
        print(orjson.dumps([record.as_json() for record in records], option=orjson.OPT_INDENT_2).decode())
        return
    now = time.time()
    head = ("ID", "USER", "NAME", "STATE", "EXPIRES", "LIMIT", "CREATED", "LAST USED", "ALLOW", "DENY")
    _print_table((head, *(_row(record, now) for record in records)))


def _show_audit(registry: Registry, parsed: argparse.Namespace) -> None:
    wanted = {name: value for name, value in (("user", parsed.user), ("key_id", parsed.id)) if value is not None}
    lines = [line for line in registry.audit() if wanted.items() <= line.items()]
    if parsed.json:
        print(orjson.dumps(lines, option=orjson.OPT_INDENT_2).decode())
        return
    head = ("TIME", "WHO", "FROM", "DID", "KEY", "USER", "CHANGED")
    _print_table((head, *map(_audit_row, lines)))


def _audit_row(line: dict[str, Any]) -> tuple[str, ...]:
    changed = orjson.dumps(line["changed"]).decode() if line["changed"] else ""
    who, where = str(line["actor"]), f"{line['via']} {line['address'] or ''}".strip()
    return line["time"], who, where, line["action"], line["key_id"] or "", line["user"], changed


def _print_table(rows: Iterable[tuple[str, ...]]) -> None:
    rows = list(rows)
    widths = [max(map(_columns, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell + " " * (width - _columns(cell)) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _columns(text: str) -> int:
    """Return how many columns of a terminal a text takes: Chinese characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(each) else 1 + (unicodedata.east_asian_width(each) in "WF") for each in text)


def _row(record: KeyRecord, now: float) -> tuple[str, ...]:
    states = (
        ("revoked", record.revoked),
        ("disabled", not record.enabled),
        ("suspended", record.suspended),
        ("expired", record.has_expired(now)),
    )
    state = ", ".join(name for name, holds in states if holds) or "enabled"
    state += ", out of quota" if record.out_of_quota else ""
    shown = record.as_json()
    times = shown["expires_at"] or "never", record.limit or "-", shown["created_at"] or "-"
    used = (shown["last_used_at"] or "never").removesuffix(":00Z").removesuffix("Z")
    return record.id, record.user, record.name, state, *times, used, " ".join(record.allow), " ".join(record.deny)
