"""Benchmarks of the edge and of what else could stand in its place: `python -m loadtest COMMAND`.

| module | its one job |
|---|---|
| `target` | Where a load goes, as whom, and with what options. |
| `arrivals` | When requests are sent: an open-loop schedule, drawn up front. |
| `alarm` | Wake at an exact time. |
| `dialects` | How each API is asked, and what its answers say. |
| `workload` | What is sent: scenarios, conversations made of them, raw requests. |
| `prompts` | Conversations from a file: texts, chats, traces of production. |
| `pictures` | Pictures of a given size. |
| `client` | Send raw requests and time their answers, on bare protocols. |
| `answer` | The check of what comes back. |
| `outcome` | What became of one request. |
| `worker` | A generator process: its share of a run's requests. |
| `channel` | What it and the command tell each other. |
| `generator` | Start those processes, and add up what they tell while a run goes on. |
| `live` | The line that shows it on a terminal. |
| `values` | Many numbers: exact while they are few, then in a histogram. |
| `timeline` | What happened when. |
| `results` | From finished requests to the numbers of `vllm bench serve`. |
| `judgement` | What was asked, the numbers, and whether they are the target's. |
| `search` | Which rate a sweep tries next; its knee and its capacity. |
| `sweep` | The same load at several rates. |
| `options` | The options of `run`, and what they ask for. |
| `outputs`, `tables` | Where numbers go: JSON, CSV, a line for each request; tables for a terminal. |
| `hints` | What a failure means, and what to do next. |
| `upstream` | The cheap, paced model server of the benchmarks; its events carry the time they were sent. |
| `processes` | Start, pin and stop a process; read its tree's CPU, memory and descriptors. |
| `peers` | The proxies that are compared: how each is found, configured and started. |
| `floor`, `tutorial` | Two of them: bare uvloop protocols, and what a tutorial of aiohttp would write. |
| `meter` | What a load cost in CPU, and whether the machine kept still. |
| `measures` | One number of one proxy under one load. |
| `opcodes` | Run the edge with its opcodes counted. |
| `pairing` | Ratios of paired rounds, and how sure they are. |
| `comparison` | From a comparison's raw rounds to its figures. |
| `comparison_report` | Those figures for people: tables and plots. |
| `edges` | Edges on a socket that outlives them, a Redis, a key. |
| `turns` | Run the edge with the turns of its loop measured. |
| `stalls_kinds` | What may hold its loop: long bodies and answers, each of another kind. |
| `census` | Run the edge so that it tells its tasks. |
| `chaos/` | Break everything around two edges, and account for every token. |
| `report` | The HTML pages' frame, and the page of a run. |
| `run`, `diff`, `soak`, `compare`, `budget`, `before`, `instructions` | The commands that tell costs and times. |
| `scale`, `stalls`, `stops`, `overload`, `chaos.command` | Those that tell whether something holds. |
"""
