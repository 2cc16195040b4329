"""What `edge check` proves beyond the text of routes.toml: that what the file names can be used on this machine."""

import contextlib
import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal, NamedTuple

from edge.config.positions import KeyPath
from edge.config.process_settings import TlsConfig
from edge.config.settings import Config
from edge.errors import Unusable
from edge.process.certificates import authorities, read_authority, read_certificate
from edge.tls import client_tls

_SOON_S: Final = 14 * 86400  # a certificate that is renewed by itself is, a month before its end


class Finding(NamedTuple):
    """What is wrong with what a key names."""

    at: KeyPath
    message: str
    severity: Literal["error", "warning"] = "error"


def prove(config: Config) -> Iterator[Finding]:
    """Yield what a start would refuse or clients would, though the file is sound: certificates and directories."""
    if config.server.tls is not None:
        yield from _prove_certificate(config.server.tls)
    for at, ca_file in authorities(config):
        try:
            client_tls(ca_file, "")
        except Unusable:
            yield Finding(at, "has no certificate in it: write the path of a PEM file with the authority's")
        with contextlib.suppress(OSError, ValueError):
            _, ends_at = read_authority(ca_file)
            if ends_at <= time.time():
                what = f"has a certificate that ended on {_date(ends_at)}: servers that it proves are not asked"
                yield Finding(at, f"{what}, write a new one", "warning")
    for index, address in enumerate((*config.server.listen, config.server.admin)):
        if address.path is not None:
            key = ("listen", index) if index < len(config.server.listen) else ("admin",)
            yield from _prove_parent(("server", *key), address.path)
    if config.keys.store.path is not None:
        yield from _prove_parent(("keys", "store"), config.keys.store.path)
    yield from _prove_journal(config.usage.journal)
    if config.server.traces and not _is_there("opentelemetry.exporter.otlp.proto.http"):
        yield Finding(("server", "traces"), 'needs packages that are not installed: pip install "edge[otel]"')


def _prove_certificate(tls: TlsConfig) -> Iterator[Finding]:
    at: KeyPath = ("server", "tls", "certificate")
    try:
        certificate = read_certificate(tls)
    except Unusable as error:
        yield Finding(
            ("server", "tls"), f"{str(error).removeprefix('server.tls: ')}: write the files of one pair, as PEM"
        )
        return
    now, end = time.time(), _date(certificate.ends_at)
    if certificate.ends_at <= now:
        yield Finding(at, f"ended on {end}, so clients refuse it: write a new one")
    elif certificate.begins_at > now:
        yield Finding(at, f"begins on {_date(certificate.begins_at)}, so clients refuse it: write one of today")
    elif certificate.ends_at < now + _SOON_S:
        yield Finding(at, f"ends on {end}: write a new one before", "warning")


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # nor what it is in
        return False


def _date(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_s))


def _prove_parent(at: KeyPath, path: Path) -> Iterator[Finding]:
    """Prove that a file can be made in its directory, which nobody makes."""
    parent = path.parent
    if not parent.is_dir():
        yield Finding(at, f"the directory {str(parent)!r} is missing: create it, or write another path")
    elif path.is_dir():
        yield Finding(at, "is a directory: write the path of a file in it")
    elif not os.access(parent, os.W_OK | os.X_OK):
        yield Finding(at, f"this user may not write in {str(parent)!r}: give it the right, or write another path")


def _prove_journal(directory: Path) -> Iterator[Finding]:
    """Prove that the journal can be kept where it is to be: it makes its directories itself."""
    at: KeyPath = ("usage", "journal")
    there = next(each for each in (directory, *directory.absolute().parents) if each.exists())
    if not there.is_dir():
        yield Finding(at, f"{str(there)!r} is a file: write the path of a directory")
    elif not os.access(there, os.W_OK | os.X_OK):
        yield Finding(at, f"this user may not write in {str(there)!r}: give it the right, or write another path")
