"""The peers by name, in the order in which they are told."""

from collections.abc import Mapping
from typing import Final

from loadtest.peers import caddy, edge, envoy, haproxy, litellm, nginx, own, portkey, smg, traefik, vllm_router
from loadtest.peers.peer import Peer

_PEERS: Final = (
    edge.PEER,
    edge.TWO,
    nginx.PEER,
    haproxy.PEER,
    haproxy.DELAYING,
    envoy.PEER,
    envoy.WORKING,
    traefik.PEER,
    caddy.PEER,
    vllm_router.PEER,
    smg.PEER,
    litellm.PEER,
    portkey.PEER,
    own.TUTORIAL,
    own.FLOOR,
)

PEERS: Final[Mapping[str, Peer]] = {peer.name: peer for peer in _PEERS}
