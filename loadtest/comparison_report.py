"""A comparison for people: tables for a terminal, which are Markdown too, and a page with plots."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loadtest import report
from loadtest.comparison import BASELINE, DIRECT, order, told_discarded
from loadtest.measures import PERCENTILES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ABSENT: Final = "-"

Table = tuple[str, list[str], list[list[str]]]


def _number(value: float) -> str:
    """Return three digits that count."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _median(document: Mapping[str, Any], peer: str, key: str, part: str = "") -> str:
    """Return a figure's median, of its `part` ("ratio", "over_direct") when asked, or what stands in its place."""
    figure = document["summary"][peer][key]
    if "instead" in figure:
        return str(figure["instead"] or _ABSENT)
    told = figure.get(part) if part else figure
    return _number(told["median"]) if told else _ABSENT


def _ratio(document: Mapping[str, Any], peer: str, key: str) -> str:
    """Return a figure's ratio to the baseline with its interval, where there were rounds enough for one."""
    ratio = document["summary"][peer][key].get("ratio")
    if peer == BASELINE or not ratio:
        return "1" if peer == BASELINE and ratio else _ABSENT
    if ratio["low"] is None:
        return _number(ratio["median"])
    return f"{_number(ratio['median'])} [{_number(ratio['low'])}, {_number(ratio['high'])}]"


def _three(document: Mapping[str, Any], peer: str, name: str, part: str = "") -> str:
    told = [_median(document, peer, f"{name}_p{each:g}_ms", part) for each in PERCENTILES]
    return told[0] if len(set(told)) == 1 else " / ".join(told)


def _content(document: Mapping[str, Any], peer: str) -> str:
    seen = {
        each["numbers"]["exact"] for each in document["rounds"] if each["peer"] == peer and "exact" in each["numbers"]
    }
    return {True: "unchanged", False: "re-encoded"}[min(seen)] if seen else _ABSENT


def _start(document: Mapping[str, Any], peer: str) -> str:
    start_s = document["peers"][peer]["start_s"]
    return _ABSENT if start_s is None else _number(start_s)


def _name(document: Mapping[str, Any], peer: str) -> str:
    divisor = document["peers"][peer]["load_divisor"]
    return f"{peer} (1/{divisor} load)" if divisor > 1 else peer


def tables(document: Mapping[str, Any]) -> list[Table]:
    """Return titles, headers and rows; a row per proxy, the cheapest request first."""
    names = order(document)
    cpu = [
        [
            _name(document, peer),
            document["peers"][peer]["version"],
            _median(document, peer, "cpu_per_request_us"),
            _ratio(document, peer, "cpu_per_request_us"),
            _median(document, peer, "cpu_per_event_us"),
            _ratio(document, peer, "cpu_per_event_us"),
            _median(document, peer, "cpu_per_stream_us"),
            _median(document, peer, "requests_per_s"),
        ]
        for peer in names
    ]
    latency = [
        [
            _name(document, peer),
            _ABSENT if peer == DIRECT else _three(document, peer, "ttft", "over_direct"),
            _three(document, peer, "lag"),
            _median(document, peer, "together_p99_ms"),
            _ratio(document, peer, "together_p99_ms"),
            _median(document, peer, "worst_beside_big_ms"),
        ]
        for peer in [*names, *([DIRECT] if DIRECT in document["summary"] else [])]
    ]
    rest = [
        [
            _name(document, peer),
            _median(document, peer, "base_mb"),
            _median(document, peer, "memory_per_stream_kb"),
            _median(document, peer, "cpu_per_megabyte_ms"),
            _median(document, peer, "abort_p50_ms"),
            _start(document, peer),
            _content(document, peer),
        ]
        for peer in names
    ]
    return [
        (
            "CPU",
            ["proxy", "version", "request µs", f"x {BASELINE}", "event µs", f"x {BASELINE}", "stream µs", "requests/s"],
            cpu,
        ),
        (
            "Latency in ms",
            [
                "proxy",
                "TTFT added p50 / p99 / p99.9",
                "event lag p50 / p99 / p99.9",
                "256 together p99",
                f"x {BASELINE}",
                "worst lag beside 10 MB",
            ],
            latency,
        ),
        (
            "Memory, bodies, leaving, starting",
            ["proxy", "base MB", "kB a stream", "CPU ms a 1 MB body", "abort ms", "start s", "stream's bytes"],
            rest,
        ),
    ]


def _notes(document: Mapping[str, Any]) -> list[str]:
    notes = [told_discarded(document)]
    notes += [f"missing: {name}" + (f" ({hint})" if hint else "") for name, hint in document["missing"].items()]
    return notes


def _problems(document: Mapping[str, Any]) -> list[str]:
    return [f"FAILED: {name}: {each}" for name, about in document["peers"].items() for each in about["problems"]]


