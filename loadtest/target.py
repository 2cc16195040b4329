"""Where a load goes, as whom, and with what: the options that `run` and `soak` share."""

import argparse
import importlib.util
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from loadtest.client import Address
from loadtest.workload import raw_request

_MODEL: Final = "u-1100a15812cc/qwen2"


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, and as whom; raises `ValueError` for what is no URL of HTTP."""

    url: str
    key: str
    host: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        _ = parts.port  # raises too
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ValueError(f"target {self.url!r}: write http://host:port")
        parts.hostname.encode("idna")  # raises one too

    def address(self) -> Address:
        """Return the address to connect to."""
        parts = urlsplit(self.url)
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        return Address(parts.hostname or "", parts.port or (443 if tls else 80), tls)

    def request(self, kind: str, body: bytes) -> bytes:
        """Return a raw request; a path in the URL takes the place of `/v1`."""
        parts = urlsplit(self.url)
        base_path = parts.path.rstrip("/") or "/v1"
        return raw_request(kind, body, host=self.host or parts.netloc, key=self.key, base_path=base_path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that tell the target, and where results go."""
    add = parser.add_argument
    add("--target", default="http://127.0.0.1:8080", metavar="URL", help="default: %(default)s")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY", ""), metavar="KEY", help="default: $OPENAI_API_KEY")
    add("--host", metavar="NAME", help="the Host header, when it is not the URL's")
    add("--model", default=_MODEL, metavar="NAME", help="default: %(default)s, which has no limits in `edge demo`")
    add("--save-result", type=_output, metavar="FILE", help="the numbers as JSON")
    add("--html", type=_page, metavar="FILE", help="a page with plots")


def at_least(lowest: int) -> Callable[[str], int]:
    """Return what reads a count that is no lower, for argparse."""

    def count(text: str) -> int:
        number = int(text)
        if number < lowest:
            raise argparse.ArgumentTypeError(f"at least {lowest}")
        return number

    return count


positive: Final = at_least(1)


def _output(text: str) -> Path:
    """Return a path, unless it is known before an hour of load that nothing can be written there."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a directory")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is no directory")
    return path


def _page(text: str) -> Path:
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install -e '.[loadtest]'")
    return _output(text)
