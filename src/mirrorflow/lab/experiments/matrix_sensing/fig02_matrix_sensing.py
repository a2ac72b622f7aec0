"""Matrix sensing: decay that is switched off leaves U U^T at the truth, and X where it was."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from ...framework import contract
from ...framework.contract import Part, Record, Recorder, Trajectory, Verdict, checksum
from ...framework.drawing import middle
from ._problem import METRICS, Curves, Scenario, SensingProblem, train_factor, train_linear

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure

NAME = "fig02_matrix_sensing"
TITLE = "Matrix sensing: switch weight decay off and the low-rank truth is recovered"
PAPER = "Figures 2, 4, 5 and 6 (Section 5 and Appendix C)"
MODELS = {"factor": "U Uᵀ", "linear": "X"}


class Config(contract.Config):
    """The setting of Appendix C; times are t = eta * step.

    Attributes
    ----------
    n, r, m : int
        Size and rank of the truth, number of measurements. The paper does not give m.
    eta, steps, start : float, int, float
        Learning rate, steps, and U0 = start * I, so that beta = start^2 (errata 6).
    low, high, switch : float, float, int
        The scenarios: no decay, ``low``, ``high``, and ``high`` off from step ``switch`` on.
    linear_penalty : str
        The penalty on X: the nuclear norm, or the entrywise L1 norm that the paper's text names.
    seeds : tuple of int
        One problem and one band each.
    every : int
        Steps between recorded points.
    grid_alphas, grid_switches, grid_seeds
        Decay and switch-off steps of the map, for the first ``grid_seeds`` seeds.
    commuting_m, commuting_time : int, float
        Measurements and end of time of the panel with commuting sensing matrices.
    """

    n: int = Field(default=50, ge=2)
    r: int = Field(default=5, ge=1)
    m: int = Field(default=500, ge=1)
    eta: float = Field(default=0.25, gt=0)
    steps: int = Field(default=5000, ge=1)
    start: float = Field(default=0.1, gt=0)
    low: float = Field(default=0.01, ge=0)
    high: float = Field(default=0.02, ge=0)
    switch: int = Field(default=2500, ge=0)
    linear_penalty: Literal["nuclear", "l1"] = "nuclear"
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    every: int = Field(default=50, ge=1)
    grid_alphas: tuple[float, ...] = (0.005, 0.01, 0.02, 0.04)
    grid_switches: tuple[int, ...] = (500, 1500, 2500, 3500, 4500)
    grid_seeds: int = Field(default=1, ge=0)
    commuting_m: int = Field(default=20, ge=1)
    commuting_time: float = Field(default=1e6, gt=1)

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (n = 6, 200 steps), cpu (three seeds), or full (ten seeds, a finer map)."""
        if name == "smoke":
            return cls(
                n=6, r=1, m=20, steps=200, switch=100, every=10, seeds=(0, 1), commuting_m=3,
                grid_alphas=(0.02, 0.04), grid_switches=(50, 150), commuting_time=1e2,
            )  # fmt: skip
        if name == "full":
            return cls(
                seeds=tuple(range(10)), every=25, grid_seeds=5,
                grid_alphas=(0.0025, 0.005, 0.01, 0.02, 0.04, 0.08),
                grid_switches=tuple(range(250, 5000, 250)),
            )  # fmt: skip
        return cls()

    def scenarios(self) -> dict[str, Scenario]:
        """Name the four scenarios, in the order of the figures."""
        return {
            "no decay": Scenario(0.0),
            f"α = {self.low:g}": Scenario(self.low),
            f"α = {self.high:g}": Scenario(self.high),
            f"α = {self.high:g}, then off": Scenario(self.high, self.switch),
        }

    def interpolating(self) -> list[int]:
        """Return the scenarios that end without decay: only these have an end point in R_a."""
        return [i for i, s in enumerate(self.scenarios().values()) if s.rate(self.steps - 1) == 0]


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Train all scenarios of each seed, then the map, then the commuting variant."""
    tasks: list[tuple[str, Any]] = [
        (f"seed{seed}", lambda tick, s=seed: _seed(config, s, tick)) for seed in config.seeds
    ]
    if config.grid_alphas and config.grid_switches:
        tasks += [
            (f"map{seed}", lambda tick, s=seed: _map(config, s, tick))
            for seed in config.seeds[: config.grid_seeds]
        ]
    tasks.append(("commuting", lambda tick: _commuting(config, config.seeds[0])))
    records: list[Record] = []
    for number, (key, compute) in enumerate(tasks):
        tick = _tick(recorder, config, number, len(tasks), key)
        records += recorder.part(key, lambda c=compute, t=tick: c(t)).records
        recorder.progress((number + 1) * config.steps, len(tasks) * config.steps, key)
    return records


def _tick(recorder: Recorder, config: Config, number: int, parts: int, key: str) -> Any:
    """Log and tell the progress at a recorded step."""

    def tick(step: int, metrics: dict[str, Any]) -> None:
        recorder.log(step=step, t=config.eta * step, **{k: v.tolist() for k, v in metrics.items()})
        recorder.progress(number * config.steps + step, parts * config.steps, key)

    return tick


def _seed(config: Config, seed: int, tick: Any) -> Part:
    """Train both models in the four scenarios, and solve for the entropy's minimizers."""
    problem = SensingProblem.random(seed, config.n, config.r, config.m)
    scenarios = list(config.scenarios().values())
    clock = (config.eta, config.steps, config.start, config.every)
    curves = {
        "factor": train_factor(problem, scenarios, *clock, tick),
        "linear": train_linear(problem, scenarios, *clock, config.linear_penalty),
    }
    records = [r for model, c in curves.items() for r in _ends(config, seed, model, c)]
    arrays = {f"{k}/{name}": c.metrics[name] for k, c in curves.items() for name in METRICS}
    for i in config.interpolating():
        a = scenarios[i].accumulated(config.eta, config.steps)
        X, status = _minimizer(problem, config.start, a)
        records[i] |= _prediction(problem, X, curves["factor"].X[i]) | {"status": status}
    arrays["t"] = (config.eta * curves["factor"].steps).astype(np.float64)
    return Part(records, arrays, checksum(problem.H, problem.truth))


