"""Weight decay that is switched off against a smaller start, for products of several factors."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ...framework import contract
from ...framework.contract import Part, Record, Recorder, Trajectory, Verdict, checksum
from ...framework.drawing import DASHES, STYLES, middle
from ._sparse import line_chart, medians, sparse_problem

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure
    from torch import Tensor

NAME = "beyond_depth"
TITLE = "Decay that has accumulated to a acts as a start scaled by eᵃ, at every depth"
PAPER = "Beyond the paper (Theorem D.2: deeper products do not commute with weight decay)"

SWITCH = 2.0  # the time at which decay is switched off
Array = NDArray[np.float64]


class Config(contract.Config):
    """The setting of the runs.

    Attributes
    ----------
    n, d, nonzeros : int
        Rows and columns of a Gaussian Z, and the entries of ±1 of the truth.
    depths : tuple of int
        The numbers of factors.
    decays : tuple of float
        The a at the switch-off, <= 0.
    time : float
        How long the flow goes on after the switch-off, in units of e^{(2-2k) a}: decay leaves its
        speed J J^T, of the zeros of the truth, at e^{(2k-2) a} of what it was.
    seeds : tuple of int
        One problem and one unbalanced start each.
    """

    n: int = Field(default=16, ge=1)
    d: int = Field(default=30, ge=2)
    nonzeros: int = Field(default=3, ge=1)
    depths: tuple[int, ...] = Field(default=(2, 3, 4), min_length=1)
    decays: tuple[float, ...] = Field(default=(0.0, -0.5, -1.0, -1.5, -2.0), min_length=1)
    time: float = Field(default=1000.0, gt=0)
    seeds: tuple[int, ...] = Field(default=tuple(range(5)), min_length=1)

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (a small problem), or five seeds of 16 x 30 (cpu and full)."""
        if name == "smoke":
            return cls(n=4, d=8, nonzeros=1, decays=(0.0, -1.0), time=300.0, seeds=(0,))
        return cls()


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Integrate both flows at each depth and decay."""
    return recorder.records(
        [
            (f"depth{k}-a{-a:g}", f"{k} factors, a = {a:g}", partial(_part, config, k, a))
            for k in config.depths
            for a in config.decays
        ]
    )


def _part(config: Config, k: int, a: float) -> Part:
    """Integrate at one depth and decay from each seed."""
    made = [_one(config, k, a, seed) for seed in config.seeds]
    ends = {key: np.stack([end[key] for _, end in made]) for key in made[0][1]}
    return Part([record for record, _ in made], ends, checksum(*ends.values()))


def _one(config: Config, k: int, a: float, seed: int) -> tuple[Record, dict[str, Array]]:
    """Compare the end after decay with the end from e^a w0, and both with argmin R_a."""
    import mirrorflow as mf

    Z, truth, start = _problem(config, seed)
    y, w0 = Z @ truth, tuple(start[:k])
    g, h, loss = mf.Depth(k), mf.WeightDecay(), mf.LeastSquares(Z, y)
    after = config.time * math.exp((2 - 2 * k) * a)
    stop = SWITCH + after

    def end(w: Any, schedule: mf.Schedule) -> Tensor:
        # Coordinates differ in speed by e^{(2k-2) a}: a stiff flow, which DOP853 does not end.
        stiff: Any = {"rtol": 1e-10, "method": "LSODA", "save_at": [stop]}
        return mf.flow(loss, g, h, w, schedule, stop, **stiff).value

    x = end(w0, mf.SwitchOff(-a / SWITCH, SWITCH))
    scaled = end(tuple(math.exp(a) * w for w in w0), mf.Constant(0.0))
    R = mf.legendre(g, h, w0)
    predicted, ignored = (mf.limit(R, Z, y, at).value for at in (a, 0.0))
    record: Record = {
        "depth": k, "a": a, "seed": seed,
        "from the scaled start": _distance(x, scaled),
        "from argmin R_a": _distance(x, predicted),
        "from argmin R_0": _distance(x, ignored),
        "error": _distance(x, truth),
        "l1": float(x.abs().sum() / truth.abs().sum()),
        "residual": _distance(Z @ x, y),
    }  # fmt: skip
    ends = {"decayed": x, "scaled": scaled, "predicted": predicted}
    return record, {key: value.numpy() for key, value in ends.items()}


def _distance(x: Tensor, y: Tensor) -> float:
    """Return |x - y| / |y|."""
    return float((x - y).norm() / y.norm())


def _problem(config: Config, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return Z, a sparse truth, and four factors of a start with a small x."""
    import torch

    rng = np.random.default_rng(seed)
    Z, truth = sparse_problem(rng, config.n, config.d, config.nonzeros)
    start = 0.8 * rng.uniform(0.8, 1.2, (4, config.d))
    start[0] = rng.uniform(-0.2, 0.2, config.d)
    return torch.from_numpy(Z), torch.from_numpy(truth), torch.from_numpy(start)


