"""`python -m loadtest chaos`: everything around two edges breaks, and in the end every token is accounted for (Linux).

| module | its one job |
|---|---|
| `command` | The run: rests, faults, verdict. |
| `world` | What is broken: engines, edges, sinks. |
| `servers` | The Redis servers: a pair under Sentinel, a cluster. |
| `places` | What the system gives: network, disk, clock. |
| `faults` | How it breaks. |
| `traffic` | Who asks meanwhile. |
| `ledger` | Whether every token is accounted for. |
"""
