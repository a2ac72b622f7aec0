"""The figure and the charts of the low-rank study, from stored records."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...framework.contract import Record, Trajectory
from ...framework.drawing import MARKERS, short
from ._lowrank_data import SYNTHETIC, medians

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_figure", "make_charts"]

STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#000000", "linestyle": "solid", "linewidth": 2.2},
    {"color": "#0072B2", "linestyle": (0, (6, 2)), "linewidth": 2.2},
    {"color": "#D55E00", "linestyle": (0, (1.2, 1.2)), "linewidth": 1.8},
    {"color": "#009E73", "linestyle": (0, (6, 2, 1, 2)), "linewidth": 1.4},
    {"color": "#757B84", "linestyle": (0, (3, 1)), "linewidth": 1.2},
)
ERROR = "relative error"
Lines = dict[str, list[tuple[str, float]]]


def _lines(records: list[Record], data: list[str], seen: float, key: str) -> Lines:
    """Return the median errors of each method against the noise, or against the data."""
    chosen = [r for r in records if r["data"] in data and r["seen"] == seen]
    found: Lines = {}
    for (value,), methods in medians(chosen, (key,)).items():
        for name, m in methods.items():
            label = "none" if value == 0 else str(value)
            found.setdefault(name, []).append((label, m["error"]))
    return found


def _rows(records: list[Record]) -> list[tuple[str, list[str], str]]:
    """Return the rows of the figure: what they show, of which data, against what."""
    present = list(dict.fromkeys(r["data"] for r in records if "error" in r))
    rows = [(SYNTHETIC[d], [d], "noise") for d in present if d in SYNTHETIC]
    images = [d for d in present if d not in SYNTHETIC]
    return rows + ([("missing pixels", images, "data")] if images else [])


def _methods(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(r["method"] for r in records if "error" in r))


def draw_figure(records: list[Record]) -> Figure:
    """Draw a row for each kind of data, a column for each fraction that is known."""
    from matplotlib.figure import Figure

    rows, names = _rows(records), _methods(records)
    seens = sorted({r["seen"] for r in records if "error" in r})
    figure = Figure(figsize=(4.6 * max(2, len(seens)), 2.7 * len(rows) + 0.6), layout="constrained")
    axes = figure.subplots(len(rows), len(seens), squeeze=False, sharey="row")
    for line, (title, data, key) in zip(axes, rows, strict=True):
        for axis, seen in zip(line, seens, strict=True):
            _draw(axis, _lines(records, data, seen, key), key, names)
            axis.set_title(f"{title}, {100 * seen:g} % known", fontsize=10)
    found = {label: handle for axis in reversed(figure.axes)  # of the first row, if it is there
             for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}  # fmt: skip
    figure.legend(
        [found[n] for n in names], names, loc="outside upper center", ncols=3, frameon=False,
        fontsize=9, handlelength=3.5,
    )  # fmt: skip
    return figure


def _draw(axis: Axes, lines: Lines, key: str, names: list[str]) -> None:
    """Draw one line for each method; images have no order, and are not joined."""
    for method, points in lines.items():
        i = names.index(method)
        style = {**STYLES[i % len(STYLES)], "marker": MARKERS[i % len(MARKERS)], "markersize": 6}
        if key == "data":
            style |= {"linestyle": "none", "markerfacecolor": "none", "markeredgewidth": 1.5}
        axis.plot(*zip(*points, strict=True), label=method, **style)
    axis.set(ylabel="error of hidden pixels" if key == "data" else ERROR)
    if key == "noise":
        axis.set(yscale="log", xlabel="noise, relative to the entries")
    else:
        axis.margins(x=0.2)
    axis.grid(alpha=0.25)


def make_charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make a chart of the synthetic errors, one of the images, and show the photographs."""
    made = [
        ("Error of the whole matrix against the noise: medians over ranks and draws.",
         _chart([row for row in _flat(records) if row["noise"] is not None], records, "noise")),
    ]  # fmt: skip
    images = [row for row in _flat(records) if row["noise"] is None]
    if images:
        made.append(
            ("Error on the hidden pixels; 1: the error of the known pixels' mean.",
             _chart(images, records, "data"))
        )  # fmt: skip
    pictures = _pictures(trajectory)
    if pictures:
        made.append(("What is seen, what the methods make of it, and the truth.", pictures))
    return made


