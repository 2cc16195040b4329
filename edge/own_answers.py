"""What the edge answers by itself: its models, and paths or methods that there are not."""

import asyncio
import functools
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from urllib.parse import unquote_to_bytes

import orjson
from aiohttp import hdrs

from edge import errors
from edge.client.head import Head
from edge.errors import EdgeError
from edge.generation import Generation
from edge.keys.caller import Caller
from edge.names import is_model_name
from edge.operations import NOT_SERVED, OPERATIONS, Asked
from edge.protocols import MESSAGES
from edge.routing import HostTable, Match, is_loopback
from edge.upstream.catalogue import Catalogue

_A_STEP: Final = 200  # models of a list: ten thousand at once would hold the others up
_UPGRADES: Final = (("Upgrade", "HTTP/1.1"), ("Connection", "upgrade"))  # RFC 9110 sections 15.5.22 and 7.8


def wrong_path(head: Head, asked: Asked, host: str, *, is_secure: bool) -> EdgeError:
    """Return the error for a path that does not exist, or not with this method; `is_secure`: it was asked over TLS."""
    headers, method, path = head.headers, head.method, head.path
    if method == "GET" and headers.get(hdrs.UPGRADE, "").lower() == "websocket":
        return errors.UpgradeRequired(
            "WebSocket is not served here: send a POST over HTTP, and read its server-sent events.", headers=_UPGRADES
        )
    if asked.methods:
        allowed = ", ".join((*asked.methods, "OPTIONS"))
        return errors.MethodNotAllowed(f"{method} is not possible here, use {allowed}", headers=(("Allow", allowed),))
    if is_loopback(host):
        base = f"{'https' if is_secure else 'http'}://{headers.get(hdrs.HOST, host)}"
    else:
        base = f"https://{host or 'chat.d.run'}"
    name = path.removeprefix("/openai").removeprefix("/v1").strip("/").partition("/")[0]
    is_right = path.startswith("/v1/") and not path.startswith(("/v1/v1/", "/v1//"))  # the base URL
    if is_right or name in NOT_SERVED:
        what = f"`{name}` is" if name in NOT_SERVED else "This operation is"
        return errors.PathNotFound(
            f"{what} not served here. Under {base}/v1 there are: {', '.join(OPERATIONS)}, models."
        )
    if asked.operation.protocol is MESSAGES:
        return errors.PathNotFound(f"There is nothing at this path. The base URL is {base}, without /v1.")
    return errors.PathNotFound(f"There is nothing at this path. The base URL is {base}/v1 (or {base} for openai<1).")


def model_in_path(encoded: str) -> str:
    """Return the model of a path, percent-decoded once; ids contain `/`, which SDKs send as `%2F`."""
    try:
        name = unquote_to_bytes(encoded).decode()
    except UnicodeDecodeError:
        name = ""
    if not is_model_name(name):
        raise errors.ModelNotFound.named("of that name")
    return name


@dataclass(frozen=True, slots=True)
class Models:
    """What is said of the models of a generation; `created` is Unix seconds, the same for all."""

    generation: Generation
    catalogue: Catalogue
    created: int

    async def listed(self, table: HostTable, caller: Caller) -> list[bytes]:
        """Return the models that a caller may call at a host, as OpenAI and Anthropic list them, in pieces; in steps.

        Their servers get some time to describe them. To join the pieces of ten thousand would take milliseconds.
        """
        matches: list[tuple[str, Match]] = []
        pools: dict[str, None] = {}
        for at, name in enumerate(table.names()):
            match = table.find(name) if caller.judge(name) else None
            if match is not None:
                matches.append((name, match))
                if match.route.pool and match.route.context_length is None:
                    pools[match.route.pool] = None
            if at % _A_STEP == _A_STEP - 1:
                await asyncio.sleep(0)
        await self.catalogue.learn(pools)
        pieces = [b'{"object":"list","data":[']
        for at in range(0, len(matches), _A_STEP):
            documents = [self.document(name, match) for name, match in matches[at : at + _A_STEP]]
            pieces.append((b"," if at else b"") + orjson.dumps(documents)[1:-1])
            await asyncio.sleep(0)
        first, last = (matches[0][0], matches[-1][0]) if matches else (None, None)
        pieces.append(b"]," + orjson.dumps({"has_more": False, "first_id": first, "last_id": last})[1:])
        return pieces

    def document(self, name: str, match: Match) -> dict[str, object]:
        """Return a model as OpenAI, Anthropic and vLLM describe one, all in one: UIs read this or that of it."""
        document: dict[str, object] = {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": name.partition("/")[0],
            "type": "model",
            "display_name": name,
            "created_at": _rfc_3339(self.created),
        }
        context_length = self.catalogue.context_length_of(name, match)
        if context_length is not None:
            document |= {"context_length": context_length, "max_model_len": context_length}
        return document


@functools.lru_cache(maxsize=1)
def _rfc_3339(unix_s: int) -> str:
    return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%dT%H:%M:%SZ}"
