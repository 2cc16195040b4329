"""Keys change in another process while the edge serves: the news arrives, and a fault of the store locks nobody out."""

import asyncio
import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge.__main__ import main
from edge.keys.stores.registry import KeyRegistry
from edge.simulator.server import Simulator
from tests.command import edge as command_here
from tests.conftest import ROUTES, USER, Edge, StartEdge

PATIENCE_S = 20
BODY = {"model": "public/deepseek-r1", "messages": []}


async def status_of(edge: Edge, key: str | None = None, model: str = "public/deepseek-r1") -> int:
    return (await edge.ask({"model": model, "messages": []}, key=key))[0]


async def until_status(edge: Edge, wanted: int, allowed: tuple[int, ...], key: str | None = None) -> None:
    """Ask until the answer is the one that is wanted; every one before is among those allowed."""
    async with asyncio.timeout(PATIENCE_S):
        while (status := await status_of(edge, key)) != wanted:
            assert status in allowed
            await asyncio.sleep(0.01)


def id_of(registry: KeyRegistry, number: int = 0) -> str:
    return registry.list()[number].id


@pytest.fixture
async def edge(start_edge: StartEdge, simulator: Simulator) -> Edge:
    """An edge whose cache alone would keep every answer for an hour."""
    routes = ROUTES.replace("{upstream}", simulator.url)
    return await start_edge(routes, keys='cache_ttl = "1h"\nnegative_ttl = "1h"\nstale_for = "1h"')


CHANGES: dict[str, tuple[Callable[[KeyRegistry], object], int]] = {
    "revoked": (lambda registry: registry.revoke(id_of(registry)), 401),
    "disabled": (lambda registry: registry.change(id_of(registry), enabled=False), 401),
    "suspended user": (lambda registry: registry.mark_user(USER, suspended=True), 401),
    "out of quota": (lambda registry: registry.mark_user(USER, out_of_quota=True), 402),
}


@pytest.mark.parametrize("how", CHANGES)
async def test_change_of_a_cached_key_arrives(edge: Edge, how: str) -> None:
    """Within a second on a machine that has time; no cached answer outlives the news."""
    assert await status_of(edge) == 200
    act, status = CHANGES[how]
    with KeyRegistry(edge.keys_path) as registry:
        await asyncio.to_thread(lambda: None)
        act(registry)
    await until_status(edge, status, (200,))
    assert await status_of(edge) == status
    await edge.consistent()
    line = (await edge.log())[-1]
    assert (line["status"], line["end"]) == (status, "refused")
    assert line["user"] == (None if how == "revoked" else USER), "who is refused is named, as long as it is known"


@pytest.mark.parametrize(
    ("off", "on"),
    [
        (
            lambda registry: registry.change(id_of(registry), enabled=False),
            lambda registry: registry.change(id_of(registry), enabled=True),
        ),
        (
            lambda registry: registry.mark_user(USER, suspended=True),
            lambda registry: registry.mark_user(USER, suspended=False),
        ),
    ],
)
async def test_key_that_is_let_in_again_works(
    edge: Edge, off: Callable[[KeyRegistry], object], on: Callable[[KeyRegistry], object]
) -> None:
    with KeyRegistry(edge.keys_path) as registry:
        off(registry)
        await until_status(edge, 401, (200,))
        on(registry)
        await until_status(edge, 200, (401,))


async def test_revocation_by_another_process_arrives(edge: Edge) -> None:
    """`edge keys revoke` is such a process."""
    assert await status_of(edge) == 200
    with KeyRegistry(edge.keys_path) as registry:
        key_id = id_of(registry)
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "edge", "keys", "revoke", key_id, "--config", str(edge.config_path)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    await until_status(edge, 401, (200,))


async def test_revocation_touches_no_other_key(edge: Edge) -> None:
    with KeyRegistry(edge.keys_path) as registry:
        second, record = registry.create("u-2200b")
        assert await status_of(edge, second) == 200
        assert await status_of(edge) == 200
        registry.revoke(record.id)
    await until_status(edge, 401, (200,), second)
    assert await status_of(edge) == 200


