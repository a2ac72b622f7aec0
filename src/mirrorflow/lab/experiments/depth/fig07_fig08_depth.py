"""Deeper products: what weight decay leaves behind in m, m * w and m * w * v."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ...framework import contract
from ...framework.contract import Part, Record, Recorder, Trajectory, Verdict, checksum
from ._problem import DEPTHS, Problems, speeds, train

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure

NAME = "fig07_fig08_depth"
TITLE = "Depth: decay is stored in the geometry of m·w, not of m, and kills coordinates of m·w·v"
PAPER = "Figures 7 and 8 (Appendix D)"
DEAD = 1e-6  # of the speed that a coordinate has at x = 1: at this speed it needs 1e6 times longer


class Config(contract.Config):
    """The setting of Appendix D.

    Attributes
    ----------
    n, d, nonzero : int
        Measurements, unknowns, and how many of them are 1 (the others 0): |x*|_1 / |x*|_2 = 2.24.
    alphas : tuple of float
        Decay (for m: of the L1 penalty) in the first steps.
    eta : float
        The learning rate.
    scale : float
        The loss is scale |Zx - y|^2 / (2n). The paper says "mean squared error": 2.
    on, off : int
        Steps with decay, and without.
    seeds : tuple of int
        One problem each.
    points : int
        Recorded steps in each half.
    """

    n: int = Field(default=40, ge=1)
    d: int = Field(default=100, ge=1)
    nonzero: int = Field(default=5, ge=1)
    alphas: tuple[float, ...] = Field(default=(0.01, 0.1, 1.0), min_length=1)
    eta: float = Field(default=1e-3, gt=0)
    scale: float = Field(default=2.0, gt=0)
    on: int = Field(default=100_000, ge=1)
    off: int = Field(default=100_000, ge=1)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    points: int = Field(default=60, ge=2)

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (20 x 30, 2 x 2,000 steps), cpu (three seeds), or full (ten seeds)."""
        if name == "smoke":
            return cls(n=20, d=30, nonzero=2, eta=0.01, on=2000, off=2000, seeds=(0, 1), points=20)
        return cls(seeds=tuple(range(10))) if name == "full" else cls()

    def record(self) -> NDArray[np.int64]:
        """Return the recorded steps: geometric from the start, and again from the switch."""
        early = np.geomspace(1, self.on, self.points)
        late = self.on + np.geomspace(1, self.off, self.points)
        return np.unique(np.concatenate([[0], early, late]).astype(np.int64))


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Train each model in all settings at once."""
    problems = Problems.draw(config.seeds, config.n, config.d, config.nonzero)
    records: list[Record] = []
    for number, name in enumerate(DEPTHS):

        def tick(step: int, done: int = number * (config.on + config.off), key: str = name) -> None:
            recorder.log(step=step, model=key)
            recorder.progress(done + step, len(DEPTHS) * (config.on + config.off), key)

        key = f"depth{DEPTHS[name]}"
        records += recorder.part(key, lambda n=name, t=tick: _model(config, problems, n, t)).records
    return records


def _model(config: Config, problems: Problems, name: str, tick: Any) -> Part:
    """Train one model, and measure where it was when the decay was switched off."""
    curves = train(
        problems, DEPTHS[name], config.alphas, config.eta, config.scale, config.on, config.off,
        config.record(), tick,
    )  # fmt: skip
    x, truth = curves.x, problems.truth[:, None]
    ends = [
        {**_end(config, problems, name, i, j, x[-1, i, j], curves.factors[:, i, j]), "seed": seed}
        for i, seed in enumerate(config.seeds)
        for j in range(len(config.alphas))
    ]
    size = np.linalg.norm(x, axis=-1)
    ratio = np.abs(x).sum(-1) / np.where(size > 0, size, 1.0)  # 0 where x = 0: not drawn
    arrays = {
        "step": curves.steps.astype(np.float64),
        "switch": np.array(float(config.on)),
        "error": np.linalg.norm(x - truth, axis=-1),
        "ratio": ratio,
    }
    return Part(ends, arrays, checksum(problems.Z, problems.y))


def _end(
    config: Config, problems: Problems, name: str, i: int, j: int, x: Any, factors: Any
) -> Record:
    """Return where one run ended, and what explains it."""
    truth, alpha = problems.truth[i], config.alphas[j]
    alive = speeds(factors) > DEAD
    record: Record = {
        "model": name,
        "alpha": alpha,
        "a": 0.0 - alpha * config.eta * config.on,
        "error": float(np.linalg.norm(x - truth)),
        "ratio": float(np.abs(x).sum() / np.linalg.norm(x)) if x.any() else 0.0,
        "alive": int(alive.sum()),
        "alive_truth": int((alive & (truth > 0)).sum()),
    }
    if name == "m·w":
        record |= _predicted(config, problems, i, record["a"], x)
    if (
        name == "m·w·v" and alive.sum() <= config.n
    ):  # where the dead coordinates stay, the living ones fit what they can
        fitted = np.zeros_like(x)
        fitted[alive] = np.linalg.lstsq(problems.Z[i][:, alive], problems.y[i], rcond=None)[0]
        record["from_fit"] = float(np.linalg.norm(x - fitted))
    return record


def _predicted(config: Config, problems: Problems, i: int, a: float, x: Any) -> Record:
    """Compute the end point of m * w without training."""
    import torch

    import mirrorflow as mf

    zero = torch.zeros(config.d, dtype=torch.float64)
    R = mf.legendre(mf.Hadamard(), mf.WeightDecay(), (zero, zero + 1))
    solution = mf.limit(R, problems.Z[i], problems.y[i], a)
    end = solution.value.numpy()
    return {
        "predicted": float(np.linalg.norm(end - problems.truth[i])),
        "gap": float(np.linalg.norm(x - end) / np.linalg.norm(end)),
        "status": solution.status.name,
    }


# --- What the page shows of it --------------------------------------------------------------------


def _of(records: list[Record], model: str, alpha: float) -> list[Record]:
    return [r for r in records if (r["model"], r["alpha"]) == (model, alpha)]


def _median(records: list[Record], model: str, alpha: float, key: str) -> float:
    return statistics.median(r[key] for r in _of(records, model, alpha))


def verdicts(records: list[Record]) -> list[Verdict]:
    """Say what the run shows, with its numbers."""
    top = max(r["alpha"] for r in records)
    shallow, deep = (_median(records, name, top, "error") for name in ("m·w", "m·w·v"))
    best = {name: min(_median(records, name, r["alpha"], "error") for r in records)
            for name in DEPTHS}  # fmt: skip
    dead = _of(records, "m·w·v", top)
    alive = statistics.median(r["alive_truth"] for r in dead)
    fit = max((r["from_fit"] for r in dead if "from_fit" in r), default=float("nan"))
    return [
        (
            "|x − x*| of m·w after the decay is switched off",
            f"{shallow:.1e} for α = {top:g}, {best['m·w']:.1e} at best over the α",
        ),
        ("|x − x*| of the linear m, whose geometry stays", f"{best['m']:.1e} at best"),
        ("|x − x*| of m·w·v", f"{best['m·w·v']:.1e} at best, {deep:.2g} for α = {top:g}"),
        (
            f"Why: true coordinates of m·w·v that can still move, α = {top:g}",
            f"{alive:g} (median over the seeds); the others have died under the decay, and the "
            f"living ones fit what they can, to {fit:.0e}",
        ),
    ]


def table(records: list[Record]) -> list[Record]:
    """Return a row for each model and alpha: medians over the seeds."""
    rows = []
    for model in DEPTHS:
        for alpha in dict.fromkeys(r["alpha"] for r in records):
            found = _of(records, model, alpha)
            errors = [r["error"] for r in found]
            row: Record = {
                "model": model,
                "α": alpha,
                "|x − x*| at the end": statistics.median(errors),
                "range over the seeds": f"{min(errors):.2g} to {max(errors):.2g}",
                "|x|₁ / |x|₂": statistics.median(r["ratio"] for r in found),
                "alive at the switch": f"{statistics.median(r['alive'] for r in found):g}",
                "true ones among them": f"{statistics.median(r['alive_truth'] for r in found):g}",
            }
            for key, label in (
                ("predicted", "predicted end: |x̂ − x*|"),
                ("gap", "trained end to predicted end"),
                ("from_fit", "trained end to the best fit of the living"),
            ):
                values = [r[key] for r in found if key in r]
                row[label] = statistics.median(values) if values else None
            rows.append(row)
    return rows


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw error and ratio of the three models."""
    from ._figures import draw_figure

    return draw_figure(records, trajectory)


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the interactive versions."""
    from ._figures import make_charts

    return make_charts(records, trajectory)
