"""Which tokens prove something, and where the keys come from; the issuer and its keys are real."""

import asyncio
import base64
import json
import time
import warnings
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from edge.config.process_settings import JwtConfig
from edge.errors import KeyStoreUnavailable
from edge.keys.stores.protocol import Invalidation
from edge.keys.tokens import JwksError, TokenRefused, TokenVerifier, read_key_set
from tests.issuer import (
    AUDIENCE,
    EC_KEY,
    ED_KEY,
    ISSUER,
    OTHER_RSA_KEY,
    RSA_KEY,
    USER,
    Issuer,
    claims,
    public_jwk,
    token,
)

ALGORITHMS = ("RS256", "ES256", "EdDSA")
PATIENCE_S = 20


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Scene:
    """A verifier that runs, its issuer and its clock."""

    def __init__(self, issuer: Issuer, **config: Any) -> None:
        self.issuer, self.clock = issuer, Clock()
        self.changes: list[Invalidation] = []
        self.config = JwtConfig(ISSUER, AUDIENCE, issuer.url, **{"algorithms": ALGORITHMS, **config})
        self.verifier = TokenVerifier(self.config, self.clock)
        self.verifier.on_change = self.changes.append

    async def refusal(self, given: str) -> str:
        with pytest.raises(TokenRefused) as refused:
            await self.verifier.verify(given)
        return str(refused.value)

    async def fetched(self) -> None:
        """Let the key set be fetched again now."""
        self.clock.now += 11
        before = self.issuer.fetches
        fetching = self.verifier._fetch_soon()
        assert fetching is not None
        await asyncio.wait((fetching,))
        assert self.issuer.fetches > before or self.issuer.harm == "dead"


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    issuer = await Issuer().start()
    scene = Scene(issuer)
    await scene.verifier.open()
    yield scene
    await scene.verifier.close()
    await issuer.close()


# --- what a token proves


@pytest.mark.parametrize("kid", ["rsa", "ec", "ed"])
async def test_token_of_each_algorithm_names_its_user(scene: Scene, kid: str) -> None:
    expires = int(time.time()) + 60
    given = token(kid, exp=expires)

    assert scene.verifier.claims(given)
    principal = await scene.verifier.verify(given)

    assert (principal.user, principal.allow, principal.deny) == (USER, (), ())
    assert principal.expires_at == expires + scene.config.leeway_s
    assert principal.id == f"jwt:{USER}"


async def test_claims_are_read_as_configured(scene: Scene) -> None:
    scene.verifier.reconfigure(replace(scene.config, user_claim="namespace", allow_claim="models"))
    for allowed in (["public/*", f"{USER}/**"], f"public/* {USER}/**"):
        principal = await scene.verifier.verify(token(sub="someone", namespace=USER, models=allowed))
        assert (principal.user, principal.allow) == (USER, ("public/*", f"{USER}/**"))
    assert (await scene.verifier.verify(token(namespace=USER))).allow == ()
    for wrong in ({"namespace": None}, {"namespace": 7}, {"namespace": "../x"}, {"models": 7}, {"models": ["[a]"]}):
        assert await scene.refusal(token(**{"namespace": USER, **wrong}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exp": int(time.time()) - 3600}, "expired"),
        ({"exp": None}, "not valid"),
        ({"exp": "soon"}, "not valid"),
        ({"exp": 1e400}, "not valid"),
        ({"exp": 10**400}, "not valid"),
        ({"exp": str(int(time.time()) + 10**6)}, "not valid"),
        ({"exp": True}, "expired"),
        ({"iat": int(time.time()) + 10**6}, "not valid"),
        ({"exp": None, "iat": None}, "not valid"),
        ({"nbf": int(time.time()) + 10**6}, "not valid"),
        ({"aud": "portal"}, "another audience"),
        ({"aud": None}, "not valid"),
        ({"iss": ISSUER + "x"}, "not valid"),
        ({"iss": ISSUER[:-1]}, "not valid"),
        ({"iss": None}, "not valid"),
        ({"sub": None}, "not valid"),
        ({"sub": ""}, "no user"),
        ({"sub": "9b2c0a4e-uuid_of_portal"}, "no user"),
        ({"sub": "U-UPPER"}, "no user"),
    ],
)
async def test_claims_that_are_wrong(scene: Scene, changes: dict[str, Any], message: str) -> None:
    assert message in await scene.refusal(token(**changes))