async def test_new_key_works_although_it_was_asked_for_before(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was cached as unknown for an hour."""
    key = "sk-" + "A" * 45
    assert await status_of(edge, key) == 401
    letters = iter("A" * 45)
    with KeyRegistry(edge.keys_path) as registry:
        monkeypatch.setattr("edge.keys.stores.administration._random", lambda alphabet, length: (
            "".join(next(letters) for _ in range(length)) if length == 45 else "a" * length))  # fmt: skip
        created, _ = registry.create(USER)
    assert created == key
    await until_status(edge, 200, (401,), key)


async def test_new_key_works_at_once(edge: Edge) -> None:
    with KeyRegistry(edge.keys_path) as registry:
        key, _ = registry.create("u-2200b")
    assert await status_of(edge, key) == 200


async def test_key_stops_at_its_time_of_expiry(edge: Edge) -> None:
    """Without a look-up: the time is in the cached record."""
    with KeyRegistry(edge.keys_path) as registry:
        key, _ = registry.create(USER, expires_in_s=1.5)
    assert await status_of(edge, key) == 200
    await until_status(edge, 401, (200,), key)


async def test_key_of_another_user_reaches_no_instance(edge: Edge, simulator: Simulator) -> None:
    """Unknown and not-yours look the same to whoever asks."""
    with KeyRegistry(edge.keys_path) as registry:
        key, _ = registry.create("u-2200b", deny=["public/deepseek-r1"])
    own = f"{USER}/qwen2"
    assert [await status_of(edge, model=own), await status_of(edge, key, own)] == [200, 404]
    *_, others = await edge.ask({"model": own}, key=key)
    *_, unknown = await edge.ask({"model": "public/none"}, key=key)
    assert others.decode().replace(own, "NAME") == unknown.decode().replace("public/none", "NAME")
    assert await status_of(edge, key) == 403
    assert len(simulator.requests) == 1


async def test_backup_that_is_restored_holds_for_a_running_edge(edge: Edge) -> None:
    """Keys that are cached for an hour: one that was revoked since works again, one that was made since does not."""
    backup = edge.keys_path.with_name("backup.db")
    with KeyRegistry(edge.keys_path) as registry:
        with contextlib.closing(sqlite3.connect(backup)) as copy:
            registry._connection.backup(copy)
        registry.revoke(id_of(registry))
        new, _ = registry.create("u-2200b")
    await until_status(edge, 401, (200,))
    assert await status_of(edge, new) == 200
    done = command_here("keys", "restore", backup, "--config", edge.config_path)
    told = f"1 keys of 1 users restored from {backup}; every edge knows within a second\n"
    assert (done.code, done.out, done.err) == (0, told, "")
    await until_status(edge, 200, (401,))
    await until_status(edge, 401, (200,), new)


# --- the command


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`edge keys` over a file whose other settings are unusable: nobody but [keys] is asked."""
    path = tmp_path / "routes.toml"
    path.write_text(
        '[keys]\nstore = "sqlite:keys.db"\n[pools.r1]\nendpoints = [{ url = "ftp://x", api_key = "${NOT_SET}" }]\n'
    )

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(["keys", *arguments, "--config", str(path)])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        return code, *capsys.readouterr()

    return run


Command = Callable[..., tuple[int, str, str]]


def test_key_is_revoked_whatever_else_is_wrong_with_the_file(command: Command) -> None:
    """The shell of who revokes has no secrets of upstreams in its environment, and somebody may be editing the file."""
    code, out, _ = command("create", "--user", USER, "--json")
    assert code == 0
    code, out, _ = command("revoke", json.loads(out)["id"])
    assert (code, "every edge knows within a second" in out) == (0, True)
    assert json.loads(command("list", "--json")[1]) == []


def test_file_that_is_no_backup_is_refused(command: Command, tmp_path: Path) -> None:
    command("create", "--user", USER)
    before = command("list", "--json")
    backup = tmp_path / "backup.db"
    for content, message in ((b"", "it has no schema version"), (os.urandom(8192), "file is not a database")):
        backup.write_bytes(content)
        code, out, err = command("restore", str(backup))
        assert (code, out) == (1, "")
        assert err == f"edge: {backup} is no backup of a key store ({message}): name another file\n"
    assert command("list", "--json") == before


def test_restore_without_a_backup_is_wrong_usage(command: Command) -> None:
    code, out, err = command("restore")
    assert (code, out) == (2, "")
    assert "the following arguments are required: FILE" in err


def test_problem_of_the_keys_table_is_told_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "routes.toml"
    path.write_text('[keys]\nstore = "mysql:x"\n')
    assert main(["keys", "list", "--config", str(path)]) == 1
    assert "routes.toml:2: keys.store: not a key store" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("expires_at", 1e300),
        ("expires_at", "soon"),
        ("expires_at", -1),
        ("created_at", b"x"),
        ("name", b"\xff"),
        ("allow", b""),
    ],
)
def test_odd_row_of_the_key_store_is_named(command: Command, tmp_path: Path, column: str, value: object) -> None:
    """SQLite lets any value into any column, and somebody may have put it there."""
    command("create", "--user", USER)
    with contextlib.closing(sqlite3.connect(tmp_path / "keys.db")) as hand, hand:
        (key_id,) = hand.execute("SELECT id FROM keys").fetchone()
        hand.execute(f"UPDATE keys SET {column} = ?", (value,))
    for arguments in (("list",), ("list", "--json")):
        code, out, told = command(*arguments)
        assert (code, out) == (1, "")
        assert told.startswith(f"edge: {tmp_path / 'keys.db'}: the row of the key '{key_id}' has something else than")


