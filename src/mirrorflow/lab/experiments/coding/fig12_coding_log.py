"""Sparse coding by log u - log v: decay raises the speed and the norm of the codes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from ...framework import contract
from ...framework.contract import Part, Record, Recorder, Trajectory, Verdict, checksum
from ._problem import Row, draw_figure, images, learned, make_charts, run_codes

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure

NAME = "fig12_coding_log"
TITLE = "Sparse coding by log u − log v: decay raises the norm of the codes"
PAPER = "Figure 12 (Appendix E)"


class Config(contract.Config):
    """The setting of Appendix E.

    Attributes
    ----------
    data, samples, atoms, passes, rate, steps, seed
        As for `fig10_coding_power`.
    alphas : tuple of float
        The strengths of the penalty.
    start : float
        The codes at the start.
    """

    data: Literal["auto", "olivetti", "digits"] = "auto"
    samples: int = Field(default=400, ge=1)
    atoms: int = Field(default=50, ge=1)
    passes: int = Field(default=20, ge=1)
    alphas: tuple[float, ...] = Field(default=(0.0, 0.0001, 0.001, 0.01, 0.1, 1.0), min_length=1)
    start: float = 0.1
    rate: float = Field(default=0.001, gt=0)
    steps: int = Field(default=100, ge=1)
    seed: int = 0

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (60 digits), or the paper's setting (cpu and full are the same)."""
        if name == "smoke":
            return cls(data="digits", samples=60, atoms=20, passes=2, steps=30)
        return cls()


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Code the images for every alpha."""
    from mirrorflow.estimator._codes import lipschitz

    X, source = images(config.data)
    X = X[: config.samples]
    D = learned(X, config.atoms, config.seed, config.passes)
    clock = config.rate / lipschitz(D) * config.steps
    return recorder.records(
        [
            (f"alpha{i}", f"α = {alpha:g}", partial(_one, config, X, D, alpha, clock, source))
            for i, alpha in enumerate(config.alphas)
        ]
    )


def _one(config: Config, X: Any, D: Any, alpha: float, clock: float, source: str) -> Part:
    """Run one alpha."""
    start = np.full(config.atoms, config.start)
    curves = run_codes(X, D, "log", 1, alpha, start, config.rate, config.steps)
    # u^2 and v^2 fall by 2 alpha t: the scale of R_a is (u0^2 + v0^2 + 4a) / 4 (errata 3).
    u2, v2 = (1 / (1 + np.exp(sign * config.start)) ** 2 for sign in (-1, 1))
    record = {
        "alpha": alpha,
        "data": source,
        "a": 0.0 - alpha * clock,
        "scale": float((u2 + v2 - 4 * alpha * clock) / (u2 + v2)),
        "nuclear_start": float(curves["nuclear"][0]),
        "nuclear_end": float(curves["nuclear"][-1]),
        "mse_end": float(curves["mse"][-1]),
    }
    return Part([record], curves, checksum(X, D))


# --- What the page shows of it --------------------------------------------------------------------


def verdicts(records: list[Record]) -> list[Verdict]:
    """Say what the run shows, with its numbers."""
    free = min(records, key=lambda r: r["alpha"])
    most = max(records, key=lambda r: r["alpha"])
    more = most["nuclear_end"] / free["nuclear_end"] - 1
    worse = most["mse_end"] / free["mse_end"] - 1
    return [
        (
            f"Nuclear norm of the codes ({free['data']}) with α = {most['alpha']:g}",
            f"{100 * abs(more):.2g} % {'above' if more > 0 else 'below'} that without decay",
        ),
        (
            "Their MSE",
            f"{100 * abs(worse):.2g} % {'below' if worse < 0 else 'above'} that without decay",
        ),
        (
            "Scale of Rₐ, relative to its start",
            f"{100 * most['scale']:.3g} %, which speeds the codes up; the printed formula, with "
            "−2a, would raise it and slow them down (errata 3)",
        ),
    ]


def table(records: list[Record]) -> list[Record]:
    """Return a row for each alpha."""
    free = min(records, key=lambda r: r["alpha"])
    return [
        {
            "α": r["alpha"],
            "a at the end": r["a"],
            "scale of Rₐ, relative": r["scale"],
            "nuclear norm, start": r["nuclear_start"],
            "nuclear norm, end": r["nuclear_end"],
            "norm above that without decay, relative": r["nuclear_end"] / free["nuclear_end"] - 1,
            "MSE, end": r["mse_end"],
        }
        for r in records
    ]


def _curves(records: list[Record], trajectory: Trajectory) -> dict[str, dict[str, Any]]:
    """Return the curves of every alpha, by name."""
    return {
        f"α = {r['alpha']:g}": {name: trajectory[f"alpha{i}/{name}"] for name in ("nuclear", "mse")}
        for i, r in enumerate(records)
    }


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw norm and MSE against the iteration, and their differences from no decay."""
    curves = _curves(records, trajectory)
    free = curves[f"α = {min(r['alpha'] for r in records):g}"]
    apart = {
        name: {key: values[key] / free[key] - 1 for key in free} for name, values in curves.items()
    }
    steps = np.arange(len(free["mse"]))
    return draw_figure(
        [
            Row(curves, lambda _: steps, "iteration"),
            Row(apart, lambda _: steps, "iteration", ",\nrelative to no decay, less 1"),
        ]
    )


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the interactive versions."""
    captions = {
        "nuclear": "Nuclear norm of the codes of all images, Figure 12a.",
        "mse": "Mean squared error of the reconstructed images, Figure 12b.",
    }
    return make_charts(_curves(records, trajectory), captions, "log u − log v")
