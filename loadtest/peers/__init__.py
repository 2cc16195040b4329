"""The proxies that are compared, one file each: how it is had, configured as its own manual advises, and started.

| module | its one job |
|---|---|
| `peer` | What a peer is, where it runs, and where its program is found. |
| `table` | All of them by name. |
| `edge` | This checkout, alone and as two processes on one socket. |
| `two` | The program of the latter. |
| `nginx`, `haproxy`, `envoy`, `traefik`, `caddy` | Proxies for anything. |
| `vllm_router`, `smg`, `litellm`, `portkey` | Gateways for models. |
| `own` | Two of this package's, as measures of Python. |

A peer is optional: what is not installed is named as missing, with how it is had. `envoy_config` has what Envoy is
told.
"""
