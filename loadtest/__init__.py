"""Benchmarks of the edge and of what else could stand in its place: `python -m loadtest {run,compare,soak,budget}`.

| module | its one job |
|---|---|
| `arrivals` | When requests are sent: an open-loop schedule, drawn up front. |
| `workload` | What is sent: scenarios as raw requests, and the check of what comes back. |
| `client` | Send raw requests and time their answers, on bare protocols. |
| `results` | From timed answers to the numbers of `vllm bench serve`. |
| `upstream` | The cheap, paced model server of the benchmarks; its events carry the time they were sent. |
| `processes` | Start, pin and stop a process; read its tree's CPU, memory and descriptors. |
| `peers` | The proxies that are compared: how each is found, configured and started. |
| `floor`, `tutorial` | Two of them: bare uvloop protocols, and what a tutorial of aiohttp would write. |
| `measures` | One number of one proxy under one load. |
| `pairing` | Ratios of paired rounds, and how sure they are. |
| `report` | The HTML pages. |
| `run`, `compare`, `soak`, `budget` | The commands. |
"""