def _flat(records: list[Record]) -> list[Record]:
    """Return a row for each kind of data, fraction, noise and method."""
    return [
        {
            "data": SYNTHETIC.get(data, data),
            "case": f"{SYNTHETIC.get(data, 'images')}, {100 * seen:g} % known",
            "noise": noise if noise is None else "none" if noise == 0 else f"{noise:g}",
            "method": method,
            "value": short(m["error"]),
            "rank": m["found"],
            "seconds": short(m["seconds"]),
        }
        for (data, seen, noise), methods in medians(records, ("data", "seen", "noise")).items()
        for method, m in methods.items()
    ]


def _chart(rows: list[Record], records: list[Record], x: str) -> Any:
    """Draw the errors of one kind of case, which a menu chooses."""
    import altair as alt

    names, cases = _methods(records), list(dict.fromkeys(r["case"] for r in rows))
    menu = alt.param(
        name=f"case_{x}", value=cases[0], bind=alt.binding_select(options=cases, name="data ")
    )
    legend = alt.Legend(orient="bottom", columns=2)
    colours = alt.Scale(domain=names, range=[str(s["color"]) for s in STYLES[: len(names)]])
    shapes = alt.Scale(domain=names)  # as the colours have it: one legend for both
    chart = alt.Chart(alt.Data(values=rows)).transform_filter(alt.datum.case == menu)
    mark = chart.mark_line(point=alt.OverlayMarkDef(size=50))
    if x == "data":
        mark = chart.mark_point(size=90, strokeWidth=2)
    scale = alt.Scale(type="log") if x == "noise" else alt.Scale(zero=False)
    title = "noise, relative to the entries" if x == "noise" else "image"
    return (
        mark.encode(
            x=alt.X(f"{x}:O", sort=None, title=title, axis=alt.Axis(labelAngle=0)),
            y=alt.Y("value:Q", title=ERROR, scale=scale),
            color=alt.Color("method:N", sort=names, scale=colours, legend=legend),
            shape=alt.Shape("method:N", sort=names, scale=shapes, legend=legend),
            tooltip=["method:N", "data:N", "noise:O", alt.Tooltip("value:Q", format=".3g"),
                     "rank:Q", "seconds:Q"],
        )
        .add_params(menu)
        .properties(height=300)
    )  # fmt: skip


def _pictures(trajectory: Trajectory) -> Any:
    """Show the stored photographs side by side; None where there are none."""
    import altair as alt

    found: dict[str, list[Record]] = {}
    for key, pixels in trajectory.items():
        part, name = key.split("/", 1)
        found.setdefault(part.rstrip("0123456789"), []).append({"what": name, "url": _png(pixels)})
    if not found:
        return None
    order = ["seen", *(r["what"] for r in next(iter(found.values())) if r["what"] not in
                       ("seen", "truth")), "truth"]  # fmt: skip
    rows = [{"image": image, **row} for image, shown in found.items() for row in shown]
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_image(width=150, height=100)
        .encode(
            x=alt.X("image:N", title=None, axis=alt.Axis(orient="top", labelAngle=0)),
            y=alt.Y("what:N", sort=order, title=None),
            url="url:N",
            tooltip=["image:N", "what:N"],
        )
        .properties(width=330, height=105 * len(order))
    )


def _png(pixels: NDArray[Any]) -> str:
    """Return grey levels as the address of an image that is inside the page."""
    from matplotlib.image import imsave

    stream = BytesIO()
    imsave(stream, np.asarray(pixels), cmap="gray", vmin=0, vmax=255, format="png")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
