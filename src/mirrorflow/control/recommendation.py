"""A schedule for a goal, or none, by what the stored experiments show and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from ..optim import HadamardFactors
from ..schedule import Constant, Schedule, SwitchOff, schedule_to_dict
from ..spectrum import SpectralTracker
from ..weightdecay import coupling
from ..weightdecay._checks import inner, one_of
from ..weightdecay._group_state import own_decay
from ..weightdecay._laws import law_of
from ..weightdecay.conventions import lr_of
from ..weightdecay.coupling import COUNTED, COUPLINGS
from ..weightdecay.feedback import as_float, number, whole
from ..weightdecay.outlook import wrapped
from ..weightdecay.preview import group_ahead
from ..weightdecay.units import as_scheduler, check_owner, listed_rates
from ._evidence import (
    Arm,
    Curve,
    CutArm,
    Recovery,
    RecoveryArm,
    Study,
    curves,
    falls,
    recoveries,
    studies,
)

__all__ = ["GOALS", "Recommendation", "recommend"]

GOALS = ("loss", "rank", "sparsity")
_SEEDS = 3  # fewer show nothing that a schedule could rest on
_CLOSE = 0.01  # the error at which a solution counts as recovered
_NO_CURVE = (
    "how many ranks can then be cut at which loss: the stored curves (beyond_compression) are of "
    "attention; the ratio of nuclear to Frobenius norm stands in for it"
)
_NEAR = 0.125  # a part of the ranks that is farther from all that are stored is not answered
_REFUSED_OUTSIDE = ("scaled", "averaged")  # by WeightDecayScheduler(decoupled=True)
_NOTHING = "no stored experiment trains a model whose products are of this kind"


@dataclass(frozen=True)
class Recommendation:
    """A schedule of weight decay for a goal, or none, and what that rests on.

    Parameters
    ----------
    goal : str
        What it is for.
    schedule : Schedule or None
        For `WeightDecayScheduler`, or None: no decay, ``weight_decay=0``.
    a : float
        -sum of lr x decay that the schedule comes to in the run, <= 0.
    reason : str
        Why, with numbers.
    numbers : tuple of Arm or RecoveryArm
        The stored runs of the study that is followed.
    evidence : tuple of str
        The folders of results that these are from; empty where nothing is stored.
    unknown : tuple of str
        What the evidence does not show.
    """

    goal: str
    schedule: Schedule | None
    a: float
    reason: str
    numbers: tuple[Arm | RecoveryArm, ...] = ()
    evidence: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the answer, the reason, what it rests on, and what is not known."""
        answer = "no decay" if self.schedule is None else f"{self.schedule}, a = {self.a:.3g}"
        rests = ", ".join(self.evidence) or "nothing that is stored"
        lines = [f"For {self.goal}: {answer}.", self.reason, f"It rests on {rests}."]
        return wrapped([*lines, *(f"Not known: {what}." for what in self.unknown)])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; what is NaN is None, as JSON has no NaN."""
        schedule = None if self.schedule is None else schedule_to_dict(self.schedule)
        rows = [asdict(arm) for arm in self.numbers]
        for row in rows:
            row.update({k: None for k, v in row.items() if isinstance(v, float) and v != v})
        return {**asdict(self), "schedule": schedule, "numbers": rows}


def recommend(
    model: torch.nn.Module,
    optimizer: Any,
    lr_scheduler: Any = None,
    steps: int | None = None,
    goal: str = "loss",
    *,
    price: float = 0.01,
    kept: float = 0.5,
) -> Recommendation:
    """Return the schedule that the stored experiments support for a goal, or none.

    Nothing is trained. The products that train (LoRA's B A, attention's Q K^T, m * w of
    `mirrorflow.overparametrize`) decide which experiments count. A schedule comes to the a
    of the stored run that it follows, under this learning rate, and is switched off at the same
    part of the run.

    Parameters
    ----------
    model : torch.nn.Module
        What trains.
    optimizer : torch.optim.Optimizer
        Its optimizer; the group with most of the model's weights counts: its learning rate, and
        for SGD its momentum, dampening and Nesterov's.
    lr_scheduler : LRScheduler or iterable of float, optional
        Its learning-rate scheduler, or the learning rate of each step, as for `preview`; without
        it the learning rate stays as it is.
    steps : int
        The optimizer steps of the run, >= 1.
    goal : {"loss", "rank", "sparsity"}
        The validation loss; few ranks, by the loss that is left when others are cut (attention),
        or by a low ratio of nuclear to Frobenius norm (LoRA); few non-zero entries.
    price : float
        For "rank", a part of the loss of no decay, >= 0, 95% intervals included: what truncation
        may cost (attention), or how far a stored run may end above no decay (LoRA).
    kept : float
        For "rank" of attention: the part of each head's ranks that truncation is to keep, in
        (0, 1). The nearest one that is stored counts.

    Raises
    ------
    TypeError, ValueError
        If the goal is none of these, ``steps`` is missing, ``price`` is negative, or
        ``kept`` lies outside of (0, 1); if the learning-rate scheduler belongs to another
        optimizer; if the answer is a schedule, and what decay comes to is not known under this
        optimizer, since it makes its own step size (``lr=None``), say.

    Examples
    --------
    >>> model = torch.nn.MultiheadAttention(16, 4)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> print(recommend(model, optimizer, steps=1500).schedule)
    None
    >>> recommend(model, optimizer, steps=1500, goal="rank", kept=0.5).schedule.at
    900.0
    """
    one_of("goal", goal, GOALS)
    if steps is None:
        raise ValueError(
            "steps must be a whole number, got None. Give the optimizer steps of the run"
        )
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {model!r}. Give the model that the optimizer "
            "trains"
        )
    run = _Run(model, inner(optimizer), lr_scheduler, whole("steps", steps))
    number("price", price, 0.0)
    if not 0 < as_float("kept", kept) < 1:
        raise ValueError(f"kept must lie in (0, 1), got {kept}. Give a part of the ranks.")
    if goal == "loss":
        return _for_loss(run)
    return _for_rank(run, price, kept) if goal == "rank" else _for_sparsity(run)


class _Run:
    """The run that is asked about.

    Parameters
    ----------
    model, optimizer, lr_scheduler, steps
        As for `recommend`.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: Optimizer, lr_scheduler: Any, steps: int
    ) -> None:
        self.optimizer, self.steps = optimizer, steps
        self._lr = _checked_lr(lr_scheduler, optimizer, steps)
        self._index = _largest_group(model, optimizer)
        self.group = optimizer.param_groups[self._index]
        self.product = _product_of(model)
        self._coupling = coupling(optimizer, self.group)
        self.counted = self._coupling in COUNTED
        self._kind = self._coupling if self.counted else "decoupled"  # by decoupled=True
        self.law = law_of(optimizer, self.group)

    @property
    def name(self) -> str:
        """The class of the optimizer."""
        return type(self.optimizer).__name__

    def schedule(self, off: float, a: float) -> Schedule | None:
        """Return the schedule that comes to a; None if a step would have to overshoot 0.

        Raises
        ------
        ValueError
            If no schedule is known to come to it under this optimizer.
        """
        self._check_countable()
        at = max(1, round(off * self.steps))
        one = SwitchOff(1.0, at=at) if off < 1 else Constant(1.0)
        sums = self._sums(one)  # a is linear in the rate
        each, steepest = sums[-1], max(b - c for b, c in pairwise((0.0, *sums)))
        if each == 0 or a / each * steepest >= 1:
            return None
        rate = float(f"{a / each:.4g}")
        return SwitchOff(rate, at=at) if off < 1 else Constant(rate)

    def absorbed(self, schedule: Schedule) -> float:
        """Return a of a schedule."""
        return self._sums(schedule)[-1]

    @property
    def rule(self) -> str:
        """A sentence on the rule without which a scheduler leaves the group alone; or none."""
        if "weight_decay" not in self.group or own_decay(self.group) != 0:
            return ""
        rule = f"groups=[({self._index}, schedule)]"
        return (
            f" Its parameter group, {self._index}, has weight_decay 0, and stays without decay "
            f"unless a rule of WeightDecayScheduler names it: {rule}."
        )

    def _check_countable(self) -> None:
        """Raise unless a sum of lr x decay describes the optimizer's decay, or one from outside."""
        if self._kind != "fixed" and math.isnan(lr_of(self.group)):
            raise ValueError(
                "the learning rate must be a number for a schedule that comes to a given a, got "
                f"lr=None: {self.name} makes its own step size. Make it with one (transformers' "
                "Adafactor: lr=1e-3, relative_step=False, scale_parameter=False), or take AdamW"
            )
        if self._coupling in _REFUSED_OUTSIDE:
            raise ValueError(
                "the optimizer must decay by lr x decay, or let decay act from outside, for a "
                f"schedule that comes to a given a, got {self.name}: "
                f"{COUPLINGS[self._coupling]}. Take another, such as AdamW"
            )

    def _sums(self, schedule: Schedule) -> list[float]:
        """Return a of a schedule after each step, as `preview` counts it."""
        return group_ahead(self.optimizer, self._index, self._kind, schedule, self.steps, self._lr)

    def caveats(self, study: Study | Recovery) -> tuple[str, ...]:
        """Return how the run differs from what is stored."""
        gradient = "full-batch gradient descent"
        theirs = gradient if isinstance(study, Recovery) else study.optimizer
        found = [f"whether it holds beyond {study.title}"]
        if theirs != self.name:
            found.append(f"whether it holds under {self.name}: the stored runs are of {theirs}")
        if not self.counted:
            found.append(
                f"what decay comes to within {self.name}: the schedule is for decoupled=True"
            )
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in self.group["params"]):
            found.append("what rounding lets through in half precision: mf.preview tells")
        return tuple(found)


