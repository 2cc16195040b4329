"""The listener's certificate: shown to clients, and what it says of itself; and when every other one ends."""

import asyncio
import contextlib
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from prometheus_client.core import GaugeMetricFamily, Metric

from edge.config.positions import KeyPath
from edge.config.process_settings import TlsConfig
from edge.config.settings import Config
from edge.errors import Unusable

_NO_CHECK_TIME: Final = (
    0x200000  # X509_V_FLAG_NO_CHECK_TIME of X509_VERIFY_PARAM_set_flags(3), which ssl has no name for
)
_MOST_STEPS: Final = 10  # a handshake takes four


@dataclass(frozen=True, slots=True)
class Certificate:
    """The names of a certificate, and its validity in Unix seconds."""

    names: tuple[str, ...]
    begins_at: float
    ends_at: float


class Expiry(NamedTuple):
    """When a certificate ends, of the setting `of`, in Unix seconds; of a file of authorities the first that does."""

    of: str
    names: tuple[str, ...]
    begins_at: float
    ends_at: float


class Certificates:
    """The certificates that the file in force names."""

    def __init__(self) -> None:
        self.known: list[Expiry] = []

    async def read(self, config: Config) -> None:
        """Read them, on a thread: a handshake takes milliseconds."""
        has_any = config.server.tls is not None or any(authorities(config))
        self.known = await asyncio.to_thread(lambda: list(_expiries(config))) if has_any else []

    def metrics(self) -> Iterator[Metric]:
        """Yield when each ends."""
        text = "When a certificate ends, Unix time."
        ends = GaugeMetricFamily("edge_certificate_expiry_timestamp_seconds", text, labels=("certificate",))
        for each in self.known:
            ends.add_metric((each.of,), each.ends_at)
        yield ends


def _expiries(config: Config) -> Iterator[Expiry]:
    """Yield what can be read: a file that is half replaced now is read again with the next reload."""
    tls = config.server.tls
    if tls is not None:
        with contextlib.suppress(Unusable):
            own = read_certificate(tls)
            yield Expiry("server.tls", own.names, own.begins_at, own.ends_at)
    for of, ca_file in authorities(config):
        with contextlib.suppress(OSError, ValueError):
            begins_at, ends_at = read_authority(ca_file)
            yield Expiry(".".join(map(str, of)), (), begins_at, ends_at)


def read_authority(ca_file: Path) -> tuple[float, float]:
    """Return when the first certificate of a file of authorities to end began and ends, in Unix seconds.

    Raises: `OSError`, `ValueError` for a file without any.
    """
    read = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    read.load_verify_locations(ca_file)
    valid = [
        [ssl.cert_time_to_seconds(str(each[name])) for name in ("notAfter", "notBefore")]
        for each in read.get_ca_certs()
    ]
    ends_at, begins_at = min(valid)
    return begins_at, ends_at


def authorities(config: Config) -> Iterator[tuple[KeyPath, Path]]:
    """Yield the files of authorities by which servers are proved, each with its place in routes.toml."""
    named: tuple[tuple[KeyPath, Path | None], ...] = (
        (("keys", "store_ca_file"), config.keys.store_ca_file),
        (("jwt", "ca_file"), config.jwt.ca_file if config.jwt is not None else None),
        (("usage", "sink_ca_file"), config.usage.sink_ca_file),
        (("shared", "redis_ca_file"), config.shared.redis_ca_file),
        *((("pools", name, "ca_file"), pool.ca_file) for name, pool in config.pools.items()),
    )
    yield from ((at, ca_file) for at, ca_file in named if ca_file is not None)


def listener_tls(tls: TlsConfig) -> ssl.SSLContext:
    """Return the TLS settings towards clients; raises `Unusable` when its files cannot be used."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, tls)
    return context


def load_certificate(context: ssl.SSLContext, tls: TlsConfig) -> None:
    """Let a context show a certificate; raises `Unusable`, and may have half of it then."""
    try:
        context.load_cert_chain(tls.certificate, tls.private_key, _no_passphrase)
    except (OSError, ssl.SSLError) as error:
        raise Unusable(f"server.tls: the certificate and key cannot be used ({_reason(error)})") from None


def _no_passphrase() -> str:
    """Answer OpenSSL, which would ask the terminal for the passphrase of an encrypted key, and wait."""
    raise Unusable("server.tls: private_key is encrypted: write it without its passphrase (openssl pkey)")


def _reason(error: OSError) -> str:
    if not isinstance(error, ssl.SSLError):
        return str(error.strerror)
    return "they are no pair" if error.reason == "KEY_VALUES_MISMATCH" else "one of them is no PEM file of that"


def read_certificate(tls: TlsConfig) -> Certificate:
    """Return what a client sees of the certificate; raises `Unusable` when it and its key are no pair.

    The standard library shows the fields of a certificate to a peer alone, so a handshake is made in memory: it proves
    the pair as well. The client trusts this very certificate, whatever the time is.
    """
    server = listener_tls(tls)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags(_NO_CHECK_TIME)
    try:
        client.load_verify_locations(tls.certificate)
        seen = _shake_hands(client, server)
        return Certificate(
            tuple(str(name) for _, name in seen.get("subjectAltName", ())),
            ssl.cert_time_to_seconds(seen["notBefore"]),
            ssl.cert_time_to_seconds(seen["notAfter"]),
        )
    except (OSError, KeyError, ValueError) as error:
        raise Unusable(f"server.tls: the certificate cannot be read ({error})") from None


def _shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> Mapping[str, Any]:
    """Return the server's certificate as its client decodes it; raises `ssl.SSLError`."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for side in (ours, theirs) * (_MOST_STEPS // 2):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return ours.getpeercert() or {}
