"""Several schedulers as one, and one in the shape of a learning-rate scheduler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch.optim.lr_scheduler import LRScheduler

from .scheduler import WeightDecayScheduler

__all__ = ["WeightDecayLR", "WeightDecaySchedulers"]


class WeightDecaySchedulers:
    """The schedulers of several optimizers, each with the count of its own steps.

    Parameters
    ----------
    schedulers : sequence of WeightDecayScheduler
        One per optimizer; an optimizer without decay, such as the Adam beside a Muon, needs none.

    Examples
    --------
    >>> from mirrorflow import SwitchOff
    >>> w, v = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    >>> muon = torch.optim.Muon([w], lr=0.1, weight_decay=0.2)
    >>> adam = torch.optim.AdamW([v], lr=0.1, weight_decay=0.1)
    >>> both = WeightDecaySchedulers(
    ...     [WeightDecayScheduler(o, SwitchOff(1.0, at=9), relative=True) for o in (muon, adam)]
    ... )
    >>> both.get_last_weight_decay(), both.steps
    ([0.2, 0.1], [0, 0])
    """

    def __init__(self, schedulers: Sequence[WeightDecayScheduler]) -> None:
        self.schedulers = [_scheduler(one, type(self)) for one in _listed(schedulers)]

    def step(self) -> None:
        """Write the decay of each optimizer's next step."""
        for scheduler in self.schedulers:
            scheduler.step()

    def get_last_weight_decay(self) -> list[float]:
        """Return the decay of the next step, optimizer after optimizer."""
        return [decay for s in self.schedulers for decay in s.get_last_weight_decay()]

    @property
    def steps(self) -> list[int]:
        """The number of steps that each optimizer has taken."""
        return [scheduler.steps for scheduler in self.schedulers]

    @property
    def accumulated(self) -> list[float]:
        """Return a_T, one number per group, optimizer after optimizer."""
        return [a for scheduler in self.schedulers for a in scheduler.accumulated]

    @property
    def pending(self) -> list[float]:
        """Return what momentum would still absorb, one number per group, as ``accumulated``."""
        return [a for scheduler in self.schedulers for a in scheduler.pending]

    def audit(self) -> list[dict[str, Any]]:
        """Return what was really applied, as rows, with the index of the ``optimizer`` in each."""
        return [
            {"optimizer": index} | row
            for index, scheduler in enumerate(self.schedulers)
            for row in scheduler.audit()
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the states."""
        return {"schedulers": [scheduler.state_dict() for scheduler in self.schedulers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the states of as many schedulers."""
        states = state.get("schedulers", ())
        if len(states) != len(self.schedulers):
            raise ValueError(
                f"the state must hold {len(self.schedulers)} schedulers, got {len(states)}"
            )
        for scheduler, saved in zip(self.schedulers, states, strict=True):
            scheduler.load_state_dict(saved)

    def close(self) -> None:
        """Let the optimizers go."""
        for scheduler in self.schedulers:
            scheduler.close()

    def __enter__(self) -> Self:
        """Close at the end of a with block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()


class WeightDecayLR(LRScheduler):
    """A `WeightDecayScheduler` for what accepts learning-rate schedulers only (Lightning).

    It leaves the learning rate alone. A framework that steps it once per process or per epoch
    changes nothing either, since the optimizer's own steps are counted.

    Parameters
    ----------
    scheduler : WeightDecayScheduler
        What it stands for.

    Examples
    --------
    >>> from mirrorflow import Linear
    >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], weight_decay=0.1)
    >>> scheduler = WeightDecayScheduler(optimizer, Linear(0.1, 0.0, duration=100))
    >>> isinstance(WeightDecayLR(scheduler), torch.optim.lr_scheduler.LRScheduler)
    True
    """

    def __init__(self, scheduler: WeightDecayScheduler) -> None:
        # Without super().__init__(), which sets initial_lr in the groups and patches the optimizer.
        self.scheduler = _scheduler(scheduler, type(self))
        self.optimizer = scheduler.optimizer
        self.base_lrs = self.get_lr()
        self._last_lr = self.base_lrs

    @property
    def last_epoch(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The number of steps that the optimizer has taken."""
        return self.scheduler.steps

    @last_epoch.setter
    def last_epoch(self, value: int) -> None:
        raise TypeError(
            "the clock of WeightDecayLR is the count of the optimizer's steps, and cannot be set, "
            "as SequentialLR does. Leave it outside, and join its schedules: mf.join([...])"
        )

    def get_lr(self) -> list[Any]:
        """Return the learning rates, which another scheduler sets."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return [lr.clone() if isinstance(lr, torch.Tensor) else lr for lr in rates]

    def get_last_lr(self) -> list[Any]:
        """Return the learning rates, which another scheduler sets."""
        return self.get_lr()

    def step(self, epoch: int | None = None) -> None:
        """Write the decay of the next step."""
        self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the scheduler's state."""
        self.scheduler.load_state_dict(state_dict)


def _listed(schedulers: Any) -> list[Any]:
    """Return the schedulers as a list."""
    if isinstance(schedulers, Iterable):
        return list(schedulers)
    raise TypeError(
        f"WeightDecaySchedulers takes a list of them, got {type(schedulers).__name__}: one "
        "scheduler needs nothing around it"
    )


def _scheduler(value: Any, what: type) -> WeightDecayScheduler:
    """Raise unless this is a scheduler."""
    if isinstance(value, WeightDecayScheduler):
        return value
    raise TypeError(
        f"{what.__name__} is made of WeightDecayScheduler(optimizer, schedule), got "
        f"{type(value).__name__}"
    )