def _checked_lr(lr: Any, optimizer: Optimizer, steps: int) -> Any:
    """Return the learning-rate scheduler, if it is of this optimizer, or a list of rates."""
    if (scheduler := as_scheduler(lr)) is not None:
        check_owner(scheduler, optimizer)
        return scheduler
    return None if lr is None else listed_rates("lr_scheduler", lr, steps)


def _largest_group(model: torch.nn.Module, optimizer: Optimizer) -> int:
    """Return the place of the group with most of the model's weights that train."""
    own = {id(p) for p in model.parameters() if p.requires_grad}

    def size(group: Mapping[str, Any]) -> tuple[int, int]:
        sizes = [(p.numel() if id(p) in own else 0, p.numel()) for p in group["params"]]
        # By all it holds where a wrapper has put other tensors in the place of the model's
        return sum(ours for ours, _ in sizes), sum(whole for _, whole in sizes)

    groups = [size(group) for group in optimizer.param_groups]
    return groups.index(max(groups))


def _product_of(model: torch.nn.Module) -> str:
    """Return the kind of the products that train: "m*w", "lora", "attention" or "none"."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            steps = [step for steps in module.parametrizations.values() for step in steps]  # pyright: ignore
            if any(isinstance(step, HadamardFactors) for step in steps):
                return "m*w"
    try:
        kinds = {pair.kind for pair in SpectralTracker(model).pairs}
    except ValueError:  # nothing to measure
        return "none"
    return "lora" if "lora" in kinds else "attention" if "attention" in kinds else "none"


def _for_loss(run: _Run) -> Recommendation:
    """Return no decay: in no stored study did it end clearly below training without."""
    if not (found := studies(run.product)):
        return _nothing("loss", run)
    first = next((study for study in found if study.optimizer == run.name), found[0])
    best = min((arm for arm in first.arms if arm.a), key=lambda arm: arm.loss)
    reason = (
        f"No decay ended at a loss of {first.none.loss:.4g} in {first.title} ({first.optimizer}, "
        f"{first.seeds} seeds). The best of {len(first.arms) - 1} runs with decay is {best.run}, "
        f"a = {best.a:.2g}: {best.loss:.4g}, {best.gap:+.2g} ± {best.interval:.1g}, which is "
        f"{'worse' if best.gap > best.interval else 'no difference'}."
    )
    names = tuple(study.result for study in found)
    return Recommendation("loss", None, 0.0, reason, first.arms, names, run.caveats(first))


def _for_rank(run: _Run, price: float, kept: float) -> Recommendation:
    """Return the schedule of the stored run of lowest ratio that cost no more than the price."""
    if stored := curves(run.product):
        return _for_cut(run, price, kept, stored)
    measured = (study for study in studies(run.product) if not math.isnan(study.none.ratio))
    able = [study for study in measured if study.seeds >= _SEEDS]
    if not able:
        return _nothing("rank", run)
    study = able[0]
    able = [arm for arm in study.arms if arm.dearest <= price * study.none.loss]
    chosen = min(able, key=lambda arm: arm.ratio, default=study.none)
    names, unknown = (study.result,), (_NO_CURVE, *run.caveats(study))
    if chosen.a == 0:
        reason = (
            f"In {study.title} every run with decay ended more than {100 * price:.3g}% above the "
            f"loss of no decay, {study.none.loss:.4g}, or may have, by its interval."
        )
        return Recommendation("rank", None, 0.0, reason, study.arms, names, unknown)
    reason = (
        f"In {study.title}, decay of a = {chosen.a:.2g} ({_when(chosen.off)}; {study.optimizer}, "
        f"{study.seeds} seeds) ended at a ratio of {chosen.ratio:.3g}, no decay at "
        f"{study.none.ratio:.3g}. It cost {chosen.gap:+.2g} ± {chosen.interval:.1g} of a loss of "
        f"{study.none.loss:.4g}; of the stored runs within {100 * price:.3g}% of that, this one "
        "has the lowest ratio."
    )
    return _following("rank", run, chosen, (reason, study.arms, names, unknown))


def _for_cut(run: _Run, price: float, kept: float, found: tuple[Curve, ...]) -> Recommendation:
    """Return the least decay after which a truncation costs no more than the price.

    Where several curves are stored, the one that asks for the most decay is followed, of those on
    which some decay is enough.
    """
    answers = [(curve, _least(curve, kept, price)) for curve in found]
    answers.sort(key=lambda answer: math.inf if answer[1] is None else answer[1].a)
    curve, chosen = answers[0]
    reason = " ".join(_why(one, kept, price, arm) for one, arm in answers)
    together = replace(curve, title=" and ".join(one.title for one, _ in answers))
    names, unknown = tuple(one.result for one, _ in answers), run.caveats(together)
    if abs(curve.kept[curve.nearest(kept)] - kept) > _NEAR:
        parts = ", ".join(f"{stored:g}" for stored in curve.kept)
        unknown = (f"what keeping {kept:g} of the ranks costs: {parts} are stored", *unknown)
    if chosen is None or chosen.a == 0:
        return Recommendation("rank", None, 0.0, reason, curve.arms, names, unknown)
    for fall in falls(run.product, run.name):
        names = (*names, fall.result)
        reason += (
            f" In a model that was trained before less may happen: in {fall.title} "
            f"a = {fall.a:.2g} lowered the ratio of nuclear to Frobenius norm by {fall.fall:.2g} "
            f"± {fall.interval:.1g}."
        )
    return _following("rank", run, chosen, (reason, curve.arms, names, unknown))


def _least(curve: Curve, kept: float, price: float) -> CutArm | None:
    """Return the run of least decay whose truncation costs at most the price, if there is one.

    Runs that are clearly farther above no decay than that before they are truncated do not count.
    """
    place, limit = curve.nearest(kept), price * curve.none.loss
    able = [
        arm
        for arm in curve.arms
        if arm.cost[place] + arm.spread[place] <= limit and arm.gap - arm.interval <= limit
    ]
    return max(able, key=lambda arm: (arm.a, -arm.cost[place]), default=None)


def _why(curve: Curve, kept: float, price: float, chosen: CutArm | None) -> str:
    """Say what a truncation costs without decay, and after the least decay that is enough."""
    place = curve.nearest(kept)
    within = f"{100 * price:.3g}% of the loss of no decay, {curve.none.loss:.4g}"
    begun = (
        f"In {curve.title} ({curve.optimizer}, {curve.seeds} seeds), truncation to "
        f"{curve.kept[place]:g} of each head's ranks cost {_cost(curve.none, place)} without decay"
    )
    if chosen is None:
        low = min(curve.arms, key=lambda arm: arm.cost[place])
        return (
            f"{begun}, and at least {_cost(low, place)} with it, at a = {low.a:.2g} "
            f"({_when(low.off)}): in no stored run that is not clearly above no decay before it "
            f"does it cost at most {within}, interval included."
        )
    if chosen.a == 0:
        return f"{begun}. That is at most {within}, interval included, and needs no decay."
    return (
        f"{begun}, and {_cost(chosen, place)} at a = {chosen.a:.2g} ({_when(chosen.off)}), the "
        f"least decay after which it costs at most {within}, interval included. Before it the loss "
        f"was {chosen.gap:+.2g} ± {chosen.interval:.1g} from the loss without decay."
    )


def _cost(arm: CutArm, place: int) -> str:
    """Write what a truncation costs, with its interval."""
    return f"{arm.cost[place]:.2g} ± {arm.spread[place]:.1g}"


def _for_sparsity(run: _Run) -> Recommendation:
    """Return decay that is switched off for m * w under gradient descent, and none for others."""
    if run.product != "m*w":
        reason = (
            "The weights are not products m * w, so that nothing stores a preference for sparse "
            "ones: weight decay itself prefers short solutions. "
            "mirrorflow.overparametrize makes products of weights."
        )
        unknown = ("whether decay makes plain weights sparse: no stored run tries it",)
        return Recommendation("sparsity", None, 0.0, reason, (), (), unknown)
    (found,) = recoveries("m*w")
    if run.law.name != "gradient flow":
        reason = (
            f"Under {run.name} the law is {run.law.name}: {run.law.stores}. This is derived, and "
            "no stored run shows otherwise. SGD, or mirrorflow.MirrorAdam, stores L1."
        )
        unknown = (f"what {run.name} recovers: the stored runs are of gradient descent",)
        return Recommendation("sparsity", None, 0.0, reason, (), (), unknown)
    chosen = max((arm for arm in found.arms if arm.error <= _CLOSE), key=lambda arm: arm.a)
    errors = ", ".join(f"{arm.error:.2g} at a = {arm.a:g}" for arm in found.arms)
    reason = (
        f"In {found.title}, x = m * w with decay that was off after half of the run ended at an "
        f"error of {errors} ({found.seeds} problems): a = {chosen.a:g} is the least of these that "
        "recovers the truth."
    )
    return _following(
        "sparsity", run, chosen, (reason, found.arms, (found.result,), run.caveats(found))
    )


def _following(
    goal: str,
    run: _Run,
    chosen: Arm | RecoveryArm,
    because: tuple[str, Sequence[Arm] | Sequence[RecoveryArm], tuple[str, ...], tuple[str, ...]],
) -> Recommendation:
    """Return the schedule that does in this run what was done in a stored one."""
    reason, arms, names, unknown = because
    schedule = run.schedule(chosen.off, chosen.a)
    if schedule is None:
        reason += (
            f" This run cannot come to it: in {run.steps:,} steps of its learning rate one step "
            "would have to shrink weights by all they are."
        )
        return Recommendation(goal, None, 0.0, reason, tuple(arms), names, unknown)
    a, reason = run.absorbed(schedule), reason + run.rule
    return Recommendation(goal, schedule, a, reason, tuple(arms), names, unknown)


def _nothing(goal: str, run: _Run) -> Recommendation:
    """Return no decay where nothing is stored that could speak for it."""
    reason = f"{_NOTHING.capitalize()}: no decay is what nothing speaks against."
    if goal == "rank":
        (found,) = recoveries("factor")
        none, kept, off = found.arms
        reason += (
            f" In {found.title}, decay to a = {off.a:g} and then off ended {off.error:.2g} from "
            f"the truth, no decay {none.error:.2g}, decay that was kept {kept.error:.2g}: a "
            "problem that low rank solves, of which this run is not known to be one."
        )
        unknown = (_NO_CURVE, *run.caveats(found))
        return Recommendation(goal, None, 0.0, reason, found.arms, (found.result,), unknown)
    return Recommendation(goal, None, 0.0, reason, (), (), (_NOTHING,))


def _when(off: float) -> str:
    """Return when decay was off."""
    return "kept" if off == 1 else f"off after {100 * off:.3g}% of the run"
