"""The HTML pages: self-contained, with plots as SVG, readable at a glance."""

import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loadtest.results import METRICS, Tally, label, shown_ms
from loadtest.timeline import Interval
from loadtest.values import ranked_ms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
td, th { padding: .25rem .5rem; font-size: .9em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left } th { font-weight: 600 }
figure { margin: 1rem 0 } svg { width: 100%; height: auto } .bad { color: #b00020; font-weight: 600 }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem } .tiles div { background: #f3f5f8; border-radius: .4rem;
padding: .5rem 1rem; color: #555 } .tiles b { display: block; font-size: 1.4rem; color: #1a1a1a }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; color: #555 } dd { margin: 0 }
"""
COLOURS: Final = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#57534e")
_GREY: Final = "#9aa5b5"
_LONG_NAMES: Final = {
    "ttft": "TTFT: to the first content",
    "vllm_ttft": "vLLM's TTFT: to the first event",
    "tpot": "TPOT: per token after it",
    "itl": "ITL: between two events",
    "e2el": "E2EL: to the last token, or the end",
}
_POINTS: Final = 400  # of a curve: more cannot be seen
_MAX_VECTORS: Final = 2000  # dots; more are drawn as a picture, or a page would have megabytes
_FEW_DECADES: Final = 1000.0


def page(title: str, sections: Sequence[str]) -> str:
    """Return a page; sections are HTML."""
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
    return f"{head}<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{''.join(sections)}</html>\n"


def section(title: str, *content: str) -> str:
    """Return a part of a page under a heading; `content` is HTML."""
    return f"<h2>{html.escape(title)}</h2>{''.join(content)}"


def note(text: str, bad: bool = False) -> str:
    """Return a paragraph."""
    return f"<p{' class=bad' if bad else ''}>{html.escape(text)}</p>"


def facts(pairs: Mapping[str, object]) -> str:
    """Return names and values, small."""
    items = "".join(f"<dt>{html.escape(name)}<dd>{html.escape(str(value))}" for name, value in pairs.items())
    return f"<dl>{items}</dl>"


def tiles(pairs: Mapping[str, str]) -> str:
    """Return the few values that a reader looks for first, big."""
    items = "".join(f"<div><b>{html.escape(value)}</b>{html.escape(name)}</div>" for name, value in pairs.items())
    return f"<div class=tiles>{items}</div>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first column names the row."""
    head = "".join(f"<th>{html.escape(each)}" for each in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(each)}" for each in row) for row in rows)
    return f"<table><thead><tr>{head}<tbody>{body}</table>"


def plot(draw: "Callable[[Axes], None]", *, width: float = 9.0, height: float = 3.6) -> str:
    """Return a plot as inline SVG; `draw` fills its axes."""
    import matplotlib  # here, since it takes half a second that only a report should cost

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    style = matplotlib.rc_context(
        {
            "svg.fonttype": "none",  # text stays text: small, and can be searched
            "svg.hashsalt": "loadtest",  # the same numbers give the same page
            "savefig.dpi": 150,  # of what is drawn as a picture
        }
    )
    with style:
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"


def bars(axes: "Axes", names: Sequence[str], heights: Sequence[float], spans: Sequence[tuple[float, float]]) -> None:
    """Draw horizontal bars with their intervals, the first on top."""
    places = range(len(names))
    axes.barh(places, heights, color=[COLOURS[0] if name == "edge" else "#a8b3c4" for name in names], height=0.65)
    for place, value, (low, high) in zip(places, heights, spans, strict=True):
        axes.plot([low, high], [place, place], color="#1a1a1a", linewidth=1.2)
        axes.annotate(f" {value:.2f}", (max(value, high), place), va="center", fontsize=9)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.margins(x=0.12)


def run_page(
    about: Mapping[str, object],
    numbers: Mapping[str, Any],
    tally: Tally,
    shown: Sequence[str],
    percentiles: Sequence[float],
) -> str:
    """Return the page of one run."""
    shown = [metric for metric in shown if f"mean_{metric}_ms" in numbers]
    colours = {metric: COLOURS[METRICS.index(metric)] for metric in shown}
    columns = ("mean", "std", *(f"p{each:g}" for each in percentiles))
    rows = [[_LONG_NAMES[metric], *(shown_ms(numbers[f"{each}_{metric}_ms"]) for each in columns)] for metric in shown]
    sections = [tiles(_run_tiles(numbers))]
    sections += [note(f"Void: {reason}. These are not the target's numbers.", bad=True) for reason in numbers["void"]]
    if numbers["error_counts"]:
        counts = [[error, f"{count:,}"] for error, count in numbers["error_counts"].items()]
        sections.append(section("Failures", table(("what", "requests"), counts)))
    if shown:
        from_text = "the send" if about["request_rate"] == "inf" else "the intended send time"
        sections += [
            section("Latency", note(f"In milliseconds, from {from_text}."), table(("", *columns), rows)),
            section(
                "Distribution",
                plot(_distribution(tally, colours), height=3.2),
                note("The same by percentile: each step to the right leaves out ten times fewer."),
                plot(_tails(tally, colours), height=3.2),
            ),
        ]
    intervals, width_s = tally.intervals(), tally.timeline.width_s
    over_time = [plot(_throughput(intervals, width_s, "finished", "requests / s"), height=2.2)]
    if numbers["total_output_tokens"]:
        over_time.append(plot(_throughput(intervals, width_s, "tokens", "tokens / s"), height=2.2))
    if "ttft" in shown:
        over_time.append(plot(_first_tokens(tally.dots, intervals, width_s), height=3.0))
    sections.append(section("Over time", *over_time))
    lags = " / ".join(f"{numbers[f'generator_lag_{each}_ms']:.2f}" for each in ("p50", "p99", "max"))
    rig = {
        "generator lag p50 / p99 / max (ms)": lags,
        "generator busy (of a core)": f"{numbers['generator_busy']:.0%}",
        "generator waited for a core": f"{numbers['generator_waited']:.1%}",
        "taken by the hypervisor": f"{numbers['machine_steal']:.1%}",
    }
    sections.append(section("The run", facts({**about, **rig})))
    return page(f"Load test of {about['target']}", sections)


def _run_tiles(numbers: Mapping[str, Any]) -> dict[str, str]:
    told = {
        "answered": f"{numbers['completed']:,}",
        "failed": f"{numbers['failed']:,}",
        "requests / s": f"{numbers['request_throughput']:,.1f}",
    }
    if numbers["request_goodput"] is not None:
        told["within the goodput limits / s"] = f"{numbers['request_goodput']:,.1f}"
    if numbers["total_output_tokens"]:
        told["tokens / s"] = f"{numbers['output_throughput']:,.0f}"
    for metric in ("ttft", "tpot") if "median_ttft_ms" in numbers else ("e2el",):
        if f"median_{metric}_ms" in numbers:
            told[f"median {metric.upper()}, ms"] = f"{numbers[f'median_{metric}_ms']:,.2f}"
    return told | {"at once at most": f"{numbers['max_concurrent_requests']:,}"}


def _distribution(tally: Tally, colours: Mapping[str, str]) -> "Callable[[Axes], None]":
    shares = [each / _POINTS for each in range(_POINTS + 1)]

    def draw(axes: "Axes") -> None:
        for metric, colour in colours.items():
            milliseconds = tally.values[metric].ranked_ms(shares)
            axes.plot(milliseconds, [each * 100 for each in shares], label=label(metric), color=colour)
        axes.set_xscale("log")
        axes.set_ylim(0, 102)
        axes.set_xlabel("milliseconds")
        axes.set_ylabel("% at or below")
        _legend_above(axes)
        _plain_numbers(axes.xaxis)

    return draw


def _tails(tally: Tally, colours: Mapping[str, str]) -> "Callable[[Axes], None]":
    def draw(axes: "Axes") -> None:
        most = 1.0
        for metric, colour in colours.items():
            seconds = tally.values[metric]
            nines = math.log10(seconds.count)  # as far as the values reach: beyond, there is less than one
            most = max(most, nines)
            places = [nines * each / _POINTS for each in range(_POINTS + 1)]
            axes.plot(places, seconds.ranked_ms([1 - 10**-each for each in places]), label=label(metric), color=colour)
        ticks = range(int(most) + 1)
        axes.set_xticks(list(ticks), ["0" if each == 0 else f"{100 - 10.0 ** (2 - each):g}" for each in ticks])
        axes.set_yscale("log")
        axes.set_xlabel("percentile")
        axes.set_ylabel("milliseconds")
        _legend_above(axes)
        _plain_numbers(axes.yaxis)

    return draw


def _throughput(intervals: Sequence[Interval], width_s: float, name: str, unit: str) -> "Callable[[Axes], None]":
    def draw(axes: "Axes") -> None:
        middles = [each.at + width_s / 2 for each in intervals]
        axes.bar(middles, [getattr(each, name) / width_s for each in intervals], width=width_s * 0.9, color=COLOURS[0])
        if name == "finished" and any(each.failed for each in intervals):
            failed = [each.failed / width_s for each in intervals]
            bottoms = [each.finished / width_s for each in intervals]
            axes.bar(middles, failed, width=width_s * 0.9, bottom=bottoms, color=COLOURS[1], label="failed")
            _legend_above(axes)
        axes.set_xlim(0, intervals[-1].at + width_s)
        axes.set_ylabel(unit)

    return draw


def _first_tokens(
    dots: Sequence[tuple[float, float]], intervals: Sequence[Interval], width_s: float
) -> "Callable[[Axes], None]":
    def draw(axes: "Axes") -> None:
        axes.scatter(
            [start for start, _ in dots],
            [ttft * 1e3 for _, ttft in dots],
            s=5,
            color=_GREY,
            linewidths=0,
            label="each request",
            rasterized=len(dots) > _MAX_VECTORS,
        )
        filled = [each for each in intervals if each.ttfts]
        for share, name, colour in ((0.5, "p50", COLOURS[0]), (0.99, "p99", COLOURS[1])):
            heights = [ranked_ms(sorted(each.ttfts), [share])[0] for each in filled]
            axes.plot([each.at + width_s / 2 for each in filled], heights, ".-", label=name, color=colour)
        axes.set_xlim(0, intervals[-1].at + width_s)
        axes.set_yscale("log")
        axes.set_xlabel("seconds since the start")
        axes.set_ylabel("TTFT, ms")
        _legend_above(axes)
        _plain_numbers(axes.yaxis)

    return draw


def _legend_above(axes: "Axes") -> None:
    """Draw the legend above, where it hides no curve and takes no width: times stay below one another."""
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(METRICS), frameon=False)


def _plain_numbers(axis: "Axis") -> None:
    """Write 0.5, 20 and 1000 at a logarithmic axis, not powers of ten; between decades too when there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    few = high / max(low, 1e-9) < _FEW_DECADES
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
