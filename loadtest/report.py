"""The HTML pages: self-contained, with plots as SVG, readable at a glance."""

import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loadtest.results import METRICS, Outcome, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left } th { font-weight: 600 }
figure { margin: 1rem 0 } svg { max-width: 100%; height: auto } .bad { color: #b00020; font-weight: 600 }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; color: #555 } dd { margin: 0 }
"""
COLOURS: Final = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#57534e")


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

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
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


def _distribution(outcomes: Sequence[Outcome]) -> "Callable[[Axes], None]":
    def draw(axes: "Axes") -> None:
        for metric, colour in zip(METRICS, COLOURS, strict=False):
            seconds = sorted(values(outcomes, metric))
            if seconds:
                shares = [(at + 1) / len(seconds) for at in range(len(seconds))]
                axes.plot(
                    [each * 1e3 for each in seconds], shares, label=metric.upper(), color=colour, drawstyle="steps"
                )
        axes.set_xscale("log")
        axes.set_xlabel("milliseconds")
        axes.set_ylabel("share of requests")
        axes.legend(loc="lower right")

    return draw


def _timeline(outcomes: Sequence[Outcome]) -> "Callable[[Axes], None]":
    def draw(axes: "Axes") -> None:
        good = [each for each in outcomes if not each.error]
        bad = [each for each in outcomes if each.error]
        axes.scatter(
            [each.start for each in good], [each.ttft * 1e3 for each in good], s=6, color=COLOURS[0], label="TTFT"
        )
        axes.scatter(
            [each.start for each in good], [each.e2el * 1e3 for each in good], s=6, color=COLOURS[2], label="E2EL"
        )
        axes.scatter([each.start for each in bad], [1.0] * len(bad), s=14, marker="x", color=COLOURS[1], label="failed")
        axes.set_yscale("log")
        axes.set_xlabel("seconds since the start")
        axes.set_ylabel("milliseconds")
        axes.legend(loc="upper right")

    return draw


def run_page(
    about: Mapping[str, object],
    numbers: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    shown: Sequence[str],
    percentiles: Sequence[float],
) -> str:
    """Return the page of one run."""
    rows = [
        [
            metric.upper(),
            f"{numbers[f'mean_{metric}_ms']:.2f}",
            *(f"{numbers[f'p{each:g}_{metric}_ms']:.2f}" for each in percentiles),
        ]
        for metric in shown
        if f"mean_{metric}_ms" in numbers
    ]
    goodput = (
        "" if numbers["request_goodput"] is None else f", {numbers['request_goodput']:.1f} within the goodput limits"
    )
    sections = [
        note(
            f"{numbers['completed']} requests answered, {numbers['failed']} failed, in {numbers['duration']:.1f} s: "
            f"{numbers['request_throughput']:.1f} requests/s{goodput}, {numbers['output_throughput']:.0f} tokens/s."
        )
    ]
    if numbers["void"]:
        sections.append(note("Void: the generator could not keep its schedule.", bad=True))
    if numbers["error_counts"]:
        counts = [[error, str(count)] for error, count in numbers["error_counts"].items()]
        sections.append(section("Failures", table(("what", "requests"), counts)))
    sections += [
        section("Latency (ms)", table(("", "mean", *(f"p{each:g}" for each in percentiles)), rows)),
        section("Distribution", plot(_distribution(outcomes))),
        section("Over time", plot(_timeline(outcomes))),
        section(
            "The run",
            facts(
                {
                    **about,
                    "generator lag p50 / p99 / max (ms)": " / ".join(
                        f"{numbers[f'generator_lag_{each}_ms']:.2f}" for each in ("p50", "p99", "max")
                    ),
                }
            ),
        ),
    ]
    return page(f"Load test of {about['target']}", sections)
