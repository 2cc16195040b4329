"""HAProxy: one thread, with `http-no-delay` and, as many run it, without.

Options: https://docs.haproxy.org/2.6/configuration.html
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from loadtest.peers.peer import MAX_CONNECTIONS, Launch, Peer, Scene


def _with(option: str) -> Callable[[str, Scene], Launch]:
    def launch(program: str, scene: Scene) -> Launch:
        tls = ""
        if scene.certificate:
            both = scene.certificate.path.read_text() + scene.certificate.key_path.read_text()
            tls = f" ssl crt {scene.file('both.pem', both)}"
        config = f"""
global
  maxconn {MAX_CONNECTIONS}
  nbthread 1
defaults
  mode http
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  http-reuse always
  {option}
frontend f
  bind 127.0.0.1:{scene.port}{tls}
  default_backend b
backend b
  {"" if scene.keep_key else 'http-request set-header Authorization "Bearer up"'}
  server s 127.0.0.1:{scene.upstream_port}
"""
        return Launch([program, "-db", "-f", scene.file("haproxy.cfg", config)])

    return launch


PEER: Final = Peer(
    "haproxy",
    "one thread, http-no-delay",
    _with("option http-no-delay"),
    program="haproxy",
    version_argument="-v",
    install="apt install haproxy",
    tls=True,
)
DELAYING: Final = replace(
    PEER,
    name="haproxy-delay",
    text="as it comes, without http-no-delay: it holds small pieces back to merge them",
    launch=_with(""),
)
