"""Ends of discrete training against those that the account of decay, step and noise predicts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ...framework import contract
from ...framework.contract import Part, Record, Recorder, Trajectory, Verdict, checksum
from ...framework.drawing import STYLES, decades, short

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure

NAME = "beyond_account"
TITLE = "Step, minibatches, label noise and momentum act as decay: the account predicts the end"
PAPER = "Beyond the paper (its outlook: large learning rates and stochastic noise)"

Array = NDArray[np.float64]
# Each way of training: learning rate, steps, batch, label noise, decay, momentum. The noise and the
# decay are switched off half way, so that the run ends at an interpolating x.
WAYS: dict[str, tuple[float, int, int | None, float, float, float]] = {
    "full gradient": (0.02, 500, None, 0.0, 0.0, 0.0),
    "batch 1": (0.01, 1200, 1, 0.0, 0.0, 0.0),
    "batch 1, decay": (0.01, 2000, 1, 0.0, 0.03, 0.0),
    "label noise": (0.01, 3000, 1, 0.9, 0.0, 0.0),
    "label noise, decay": (0.01, 3000, 1, 0.9, 0.02, 0.0),
    "momentum": (0.0002, 5000, 1, 0.0, 0.0, 0.9),
    "momentum, label noise": (0.0002, 6000, 1, 0.9, 0.0, 0.9),
}
Way = Literal[
    "full gradient", "batch 1", "batch 1, decay", "label noise", "label noise, decay",
    "momentum", "momentum, label noise",
]  # fmt: skip
COLOURS = ("#0072B2", "#B07D0A", "#009E73", "black", "#CC79A7", "#56B4E9", "#D55E00")
VIEWS = {"alone": "decay alone", "account": "whole account", "tilted": "account and tilt"}


class Config(contract.Config):
    """The setting of the runs.

    Attributes
    ----------
    n, d : int
        Rows and columns of Z, whose rows are orthogonal.
    ways : tuple of str
        The ways of training, in the order of `WAYS`.
    seeds : tuple of int
        One problem, start and order of the samples each.
    """

    n: int = Field(default=4, ge=1)
    d: int = Field(default=16, ge=4)
    ways: tuple[Way, ...] = Field(default=get_args(Way), min_length=1)
    seeds: tuple[int, ...] = Field(default=tuple(range(20)), min_length=1)

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (three ways, one seed), or all ways and 20 seeds (cpu and full)."""
        if name == "smoke":
            return cls(ways=("full gradient", "batch 1", "label noise"), seeds=(0,))
        return cls()


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Train in each way from each seed, and predict the ends."""
    return recorder.records(
        [(way.replace(", ", "-"), way, partial(_way, config, way)) for way in config.ways]
    )


def _way(config: Config, way: str) -> Part:
    """Train in one way from each seed."""
    made = [_one(config, way, seed) for seed in config.seeds]
    ends = {key: np.stack([end[key] for _, end in made]) for key in ("trained", *VIEWS)}
    return Part([record for record, _ in made], ends, checksum(*ends.values()))


def _one(config: Config, way: str, seed: int) -> tuple[Record, dict[str, Array]]:
    """Train once; return the distances of the predictions from the end, and all of them."""
    import torch

    import mirrorflow as mf

    lr, steps, batch, noise, alpha, momentum = WAYS[way]
    Z, y, w0 = (torch.from_numpy(v) for v in _problem(config, seed))
    g, h, off = mf.Hadamard(), mf.WeightDecay(), lr * steps / 2
    start = (w0[0], w0[1])
    trained = mf.descend(
        mf.LeastSquares(Z, y), g, h, start, mf.SwitchOff(alpha, off), lr, steps,
        momentum=momentum, batch=batch, label_noise=mf.SwitchOff(noise, off), seed=seed,
        split_every=10,
    )  # fmt: skip
    path: Any = trained.path
    x, account = trained.value, path.account
    R, decay = mf.legendre(g, h, start), float(path.a[-1]) / (1 - momentum)
    # Training stops a little short of Zx = y: the end with the tilt is exact for what it fits.
    tilted = R.folded(account.a[-1], account.tilt(Z))
    ends = {
        "trained": x,
        "alone": mf.limit(R, Z, y, decay).value,
        "account": mf.limit(R, Z, y, account.a[-1], per_coordinate=True).value,
        "tilted": mf.limit(tilted, Z, Z @ x, 0.0).value,
    }
    size = float(torch.linalg.norm(x))
    missed = {key: float(torch.linalg.norm(ends[key] - x)) / size for key in VIEWS}
    record: Record = {
        "way": way, "seed": seed, "lr": lr, "steps": steps, "decay": decay,
        "a": float(account.a[-1].mean()),
        "residual": float(torch.linalg.norm(Z @ x - y) / torch.linalg.norm(y)), **missed,
    }  # fmt: skip
    return record, {key: value.numpy() for key, value in ends.items()}


def _problem(config: Config, seed: int) -> tuple[Array, Array, Array]:
    """Return Z with orthogonal rows, y of an x with three non-zeros, an unbalanced start."""
    rng = np.random.default_rng(seed)
    square = np.linalg.qr(rng.standard_normal((config.d, config.n)))[0]
    Z, truth = square.T * np.sqrt(config.d), np.zeros(config.d)
    truth[:3] = rng.choice([-1, 1], 3) * rng.uniform(0.5, 1.5, 3)
    m, w = 0.1 * rng.uniform(-1, 1, config.d), 0.5 * rng.uniform(0.7, 1.3, config.d)
    return np.ascontiguousarray(Z), Z @ truth, np.stack([m, w])


# --- What the page shows of it --------------------------------------------------------------------


def _medians(records: list[Record]) -> dict[str, dict[str, float]]:
    """Return the median distances of each way of training, by prediction."""
    ways = dict.fromkeys(str(r["way"]) for r in records)
    return {
        way: {key: float(np.median([r[key] for r in records if r["way"] == way])) for key in VIEWS}
        for way in ways
    }


def verdicts(records: list[Record]) -> list[Verdict]:
    """Say what the run shows, with its numbers."""
    found = _medians(records)
    closer = {way: m["alone"] / m["account"] for way, m in found.items()}
    least, most = min(closer, key=closer.__getitem__), max(closer, key=closer.__getitem__)
    worst = max(r["tilted"] for r in records)
    return [
        (
            "Counted per coordinate as decay, steps and noise put the predicted end closer to the "
            "trained one than decay alone does, by a factor of (medians over the seeds)",
            f"{closer[least]:.0f} ({least}) to {closer[most]:.0f} ({most})",
        ),
        (
            "What is left is the part of μ outside the row space of Z: with it as a tilt all ends "
            "agree to",
            f"{worst:.0e}",
        ),
        ("The paper", "leaves large learning rates and stochastic noise open"),
    ]


def table(records: list[Record]) -> list[Record]:
    """Return a row for each way of training, with medians over the seeds."""
    rows: list[Record] = []
    for way, found in _medians(records).items():
        mine = [r for r in records if r["way"] == way]
        named = {f"distance, {VIEWS[key]}": value for key, value in found.items()}
        rows.append(
            {
                "training": way,
                "lr": mine[0]["lr"],
                "steps": mine[0]["steps"],
                "a, decay alone": float(np.median([r["decay"] for r in mine])),
                "a, mean of the account": float(np.median([r["a"] for r in mine])),
                **named,
                "closer by": found["alone"] / found["account"],
            }
        )
    return rows


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw the error of each predicted coefficient, a panel for each kind of prediction."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    for axis, (key, title) in zip(axes, VIEWS.items(), strict=True):
        for i, way in enumerate(_medians(records)):
            folder = way.replace(", ", "-")
            trained, predicted = (
                trajectory[f"{folder}/{name}"].ravel() for name in ("trained", key)
            )
            missed = np.maximum(np.abs(predicted - trained), 1e-18)  # 0 has no logarithm
            colour, marker = COLOURS[i % len(COLOURS)], "os^vDPX"[i % 7]
            axis.plot(
                np.abs(trained), missed, color=colour, label=way, marker=marker, markersize=3.5,
                linestyle="none", alpha=0.7,
            )  # fmt: skip
        axis.set(title=title, xlabel="|coefficient after training|", xscale="log", yscale="log")
        axis.grid(alpha=0.25)
        axis.set_ylabel("|predicted − trained|")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4)
    return figure


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the interactive chart of the distances."""
    import altair as alt

    rows = [
        {"training": r["way"], "prediction": label, "distance": short(max(r[key], 1e-16))}
        for r in records
        for key, label in VIEWS.items()
    ]
    names = list(VIEWS.values())
    low, high = (f(row["distance"] for row in rows) for f in (min, max))
    chart = (
        alt.Chart(alt.Data(values=rows), height=260)
        .mark_point(filled=True, size=45, opacity=0.6)
        .encode(
            x=alt.X(
                "distance:Q",
                title="relative distance",
                scale=alt.Scale(type="log", padding=8),
                axis=alt.Axis(format=".0e", values=decades(low, high)),
            ),
            y=alt.Y("training:N", sort=list(_medians(records)), title=None),
            color=alt.Color(
                "prediction:N",
                sort=names,
                scale=alt.Scale(domain=names, range=[STYLES[i]["color"] for i in (0, 2, 3)]),
                legend=alt.Legend(orient="bottom", columns=1, title=None),
            ),
            shape=alt.Shape(
                "prediction:N",
                sort=names,
                scale=alt.Scale(domain=names),
                legend=alt.Legend(orient="bottom", columns=1, title=None),
            ),
            tooltip=["training:N", "prediction:N", alt.Tooltip("distance:Q", format=".2g")],
        )
    )
    return [
        (
            "Each point is a run: the relative distance between its end and each prediction of it.",
            chart,
        )
    ]
