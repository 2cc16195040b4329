"""What `edge check` finds in what a sound file names."""

from datetime import timedelta
from pathlib import Path

import pytest
import trustme

from edge.__main__ import main
from edge.process import proof
from tests.process.test_certificates import NOW, write

TLS = '[server]\ntls = { certificate = "tls.crt", private_key = "tls.key" }\n'
ROUTE = '[pools.p]\nendpoints = ["http://p:8000"]\n[routes.r]\npool = "p"\n'


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def checked(text: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The exit code of `edge check`, and what it prints of a file with this text and a route."""
    Path("routes.toml").write_text(text + ROUTE)
    code = main(["check"])
    return code, capsys.readouterr().out.splitlines()


def test_certificate_that_is_good_is_no_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    assert checked(TLS, capsys) == (0, ["routes.toml: ok, 1 routes, 1 pools"])


def test_certificate_that_has_ended_fails_and_one_that_soon_will_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, soon = NOW - timedelta(days=1), NOW + timedelta(days=3)
    write(tmp_path, ends=ended)
    what = f"ended on {ended:%Y-%m-%d %H:%M} UTC, so clients refuse it: write a new one"
    assert checked(TLS, capsys) == (1, [f"routes.toml:2: server.tls.certificate: {what}"])
    write(tmp_path, ends=soon)
    code, (warning, ok) = checked(TLS, capsys)
    assert (code, ok) == (0, "routes.toml: ok, 1 routes, 1 pools")
    what = f"ends on {soon:%Y-%m-%d %H:%M} UTC: write a new one before"
    assert warning == f"routes.toml:2: server.tls.certificate: warning: {what}"


def test_authority_that_has_ended_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    text = '[pools.q]\nendpoints = ["https://q"]\nca_file = "ca.pem"\n[routes.q]\npool = "q"\n'
    assert checked(text, capsys)[0] == 0
    ended = NOW - timedelta(days=1)
    monkeypatch.setattr(proof, "read_authority", lambda ca_file: (0.0, ended.timestamp()))
    code, (warning, _) = checked(text, capsys)
    what = f"has a certificate that ended on {ended:%Y-%m-%d %H:%M} UTC: servers that it proves are not asked"
    assert (code, warning) == (0, f"routes.toml:3: pools.q.ca_file: warning: {what}, write a new one")


def test_traces_without_the_packages_are_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "find_spec", lambda name: None)
    code, (problem,) = checked('[server]\ntraces = "http://127.0.0.1:4318/v1/traces"\n', capsys)
    what = 'needs packages that are not installed: pip install "edge[otel]"'
    assert (code, problem) == (1, f"routes.toml:2: server.traces: {what}")


def test_key_of_another_certificate_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    write(tmp_path, "other")
    code, [problem] = checked(TLS.replace("tls.key", "other.key"), capsys)
    assert code == 1
    assert problem.startswith("routes.toml:2: server.tls: the certificate and key cannot be used (they are no pair)")


@pytest.mark.parametrize(
    ("text", "at", "message"),
    [
        ('[keys]\nstore = "sqlite:data/edge.db"\n', "keys.store", "the directory 'data' is missing: create it, or"),
        ('[keys]\nstore = "sqlite:folder"\n', "keys.store", "is a directory: write the path of a file in it"),
        (
            '[server]\nlisten = ["127.0.0.1:1", "unix:run/e.sock"]\n',
            "server.listen[1]",
            "the directory 'run' is missing",
        ),
        ('[server]\nadmin = "unix:run/a.sock"\n', "server.admin", "the directory 'run' is missing"),
        ('[usage]\njournal = "file"\n', "usage.journal", "is a file: write the path of a directory"),
        ('[usage]\njournal = "file/below"\n', "usage.journal", "is a file: write the path of a directory"),
        ('[keys]\nstore = "https://h/"\nstore_ca_file = "file"\n', "keys.store_ca_file", "has no certificate in it"),
    ],
)
def test_what_a_start_would_refuse_is_found(
    text: str, at: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("folder").mkdir()
    Path("file").write_text("no certificate")
    code, [problem] = checked(text, capsys)
    assert code == 1
    assert f": {at}: " in problem
    assert message in problem


def test_journal_makes_its_own_directories(capsys: pytest.CaptureFixture[str]) -> None:
    assert checked('[usage]\njournal = "data/usage"\n', capsys)[0] == 0
