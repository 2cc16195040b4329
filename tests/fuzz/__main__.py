"""Fuzz one target with atheris: `python -m tests.fuzz TARGET -max_total_time=60`; options are those of libFuzzer.

What was learned, and any input for which the property fails, stays in a directory of the target under the system's own
for temporary files, and the next run begins with it. Such an input is reported where it belongs, and is no seed before
the software that it breaks is mended.
"""

import logging
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import atheris

with atheris.instrument_imports(include=["edge"]):
    from tests.fuzz.mutations import mutated
    from tests.fuzz.targets import CORPUS, TARGETS, Target, seeds

_OWN_SHARE: Final = 0.7  # of the mutations; libFuzzer makes the others


def main() -> None:
    """Run until an input fails, or as long as the options say."""
    logging.disable()  # parsers warn of much
    name, *options = sys.argv[1:] or [""]
    if name not in TARGETS:
        sys.exit(f"usage: python -m tests.fuzz TARGET [-max_total_time=60]\ntargets: {', '.join(TARGETS)}")
    learned = Path(tempfile.gettempdir()) / "edge-fuzz" / name
    learned.mkdir(parents=True, exist_ok=True)
    words = learned.with_suffix(".words")
    words.write_text(dictionary(TARGETS[name]))
    directories = [str(learned), str(CORPUS / name)]
    atheris.Setup(
        [sys.argv[0], f"-dict={words}", f"-artifact_prefix={learned}-", "-timeout=20", *options, *directories],
        TARGETS[name].check,
        custom_mutator=mutator(name),
    )
    atheris.Fuzz()


def mutator(name: str) -> Callable[[bytes, int, int], bytes]:
    """Return what changes an input of a target as its grammar suggests, or as libFuzzer does."""
    usual, words = seeds(name), TARGETS[name].words

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() >= _OWN_SHARE:
            return bytes(atheris.Mutate(data, max_size))
        return mutated(data if data and seed % 2 else chance.choice(usual), chance, usual, words)[:max_size]

    return mutate


def dictionary(target: Target) -> str:
    """Return the words of a target as libFuzzer reads them."""
    return "".join('"{}"\n'.format("".join(f"\\x{byte:02x}" for byte in word)) for word in target.words)


if __name__ == "__main__":
    main()
