"""What optimizers store of one and the same weight decay, and where they end."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ...framework import contract
from ...framework.contract import Part, Record, Recorder, Trajectory, Verdict, checksum
from ...framework.drawing import middle
from ._sparse import line_chart, medians, sparse_problem

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure
    from torch import Tensor

NAME = "beyond_adam"
TITLE = "Gradient descent stores decay as a preference for L1; AdamW hardly does"
PAPER = "Beyond the paper (its theorems are about gradient flow)"

Array = NDArray[np.float64]
# Learning rates at which each ends at Zx = y in the steps of the configuration.
RATES: dict[str, float] = {
    "gradient descent": 0.05,
    "MirrorAdam": 0.02,
    "AdamW": 0.01,
    "AdamW, betas (0, 0.9)": 0.01,
    "AdamW, balance projected": 0.01,
    "sign descent": 0.005,
}
Way = Literal[
    "gradient descent", "MirrorAdam", "AdamW", "AdamW, betas (0, 0.9)",
    "AdamW, balance projected", "sign descent",
]  # fmt: skip
_COLOURS = ("black", "#0072B2", "#B07D0A", "#D55E00", "#CC79A7", "#009E73")
COLOURS = dict(zip(RATES, _COLOURS, strict=True))


class Config(contract.Config):
    """The setting of the runs.

    Attributes
    ----------
    n, d, nonzeros : int
        Rows and columns of a Gaussian Z, and the entries of ±1 of the truth.
    steps : int
        Decay is on in their first half; the learning rate falls to 0 in the second one, but for
        gradient descent, whose steps are small already.
    decays : tuple of float
        The a = sum log(1 - lr * decay) at which it is switched off, <= 0.
    ways : tuple of str
        The optimizers.
    seeds : tuple of int
        One problem each.
    """

    n: int = Field(default=40, ge=1)
    d: int = Field(default=100, ge=2)
    nonzeros: int = Field(default=5, ge=1)
    steps: int = Field(default=4000, ge=2)
    decays: tuple[float, ...] = Field(default=(0.0, -1.0, -2.0, -3.0, -4.0), min_length=1)
    ways: tuple[Way, ...] = Field(default=get_args(Way), min_length=1)
    seeds: tuple[int, ...] = Field(default=tuple(range(20)), min_length=1)

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (two seeds of a small problem), or 20 seeds of 40 x 100 (cpu and full)."""
        if name == "smoke":
            return cls(n=8, d=16, nonzeros=2, steps=300, decays=(0.0, -2.0), seeds=(0, 1))
        return cls()


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Train x = m * w by each optimizer at each decay, all seeds at once."""
    return recorder.records(
        [
            (_key(way, a), f"{way}, a = {a:g}", partial(_part, config, way, a))
            for way in config.ways
            for a in config.decays
        ]
    )


def _key(way: str, a: float) -> str:
    """Return the name of a part."""
    return f"{list(RATES).index(way)}-a{-a:g}"


def _part(config: Config, way: str, a: float) -> Part:
    """Train once for all seeds, and compare each end with the truth and with argmin R_a."""
    Z, truth = _problems(config)
    y = (Z @ truth[..., None])[..., 0]
    ms, ws = _train(config, way, a, Z, y)
    records: list[Record] = [
        {"way": way, "a": a, "seed": seed, **_end(Z[i], y[i], truth[i], ms[i], ws[i], a)}
        for i, seed in enumerate(config.seeds)
    ]
    x = (ms * ws).numpy()
    return Part(records, {"x": x}, checksum(x))


def _problems(config: Config) -> tuple[Tensor, Tensor]:
    """Return Z of shape (seeds, n, d) and the truths of shape (seeds, d)."""
    import torch

    made = [
        sparse_problem(np.random.default_rng(seed), config.n, config.d, config.nonzeros)
        for seed in config.seeds
    ]
    Z, truth = (torch.from_numpy(np.stack(part)) for part in zip(*made, strict=True))
    return Z, truth


def _train(config: Config, way: str, a: float, Z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return m and w at the end, of shape (seeds, d): decay in the first half of the steps only."""
    import torch

    ms = [torch.zeros(config.d, dtype=Z.dtype) for _ in config.seeds]
    ws = [torch.ones(config.d, dtype=Z.dtype) for _ in config.seeds]
    optimizer, half = _optimizer(way, ms, ws), config.steps // 2
    factor = math.exp(a / half)
    for step in range(config.steps):
        lr = _rate(way, step / half - 1)
        decay = (1 - factor) / lr if step < half else 0.0
        optimizer.param_groups[0].update(lr=lr, weight_decay=decay)
        with torch.no_grad():
            x = torch.stack(ms) * torch.stack(ws)
            G = (Z.mT @ (Z @ x[..., None] - y[..., None]))[..., 0] / config.n
            for m, w, row in zip(ms, ws, G, strict=True):
                m.grad, w.grad = row * w, row * m
        optimizer.step()
        if way == "AdamW, balance projected":
            _project(ms, ws, math.exp(2 * a * min((step + 1) / half, 1.0)))
    return torch.stack(ms), torch.stack(ws)


def _rate(way: str, after: float) -> float:
    """Return the learning rate: constant, then falling to 0 as a cosine, 0 <= after < 1."""
    if after < 0 or way == "gradient descent":
        return RATES[way]
    return 0.5 * RATES[way] * (1 + math.cos(math.pi * after))