async def test_clocks_may_differ_by_the_leeway(scene: Scene) -> None:
    now = int(time.time())
    assert await scene.verifier.verify(token(exp=now - 20))
    assert await scene.verifier.verify(token(nbf=now + 20))
    scene.verifier.reconfigure(replace(scene.config, leeway_s=0))
    assert "expired" in await scene.refusal(token(exp=now - 20))


def by_hand(header: dict[str, Any], payload: dict[str, Any] | None = None, signature: bytes = b"x") -> str:
    parts = (json.dumps(header).encode(), json.dumps(payload or claims()).encode(), signature)
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


PEM = RSA_KEY.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)  # fmt: skip


def signed_with_the_public_key() -> str:
    """HS256 with the RSA public key as the secret: who accepts it lets everybody sign."""
    import hashlib
    import hmac

    unsigned = by_hand({"alg": "HS256", "kid": "rsa"}).rpartition(".")[0]
    signature = hmac.new(PEM, unsigned.encode(), hashlib.sha256).digest()
    return unsigned + "." + base64.urlsafe_b64encode(signature).rstrip(b"=").decode()


def tampered(part: int) -> str:
    parts = token().split(".")
    decoded = bytearray(base64.urlsafe_b64decode(parts[part] + "=="))
    decoded[len(decoded) // 2] ^= 1
    parts[part] = base64.urlsafe_b64encode(bytes(decoded)).rstrip(b"=").decode()
    return ".".join(parts)


def other_spelling() -> str:
    """The last character of a 256 byte signature has four bits that mean nothing: another text, the same bytes."""
    given = token()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return given[:-1] + alphabet[alphabet.index(given[-1]) ^ 1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: by_hand({"alg": "none"}),
        lambda: by_hand({"alg": "none", "kid": "rsa"}, signature=b""),
        lambda: by_hand({"alg": "None", "kid": "rsa"}),
        lambda: by_hand({"kid": "rsa"}),
        lambda: by_hand({"alg": ["RS256"], "kid": "rsa"}),
        lambda: by_hand({"alg": "RS256", "kid": 7}),
        lambda: by_hand({"alg": "RS256", "kid": "rsa"}),
        lambda: by_hand({"alg": "RS256", "kid": "rsa"}, signature=b""),
        signed_with_the_public_key,
        lambda: token(headers={"jku": "https://evil.example/jwks.json"}),
        lambda: token(headers={"x5u": "https://evil.example/cert.pem"}),
        lambda: token(headers={"jwk": public_jwk(RSA_KEY, "RS256", "rsa")}),
        lambda: token(headers={"x5c": ["MIIB"]}),
        lambda: token(headers={"crit": ["exp"], "exp": 1}),
        lambda: token(headers={"crit": ["b64"], "b64": True}),
        lambda: token("rsa", key=OTHER_RSA_KEY),
        lambda: token("unknown", key=OTHER_RSA_KEY, algorithm="RS256"),
        lambda: token("ec", key=RSA_KEY, algorithm="RS256"),
        lambda: token("rsa", key=EC_KEY, algorithm="ES256"),
        lambda: token("rsa", algorithm="RS512"),
        lambda: token("rsa", algorithm="PS256"),
        lambda: tampered(0),
        lambda: tampered(1),
        lambda: tampered(2),
        lambda: token() + "==",
        lambda: token() + "=",
        other_spelling,
        lambda: token().replace(".", ".."),
        lambda: by_hand({"alg": "RS256", "kid": "rsa", "x": [[]] * 5000}),
    ],
)
async def test_forged_token_proves_nothing(scene: Scene, make: Callable[[], str]) -> None:
    """RFC 8725: `none`, a confused algorithm, a key that the token brings along, two spellings of one token."""
    given = make()
    told = await scene.refusal(given)
    assert given not in told