def test_file_whose_name_is_no_text_is_checked_like_any_other() -> None:
    """A name is bytes to the system, and JSON is text."""
    for more in ([], ["--json"]):
        done = command_here("check", os.fsdecode(b"\xff.toml"), *more)
        assert (done.code, done.err) == (1, "")
        assert "\ufffd.toml" in done.out
        done.out.encode()  # as a terminal takes it
        assert "there is no such file: write a first one" in done.out


def test_patterns_that_are_given_one_by_one_all_hold(command: Command) -> None:
    """A deny that was silently dropped would let in."""
    _, out, _ = command(
        "create", "--user", USER, "--json",
        "--allow", "public/a", "public/b", "--allow", "public/c", "--deny", "public/x", "--deny", "public/y",
    )  # fmt: skip
    record = json.loads(out)
    assert (record["allow"], record["deny"]) == (["public/a", "public/b", "public/c"], ["public/x", "public/y"])


@pytest.mark.parametrize(
    ("lifetime", "advice"),
    [
        ("1y", "'1y' is not a duration: write a number and"),
        ("30", "'30' is not a duration: write a number and"),
        ("soon", "'soon' is not a duration: write a number and"),
        ("0d", """'0d' is not a lifetime: write whole seconds, one or more, such as "90s" or "30d\""""),
        ("1.5s", "'1.5s' is not a lifetime: write whole seconds, one or more"),
        ("5300w", """'5300w' is too long: write at most "36500d\""""),
    ],
)
def test_lifetime_that_is_none_is_wrong_usage_with_advice(command: Command, lifetime: str, advice: str) -> None:
    code, out, told = command("create", "--user", USER, "--expires", lifetime)
    assert (code, out) == (2, "")
    assert advice in told


def test_table_says_in_what_state_each_key_is(command: Command, tmp_path: Path) -> None:
    """Its columns are straight on a terminal, where a Chinese character is two columns wide."""
    with KeyRegistry(tmp_path / "keys.db") as registry:
        registry.create(USER, "生产环境")
        registry.create(USER, "old", expires_in_s=60, now=lambda: 1000.0)
        registry.create(USER, "off")
        registry.change(id_of(registry, 2), enabled=False)
        registry.create("u-2200b", "late")
        registry.mark_user("u-2200b", suspended=True)
    _, out, _ = command("list")
    head, *rows = out.splitlines()
    assert [re.split(r"  +", row)[3] for row in rows] == ["enabled", "expired", "disabled", "suspended"]
    assert [row.index(state) for row, state in zip(rows[1:], ("expired", "disabled", "suspended"), strict=True)] == [
        head.index("STATE")
    ] * 3
    assert rows[0].index("enabled") == head.index("STATE") - 4


@pytest.mark.parametrize("command", [["schema"], ["check", "routes.toml"]], ids=["more than a buffer", "less"])
def test_reader_that_has_enough_of_a_table_gets_no_complaint(command: list[str]) -> None:
    """As `head` does; and a failure is still told by the exit code."""
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with os.fdopen(writer, "w") as output:
        done = subprocess.run(
            [sys.executable, "-m", "edge", *command],
            stdout=output, stderr=subprocess.PIPE, text=True, check=False, env=buffered,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_output_that_cannot_be_written_is_a_failure() -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "edge", "check", "routes.toml"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=buffered,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "edge: [Errno 28] No space left on device\n")


def test_command_does_its_work_without_a_standard_output() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -m edge check routes.toml >&-', sys.executable], stderr=subprocess.PIPE, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_commands_at_once_lose_nothing(command: Command, tmp_path: Path) -> None:
    """Two operators, or an operator and a script: each change is there, and revoking twice says so once."""
    command("list")
    path = str(tmp_path / "routes.toml")

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "edge", "keys", *arguments, "--config", path],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    creating = [start("create", "--user", f"u-{number}", "--json") for number in range(4)]
    ids = [json.loads(process.communicate()[0])["id"] for process in creating]
    assert sorted(record["id"] for record in json.loads(command("list", "--json")[1])) == sorted(ids)
    revoking = [start("revoke", ids[0]) for _ in range(2)]
    told = [process.communicate() for process in revoking]
    assert sorted(process.returncode for process in revoking) == [0, 1]
    assert (
        "".join(err for _, err in told) == f"edge: {ids[0]} is revoked and stays so: create a new key for this user\n"
    )


