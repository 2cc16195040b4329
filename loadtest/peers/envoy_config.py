"""Envoy's configuration, as a proxy that only passes on, and with as much of an edge's work as it does by itself.

Filters and fields: https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_filters/http_filters
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

_TYPES: Final = "type.googleapis.com/envoy.extensions"
_METADATA: Final = "edge"  # the namespace of what is read from bodies
_USER: Final = "u-loadtest"
_MAX_BODY_BYTES: Final = 64 * 1024**2  # that is held back to be read; 1 MiB as it comes
_LOGGED: Final = (
    "START_TIME", "REQ(X-REQUEST-ID)", "DOWNSTREAM_REMOTE_ADDRESS", "REQ(:METHOD)", "REQ(:AUTHORITY)", "REQ(:PATH)",
    "REQ(X-USER)", "UPSTREAM_HOST", "RESPONSE_CODE", "RESPONSE_FLAGS", "BYTES_RECEIVED", "BYTES_SENT",
    "RESPONSE_DURATION", "DURATION",
    *(f"DYNAMIC_METADATA({_METADATA}:{name})" for name in ("model", "prompt_tokens", "completion_tokens")),
)  # fmt: skip

Config = dict[str, Any]


def plain(port: int, upstream_port: int, connections: int) -> Config:
    """Return the configuration of a proxy that passes everything on."""
    return _config(port, upstream_port, connections, _manager({"prefix": "/"}, []))


def working(port: int, upstream_port: int, connections: int, key: str, log: Path) -> Config:
    """Return that of one that proves the key, routes by the body's `model`, limits by user, and logs the usage.

    It does so for JSON answers. It keeps no record, asks nobody else, and reads no usage of streams: that would be a
    program of one's own beside it.
    """
    proof = {
        "credentials": [{"key": key, "client": _USER}],
        "key_sources": [{"header": "Authorization"}],
        "forwarding": {"header": "x-user", "hide_credentials": True},
    }
    usage = [_kept(name, "usage", name) for name in ("prompt_tokens", "completion_tokens")]
    reading = {"request_rules": {"rules": [_kept("model", "model")]}, "response_rules": {"rules": usage}}
    bucket = {"max_tokens": 10**9, "tokens_per_fill": 10**9, "fill_interval": "60s"}
    always = {"default_value": {"numerator": 100}}
    limit = {
        "stat_prefix": "limit",
        "enable_x_ratelimit_headers": "DRAFT_VERSION_03",
        "filter_enabled": always,
        "filter_enforced": always,
        "token_bucket": bucket,
        "rate_limits": [{"actions": [{"request_headers": {"header_name": "x-user", "descriptor_key": "user"}}]}],
        "descriptors": [{"entries": [{"key": "user", "value": _USER}], "token_bucket": bucket}],
    }
    model = {"filter": _METADATA, "path": [{"key": "model"}], "value": {"string_match": {"prefix": "public/"}}}
    filters = [
        _filter("api_key_auth", "ApiKeyAuth", proof),
        _filter("json_to_metadata", "JsonToMetadata", reading),
        _filter("local_ratelimit", "LocalRateLimit", limit),
    ]
    manager = _manager({"prefix": "/", "dynamic_metadata": [model]}, filters)
    lines = {
        "@type": f"{_TYPES}.access_loggers.file.v3.FileAccessLog",
        "path": str(log),
        "log_format": {"json_format": {name.lower(): f"%{name}%" for name in _LOGGED}},
    }
    manager["access_log"] = [{"name": "envoy.access_loggers.file", "typed_config": lines}]
    config = _config(port, upstream_port, connections, manager)
    config["static_resources"]["listeners"][0]["per_connection_buffer_limit_bytes"] = _MAX_BODY_BYTES
    return config


def serve_tls(config: Config, certificate: Path, key: Path) -> None:
    """Have the listener of a configuration serve TLS, with the files of a certificate and its key, in PEM."""
    pair = {"certificate_chain": {"filename": str(certificate)}, "private_key": {"filename": str(key)}}
    typed = {
        "@type": f"{_TYPES}.transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": {"tls_certificates": [pair]},
    }
    [listener] = config["static_resources"]["listeners"]
    listener["filter_chains"][0]["transport_socket"] = {"name": "envoy.transport_sockets.tls", "typed_config": typed}


def _filter(name: str, kind: str, settings: Mapping[str, object]) -> Config:
    typed = {"@type": f"{_TYPES}.filters.http.{name}.v3.{kind}", **settings}
    return {"name": f"envoy.filters.http.{name}", "typed_config": typed}


def _kept(name: str, *path: str) -> Config:
    """Return the rule by which a member of a JSON body is kept under a name."""
    keys = [{"key": each} for each in path]
    return {"selectors": keys, "on_present": {"metadata_namespace": _METADATA, "key": name}}


def _manager(match: Mapping[str, object], filters: Sequence[Config]) -> Config:
    routes = [{"match": match, "route": {"cluster": "upstream", "timeout": "0s"}}]
    return {
        "@type": f"{_TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "edge",
        "stream_idle_timeout": "0s",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": [*filters, _filter("router", "Router", {})],
    }


def _config(port: int, upstream_port: int, connections: int, manager: Config) -> Config:
    def address(number: int) -> Config:
        return {"socket_address": {"address": "127.0.0.1", "port_value": number}}

    many = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), 2 * connections)
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    upstream = [{"lb_endpoints": [{"endpoint": {"address": address(upstream_port)}}]}]
    cluster = {
        "name": "upstream",
        "connect_timeout": "5s",
        "type": "STATIC",
        "circuit_breakers": {"thresholds": [many]},
        "load_assignment": {"cluster_name": "upstream", "endpoints": upstream},
    }
    listener = {"address": address(port), "filter_chains": [chain]}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}
