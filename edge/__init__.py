"""The HTTP edge of d.run's model platform: an OpenAI-compatible proxy that passes streams through untouched.

Read `proxy.py` first: one request through its life. Imports point down this list, and siblings do not know each other
(`pyproject.toml` states it as contracts):

    __main__.py    the argument parser and the exit codes
    commands/      what an operator types: serve, demo, simulate, check, explain, diff, keys, usage
    process/       the process: wires the parts, reloads, drains, listens to clients and operators
    proxy.py       one request through its life
    own_answers.py  what the edge answers by itself: its models, a caller's limits and usage, paths that there are not
    forwarding.py  an accepted request on its way: to an endpoint, and to another one where that may help
    hedging.py     a stream whose first byte is late, asked of a second endpoint too
    resuming.py    a stream that broke, on its way to another endpoint
    attempt.py     what one endpoint is asked
    settlement.py  what an accepted request owes: charged and recorded once
    judgement.py   what an attempt showed of its endpoint, and whether to ask another one
    plan.py        what requests of one head, caller and model have in common, worked out once
    generation.py  everything built from one file
    keys/          who calls: keys and tokens, through a cache; stores/ where keys are kept
    limits/        may it start now: requests, tokens and concurrency, shared by processes
    upstream/      which endpoint: pools, engines, health, balancing, queueing, probes, discovery, who keeps a response
    relay/         moves the bytes of an answer to the client
    resume/        what a broken stream had said, whether it may go on, and what of a second answer is new
    journal/       usage records, kept until delivered; sinks/ where they go
    telemetry/     metrics, the access log and the process's own log
    client/        the client's side of a connection: head, body, answers of the edge's own
    wire/          HTTP/1.1 towards upstreams, framing tracked to the byte
    envelope/      what a body asks, and the splices made in it
    routing.py     which route a model's name takes
    metering/      what an answer used, in every dialect
    config/        routes.toml: settings, their rules, schema and changes
    simulator/     a model server to test against
    operations.py  every operation with every concern: the one table of paths
    protocols.py   how each API words an error, an error event, a heartbeat
    upstream_errors.py  what an upstream says of a failure, brought to ours
    sse.py         events: cutting them, an error that opens a stream
    ids.py         random ids of requests
    traces.py      the trace that a request belongs to
    sockets.py     how the kernel notices that a peer has vanished
    names.py       what models, users, hosts and patterns may be called, and what matches
    exchange.py    the facts of one request
    stage.py       how far the process is with its end
    outage.py      something is down: logged once, and once when it is back
    tasks.py       tasks that must end or go on, and what hangs
    garbage.py     computing without a look for garbage
    valkey.py      the one client of a Redis or Valkey
    primaries.py   who is the primary: asked of Sentinels, or of the nodes of a Cluster
    tls.py         how every server that is asked is proved
    errors.py      every failure by name
"""
