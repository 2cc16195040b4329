"""The listener's certificate: shown to clients, and what it says of itself."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from edge.config.settings import TlsConfig
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