# --- the store is down


@pytest.fixture
async def impatient(start_edge: StartEdge, simulator: Simulator) -> Edge:
    """An edge that believes the store for a moment only, so that every request asks it again."""
    routes = ROUTES.replace("{upstream}", simulator.url)
    return await start_edge(routes, keys='cache_ttl = "1ms"\nnegative_ttl = "1ms"\nstale_for = "1h"')


def delete(edge: Edge) -> None:
    for suffix in ("", "-wal", "-shm"):
        edge.keys_path.with_name(edge.keys_path.name + suffix).unlink(missing_ok=True)


def damage(edge: Edge) -> None:
    with sqlite3.connect(edge.keys_path) as connection:
        connection.execute("DROP TABLE keys")
    connection.close()


@pytest.mark.parametrize("harm", [delete, damage])
async def test_store_that_is_gone_lets_known_keys_go_on_and_nobody_else_in(
    impatient: Edge, simulator: Simulator, harm: Callable[[Edge], None]
) -> None:
    """Unknown is 503 `key_store_unavailable`, never 401: an SDK gives up on a 401. A running stream is untouched."""
    edge = impatient
    with KeyRegistry(edge.keys_path) as registry:
        new, _ = registry.create("u-2200b")
    body: dict[str, Any] = {**BODY, "stream": True, "simulate": {"tokens": 50, "interval_ms": 10}, "seed": 1}
    *_, expected = await edge.ask(body)
    client = await edge.connect()
    client.send(edge.request(body))
    await simulator.wait_for(lambda: len(simulator.requests) == 2)
    harm(edge)
    async with asyncio.timeout(PATIENCE_S):
        while edge.server.authenticator.counts.failures < 3:
            assert await status_of(edge) == 200
    for key in (new, "sk-never-heard-of"):
        status, headers, answer = await edge.ask(BODY, key=key)
        assert (status, json.loads(answer)["error"]["code"]) == (503, "key_store_unavailable")
        assert int(headers["retry-after"]) >= 1
        assert headers.get("x-should-retry") != "false"
        assert str(edge.keys_path).encode() not in answer
    status, _, received = await client.response()
    assert (status, received) == (200, expected)
    assert await status_of(edge) == 200
    assert edge.server.readiness.ready
    await edge.consistent()
    assert {line["end"] for line in await edge.log() if line["status"] == 200} == {"complete"}


async def test_store_that_comes_back_is_asked_again(impatient: Edge) -> None:
    """Without a restart; what changed meanwhile holds."""
    edge = impatient
    assert await status_of(edge) == 200
    with KeyRegistry(edge.keys_path) as registry:
        gone, record = registry.create("u-2200b")
        assert await status_of(edge, gone) == 200
        registry.revoke(record.id)
        new, _ = registry.create("u-3300c")
        copy = sqlite3.connect(edge.keys_path.with_name("copy.db"))
        registry._connection.backup(copy)
        copy.close()
    delete(edge)
    async with asyncio.timeout(PATIENCE_S):
        while await status_of(edge, "sk-never-heard-of") != 503:
            pass
    edge.keys_path.with_name("copy.db").rename(edge.keys_path)
    await until_status(edge, 200, (503,), new)
    assert await status_of(edge) == 200
    assert await status_of(edge, gone) == 401


def test_limit_of_a_key_must_be_one_of_the_file(tmp_path: Path) -> None:
    """Who sets a limit must not believe in one that does not hold."""
    text = '[limits.small]\nrequests_per_minute = 1\n[pools.p]\nendpoints = ["http://p"]\n[routes.r]\npool = "p"\n'
    (tmp_path / "routes.toml").write_text(text)
    command = ("keys", "create", "--user", USER, "--json", "--limit")
    made = command_here(*command, "small", cwd=tmp_path)
    assert json.loads(made.out)["limit"] == "small"
    shared = command_here(*command, "small", "--share", "4", cwd=tmp_path)
    assert json.loads(shared.out)["share"] == 4
    refused = command_here(*command, "small", "--share", "0", cwd=tmp_path)
    assert (refused.code, "1 to 1000" in refused.err) == (1, True)
    refused = command_here(*command, "smal", cwd=tmp_path)
    assert (refused.code, refused.err) == (1, "edge: there is no limit 'smal' in routes.toml: use small\n")
