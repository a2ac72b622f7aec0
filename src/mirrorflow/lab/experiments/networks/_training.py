"""A network in training: measured on the way, and stored where other runs go on from it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...framework.trunks import Checkpoints, Timeline

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.optim import Optimizer

    from mirrorflow.spectrum import SpectralTracker
    from mirrorflow.weightdecay import WeightDecayScheduler

__all__ = ["Session", "Watch", "autocast", "controlled", "device", "go_on", "train", "train_to"]

Curves = dict[str, list[float]]
Watch = Callable[[int, Mapping[str, float]], None]
STORED = 60.0  # seconds between two states of a long run


@dataclass
class Session:
    """A model, what trains it, and what was measured so far.

    Attributes
    ----------
    model : Module
    optimizer : Optimizer
    decay : WeightDecayScheduler
        Its schedule may be a `Feedback`, which is fed the ratio.
    lrs : array, (steps,)
        The learning rate of each step.
    loss : callable, step -> scalar tensor
        A function of the step alone: data and augmentation are drawn from (seed, step).
    evaluate : callable -> dict of float
        What is measured besides the spectra.
    tracker : SpectralTracker
    every : int
        Steps from one measurement to the next; the last step is always measured.
    curves : dict of list of float
        Each curve k with the steps it was measured at, as ``k`` and ``k.step``.
    """

    model: Module
    optimizer: Optimizer
    decay: WeightDecayScheduler
    lrs: NDArray[np.float64]
    loss: Callable[[int], Tensor]
    evaluate: Callable[[], dict[str, float]]
    tracker: SpectralTracker
    every: int
    curves: Curves = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """The length of the run."""
        return len(self.lrs)

    def step(self, number: int) -> float:
        """Take a step, and give its training loss; ArithmeticError if it is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.lrs[number])
        loss = self.loss(number)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(value := loss.item()):
            raise ArithmeticError(f"the training loss is {value} in step {number}")
        return value

    def measure(self, step: int) -> dict[str, float]:
        """Measure now, feed the closed loop, and add to the curves what is defined."""
        spectra = self.tracker.measure()
        ratio = spectra.mean_ratio
        if feedback := _feedback(self.decay):
            feedback.update(step, ratio)
            self.decay.step()
        found = {
            **self.evaluate(),
            "ratio": ratio,
            "ratio_of_means": spectra.ratio_of_means,
            "nuclear": spectra.summary()["mean_nuclear"],
            "a": min(self.decay.accumulated),
            "rate": max(self.decay.get_last_weight_decay()),
        }
        # The product of LoRA is 0 at its start and has no ratio: that point is left out.
        found = {name: value for name, value in found.items() if not math.isnan(value)}
        for name, value in found.items():
            self.curves.setdefault(name, []).append(value)
            self.curves.setdefault(f"{name}.step", []).append(float(step))
        return found

    def is_measured(self, step: int) -> bool:
        """Whether the state after ``step`` steps is measured."""
        return step % self.every == 0 or step == self.steps

    def state(self) -> dict[str, Any]:
        """Return all that the steps change."""
        feedback = _feedback(self.decay)
        return {
            "model": {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad},
            "optimizer": self.optimizer.state_dict(),
            "decay": self.decay.state_dict(),
            "feedback": feedback.state_dict() if feedback else None,
            "curves": self.curves,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state over."""
        import torch

        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(state["model"][name])
        # What schedules write into the groups is the state's; the decay itself is this run's.
        self.optimizer.load_state_dict(state["optimizer"])
        if feedback := _feedback(self.decay):
            feedback.load_state_dict(state["feedback"])
        self.decay.load_state_dict(state["decay"])
        self.curves = {name: list(values) for name, values in state["curves"].items()}


def train(
    build: Callable[[], Session],
    timeline: Timeline,
    checkpoints: Checkpoints,
    until: int | None = None,
    keep: Iterable[int] = (),
    watch: Watch = lambda step, found: None,
) -> Session:
    """Train to a step, from the last stored state on the way, and store the states to keep.

    Parameters
    ----------
    build : callable
        Makes the session at step 0.
    timeline : Timeline
        What the run does; it names the states.
    checkpoints : Checkpoints
        Where states are found and stored; a long run also stores one every minute, and drops it
        for the next.
    until : int, optional
        The last step; the whole run without it.
    keep : iterable of int
        The steps whose states others go on from.
    watch : callable
        Called with each step's number and what was measured then, or nothing.
    """
    last = timeline.steps if until is None else until
    start, state = checkpoints.latest(timeline, last)
    session = build()
    if state is not None:
        session.load(state)
    elif session.is_measured(0):
        watch(0, session.measure(0))
    _continue(session, timeline, checkpoints, range(start, last), {*keep}, watch)
    return session


def train_to(
    build: Callable[[], Session],
    timeline: Timeline,
    checkpoints: Checkpoints,
    until: int,
    watch: Watch | None = None,
) -> None:
    """Train to a step and store the state there, for the runs that go on from it."""
    train(build, timeline, checkpoints, until, (until,), watch or (lambda *_: None))


def _continue(
    session: Session,
    timeline: Timeline,
    checkpoints: Checkpoints,
    steps: range,
    keep: Collection[int],
    watch: Watch,
) -> None:
    """Take steps, and store states."""
    stored, clock = None, time.monotonic()
    for number in steps:
        session.step(number)
        done = number + 1
        watch(done, session.measure(done) if session.is_measured(done) else {})
        if done in keep:
            checkpoints.save(timeline, done, session.state())
        elif time.monotonic() - clock > STORED and done < timeline.steps:
            checkpoints.save(timeline, done, session.state())
            if stored is not None:
                checkpoints.drop(timeline, stored)
            stored, clock = done, time.monotonic()
    if stored is not None:
        checkpoints.drop(timeline, stored)


def go_on(model: Module, loss: Callable[[int], Tensor], lrs: NDArray[np.float64]) -> None:
    """Train a model whose products were truncated by a new AdamW, without decay.

    Moments of the old one would belong to the old factors; under a new one the dimensions that are
    0 in both factors of a product get no gradient and stay 0, so that its rank stays what it is.
    """
    import torch

    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, float(lrs[0]), weight_decay=0.0)
    for step, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = float(lr)
        loss(step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def device() -> str:
    """Name the device that networks train on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def autocast() -> Any:
    """Compute in bfloat16 on a GPU, and as the weights are elsewhere."""
    import torch

    return torch.autocast(device(), dtype=torch.bfloat16, enabled=device() == "cuda")


def controlled(optimizer: Optimizer, schedule: Any, **options: Any) -> WeightDecayScheduler:
    """Put the first group of an optimizer under a schedule, without a warning about L2 in momentum.

    These experiments repeat what the paper did, SGD with momentum and L2 included. A branch goes on
    from a trunk that another schedule has trained.
    """
    from mirrorflow.weightdecay import CoupledDecayWarning, WeightDecayScheduler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoupledDecayWarning)
        options = {"groups": [(0, schedule)], "on_change": "program", **options}
        return WeightDecayScheduler(optimizer, schedule, **options)


def _feedback(decay: WeightDecayScheduler) -> Any:
    """Return the closed loop that decides the decay, if there is one."""
    from mirrorflow.weightdecay import Feedback

    return decay.schedule if isinstance(decay.schedule, Feedback) else None