# --- What the page shows of it --------------------------------------------------------------------


def _medians(records: list[Record], key: str) -> dict[int, dict[float, float]]:
    """Return the medians of a number over the seeds, by depth and a."""
    return medians(records, "depth", "a", key)


def verdicts(records: list[Record]) -> list[Verdict]:
    """Return what the run shows, with its numbers."""
    least = min(float(r["a"]) for r in records)
    scaled, predicted = (
        max(float(r[key]) for r in records) for key in ("from the scaled start", "from argmin R_a")
    )
    error = _medians(records, "error")
    went = ", ".join(f"{of[0.0]:.2g} to {of[least]:.2g} ({k} factors)" for k, of in error.items())
    return [
        (
            "Decay ends where a start scaled by eᵃ ends without decay, at every depth, to",
            f"{scaled:.0e} at most",
        ),
        ("It is argmin R_a with another clock, to", f"{predicted:.0e} at most"),
        (f"From a = 0 to {least:g} the relative error goes from", went),
        ("The paper", "gives up weight decay for products of 3 and more factors (Theorem D.2)"),
    ]


def table(records: list[Record]) -> list[Record]:
    """Return a row for each depth and a, with medians over the seeds."""
    columns = {
        "from the scaled start": "from the scaled start", "from argmin R_a": "from argmin R_a",
        "from argmin R_0": "from argmin R_0", "error": "relative error",
        "l1": "L1 norm, of the truth's",
    }  # fmt: skip
    found = {key: _medians(records, key) for key in columns}
    return [
        {"factors": k, "a": a, **{name: found[key][k][a] for key, name in columns.items()}}
        for k, of in found["error"].items()
        for a in sorted(of, reverse=True)
    ]


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw the ends against each other, their distances, and the error over a."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    ends, distances, errors = figure.subplots(1, 3)
    for i, k in enumerate(_medians(records, "error")):
        style, marker = STYLES[i % len(STYLES)], "os^D"[i % 4]
        names = [name for name in trajectory if name.startswith(f"depth{k}-")]
        x, scaled = (
            np.concatenate([trajectory[n].ravel() for n in sorted(names) if n.endswith(f"/{end}")])
            for end in ("decayed", "scaled")
        )
        ends.plot(scaled, x, marker, color=style["color"], markersize=4, alpha=0.6, label=f"{k}")
        for j, key in enumerate(("from argmin R_0", "from argmin R_a", "from the scaled start")):
            of = _medians(records, key)[k]
            distances.plot(
                [-a for a in of], [max(v, 1e-17) for v in of.values()], color=style["color"],
                linestyle=DASHES[j], marker=marker, markersize=4,
            )  # fmt: skip
        of = _medians(records, "error")[k]
        errors.plot([-a for a in of], list(of.values()), marker=marker, markersize=5, **style)
    for j, label in enumerate(("decay ignored (R at a = 0)", "argmin R_a", "the scaled start")):
        distances.plot([], [], color="0.3", linestyle=DASHES[j], label=label)
    ends.set(
        xlabel="coefficients from the start eᵃ w₀, no decay", ylabel="coefficients after decay"
    )
    distances.set(yscale="log", ylabel="relative distance of the end from")
    errors.set(yscale="log", ylabel="relative error of x")
    for axis in (distances, errors):
        axis.set_xlabel("decay until the switch-off, −a")
    ends.legend(title="factors")
    distances.legend(fontsize=8)
    for axis in figure.axes:
        axis.grid(alpha=0.25)
    return figure


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the interactive chart of the error over a, a line for each depth."""
    import altair as alt

    found = {
        k: {-a: value for a, value in of.items()} for k, of in _medians(records, "error").items()
    }
    colours = [STYLES[i % len(STYLES)]["color"] for i in range(len(found))]
    x = alt.X("x:Q", title="decay until the switch-off, −a")
    y = alt.Y("y:Q", scale=alt.Scale(type="log"), title="relative error of x")
    return [
        (
            "The error of the end over the decay that was switched off, by the number of factors"
            f"{middle(records)}.",
            line_chart(found, colours, "factors", x, y),
        )
    ]
