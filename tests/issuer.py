"""An issuer of tokens: real keys, a real server for its key set, and every kind of wrong token."""

import asyncio
import json
import time
from typing import Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import get_default_algorithms

ISSUER = "https://console.example/"
AUDIENCE = "models"
USER = "u-1100a15812cc"

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()


def public_jwk(private: Any, algorithm: str, kid: str, **more: Any) -> dict[str, Any]:
    """The public half of a key as its issuer publishes it."""
    written = get_default_algorithms()[algorithm].to_jwk(private.public_key(), as_dict=True)
    return {**written, "kid": kid, "alg": algorithm, "use": "sig", **more}


KEYS: dict[str, tuple[Any, str]] = {
    "rsa": (RSA_KEY, "RS256"),
    "ec": (EC_KEY, "ES256"),
    "ed": (ED_KEY, "EdDSA"),
}


def claims(**changes: Any) -> dict[str, Any]:
    """The claims of a good token; None takes one out."""
    now = int(time.time())
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": USER, "iat": now, "exp": now + 300}
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


def token(kid: str | None = "rsa", key: Any = None, algorithm: str = "", headers: dict[str, Any] | None = None,
          **changes: Any) -> str:  # fmt: skip
    """A signed token."""
    own, own_algorithm = KEYS.get(kid or "rsa", (RSA_KEY, "RS256"))
    named = {} if kid is None else {"kid": kid}
    return jwt.encode(claims(**changes), key or own, algorithm or own_algorithm, headers={**named, **(headers or {})})


class Issuer:
    """Serves the key set over HTTP, or fails to."""

    def __init__(self) -> None:
        self.keys = [public_jwk(key, algorithm, kid) for kid, (key, algorithm) in KEYS.items()]
        self.fetches = 0
        self.harm = ""
        self._fetched = asyncio.Event()
        self._runner: web.ServerRunner | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/jwks.json"

    async def start(self) -> "Issuer":
        self._runner = web.ServerRunner(web.Server(self._answer))
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        return self

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.fetches += 1
        self._fetched.set()
        match self.harm if not request.query_string else "":
            case "500":
                return web.Response(status=500)
            case "rubbish":
                return web.Response(body=b"<html>\xff")
            case "none":
                return web.json_response({"error": "busy"})
            case "empty":
                return web.json_response({"keys": []})
            case "huge":
                return web.Response(body=b" " * (2**20 + 1) + b"{}")
            case "redirect":
                return web.Response(status=302, headers={"Location": f"{self.url}?followed"})
        return web.Response(text=json.dumps({"keys": self.keys}), content_type="application/json")

    async def until_fetched(self, times: int) -> None:
        while self.fetches < times:
            self._fetched.clear()
            await self._fetched.wait()

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.shutdown()
            await self._runner.cleanup()
