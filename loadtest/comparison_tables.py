"""A comparison for people, as tables for a terminal, which are Markdown too."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loadtest.comparison import BASELINE, DIRECT, FIGURES, beside, order, told_discarded, told_others
from loadtest.measures.load import PERCENTILES
from loadtest.measures.streams import PUBLISHED_QPS
from loadtest.tables import columns

OURS: Final = "edge"
_TWO: Final = "edge-two"
_ABSENT: Final = "-"
_PER_PROCESS: Final = ("cpu_per_request_us", "cpu_per_unkept_request_us")
_COMPARED: Final = {
    "small request": "cpu_per_request_us",
    "event of a stream": "cpu_per_event_us",
    "prompt of 200 to 400 kB": "cpu_per_prompt_ms",
    "body of 1 MB": "cpu_per_megabyte_ms",
    "messages, a stream": "cpu_per_messages_stream_us",
    "responses, a stream": "cpu_per_responses_stream_us",
    "llm-d's load": "published_cores",
    "connection not kept": "cpu_per_unkept_request_us",
    "request over TLS": "cpu_per_tls_request_us",
    "request with a handshake": "cpu_per_handshake_us",
    "memory of a stream": "memory_per_stream_kb",
}
_NEITHER: Final = (OURS, _TWO, DIRECT, "floor", "tutorial", "haproxy-delay")

Table = tuple[str, list[str], list[list[str]]]
Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """A column: what it is called, and what a proxy has in it."""

    header: str
    cell: Callable[[Document, str], str]


def number(value: float) -> str:
    """Return three digits that count."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spanned(told: Mapping[str, Any]) -> str:
    """Return a median with its interval, where there were rounds enough for one."""
    if told["low"] is None:
        return number(told["median"])
    return f"{number(told['median'])} [{number(told['low'])}, {number(told['high'])}]"


def _figure(document: Document, peer: str, key: str, part: str, shown: Callable[[Mapping[str, Any]], str]) -> str:
    """Return a figure, or its `part` ("ratio", "over_direct") when asked, or what stands in its place."""
    figure = document["summary"][peer][key]
    if "instead" in figure:
        return str(figure["instead"] or _ABSENT)
    told = figure.get(part) if part else figure
    return shown(told) if told else _ABSENT


def _median(document: Document, peer: str, key: str, part: str = "") -> str:
    return _figure(document, peer, key, part, lambda told: number(told["median"]))


def _ratio(document: Document, peer: str, key: str) -> str:
    ratio = document["summary"][peer][key].get("ratio")
    if not ratio:
        return _ABSENT
    return "1" if peer == BASELINE else spanned(ratio)


def _three(document: Document, peer: str, name: str, part: str = "") -> str:
    told = [_median(document, peer, f"{name}_p{each:g}_ms", part) for each in PERCENTILES]
    return told[0] if len(set(told)) == 1 else " / ".join(told)


def _content(document: Document, peer: str) -> str:
    seen = {
        exact
        for each in document["rounds"]
        if each["peer"] == peer
        for name, exact in each["numbers"].items()
        if name == "exact" or name.endswith("_exact")
    }
    return {True: "unchanged", False: "re-encoded"}[min(seen)] if seen else _ABSENT


def _name(document: Document, peer: str) -> str:
    divisor = document["peers"][peer]["load_divisor"]
    return f"{peer} (1/{divisor} load)" if divisor > 1 else peer


def _plain(header: str, key: str) -> Column:
    return Column(header, lambda document, peer: _median(document, peer, key))


def _interval(header: str, key: str) -> Column:
    return Column(header, lambda document, peer: _figure(document, peer, key, "", spanned))


def _with_ratio(header: str, key: str) -> tuple[Column, Column]:
    return _plain(header, key), Column(f"x {BASELINE}", lambda document, peer: _ratio(document, peer, key))


