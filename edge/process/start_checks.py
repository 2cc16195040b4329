"""What the interpreter and its libraries must be before anything is served."""

import sys

from aiohttp import http_parser

from edge.errors import Unusable


def check_interpreter() -> None:
    """Raise `Unusable` where checks on which an edge relies would be missing."""
    # What `assert` checks is left out then: aiohttp looped for ever on a body (CVE-2025-69227).
    if sys.flags.optimize:
        raise Unusable("Python leaves checks out with -O or PYTHONOPTIMIZE: start the edge without them")
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise Unusable(
            "aiohttp runs without its C parser, which is strict where an edge must be: reinstall it as a wheel, and"
            " unset AIOHTTP_NO_EXTENSIONS"
        )
