"""nginx: the yardstick. One worker, buffering off, keep-alive to the upstream.

Directives: https://nginx.org/en/docs/http/ngx_http_proxy_module.html, ngx_http_upstream_module, ngx_http_ssl_module.
"""

import os
from typing import Final

from loadtest.peers.peer import MAX_CONNECTIONS, Launch, Peer, Scene


def _launch(program: str, scene: Scene) -> Launch:
    tls = ""
    if scene.certificate:
        tls = f"ssl_certificate {scene.certificate.path}; ssl_certificate_key {scene.certificate.key_path};"
    config = f"""
{"user root;" if os.geteuid() == 0 else ""}
worker_processes 1;
daemon off;
pid nginx.pid;
error_log nginx.err;
worker_rlimit_nofile {2 * MAX_CONNECTIONS + 1000};
events {{ worker_connections {2 * MAX_CONNECTIONS}; }}
http {{
  access_log off;
  keepalive_requests 100000000;
  client_max_body_size 64m;
  client_body_buffer_size 16m;
  client_body_temp_path body;
  proxy_temp_path proxy;
  fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi;
  scgi_temp_path scgi;
  upstream u {{ server 127.0.0.1:{scene.upstream_port}; keepalive 4000; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{scene.port}{" ssl" if tls else ""} backlog=4096;
    {tls}
    location / {{
      proxy_pass http://u;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      {"" if scene.keep_key else 'proxy_set_header Authorization "Bearer up";'}
      proxy_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""
    return Launch([program, "-p", str(scene.directory), "-e", "nginx.err", "-c", scene.file("nginx.conf", config)])


PEER: Final = Peer(
    "nginx",
    "one worker, buffering off, keep-alive to the upstream",
    _launch,
    program="nginx",
    version_argument="-v",
    install="apt install nginx-light",
    tls=True,
)
