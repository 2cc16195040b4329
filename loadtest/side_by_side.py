"""Two saved results beside each other: two comparisons' figures of one proxy, or the numbers of two runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loadtest import report
from loadtest.comparison import FIGURES
from loadtest.comparison_tables import number
from loadtest.results import METRICS, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROW_IN: Final = 0.27
_AXIS_IN: Final = 0.9
_RATES: Final = {"request_throughput": "requests a second", "output_throughput": "tokens a second"}
_INTERVALS: Final = (
    "Left of the line it is less. A bar through a dot is the interval: both comparisons' 95 % intervals taken "
    "together, which hold in at least 90 of 100 cases, since the two were not measured in the same rounds."
)
_NO_INTERVALS: Final = (
    "Left of the line it is less. One run each tells no interval: repeat them to know what is chance."
)
_FACTS: Final = ("date", "command", "machine", "commit", "rounds", "shared", "scenario", "request_rate", "num_prompts")

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of both, and the ratio of the second to the first; `low` and `high` are None without an interval."""

    text: str
    first: float
    second: float
    ratio: float
    low: float | None = None
    high: float | None = None

    @property
    def standing(self) -> str:
        """What the interval of the ratio says."""
        if self.low is None or self.high is None:
            return "no interval"
        if self.low <= 1 <= self.high:
            return "CANNOT TELL"
        return "less" if self.high < 1 else "more"


def rows(first: Document, second: Document, peer: str) -> list[Row]:
    """Return what both have; of comparisons the figures of `peer`. Raises `ValueError` where nothing is in both."""
    if ("summary" in first) != ("summary" in second):
        raise ValueError("one is a comparison and the other is not")
    found = _of_comparisons(first, second, peer) if "summary" in first else _of_runs(first, second)
    if not found:
        raise ValueError("nothing was measured in both")
    return found


def _of_comparisons(first: Document, second: Document, peer: str) -> list[Row]:
    """Return the figures of a proxy; an interval of the ratio where both have one.

    The runs are not paired, so it reaches from the one's lowest by the other's highest to the contrary. Where each
    holds in 95 of 100 cases, it holds in at least 90.
    """
    if not (peer in first["summary"] and peer in second["summary"]):
        raise ValueError(f"{peer} is not in both")
    found = []
    for figure in FIGURES:
        one, two = (each["summary"][peer].get(figure.key, {}) for each in (first, second))
        if not (figure.unit and one.get("median") and two.get("median")):
            continue
        low = high = None
        if one["low"] and two["low"]:
            low, high = two["low"] / one["high"], two["high"] / one["low"]
        text = f"{figure.key.rpartition('_')[0].replace('_', ' ')}, {figure.unit}"
        found.append(Row(text, one["median"], two["median"], two["median"] / one["median"], low, high))
    return found


def _of_runs(first: Document, second: Document) -> list[Row]:
    names = dict(_RATES)
    for metric in METRICS:
        keys = [key for key in first if key == f"mean_{metric}_ms"]
        keys += [key for key in first if key.startswith("p") and key.endswith(f"_{metric}_ms") and key[1].isdigit()]
        names |= {key: f"{key.partition('_')[0]} {label(metric)}, ms" for key in keys}
    both = [(text, first.get(key), second.get(key)) for key, text in names.items()]
    return [Row(text, one, two, two / one) for text, one, two in both if one and two]


def html(first: Document, second: Document, names: tuple[str, str], peer: str) -> str:
    """Return the page; `names` are what the two are called. Raises `ValueError` where nothing is in both."""
    found = rows(first, second, peer)
    what = f"{peer}: the" if "summary" in first else "The"
    header = ["", *names, f"{names[1]} / {names[0]}", ""]
    cells = [[each.text, number(each.first), number(each.second), _told(each), each.standing] for each in found]
    sections = [
        report.section(
            f"{what} second as a multiple of the first",
            report.note(_INTERVALS if any(each.low is not None for each in found) else _NO_INTERVALS),
            report.plot(_dots(found), height=_AXIS_IN + _ROW_IN * len(found)),
        ),
        report.section("The numbers", report.table(header, cells)),
        *(report.section(name, report.facts(_facts(each))) for name, each in zip(names, (first, second), strict=True)),
    ]
    return report.page(f"{names[0]} and {names[1]}", sections)


def _told(row: Row) -> str:
    span = "" if row.low is None or row.high is None else f" [{number(row.low)}, {number(row.high)}]"
    return f"{number(row.ratio)}{span}"


def _facts(document: Document) -> dict[str, object]:
    about = document.get("about", document)
    return {name: about[name] for name in _FACTS if name in about}


def _dots(found: Sequence[Row]) -> "Callable[[Axes], None]":
    def draw(axes: "Axes") -> None:
        axes.axvline(1, color=report.INK, linewidth=0.8, linestyle=":")
        for place, each in enumerate(found):
            if each.low is not None and each.high is not None:
                axes.plot([each.low, each.high], [place, place], color=report.GREY, linewidth=3, zorder=1)
            decided = each.standing in ("less", "more")
            axes.scatter([each.ratio], [place], color=report.COLOURS[0] if decided else report.INK, s=26, zorder=2)
        axes.set_xscale("log")
        axes.set_yticks(range(len(found)), [each.text for each in found])
        axes.set_xlabel("multiple of the first")
        axes.invert_yaxis()
        report.plain_numbers(axes.xaxis)

    return draw
