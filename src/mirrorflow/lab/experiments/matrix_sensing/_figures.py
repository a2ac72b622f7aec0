"""The static figure of matrix sensing, from stored records and curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...framework.contract import Record, Trajectory
from ...framework.drawing import MARKERS, STYLES, emphasized, name_band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "METRIC_LABELS",
    "MODEL_LABELS",
    "TRAIN_FLOOR",
    "commuting_names",
    "curves",
    "draw_figure",
    "map_lines",
    "scenario_names",
    "surrogates",
    "times",
]

MODEL_LABELS = {"factor": "U Uᵀ", "linear": "X, penalized"}
METRIC_LABELS = {
    "train": "training error f(X)",
    "error": "reconstruction error |X − X*|",
    "nuclear": "nuclear norm of X",
}
TRAIN_FLOOR = 1e-10  # the linear model reaches rounding, which would take most of the axis


def scenario_names(records: list[Record]) -> list[str]:
    """Return the scenarios in their order."""
    return list(dict.fromkeys(r["scenario"] for r in records if r["panel"] == "end"))


def curves(trajectory: Trajectory, model: str, metric: str) -> NDArray[Any]:
    """Return the curves of all seeds, (seeds, scenarios, times)."""
    keys = [k for k in trajectory if k.startswith("seed") and k.endswith(f"/{model}/{metric}")]
    return np.stack([trajectory[key] for key in keys])


def times(trajectory: Trajectory) -> NDArray[Any]:
    """Return the times of the curves."""
    return next(v for k, v in trajectory.items() if k.startswith("seed") and k.endswith("/t"))


def map_lines(records: list[Record]) -> dict[float, list[Record]]:
    """Return for each alpha the medians over the seeds, in the order of the switch-off times."""
    cells = [r for r in records if r["panel"] == "map"]
    lines: dict[float, list[Record]] = {}
    for alpha, off in sorted({(r["alpha"], r["off"]) for r in cells}):
        here = [r for r in cells if (r["alpha"], r["off"]) == (alpha, off)]
        error = float(np.median([r["error"] for r in here]))
        lines.setdefault(alpha, []).append({**here[0], "error": error})
    return lines


def commuting_names(records: list[Record]) -> list[str]:
    """Name the schedules of the commuting variant."""
    found = [r for r in records if r["panel"] == "commuting"]
    return [f"off at t = {r['off']:g}" if r["off"] else "no decay" for r in found]


def draw_figure(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw both models above each other on shared axes, and the panels that the paper lacks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9.8), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[2, 1.1])
    top, bottom = parts
    axes = top.subplots(2, 3, sharex=True, sharey="col")
    for row, model in zip(axes, MODEL_LABELS, strict=True):
        for axis, metric in zip(row, METRIC_LABELS, strict=True):
            _draw_curves(axis, scenario_names(records), trajectory, model, metric)
            _mark_switch(axis, records)
    _mark_surrogates(axes[0, 1], records)
    name_band(axes[0, 1])
    for axis in axes[1]:
        axis.set_xlabel("time t = η · step")
    handles, labels = axes[0, 1].get_legend_handles_labels()
    top.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    lower = bottom.subplots(1, 3)
    _draw_map(lower[0], "off", "switch-off time t", records)
    _draw_map(lower[1], "a", "accumulated decay −a", records)
    _draw_commuting(lower[2], records, trajectory)
    return figure


def _draw_curves(
    axis: Axes, names: list[str], trajectory: Trajectory, model: str, metric: str
) -> None:
    """Draw the median over the seeds in each scenario, and the range as a band."""
    t, values = times(trajectory), curves(trajectory, model, metric)
    for i, name in enumerate(names):
        axis.plot(t, np.median(values[:, i], axis=0), label=name, **STYLES[i])
        low, high = values[:, i].min(0), values[:, i].max(0)
        axis.fill_between(t, low, high, color=STYLES[i]["color"], alpha=0.15, linewidth=0)
    axis.set_yscale("linear" if metric == "nuclear" else "log")
    axis.set_ylabel(METRIC_LABELS[metric], fontsize=9)
    axis.set_title(
        f"{MODEL_LABELS[model]}: {METRIC_LABELS[metric].split(' f(')[0].split(' |')[0]}",
        fontsize=10,
    )
    axis.grid(alpha=0.25)
    if metric == "train":
        axis.set_ylim(bottom=max(TRAIN_FLOOR, axis.get_ylim()[0]))
    if metric == "nuclear":
        axis.axhline(1, color="0.4", linewidth=0.8)
        _note(axis, 0.98, 1.0, "truth", axis.get_yaxis_transform(), "right", "bottom")


def _note(axis: Axes, x: float, y: float, text: str, transform: Any, across: str, up: str) -> None:
    """Write a small grey note."""
    note = axis.text(x, y, text, transform=transform, ha=across, va=up, fontsize=8, color="0.35")
    note.set_in_layout(False)


def _mark_switch(axis: Axes, records: list[Record]) -> None:
    """Mark the time at which the last scenario switches its decay off."""
    last = next(r for r in records if r.get("scenario") == scenario_names(records)[-1])
    if last["alpha"]:
        at = -last["a"] / last["alpha"]
        axis.axvline(at, color="0.6", linewidth=0.8, linestyle=(0, (2, 2)))
        _note(axis, at, 0.98, " decay off", axis.get_xaxis_transform(), "left", "top")


def surrogates(records: list[Record]) -> dict[str, float]:
    """Return the median error of the minimizer of R_a for the scenarios that end without decay."""
    found: dict[str, list[float]] = {}
    for record in records:
        if "predicted" in record and record["panel"] == "end":
            found.setdefault(record["scenario"], []).append(record["predicted"])
    return {name: float(np.median(errors)) for name, errors in found.items()}


def _mark_surrogates(axis: Axes, records: list[Record]) -> None:
    """Mark the error of the minimizer of R_a at the right edge, for scenarios without decay."""
    marks: Any = {"marker": "<", "markersize": 8, "linestyle": "none"}
    for name, error in surrogates(records).items():
        colour = STYLES[scenario_names(records).index(name)]["color"]
        (mark,) = axis.plot([1.02], [error], color=colour, clip_on=False, **marks)
        mark.set_transform(axis.get_yaxis_transform())
        axis.axhline(error, color=colour, linewidth=0.7, linestyle=(0, (1, 3)))
    label = "minimizer of Rₐ (a surrogate)"
    axis.plot([], [], color="0.5", label=label, **marks)


def _draw_map(axis: Axes, key: str, label: str, records: list[Record]) -> None:
    """Draw the error at the end against the switch-off time or -a; runs never off are hollow."""
    lines = map_lines(records)
    for i, (alpha, cells) in enumerate(lines.items()):
        style: Any = {"marker": MARKERS[i % len(MARKERS)], "color": emphasized(len(lines))[i]}
        x, error = np.array([(abs(c[key]), c["error"]) for c in cells]).T
        last = -1 if cells[-1]["never"] else len(cells)
        axis.plot(x[:last], error[:last], markersize=5, label=f"α = {alpha:g}", **style)
        axis.plot(x[last:], error[last:], markerfacecolor="none", linestyle="none", **style)
    axis.set(yscale="log", xscale="log" if key == "a" else "linear", xlabel=label)
    axis.set_ylabel("|X − X*| at the end", fontsize=9)
    axis.set_title("U Uᵀ at the end (hollow: never switched off)", fontsize=10)
    axis.grid(alpha=0.25)
    if key == "a" and lines:
        axis.legend(fontsize=8, frameon=False, loc="lower left")


def _draw_commuting(axis: Axes, records: list[Record], trajectory: Trajectory) -> None:
    """Draw how far the flow is from the predicted end point."""
    for i, name in enumerate(commuting_names(records)):
        gap = np.maximum(trajectory[f"commuting/gap{i}"], 1e-16)
        axis.plot(trajectory["commuting/t"], gap, label=name, **STYLES[(0, 2, 3)[i]])
    axis.set(xscale="log", yscale="log", xlabel="time t of the flow")
    axis.set_ylabel("|X − end point| / |end point|", fontsize=9)
    axis.set_title("Commuting sensing matrices: exact", fontsize=10)
    axis.legend(fontsize=8, frameon=False, loc="lower left")
    axis.grid(alpha=0.25)
