"""Benchmarks of the edge and of what else could stand in its place: `python -m loadtest COMMAND`.

| module | its one job |
|---|---|
| `target` | Where a load goes, as whom, and with what options. |
| `arrivals` | When requests are sent: an open-loop schedule, drawn up front. |
| `alarm` | Wake at an exact time. |
| `workload` | What is sent: scenarios as raw requests; and the check of what comes back. |
| `generator` | Send the requests of a run from processes of its own. |
| `client` | Send raw requests and time their answers, on bare protocols. |
| `hints` | What a failure means, and what to do next. |
| `results` | From timed answers to the numbers of `vllm bench serve`. |
| `upstream` | The cheap, paced model server of the benchmarks; its events carry the time they were sent. |
| `stamped` | Those events, as three protocols word them. |
| `processes` | Start, pin and stop a process; read its tree's CPU, memory and descriptors. |
| `peers/` | The proxies that are compared: how each is had, configured and started. |
| `floor`, `tutorial` | Two of them: bare uvloop protocols, and what a tutorial of aiohttp would write. |
| `rig` | Where they run, and how one is started. |
| `meter` | What a load cost in CPU, and whether the machine kept still. |
| `measures/` | One load on one proxy, and the raw numbers of a round. |
| `session` | A comparison under way: who runs, what is measured in which order, what was seen. |
| `opcodes` | Run the edge with its opcodes counted. |
| `pairing` | Ratios of paired rounds, and how sure they are. |
| `comparison` | From a comparison's raw rounds to its figures. |
| `comparison_tables`, `comparison_page` | Those figures for people: tables, and a page with plots. |
| `side_by_side` | Two saved results beside each other. |
| `edges` | Edges on a socket that outlives them, a Redis, a key. |
| `turns` | Run the edge with the turns of its loop measured. |
| `stalls_kinds` | What may hold its loop: long bodies and answers, each of another kind. |
| `census` | Run the edge so that it tells its tasks. |
| `chaos/` | Break everything around two edges, and account for every token. |
| `report` | The HTML pages' frame, and the page of a run. |
| `run`, `soak`, `compare`, `page`, `budget`, `before`, `instructions` | The commands that tell costs and times. |
| `scale`, `stalls`, `stops`, `overload`, `chaos.command` | Those that tell whether something holds. |
"""
