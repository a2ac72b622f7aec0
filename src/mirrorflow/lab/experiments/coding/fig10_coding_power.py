"""Sparse coding by u^{2k} - v^{2k}: what looks like a shrinking range is a growing speed."""

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

NAME = "fig10_coding_power"
TITLE = "Sparse coding by u²ᵏ − v²ᵏ: what looks like a shrinking range is a growing speed"
PAPER = "Figure 10 (Appendix E)"


class Config(contract.Config):
    """The setting of Appendix E.

    Attributes
    ----------
    data : str
        "olivetti", "digits", or "auto": the faces where they are at hand.
    samples, atoms, passes : int
        Images that are coded (at most), atoms of the dictionary, passes of its learning.
    ks : tuple of int
        Half the powers.
    alpha : float
        The strength of the penalty; a run without it stands beside each.
    rate : float
        The length of a step in units of 1 / Lip(D).
    steps : int
        Iterations.
    seed : int
        Of the dictionary and of the start x ~ N(0, 1), the same for all images.
    """

    data: Literal["auto", "olivetti", "digits"] = "auto"
    samples: int = Field(default=400, ge=1)
    atoms: int = Field(default=50, ge=1)
    passes: int = Field(default=20, ge=1)
    ks: tuple[int, ...] = Field(default=(1, 2, 3, 4, 5, 6, 7), min_length=1)
    alpha: float = Field(default=0.001, ge=0)
    rate: float = Field(default=0.001, gt=0)
    steps: int = Field(default=100, ge=1)
    seed: int = 0

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (60 digits), or the paper's setting (cpu and full are the same)."""
        if name == "smoke":
            return cls(data="digits", samples=60, atoms=20, passes=2, ks=(1, 2, 4), steps=30)
        return cls()


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Code the images for every k, with and without the penalty."""
    X, source = images(config.data)
    X = X[: config.samples]
    D = learned(X, config.atoms, config.seed, config.passes)
    start = np.random.default_rng(config.seed).standard_normal(config.atoms)
    return recorder.records(
        [(f"k{k}", f"k = {k}", partial(_power, config, X, D, start, k, source)) for k in config.ks]
    )


def _power(config: Config, X: Any, D: Any, start: Any, k: int, source: str) -> Part:
    """Run one k."""
    curves, free = (
        run_codes(X, D, "power", k, alpha, start, config.rate, config.steps)
        for alpha in (config.alpha, 0.0)
    )
    size = np.sqrt(start**2 + 1)
    # x' = -s df/dx with s = (2k)^2 (u^{4k-2} + v^{4k-2}), at the start.
    powers = [((size + sign * start) / 2) ** ((2 * k - 1) / k) for sign in (1, -1)]
    record = {
        "k": k,
        "data": source,
        "speed": float((4 * k * k * (powers[0] + powers[1])).mean()),
        "nuclear_start": float(curves["nuclear"][0]),
        "nuclear_end": float(curves["nuclear"][-1]),
        "mse_start": float(curves["mse"][0]),
        "mse_end": float(curves["mse"][-1]),
        "penalty_nuclear": float(abs(curves["nuclear"][-1] / free["nuclear"][-1] - 1)),
        "penalty_mse": float(abs(curves["mse"][-1] / free["mse"][-1] - 1)),
    }
    return Part([record], curves, checksum(X, D, start))


# --- What the page shows of it --------------------------------------------------------------------


def verdicts(records: list[Record]) -> list[Verdict]:
    """Say what the run shows, with its numbers."""
    first, last = records[0], records[-1]
    effect = max(r["penalty_nuclear"] for r in records)
    return [
        (
            f"Nuclear norm of the codes ({first['data']}) at the end: it does not settle sooner "
            "for larger k, as the MSE does",
            f"{first['nuclear_end']:.0f} for k = {first['k']}, "
            f"{last['nuclear_end']:.0f} for k = {last['k']}",
        ),
        ("What the penalty changes in that norm, relative", f"{effect:.0e} at most"),
        (
            "Speed of the codes, (2k)² (u⁴ᵏ⁻² + v⁴ᵏ⁻²), on whose clock the curves nearly meet",
            f"{last['speed'] / first['speed']:.0f} times larger for k = {last['k']}",
        ),
        ("Range of the mirror map, the paper's reason", "widens as decay accumulates (errata 2)"),
    ]


def table(records: list[Record]) -> list[Record]:
    """Return a row for each k."""
    return [
        {
            "k": r["k"],
            "mean speed at the start": r["speed"],
            "nuclear norm, start": r["nuclear_start"],
            "nuclear norm, end": r["nuclear_end"],
            "MSE, start": r["mse_start"],
            "MSE, end": r["mse_end"],
            "effect of the penalty on the norm": r["penalty_nuclear"],
            "effect of the penalty on the MSE": r["penalty_mse"],
        }
        for r in records
    ]


def _curves(records: list[Record], trajectory: Trajectory) -> dict[str, dict[str, Any]]:
    """Return the curves of every k, by name."""
    return {
        f"k = {r['k']}": {name: trajectory[f"k{r['k']}/{name}"] for name in ("nuclear", "mse")}
        for r in records
    }


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw norm and MSE against the iteration, and against the iteration times the speed."""
    speed = {f"k = {r['k']}": r["speed"] for r in records}
    count = len(trajectory[f"k{records[0]['k']}/mse"])
    curves, steps = _curves(records, trajectory), np.arange(count)
    return draw_figure(
        [
            Row(curves, lambda _: steps, "iteration"),
            Row(curves, lambda name: steps * speed[name], "iteration × mean speed at the start"),
        ]
    )


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the interactive versions of the first row."""
    captions = {
        "nuclear": "Nuclear norm of the codes of all images, Figure 10a.",
        "mse": "Mean squared error of the reconstructed images, Figure 10b.",
    }
    return make_charts(_curves(records, trajectory), captions, "u²ᵏ − v²ᵏ")
