"""Sparse problems of the experiments beyond the paper, and how their medians are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...framework.contract import Record
from ...framework.drawing import short

if TYPE_CHECKING:
    from altair import TopLevelMixin

__all__ = ["averages", "line_chart", "medians", "sparse_problem"]

Array = NDArray[np.float64]
Medians = Mapping[Any, Mapping[float, float]]


def sparse_problem(rng: np.random.Generator, n: int, d: int, nonzeros: int) -> tuple[Array, Array]:
    """Return a Gaussian Z of shape (n, d), and a truth with so many entries of 1 or -1."""
    Z, truth = rng.standard_normal((n, d)), np.zeros(d)
    where = rng.choice(d, nonzeros, replace=False)
    truth[where] = rng.choice([-1.0, 1.0], nonzeros)
    return Z, truth


def medians(
    records: Sequence[Record], line: str, across: str, value: str
) -> dict[Any, dict[float, float]]:
    """Return the medians over the seeds of one column, by the columns of lines and of the x-axis.

    Examples
    --------
    >>> rows = [{"way": "AdamW", "a": a, "error": e} for a, e in [(0, 1), (0, 2), (0, 9), (-1, 4)]]
    >>> medians(rows, "way", "a", "error")
    {'AdamW': {-1.0: 4.0, 0.0: 2.0}}
    """
    return averages(records, line, across, value, np.median)


def averages(
    records: Sequence[Record], line: str, across: str, value: str, average: Callable[[Any], Any]
) -> dict[Any, dict[float, float]]:
    """Return averages over the other columns, by the columns of lines and of the x-axis."""
    found: dict[Any, dict[float, list[float]]] = {}
    for r in records:
        found.setdefault(r[line], {}).setdefault(float(r[across]), []).append(float(r[value]))
    return {
        name: {x: float(average(values)) for x, values in sorted(of.items())}
        for name, of in found.items()
    }


def line_chart(found: Medians, colours: Sequence[str], legend: str | None, x: Any, y: Any) -> Any:
    """Return an interactive chart: a line with points for each name, over the columns "x" and "y".

    Parameters
    ----------
    found : mapping
        What `medians` returns, with the x-axis as it is drawn.
    colours : sequence of str
        A colour for each line.
    legend : str or None
        The title of the legend.
    x, y : altair.X, altair.Y
        The axes, of the columns "x" and "y".
    """
    import altair as alt

    rows = [
        {"line": str(name), "x": short(across), "y": short(value)}
        for name, of in found.items()
        for across, value in of.items()
    ]
    names = [str(name) for name in found]
    key = alt.Legend(orient="bottom", columns=1, title=legend)
    chart: Any = alt.Chart(alt.Data(values=rows), height=280).encode(
        x=x,
        y=y,
        color=alt.Color("line:N", scale=alt.Scale(domain=names, range=list(colours)), legend=key),
        tooltip=["line:N", alt.Tooltip("x:Q", format=".4g"), alt.Tooltip("y:Q", format=".3g")],
    )
    shape = alt.Shape("line:N", scale=alt.Scale(domain=names), legend=key)
    points: TopLevelMixin = chart.mark_point(filled=True, size=60).encode(shape=shape)
    return chart.mark_line() + points
