"""Sparse classification: the flow of m * w under the logistic loss beside L1 and ridge, by CV."""

from __future__ import annotations

import statistics
import time
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.signal import lfilter
from scipy.special import expit

from ...framework import contract
from ...framework.contract import Part, Record, Recorder, Trajectory, Verdict, checksum
from ...framework.drawing import DASHES, MARKERS, short
from ._sparse_figures import snr_chart

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure

NAME = "bench_logistic"
TITLE = "Sparse classification: the stopped flow beside L1, a study that speaks against it"
PAPER = "Beyond the paper: a study of whether the flow makes a classifier"
TEST = 2000  # rows that the loss is measured on
ENOUGH = 0.5  # n/d from which a sparse truth can be found
ASKED = (0.5, 1.0)  # n/d of the designs that the classifier would have to win
WINS, GAIN, WORSE = 13, 0.3, 0.02  # in how many, by which F1, and how much worse elsewhere
COLOURS = ("#0072B2", "#00916A", "#989EA7", "#000000", "#D55E00")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross")
MEASURES = {"loss": "test log-loss", "f1": "F1 of the support"}

Array = NDArray[np.float64]


class Config(contract.Config):
    """The cells of the study.

    Attributes
    ----------
    d, nonzero : int
        Features, and how many have equal coefficients in the sparse truth.
    ratios, snrs, correlations : tuples of float
        n/d, the variance of the logit to the logistic noise's, pi^2/3, and the correlation of
        neighbouring features.
    dense : tuple of float
        n/d of the designs with Laplace coefficients.
    seeds : tuple of int
        One draw of each cell.
    """

    d: int = Field(default=200, ge=4)
    nonzero: int = Field(default=10, ge=1)
    ratios: tuple[float, ...] = Field(default=(0.25, 0.5, 1.0, 1.5), min_length=1)
    snrs: tuple[float, ...] = (1.0, 3.0, 10.0)
    correlations: tuple[float, ...] = (0.0, 0.5, 0.9)
    dense: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (two cells), cpu (three draws), or full (ten draws)."""
        if name == "smoke":
            return cls(
                d=30, nonzero=2, ratios=(1.0,), snrs=(10.0,), correlations=(0.5,), seeds=(0,)
            )
        return cls(seeds=tuple(range(10))) if name == "full" else cls()


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Fit every method in every cell."""
    cells = [("sparse", *cell) for cell in product(config.correlations, config.ratios, config.snrs)]
    cells += [("dense", *cell) for cell in product(config.correlations, config.dense, config.snrs)]
    return recorder.records([
        (f"cell{i}", "cells", partial(_cell, config, *cell)) for i, cell in enumerate(cells)
    ])  # fmt: skip


def _design(rng: np.random.Generator, n: int, d: int, correlation: float) -> Array:
    """Draw rows whose neighbouring features have the correlation."""
    Z = rng.standard_normal((n, d))
    Z[:, 1:] *= np.sqrt(1 - correlation**2)
    filtered: Any = lfilter([1.0], [1.0, -correlation], Z, axis=1)
    return filtered  # X_j = correlation X_{j-1} + Z_j


def _cell(config: Config, truth: str, correlation: float, ratio: float, snr: float) -> Part:
    """Fit the methods to every draw of one cell."""
    from sklearn.metrics import f1_score

    from ._logistic_methods import fit_all, loss

    options: Any = {"zero_division": 0.0}
    records, n = [], max(20, round(ratio * config.d))
    for seed in config.seeds:
        rng = np.random.default_rng([seed, round(100 * correlation), n, truth == "dense"])
        coef = rng.laplace(size=config.d)
        if truth == "sparse":
            coef = np.zeros(config.d)
            coef[rng.choice(config.d, config.nonzero, replace=False)] = 1.0
        X, test = (_design(rng, rows, config.d, correlation) for rows in (n, TEST))
        coef *= np.sqrt(snr * np.pi**2 / 3) / (test @ coef).std()
        y, p = (rng.random(n) < expit(X @ coef)).astype(np.float64), expit(test @ coef)
        started = time.perf_counter()
        found = fit_all(X, y)
        seconds = time.perf_counter() - started
        for method, m in found.items():
            records.append({
                "truth": truth, "correlation": correlation, "ratio": ratio, "snr": snr,
                "seed": seed, "method": method,
                "loss": float(loss(test @ m.coef + m.intercept, p).mean()),
                "least loss": float(loss(test @ coef, p).mean()),
                "f1": float(f1_score(coef != 0, m.coef != 0, **options)),
                "nonzero": int((m.coef != 0).sum()),
                "seconds of all methods": seconds,
            })  # fmt: skip
    return Part(records, {}, checksum(X, y))


# --- What the page shows of it --------------------------------------------------------------------


def kind(record: Record) -> str:
    """Name the kind of problem."""
    return f"{record['truth']} truth, n {'≥' if record['ratio'] >= ENOUGH else '<'} d/2"


