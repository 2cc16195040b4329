"""Portkey's gateway, from npm: one process of node, told by fields of each request whom to ask.

Fields: https://portkey.ai/docs/api-reference/inference-api/headers; an upstream on this machine is named as trusted.
Release 1.15.2 answers every stream with a 500 ("immutable": it adds to the fields of an answer of `fetch`), on Node.js
20 and 22, with the newest dependencies and the oldest that it allows. So only what is no stream is asked of it.
"""

from typing import Final

from loadtest.peers.peer import Launch, Peer, Scene


def _launch(program: str, scene: Scene) -> Launch:
    headers = {"x-portkey-provider": "openai", "x-portkey-custom-host": f"{scene.upstream}/v1"}
    environment = {"TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost", "NODE_ENV": "production"}
    return Launch([program, f"--port={scene.port}", "--headless"], environment=environment, headers=headers)


PEER: Final = Peer(
    "portkey",
    "one process of node; of 1.15.2 every stream is a 500, so only requests without",
    _launch,
    program="gateway",
    package="@portkey-ai/gateway",
    install="npm install --prefix peers/portkey @portkey-ai/gateway",
    load_divisor=5,
    only=frozenset({"small", "unkept", "megabyte"}),
    streams=False,
)
