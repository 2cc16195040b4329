"""Processes that end with the block that started them."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import aiohttp

_ENDS_WITHIN_S: Final = 20.0
_POLL_S: Final = 0.2


@asynccontextmanager
async def running(
    command: Sequence[object], ready_url: str, directory: Path, environment: Mapping[str, str], within_s: float
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a process in a group of its own, from its first answer at `ready_url` on; its output is in `directory`."""
    words = [str(word) for word in command]
    with (directory / "output").open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *words, stdout=output, stderr=output, cwd=directory, env=environment, start_new_session=True
        )
    try:
        await _ready(process, ready_url, within_s, directory / "output")
        yield process
    finally:
        await _ended(process)


async def _ready(process: asyncio.subprocess.Process, url: str, within_s: float, output: Path) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s), aiohttp.ClientSession() as session:
            while process.returncode is None:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(url) as answer:
                        if answer.status == 200:
                            return
                await asyncio.sleep(_POLL_S)
    raise SystemExit(f"{url} is not ready: {output.read_text(errors='replace')[-2000:]}")


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Ask a process to end, and take its whole group away once it has, or does not."""
    if process.returncode is None:
        process.terminate()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), _ENDS_WITHIN_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it started and left
    await process.wait()
