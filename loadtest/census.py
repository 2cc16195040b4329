"""Run a command of the edge that tells its tasks: `python -m loadtest.census FILE ARGUMENT...`.

At each SIGUSR1 the number of asyncio tasks that run is written to FILE, for whoever watches whether it grows.
"""

import asyncio
import os
import runpy
import signal
import sys
from pathlib import Path
from types import FrameType


def main() -> None:
    """Run `edge` with the arguments that are left."""
    file = Path(sys.argv[1])

    def write(number: int, frame: FrameType | None) -> None:
        tasks = len(asyncio.all_tasks(asyncio.get_running_loop()))
        fresh = file.with_suffix(".new")
        fresh.write_text(str(tasks))
        os.replace(fresh, file)

    signal.signal(signal.SIGUSR1, write)
    sys.argv = ["edge", *sys.argv[2:]]
    runpy.run_module("edge", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
