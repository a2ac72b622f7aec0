"""The figure and the charts of the deeper products, from stored records and curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...framework.contract import Record, Trajectory
from ...framework.drawing import STYLES, decades, middle, name_band, short, zoomable
from ._problem import DEPTHS

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_figure", "make_charts"]

LABELS = {"error": "reconstruction error |x − x*|", "ratio": "|x|₁ / |x|₂"}
FLOOR = 1e-10  # below it the error is rounding, and would take most of the axis


def _alphas(records: list[Record]) -> list[float]:
    """Return the alphas in their order."""
    return list(dict.fromkeys(r["alpha"] for r in records))


def draw_figure(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw the error above the ratio, a column for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey="row")
    for column, (name, depth) in zip(axes.T, DEPTHS.items(), strict=True):
        for axis, key in zip(column, LABELS, strict=True):
            _draw_curves(axis, records, trajectory, depth, key)
        column[0].set_title(f"x = {name}", fontsize=10)
        column[1].set_xlabel("step")
    _mark_limits(axes[0, 1], records)
    name_band(axes[0, 1])
    axes[0, 0].set_ylim(bottom=FLOOR)
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    return figure


def _draw_curves(
    axis: Axes, records: list[Record], trajectory: Trajectory, depth: int, key: str
) -> None:
    """Draw the median over the seeds for each alpha, and their range."""
    steps, values = trajectory[f"depth{depth}/step"], trajectory[f"depth{depth}/{key}"]
    for j, alpha in enumerate(_alphas(records)):
        curve = np.where(values[:, :, j] > 0, values[:, :, j], np.nan)
        shown = np.isfinite(curve).all(axis=1)
        style = STYLES[j % len(STYLES)]
        axis.plot(steps[shown], np.median(curve[shown], axis=1), label=f"α = {alpha:g}", **style)
        low, high = curve[shown].min(axis=1), curve[shown].max(axis=1)
        axis.fill_between(steps[shown], low, high, color=style["color"], alpha=0.15, linewidth=0)
    switch = float(trajectory[f"depth{depth}/switch"])
    axis.axvline(switch, color="0.6", linewidth=0.8, linestyle=(0, (2, 2)))
    note: Any = {"va": "top", "fontsize": 8, "color": "0.35"}
    axis.text(switch, 0.98, " decay off", transform=axis.get_xaxis_transform(), **note)
    axis.set_ylabel(LABELS[key], fontsize=9)
    if key == "error":
        axis.set_yscale("log")
    else:
        truth = _true_ratio(records, trajectory)
        axis.axhline(truth, color="0.4", linewidth=0.8)
        across = axis.get_yaxis_transform()
        axis.text(0.98, truth - 0.1, "truth", transform=across, ha="right", **note)
    axis.grid(alpha=0.25)


def _true_ratio(records: list[Record], trajectory: Trajectory) -> float:
    """Return |x*|_1 / |x*|_2, for ones |x*|_2: the error at x = 0, where training starts."""
    return float(trajectory["depth2/error"][0].max())


def _mark_limits(axis: Axes, records: list[Record]) -> None:
    """Mark the error of the end point that limit computes."""
    marks: Any = {"marker": "<", "markersize": 8, "linestyle": "none"}
    for j, alpha in enumerate(_alphas(records)):
        error = _predicted(records, alpha)
        if error < FLOOR:
            continue
        colour = STYLES[j % len(STYLES)]["color"]
        (mark,) = axis.plot([1.02], [error], color=colour, clip_on=False, **marks)
        mark.set_transform(axis.get_yaxis_transform())
        axis.axhline(error, color=colour, linewidth=0.7, linestyle=(0, (1, 3)))
    axis.plot([], [], color="0.5", label="end point by limit", **marks)


def _predicted(records: list[Record], alpha: float) -> float:
    """Return the median error of the end point of m * w."""
    return float(np.median([r["predicted"] for r in records
                            if r["alpha"] == alpha and "predicted" in r]))  # fmt: skip


# --- Interactive ----------------------------------------------------------------------------------


def make_charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make a chart of the error and one of the ratio, each with a menu for the model."""
    captions = {
        "error": f"Reconstruction error for the model chosen in the menu{middle(records)}. "
        "Level dotted lines, for m·w: the end point that limit computes without training, where "
        f"it is above {FLOOR:.0e}.",
        "ratio": "The ratio of the L1 to the L2 norm for the model chosen in the menu"
        f"{middle(records)}; grey: the truth's.",
    }
    return [(f"{captions[key]}", zoomable(_chart(records, trajectory, key))) for key in LABELS]


