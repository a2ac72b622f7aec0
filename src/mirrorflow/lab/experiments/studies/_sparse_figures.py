"""The figure and the charts of the sparse regression study, from stored records."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...framework.contract import Record
from ...framework.drawing import DASHES, short

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "MARKERS", "SHAPES", "draw_figure", "kind", "make_charts", "snr_chart"]

LABELS = {"r2": "test R²", "error": "relative error of the coefficients"}
COLOURS = (
    "#000000", "#0072B2", "#D55E00", "#00916A", "#4F555E", "#757B84", "#989EA7", "#4F555E",
    "#757B84", "#989EA7",
)  # fmt: skip
MARKERS = "osD^vP*X<>"
# Vega's own "arrow" and "wedge" are too thin to be seen: these are the star and the X of MARKERS.
STAR = "M0,-1L.23,-.31L.95,-.31L.36,.12L.59,.81L0,.38L-.59,.81L-.36,.12L-.95,-.31L-.23,-.31Z"
SALTIRE = "M-.9,-.5L-.5,-.9L0,-.4L.5,-.9L.9,-.5L.4,0L.9,.5L.5,.9L0,.4L-.5,.9L-.9,.5L-.4,0Z"
SHAPES = (
    "circle", "square", "diamond", "triangle-up", "triangle-down", "cross", STAR, SALTIRE,
    "triangle-left", "triangle-right",
)  # fmt: skip


def kind(record: Record) -> str:
    """Name the kind of problem: with few rows no method finds much, which would hide the others."""
    return f"{record['truth']} truth, n {'≥' if record['ratio'] >= 0.5 else '<'} d/2"


def _name(snr: float) -> str:
    """Name a column of the plot."""
    return "none" if snr >= 1e6 else f"{snr:g}"


def _lines(records: list[Record], chosen: str, key: str) -> dict[str, list[tuple[str, float]]]:
    """Return for each method the medians over everything else, by SNR."""
    found: dict[str, dict[str, list[float]]] = {}
    for r in records:
        if "truth" in r and kind(r) == chosen:
            found.setdefault(r["method"], {}).setdefault(_name(r["snr"]), []).append(r[key])
    return {
        method: [(snr, statistics.median(values)) for snr, values in by_snr.items()]
        for method, by_snr in found.items()
    }


def _kinds(records: list[Record]) -> list[str]:
    return sorted({kind(r) for r in records if "truth" in r}, reverse=True)


def draw_figure(records: list[Record]) -> Figure:
    """Draw a row for each measure, a column for each kind of problem."""
    from matplotlib.figure import Figure

    kinds = _kinds(records)
    figure = Figure(figsize=(max(4.5, 3.4 * len(kinds)), 7), layout="constrained")
    axes = figure.subplots(2, len(kinds), squeeze=False)
    for row, key in zip(axes, LABELS, strict=True):
        for axis, chosen in zip(row, kinds, strict=True):
            _draw(axis, _lines(records, chosen, key), key)
            axis.set_title(chosen, fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def _draw(axis: Axes, lines: dict[str, list[tuple[str, float]]], key: str) -> None:
    """Draw one line for each method."""
    for i, (method, points) in enumerate(lines.items()):
        ours = method.startswith("mirrorflow")
        style: Any = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        style |= {"linewidth": 2.2 if ours else 1.2, "markersize": 5}
        style["linestyle"] = DASHES[i % len(DASHES)]
        axis.plot(*zip(*points, strict=True), label=method, **style)
    axis.set(xlabel="signal to noise (none: no noise)", ylabel=LABELS[key])
    axis.grid(alpha=0.25)


def make_charts(records: list[Record]) -> list[tuple[str, TopLevelMixin]]:
    """Make a chart of each measure, with a menu for the kind of problem."""
    captions = {
        "r2": "Test R² against the signal to noise ratio, medians over designs and draws.",
        "error": "Relative error of the coefficients, medians over designs and draws.",
    }
    return [(captions[key], _chart(records, key)) for key in LABELS]


def _chart(records: list[Record], key: str) -> Any:
    """Draw one measure."""
    rows = [
        {"kind": chosen, "method": method, "SNR": snr, "value": short(value)}
        for chosen in _kinds(records)
        for method, points in _lines(records, chosen, key).items()
        for snr, value in points
    ]
    across = "signal to noise (none: no noise)"
    return snr_chart(rows, key, across, LABELS[key], (COLOURS, SHAPES))


def snr_chart(
    rows: list[Record],
    key: str,
    across: str,
    title: str,
    marks: tuple[Sequence[str], Sequence[str]],
) -> Any:
    """Draw the value of each method over the signal to noise, for one kind of problem at a time.

    ``marks`` are a colour and a shape for each method; the first kind of the rows is shown first.
    """
    import altair as alt

    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    names = list(dict.fromkeys(r["method"] for r in rows))
    menu = alt.param(
        name=f"kind_{key}", value=kinds[0],
        bind=alt.binding_select(options=kinds, name="problem "),
    )  # fmt: skip
    legend = alt.Legend(orient="bottom", columns=2)
    colours = alt.Scale(domain=names, range=list(marks[0][: len(names)]))
    shapes = alt.Scale(domain=names, range=list(marks[1][: len(names)]))  # one legend for both
    return (
        alt.Chart(alt.Data(values=rows))
        .transform_filter(alt.datum.kind == menu)
        .mark_line(point=alt.OverlayMarkDef(size=50))
        .encode(
            x=alt.X(
                "SNR:O",
                sort=None,
                title=across,
                axis=alt.Axis(labelAngle=0),
            ),
            y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False)),
            color=alt.Color("method:N", sort=names, scale=colours, legend=legend),
            shape=alt.Shape("method:N", sort=names, scale=shapes, legend=legend),
            tooltip=["method:N", "SNR:O", alt.Tooltip("value:Q", format=".3g")],
        )
        .add_params(menu)
        .properties(height=300)
    )
