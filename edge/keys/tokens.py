"""Tokens instead of keys: JWTs that an issuer signed (RFC 7519), proved with the keys it publishes (RFC 7517).

PyJWT verifies; here is what it leaves to its caller (RFC 8725): which tokens are looked at, which key may prove them,
where the keys come from and when they are asked for again. PyJWT's own client for key sets would block the loop.

A token never decides where its key is found: `jku`, `x5u`, `jwk` and `x5c` are refused, except a `jku` that is the
URL of `jwt.jwks`. A key that the issuer withdrew proves nothing any more, and neither do the tokens that it proved,
whoever is down by then. While the issuer gives no answer its last keys go on; a key set without a key is an answer.
"""

import asyncio
import base64
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final

import aiohttp
import jwt
import orjson
from prometheus_client.core import GaugeMetricFamily, Metric

from edge.config.process_settings import JwtConfig
from edge.errors import Unusable
from edge.keys.stores.protocol import Invalidation, StoreFailed, TokenPrincipal, ignore
from edge.names import is_dns_label, is_pattern
from edge.outage import Outage
from edge.tasks import end_tasks
from edge.tls import client_tls

_log = logging.getLogger(__name__)

_FETCH_TIMEOUT_S: Final = 5.0
_MIN_FETCH_INTERVAL_S: Final = 10.0  # tokens with made-up key ids must not drive the fetching
_MAX_KEY_SET_BYTES: Final = 2**20
_MIN_RSA_BITS: Final = 2048  # RFC 7518 section 3.3
_OWN_KEYS: Final = ("x5u", "jwk", "x5c")  # headers by which a token brings its key along
_KEY_TYPES: Final = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}  # by how algorithms begin, RFC 7518 section 3.1
_MATERIAL: Final = ("kty", "crv", "n", "e", "x", "y")  # the public members of all types
_MAX_ALLOWED: Final = 256  # patterns of one token
_NO_SET: Final = "no key set yet"


class TokenRefused(Exception):
    """A token proves nothing; the message may be shown to who sent it."""


class JwksError(Exception):
    """A key set cannot be used; the message is for operators."""


@dataclass(frozen=True, slots=True)
class _Key:
    """A key of the issuer as it was published, and as the library takes it; `id` is another when anything of it is."""

    id: str
    data: Mapping[str, Any] = field(compare=False)
    public: Any = field(compare=False)

    @property
    def material(self) -> tuple[Any, ...]:
        """What proves: the same key may be published for several algorithms, or twice."""
        return tuple(self.data.get(name) for name in _MATERIAL)

    def is_for(self, algorithm: str) -> bool:
        """Return whether tokens that are signed like this can be proved with it."""
        return bool(self.data["kty"] == _KEY_TYPES[algorithm[:2]] and self.data.get("alg", algorithm) == algorithm)


_KeySet = Mapping[str, tuple[_Key, ...]]  # by their `kid`; keys of different types may share one (RFC 7517 section 4.5)


