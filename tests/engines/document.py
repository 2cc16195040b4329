"""The outcomes as text: a table for the terminal, and docs/engines.md."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from tests.engines.differences import DIFFERENCES, explained, is_equal
from tests.engines.engine import Engine
from tests.engines.runs import Outcome

_HEAD: Final = """\
# What the edge records of real engines

Each engine runs with a tiny random model behind an edge, and is asked each case in each mode of `pools.NAME.usage`;
documents have one mode. A row has the sums of the records, and what the engine itself counted meanwhile: by its
`/metrics`, or, where it has none, by the usage that it told its client. This page is printed by

```
python -m tests.engines --write
```

which installs each engine, pinned, and plays the cases on the loopback of this machine. `--engine NAME` plays one,
and leaves the others' parts as they are.

- **=**: the sums are equal, to the token.
- **A letter**: they differ, for the reason of that note. It is the engine's doing, or a stream did not come to its end.
- **FAULT**: they differ, and no note says why. The command then exits with 1.
- Half of the clients ask for the usage of their streams themselves, but where it is what is compared: there all do.
- **client leaves**: after 2 to 13 events. **connection breaks**: between the edge and the engine, after 1 to 6 kB.
  **engine fails**: the prompt is longer than the context; of `transformers serve`, which has no limit, an
  answer of no token is asked for.
- An engine that refuses a case has zeros there: `transformers serve` takes one prompt. Of `n` = 2 it gives one choice.
- SGLang runs on the CPU with stand-ins for what its release imports of a GPU and of pictures, and never uses here.
- What [a pool of two has cached](#what-two-engines-have-cached) stands at the end.
"""


def mark(outcome: Outcome) -> str:
    """Return what the table has for an outcome."""
    if is_equal(outcome):
        return "="
    difference = explained(outcome)
    return difference.mark if difference is not None else "FAULT"


def table(outcomes: Iterable[Outcome]) -> str:
    """Return a row for each outcome."""
    head = ["case", "mode", "ends", "source", "prompt, recorded", "counted", "answer, recorded", "counted", "verdict"]
    lines = [
        [
            each.case.name,
            each.mode if each.case.stream else "",
            _told(each.ends),
            _told(each.sources),
            str(each.recorded.prompt),
            str(each.counted.prompt),
            str(each.recorded.completion),
            str(each.counted.completion),
            mark(each),
        ]
        for each in outcomes
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def document(before: str, engines: Sequence[Engine], outcomes: Sequence[Outcome]) -> str:
    """Return docs/engines.md: `before` with new parts for the engines that were played; `engines` has all, in order.

    Parts of nothing that is played here stand behind them.
    """
    parts = {part.partition("\n")[0]: part for part in before.split("\n## ")[1:]}
    for engine in engines:
        own = [each for each in outcomes if each.engine == engine.name]
        if own:
            parts[engine.title] = _part(engine, own)
    titles = [engine.title for engine in engines]
    own_parts = [parts[title] for title in titles if title in parts]
    others = [part for title, part in parts.items() if title not in titles]
    return "\n## ".join([_HEAD, *own_parts, *others])


def _part(engine: Engine, own: Sequence[Outcome]) -> str:
    notes = [each for each in DIFFERENCES if each.mark in {mark(outcome) for outcome in own}]
    told = "".join(f"- **{each.mark}**: {each.reason}\n" for each in notes)
    return f"{engine.title}\n\n`{engine.pins}`; {own[0].requests} requests a row.\n\n{table(own)}\n\n{told}"


def _told(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return f"`{next(iter(counts))}`"
    return ", ".join(f"{count} `{name}`" for name, count in sorted(counts.items()))
