"""The matrix as text: a summary for the terminal, and docs/clients.md."""

import re
from collections.abc import Sequence
from typing import Final

from cases import CASES
from sdks import CLIENTS
from verdicts import BY_DESIGN, Row, Seen

_MESSAGE_CHARACTERS: Final = 80
_MARKS: Final = {"same": "=", "better": "+", "by design": "d", "worse": "WORSE"}
# What differs from run to run, or would be this machine's.
_RUN_OWN: Final = (
    (re.compile(r"127\.0\.0\.1:\d+"), "127.0.0.1"),
    (re.compile(r"\b(req_|chatcmpl-)?[0-9a-f]{16,}\b"), "…"),
    (re.compile(r"0x[0-9a-f]+"), "0x…"),
    (re.compile("(… )+"), "… "),
)

_HEAD: Final = """\
# What clients make of failures

Each client meets each failure twice: direct from a model server, and through the edge in front of the same server. The
edge is meant to be no worse: the same exception and as many attempts at the model server, or an exception where a
client alone takes half an answer for a whole one. This page is printed by

```
python tests/clients/matrix.py --write
```

which installs each SDK and plays the cases on the loopback of this machine. `--client NAME` plays one client,
`--edge FILE` asks another edge. SDKs keep their own settings of retries. The model server answers OpenAI clients in
vLLM's words and Anthropic's clients in Anthropic's.

## The failures

{cases}

- **401, 403, 404.** Direct is what the vendor's API answers to the same mistake: OpenAI's words for a wrong key and a
  forbidden model, vLLM's for an unknown one, Anthropic's for its clients. Through the edge it is the edge's own answer,
  and attempts are counted there. A 401 or 403 that an upstream gives the edge is another matter: it is about the
  platform's key, not the caller's, so the caller gets a 502.
- **ErrorEvent** is no exception of an SDK: the SDK gives its user an event that says so, and who reads only the text
  takes half an answer for a whole one. The AI SDK never throws in a stream; what its `fullStream` has as an error
  counts as one here.
- **Facts.** An exception must also keep what programs read of it: its type, its request id, the kind of its body. A
  type stands in parentheses in Anthropic's API, where programs compare it.
- **5xx.** The edge replaces an engine's words, which are for its operator.
{by_design}

## Summary

`=` the same, `+` better through the edge, `d` different by design, `WORSE` for the reason in the
table of the client.

{summary}
"""


def summary(rows: Sequence[Row]) -> str:
    """Return a line for each client, a column for each case."""
    verdicts = {(row.client, row.case.name): _MARKS[row.verdict.rank] for row in rows}
    clients = dict.fromkeys(row.client for row in rows)
    lines = [[name, *(verdicts[name, case.name] for case in CASES)] for name in clients]
    return _table(["client", *(case.name for case in CASES)], lines)


def worse(rows: Sequence[Row]) -> str:
    """Return each cell in which the edge is worse, a line each."""
    return "\n".join(
        f"{row.client} {row.case.name}: {row.verdict.reason}\n"
        f"    direct:    {_told(row, row.direct)}  {_message(row.direct)}\n"
        f"    the edge:  {_told(row, row.edge)}  {_message(row.edge)}"
        for row in rows
        if row.verdict.rank == "worse"
    )


def document(rows: Sequence[Row]) -> str:
    """Return docs/clients.md."""
    cases = _table(["case", "what fails"], [[case.name, case.told] for case in CASES])
    by_design = "\n".join(f"- **By design.** {each}" for each in BY_DESIGN)
    parts = [_HEAD.format(cases=cases, by_design=by_design, summary=summary(rows))]
    for client in CLIENTS:
        own = [row for row in rows if row.client == client.name]
        if own:
            packages = ", ".join(f"`{each}`" for each in client.packages)
            parts.append(f"## {client.name}\n\n{packages}; {client.api}.\n\n{_of_client(own)}\n")
    return "\n".join(parts)


def _of_client(rows: Sequence[Row]) -> str:
    lines = [
        [
            row.case.name,
            _told(row, row.direct),
            _message(row.direct),
            _told(row, row.edge),
            _message(row.edge),
            str(row.verdict),
        ]
        for row in rows
    ]
    return _table(["case", "direct", "message", "through the edge", "message", "edge"], lines)


def _told(row: Row, seen: Seen) -> str:
    """Return class and attempts, or the text that is taken as whole."""
    if not seen.bases:
        return f"{seen.kind}, “{_steady(seen.text)}”"
    count = seen.asked if row.case.own else seen.reached
    kind = f"{seen.kind} ({seen.facts['type']})" if row.api == "messages" and "type" in seen.facts else seen.kind
    return f"{kind} x{count}" + (f" of {seen.asked}" if seen.asked != count else "")


def _message(seen: Seen) -> str:
    return _steady(" ".join(seen.message.split()))[:_MESSAGE_CHARACTERS]


def _steady(text: str) -> str:
    """Return a text as it is in every run."""
    for pattern, instead in _RUN_OWN:
        text = pattern.sub(instead, text)
    return text


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in (head, rule, *lines))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
