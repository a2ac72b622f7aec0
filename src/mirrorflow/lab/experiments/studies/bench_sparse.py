"""Sparse regression under noise: mirrorflow beside what people use, each tuned by 5-fold CV."""

from __future__ import annotations

import statistics
import time
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from ...framework import contract
from ...framework.contract import Part, Record, Recorder, Trajectory, Verdict, checksum

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure

NAME = "bench_sparse"
TITLE = "Sparse regression under noise: where the flow is the better choice, and where not"
PAPER = "Figures of our own: a study that the paper does not have"
OURS = "mirrorflow"
ALL = (
    OURS, "mirrorflow, refitted", "lasso", "elastic net", "relaxed lasso", "OMP", "abess", "MCP",
    "SCAD", "early-stopped basis pursuit",
)  # fmt: skip
TEST = 2000  # rows that the R^2 is measured on
CLEAN = 1e6  # the SNR that stands for no noise
NEAR = 0.01  # of R^2: as good as the best

Array = NDArray[np.float64]


class Config(contract.Config):
    """The cells of the study.

    Attributes
    ----------
    d, nonzero : int
        Features, and how many have a coefficient of 1 in the sparse truth.
    ratios, snrs, correlations : tuples of float
        n/d, signal to noise (1e6 for none), and the correlation of neighbouring features.
    truths : tuple of str
        "sparse", or "dense": Laplace coefficients.
    methods : tuple of str
        Names in `_sparse_methods.METHODS`; those whose package is missing (abess, skglm, iterreg)
        are left out, and the records say so.
    real : bool
        Whether to run the real data sets too: diabetes with interactions, digits (one pixel from
        the others).
    seeds : tuple of int
        One draw of each cell, and one split of the real data.
    """

    d: int = Field(default=200, ge=4)
    nonzero: int = Field(default=10, ge=1)
    ratios: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    snrs: tuple[float, ...] = (1.0, 3.0, 10.0, CLEAN)
    correlations: tuple[float, ...] = (0.0, 0.5, 0.9)
    truths: tuple[str, ...] = ("sparse", "dense")
    methods: tuple[str, ...] = ALL
    real: bool = True
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)

    @field_validator("methods")
    @classmethod
    def _known(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse unknown methods, and studies without our own."""
        if OURS not in values or not set(values) <= set(ALL):
            raise ValueError(f"methods must hold {OURS!r} and be among {', '.join(ALL)}")
        return values

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (four cells, three methods), cpu (three draws), or full (ten draws)."""
        if name == "smoke":
            return cls(
                d=40, nonzero=3, ratios=(1.0,), snrs=(3.0, 10.0), correlations=(0.5,),
                methods=(OURS, "lasso", "OMP"), real=False, seeds=(0,),
            )  # fmt: skip
        return cls(seeds=tuple(range(10))) if name == "full" else cls()


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Fit every method in every cell."""
    from ._sparse_methods import OPTIONAL, available

    chosen = [m for m in config.methods if available(m)]
    left_out: list[Record] = [
        {"data": "left out", "method": m, "reason": f"{OPTIONAL[m]} is not installed"}
        for m in config.methods if m not in chosen
    ]  # fmt: skip
    cells = list(product(config.truths, config.correlations, config.ratios, config.snrs))
    parts = [
        (f"cell{i}", "cells", partial(_cell, config, chosen, *cell)) for i, cell in enumerate(cells)
    ]
    if config.real:
        parts += [(n, "cells", partial(_real, config, chosen, n)) for n in ("diabetes", "digits")]
    return [*left_out, *recorder.records(parts)]


def _design(rng: np.random.Generator, n: int, d: int, correlation: float) -> Array:
    """Draw rows whose neighbouring features have the correlation."""
    X = rng.standard_normal((n, d))
    for j in range(1, d):
        X[:, j] = correlation * X[:, j - 1] + np.sqrt(1 - correlation**2) * X[:, j]
    return X


def _cell(
    config: Config, methods: list[str], truth: str, correlation: float, ratio: float, snr: float
) -> Part:
    """Fit the methods to every draw of one cell."""
    records, n = [], max(10, round(ratio * config.d))
    for seed in config.seeds:
        rng = np.random.default_rng([seed, round(100 * correlation), n, truth == "dense"])
        coef = rng.laplace(size=config.d) / 3
        if truth == "sparse":
            coef = np.zeros(config.d)
            coef[rng.choice(config.d, config.nonzero, replace=False)] = 1.0
        X, test = (_design(rng, rows, config.d, correlation) for rows in (n, TEST))
        signal = X @ coef
        y = signal + rng.standard_normal(n) * signal.std() / np.sqrt(snr)
        cell = {"truth": truth, "correlation": correlation, "ratio": ratio, "snr": snr}
        cell |= {"seed": seed, "data": "synthetic"}
        for method in methods:
            found, offset, seconds = _timed(method, X, y)
            error = test @ (coef - found) - offset
            records.append(
                {
                    **cell,
                    "method": method,
                    "error": float(np.linalg.norm(found - coef) / np.linalg.norm(coef)),
                    "r2": float(1 - error @ error / ((test @ coef) ** 2).sum()),
                    "f1": _f1(found, coef),
                    "nonzero": int((found != 0).sum()),
                    "seconds": seconds,
                }
            )
    return Part(records, {}, checksum(X, y))


def _timed(method: str, X: Array, y: Array) -> tuple[Array, float, float]:
    """Fit a method and take the time."""
    from ._sparse_methods import fit

    started = time.perf_counter()
    coef, offset = fit(method, X, y)
    return coef, offset, time.perf_counter() - started


def _f1(found: Array, truth: Array) -> float:
    """Return the F1 score of the support."""
    hits = ((found != 0) & (truth != 0)).sum()
    return float(2 * hits / ((found != 0).sum() + (truth != 0).sum()))


def _real(config: Config, methods: list[str], name: str) -> Part:
    """Fit the methods to halves of a real data set, and measure on the other halves."""
    from ._sparse_methods import steadiness

    X, y = _diabetes() if name == "diabetes" else _digits()
    records, supports = [], []
    for seed in config.seeds:
        order = np.random.default_rng(seed).permutation(len(y))
        train, test = order[: len(y) // 2], order[len(y) // 2 :]
        mean, size = X[train].mean(0), X[train].std(0)
        Z = (X - mean) / np.where(size > 0, size, 1.0)
        for method in methods:
            coef, offset, seconds = _timed(method, Z[train], y[train])
            error = y[test] - Z[test] @ coef - offset
            variance = ((y[test] - y[test].mean()) ** 2).sum()
            supports.append(coef != 0)
            records.append(
                {
                    "data": name, "seed": seed, "method": method, "seconds": seconds,
                    "r2": float(1 - error @ error / variance), "nonzero": int((coef != 0).sum()),
                }
            )  # fmt: skip
    for method in methods:
        mine = [i for i, r in enumerate(records) if r["method"] == method]
        steady = steadiness([supports[i] for i in mine])
        for i in mine:
            records[i]["steadiness"] = steady
    return Part(records, {}, checksum(X, y))


def _diabetes() -> tuple[Array, Array]:
    """Return diabetes progression from ten measurements, their squares and products."""
    from sklearn.datasets import load_diabetes
    from sklearn.preprocessing import PolynomialFeatures

    data: Any = load_diabetes()
    squared: Any = PolynomialFeatures(2, include_bias=False).fit_transform(data.data)
    return squared, data.target


def _digits() -> tuple[Array, Array]:
    """Return a pixel in the middle of the digits from all others, for 300 of them."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    X = data.data[:300]
    return np.delete(X, 28, axis=1), X[:, 28]


# --- What the page shows of it --------------------------------------------------------------------


def cells(records: list[Record], keys: tuple[str, ...]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return for each value of the keys the medians over draws, by method and measure."""
    groups: dict[tuple[Any, ...], dict[str, list[Record]]] = {}
    for record in (r for r in records if "r2" in r):
        group = groups.setdefault(tuple(record.get(k) for k in keys), {})
        group.setdefault(record["method"], []).append(record)
    return {
        cell: {
            method: {
                m: statistics.median(r[m] for r in found)
                for m in ("r2", "error", "f1", "nonzero", "steadiness", "seconds")
                if found[0].get(m) is not None
            }
            for method, found in methods.items()
        }
        for cell, methods in groups.items()
    }  # fmt: skip


def near_best(records: list[Record]) -> tuple[dict[str, int], int]:
    """Return in how many designs each method is within 0.01 R^2 of the best, and of how many.

    The designs are those with a sparse truth, n >= d/2 and noise.
    """
    chosen = [
        r for r in records
        if r.get("truth") == "sparse" and r["ratio"] >= 0.5 and r["snr"] < CLEAN
    ]  # fmt: skip
    found = cells(chosen, ("correlation", "ratio", "snr"))
    counts = dict.fromkeys(dict.fromkeys(r["method"] for r in chosen), 0)
    for methods in found.values():
        best = max(m["r2"] for m in methods.values())
        for name, m in methods.items():
            counts[name] += m["r2"] >= best - NEAR
    return counts, len(found)


def verdicts(records: list[Record]) -> list[Verdict]:
    """Say what the run shows, with its numbers."""
    synthetic = [r for r in records if r["data"] == "synthetic"]
    keys = ("truth", "correlation", "ratio", "snr")
    said: list[Verdict] = []
    for truth in dict.fromkeys(r["truth"] for r in synthetic):
        found = cells([r for r in synthetic if r["truth"] == truth], keys)
        ahead = sum(c[OURS]["r2"] >= c["lasso"]["r2"] for c in found.values())
        best = [max(c, key=lambda m: c[m]["r2"]) for c in found.values()]
        leader = max(dict.fromkeys(best), key=best.count)
        mine = sum(b.startswith(OURS) for b in best)
        where = f"of {len(found)} cells"
        said += [
            (f"{truth.capitalize()} truth: test R² at least the lasso's", f"{ahead} {where}"),
            (
                f"{truth.capitalize()} truth: best of all",
                f"{mine} {where}; {leader} leads most often ({best.count(leader)})",
            ),
        ]
    near, designs = near_best(records)
    if designs:
        named = ", ".join(f"{name} {count}" for name, count in near.items())
        said.append(
            (f"Sparse truth, n ≥ d/2, noise: within {NEAR} R² of the best, of {designs}", named)
        )
    ratio = statistics.median(
        c[OURS]["seconds"] / c["lasso"]["seconds"] for c in cells(synthetic, keys).values()
    )
    return [
        *said,
        ("Time of MirrorFlowRegressorCV, as a multiple of LassoCV's (median)", f"{ratio:.1f}"),
        *_left_out(records),
    ]


def _left_out(records: list[Record]) -> list[Verdict]:
    """Say what is missing, and why."""
    found = [f"{r['method']} ({r['reason']})" for r in records if r["data"] == "left out"]
    return [("Left out", ", ".join(found))] if found else []


def table(records: list[Record]) -> list[Record]:
    """Return a row for each kind of data and method: medians over cells and draws."""
    from ._sparse_figures import kind

    named = [{**r, "kind": kind(r) if "truth" in r else r["data"]} for r in records]
    rows = []
    for (name, truth, snr), methods in cells(named, ("kind", "truth", "snr")).items():
        noise = "no noise" if snr == CLEAN else f"SNR {snr:g}" if snr else ""
        for method, m in methods.items():
            rows.append(
                {
                    "data": f"{name}, {noise}" if truth else name,
                    "method": method,
                    "test R²": m["r2"],
                    "relative error": m.get("error"),
                    "F1 of the support": m.get("f1") if truth == "sparse" else None,
                    "non-zeros": m.get("nonzero"),
                    "steadiness": m.get("steadiness"),
                    "seconds": m["seconds"],
                }
            )
    return rows


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw test R^2 and relative error against the SNR, a column for each kind of problem."""
    from ._sparse_figures import draw_figure

    return draw_figure(records)


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the interactive versions."""
    from ._sparse_figures import make_charts

    return make_charts(records)
