"""Run a command of the edge with the interpreter's opcodes counted: `python loadtest/opcodes.py FILE ARGUMENT...`.

The count so far stands in FILE, as 8 bytes of this machine's order, for whoever reads it. Only the main thread counts,
which is the one that serves.
"""

import ctypes
import mmap
import runpy
import sys
from pathlib import Path
from types import FrameType
from typing import Any


def read(file: Path) -> int:
    """Return the count that stands in a file."""
    return int.from_bytes(file.read_bytes(), sys.byteorder)


def count(file: Path) -> None:
    """Count in a file from now on, in the frames that begin from now on."""
    file.write_bytes(bytes(8))
    with file.open("r+b") as opened:
        counted = ctypes.c_uint64.from_buffer(mmap.mmap(opened.fileno(), 8))

    def opcode(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            counted.value += 1
        return opcode

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return opcode

    # CPython 3.12 reports opcodes only where a frame had asked for them before the tracing began.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(call)


def main() -> None:
    """Run `edge` with the arguments that are left."""
    del sys.path[0]  # this directory, whose modules are a package's
    count(Path(sys.argv[1]))
    sys.argv = ["edge", *sys.argv[2:]]
    runpy.run_module("edge", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
