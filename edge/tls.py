"""The TLS settings towards every server that the edge asks: certificates and host names are always checked."""

import ssl
from pathlib import Path

from edge.errors import Unusable


def client_tls(ca_file: Path | None, setting: str) -> ssl.SSLContext:
    """Return the context by which a server is proved, with the authority of a PEM file or, without one, the system's.

    Raises: `Unusable`, naming the setting: OpenSSL says neither which file it means nor what is wrong with it.
    """
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        reason = "no certificate in it" if isinstance(error, ssl.SSLError) else error.strerror
        raise Unusable(f"{setting}: {ca_file} cannot be used ({reason}): name a PEM file") from None