def text(document: Mapping[str, Any]) -> str:
    """Return the tables for a terminal or a README."""
    about = document["about"]
    lines = [f"{about['machine']}, Linux {about['kernel']}, CPython {about['python']}, {about['date']}"]
    lines += [f"`{about['command']}`, {about['rounds']} rounds, edge {about['commit']}"]
    for title, header, rows in tables(document):
        lines += ["", f"**{title}**", "", *_markdown(header, rows)]
    return "\n".join([*lines, "", *_problems(document), *_notes(document)])


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "|" + "|".join(
        "-" * (width + 2) if not index else "-" * (width + 1) + ":" for index, width in enumerate(widths)
    )
    return [line(header), f"{rule}|", *(line(row) for row in rows)]


def html(document: Mapping[str, Any]) -> str:
    """Return the page."""
    about = document["about"]
    facts = {name: value for name, value in about.items() if name != "scale"}
    versions = {
        name: f"{told['version']}: {told['text']}" if told["version"] else told["text"]
        for name, told in document["peers"].items()
    }
    sections = [
        *(report.note(each, bad=True) for each in _problems(document)),
        *(report.note(each) for each in _notes(document)),
        report.section(
            f"CPU, as a multiple of {BASELINE}'s",
            report.note("Median of paired rounds and its 95 % interval. Less is better. The scale is logarithmic."),
            report.plot(_ratios(document, "cpu_per_request_us", "a small request"), height=3.4),
            report.plot(_ratios(document, "cpu_per_event_us", "an event of a stream"), height=3.4),
        ),
        report.section(
            "How long an event is on its way",
            report.note("From the upstream's write to the client's read, at 100 live streams with Poisson arrivals."),
            report.plot(_lags(document, "lag"), height=3.8),
        ),
        report.section(
            "256 streams that fire together",
            report.plot(_ratios(document, "together_p99_ms", "p99 of the event lag"), height=3.4),
        ),
        report.section(
            "Memory of a live stream", report.plot(_plain(document, "memory_per_stream_kb", "kB"), height=3.4)
        ),
    ]
    sections += [report.section(title, report.table(header, rows)) for title, header, rows in tables(document)]
    sections += [report.section("The proxies", report.facts(versions)), report.section("The run", report.facts(facts))]
    return report.page("What the edge costs beside other proxies", sections)


def _ratios(document: Mapping[str, Any], key: str, unit: str) -> "Callable[[Axes], None]":
    told = {peer: document["summary"][peer][key].get("ratio") for peer in order(document)}
    shown = {peer: ratio for peer, ratio in told.items() if ratio}

    def draw(axes: "Axes") -> None:
        report.bars(axes, list(shown), [each["median"] for each in shown.values()], _spans(shown.values()))
        _logarithmic(axes)
        axes.set_xlabel(f"{unit}, x {BASELINE}")
        axes.axvline(1, color="#1a1a1a", linewidth=0.8, linestyle=":")

    return draw


def _plain(document: Mapping[str, Any], key: str, unit: str) -> "Callable[[Axes], None]":
    told = {peer: document["summary"][peer][key] for peer in order(document)}
    shown = {peer: figure for peer, figure in told.items() if "median" in figure}

    def draw(axes: "Axes") -> None:
        report.bars(axes, list(shown), [each["median"] for each in shown.values()], _spans(shown.values()))
        axes.set_xlabel(unit)

    return draw


def _spans(figures: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return the intervals, each empty where there were too few rounds for one."""
    return [
        (each["median"], each["median"]) if each["low"] is None else (each["low"], each["high"]) for each in figures
    ]


def _logarithmic(axes: "Axes") -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")


def _lags(document: Mapping[str, Any], name: str) -> "Callable[[Axes], None]":
    keys = [f"{name}_p{each:g}_ms" for each in PERCENTILES]
    everyone = [*order(document), DIRECT] if DIRECT in document["summary"] else list(order(document))
    shown = [peer for peer in everyone if all("median" in document["summary"][peer][key] for key in keys)]

    def draw(axes: "Axes") -> None:
        for place, peer in enumerate(shown):
            values = [document["summary"][peer][key]["median"] for key in keys]
            axes.plot(values, [place] * len(values), color="#a8b3c4", linewidth=1.5, zorder=1)
        for key, percentile, colour in zip(keys, PERCENTILES, report.COLOURS, strict=False):
            values = [document["summary"][peer][key]["median"] for peer in shown]
            axes.scatter(values, range(len(shown)), color=colour, label=f"p{percentile:g}", zorder=2)
        if shown:  # without a value there is no logarithm to draw
            _logarithmic(axes)
        axes.set_xlabel("milliseconds")
        axes.set_yticks(range(len(shown)), shown)
        axes.invert_yaxis()
        axes.legend(loc="lower right")

    return draw
