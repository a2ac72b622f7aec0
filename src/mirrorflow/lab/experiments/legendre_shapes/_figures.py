"""The figure and the charts of the shapes of R_a, from stored records and curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...framework.contract import Record, Trajectory
from ...framework.drawing import DASHES, decades, emphasized, short, zoomable

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_figure", "make_charts"]

FIGURES = {"power": "Fig. 9", "log": "Fig. 11", "hadamard": "Fig. 14a", "one_sided": "Fig. 14b"}
PRINTED = "#D55E00"
POINTS = 61  # of a line in a chart

DECAYS = ("none", "weak", "medium", "strong")  # how a menu's models call their values of a


def _labels(records: list[Record]) -> dict[str, str]:
    """Return the cases and their names, in order."""
    return {r["case"]: r["label"] for r in records}


def _normalized(value: Any) -> Any:
    """Divide R_a - min R_a by its largest value in the window: the shape without the scale."""
    return value / value.max(axis=1, keepdims=True)


def draw_figure(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw a row for each case: the shape, the gradient (with what is printed), the speed."""
    from matplotlib.figure import Figure

    labels = _labels(records)
    figure = Figure(figsize=(11, 3.1 * len(labels)), layout="constrained")
    axes = figure.subplots(len(labels), 3, squeeze=False)
    for row, (key, label) in zip(axes, labels.items(), strict=True):
        stored = {k.split("/")[1]: v for k, v in trajectory.items() if k.startswith(f"{key}/")}
        _draw_shape(row[0], stored, f"{FIGURES[key]}: {label}")
        _draw_gradient(row[1], stored)
        _draw_speed(row[2], stored, [r for r in records if r["case"] == key])
    for axis in axes[-1]:
        axis.set_xlabel("x")
    return figure


def _lines(axis: Axes, stored: dict[str, Any], name: str, values: Any) -> None:
    """Draw one line for each a."""
    for i, a in enumerate(stored["a"]):
        style: Any = {
            "color": emphasized(len(stored["a"]))[i],
            "linestyle": DASHES[i % len(DASHES)],
        }
        axis.plot(stored["x"], values[i], label=f"a = {a:g}", linewidth=1.6, **style)
    axis.set_ylabel(name, fontsize=9)
    axis.grid(alpha=0.25)


def _draw_shape(axis: Axes, stored: dict[str, Any], title: str) -> None:
    """Draw R_a, scaled to the window, between |x| and x^2."""
    x = stored["x"]
    for curve in (np.abs(x), x**2):
        axis.plot(x, curve / curve.max(), color="0.75", linewidth=3, zorder=0)
    axis.annotate("|x|", (0.72 * x[-1], 0.76), color="0.5", fontsize=9, ha="right")
    axis.annotate("x²", (0.76 * x[-1], 0.48), color="0.5", fontsize=9, ha="left")
    _lines(axis, stored, "Rₐ − min Rₐ, scaled", _normalized(stored["value"]))
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8, frameon=False, loc="upper center")


def _draw_gradient(axis: Axes, stored: dict[str, Any]) -> None:
    """Draw the mirror map, points of the integrated flow, and the printed formula."""
    _lines(axis, stored, "μ = ∇Rₐ(x)", stored["gradient"])
    size, label = np.abs(stored["gradient"]).max(axis=1), "as printed, same dashes"
    for i, dash in zip(range(len(stored["a"])), DASHES * len(stored["a"]), strict=False):
        if stored["printed_exists"][i].all():
            style: Any = {"color": PRINTED, "linestyle": dash, "linewidth": 0.9}
            axis.plot(stored["x"], stored["printed"][i], label=label, **style)
            label = "_"
        style = {"marker": "x", "color": "black", "markersize": 5, "linestyle": "none"}
        name = "_" if i else "integrated flow"
        axis.plot(stored["flow_x"][i], stored["flow_mu"][i], label=name, **style)
    axis.set_xlim(stored["x"][0], stored["x"][-1])
    axis.set_yscale("asinh", linear_width=size.min())
    low, high = np.ceil(np.log10(size.min())), np.floor(np.log10(size.max()))
    powers = 10.0 ** np.arange(low, high + 1)
    if len(powers) < 2:  # less than a decade: the ends, to one digit
        powers = np.array([float(f"{v:.0e}") for v in (size.min(), size.max())])
    axis.set_yticks([*-powers[::-1], 0, *powers], minor=False)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_yticks([], minor=True)
    axis.set_ylim(-2.5 * size.max(), 2.5 * size.max())
    handles, names = axis.get_legend_handles_labels()
    kept = [(h, n) for h, n in zip(handles, names, strict=True) if not n.startswith("a =")]
    axis.legend(*zip(*kept, strict=True), fontsize=8, frameon=False, loc="best")
    axis.set_title("gradient (mirror map)", fontsize=10)


def _draw_speed(axis: Axes, stored: dict[str, Any], records: list[Record]) -> None:
    """Draw the inverse metric, with the value at the centre."""
    _lines(axis, stored, "inverse metric", stored["inverse_metric"])
    for i, record in enumerate(records):
        colour = emphasized(len(records))[i]
        axis.plot(record["centre"], record["inverse_metric"], "o", color=colour, markersize=5)
    axis.set_yscale("log")
    axis.set_title("speed: inverse metric (dot: at the centre)", fontsize=10)


# --- Interactive ----------------------------------------------------------------------------------


