"""How near `HoldRatio` holds a ratio at its target, by its gain."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ...framework import contract
from ...framework.contract import Part, Record, Recorder, Trajectory, Verdict, checksum
from ._sparse import averages, line_chart

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure
    from torch import Tensor

NAME = "beyond_gain"
TITLE = "How fast a loop that holds a ratio should answer"
PAPER = "Beyond the paper (its schedules do not answer to measurements)"

Array = NDArray[np.float64]
Optimizer = Literal["AdamW", "SGD"]
RATES = {"AdamW": (0.005, 1.0), "SGD": (0.1, 0.01)}  # learning rate, and the decay to begin with
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


class Config(contract.Config):
    """The setting of the runs.

    Attributes
    ----------
    width, rank : int
        A teacher of that size with so many singular values, 1, 1/2, 1/3, ...
    batch : int
        Noisy samples of the teacher in a step.
    steps, every : int
        Of a run, and from one measurement to the next.
    gains : tuple of float
        Of the loop, in multiples of the decay that it begins with.
    targets : tuple of float
        In the way that the ratio of a constant decay at the upper bound lies below the one of none:
        0 is the one without decay, 1 the lowest that the bound reaches.
    top : float
        The upper bound, in multiples of the decay that the loop begins with.
    optimizers : tuple of str
    seeds : tuple of int
        Of teacher, start and noise.
    """

    width: int = Field(default=24, ge=2)
    rank: int = Field(default=4, ge=1)
    batch: int = Field(default=32, ge=1)
    steps: int = Field(default=2000, ge=10)
    every: int = Field(default=20, ge=1)
    gains: tuple[float, ...] = Field(default=(0.25, 1.0, 4.0, 16.0, 64.0, 256.0), min_length=1)
    targets: tuple[float, ...] = Field(default=(0.3, 0.7), min_length=1)
    top: float = Field(default=10.0, gt=1)
    optimizers: tuple[Optimizer, ...] = Field(default=get_args(Optimizer), min_length=1)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2, 3, 4), min_length=1)

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (short runs of one seed), or three seeds (cpu and full)."""
        if name == "smoke":
            return cls(width=8, rank=2, steps=100, every=10, gains=(1.0, 16.0), targets=(0.5,),
                       seeds=(0,))  # fmt: skip
        return cls()


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Train with each gain towards each target, between the ratios of no and of the most decay."""
    return recorder.records(
        [(kind, f"{kind}, all gains", partial(_part, config, kind)) for kind in config.optimizers]
    )


def _part(config: Config, kind: str) -> Part:
    """Train without decay, with the most, and with each loop between the two ratios."""
    import mirrorflow as mf

    start = RATES[kind][1]
    top, tail = config.top * start, max(1, config.steps // config.every // 3)
    fixed = [(seed, rate) for rate in (0.0, top) for seed in config.seeds]
    ratios, _ = _train(config, kind, [seed for seed, _ in fixed], [rate for _, rate in fixed])
    free, least = ratios[-tail:].mean(0).reshape(2, -1)
    made = []
    for place, seed in enumerate(config.seeds):
        for part in config.targets:
            target = float(free[place] + part * (least[place] - free[place]))
            for gain in config.gains:
                loop = mf.HoldRatio(target, start, gain * start, bounds=(0.0, top))
                setting = {"optimizer": kind, "seed": seed, "part": part, "gain": gain}
                made.append((setting, loop))
    ratios, rates = _train(config, kind, [int(s["seed"]) for s, _ in made], [h for _, h in made])
    records: list[Record] = [
        {**setting, **_end(ratios[1:, i], rates[1:, i], loop, tail)}
        for i, (setting, loop) in enumerate(made)
    ]
    return Part(records, {"ratio": ratios, "rate": rates}, checksum(ratios, rates))


def _train(config: Config, kind: str, seeds: list[int], decays: list[Any]) -> tuple[Array, Array]:
    """Return the ratio at each measurement and the rate after it, (measurements, runs).

    All runs train at once; each shrinks its factors by its own rate, and those of a seed have the
    same teacher, start and noise. A decay is a number, or a loop to which the ratio is passed.
    """
    import torch

    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    teacher = torch.stack([_teacher(config, draw) for draw in draws])
    A, B = (
        torch.stack([torch.randn(config.width, config.width, generator=draw) for draw in draws])
        / config.width**0.5
        for _ in range(2)
    )
    lr = RATES[kind][0]
    optimizer: Any = torch.optim.AdamW if kind == "AdamW" else torch.optim.SGD
    optimizer = optimizer([A, B], lr=lr, weight_decay=0.0, foreach=True)
    ratios, rates = [], []
    for step in range(config.steps + 1):
        if step % config.every == 0:
            ratios.append(_ratios(A @ B))
            rates.append([_answer(d, step, r) for d, r in zip(decays, ratios[-1], strict=True)])
            shrink = 1 - lr * torch.tensor(rates[-1])[:, None, None]
        x, noise = _batch(config, draws)
        error = x @ A @ B - x @ teacher - 0.5 * noise
        scale = 2 / (config.batch * config.width)
        A.grad, B.grad = scale * (x.mT @ error @ B.mT), scale * (A.mT @ x.mT @ error)
        for factor in (A, B):  # w <- (1 - lr decay) w, decoupled, before the step
            factor.mul_(shrink)
        optimizer.step()
    return np.array(ratios), np.array(rates)


def _batch(config: Config, draws: list[Any]) -> tuple[Tensor, Tensor]:
    """Return inputs and noise of a step, of each run from the numbers of its seed."""
    import torch

    size = (2, config.batch, config.width)
    made = torch.stack([torch.randn(size, generator=draw) for draw in draws], 1)
    return made[0], made[1]


def _ratios(product: Tensor) -> list[float]:
    """Return nuclear over Frobenius norm of each product."""
    import torch

    values = torch.linalg.svdvals(product.double())
    return (values.sum(-1) / values.norm(dim=-1)).tolist()


def _answer(decay: Any, step: int, ratio: float) -> float:
    """Return the rate until the next measurement."""
    return decay if isinstance(decay, float) else decay.update(step, ratio)


def _teacher(config: Config, generator: Any) -> Tensor:
    """Return a matrix with the singular values 1, 1/2, 1/3, ..., times the root of the width."""
    import torch

    draws = (torch.randn(config.width, config.rank, generator=generator) for _ in range(2))
    left, right = (torch.linalg.qr(draw).Q for draw in draws)
    return (left / torch.arange(1, config.rank + 1)) @ right.mT * config.width**0.5


def _end(ratios: Array, rates: Array, loop: Any, tail: int) -> dict[str, float]:
    """Return how far the ratio is from its target in the last third, and what the rate does.

    The rate turns where it rises after it has fallen, or falls after it has risen; its swing is the
    mean change from one measurement to the next, in multiples of the rate to begin with.
    """
    off = np.abs(np.log(ratios / loop.target))
    last = rates[-tail:]
    moves = [step for step in np.diff(last) if step != 0]
    turns = sum(bool(a * b < 0) for a, b in pairwise(moves))
    inside = np.flatnonzero(off <= 0.05)
    return {
        "target": float(loop.target),
        "off": float(off[-tail:].mean()),
        "at a bound": float(np.mean((last == loop.low) | (last == loop.high))),
        "turns": turns / max(1, len(last) - 2),
        "swing": float(np.abs(np.diff(last)).mean()) / loop.base if len(last) > 1 else 0.0,
        "first within 5%": float(inside[0] + 1) if len(inside) else float(len(off) + 1),
        "rate": float(last.mean()),
        "given up": float(loop.given_up),
    }


# --- What the page shows of it --------------------------------------------------------------------


def _means(records: list[Record], key: str) -> dict[str, dict[float, float]]:
    """Return the means of a number over targets and seeds, by optimizer and gain."""
    return averages(records, "optimizer", "gain", key, np.mean)


def _over_optimizers(records: list[Record], key: str) -> dict[float, float]:
    """Return the means over optimizers, targets and seeds, by gain."""
    found = _means(records, key)
    gains = next(iter(found.values()))
    return {gain: float(np.mean([of[gain] for of in found.values()])) for gain in gains}


def verdicts(records: list[Record]) -> list[Verdict]:
    """Return what the run shows, with its numbers."""
    off = _over_optimizers(records, "off")
    best = min(off, key=off.__getitem__)
    nearest = (
        "The gain that ends nearest to its targets, in multiples of the rate to begin with, and "
        "how far off the ratio is in the last third",
        f"{best:g}: {off[best]:.1%}",
    )
    measures = {
        "off": ("Off the target in the last third, by gain", ".1%"),
        "at a bound": ("Measurements at a bound of the rate", ".0%"),
        "swing": ("Change of the rate between measurements, in rates to begin with", ".2g"),
        "first within 5%": ("Measurement at which 5% is reached", ".0f"),
    }
    return [nearest, *((what, _by_gain(records, key, form))
                       for key, (what, form) in measures.items())]  # fmt: skip


def _by_gain(records: list[Record], key: str, form: str) -> str:
    """Return the means of a number at each gain, as text."""
    return "; ".join(f"{g:g}: {v:{form}}" for g, v in _over_optimizers(records, key).items())


COLUMNS = {
    "off": "off the target, last third", "at a bound": "at a bound", "turns": "turns a measurement",
    "swing": "change of the rate", "first within 5%": "first within 5%", "given up": "given up",
}  # fmt: skip


def table(records: list[Record]) -> list[Record]:
    """Return a row for each optimizer, target and gain, with means over the seeds."""
    rows: dict[tuple[str, float, float], list[Record]] = {}
    for r in records:
        rows.setdefault((str(r["optimizer"]), float(r["part"]), float(r["gain"])), []).append(r)
    return [
        {"optimizer": kind, "target": f"{part:g}", "gain": f"{gain:g}",
         **{name: float(np.mean([r[key] for r in group])) for key, name in COLUMNS.items()}}
        for (kind, part, gain), group in rows.items()
    ]  # fmt: skip


PANELS = {
    "off": "relative distance from the target, last third",
    "swing": "change of the rate, in multiples of its start",
    "first within 5%": "measurement at which 5% is reached",
}


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw how far off, how restless and how slow the loops are, over the gain."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        for i, (kind, of) in enumerate(_means(records, key).items()):
            axis.plot(
                list(of), list(of.values()), color=COLOURS[i], label=kind, marker="os"[i % 2],
                markersize=5,
            )  # fmt: skip
        axis.set(xlabel="gain, in multiples of the decay to begin with", ylabel=title)
        gains = list(_over_optimizers(records, key))
        axis.set_xscale("log", base=4)
        axis.set_xticks(gains, [f"{gain:g}" for gain in gains])
        axis.set_yscale("log" if key == "swing" else "linear")
        axis.grid(alpha=0.25)
    figure.axes[0].legend(title=None)
    return figure


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the interactive chart of the distance from the target over the gain."""
    import altair as alt

    found = _means(records, "off")
    x = alt.X("x:Q", scale=alt.Scale(type="log", base=4),
              title="gain, in multiples of the decay to begin with")  # fmt: skip
    y = alt.Y("y:Q", title="relative distance from the target")
    return [
        (
            "How far a measured ratio is from its target in the last third of a run, over the gain "
            "of the loop that holds it.",
            line_chart(found, COLOURS[: len(found)], None, x, y),
        )
    ]
