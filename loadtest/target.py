"""Where a load goes, as whom, and with what: the options that `run` and `soak` share."""

import argparse
import importlib.util
import math
import os
import re
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from edge.config.values import seconds
from loadtest.client import Address
from loadtest.workload import raw_head, whole

_MODEL: Final = "u-1100a15812cc/qwen2"
_HEADER: Final = re.compile(r"([A-Za-z0-9!#$%&'*+.^_`|~-]+)(?:: *|=)([\x20-\x7e\xa0-\xff]*)")  # RFC 9110 section 5


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, and as whom; raises `ValueError` for what is no URL of HTTP.

    `headers` are added, or take the place of our own; `insecure`: any certificate will do.
    """

    url: str
    key: str
    host: str | None = None
    headers: Sequence[tuple[str, str]] = ()
    insecure: bool = False

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        _ = parts.port  # raises too
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ValueError(f"target {self.url!r}: write http://host:port")
        parts.hostname.encode("idna")  # raises one too

    def address(self) -> Address:
        """Return the address to connect to."""
        parts = urlsplit(self.url)
        tls = None
        if parts.scheme == "https":
            tls = ssl.create_default_context()
            if self.insecure:
                tls.check_hostname = False
                tls.verify_mode = ssl.CERT_NONE
        return Address(parts.hostname or "", parts.port or (443 if tls else 80), tls)

    def head(self, kind: str) -> bytes:
        """Return a request's head, for `workload.whole`; a path in the URL takes the place of `/v1`."""
        parts = urlsplit(self.url)
        return raw_head(
            kind,
            host=self.host or parts.netloc,
            key=self.key,
            base_path=parts.path.rstrip("/") or "/v1",
            headers=dict(self.headers),
            query=f"?{parts.query}" if parts.query else "",
        )

    def request(self, kind: str, body: bytes) -> bytes:
        """Return a raw request."""
        return whole(self.head(kind), body)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that tell the target, and where results go."""
    add = parser.add_argument
    add(
        "--target",
        nargs="+",
        default=["http://127.0.0.1:8080"],
        metavar="URL",
        help="several are asked in turn; default: http://127.0.0.1:8080",
    )
    add("--api-key", default=os.environ.get("OPENAI_API_KEY", ""), metavar="KEY", help="default: $OPENAI_API_KEY")
    add("--host", metavar="NAME", help="the Host header, when it is not the URL's")
    add(
        "--header",
        type=_header,
        action="append",
        default=[],
        metavar="'NAME: VALUE'",
        help="of every request, also as NAME=VALUE; may be repeated",
    )
    add("--insecure", action="store_true", help="trust any certificate")
    add("--model", default=_MODEL, metavar="NAME", help="default: %(default)s, which has no limits in `edge demo`")
    add("--save-result", type=output, metavar="FILE", help="the numbers as JSON")
    add("--html", type=_page, metavar="FILE", help="a page with plots")


def targets_of(arguments: argparse.Namespace) -> list[Target]:
    """Return where the load goes; raises `ValueError`."""
    more = (arguments.api_key, arguments.host, tuple(arguments.header), arguments.insecure)
    return [Target(url, *more) for url in arguments.target]


def at_least(lowest: int) -> Callable[[str], int]:
    """Return what reads a count that is no lower, for argparse."""

    def count(text: str) -> int:
        number = int(text)
        if number < lowest:
            raise argparse.ArgumentTypeError(f"at least {lowest}")
        return number

    return count


positive: Final = at_least(1)


def duration_s(text: str) -> float:
    """Return a duration in seconds, such as of `90s` or `1h`; a bare number is one already."""
    try:
        told = float(text)
    except ValueError:
        told = seconds(text)
    if not 0 < told < math.inf:
        raise argparse.ArgumentTypeError("above 0")
    return told


def output(text: str) -> Path:
    """Return a path, unless it is known before an hour of load that nothing can be written there."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a directory")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is no directory")
    return path


def _header(text: str) -> tuple[str, str]:
    found = _HEADER.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError("write 'Name: value'")
    return found[1], found[2]


def _page(text: str) -> Path:
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install -e '.[loadtest]'")
    return output(text)
