"""The HTTP edge of d.run's model platform: an OpenAI-compatible proxy that passes streams through untouched.

Read `proxy.py` first: one request through its life. Imports point down this list, and siblings do not know each other
(`pyproject.toml` states it as contracts):

    __main__.py      the commands
    server.py        the process: listeners, reload, drain; wires the parts
    proxy.py         one request through its life
    admin.py         health and metrics
    simulator.py     a model server to test against
    credentials.py   who calls, through a cache        over  keystores.py
    upstream.py      which endpoint                    over  wire.py
    relay.py         moves the bytes                   over  wire.py, client.py
    telemetry.py     metrics and the access log
    client.py        the client's side of a connection
    wire.py          upstream connections and their framing
    routing.py       which route
    envelope.py      what is asked, and the splice of the model's name
    exchange.py      the facts of one request
    config.py        routes.toml                       over  tables.py, notation.py, positions.py
    errors.py        every failure by name
"""