class TokenVerifier:
    """Verifies the tokens of one issuer. `on_change` is called when a key was withdrawn."""

    def __init__(self, config: JwtConfig, clock: Callable[[], float]) -> None:
        self.on_change: Callable[[Invalidation], object] = ignore
        self._config = config
        self._clock = clock
        self._keys: _KeySet = {}
        self._attempted_at = -_MIN_FETCH_INTERVAL_S
        self._fetching: asyncio.Task[None] | None = None
        self._fetches: set[asyncio.Task[None]] = set()  # that one, and those that a reload made pointless
        self._next: asyncio.TimerHandle | None = None
        self._session: aiohttp.ClientSession | None = None
        self.outage = Outage(_log, "jwt.jwks is unavailable, the last keys go on", "jwt.jwks answers again")
        self.outage.reason = _NO_SET

    @property
    def key_count(self) -> int:
        """Keys that can prove a token now."""
        return sum(map(len, self._keys.values()))

    def metrics(self) -> Iterator[Metric]:
        """Yield how many keys there are, and whether they can be had."""
        yield GaugeMetricFamily("edge_token_keys", "Keys of the issuer that can prove tokens.", value=self.key_count)
        up = not self.outage
        yield GaugeMetricFamily("edge_token_keys_up", "1, or 0 while jwt.jwks cannot be had.", value=up)

    async def open(self) -> None:
        """Begin to fetch the keys, for which nothing waits; raises `Unusable` for a bad CA file."""
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=_FETCH_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            connector=aiohttp.TCPConnector(ssl=client_tls(self._config.ca_file, "jwt.ca_file")),
        )
        self._fetch_soon()

    async def close(self) -> None:
        """Stop fetching."""
        if self._next is not None:
            self._next.cancel()
        await end_tasks(self._fetches)
        if self._session is not None:
            await self._session.close()

    def reconfigure(self, config: JwtConfig) -> None:
        """Take over what a reload changed, and look at the keys again; their file may be what has changed."""
        before, self._config = self._config, config
        if config.jwks != before.jwks:  # which of those keys are withdrawn is not known any more
            self._replace_keys({})
            self.outage.reason = self.outage.reason or _NO_SET
            self._fetching = None  # it may hang: that may be why there is another place
        if config != before:
            self.on_change(Invalidation(everything=True))
        self._attempted_at = -_MIN_FETCH_INTERVAL_S
        self._fetch_soon()

    def claims(self, credential: str) -> bool:
        """Return whether a credential is a token that names this issuer; nothing is proved by that."""
        if not credential.startswith("ey") or credential.count(".") != 2:
            return False
        try:
            payload = orjson.loads(_decode(credential.split(".")[1]))
        except ValueError:
            return False
        return isinstance(payload, dict) and payload.get("iss") == self._config.issuer

    async def verify(self, token: str) -> TokenPrincipal:
        """Return who a token was made for; raises `TokenRefused`, and `StoreFailed` while there is no key."""
        config = self._config
        algorithm, key = await self._key_for(_header(token))
        try:
            payload = jwt.decode(
                token,
                key.public,
                algorithms=[algorithm],
                audience=config.audience,
                issuer=config.issuer,
                leeway=config.leeway_s,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
            return self._principal(payload, key)
        except jwt.ExpiredSignatureError:
            raise TokenRefused("The token has expired: get a new one.") from None
        except jwt.InvalidAudienceError:
            raise TokenRefused("The token was made for another audience.") from None
        except TokenRefused:
            raise
        except Exception:  # whatever the library stumbles over, it is in what a client wrote, and proves nothing
            raise TokenRefused("The token is not valid.") from None

    def _principal(self, payload: Mapping[str, Any], key: _Key) -> TokenPrincipal:
        config = self._config
        user = payload.get(config.user_claim)
        if not isinstance(user, str) or not is_dns_label(user):
            raise TokenRefused("The token names no user of this platform.")
        allow: tuple[str, ...] = ()
        if config.allow_claim is not None:
            given = payload.get(config.allow_claim, ())
            patterns = given.split() if isinstance(given, str) else given
            if not isinstance(patterns, list | tuple) or len(patterns) > _MAX_ALLOWED:
                raise TokenRefused("The token does not list what it allows as this platform reads it.")
            if not all(isinstance(each, str) and is_pattern(each) for each in patterns):
                raise TokenRefused("The token allows models by a pattern that means nothing here.")
            allow = tuple(patterns)
        expires_at = payload["exp"]
        if not isinstance(expires_at, int | float):  # the library takes text too (RFC 7519 section 2: a number)
            raise TokenRefused("The token is not valid.")
        return TokenPrincipal(
            f"jwt:{user}", user, allow=allow, expires_at=float(expires_at) + config.leeway_s, proof=key.id
        )

    # --- the keys

    async def _key_for(self, header: Mapping[str, Any]) -> tuple[str, _Key]:
        config = self._config
        algorithm, kid, jku = header.get("alg"), header.get("kid"), header.get("jku")
        if algorithm not in config.algorithms:
            raise TokenRefused("The token is signed in a way that is not accepted here.")
        if (jku is not None and jku != config.jwks) or any(name in header for name in _OWN_KEYS) or "crit" in header:
            raise TokenRefused("The token has a header that is not accepted here.")
        if kid is not None and not isinstance(kid, str):
            raise TokenRefused("The token is not valid.")
        key = self._find(kid, algorithm)
        if key is None and (fetching := self._fetch_soon()) is not None:
            await asyncio.shield(fetching)
            key = self._find(kid, algorithm)
        if key is None:
            if self.outage:  # it may be a new key
                raise StoreFailed(f"jwt.jwks: {self.outage.reason}")
            raise TokenRefused("The token is signed with a key that its issuer does not publish.")
        if not key.is_for(algorithm):
            raise TokenRefused("The token is signed in a way that its key is not for.")
        return str(algorithm), key

    def _find(self, kid: str | None, algorithm: str) -> _Key | None:
        """Return a key by its id, one for the algorithm if there is; without an id the only one for the algorithm."""
        named: Iterable[_Key] = chain(*self._keys.values()) if kid is None else self._keys.get(kid, ())
        fitting = [key for key in named if key.is_for(algorithm)]
        if kid is None:
            return fitting[0] if len({key.material for key in fitting}) == 1 else None
        return next(iter((*fitting, *named)), None)

    def _fetch_soon(self) -> "asyncio.Task[None] | None":
        """Return the fetch that runs, or is begun when the last one was long enough ago."""
        if self._fetching is None and self._clock() - self._attempted_at >= _MIN_FETCH_INTERVAL_S:
            self._begin_fetch()
        return self._fetching

    def _begin_fetch(self) -> None:
        if self._next is not None:
            self._next.cancel()
        self._attempted_at = self._clock()
        self._fetching = asyncio.get_running_loop().create_task(self._fetch(), name="fetch jwks")
        self._fetches.add(self._fetching)
        self._fetching.add_done_callback(self._fetches.discard)

    async def _fetch(self) -> None:
        config = self._config
        keys, failure = None, ""
        try:
            keys = read_key_set(await self._read(config.jwks), config.algorithms)
        except Exception as error:  # whatever it is, the keys that are known go on, and it is tried again
            failure = str(error) or type(error).__name__
        if self._config.jwks != config.jwks:  # a reload named another place in between
            return
        self._fetching = None
        had_some = bool(self._keys or self.outage)
        if self.outage.reason == _NO_SET:  # no outage that was logged
            self.outage.reason = ""
        if keys is None:
            self.outage.down(failure)
        else:
            self.outage.up()
            self._replace_keys(keys)
            if had_some and not keys:
                _log.warning("jwt.jwks has no key for %s: every token is refused", ", ".join(config.algorithms))
        pause_s = _MIN_FETCH_INTERVAL_S if failure else max(config.jwks_ttl_s, _MIN_FETCH_INTERVAL_S)
        if self._config != config:  # by a reload in between
            pause_s = 0
        self._next = asyncio.get_running_loop().call_later(pause_s, self._begin_fetch)

    def _replace_keys(self, keys: _KeySet) -> None:
        """Take other keys, and report those that were withdrawn: at once, as nobody may be there to ask later."""
        withdrawn = frozenset(key.id for key in chain(*self._keys.values())) - {key.id for key in chain(*keys.values())}
        self._keys = keys
        if withdrawn:
            self.on_change(Invalidation(proofs=withdrawn))

    async def _read(self, jwks: str | Path) -> bytes:
        if isinstance(jwks, Path):
            return await asyncio.to_thread(jwks.read_bytes)
        assert self._session is not None
        async with self._session.get(jwks, allow_redirects=False) as response:
            if response.status != 200:
                raise JwksError(f"status {response.status}")
            content = await response.content.read(_MAX_KEY_SET_BYTES + 1)
            while not response.content.at_eof() and len(content) <= _MAX_KEY_SET_BYTES:
                content += await response.content.read(_MAX_KEY_SET_BYTES + 1 - len(content))
        if len(content) > _MAX_KEY_SET_BYTES:
            raise JwksError("larger than 1 MiB")
        return content


def read_key_set(text: bytes, algorithms: tuple[str, ...]) -> _KeySet:
    """Return the usable keys of a JWK set by their id, one without an id under "".

    What cannot be used is left out (RFC 7517 section 5); by a set of which nothing is left no token is to be believed.
    Raises: `JwksError` for what is no JWK set.
    """
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise JwksError("not JSON") from None
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise JwksError('not a key set: it has no "keys"')
    keys: dict[str, tuple[_Key, ...]] = {}
    for each in listed:
        key = _key(each, algorithms)
        if key is not None:
            kid = key.data.get("kid", "")
            keys[kid] = (key, *keys.get(kid, ()))
    return keys


def _key(given: object, algorithms: tuple[str, ...]) -> _Key | None:
    if not isinstance(given, dict) or given.get("kty") == "oct" or given.get("use", "sig") != "sig":
        return None  # a shared secret is nothing that a set for everybody can hold
    if given.get("alg", algorithms[0]) not in algorithms or not isinstance(given.get("kid", ""), str):
        return None
    operations = given.get("key_ops", ["verify"])  # RFC 7517 section 4.3
    if not isinstance(operations, list) or "verify" not in operations:
        return None
    if "d" in given:  # its private half (RFC 7518 sections 6.2.2 and 6.3.2, RFC 8037 section 2): everybody can sign
        return None
    try:
        key = jwt.PyJWK(given)
    except Exception:  # whatever the library stumbles over; the other keys of the set are none the worse for it
        return None
    if given.get("kty") == "RSA" and key.key.key_size < _MIN_RSA_BITS:
        return None
    digest = hashlib.sha256(orjson.dumps(given, option=orjson.OPT_SORT_KEYS))
    return _Key(digest.hexdigest(), given, key.key)


def _header(token: str) -> Mapping[str, Any]:
    """Return the header of a token; refuses what two parsers could read in two ways."""
    try:
        header, *_ = [_decode(part) for part in token.split(".")]
        document = orjson.loads(header)
    except ValueError:
        raise TokenRefused("The token is not valid.") from None
    if not isinstance(document, dict):
        raise TokenRefused("The token is not valid.")
    return document


def _decode(part: str) -> bytes:
    """Return the bytes of base64url without padding, in its one canonical form; raises `ValueError`."""
    decoded = base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
    if base64.urlsafe_b64encode(decoded).rstrip(b"=") != part.encode():
        raise ValueError("not canonical")
    return decoded


def token_verifier(config: JwtConfig | None, clock: Callable[[], float]) -> TokenVerifier | None:
    """Return what verifies tokens, None when there are to be none; raises `Unusable`."""
    if config is None:
        return None
    missing = [name for name in config.algorithms if name not in jwt.algorithms.get_default_algorithms()]
    if missing:
        raise Unusable(f'jwt: {", ".join(missing)} needs the package cryptography: pip install "edge[jwt]"')
    return TokenVerifier(config, clock)