@pytest.mark.parametrize(
    "header", [{"jku": "https://evil.example/"}, {"x5u": "x"}, {"jwk": {}}, {"x5c": []}, {"crit": ["exp"]}]
)
async def test_header_that_changes_what_proves_a_token_is_refused_before_anything_is_verified(
    scene: Scene, header: dict[str, Any]
) -> None:
    """Whatever the library makes of it: nothing here ever understands more than its own headers."""
    assert "has a header that is not accepted" in await scene.refusal(token(headers=header))


async def test_algorithm_is_one_that_is_configured_although_the_key_could_do_others(scene: Scene) -> None:
    """RFC 8725 section 3.1; a published key need not say what it is for."""
    keys = [public_jwk(RSA_KEY, "RS256", "rsa"), public_jwk(OTHER_RSA_KEY, "RS256", "pinned")]
    del keys[0]["alg"]
    scene.issuer.keys = keys
    await scene.fetched()
    assert await scene.verifier.verify(token("rsa"))
    for algorithm in ("RS384", "RS512", "PS256"):
        assert "in a way that is not accepted" in await scene.refusal(token("rsa", algorithm=algorithm))
    scene.verifier.reconfigure(replace(scene.config, algorithms=("RS256", "RS512")))
    await scene.fetched()
    assert await scene.verifier.verify(token("rsa", algorithm="RS512"))
    with_other = token("pinned", key=OTHER_RSA_KEY, algorithm="RS512")
    assert "in a way that its key is not for" in await scene.refusal(with_other)


async def test_token_may_name_the_very_key_set_that_is_configured(scene: Scene) -> None:
    assert await scene.verifier.verify(token(headers={"jku": scene.issuer.url}))


@pytest.mark.parametrize(
    "credential",
    [
        "sk-" + "k" * 45, "ey.ey.ey", "eyJ.x", "a.b.c", "eyJhbGciOiJSUzI1NiJ9.bm8.x",
        token(iss="https://other.example/"), by_hand({"alg": "RS256"}, {"iss": [ISSUER]}), "sk-a.b.c",
        "eyJhbGciOiJSUzI1NiJ9." + base64.urlsafe_b64encode(b"[1]").decode().rstrip("=") + ".x",
    ],
)  # fmt: skip
async def test_what_does_not_name_the_issuer_is_looked_up_as_a_key(scene: Scene, credential: str) -> None:
    assert not scene.verifier.claims(credential)


async def test_single_key_proves_tokens_that_name_none(scene: Scene) -> None:
    scene.issuer.keys = [public_jwk(RSA_KEY, "RS256", "only")]
    await scene.fetched()
    assert await scene.verifier.verify(token(None))


# --- the keys


async def test_new_key_is_fetched_when_a_token_names_it(scene: Scene) -> None:
    assert await scene.verifier.verify(token())
    new = token("new", key=OTHER_RSA_KEY, algorithm="RS256")
    scene.issuer.keys.append(public_jwk(OTHER_RSA_KEY, "RS256", "new"))
    assert await scene.refusal(new), "the keys were fetched a moment ago"
    scene.clock.now += 11
    assert await scene.verifier.verify(new)
    assert scene.issuer.fetches == 2
    assert scene.changes == [], "nothing was withdrawn"


