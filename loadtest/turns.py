"""Run a command of the edge with the turns of its loop measured: `python loadtest/turns.py FILE ARGUMENT...`.

The longest turn so far, in ns of CPU of the loop's thread, stands in FILE as 8 bytes of this machine's order; who reads
it may write zeros there, to begin anew. A turn is everything between two passes of a timer of 1 ms, which is due in
each turn of a busy loop: reads, callbacks, writes, page faults and collections of garbage alike.
"""

import asyncio
import ctypes
import mmap
import runpy
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

import uvloop

_TICK_S: Final = 0.001


def measure(file: Path) -> None:
    """Measure the running loop from now on."""
    file.write_bytes(bytes(8))
    with file.open("r+b") as opened:
        longest = ctypes.c_uint64.from_buffer(mmap.mmap(opened.fileno(), 8))
    loop = asyncio.get_running_loop()

    def tick(before_ns: int) -> None:
        now_ns = time.thread_time_ns()
        if now_ns - before_ns > longest.value:
            longest.value = now_ns - before_ns
        loop.call_later(_TICK_S, tick, time.thread_time_ns())

    tick(time.thread_time_ns())


def main() -> None:
    """Run `edge` with the arguments that are left."""
    del sys.path[0]  # this directory, whose modules are a package's
    file, run = Path(sys.argv[1]), uvloop.run

    async def measured(main: Coroutine[Any, Any, None]) -> None:
        measure(file)
        await main

    setattr(uvloop, "run", lambda main, **options: run(measured(main), **options))  # noqa: B010  # its type is generic
    sys.argv = ["edge", *sys.argv[2:]]
    runpy.run_module("edge", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