def _ends(config: Config, seed: int, model: str, curves: Curves) -> list[Record]:
    """Return where each scenario ended."""
    return [
        {
            "panel": "end",
            "seed": seed,
            "model": model,
            "scenario": name,
            "alpha": scenario.alpha,
            "a": scenario.accumulated(config.eta, config.steps),
            **{metric: float(curves.metrics[metric][i, -1]) for metric in METRICS},
        }
        for i, (name, scenario) in enumerate(config.scenarios().items())
    ]


def _minimizer(problem: SensingProblem, start: float, a: float) -> tuple[Any, str]:
    """Minimize R_a subject to the measurements: the end point only if the A_i commute."""
    import torch

    import mirrorflow as mf

    U0 = start * torch.eye(problem.n, dtype=torch.float64)
    R = mf.legendre(mf.SymmetricFactor(), mf.WeightDecay(), U0)
    y = torch.from_numpy(problem.y)
    solution = mf.limit(R, torch.from_numpy(problem.sensing()), y, a)
    return solution.value.numpy(), solution.status.name


def _prediction(problem: SensingProblem, X: Any, trained: Any) -> Record:
    """Compare a minimizer of R_a with the truth and with the X that was trained."""
    return {
        "predicted": float(np.linalg.norm(X - problem.truth)),
        "gap": float(np.linalg.norm(X - trained) / np.linalg.norm(trained)),
    }


def _map(config: Config, seed: int, tick: Any) -> Part:
    """Train every alpha with every switch-off time; the part before the switch is shared."""
    problem = SensingProblem.random(seed, config.n, config.r, config.m)
    offs = sorted({*config.grid_switches, config.steps})
    cells = [Scenario(alpha, off) for alpha in config.grid_alphas for off in offs]
    clock = (config.eta, config.steps, config.start, config.steps)
    errors = train_factor(problem, cells, *clock, tick).metrics["error"][:, -1]
    records = [
        {
            "panel": "map",
            "seed": seed,
            "alpha": cell.alpha,
            "off": config.eta * (cell.off or 0),
            "a": cell.accumulated(config.eta, config.steps),
            "never": cell.off == config.steps,
            "error": float(error),
        }
        for cell, error in zip(cells, errors, strict=True)
    ]
    return Part(records, {}, checksum(problem.H, problem.truth))


def _commuting(config: Config, seed: int) -> Part:
    """Integrate the flow of commuting sensing matrices, where the end point is exact."""
    problem = SensingProblem.commuting(seed, config.n, config.r, config.commuting_m)
    records, arrays = [], {"t": np.geomspace(1, config.commuting_time, 61)}
    switch = config.eta * config.switch
    for number, off in enumerate((0.0, round(switch / 6), switch)):
        X, steps, status = _flow(config, problem, off, arrays["t"])
        a = 0.0 - config.high * off
        end, solved = _minimizer(problem, config.start, a)
        arrays[f"gap{number}"] = np.linalg.norm(X - end, axis=(1, 2)) / np.linalg.norm(end)
        records.append(
            {
                "panel": "commuting",
                "seed": seed,
                "off": off,
                "a": a,
                **_prediction(problem, end, X[-1]),
                "steps": steps,
                "flow": status,
                "status": solved,
            }
        )
    return Part(records, arrays, checksum(problem.H, problem.truth))


