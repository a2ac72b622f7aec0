"""Faces, dictionary, runs and pictures of the sparse coding experiments."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...framework.contract import Record
from ...framework.drawing import DASHES, emphasized, short, zoomable

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure

__all__ = ["METRICS", "Row", "draw_figure", "images", "learned", "make_charts", "run_codes"]

Array = NDArray[np.float64]
METRICS = {"nuclear": "nuclear norm of the codes", "mse": "reconstruction MSE"}


def images(source: str) -> tuple[Array, str]:
    """Return images (samples, pixels) in [0, 1], and which they are.

    "auto" is the Olivetti faces, from scikit-learn's data folder or the network; where neither has
    them, scikit-learn's digits, with a warning.
    """
    from sklearn.datasets import fetch_olivetti_faces, load_digits

    if source != "digits":
        try:
            faces: Any = fetch_olivetti_faces()
            return faces.data.astype(np.float64), "Olivetti faces"
        except OSError as error:
            if source == "olivetti":
                raise
            warnings.warn(f"Olivetti faces are not at hand ({error}); digits instead", stacklevel=2)
    digits: Any = load_digits()
    return digits.data / 16.0, "digits"


def learned(X: Array, atoms: int, seed: int, passes: int) -> Array:
    """Learn a dictionary (atoms, pixels) with atoms of norm 1."""
    from sklearn.decomposition import MiniBatchDictionaryLearning

    learner = MiniBatchDictionaryLearning(atoms, max_iter=passes, batch_size=50, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's own, about the lasso's path
        D = learner.fit(X).components_
    return D / np.linalg.norm(D, axis=1, keepdims=True)


def run_codes(
    X: Array, D: Array, form: str, k: int, alpha: float, start: Array, rate: float, steps: int
) -> dict[str, Array]:
    """Take the steps, rate / Lip(D) long, and measure the codes before each and after the last."""
    from mirrorflow.estimator._codes import codes, lipschitz

    path = codes(X, D, form, k, alpha, 1.0, start, rate / lipschitz(D))
    found = [
        (float(np.linalg.norm(z, "nuc")), float(((z @ D - X) ** 2).mean()))
        for z in islice(path, steps + 1)
    ]
    nuclear, mse = np.array(found).T
    return {"nuclear": nuclear, "mse": mse}


@dataclass(frozen=True)
class Row:
    """A row of the figure: curves by name, what lies below them, and a word about the quantity."""

    curves: dict[str, dict[str, Array]]
    x: Callable[[str], NDArray[Any]]
    name: str
    note: str = ""


def draw_figure(rows: list[Row]) -> Figure:
    """Draw both quantities of every curve, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, (key, label) in zip(line, METRICS.items(), strict=True):
            for i, (curve, values) in enumerate(row.curves.items()):
                style: Any = {"color": emphasized(len(row.curves))[i], "linewidth": 1.7}
                style["linestyle"] = DASHES[i % len(DASHES)]
                axis.plot(row.x(curve), values[key], label=curve, **style)
            axis.set(xlabel=row.name, ylabel=label + row.note)
            axis.grid(alpha=0.25)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    return figure


def make_charts(
    curves: dict[str, dict[str, Array]], captions: dict[str, str], title: str
) -> list[tuple[str, TopLevelMixin]]:
    """Make a chart of each quantity against the iteration."""
    return [(f"{captions[key]}", zoomable(_chart(curves, key, title))) for key in METRICS]


def _chart(curves: dict[str, dict[str, Array]], key: str, title: str) -> Any:
    """Draw one quantity."""
    import altair as alt

    names = list(curves)
    rows: list[Record] = [
        {"curve": name, "iteration": step, "value": short(value)}
        for name, values in curves.items()
        for step, value in enumerate(values[key])
    ]
    colours = alt.Scale(domain=names, range=emphasized(len(names)))
    cycle = [[1, 0], [6, 2], [6, 2, 1, 2], [2, 2]]
    dashes = alt.Scale(domain=names, range=[cycle[i % len(cycle)] for i in range(len(names))])
    legend = alt.Legend(
        orient="bottom", symbolType="stroke", symbolSize=300, title=title, columns=3
    )
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_line(clip=True)
        .encode(
            x=alt.X("iteration:Q", scale=alt.Scale(nice=False)),
            y=alt.Y("value:Q", title=METRICS[key], scale=alt.Scale(zero=False)),
            color=alt.Color("curve:N", sort=names, scale=colours, legend=legend),
            strokeDash=alt.StrokeDash("curve:N", sort=names, scale=dashes, legend=legend),
            tooltip=["curve:N", "iteration:Q", alt.Tooltip("value:Q", format=".4g")],
        )
        .properties(height=280)
    )
