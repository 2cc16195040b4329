"""What is measured of a proxy: one load each, which returns raw numbers of one round.

| module | its one job |
|---|---|
| `load` | Where a load goes, how much of it there is, and how streams and closed loops are sent and checked. |
| `requests` | What a request costs: small, refused, on connections that are not kept, over TLS, with long bodies. |
| `streams` | What a stream costs, by its events, in three protocols. |
| `delays` | How late an event comes: at random, together, beside long bodies, at 70 % of a capacity; who leaves. |
| `memory` | What a live stream holds. |
| `table` | All of them by name, and which process each is asked of. |

CPU comes from a `Meter`. Latencies are from the intended send time; a send that was late by less than a timer's own
resolution counts from when it happened.
"""
