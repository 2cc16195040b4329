"""The HTTP edge of d.run's model platform: an OpenAI-compatible proxy that passes streams through untouched.

Read `proxy.py` first: one request through its life. Imports point down this list, and siblings do not know each other
(`pyproject.toml` states it as contracts):

    __main__.py      the commands                      over  usage_report.py, explain.py
    server.py        the process: start, reload, drain; wires the parts   over  listeners.py, reloading.py, status.py,
                                                       probes.py, discovery.py
    process_log.py   what the process says on standard error
    proxy.py         one request through its life
    admin.py         health and metrics
    simulator.py     a model server to test against    over  dialects.py, what it says
    credentials.py   who calls, through a cache        over  keystores.py (keys_*.py), tokens.py, revocations.py,
                                                       breaker.py
    admission.py     may it start now                  over  shared_limits.py, for all processes together
    upstream.py      which endpoint                    over  wire.py, health.py, balancing.py, queueing.py
    relay.py         moves the bytes                   over  wire.py, client.py, framed.py, echo.py, events.py
    metering.py      what it used                      over  event_meters.py, document_meters.py, usage_objects.py
    journal.py       the records, kept until delivered over  shipping.py (sink_*.py), journal_files.py,
                                                       journal_buffer.py
    telemetry.py     metrics and the access log
    client.py        the client's side of a connection
    wire.py          upstream connections and their framing
    routing.py       which route
    envelope.py      what is asked, and the splices
    exchange.py      the facts of one request
    config.py        routes.toml                       over  tables.py, notation.py, positions.py
    schema.py        routes.toml for editors           changes.py  what differs between two of them
    errors.py        every failure by name
"""
