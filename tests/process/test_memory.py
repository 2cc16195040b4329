"""Large blocks of the C library."""

import platform
import subprocess
import sys

import pytest

from edge.process.memory import map_large_blocks

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
FAULTS = """
import resource
from edge.process.memory import map_large_blocks

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def hold(letter):
    return [letter * size for size in (256_000, 144_000, 400_000)]

map_large_blocks()
hold(b"x")
before = faults()
for _ in range(50):
    hold(b"x")
print((faults() - before) // 50)
"""


def test_large_blocks_are_mapped_with_glibc() -> None:
    assert map_large_blocks()


def test_what_a_long_request_needs_is_not_faulted_in_again_for_the_next_one() -> None:
    """That takes as long as to read its body."""
    ran = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, check=True)
    assert int(ran.stdout) < 20
