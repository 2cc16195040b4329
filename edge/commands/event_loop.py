"""The event loop that a command runs on."""

import logging
import os
from collections.abc import Coroutine
from typing import Any

import uvloop

from edge.tasks import Hung


def run_to_end(main: Coroutine[Any, Any, None]) -> int:
    """Run `main` to its end and return the exit code 0; what is `Hung` ends with the process, whose exit code is 1."""
    # libuv resolves names on its threads, four by default. A name whose server is dead holds its thread for as long as
    # the resolver is patient: a few such requests would keep every other name waiting.
    os.environ.setdefault("UV_THREADPOOL_SIZE", "64")
    uvloop.run(_exiting(main))
    return 0


async def _exiting(main: Coroutine[Any, Any, None]) -> None:
    try:
        await main
    except Hung:  # and logged; the loop and the interpreter would both wait for it
        logging.shutdown()
        os._exit(1)