async def test_made_up_key_ids_do_not_drive_the_fetching(scene: Scene) -> None:
    for number in range(50):
        await scene.refusal(token(f"made-up-{number}", key=OTHER_RSA_KEY, algorithm="RS256"))
    assert scene.issuer.fetches == 1
    scene.clock.now += 11
    made_up = [token(f"again-{number}", key=OTHER_RSA_KEY, algorithm="RS256") for number in range(50)]
    await asyncio.gather(*(scene.refusal(each) for each in made_up))
    assert scene.issuer.fetches == 2, "one fetch for all who wait"


async def test_withdrawn_key_proves_nothing_and_what_it_proved_is_named(scene: Scene) -> None:
    first = await scene.verifier.verify(token("ec"))
    scene.issuer.keys = [each for each in scene.issuer.keys if each["kid"] != "ec"]
    await scene.fetched()
    assert scene.changes == [Invalidation(proofs=frozenset((first.proof,)))]
    assert await scene.refusal(token("ec"))
    second = await scene.verifier.verify(token("rsa"))
    scene.issuer.keys[0] = public_jwk(OTHER_RSA_KEY, "RS256", "rsa")
    await scene.fetched()
    assert scene.changes[1:] == [Invalidation(proofs=frozenset((second.proof,)))], "another key under the same id"
    assert await scene.refusal(token("rsa"))


@pytest.mark.parametrize(
    "publish",
    [
        lambda issuer: setattr(issuer, "harm", "empty"),
        lambda issuer: setattr(issuer, "keys", [{**each, "use": "enc"} for each in issuer.keys]),
    ],
)
async def test_key_set_without_a_key_withdraws_all_of_them(
    scene: Scene, publish: Callable[[Issuer], None], caplog: pytest.LogCaptureFixture
) -> None:
    """It is an answer, and no failure to give one: an issuer whose keys were stolen says nothing else."""
    proofs = {(await scene.verifier.verify(token(kid))).proof for kid in ("rsa", "ec", "ed")}
    publish(scene.issuer)
    for _ in range(2):
        await scene.fetched()
    assert await scene.refusal(token())
    assert scene.changes == [Invalidation(proofs=frozenset(proofs))]
    assert (scene.verifier.key_count, scene.verifier.outage.reason) == (0, "")
    assert [record.levelname for record in caplog.records] == ["WARNING"], "once, not at each fetch"


@pytest.mark.parametrize("is_down", [True, False])
async def test_keys_of_a_set_that_a_reload_replaced_prove_nothing(scene: Scene, is_down: bool) -> None:
    """They may be withdrawn by now, and nobody asks any more."""
    proofs = {(await scene.verifier.verify(token(kid))).proof for kid in ("rsa", "ec", "ed")}
    other = Issuer()
    other.keys = [public_jwk(OTHER_RSA_KEY, "RS256", "new")]
    other.harm = "500" if is_down else ""
    await other.start()
    try:
        scene.verifier.reconfigure(replace(scene.config, jwks=other.url))
        assert scene.changes == [Invalidation(proofs=frozenset(proofs)), Invalidation(everything=True)]
        if is_down:
            with pytest.raises(KeyStoreUnavailable):
                await scene.verifier.verify(token())
        else:
            assert await scene.refusal(token())
            assert await scene.verifier.verify(token("new", key=OTHER_RSA_KEY, algorithm="RS256"))
    finally:
        await other.close()


