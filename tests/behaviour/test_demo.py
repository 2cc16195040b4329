"""The commands as a person runs them: demo and serve in processes of their own, check and keys beside them."""

import asyncio
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge.config.problems import ConfigError
from edge.errors import Unusable
from edge.process.server import Server
from edge.simulator.dialects import answer_text
from edge.simulator.server import Simulator
from tests import command
from tests.command import Ran
from tests.conftest import ROUTES, USER

pytestmark = pytest.mark.usefixtures("no_environment")

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60  # for what takes a second on a machine that is not busy


async def run(*words: str | Path, cwd: Path | None = None) -> Ran:
    process = await asyncio.create_subprocess_exec(
        *words, cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


async def edge(*arguments: str | Path, cwd: Path | None = None) -> Ran:
    return await run(sys.executable, "-m", "edge", *arguments, cwd=cwd)


@dataclass
class Running:
    """A command that runs until a signal."""

    process: asyncio.subprocess.Process

    async def out_until(self, mark: str) -> str:
        """What it printed up to the line that contains `mark`."""
        assert self.process.stdout is not None
        return await self._read(self.process.stdout, mark)

    async def err_until(self, mark: str) -> str:
        """What it logged up to the line that contains `mark`."""
        assert self.process.stderr is not None
        return await self._read(self.process.stderr, mark)

    async def _read(self, stream: asyncio.StreamReader, mark: str) -> str:
        text = ""
        async with asyncio.timeout(PATIENCE_S):
            while mark not in text:
                line = await stream.readline()
                assert line, f"it ended without {mark!r}: {text}"
                text += line.decode()
        return text

    async def ended(self, number: int = signal.SIGTERM) -> int:
        """Its exit code after a signal."""
        self.process.send_signal(number)
        async with asyncio.timeout(PATIENCE_S):
            await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode


Start = Callable[..., Awaitable[Running]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Start `edge` commands; what still runs at the end is killed."""
    async with AsyncExitStack() as stack:

        async def begin(*arguments: str | Path, cwd: Path) -> Running:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "edge", *arguments,
                cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
                env={**os.environ, "PYTHONUNBUFFERED": ""},
            )  # fmt: skip

            async def end() -> None:
                if process.returncode is None:
                    process.kill()
                    await process.communicate()

            stack.push_async_callback(end)
            return Running(process)

        yield begin


# --- demo


async def test_demo_prints_snippets_that_work_as_pasted(start: Start, tmp_path: Path) -> None:
    demo = await start("demo", "--config", ROOT / "routes.toml", "--listen", "127.0.0.1:0", cwd=tmp_path)
    printed = await demo.out_until("One request a line follows")
    curl = re.search(r"^curl .*?'\n(?=\n)", printed, re.DOTALL | re.MULTILINE)
    python = re.search(r"^from openai .*?^print\(\)$", printed, re.DOTALL | re.MULTILINE)
    assert curl is not None
    assert python is not None
    assert shutil.which("curl"), "the snippet needs curl"
    with_curl, with_python = await asyncio.gather(
        run("sh", "-c", curl[0]), run(sys.executable, "-c", python[0], cwd=tmp_path)
    )
    assert with_curl.code == 0, with_curl.err
    assert with_curl.out.startswith('data: {"id":"chatcmpl-')
    assert with_curl.out.endswith("data: [DONE]\n\n")
    assert with_python.code == 0, with_python.err
    assert with_python.out == answer_text(64) + "\n"
    assert await demo.out_until("\n") == "\n"
    lines = [json.loads(await demo.out_until("\n")) for _ in range(2)]
    assert [(line["status"], line["end"]) for line in lines] == [(200, "complete")] * 2
    health = re.search(r"http://\S+/readyz", printed)
    assert health is not None
    assert (await run("curl", "-sf", health[0])).code == 0
    assert await demo.ended() == 0
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind


async def test_demo_on_a_taken_port_says_so(start: Start, tmp_path: Path, simulator: Simulator) -> None:
    taken = f"127.0.0.1:{simulator.port}"
    ran = await edge("demo", "--config", ROOT / "routes.toml", "--listen", taken, cwd=tmp_path)
    assert ran.code == 1
    assert taken in ran.err
    assert "Traceback" not in ran.err


async def test_interrupt_ends_the_demo_in_order(start: Start, tmp_path: Path) -> None:
    """As the signal of a service manager does, above."""
    demo = await start("demo", "--config", ROOT / "routes.toml", "--listen", "127.0.0.1:0", cwd=tmp_path)
    await demo.out_until("One request a line follows")
    assert await demo.ended(signal.SIGINT) == 0


# --- check, and serve on a bad file

BAD = """\
[server]
listen = "127.0.0.1:0"
max_bdy = "1MiB"
drain_timeout = "soon"

[pools.r1]
endpoints = ["ftp://127.0.0.1"]

[routes."public/deepseek-r1"]
pool = "r2"
"""


async def test_check_lists_every_problem_with_its_line_and_serve_the_same(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(BAD)
    checked = command.edge("check", "bad.toml", cwd=tmp_path)
    assert checked.code == 1
    lines = [line for line in (checked.out + checked.err).splitlines() if line.startswith("bad.toml:")]
    assert [int(line.split(":")[1]) for line in lines] == [3, 4, 7, 10]
    for line, words in zip(lines, ("max_body", "drain_timeout", "ftp", "r2"), strict=True):
        assert words in line
    served = await edge("serve", "--config", "bad.toml", cwd=tmp_path)
    assert served.code == 1
    assert [line for line in served.err.splitlines() if line.startswith("bad.toml:")] == lines
    assert "Traceback" not in served.err
    as_json = command.edge("check", "bad.toml", "--json", cwd=tmp_path)
    assert as_json.code == 1
    json.loads(as_json.out)


EXIT_CODES: tuple[tuple[int, tuple[str | Path, ...]], ...] = (
    (0, ("check", ROOT / "routes.toml")),
    (0, ("check", "--config", ROOT / "routes.toml")),
    (0, ("check", ROOT / "routes.toml", "--json")),
    (0, ("--help",)),
    (0, ("serve", "--help")),
    (1, ("check",)),
    (1, ("check", "none.toml")),
    (1, ("keys", "list")),
    (2, ()),
    (2, ("nothing",)),
    (2, ("check", "--nothing")),
    (2, ("serve", "--listen", "nowhere")),
    (2, ("keys",)),
    (2, ("keys", "create")),
    (2, ("keys", "revoke")),
    (2, ("keys", "disable")),
    (2, ("keys", "quota", "--user", "u-1")),
    (2, ("simulate", "--fault", "none")),
)


@pytest.mark.parametrize(("code", "arguments"), EXIT_CODES)
def test_exit_code_is_0_done_1_failed_2_wrong_usage(
    tmp_path: Path, code: int, arguments: tuple[str | Path, ...]
) -> None:
    """Whatever went wrong is said, without a stack."""
    ran = command.edge(*arguments, cwd=tmp_path)
    assert ran.code == code, ran
    assert ran.out if code == 0 else ran.err + ran.out


async def test_process_ends_with_the_exit_code_of_its_command(tmp_path: Path) -> None:
    for code, arguments in ((0, ("--help",)), (1, ("serve",)), (2, ("keys",))):
        ran = await edge(*arguments, cwd=tmp_path)
        assert ran.code == code, ran
        assert "Traceback" not in ran.err
        assert ran.out if code == 0 else ran.err


def test_shipped_catalogue_has_no_problem_and_no_warning() -> None:
    ran = command.edge("check", cwd=ROOT)
    assert (ran.code, ran.err, len(ran.out.splitlines())) == (0, "", 1)


# --- keys, end to end


async def status_of(url: str, key: str, model: str = "public/deepseek-r1") -> int:
    reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
    head = (
        f"GET /v1/models/{model.replace('/', '%2F')} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n\r\n"
    )
    writer.write(head.encode())
    status = int((await reader.readline()).split()[1])
    writer.close()
    return status


async def becomes(url: str, key: str, wanted: int) -> None:
    """Ask until a key is answered so."""
    async with asyncio.timeout(PATIENCE_S):
        while await status_of(url, key) != wanted:
            pass


@pytest.mark.parametrize(
    ("table", "setting"),
    [
        ('[usage]\njournal = "usage"\nsink = "https://h/u"\nsink_ca_file = "no.pem"', "usage.sink_ca_file"),
        ('[keys]\nstore = "https://h/k"\nstore_ca_file = "no.pem"', "keys.store_ca_file"),
        ('[pools.r1]\nendpoints = ["https://h"]\nca_file = "no.pem"', "pools.r1.ca_file"),
    ],
)
async def test_file_that_is_no_certificate_is_told_with_its_setting(tmp_path: Path, table: str, setting: str) -> None:
    (tmp_path / "no.pem").write_text("no certificate\n")
    listener = '[server]\nlisten = "127.0.0.1:0"\nadmin = "127.0.0.1:0"\n'
    routes = "" if "[pools" in table else '\n[pools.r1]\nendpoints = ["http://h"]'
    routes += '\n[routes."public/m"]\npool = "r1"\n'
    (tmp_path / "routes.toml").write_text(listener + table + routes)
    with pytest.raises((ConfigError, Unusable), match=f"{re.escape(setting)}: "):
        await Server(tmp_path / "routes.toml").run()


async def test_names_of_dead_servers_find_threads_enough(start: Start, tmp_path: Path) -> None:
    """A name that nobody answers for holds the thread that resolves it, and libuv has four unless it is told."""
    (tmp_path / "routes.toml").write_text(
        '[server]\nlisten = "127.0.0.1:0"\nadmin = "127.0.0.1:0"\n[pools.r1]\nendpoints = ["http://localhost:1"]\n'
        '[routes."public/deepseek-r1"]\npool = "r1"\n'
    )
    serving = await start("serve", cwd=tmp_path)
    address = re.search(r"listening on (127\.0\.0\.1:\d+)", await serving.err_until("listening on"))
    assert address is not None
    created = command.edge("keys", "create", "--user", USER, cwd=tmp_path)
    ran = await run(
        "curl", "-s", "-o", os.devnull, "-w", "%{http_code}", f"http://{address[1]}/v1/completions",
        "-H", f"Authorization: Bearer {created.out.strip()}", "-d", '{"model":"public/deepseek-r1"}',
        "-H", "Content-Type: application/json",
    )  # fmt: skip
    assert ran.out == "503"
    assert len(list(Path(f"/proc/{serving.process.pid}/task").iterdir())) > 64


async def test_keys_are_made_and_stopped_while_the_edge_runs(
    start: Start, simulator: Simulator, tmp_path: Path
) -> None:
    routes = ROUTES.replace("{upstream}", simulator.url)
    (tmp_path / "routes.toml").write_text(
        '[server]\nlisten = "127.0.0.1:0"\nadmin = "127.0.0.1:0"\nshutdown_delay = "0s"\n'
        f'[keys]\nstore = "sqlite:keys.db"\ncache_ttl = "1h"\nnegative_ttl = "1h"\n{routes}'
    )
    serving = await start("serve", cwd=tmp_path)
    logged = await serving.err_until("listening on")
    address = re.search(r"listening on (127\.0\.0\.1:\d+)", logged)
    assert address is not None
    url = f"http://{address[1]}"

    created = command.edge("keys", "create", "--user", USER, "--name", "laptop", "--json", cwd=tmp_path)
    record = json.loads(created.out)
    key, key_id = record["key"], record["id"]
    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{45}", key)
    narrow = command.edge("keys", "create", "--user", USER, "--allow", f"{USER}/*", cwd=tmp_path)
    narrow_key = narrow.out.strip()
    assert await status_of(url, key) == 200
    assert await status_of(url, narrow_key, f"{USER}/qwen2") == 200
    assert await status_of(url, narrow_key) == 404

    listed = command.edge("keys", "list", "--json", cwd=tmp_path)
    records = {each["id"]: each for each in json.loads(listed.out)}
    assert len(records) == 2
    assert (records[key_id]["user"], records[key_id]["name"], records[key_id]["enabled"]) == (USER, "laptop", True)
    table = command.edge("keys", "list", cwd=tmp_path)
    assert key_id in table.out
    for text in (listed.out, table.out, created.err, narrow.err, logged):
        assert key not in text
        assert narrow_key not in text

    # Both caches hold entries for an hour, so only word of the change can turn these answers.
    assert (command.edge("keys", "disable", key_id, cwd=tmp_path)).code == 0
    await becomes(url, key, 401)
    assert await status_of(url, narrow_key, f"{USER}/qwen2") == 200
    assert (command.edge("keys", "enable", key_id, cwd=tmp_path)).code == 0
    await becomes(url, key, 200)
    whole = command.edge("keys", "disable", "--user", USER, cwd=tmp_path)
    assert whole.code == 0
    await becomes(url, key, 401)
    await becomes(url, narrow_key, 401)
    assert (command.edge("keys", "enable", "--user", USER, cwd=tmp_path)).code == 0
    await becomes(url, key, 200)
    assert (command.edge("keys", "revoke", key_id, cwd=tmp_path)).code == 0
    await becomes(url, key, 401)
    unknown = command.edge("keys", "revoke", "none", cwd=tmp_path)
    assert (unknown.code, "Traceback" in unknown.err) == (1, False)
    assert (command.edge("keys", "enable", key_id, cwd=tmp_path)).code == 1  # revoked is for good
    assert await status_of(url, key) == 401
    assert await serving.ended() == 0
