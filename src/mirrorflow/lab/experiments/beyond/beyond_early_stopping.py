"""The flow stopped at t against the loss penalized by D_{R_a}/t, and the best of both in noise."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ...framework import contract
from ...framework.contract import Part, Record, Recorder, Trajectory, Verdict, checksum
from ...framework.drawing import decades, emphasized, short
from ._sparse import sparse_problem

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure

NAME = "beyond_early_stopping"
TITLE = "Early stopping beside a penalty: does decay replace it, or add to it?"
PAPER = "Beyond the paper (its outlook: early stopping); Ali et al. 2019 for the linear model"

Array = NDArray[np.float64]
BOUND = 1.69  # Ali, Kolter and Tibshirani 2019: risk of a linear flow over ridge's, at the same t
WAYS = {"flow": "flow stopped at t", "penalty": "penalized with 1/t"}


class Config(contract.Config):
    """The setting.

    Attributes
    ----------
    n, d, nonzero : int
        Rows and columns of a Gaussian Z, and the entries +-1 of the truth.
    noise : float
        The standard deviation of the noise on y.
    a : tuple of float
        The accumulated regularization: the start is (0, e^a).
    times : int
        Times between 0.01 and 10,000, evenly in their logarithm.
    seeds : tuple of int
        One Z, truth and noise each.
    """

    n: int = Field(default=30, ge=2)
    d: int = Field(default=60, ge=2)
    nonzero: int = Field(default=3, ge=1)
    noise: float = Field(default=0.5, ge=0)
    a: tuple[float, ...] = Field(default=(1.5, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0), min_length=1)
    times: int = Field(default=61, ge=2)
    seeds: tuple[int, ...] = Field(default=tuple(range(20)), min_length=1)

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (three a, two seeds, few times), or seven a and 20 seeds (cpu and full)."""
        if name == "smoke":
            return cls(n=8, d=12, nonzero=2, a=(1.5, -1.0, -3.0), times=13, seeds=(0, 1))
        return cls()


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Stop, and penalize, at each time for each a."""
    return recorder.records(
        [(f"a_{a:g}", f"a = {a:g}", partial(_amount, config, a)) for a in config.a]
    )


def _amount(config: Config, a: float) -> Part:
    """Return the risks of both ways at one a: the mean over the seeds, time by time."""
    times = np.logspace(-2, 4, config.times)
    made = [_one(config, a, times, seed) for seed in config.seeds]
    flow, penalty, end, zero = (np.array(v) for v in zip(*made, strict=True))
    mean = {"flow": flow.mean(0), "penalty": penalty.mean(0)}
    ratio = mean["flow"] / mean["penalty"]
    record: Record = {"a": a, "risk at the end": float(end.mean()), "risk of 0": float(zero.mean())}
    for way, risks in mean.items():
        record |= {f"risk, {way}": float(risks.min()), f"t, {way}": float(times[risks.argmin()])}
    record |= {
        "largest ratio": float(ratio.max()), "at t": float(times[ratio.argmax()]),
        "smallest ratio": float(ratio.min()), "seeds": len(config.seeds),
    }  # fmt: skip
    return Part([record], {"t": times, **mean}, checksum(times, *mean.values()))


def _one(config: Config, a: float, times: Array, seed: int) -> tuple[Array, Array, float, float]:
    """Return |x - truth|^2 of the flow and the penalty at each time, at the end, and of x = 0."""
    import torch

    import mirrorflow as mf

    rng = np.random.default_rng(seed)
    Z, truth = sparse_problem(rng, config.n, config.d, config.nonzero)
    y = Z @ truth + config.noise * rng.standard_normal(config.n)
    one = torch.ones(config.d, dtype=torch.float64)
    g, h, w0 = mf.Hadamard(), mf.WeightDecay(), (0 * one, one)
    R = mf.legendre(g, h, w0)
    loss = mf.LeastSquares(torch.from_numpy(Z), torch.from_numpy(y))
    stopped = mf.flow(
        loss, g, h, (0 * one, np.exp(a) * one), mf.Constant(0.0), float(times[-1]),
        view="mirror", save_at=times,
    )  # fmt: skip
    assert stopped.path is not None
    x = {
        "flow": stopped.path.x.numpy(),
        "penalty": mf.penalized(R, Z, y, a, times).value.numpy(),
        "end": mf.limit(R, Z, y, a).value.numpy()[None],
    }
    risks = {key: ((value - truth) ** 2).sum(1) for key, value in x.items()}
    return risks["flow"], risks["penalty"], float(risks["end"][0]), float(truth @ truth)


# --- What the page shows of it --------------------------------------------------------------------


def verdicts(records: list[Record]) -> list[Verdict]:
    """Return what the run shows, with its numbers."""
    first = max(records, key=lambda r: r["a"])
    worst = max(records, key=lambda r: r["largest ratio"])
    decay = min(records, key=lambda r: r["risk at the end"])
    both = min(records, key=lambda r: r["risk, flow"])
    gap = {r["a"]: r["risk, flow"] / r["risk, penalty"] for r in records}
    closest, furthest = max(gap, key=gap.__getitem__), min(gap, key=gap.__getitem__)
    lowest = ", the smallest here" if both["a"] == min(gap) else ""
    return [
        (
            "Under this noise decay does not replace stopping, they add up: the risk is",
            f"{first['risk at the end']:.2f} with neither (a = {first['a']:g}), "
            f"{first['risk, flow']:.2f} with stopping alone, {decay['risk at the end']:.2f} with "
            f"decay alone (a = {decay['a']:g}), {both['risk, flow']:.2f} with both "
            f"(a = {both['a']:g}{lowest}, t = {both['t, flow']:.2g})",
        ),
        (
            f"A linear flow that stops has at most {BOUND} times ridge's risk at the same t (Ali "
            "et al. 2019); the largest ratio here is",
            f"{first['largest ratio']:.2f} near it (a = {first['a']:g}), "
            f"{worst['largest ratio']:.2f} at a = {worst['a']:g}",
        ),
        (
            "At the best t of each the risk of the flow is, in units of the penalty's",
            f"{gap[closest]:.2f} at a = {closest:g}, {gap[furthest]:.2f} at a = {furthest:g}",
        ),
    ]


def table(records: list[Record]) -> list[Record]:
    """Return a row for each a."""
    return records


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw the risks of both ways over t, and their ratio."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[1].sharey(axes[0])
    for i, record in enumerate(records):
        part, colour = f"a_{record['a']:g}", emphasized(len(records))[i]
        t, flow, penalty = (trajectory[f"{part}/{key}"] for key in ("t", *WAYS))
        label = f"a = {record['a']:g}"
        axes[0].plot(t, flow, color=colour, label=label)
        axes[1].plot(t, penalty, color=colour)
        axes[2].plot(t, flow / penalty, color=colour)
    axes[2].axhline(BOUND, color="black", linestyle="dashed", linewidth=1)
    axes[2].text(0.02, BOUND, f" {BOUND}, linear model", va="bottom", fontsize=8)
    for axis, title in zip(axes, (*WAYS.values(), "ratio of the risks"), strict=True):
        axis.set(title=title, xlabel="t", xscale="log")
        axis.grid(alpha=0.25)
    for axis in axes[:2]:
        axis.set(ylabel="risk, mean over the seeds", yscale="log")
    axes[2].set_ylabel("flow over penalty")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    return figure


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the interactive chart of the risks."""
    import altair as alt

    rows = [
        {"t": short(t), "risk": short(risk), "way": label, "a": f"{record['a']:g}"}
        for record in records
        for way, label in WAYS.items()
        for t, risk in zip(
            trajectory[f"a_{record['a']:g}/t"].tolist(),
            trajectory[f"a_{record['a']:g}/{way}"].tolist(),
            strict=True,
        )
    ]
    low, high = (f(row["risk"] for row in rows) for f in (min, max))
    amounts = [f"{record['a']:g}" for record in records]
    colours = emphasized(len(records))
    chart = (
        alt.Chart(alt.Data(values=rows), height=280)
        .mark_line(strokeWidth=1.5)
        .encode(
            x=alt.X("t:Q", title="t", scale=alt.Scale(type="log"), axis=alt.Axis(format=".0e")),
            y=alt.Y(
                "risk:Q",
                title="risk, mean over the seeds",
                scale=alt.Scale(type="log", nice=False),
                axis=alt.Axis(values=decades(low, high), format=".2g"),
            ),
            color=alt.Color(
                "a:N",
                sort=amounts,
                scale=alt.Scale(domain=amounts, range=colours),
                legend=alt.Legend(orient="bottom", columns=4),
            ),
            strokeDash=alt.StrokeDash(
                "way:N",
                sort=list(WAYS.values()),
                legend=alt.Legend(orient="top", columns=1, title=None),
            ),
            tooltip=["a:N", "way:N", alt.Tooltip("t:Q", format=".2g"), "risk:Q"],
        )
    )
    return [("The risk |x − truth|² over t, for the stopped flow and for the penalty.", chart)]