@pytest.mark.parametrize("harm", ["500", "rubbish", "none", "huge", "redirect", "dead"])
async def test_issuer_that_is_down_leaves_the_last_keys(
    scene: Scene, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A token of an unknown key then gets no verdict: it may be a new one. One line in the log on each side."""
    assert await scene.verifier.verify(token())
    caplog.clear()
    scene.issuer.harm = harm
    if harm == "dead":
        await scene.issuer.close()
    for _ in range(2):
        await scene.fetched()
    assert await scene.verifier.verify(token())
    with pytest.raises(KeyStoreUnavailable):
        await scene.verifier.verify(token("new", key=OTHER_RSA_KEY, algorithm="RS256"))
    scene.issuer.harm = ""
    if harm == "dead":
        await scene.issuer.start()
    await scene.fetched()
    assert await scene.refusal(token("new", key=OTHER_RSA_KEY, algorithm="RS256"))
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


async def test_before_there_is_a_key_nobody_can_tell() -> None:
    issuer = Issuer()
    issuer.harm = "500"
    await issuer.start()
    scene = Scene(issuer)
    await scene.verifier.open()
    try:
        with pytest.raises(KeyStoreUnavailable):
            await scene.verifier.verify(token())
        issuer.harm = ""
        scene.clock.now += 11
        assert await scene.verifier.verify(token())
    finally:
        await scene.verifier.close()
        await issuer.close()


@pytest.mark.parametrize("harm", ["", "500"])
async def test_keys_are_fetched_again_and_again(scene: Scene, harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when they are wanted more often than may be, and while the issuer is down: a key may have been withdrawn."""
    monkeypatch.setattr("edge.keys.tokens._MIN_FETCH_INTERVAL_S", 0.01)
    scene.issuer.harm = harm
    scene.verifier.reconfigure(replace(scene.config, jwks_ttl_s=0.001))
    async with asyncio.timeout(PATIENCE_S):
        await scene.issuer.until_fetched(5)


async def test_reload_while_keys_are_fetched_fetches_those_of_the_new_set(scene: Scene) -> None:
    """What is on its way comes from where the keys were before."""
    other = Issuer()
    other.keys = [public_jwk(OTHER_RSA_KEY, "RS256", "new")]
    await other.start()
    try:
        assert await scene.verifier.verify(token())
        scene.clock.now += 11
        scene.verifier._fetch_soon()
        scene.verifier.reconfigure(replace(scene.config, jwks=other.url))
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*scene.verifier._fetches)
        assert await scene.refusal(token())
    finally:
        await other.close()


async def test_reload_does_not_wait_for_a_place_that_hangs(scene: Scene) -> None:
    """It may be why the operator names another one."""
    asked = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read(-1)
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    async with server:
        hanging = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        scene.verifier.reconfigure(replace(scene.config, jwks=hanging))
        await asked.wait()
        scene.verifier.reconfigure(scene.config)
        assert await scene.verifier.verify(token())
        await scene.verifier.close()


async def test_token_that_names_no_key_is_proved_by_the_only_one_that_fits(scene: Scene) -> None:
    """A key may be published twice, or for two algorithms; of two different ones nobody can say which is meant."""
    twice = [public_jwk(RSA_KEY, "RS256", "a"), public_jwk(RSA_KEY, "RS256", "b"), public_jwk(EC_KEY, "ES256", "c")]
    scene.issuer.keys = twice
    await scene.fetched()
    assert await scene.verifier.verify(token(None))
    scene.issuer.keys = [*twice, public_jwk(OTHER_RSA_KEY, "RS256", "d")]
    await scene.fetched()
    assert await scene.refusal(token(None))


