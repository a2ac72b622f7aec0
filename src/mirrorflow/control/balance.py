"""The account of D = A^T A - B B^T over a run, with the decay that acted in each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..balance import BalanceSplit
from ..spectrum import SpectralTracker
from ..spectrum.account import ProductAccount, check_products
from ..weightdecay import WeightDecayScheduler
from ..weightdecay._checks import inner

__all__ = ["RunBalance"]


class RunBalance:
    r"""The account of D of what is tracked, taken every so many steps.

    It begins, or goes on from a saved one, before the first step that is taken, when the weights
    are sure to be there: a checkpoint may be loaded in any order until then. Its shrink factors are
    the ledger's: ``prod (1 - lr decay)`` over the steps since the last call, kept as they act. For
    SGD with momentum the share of each step is what the buffer passes on, as in ``accumulated``.
    Decay in the gradient of Adam has no such factor: it is 1, and what the decay does stands in the
    optimizer's part.

    Parameters
    ----------
    tracker : SpectralTracker
    optimizer : torch.optim.Optimizer
        Not yet scheduled: what shrinks weights before a step has to do so after this has begun.
    every : int
        1 splits each step; more takes the steps between as one interval.

    Raises
    ------
    ValueError
        If the optimizer steps none of the factors.
    """

    def __init__(self, tracker: SpectralTracker, optimizer: Any, every: int) -> None:
        self.tracker, self.every = tracker, every
        self._optimizer = inner(optimizer)
        self._keys = list(dict.fromkeys(f.key for p in tracker.pairs for f in (p.left, p.right)))
        self._check_stepped()
        self._scheduler: WeightDecayScheduler | None = None
        self._account: ProductAccount | None = None
        self._saved: Mapping[str, Any] | None = None
        self._at, self._first = 0, 0  # the steps that are in it, and the step where it began
        self._running = False
        self._attach()

    def _attach(self) -> None:
        """Register the hook, outside what torch.compile traces."""
        opaque: Any = torch.compiler.disable
        self._handle = self._optimizer.register_step_pre_hook(opaque(self._begin))

    def _check_stepped(self) -> None:
        """Raise unless the optimizer steps one of the factors at least."""
        stepped = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        if not any(id(self.tracker.weight(key)) in stepped for key in self._keys):
            raise ValueError(
                "balance_every must be 0 where the optimizer steps none of the factors, as here: "
                f"{', '.join(self._keys[:3])}, ... DeepSpeed and FSDP1 step flat copies of the "
                "weights; FSDP2 and DDP step the weights themselves."
            )

    def follow(self, scheduler: WeightDecayScheduler) -> None:
        """Take the shrink factors from a scheduler of the same optimizer."""
        self._scheduler = scheduler

    def _begin(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Make the account, unless a step has been taken since it was made."""
        assert self._scheduler is not None
        steps = self._scheduler.steps
        if self._running or (self._account is not None and steps > self._at):
            return
        self._account = ProductAccount(self.tracker, each_step=self.every == 1)
        if self._saved is None:
            self._at = self._first = steps
            self._shrink()  # what was before does not count
            return
        self._account.load_state_dict(self._saved["account"])
        self._at, self._first = int(self._saved["at"]), int(self._saved["first"])

    def take(self) -> None:
        """Account for the steps since the last time, if that is due."""
        assert self._scheduler is not None
        steps = self._scheduler.steps
        if self._account is None or steps == self._at:
            return
        self._running, self._saved = True, None
        if steps // self.every == self._at // self.every:
            return
        shrink = self._shrink()
        if any(map(math.isnan, shrink.values())):
            self._account.moved()
        elif steps == self._at + 1 and self.every == 1:
            self._account.step(shrink)
        else:
            self._account.interval(shrink)
        self._at = steps

    def _shrink(self) -> dict[str, float]:
        """Return how much of each weight the steps since the last time have left.

        1 where the ledger has no such number, NaN where it has one and does not know it.
        """
        assert self._scheduler is not None
        found: dict[int, float] = {}
        groups, entries = self._optimizer.param_groups, self._scheduler.account.entries
        for target, entry in zip(self._scheduler.targets, entries, strict=True):
            params = target.params(groups[target.group])
            kept = entry.take_kept(len(params))
            if not math.isnan(entry.absorbed):
                found |= zip(map(id, params), kept, strict=True)
        return {key: found.get(id(self.tracker.weight(key)), 1.0) for key in self._keys}

    def report(self) -> dict[str, BalanceSplit]:
        """Return what D of each product consists of; nothing before the first step."""
        return {} if self._account is None else self._account.report()

    @property
    def steps(self) -> tuple[int, int]:
        """The step where the account began, and the one that it has come to."""
        return self._first, self._at

    def state_dict(self) -> Mapping[str, Any] | None:
        """Return the state, in plain numbers and strings; None before the first step."""
        if self._saved is not None or self._account is None:
            return self._saved
        return {"account": self._account.state_dict(), "at": self._at, "first": self._first}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a state, before the next step; without one begin anew there."""
        self._saved, self._account, self._running = state, None, False

    def check(self, state: Mapping[str, Any] | None) -> None:
        """Raise unless a state is of these products."""
        if state is not None:
            check_products(state["account"], self.tracker)

    def close(self) -> None:
        """Release the optimizer."""
        self._handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the hook, as the optimizer leaves its own."""
        return {key: value for key, value in vars(self).items() if key != "_handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put the hook into the copied optimizer."""
        self.__dict__.update(state)
        self._attach()