def _flow(config: Config, problem: SensingProblem, off: float, times: Any) -> tuple[Any, int, str]:
    """Integrate dU = -(grad f(X) + alpha_t) U dt in its dual numbers; give X at the times."""
    import torch

    import mirrorflow as mf

    loss = mf.LeastSquares(torch.from_numpy(problem.sensing()), torch.from_numpy(problem.y))
    U0 = config.start * torch.eye(problem.n, dtype=torch.float64)
    schedule = mf.SwitchOff(config.high, off) if off else mf.Constant(0.0)
    solution = mf.flow(
        loss, mf.SymmetricFactor(), mf.WeightDecay(), U0, schedule, float(times[-1]),
        view="mirror", save_at=times, rtol=1e-9,
    )  # fmt: skip
    assert solution.path is not None
    return solution.path.x.numpy(), solution.stats.steps, solution.status.name


# --- What the page shows of it --------------------------------------------------------------------


def verdicts(records: list[Record]) -> list[Verdict]:
    """Say what the run shows, with its numbers."""
    ends = [_median(records, "factor", name)["error"] for name in _scenarios(records)]
    linear = [_median(records, "linear", name)["error"] for name in _scenarios(records)]
    commuting = max(r["gap"] for r in records if r["panel"] == "commuting")
    return [
        (
            f"|X − X*| of U Uᵀ, decay switched off during training{middle(records)}",
            f"{ends[-1]:.1e}; {ends[0]:.1e} without decay, {min(ends[1:-1]):.1e} with decay kept",
        ),
        (
            "|X − X*| of the linear model X, whose penalty is switched off as well",
            f"{linear[-1]:.1e}; {linear[0]:.1e} without it, {min(linear[1:-1]):.1e} with it kept",
        ),
        (
            "Commuting sensing matrices: training ends at the minimizer of Rₐ, which limit "
            "computes without training; relative distance",
            f"{commuting:.0e} at most",
        ),
        (
            "The paper's random matrices do not commute: distance from that minimizer",
            _gaps(records),
        ),
    ]


def _gaps(records: list[Record]) -> str:
    gaps = [r["gap"] for r in records if r["panel"] == "end" and "gap" in r]
    return f"{100 * min(gaps):.2g} to {100 * max(gaps):.2g} %" if gaps else "an unknown distance"


def _scenarios(records: list[Record]) -> list[str]:
    """Name the scenarios of the records, in their order."""
    return list(dict.fromkeys(r["scenario"] for r in records if r["panel"] == "end"))


def _of(records: list[Record], model: str, scenario: str) -> list[Record]:
    return [r for r in records if r.get("model") == model and r.get("scenario") == scenario]


def _median(records: list[Record], model: str, scenario: str) -> dict[str, float]:
    """Return the medians over the seeds of the numbers that the records hold."""
    found = _of(records, model, scenario)
    keys = [k for k in (*METRICS, "predicted", "gap") if k in found[0]]
    return {key: statistics.median(r[key] for r in found) for key in keys}


def table(records: list[Record]) -> list[Record]:
    """Return a row for each model and scenario: medians over the seeds, and the range."""
    rows = []
    for model, label in MODELS.items():
        for name in _scenarios(records):
            middle, found = _median(records, model, name), _of(records, model, name)
            errors = [r["error"] for r in found]
            rows.append(
                {
                    "model": label,
                    "decay": name,
                    "a at the end": found[0]["a"],
                    "|X − X*|": middle["error"],
                    "range over the seeds": _range(errors),
                    "|X − X*|²": statistics.median(e * e for e in errors),
                    "training error": middle["train"],
                    "nuclear norm": middle["nuclear"],
                    "minimizer of Rₐ: |X̂ − X*|": middle.get("predicted"),
                    "trained end to that minimizer": middle.get("gap"),
                }
            )
    return rows


def _range(errors: list[float]) -> str:
    """Write the least and the greatest, or the only one."""
    return f"{min(errors):.2g} to {max(errors):.2g}" if len(errors) > 1 else "one seed"


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw both models' curves, the map of switch-off times, and the commuting variant."""
    from ._figures import draw_figure

    return draw_figure(records, trajectory)


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the interactive versions of the panels."""
    from ._charts import make_charts

    return make_charts(records, trajectory)