def _optimizer(way: str, ms: list[Tensor], ws: list[Tensor]) -> Any:
    """Return the optimizer of a way of training, its rate and decay set at each step."""
    import torch

    from mirrorflow.optim import MirrorAdam

    if way == "MirrorAdam":
        return MirrorAdam(zip(ms, ws, strict=True))
    both = [*ms, *ws]
    if way == "gradient descent":  # without momentum its decay is decoupled
        return torch.optim.SGD(both, foreach=True)
    if way == "sign descent":
        return _sign_descent(both)
    betas = (0.0, 0.9) if way == "AdamW, betas (0, 0.9)" else (0.9, 0.999)
    return torch.optim.AdamW(both, betas=betas, foreach=True)


def _sign_descent(parameters: list[Tensor]) -> Any:
    """Return w <- (1 - lr decay) w - lr sign(grad) as an optimizer."""
    import torch

    class SignDescent(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            (group,) = self.param_groups
            with torch.no_grad():
                for p in group["params"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(p.grad.sign(), alpha=group["lr"])

    return SignDescent(parameters, {"lr": 1.0, "weight_decay": 0.0})


def _project(ms: list[Tensor], ws: list[Tensor], shrink: float) -> None:
    """Set the balance of each m * w to the flow's, w^2 - m^2 = e^{2a}, and keep the product.

    For w^2 - m^2 = D and x = m w, w^2 solves w^4 - D w^2 - x^2 = 0.
    """
    import torch

    with torch.no_grad():
        for m, w in zip(ms, ws, strict=True):
            x = m * w
            w.copy_(((shrink + (shrink**2 + 4 * x**2).sqrt()) / 2).sqrt())  # w > 0 at the start
            m.copy_(x / w)


def _end(Z: Tensor, y: Tensor, truth: Tensor, m: Tensor, w: Tensor, a: float) -> dict[str, float]:
    """Return how far the end is from the truth and from argmin R_a, and what is stored."""
    import torch

    import mirrorflow as mf

    x, one = m * w, torch.ones_like(m)
    R = mf.legendre(mf.Hadamard(), mf.WeightDecay(), (torch.zeros_like(m), one))
    predicted = mf.limit(R, Z, y, a).value
    tiny = torch.finfo(m.dtype).tiny
    return {
        "error": float((x - truth).norm() / truth.norm()),
        "l1": float(x.abs().sum() / truth.abs().sum()),
        "residual": float((Z @ x - y).norm() / y.norm()),
        "distance": float((x - predicted).norm() / predicted.norm()),
        # Both start at 1: the flow's law lets w^2 - m^2 fall as e^{2a}, sign descent's
        # ||w| - |m|| as e^a.
        "stored": float((w**2 - m**2).abs().clamp_min(tiny).log().median() / 2),
        "stored by sign": float((w.abs() - m.abs()).abs().clamp_min(tiny).log().median()),
    }


# --- What the page shows of it --------------------------------------------------------------------


def _medians(records: list[Record], key: str) -> dict[str, dict[float, float]]:
    """Return the medians of a number over the seeds, by way of training and a."""
    return medians(records, "way", "a", key)


def verdicts(records: list[Record]) -> list[Verdict]:
    """Return what the run shows, with its numbers."""
    error, distance = _medians(records, "error"), _medians(records, "distance")
    least = min(float(r["a"]) for r in records)
    ends = [
        (
            f"{way}: the relative error after decay of a = {least:g} that is switched off, and "
            "without decay",
            f"{of[least]:.2g} and {of[0.0]:.2g}",
        )
        for way, of in error.items()
    ]
    law = ", ".join(f"{of[least]:.1g} ({way})" for way, of in distance.items())
    return [*ends, ("Distance from the argmin R_a that the paper's law predicts", law)]


def table(records: list[Record]) -> list[Record]:
    """Return a row for each optimizer and a, with medians over the seeds."""
    columns = {
        "error": "relative error", "l1": "L1 norm, of the truth's", "distance": "from argmin R_a",
        "stored": "log of |w² − m²|, half", "stored by sign": "log of ||w| − |m||",
        "residual": "residual",
    }  # fmt: skip
    found = {key: _medians(records, key) for key in columns}
    return [
        {"optimizer": way, "a": a, **{name: found[k][way][a] for k, name in columns.items()}}
        for way, of in found["error"].items()
        for a in sorted(of, reverse=True)
    ]


PANELS = {
    "error": "relative error of x",
    "distance": "relative distance from argmin R_a",
    "stored": "½ log |w² − m²| at the end, median over x",
}


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw the error, the distance from the predicted end, and what is stored, over a."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        for i, (way, of) in enumerate(_medians(records, key).items()):
            axis.plot(
                [-a for a in of], list(of.values()), color=COLOURS[way], label=way,
                marker="os^vDP"[i % 6], markersize=5,
            )  # fmt: skip
        axis.set(xlabel="decay until the switch-off, −a", ylabel=title)
        if key == "stored":
            ends = [0.0, -min(float(r["a"]) for r in records)]
            axis.plot(ends, [-e for e in ends], color="0.6", linewidth=4, zorder=0)
            axis.annotate(
                "law of the flow", (ends[1] / 2, -ends[1] / 2), xytext=(10, 6), ha="left",
                textcoords="offset points", color="0.35", fontsize=8,
            )  # fmt: skip
        else:
            axis.set_yscale("log")
        axis.grid(alpha=0.25)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3)
    return figure


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the interactive chart of the error over a."""
    import altair as alt

    found = {
        way: {-a: value for a, value in of.items()}
        for way, of in _medians(records, "error").items()
    }
    x = alt.X("x:Q", title="decay until the switch-off, −a")
    y = alt.Y("y:Q", scale=alt.Scale(type="log"), title="relative error of x")
    return [
        (
            "The error of the end of training over the decay that was switched off half way"
            f"{middle(records)}.",
            line_chart(found, [COLOURS[way] for way in found], None, x, y),
        )
    ]
