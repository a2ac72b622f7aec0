"""Runs of the network experiments, and how they are compared."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ...framework.contract import Config, Part, Record, Recorder
from ...framework.trunks import Timeline, branch_points
from ._training import Session, device, train

__all__ = [
    "PlannedRun",
    "Study",
    "SwitchConfig",
    "absorbed",
    "compared",
    "diverged",
    "interval",
    "plans",
    "run_plans",
    "timeline",
    "values",
]

Array = NDArray[np.float64]


class SwitchConfig(Config):
    """What a study of switching off has to say, whatever is trained.

    Attributes
    ----------
    steps, off, every : int
        Steps in all, the step of switching off, steps between measurements.
    decays : tuple of float
        Each is kept, switched off, halved, and replaced by the constant of equal budget.
    times : tuple of int
        Further steps at which the first decay is switched off.
    loops : bool
        Also let the ratio decide about the first decay.
    target : float
        The ratio that the closed loop holds.
    seeds : tuple of int
        Of the start and of the order of the data.
    """

    steps: int = Field(default=39_000, ge=2)
    off: int = Field(default=19_500, ge=1)
    every: int = Field(default=390, ge=1)
    decays: tuple[float, ...] = Field(default=(0.2, 0.02), min_length=1)
    times: tuple[int, ...] = ()
    loops: bool = False
    target: float = Field(default=4.0, gt=1)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        """Refuse a decay that would be switched off after the end."""
        if bad := [time for time in (self.off, *self.times) if not 0 < time < self.steps]:
            raise ValueError(f"a decay is switched off within the {self.steps} steps, not at {bad}")
        return self


@dataclass(frozen=True)
class PlannedRun:
    """The decay of one run, and what it is there to be compared with.

    Attributes
    ----------
    family : float
        The decay whose switching off is studied.
    kind : str
        "constant"; "off" at the step of the study; "half" of the decay; "budget", constant with
        the sum of lr x decay that "off" has; "none"; "time", off at another step; "hold" and
        "level", closed loops.
    rate : float
        The decay at the start.
    off : int or None
        The step from which it is 0.
    seed : int
    """

    family: float
    kind: str
    rate: float
    off: int | None
    seed: int

    @property
    def label(self) -> str:
        """What the page calls it."""
        if self.kind == "hold":
            return f"{self.family:g}, ratio held"
        if self.kind == "level":
            return f"{self.family:g}, off when level"
        return f"{self.rate:.3g}" + ("" if self.off is None else f", off at {self.off}")

    @property
    def key(self) -> str:
        """The name of the run's part."""
        off = "" if self.off is None else f"-off{self.off}"
        return f"{self.kind}-{self.rate:.6g}{off}-seed{self.seed}"

    def rates(self, steps: int) -> Array:
        """Return the decay of each step; of a closed loop nothing is known before."""
        if self.kind in ("hold", "level"):
            return np.zeros(steps)
        return np.where(np.arange(steps) < (steps if self.off is None else self.off), self.rate, 0)

    def schedule(self, target: float, window: int) -> Any:
        """Return the schedule that the scheduler follows."""
        import mirrorflow as mf
        from mirrorflow.weightdecay import HoldRatio, OffWhenLevel

        if self.kind == "hold":
            top = 4 * self.rate
            return HoldRatio(target, self.rate, gain=4 * self.rate, bounds=(0.0, top))
        if self.kind == "level":
            return OffWhenLevel(self.rate, window=window, tol=0.01)
        return mf.Constant(self.rate) if self.off is None else mf.SwitchOff(self.rate, at=self.off)


def plans(
    decays: Sequence[float],
    off: int,
    weights: Array,
    seeds: Sequence[int],
    times: Sequence[int] = (),
    loops: bool = False,
) -> list[PlannedRun]:
    """List the runs: for each decay those of the paper, and the constant one of equal budget.

    ``weights`` is what a decay of 1 in each step adds to the budget (`absorbed`). The first decay
    is also switched off at the other ``times``, and by the closed loops; one run has no decay.
    """
    share = float(weights[:off].sum() / weights.sum())
    found = []
    for seed in seeds:
        for rate in decays:
            found += [
                PlannedRun(rate, "constant", rate, None, seed),
                PlannedRun(rate, "off", rate, off, seed),
                PlannedRun(rate, "half", rate / 2, None, seed),
                PlannedRun(rate, "budget", rate * share, None, seed),
            ]
        found.append(PlannedRun(decays[0], "none", 0.0, None, seed))
        found += [PlannedRun(decays[0], "time", decays[0], time, seed) for time in times]
        if loops:
            found += [
                PlannedRun(decays[0], kind, decays[0], None, seed) for kind in ("hold", "level")
            ]
    return found