def cells(records: list[Record], keys: tuple[str, ...]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return for each value of the keys the medians over draws, by method and measure."""
    groups: dict[tuple[Any, ...], dict[str, list[Record]]] = {}
    for record in ({**r, "kind": kind(r)} for r in records):
        group = groups.setdefault(tuple(record[k] for k in keys), {})
        group.setdefault(record["method"], []).append(record)
    return {
        cell: {
            method: {m: statistics.median(r[m] for r in found) for m in MEASURES}
            for method, found in methods.items()
        }
        for cell, methods in groups.items()
    }  # fmt: skip


def compared(
    records: list[Record], method: str, ratios: tuple[float, ...] = ASKED
) -> dict[str, Any]:
    """Return how a method does against L1 in sparse designs with these n/d, and in all."""
    designs = cells(records, ("truth", "correlation", "ratio", "snr"))
    asked = {c: m for c, m in designs.items() if c[0] == "sparse" and c[2] in ratios}
    worse = [m[method]["loss"] - m["L1"]["loss"] for m in designs.values()]
    gains = [m[method]["f1"] - m["L1"]["f1"] for m in asked.values()]
    return {
        "designs": len(asked),
        "wins": sum(m[method]["loss"] < m["L1"]["loss"] for m in asked.values()),
        "gain of F1": statistics.median(gains) if gains else 0.0,
        "worst": max(worse),
        "all": len(designs),
    }


def verdicts(records: list[Record]) -> list[Verdict]:
    """Say what the run shows, with its numbers."""
    said: list[Verdict] = []
    for method in ("flow", "flow, or L1 or ridge", "L1, thresholded"):
        c = compared(records, method)
        passes = c["wins"] >= WINS and c["gain of F1"] >= GAIN and c["worst"] <= WORSE
        said.append((
            f"{method[0].upper()}{method[1:]}: log-loss below L1's in {WINS} of the designs with "
            f"n = d/2 or d, F1 higher by {GAIN}, nowhere worse by more than {WORSE}",
            f"{'yes' if passes else 'no'}: {c['wins']} of {c['designs']} designs, F1 "
            f"{c['gain of F1']:+.2f} in the median, loss at most {c['worst']:+.3f} in {c['all']}",
        ))  # fmt: skip
    more = tuple(sorted({r["ratio"] for r in records if r["ratio"] > max(ASKED)}))
    if more:
        c = compared(records, "flow", more)
        said.append((
            f"Flow, with n = {more[0]:g} d: log-loss below L1's",
            f"{c['wins']} of {c['designs']} designs, F1 {c['gain of F1']:+.2f} in the median",
        ))  # fmt: skip
    return said


def table(records: list[Record]) -> list[Record]:
    """Return a row for each size and method: medians over correlations and draws."""
    return [
        {
            "data": f"{truth}, n = {ratio:g} d, SNR {snr:g}",
            "method": method,
            MEASURES["loss"]: m["loss"],
            MEASURES["f1"]: m["f1"] if truth == "sparse" else None,
        }
        for (truth, ratio, snr), methods in cells(records, ("truth", "ratio", "snr")).items()
        for method, m in methods.items()
    ]


def _lines(records: list[Record]) -> list[Record]:
    """Return the points of the figures."""
    return [
        {"kind": name, "SNR": f"{snr:g}", "method": method, **{k: short(m[k]) for k in MEASURES}}
        for (name, snr), methods in cells(records, ("kind", "snr")).items()
        for method, m in methods.items()
    ]


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw loss and F1 against the SNR, a column for each kind of problem."""
    from matplotlib.figure import Figure

    points = _lines(records)
    kinds = sorted(dict.fromkeys(p["kind"] for p in points), reverse=True)
    figure = Figure(figsize=(max(5.5, 3.4 * len(kinds)), 6.4), layout="constrained")
    axes = figure.subplots(2, len(kinds), squeeze=False)
    for row, (key, label) in zip(axes, MEASURES.items(), strict=True):
        for axis, name in zip(row, kinds, strict=True):
            for i, method in enumerate(dict.fromkeys(p["method"] for p in points)):
                chosen = [p for p in points if p["kind"] == name and p["method"] == method]
                style: Any = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 5}
                style["linestyle"] = DASHES[i % len(DASHES)]
                axis.plot([p["SNR"] for p in chosen], [p[key] for p in chosen], label=method,
                          **style)  # fmt: skip
            axis.set(xlabel="signal to noise", ylabel=label)
            axis.set_title(name, fontsize=10)
            axis.grid(alpha=0.25)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make a chart of each measure, a panel for each kind of problem."""
    return [
        (f"{label.capitalize()} against the signal to noise ratio, medians over designs and draws.",
         _chart(_lines(records), key))
        for key, label in MEASURES.items()
    ]  # fmt: skip


def _chart(points: list[Record], key: str) -> Any:
    """Draw one measure."""
    rows = [{**p, "value": p[key]} for p in sorted(points, key=lambda p: p["kind"], reverse=True)]
    return snr_chart(rows, key, "signal to noise", MEASURES[key], (COLOURS, SHAPES))
