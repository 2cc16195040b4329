"""The event loop that a command runs on."""

import os
from collections.abc import Coroutine
from typing import Any, Final

import uvloop

_RESOLVER_THREADS: Final = 64


def run_to_end(main: Coroutine[Any, Any, None]) -> int:
    """Run `main` to its end and return the exit code 0.

    libuv resolves names on its threads, four by default. A name whose server is dead holds its thread for as long as
    the resolver is patient: a few such requests would keep every other name waiting.
    """
    os.environ.setdefault("UV_THREADPOOL_SIZE", str(_RESOLVER_THREADS))
    uvloop.run(main)
    return 0