_LATENCY: Final = "Latency in ms"
_TABLES: Final[Mapping[str, Sequence[Column]]] = {
    "CPU": (
        *_with_ratio("request µs", "cpu_per_request_us"),
        *_with_ratio("event µs", "cpu_per_event_us"),
        _plain("stream µs", "cpu_per_stream_us"),
        _plain("requests/s", "requests_per_s"),
        Column("version", lambda document, peer: document["peers"][peer]["version"]),
    ),
    "Under load: an open loop at 70 % of each proxy's own core": (
        _plain("streams/s", "loaded_per_s"),
        _plain("busy %", "loaded_busy_percent"),
        _interval("TTFT p50 over direct, ms", "loaded_added_p50_ms"),
        _interval("TTFT p99 over direct, ms", "loaded_added_p99_ms"),
    ),
    _LATENCY: (
        Column(
            "TTFT added p50 / p99 / p99.9",
            lambda document, peer: _ABSENT if peer == DIRECT else _three(document, peer, "ttft", "over_direct"),
        ),
        Column("event lag p50 / p99 / p99.9", lambda document, peer: _three(document, peer, "lag")),
        *_with_ratio("256 together p99", "together_p99_ms"),
        _plain("worst lag beside 10 MB", "worst_beside_big_ms"),
    ),
    "Long bodies, CPU": (
        *_with_ratio("prompt of 200 to 400 kB, 16 tokens, ms", "cpu_per_prompt_ms"),
        *_with_ratio("body of 1 MB, ms", "cpu_per_megabyte_ms"),
    ),
    "Messages and responses, CPU of a stream of 40 tokens": (
        *_with_ratio("messages µs", "cpu_per_messages_stream_us"),
        *_with_ratio("responses µs", "cpu_per_responses_stream_us"),
        Column("streams' bytes", _content),
    ),
    "Connections, CPU of a request": (
        *_with_ratio("not kept µs", "cpu_per_unkept_request_us"),
        *_with_ratio("over TLS µs", "cpu_per_tls_request_us"),
        *_with_ratio("with a handshake µs", "cpu_per_handshake_us"),
    ),
    f"llm-d's load: cores for {PUBLISHED_QPS} requests a second of 200 and 100 tokens": (
        *_with_ratio("cores", "published_cores"),
        Column("of a core for one QPS", lambda document, peer: _per_query(document, peer)),
    ),
    "Live streams, mostly idle; leaving; starting": (
        _plain("base MB", "base_mb"),
        *_with_ratio("kB a stream", "memory_per_stream_kb"),
        _plain("CPU of an event µs", "idle_cpu_per_event_us"),
        _plain("abort ms", "abort_p50_ms"),
        _plain("start s", "start_s"),
    ),
}


def _per_query(document: Document, peer: str) -> str:
    return _figure(document, peer, "published_cores", "", lambda told: f"{told['median'] / PUBLISHED_QPS:.2%}")


def tables(document: Document) -> list[Table]:
    """Return titles, headers and rows; a row per proxy, the cheapest request first, without those not measured."""
    made = []
    for title, told in _TABLES.items():
        shown = [*order(document), *([DIRECT] if title == _LATENCY and DIRECT in document["summary"] else [])]
        rows = [(peer, [column.cell(document, peer) for column in told]) for peer in shown]
        kept = [[_name(document, peer), *cells] for peer, cells in rows if set(cells) != {_ABSENT}]
        if kept:
            made.append((title, ["proxy", *(column.header for column in told)], kept))
    return [*made, *_standings(document), *_processes(document)]


def _standings(document: Document) -> list[Table]:
    """Return the table of the edge's ratios to each other proxy, with what each interval says."""
    others = [peer for peer in order(document) if peer not in _NEITHER]
    if OURS not in document["summary"] or not others:
        return []
    rows = [
        [work, *(_standing(document, OURS, other, key) for other in others)]
        for work, key in _COMPARED.items()
        if "median" in document["summary"][OURS][key]
    ]
    return [(f"{OURS} beside each: its cost as a multiple of theirs", ["work", *others], rows)]


def _processes(document: Document) -> list[Table]:
    """Return the table of two processes on one socket beside one."""
    if not {OURS, _TWO} <= document["summary"].keys():
        return []
    rows = [
        [work, _median(document, OURS, key), _median(document, _TWO, key), _standing(document, OURS, _TWO, key)]
        for work, key in _COMPARED.items()
        if key in _PER_PROCESS
    ]
    header = ["work", "one, µs", "two, µs", "requests a CPU second of two, as a multiple of one's"]
    return [("Two processes on one socket", header, rows)]


def _standing(document: Document, peer: str, other: str, key: str) -> str:
    """Return the ratio of two proxies' figures, its interval, and a word where it says that there is no difference."""
    [figure] = [each for each in FIGURES if each.key == key]
    ratio, standing = beside(document, peer, other, figure)
    if ratio is None:
        return _median(document, other, key) if "instead" in document["summary"][other][key] else _ABSENT
    told = spanned({"median": ratio.median, "low": ratio.low, "high": ratio.high})
    return f"{told} {standing.value}"


def notes(document: Document) -> list[str]:
    """Return what a reader must know of the run: what was discarded, how busy the machine was, what is missing."""
    told = [told_discarded(document), told_others(document)]
    told += ["Interrupted: not all rounds were measured."] if document["about"].get("interrupted") else []
    told += [f"missing: {name}" + (f" ({hint})" if hint else "") for name, hint in document["missing"].items()]
    return [each for each in told if each]


def problems(document: Document) -> list[str]:
    """Return what failed."""
    return [f"FAILED: {name}: {each}" for name, about in document["peers"].items() for each in about["problems"]]


def text(document: Document) -> str:
    """Return the tables for a terminal or a README."""
    about = document["about"]
    lines = [f"{about['machine']}, Linux {about['kernel']}, CPython {about['python']}, {about['date']}"]
    lines += [f"`{about['command']}`, {about['rounds']} rounds, edge {about['commit']}"]
    for title, header, rows in tables(document):
        lines += ["", f"**{title}**", "", *columns(header, rows)]
    return "\n".join([*lines, "", *problems(document), *notes(document)])