def _chart(records: list[Record], trajectory: Trajectory, key: str) -> Any:
    """Draw the curves of one quantity for the model that a menu selects."""
    import altair as alt

    names = [f"{alpha:g}" for alpha in _alphas(records)]
    rows = _rows(records, trajectory, key)
    menu = alt.param(
        name=f"depth_{key}", value="m·w",
        bind=alt.binding_select(options=list(DEPTHS), name="model "),
    )  # fmt: skip
    colours = alt.Scale(domain=names, range=[STYLES[j]["color"] for j in range(len(names))])
    dashes = alt.Scale(domain=names, range=[[6, 2], [6, 2, 1, 2], [2, 2], [1, 0]][: len(names)])
    legend = alt.Legend(orient="bottom", symbolType="stroke", symbolSize=300)
    of_alpha = alt.Color("α:N", scale=colours, sort=names, legend=legend)
    grey = alt.value("#777")
    base = (
        alt.Chart(alt.Data(values=rows))
        .transform_filter(alt.datum.model == menu)
        .encode(
            x=alt.X("step:Q", scale=alt.Scale(nice=False)),
            color=of_alpha,
            strokeDash=alt.StrokeDash("α:N", scale=dashes, sort=names, legend=legend),
        )
    )
    vertical = _vertical(rows, key)
    line = base.mark_line(clip=True).encode(y=alt.Y("median:Q", **vertical))
    tips = [alt.Tooltip(f"{k}:Q", format=".3g") for k in ("step", "median", "low", "high")]
    hover = base.mark_point(size=60, opacity=0, clip=True).encode(
        y=alt.Y("median:Q", **vertical), tooltip=["model:N", "α:N", *tips]
    )
    rule = (
        alt.Chart(alt.Data(values=_rules(records, trajectory, key)))
        .transform_filter(alt.datum.model == menu)
        .mark_rule(strokeDash=[1, 4], strokeWidth=2, clip=True)
        .encode(y=alt.Y("median:Q", **vertical), color=of_alpha if key == "error" else grey)
    )
    return alt.layer(line, hover, rule).add_params(menu).properties(height=280)


def _vertical(rows: list[Record], key: str) -> dict[str, Any]:
    """Return the vertical axis."""
    import altair as alt

    if key == "ratio":
        return {"title": LABELS[key], "scale": alt.Scale(zero=False)}
    low = max(min(r["median"] for r in rows), FLOOR)
    high = max(r["median"] for r in rows)
    scale = alt.Scale(type="log", domain=[0.7 * low, 1.3 * high], nice=False)
    return {
        "title": LABELS[key], "scale": scale,
        "axis": alt.Axis(format=".0e", values=decades(low, high)),
    }  # fmt: skip


def _rows(records: list[Record], trajectory: Trajectory, key: str) -> list[Record]:
    """Return the points of the curves, rounded; without those at x = 0, which have no ratio."""
    rows = []
    for name, depth in DEPTHS.items():
        steps, values = trajectory[f"depth{depth}/step"], trajectory[f"depth{depth}/{key}"]
        for j, alpha in enumerate(_alphas(records)):
            for step, v in zip(steps, values[:, :, j], strict=True):
                if v.min() > 0:
                    numbers = {"median": np.median(v), "low": v.min(), "high": v.max()}
                    rows.append({"model": name, "α": f"{alpha:g}", "step": float(step),
                                 **{k: short(n) for k, n in numbers.items()}})  # fmt: skip
    return rows


def _rules(records: list[Record], trajectory: Trajectory, key: str) -> list[Record]:
    """Return the horizontal lines: end points, or the ratio of the truth."""
    if key == "ratio":
        ratio = short(_true_ratio(records, trajectory))
        return [{"model": name, "median": ratio} for name in DEPTHS]
    return [
        {"model": "m·w", "α": f"{alpha:g}", "median": short(_predicted(records, alpha))}
        for alpha in _alphas(records)
    ]
