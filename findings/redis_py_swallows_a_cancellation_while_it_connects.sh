#!/usr/bin/env bash
# redis-py (asyncio): a cancellation that comes while the first command opens its connection can be lost.
#
# A command is cancelled after each number of turns of the loop, against a listener that accepts and never answers. In a
# few of those turns, on CPython 3.11, the task is neither cancelled nor failed: the command goes on to wait for its
# answer, up to `socket_timeout`. Whoever cancels such a task once, as a TaskGroup does, waits as long. Cancelling again
# until the task is done helps. Seen with redis 8.1.0 on CPython 3.11.7: turns 6, 7 and 8 of 40.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check redis==8.1.0
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import sys

import redis
from redis.asyncio import Redis

TURNS = 40


class Silent(asyncio.Protocol):
    """Accepts, and never answers."""


async def lost(port: int, turns: int) -> bool:
    client = Redis(host="127.0.0.1", port=port, socket_timeout=20, socket_connect_timeout=20)
    command = asyncio.ensure_future(client.ping())
    for _ in range(turns):
        await asyncio.sleep(0)
    command.cancel()
    done, _ = await asyncio.wait((command,), timeout=1)
    while not command.done():
        command.cancel()
        await asyncio.wait((command,), timeout=0.1)
    await client.aclose()
    return not done


async def main() -> list[int]:
    server = await asyncio.get_running_loop().create_server(Silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    return [turns for turns in range(TURNS) if await lost(port, turns)]


swallowed = asyncio.run(main())
print(f"redis {redis.__version__}, CPython {sys.version.split()[0]}: lost when cancelled in the turns {swallowed} of {TURNS}")
assert swallowed, "the behaviour has changed: no cancellation is lost"
PYTHON
