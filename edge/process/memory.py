"""How the C library holds large blocks."""

import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1  # malloc.h of glibc
_M_MMAP_THRESHOLD: Final = -3
_LARGE_BYTES: Final = 1 << 20
_KEPT_BYTES: Final = 8 << 20


def map_large_blocks() -> bool:
    """Let each large block be a mapping of its own, which grows without a copy; return whether that is possible here.

    glibc raises its threshold to the largest block that was ever freed, up to 32 MiB (mallopt(3)). A body that grows
    past it would then be copied in one go, which takes 47 ms. Once one of its thresholds is set, it also gives back
    what is free at the end of the heap from 128 KiB on: a request of 400 kB would fault 200 pages in again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
    except (AttributeError, OSError):  # another C library
        return False
