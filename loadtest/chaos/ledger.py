"""What engines gave, what clients saw and what edges recorded and delivered, compared by the id of each request.

Rules of the verdict:

- A record has one end, and an edge opened it; a client's request has one record at most.
- The sink has each record that ended, once by its id, and nothing else.
- Counts of the upstream (`final`) equal what the engine gave that answered, of answers and of prompts; others may have
  been asked too, before it or beside it.
- Of an answer that broke and went on elsewhere they are those of the whole one: the prompt that the first engine read,
  and each token once, whatever two engines gave. What the second one told is what it gave.
- An estimate is bounded: nothing where the engine gave nothing, and at most what the request allowed.
- `crashed` counts nothing. It ends only requests that a killed process had: at most as many at each kill as clients.
- What an engine was asked has a record. What a client read whole is `complete`, with the counts that the client saw.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

_SHOWN: Final = 5  # ids of a problem
Record = Mapping[str, Any]


@dataclass(slots=True)
class Asked:
    """One request of a client and what became of it; `allowed_tokens` is the most that its answers may have.

    `prompt_tokens` is 0 where the engine counts them. `edge` is who was asked. `is_whole`: the answer came with status
    200 to its protocol's last event, without an error. `is_hung`: it had not come to any end when the client's patience
    ended.
    """

    id: str
    edge: str
    path: str
    stream: bool
    allowed_tokens: int
    prompt_tokens: int
    fate: str = "read"
    status: int = 0
    is_whole: bool = False
    told_tokens: int | None = None
    is_hung: bool = False


@dataclass(frozen=True, slots=True)
class Given:
    """What an engine gave to one attempt: tokens handed to its transport, and how that ended; `endpoint` is where.

    `prompt_tokens` is what it read.
    """

    started: float
    tokens: int
    outcome: str
    endpoint: str = ""
    prompt_tokens: int = 0


@dataclass(slots=True)
class Journal:
    """The records of one edge, and what its sink received of them, by record id."""

    name: str
    opened: set[str] = field(default_factory=set)
    ended: list[Record] = field(default_factory=list)
    delivered: dict[str, Record] = field(default_factory=dict)
    kills: int = 0

    def read(self, directory: Path) -> None:
        """Read the files of the journal."""
        for file in sorted(directory.glob("*.jsonl")):
            for line in map(orjson.loads, file.read_bytes().splitlines()):
                if "end" in line:
                    self.ended.append(line)
                else:
                    self.opened.add(line["id"])


@dataclass(slots=True)
class Row:
    """Records that ended alike, in tokens of answers."""

    records: int = 0
    given: int = 0
    recorded: int = 0
    furthest: int = 0

    def add(self, given: int, recorded: int) -> None:
        """Count a record."""
        self.records += 1
        self.given += given
        self.recorded += recorded
        self.furthest = max(self.furthest, abs(given - recorded))


@dataclass(slots=True)
class Ledger:
    """The outcome: `rows` by end and source of the counts, `paths` by path and end, and every `problem`."""

    rows: dict[tuple[str, str], Row] = field(default_factory=lambda: defaultdict(Row))
    paths: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def blame(self, problem: str, ids: Iterable[str]) -> None:
        """Note a problem of some requests, if there are any."""
        found = sorted(ids)
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            self.problems.append(f"{problem}: {', '.join(found[:_SHOWN])}{more}")

    def lines(self) -> list[str]:
        """Return the table for people."""
        head = f"{'end':22} {'counts':10} {'records':>8} {'given':>10} {'recorded':>10} {'furthest':>9}"
        found = [head]
        for (end, source), row in sorted(self.rows.items()):
            numbers = f"{row.records:8} {row.given:10} {row.recorded:10} {row.furthest:9}"
            found.append(f"{end:22} {source:10} {numbers}")
        return found


def compare(
    asked: Mapping[str, Asked], given: Mapping[str, Sequence[Given]], journals: Sequence[Journal], clients: int
) -> Ledger:
    """Return the ledger of a run; `given` holds the attempts of each request in their order."""
    ledger = Ledger()
    for journal in journals:
        _check_journal(ledger, journal, clients)
    records = [record for journal in journals for record in journal.ended]
    of_request = {each["request_id"]: each for each in records}
    counted = Counter(each["request_id"] for each in records)
    ledger.blame("two records of one request", (each for each, count in counted.items() if count > 1))
    ledger.blame("a record of a request that no client sent", set(of_request) - set(asked))
    ledger.blame("an engine was asked and there is no record", set(given) - set(of_request))
    for request_id, record in of_request.items():
        if request_id in asked:
            _check_counts(ledger, asked[request_id], given.get(request_id, ()), record)
    _check_clients(ledger, asked.values(), of_request)
    return ledger


def _check_journal(ledger: Ledger, journal: Journal, clients: int) -> None:
    name, ids = journal.name, Counter(each["id"] for each in journal.ended)
    ledger.blame(f"{name}: a record ended twice", (each for each, count in ids.items() if count > 1))
    ledger.blame(f"{name}: a record has no end", journal.opened - set(ids))
    ledger.blame(f"{name}: an end without a beginning", set(ids) - journal.opened)
    ended = {each["id"]: each for each in journal.ended}
    ledger.blame(f"{name}: not delivered to the sink", set(ended) - set(journal.delivered))
    ledger.blame(f"{name}: delivered and not in the journal", set(journal.delivered) - set(ended))
    both = set(ended) & set(journal.delivered)
    ledger.blame(f"{name}: delivered otherwise", (each for each in both if ended[each] != journal.delivered[each]))
    crashed = sum(each["end"] == "crashed" for each in journal.ended)
    if crashed > journal.kills * clients:
        ledger.problems.append(f"{name}: {crashed} records crashed in {journal.kills} kills of {clients} clients")


def _check_counts(ledger: Ledger, asked: Asked, attempts: Sequence[Given], record: Record) -> None:
    end, source, recorded = record["end"], record["usage_source"], record["completion_tokens"]
    answered = [each for each in attempts if each.endpoint == (record.get("endpoint") or "")]
    last = answered[-1].tokens if answered else 0
    is_resumed = bool(record.get("resumes"))
    given = sum(each.tokens for each in attempts) if is_resumed else last  # some of it twice, if it is resumed
    ledger.rows[f"{end}, resumed" if is_resumed else end, source].add(given, recorded)
    ledger.paths[asked.path, end] += 1
    prompt = asked.prompt_tokens or next((each.prompt_tokens for each in attempts if each.prompt_tokens), 0)
    prompts = f"prompt {prompt}, recorded {record['prompt_tokens']}"
    one = [f"{asked.id} ({asked.path}, {end}, {source}, given {given}, recorded {recorded}, {prompts})"]
    whole, most = given, asked.allowed_tokens if given else 0
    if is_resumed:
        whole, most = asked.allowed_tokens, min(asked.allowed_tokens, given)
    if source == "final" and (recorded != whole or record["prompt_tokens"] != prompt):
        ledger.blame("counts of the upstream were not recorded as given", one)
    if is_resumed and end == "complete" and record["resumed_usage"]["completion_tokens"] != last:
        ledger.blame("a resume told otherwise than its engine gave", one)
    if end == "complete" and source != "final":
        ledger.blame("complete, and not by the counts of the upstream", one)
    if recorded > most:
        ledger.blame("more recorded than the request allowed", one)
    if end in ("crashed", "internal_error") and recorded:
        ledger.blame("counted, and nobody can know", one)
    if end == "internal_error":
        ledger.blame("a defect of the edge", one)


def _check_clients(ledger: Ledger, asked: Iterable[Asked], of_request: Mapping[str, Record]) -> None:
    lost, differing, refused = [], [], Counter[int]()
    hung = []
    for each in asked:
        hung += [each.id] if each.is_hung else []
        refused[each.status] += each.status in (401, 404, 500) and each.id not in of_request
        if not each.is_whole:
            continue
        record = of_request.get(each.id)
        if record is None or record["end"] != "complete":
            lost.append(f"{each.id} ({each.path}, {record['end'] if record else 'no record'})")
        elif each.told_tokens is not None and each.told_tokens != record["completion_tokens"]:
            differing.append(each.id)
    ledger.blame("an answer came to no end", hung)
    ledger.blame("read whole, and not recorded as complete", lost)
    ledger.blame("recorded otherwise than the client was told", differing)
    ledger.problems += [f"{count} good requests got {status}" for status, count in sorted(refused.items()) if count]