def absorbed(lrs: Array, momentum: float = 0.0) -> Array:
    """Return what a decay of 1 in each step has added to -a_T at the end of the run.

    That is lr; L2 that goes through a momentum buffer acts in all later steps, in the s-th after
    with momentum^s, as far as the run goes: lr (1 - momentum^(T - t)) / (1 - momentum) for a
    constant lr.
    """
    later = np.cumsum(momentum ** np.arange(len(lrs), dtype=np.float64))[::-1]
    return lrs * later


def timeline(plan: PlannedRun, steps: int, shared: Mapping[str, Any]) -> Timeline:
    """Return what names the states of a run; ``shared`` is all that decides it besides the plan."""
    loop = {"loop": plan.kind, "rate": plan.rate} if plan.kind in ("hold", "level") else {}
    return Timeline({**shared, **loop, "seed": plan.seed}, plan.rates(steps))


def run_plans(
    recorder: Recorder,
    chosen: Mapping[str, PlannedRun],
    lines: Mapping[str, Timeline],
    build: Callable[[PlannedRun], Session],
    data: str,
    finish: Callable[[PlannedRun, Session, str], Part] | None = None,
) -> list[Record]:
    """Train every run into a part of its own; runs that begin alike share their beginning.

    ``finish`` makes the part of a trained session; by default it is one record of its end.
    """
    recorder.device = device()
    keep, records = branch_points(lines), []
    steps, done = sum(line.steps for line in lines.values()), 0
    for key, plan in chosen.items():

        def watch(step: int, found: Mapping[str, float], key: str = key, base: int = done) -> None:
            if found:
                recorder.log(step=step, run=key, **found)
            recorder.progress(base + step, steps, key)

        def compute(plan: PlannedRun = plan, key: str = key, watch: Any = watch) -> Part:
            line = lines[key]
            session = train(
                lambda: build(plan), line, recorder.checkpoints, keep=keep[key], watch=watch
            )
            return (finish or _part)(plan, session, data)

        records += recorder.part(key, compute).records
        done += lines[key].steps
    return records


def _part(plan: PlannedRun, session: Session, data: str) -> Part:
    """Return the record of a finished run, and its curves."""
    curves = {name: np.array(found) for name, found in session.curves.items()}
    ends = {n: float(c[-1]) for n, c in curves.items() if not n.endswith(".step") and n != "rate"}
    record = {
        "run": plan.label,
        "part": plan.key,
        "kind": plan.kind,
        "family": plan.family,
        "decay": plan.rate,
        "off": plan.off,
        "seed": plan.seed,
        "budget": 0.0 - ends["a"],
        "diverged": diverged(curves),
    }
    return Part([record | ends], curves, data)


def diverged(curves: Mapping[str, Array]) -> bool:
    """Whether a run ends with a higher loss than it began with: nothing follows from it."""
    return bool(curves["loss"][-1] > curves["loss"][0])


# --- Comparing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """What the page has to know of an experiment to compare its runs.

    Attributes
    ----------
    metric, label : str
        The name in the records, and on the axes.
    better : int
        1 if more is better, -1 if less is.
    paper : mapping of (rank of the family, kind) to str
        The numbers of the paper, with its decay.
    setting : str
        What the paper has trained, and how.
    """

    metric: str
    label: str
    better: int
    paper: Mapping[tuple[int, str], str]
    setting: str = ""


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and half its 95% interval (Student's t); 0 for one seed."""
    from scipy.stats import t

    count = len(numbers)
    if count < 2:
        return float(numbers[0]), 0.0
    width = float(t.ppf(0.975, count - 1)) * statistics.stdev(numbers) / count**0.5
    return statistics.fmean(numbers), width


def values(records: Sequence[Record], key: str, **where: Any) -> list[float]:
    """Return a number of the records that fit, by seed."""
    fit = [r for r in records if all(r[name] == value for name, value in where.items())]
    return [r[key] for r in sorted(fit, key=lambda r: r["seed"])]


def compared(study: Study, records: Sequence[Record]) -> list[Record]:
    """Say of each family by how much switching off is better than what it is compared with.

    Where a run has diverged the difference says nothing about the decay, and is marked so.

    Differences are taken seed by seed, as the runs of a seed share start and data.
    """
    found = []
    for family in dict.fromkeys(r["family"] for r in records):
        off = values(records, study.metric, family=family, kind="off")
        for kind in ("constant", "half", "budget", "none"):
            where = {"kind": kind} if kind == "none" else {"kind": kind, "family": family}
            other = values(records, study.metric, **where)
            if not other:
                continue
            gains = [study.better * (a - b) for a, b in zip(off, other, strict=True)]
            mean, width = interval(gains)
            verdict = {"holds": mean > 0, "clear": mean > width > 0, "seeds": len(gains)}
            pair = [{"family": family, "kind": "off"}, where]
            lost = any(any(values(records, "diverged", **one)) for one in pair)
            found.append(
                {
                    "family": family,
                    "against": kind,
                    "gain": mean,
                    "width": width,
                    "diverged": lost,
                    **verdict,
                }
            )
    return found
