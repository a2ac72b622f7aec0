"""The interactive charts of matrix sensing, from stored records and curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...framework.contract import Record, Trajectory
from ...framework.drawing import STYLES, decades, emphasized, middle, short, zoomable
from ._figures import (
    METRIC_LABELS,
    MODEL_LABELS,
    TRAIN_FLOOR,
    commuting_names,
    curves,
    map_lines,
    scenario_names,
    surrogates,
    times,
)

if TYPE_CHECKING:
    from altair import TopLevelMixin

__all__ = ["make_charts"]

POINTS = 100  # of a curve
CAPTIONS = {
    "error": "Reconstruction error |X − X*|{middle}. Once decay is switched off, the error of U Uᵀ "
    "falls far; the error of the penalized X hardly changes. Dotted: the minimizer of Rₐ, a "
    "surrogate for these sensing matrices, which do not commute.",
    "train": "Training error. Every model without decay fits; what differs is which X it finds.",
    "nuclear": "Nuclear norm of X. The truth has 1.",
}
MAPS = {  # what lies below the errors at the end
    "absorbed": "U Uᵀ: the error at the end against the accumulated decay, for each α. Hollow: "
    "never switched off.",
    "off": "The same runs against the time at which the decay was switched off.",
}
TITLES = {"absorbed": "accumulated decay −a", "off": "switch-off time t"}


def make_charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the panels of the figure as charts that can be hovered and zoomed."""
    names = scenario_names(records)
    predicted, over = {"error": surrogates(records)}, middle(records, ", with their range")
    made = [
        (text.format(middle=over), _curve_chart(trajectory, names, m, predicted.get(m, {})))
        for m, text in CAPTIONS.items()
    ]
    if any(r["panel"] == "map" for r in records):
        made += [(text, _map_chart(records, key)) for key, text in MAPS.items()]
    text = (
        "Commuting sensing matrices: relative distance of the flow to the end point that is "
        "computed without training. The more decay is stored, the slower the last approach."
    )
    made.append((text, _commuting_chart(records, trajectory)))
    return [(caption, zoomable(chart)) for caption, chart in made]


def _curve_chart(
    trajectory: Trajectory, names: list[str], metric: str, predicted: dict[str, float]
) -> Any:
    """Layer ranges, medians, points that answer to the pointer, and dotted lines: predictions."""
    import altair as alt

    rows = [row for model in MODEL_LABELS for row in _rows(trajectory, names, model, metric)]
    colours = alt.Scale(domain=names, range=[style["color"] for style in STYLES])
    legend = alt.Legend(orient="bottom", columns=2, symbolOpacity=1, symbolType="stroke")
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("t:Q", title="time t = η · step", scale=alt.Scale(nice=False)),
        color=alt.Color("decay:N", scale=colours, sort=names, legend=legend),
    )
    lines = [{"decay": name, "low": v, "high": v} for name, v in predicted.items()]
    kept, labels = _vertical([*rows, *lines], metric), list(MODEL_LABELS.values())
    dash = alt.Scale(domain=labels, range=[[1, 0], [5, 4]])
    band = base.mark_area(opacity=0.12, clip=True).encode(
        y=alt.Y("low:Q", **kept), y2="high:Q", detail="model:N"
    )
    below = alt.Legend(orient="bottom", columns=1, symbolType="stroke")  # fits a telephone
    pale = alt.Scale(domain=labels, range=[1, 0.4])  # four lines stand out
    line = base.mark_line(clip=True).encode(
        y=alt.Y("median:Q", **kept),
        strokeDash=alt.StrokeDash("model:N", scale=dash, sort=labels, legend=below),
        opacity=alt.Opacity("model:N", scale=pale, sort=labels, legend=below),
    )
    numbers = [alt.Tooltip(f"{k}:Q", format=".3g") for k in ("t", "median", "low", "high")]
    hover = base.mark_point(size=60, opacity=0, clip=True).encode(
        y=alt.Y("median:Q", **kept), tooltip=["model:N", "decay:N", *numbers]
    )
    ends = (
        alt.Chart(alt.Data(values=lines))
        .mark_rule(strokeDash=[1, 4], strokeWidth=2)
        .encode(
            y=alt.Y("low:Q", **kept),
            color=alt.Color("decay:N", scale=colours, sort=names, legend=legend),
            tooltip=["decay:N", alt.Tooltip("low:Q", format=".3g", title="minimizer of Rₐ")],
        )
    )
    return alt.layer(band, line, hover, *([ends] if lines else [])).properties(height=280)


def _vertical(rows: list[Record], metric: str) -> dict[str, Any]:
    """Return the vertical axis: logarithmic for errors."""
    import altair as alt

    low, high = min(r["low"] for r in rows), max(r["high"] for r in rows)
    if metric == "nuclear":
        return {"title": METRIC_LABELS[metric], "scale": alt.Scale(zero=False)}
    low = max(low, TRAIN_FLOOR) if metric == "train" else low
    scale = alt.Scale(type="log", domain=[0.7 * low, 1.3 * high], nice=False)
    axis = alt.Axis(format=".0e", values=decades(low, high))
    return {"title": METRIC_LABELS[metric], "scale": scale, "axis": axis}


