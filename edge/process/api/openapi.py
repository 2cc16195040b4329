"""The document of the API of keys, made of the rows of its endpoints: OpenAPI 3.1.

Source: https://spec.openapis.org/oas/v3.1.1
"""

import functools
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final

import msgspec
import orjson

from edge.process.api.documents import Error
from edge.process.api.endpoints import ENDPOINTS, Endpoint

_COMPONENT: Final = "#/components/schemas/{name}"
_STATUSES: Final = {
    200: "Done.", 201: "Made.", 204: "Done.", 400: "The request cannot be understood.",
    401: "The admin token is missing or wrong.", 404: "There is no such key.",
    409: "The key is in another state, or the Idempotency-Key was used for another request.",
    413: "The body is too large.", 501: "Keys are kept by another server, and changed there.",
    503: "The key store cannot be used right now.",
}  # fmt: skip
_OF_ALL: Final = (400, 401, 413, 501, 503)
_IDEMPOTENCY_KEY: Final = {
    "name": "Idempotency-Key", "in": "header", "required": False,
    "description": "A request that comes again with it, within a day, gets the same key.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}  # fmt: skip
_ACTOR: Final = {
    "name": "X-Actor", "in": "header", "required": False,
    "description": "Who asks for the change, for the audit: such as the login of a person at a console.",
    "schema": {"type": "string", "maxLength": 128},
}  # fmt: skip


@functools.cache
def document() -> bytes:
    """Return the document, as JSON."""
    bodies = [body for each in ENDPOINTS for body in (each.takes, each.gives) if body is not None]
    _, components = msgspec.json.schema_components([*bodies, Error], ref_template=_COMPONENT)
    paths: dict[str, dict[str, object]] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, components)
    return orjson.dumps({
        "openapi": "3.1.0",
        "info": {
            "title": "edge: keys and users",
            "version": version("edge"),
            "description": "What a console needs of API keys: to make, list, change, rotate and revoke them.",
        },
        "servers": [{"url": "/"}],
        "security": [{"admin": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"admin": {"type": "http", "scheme": "bearer", "description": "server.admin_token"}},
        },
    })  # fmt: skip


def _operation(endpoint: Endpoint, components: Mapping[str, Any]) -> dict[str, object]:
    parameters: list[object] = []
    if "{id}" in endpoint.path:
        what = "key" if endpoint.path.startswith("/keys") else "user"
        parameters.append(
            {"name": "id", "in": "path", "required": True, "description": f"A {what}.", "schema": {"type": "string"}}
        )
    parameters += (
        {"name": each.name, "in": "query", "required": False, "description": each.text, "schema": each.schema}
        for each in endpoint.query
    )
    if endpoint.is_idempotent:
        parameters.append(_IDEMPOTENCY_KEY)
    if endpoint.method != "GET":
        parameters.append(_ACTOR)
    found: dict[str, object] = {"operationId": endpoint.name, "summary": endpoint.text, "parameters": parameters}
    if endpoint.takes is not None:
        name = endpoint.takes.__name__
        found["requestBody"] = {"required": "required" in components[name], "content": _json(name)}
    found["responses"] = {str(status): _response(status, endpoint) for status in _statuses(endpoint)}
    return found


def _statuses(endpoint: Endpoint) -> list[int]:
    return sorted({endpoint.status, *_OF_ALL, *endpoint.refusals})


def _response(status: int, endpoint: Endpoint) -> dict[str, object]:
    found: dict[str, object] = {"description": _STATUSES[status]}
    if status >= 400:
        found["content"] = _json(Error.__name__)
    elif endpoint.gives is not None:
        found["content"] = _json(endpoint.gives.__name__)
    return found


def _json(name: str) -> dict[str, object]:
    return {"application/json": {"schema": {"$ref": _COMPONENT.format(name=name)}}}
