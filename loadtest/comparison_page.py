"""A comparison for people, as a page with plots."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loadtest import report
from loadtest.comparison import BASELINE, DIRECT, order
from loadtest.comparison_tables import notes, problems, tables
from loadtest.measures.load import PERCENTILES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Draw = Callable[[Axes], None]

_ROW_IN: Final = 0.27  # the height of a bar with its space
_AXIS_IN: Final = 0.85
_RATIOS: Final = {
    "A small request": "cpu_per_request_us",
    "An event of a stream": "cpu_per_event_us",
    "A prompt of 200 to 400 kB with 16 tokens": "cpu_per_prompt_ms",
    "A stream of messages": "cpu_per_messages_stream_us",
    "A stream of responses": "cpu_per_responses_stream_us",
    "A request on a connection of its own": "cpu_per_unkept_request_us",
    "A request over TLS": "cpu_per_tls_request_us",
    "Memory of a live stream": "memory_per_stream_kb",
}


def html(document: Mapping[str, Any]) -> str:
    """Return the page."""
    about = document["about"]
    facts = {name: value for name, value in about.items() if name != "scale"}
    versions = {
        name: f"{told['version']}: {told['text']}" if told["version"] else told["text"]
        for name, told in document["peers"].items()
    }
    sections = [report.note(each, bad=True) for each in problems(document)]
    sections += [report.note(each) for each in notes(document)]
    if ratios := [(title, key) for title, key in _RATIOS.items() if _shown(document, key, "ratio")]:
        sections.append(
            report.section(
                f"Costs, as a multiple of {BASELINE}'s",
                report.note(
                    "Median of paired rounds, and a line for its 95 % interval where there were rounds enough. "
                    "Less is better. The scale is logarithmic."
                ),
                report.grid(
                    [(title, _ratios(document, key), _height(_shown(document, key, "ratio"))) for title, key in ratios]
                ),
            )
        )
    if everyone := _everyone(document, "lag"):
        sections.append(
            report.section(
                "How long an event is on its way",
                report.note("From the upstream's write to the client's read, at 100 live streams of random arrivals."),
                report.plot(_lags(document, "lag"), height=_height(everyone) + 0.3),
            )
        )
    if loaded := _shown(document, "loaded_added_p99_ms"):
        sections.append(
            report.section(
                "Time to the first event at 70 % load",
                report.note("p99, over what the rig takes alone for the same arrivals. Each proxy at its own rate."),
                report.plot(
                    _bars(document, "loaded_added_p99_ms", "milliseconds"),
                    height=_height(loaded),
                ),
            )
        )
    sections += [report.section(title, report.table(header, rows)) for title, header, rows in tables(document)]
    sections += [report.section("The proxies", report.facts(versions)), report.section("The run", report.facts(facts))]
    return report.page("What the edge costs beside other proxies", sections)


def _height(shown: Sequence[object] | Mapping[str, object]) -> float:
    return _AXIS_IN + _ROW_IN * max(len(shown), 1)


def _shown(document: Mapping[str, Any], key: str, part: str = "") -> dict[str, Mapping[str, Any]]:
    """Return the figure of each proxy that has it, or a part of it, the cheapest first."""
    told = {peer: document["summary"][peer][key] for peer in order(document)}
    found = {peer: figure.get(part) if part else figure for peer, figure in told.items() if "median" in figure}
    kept = {peer: figure for peer, figure in found.items() if figure}
    return dict(sorted(kept.items(), key=lambda each: float(each[1]["median"])))


def _ratios(document: Mapping[str, Any], key: str) -> "Draw":
    """Draw ratios to the baseline; those of next to nothing, which have no logarithm, are left out."""
    shown = {peer: each for peer, each in _shown(document, key, "ratio").items() if (each["low"] or each["median"]) > 0}

    def draw(axes: "Axes") -> None:
        axes.axvline(1, color=report.INK, linewidth=0.8, linestyle=":", zorder=0.9)
        axes.set_xscale("log")
        report.bars(axes, list(shown), _medians(shown), _spans(shown), begin=1.0)
        report.plain_numbers(axes.xaxis)
        axes.set_xlabel(f"x {BASELINE}")

    return draw


def _bars(document: Mapping[str, Any], key: str, unit: str) -> "Draw":
    shown = _shown(document, key)

    def draw(axes: "Axes") -> None:
        report.bars(axes, list(shown), _medians(shown), _spans(shown))
        axes.set_xlabel(unit)

    return draw


def _medians(shown: Mapping[str, Mapping[str, Any]]) -> list[float]:
    return [each["median"] for each in shown.values()]


def _spans(shown: Mapping[str, Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return the intervals, each empty where there were too few rounds for one."""
    return [
        (each["median"], each["median"]) if each["low"] is None else (each["low"], each["high"])
        for each in shown.values()
    ]


def _everyone(document: Mapping[str, Any], name: str) -> list[str]:
    """Return who has all percentiles of a latency, the rig alone last."""
    everyone = [*order(document), *([DIRECT] if DIRECT in document["summary"] else [])]
    keys = [f"{name}_p{each:g}_ms" for each in PERCENTILES]
    return [peer for peer in everyone if all("median" in document["summary"][peer][key] for key in keys)]


def _lags(document: Mapping[str, Any], name: str) -> "Draw":
    keys = [f"{name}_p{each:g}_ms" for each in PERCENTILES]
    shown = _everyone(document, name)

    def draw(axes: "Axes") -> None:
        for place, peer in enumerate(shown):
            values = [document["summary"][peer][key]["median"] for key in keys]
            axes.plot(values, [place] * len(values), color=report.GREY, linewidth=1.5, zorder=1)
        for key, percentile, colour in zip(keys, PERCENTILES, report.COLOURS, strict=False):
            values = [document["summary"][peer][key]["median"] for peer in shown]
            axes.scatter(values, range(len(shown)), color=colour, label=f"p{percentile:g}", zorder=2)
        if shown:  # without a value there is no logarithm to draw
            axes.set_xscale("log")
            report.plain_numbers(axes.xaxis)
        axes.set_xlabel("milliseconds")
        axes.set_yticks(range(len(shown)), shown)
        axes.invert_yaxis()
        report.legend_above(axes)

    return draw