def _rows(trajectory: Trajectory, names: list[str], model: str, metric: str) -> list[Record]:
    """Return the points of the curves of one model, thinned and rounded."""
    t, values = times(trajectory), curves(trajectory, model, metric)
    keep = np.unique(np.linspace(0, len(t) - 1, min(len(t), POINTS)).astype(int))
    tiny = 1e-300  # a training error of 0 has no logarithm
    return [
        {
            "model": MODEL_LABELS[model],
            "decay": name,
            "t": float(t[k]),
            "median": short(max(np.median(values[:, i, k]), tiny)),
            "low": short(max(values[:, i, k].min(), tiny)),
            "high": short(max(values[:, i, k].max(), tiny)),
        }
        for i, name in enumerate(names)
        for k in keep
    ]


def _map_chart(records: list[Record], key: str) -> Any:
    """Draw the error at the end; runs whose decay never ended are points beside the lines."""
    import altair as alt

    rows = _map_rows(records)
    names = list(dict.fromkeys(row["α"] for row in rows))
    errors = [row["error"] for row in rows]
    scale = alt.Scale(domain=names, range=emphasized(len(names)))
    vertical = alt.Axis(format=".0e", values=decades(min(errors), max(errors)))
    numbers = [alt.Tooltip(f"{key}:Q", format=".3g") for key in ("off", "absorbed", "error")]
    legend = alt.Legend(orient="bottom")  # one for both: the scales have the same domain
    across = alt.Scale(type="log") if key == "absorbed" else alt.Scale(zero=False, padding=8)
    base = alt.Chart(alt.Data(values=rows), height=260).encode(
        x=alt.X(f"{key}:Q", title=TITLES[key], scale=across),
        y=alt.Y(
            "error:Q",
            title="|X − X*| at the end",
            scale=alt.Scale(type="log", nice=False, padding=8),
            axis=vertical,
        ),
        color=alt.Color("α:N", scale=scale, sort=names, legend=legend),
        shape=alt.Shape("α:N", sort=names, scale=alt.Scale(domain=names), legend=legend),
        tooltip=["α:N", "run:N", *numbers],
    )
    ended = base.transform_filter("datum.run == 'switched off'")
    never = base.transform_filter("datum.run != 'switched off'")
    return alt.layer(
        ended.mark_line(point=alt.OverlayMarkDef(size=50)),
        never.mark_point(size=90, filled=False, strokeWidth=2),
    )


def _map_rows(records: list[Record]) -> list[Record]:
    """Return a row for each α and switch-off time; a = 0 has no place on a logarithmic axis."""
    return [
        {
            "α": f"{alpha:g}",
            "run": "never switched off" if cell["never"] else "switched off",
            "off": short(cell["off"]),
            "absorbed": short(abs(cell["a"])),
            "error": short(cell["error"]),
        }
        for alpha, cells in map_lines(records).items()
        for cell in cells
        if cell["a"]
    ]


def _commuting_chart(records: list[Record], trajectory: Trajectory) -> Any:
    """Draw the distance of the flow to the predicted end point."""
    import altair as alt

    names, t = commuting_names(records), trajectory["commuting/t"]
    rows = [
        {"decay": name, "t": short(at), "distance": max(short(gap), 1e-16)}
        for i, name in enumerate(names)
        for at, gap in zip(t, trajectory[f"commuting/gap{i}"], strict=True)
    ]
    colours = alt.Scale(domain=names, range=[STYLES[i]["color"] for i in (0, 2, 3)])
    dashes = alt.Scale(domain=names, range=[[1, 0], [6, 2], [2, 2]])
    legend = alt.Legend(orient="bottom", symbolType="stroke", symbolSize=300)
    vertical = alt.Axis(format=".0e", values=decades(min(r["distance"] for r in rows), 1.0))
    horizontal = alt.Axis(format=".0e", values=decades(t[0], t[-1]))
    return (
        alt.Chart(alt.Data(values=rows), height=260)
        .mark_line(point=alt.OverlayMarkDef(size=12))
        .encode(
            x=alt.X(
                "t:Q", title="time t of the flow", scale=alt.Scale(type="log"), axis=horizontal
            ),
            y=alt.Y(
                "distance:Q",
                title="relative distance to the end point",
                scale=alt.Scale(type="log"),
                axis=vertical,
            ),
            color=alt.Color("decay:N", sort=names, scale=colours, legend=legend),
            strokeDash=alt.StrokeDash("decay:N", sort=names, scale=dashes, legend=legend),
            tooltip=["decay:N", *(alt.Tooltip(f"{k}:Q", format=".2g") for k in ("t", "distance"))],
        )
    )
