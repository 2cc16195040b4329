"""What a certificate says of itself, and when it is none."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from edge.config.process_settings import TlsConfig
from edge.errors import Unusable
from edge.process.certificates import read_certificate

NOW = datetime.now(UTC).replace(microsecond=0)


def write(directory: Path, name: str = "tls", ends: datetime = NOW + timedelta(days=90)) -> TlsConfig:
    """Make the files of a certificate that ends then."""
    made = trustme.CA().issue_cert("chat.d.run", "10.0.0.1", not_before=NOW - timedelta(days=100), not_after=ends)
    certificate, key = directory / f"{name}.crt", directory / f"{name}.key"
    certificate.write_bytes(b"".join(each.bytes() for each in made.cert_chain_pems))
    key.write_bytes(made.private_key_pem.bytes())
    return TlsConfig(certificate, key)


@pytest.mark.parametrize("ends", [NOW + timedelta(days=90), NOW - timedelta(days=1)], ids=["good", "ended"])
def test_names_and_times_are_read_also_of_one_that_has_ended(tmp_path: Path, ends: datetime) -> None:
    found = read_certificate(write(tmp_path, ends=ends))
    assert found.names == ("chat.d.run", "10.0.0.1")
    assert found.begins_at == (NOW - timedelta(days=100)).timestamp()
    assert found.ends_at == ends.timestamp()


def test_key_of_another_certificate_is_no_pair(tmp_path: Path) -> None:
    one, other = write(tmp_path), write(tmp_path, "other")
    with pytest.raises(Unusable, match="they are no pair"):
        read_certificate(TlsConfig(one.certificate, other.private_key))


def test_files_that_are_swapped_are_no_pem_of_that(tmp_path: Path) -> None:
    tls = write(tmp_path)
    with pytest.raises(Unusable, match="no PEM file of that"):
        read_certificate(TlsConfig(tls.private_key, tls.certificate))


def test_encrypted_key_is_refused_and_no_passphrase_is_asked_for(tmp_path: Path) -> None:
    tls = write(tmp_path)
    key = serialization.load_pem_private_key(tls.private_key.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"passphrase")
    form = serialization.PrivateFormat.PKCS8
    tls.private_key.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, encryption))
    with pytest.raises(Unusable, match="private_key is encrypted"):
        read_certificate(tls)
