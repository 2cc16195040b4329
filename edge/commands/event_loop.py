"""The event loop that a command runs on."""

import os
from collections.abc import Coroutine
from typing import Any

import uvloop


def run_to_end(main: Coroutine[Any, Any, None]) -> int:
    """Run `main` to its end and return the exit code 0."""
    # libuv resolves names on its threads, four by default. A name whose server is dead holds its thread for as long as
    # the resolver is patient: a few such requests would keep every other name waiting.
    os.environ.setdefault("UV_THREADPOOL_SIZE", "64")
    uvloop.run(main)
    return 0
