"""A client of the API of keys that holds every answer against the document that the listener serves."""

import re
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import jsonschema

TOKEN = "admin-token-0123456789"


@dataclass
class Answer:
    status: int
    headers: Any
    body: Any


@dataclass
class KeyClient:
    """Asks at one address; `document` is what `/openapi.json` says there."""

    url: str
    token: str | None = TOKEN
    document: dict[str, Any] = field(default_factory=dict)
    _session: aiohttp.ClientSession = field(default_factory=aiohttp.ClientSession)

    async def __aenter__(self) -> "KeyClient":
        async with self._session.get(f"{self.url}/openapi.json") as answer:
            self.document = await answer.json() if answer.status == 200 else {}
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """One request; what is asked and what is answered is as the document has it."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.token is not None:
            sent["Authorization"] = f"Bearer {self.token}"
        async with self._session.request(method, f"{self.url}{path}", json=body, headers=sent) as answer:
            is_json = answer.content_type == "application/json"
            found = Answer(answer.status, answer.headers, await (answer.json() if is_json else answer.text()))
        if operation := self._operation(method, path.partition("?")[0]):
            if found.status < 300 and body is not None:
                self.check(body, operation["requestBody"]["content"]["application/json"]["schema"])
            response = operation["responses"][str(found.status)]
            if "content" in response:
                self.check(found.body, response["content"]["application/json"]["schema"])
            else:
                assert found.body == ""
        return found

    def _operation(self, method: str, path: str) -> dict[str, Any] | None:
        for template, methods in self.document.get("paths", {}).items():
            if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path):
                found: dict[str, Any] | None = methods.get(method.lower())
                return found
        return None

    def check(self, value: Any, schema: dict[str, Any]) -> None:
        """Hold a value against a schema of the document."""
        whole = {**schema, "components": self.document["components"]}
        jsonschema.Draft202012Validator(whole, format_checker=jsonschema.FormatChecker()).validate(value)

    async def create(self, user: str = "u-console", **facts: Any) -> dict[str, Any]:
        """Make a key."""
        made = await self.ask("POST", "/keys", {"user": user, **facts})
        assert made.status == 201, made.body
        found: dict[str, Any] = made.body
        return found
