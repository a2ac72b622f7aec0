"""Styles, axes and zoom that the figures and charts of all experiments share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "DASHES",
    "GREY",
    "MARKERS",
    "STYLES",
    "decades",
    "emphasized",
    "middle",
    "name_band",
    "short",
    "zoomable",
]

# Colours with a contrast above 3 on white and on the page's dark; dashes tell lines apart in grey.
# The page draws what is #000000 in its text's colour.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": (0, (6, 2)), "linewidth": 1.6},
    {"color": "#D55E00", "linestyle": (0, (6, 2, 1, 2)), "linewidth": 1.8},
    {"color": "#009E73", "linestyle": (0, (1.2, 1.2)), "linewidth": 2.0},
    {"color": "#000000", "linestyle": "solid", "linewidth": 1.8},
)
DASHES = ("solid", (0, (6, 2)), (0, (6, 2, 1, 2)), (0, (1.2, 1.2)))
MARKERS = "osD^vP*X"
GREY = "#868C95"
ORDERED = ("#2F6FDE", "#00916A", "#B07D0A", "#D1440C")  # from cold to warm, contrast as above


def emphasized(count: int, chosen: Sequence[int] = ()) -> list[str]:
    """Return the colours of an ordered series: at most four stand out, the rest are grey.

    Parameters
    ----------
    count : int
        The number of lines.
    chosen : sequence of int, optional
        Which of them stand out; without it both ends, and what lies evenly between them.

    Examples
    --------
    >>> emphasized(5)
    ['#2F6FDE', '#00916A', '#868C95', '#B07D0A', '#D1440C']
    >>> emphasized(2, chosen=[1])
    ['#868C95', '#2F6FDE']
    """
    kept = min(count, len(ORDERED))
    places = list(chosen) or [round(i * (count - 1) / max(1, kept - 1)) for i in range(kept)]
    step = (len(ORDERED) - 1) / max(1, len(places) - 1)
    colours = {place: ORDERED[round(i * step)] for i, place in enumerate(places[: len(ORDERED)])}
    return [colours.get(i, GREY) for i in range(count)]


def name_band(axis: Any) -> None:
    """Let the legend say what the bands are, which on paper stand without a caption."""
    axis.fill_between([], [], [], color="0.5", alpha=0.3, linewidth=0, label="range of the seeds")


def short(value: Any) -> float:
    """Round to four digits: the page carries these numbers as text."""
    return float(f"{value:.4g}")


def middle(records: Iterable[Mapping[str, Any]], band: str = "") -> str:
    """Say what a number stands for: the median over the seeds, if there are several.

    Examples
    --------
    >>> middle([{"seed": 0}, {"seed": 1}, {}], ", with their range"), middle([{"seed": 0}])
    (', median over the seeds, with their range', '')
    """
    several = len({r["seed"] for r in records if "seed" in r}) > 1
    return f", median over the seeds{band}" if several else ""


def decades(low: float, high: float) -> list[float]:
    """Return the ticks of a logarithmic axis: powers of ten, with 3 times them if they are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    sparse = [10.0**k for k in powers][:: max(1, len(powers) // 8)]
    return sparse if len(powers) > 4 else sorted([*sparse, *(3 * p for p in sparse)])


def zoomable(chart: Any) -> Any:
    """Let a chart move and zoom without taking the wheel or the finger that scrolls the page."""
    import altair as alt

    grip = alt.selection_interval(
        bind="scales",
        translate="[mousedown, window:mouseup] > window:mousemove!",
        zoom="wheel![event.ctrlKey || event.altKey]",
    )
    return chart.add_params(grip)