def make_charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the shapes and the gradients, with a menu for the case, and the speeds."""
    rows = _chart_rows(records, trajectory)
    shapes = _menu_chart(rows, "shape", "Rₐ − min Rₐ, scaled to the window", records)
    gradients = _menu_chart(rows, "gradient", "μ = ∇Rₐ(x)", records)
    return [
        (
            "The shape of Rₐ for the model chosen in the menu. The table and the pointer say "
            "which a each model has.",
            zoomable(shapes),
        ),
        (
            "The gradient of Rₐ (mirror map); dashed: as printed in the paper; points: the flow, "
            "integrated without any formula.",
            zoomable(gradients),
        ),
        (
            "The speed at the centre (inverse metric): decay lowers it exponentially for m·w, by a "
            "power for u⁴ − v⁴, and raises it for log u − log v.",
            _speeds(records),
        ),
    ]


def _chart_rows(records: list[Record], trajectory: Trajectory) -> list[Record]:
    """Return all curves, thinned and rounded, as rows of (case, a, kind, x, y)."""
    rows: list[Record] = []
    for key, label in _labels(records).items():
        stored = {k.split("/")[1]: v for k, v in trajectory.items() if k.startswith(f"{key}/")}
        x = stored["x"]
        keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).astype(int))
        shapes: Any = _normalized(stored["value"])
        for i, a in enumerate(stored["a"]):
            base = {"model": label, "a": float(a)}
            kinds = {"shape": shapes[i], "gradient": stored["gradient"][i]}
            if stored["printed_exists"][i].all():
                kinds["printed"] = stored["printed"][i]
            for kind, y in kinds.items():
                rows += [base | {"kind": kind, "x": short(x[k]), "y": short(y[k])} for k in keep]
            points = zip(stored["flow_x"][i], stored["flow_mu"][i], strict=True)
            rows += [base | {"kind": "flow", "x": short(p), "y": short(q)} for p, q in points]
    return rows


def _menu_chart(rows: list[Record], kind: str, title: str, records: list[Record]) -> Any:
    """Draw the curves of one kind for the model that a menu selects."""
    import altair as alt

    names = list(_labels(records).values())
    # The curve that the eye should find first is the first of the menu.
    menu = alt.param(
        name=f"model_{kind}", value=names[0], bind=alt.binding_select(options=names, name="model ")
    )
    kinds = {"shape"} if kind == "shape" else {"gradient", "printed", "flow"}
    levels = {name: sorted({r["a"] for r in rows if r["model"] == name}, reverse=True)
              for name in names}  # fmt: skip
    values = [{**r, "decay": DECAYS[min(levels[r["model"]].index(r["a"]), 3)]} for r in rows
              if r["kind"] in kinds]  # fmt: skip
    data = alt.Data(values=values)
    scale = alt.Scale(domain=list(DECAYS), range=emphasized(len(DECAYS)))
    legend = alt.Legend(orient="bottom", title="accumulated decay")
    colour = alt.Color("decay:N", sort=list(DECAYS), scale=scale, legend=legend)
    symlog = alt.Scale(type="symlog", constant=0.5) if kind == "gradient" else alt.Scale()
    base = (
        alt.Chart(data)
        .transform_filter(alt.datum.model == menu)
        .encode(
            x=alt.X("x:Q"),
            y=alt.Y("y:Q", title=title, scale=symlog),
            color=colour,
            tooltip=["model:N", "a:Q", "x:Q", "y:Q"],
        )
    )
    lines = base.mark_line(clip=True).transform_filter(alt.datum.kind == kind)
    if kind == "shape":
        return lines.add_params(menu).properties(height=280)
    printed = base.mark_line(clip=True, strokeDash=[5, 4], strokeWidth=1.2).transform_filter(
        alt.datum.kind == "printed"
    )
    points = base.mark_point(clip=True, shape="cross", size=30).transform_filter(
        alt.datum.kind == "flow"
    )
    return alt.layer(lines, printed, points).add_params(menu).properties(height=280)


def _speeds(records: list[Record]) -> Any:
    """Draw the inverse metric at the centre against -a."""
    import altair as alt

    rows = [
        {"model": r["label"], "a": r["a"], "−a": -r["a"], "speed": short(r["inverse_metric"])}
        for r in records
    ]
    speeds = [row["speed"] for row in rows]
    axis = alt.Axis(format=".0e", values=decades(min(speeds), max(speeds)))
    names = list(_labels(records).values())
    colours = alt.Scale(domain=names, range=emphasized(len(names)))
    dashes = alt.Scale(domain=names, range=[[1, 0], [6, 2], [6, 2, 1, 2], [2, 2]])
    legend = alt.Legend(orient="bottom", columns=2, symbolType="stroke", symbolSize=300)
    return (
        alt.Chart(alt.Data(values=rows), height=260)
        .mark_line(point=alt.OverlayMarkDef(size=50))
        .encode(
            x=alt.X(
                "−a:Q",
                title="accumulated decay −a",
                scale=alt.Scale(type="symlog", constant=0.1),
                axis=alt.Axis(values=[0, 0.1, 0.3, 1, 3, 10, 30], labelExpr="datum.value"),
            ),
            y=alt.Y("speed:Q", title="inverse metric at the centre", axis=axis,
                    scale=alt.Scale(type="log")),
            color=alt.Color("model:N", sort=names, scale=colours, legend=legend),
            strokeDash=alt.StrokeDash("model:N", sort=names, scale=dashes, legend=legend),
            tooltip=["model:N", "a:Q", alt.Tooltip("speed:Q", format=".3g")],
        )
    )  # fmt: skip