async def test_fetch_outlives_what_nobody_expected(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key set that trips the library must not be the last that was fetched."""
    assert await scene.verifier.verify(token())

    def trip(text: bytes, algorithms: tuple[str, ...]) -> None:
        raise RuntimeError("a defect")

    with monkeypatch.context() as patched:
        patched.setattr("edge.keys.tokens.read_key_set", trip)
        await scene.fetched()
    assert scene.verifier.outage.reason == "a defect"
    assert await scene.verifier.verify(token())
    await scene.fetched()
    assert scene.verifier.outage.reason == ""


async def test_key_set_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [public_jwk(RSA_KEY, "RS256", "rsa")]}))
    config = JwtConfig(ISSUER, AUDIENCE, path)
    verifier, changes = TokenVerifier(config, Clock()), []
    verifier.on_change = changes.append
    await verifier.open()
    try:
        assert await verifier.verify(token())
        path.write_text(json.dumps({"keys": [public_jwk(OTHER_RSA_KEY, "RS256", "new")]}))
        verifier.reconfigure(config)
        assert await verifier.verify(token("new", key=OTHER_RSA_KEY, algorithm="RS256"))
        assert [len(each.proofs) for each in changes] == [1]
    finally:
        await verifier.close()


def test_keys_that_are_not_for_signing_here_are_left_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        short = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    given = [
        public_jwk(RSA_KEY, "RS256", "good", key_ops=["sign", "verify"]),
        public_jwk(short, "RS256", "short"),
        public_jwk(RSA_KEY, "RS256", "for-encryption", use="enc"),
        public_jwk(EC_KEY, "ES256", "other-algorithm"),
        {"kty": "oct", "k": "c2VjcmV0", "kid": "secret", "alg": "HS256"},
        {**json.loads(RSAAlgorithm.to_jwk(RSA_KEY)), "key_ops": ["verify"], "kid": "private-rsa"},
        {**json.loads(ECAlgorithm.to_jwk(EC_KEY)), "kid": "private-ec"},
        {**json.loads(OKPAlgorithm.to_jwk(ED_KEY)), "kid": "private-ed"},
        public_jwk(RSA_KEY, "RS256", "for-wrapping", key_ops=["wrapKey"]),
        public_jwk(RSA_KEY, "RS256", "for-nothing", key_ops=[]),
        public_jwk(RSA_KEY, "RS256", "for-text", key_ops="verify"),
        {"kty": "RSA", "kid": "broken"},
        {**public_jwk(RSA_KEY, "RS256", "odd"), "n": 5},
        {"kty": "new-thing", "kid": "unknown"},
        {**public_jwk(RSA_KEY, "RS256", "x"), "kid": 7},
        "text",
    ]
    assert list(read_key_set(json.dumps({"keys": given}).encode(), ("RS256",))) == ["good"]


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"keys": {}}', b"\xff", b"null"])
def test_what_is_no_key_set_is_no_answer(text: bytes) -> None:
    with pytest.raises(JwksError):
        read_key_set(text, ("RS256",))


@pytest.mark.parametrize("text", [b'{"keys": []}', b'{"keys": [1]}'])
def test_key_set_without_a_key_is_an_answer(text: bytes) -> None:
    assert read_key_set(text, ("RS256",)) == {}


async def test_keys_of_different_types_serve_under_one_id(scene: Scene) -> None:
    """RFC 7517 section 4.5 lets them, as alternatives; and so may keys for different algorithms."""
    keys = [(RSA_KEY, "RS256"), (EC_KEY, "ES256"), (ED_KEY, "EdDSA"), (OTHER_RSA_KEY, "PS256")]
    assert await scene.verifier.verify(token())
    scene.verifier.reconfigure(replace(scene.config, algorithms=(*ALGORITHMS, "PS256")))
    for order in (keys, keys[::-1]):
        scene.issuer.keys = [public_jwk(key, algorithm, "one") for key, algorithm in order]
        await scene.fetched()
        assert scene.verifier.key_count == 4
        for key, algorithm in keys:
            assert await scene.verifier.verify(token("one", key=key, algorithm=algorithm))
    assert "in a way that is not accepted" in await scene.refusal(token("one", key=RSA_KEY, algorithm="RS512"))


async def test_whatever_the_library_stumbles_over_proves_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises what it did not mean to, as it did for a private key in a set: that is no failure of the edge."""

    def stumble(*arguments: Any, **options: Any) -> None:
        raise AttributeError("verify")

    assert await scene.verifier.verify(token())
    monkeypatch.setattr("edge.keys.tokens.jwt.decode", stumble)
    assert "not valid" in await scene.refusal(token())


def test_library_refuses_what_is_left_to_it() -> None:
    """The floor of the dependency is where these were mended."""
    with pytest.raises(jwt.InvalidAlgorithmError):
        jwt.decode(by_hand({"alg": "none"}), RSA_KEY.public_key(), algorithms=["RS256"])
