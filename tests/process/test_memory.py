"""Large blocks of the C library."""

import platform

import pytest

from edge.process.memory import map_large_blocks


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_large_blocks_are_mapped_with_glibc() -> None:
    assert map_large_blocks()
