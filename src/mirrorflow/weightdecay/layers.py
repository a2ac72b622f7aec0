"""A closed loop for each layer: its own measurement, its own rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .feedback import Feedback

__all__ = ["PerLayer"]


class PerLayer:
    """A loop for each layer, which acts on its weights and answers to its measurement.

    Parameters
    ----------
    make : callable name -> Feedback
        Makes the loop of a layer. Each has bounds, slew limit, deadband and a log of its own.

    Attributes
    ----------
    loops : dict of str to Feedback
        By the name of the layer, once `rules` has been called.

    Examples
    --------
    >>> from mirrorflow.weightdecay import HoldRatio, WeightDecayScheduler
    >>> layers = {"first": [torch.nn.Parameter(torch.ones(2, 2))],
    ...           "second": [torch.nn.Parameter(torch.ones(2, 2))]}
    >>> optimizer = torch.optim.AdamW(sum(layers.values(), []), lr=0.1, weight_decay=0.1)
    >>> held = PerLayer(lambda layer: HoldRatio(target=1.5, rate=0.1, gain=0.1))
    >>> scheduler = WeightDecayScheduler(
    ...     optimizer, None, groups=held.rules(layers), decoupled=True
    ... )
    >>> rates = held.update(10, {"first": 1.9, "second": 1.5})
    >>> scheduler.step()
    >>> rates["first"] > 0.1, scheduler.get_last_weight_decay() == [rates["first"], 0.1]
    (True, True)
    """

    def __init__(self, make: Callable[[str], Feedback]) -> None:
        if not callable(make):
            raise TypeError(
                "PerLayer takes a function that makes the loop of a layer, such as "
                f"lambda layer: HoldRatio(...), got {make!r}"
            )
        self.make = make
        self.loops: dict[str, Feedback] = {}

    def rules(
        self, layers: Mapping[str, Iterable[torch.Tensor]]
    ) -> list[tuple[list[torch.Tensor], Feedback]]:
        """Make the loops, and the rules for ``WeightDecayScheduler(groups=..., decoupled=True)``.

        Parameters
        ----------
        layers : mapping of str to tensors
            The weights that the decay of each layer acts on.

        Raises
        ------
        ValueError
            If a weight belongs to two layers, whose loops would pull at it.
        """
        owner: dict[int, str] = {}
        found = {name: list(tensors) for name, tensors in layers.items()}
        for name, tensors in found.items():
            for tensor in tensors:
                if (other := owner.setdefault(id(tensor), name)) != name:
                    raise ValueError(
                        f"the layers {other!r} and {name!r} share a weight, and one decay cannot "
                        "follow two loops: leave one of them out"
                    )
        self.loops = {name: self._made(name) for name in found}
        if len({id(loop) for loop in self.loops.values()}) < len(self.loops):
            raise ValueError(
                "PerLayer: each layer needs a loop of its own, made when it is asked for"
            )
        return [(tensors, self.loops[name]) for name, tensors in found.items()]

    def _made(self, name: str) -> Feedback:
        """Make the loop of a layer, and check that it is one."""
        loop = self.make(name)
        if not isinstance(loop, Feedback):
            raise TypeError(
                f"PerLayer: the loop of {name!r} must be a Feedback, like HoldRatio, got {loop!r}"
            )
        return loop

    def update(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Take the measurements of all layers, and give the rates that act from now on.

        Parameters
        ----------
        step : int
            The optimizer step they belong to.
        values : mapping of str to float
            What was measured of each layer; NaN where there is nothing to measure yet.
        """
        if missing := [name for name in self.loops if name not in values]:
            raise ValueError(f"PerLayer: no measurement of {', '.join(map(repr, missing))}")
        return {name: loop.update(step, values[name]) for name, loop in self.loops.items()}

    @property
    def log(self) -> list[dict[str, Any]]:
        """Give every decision, as rows with the name of the layer."""
        rows = [{"layer": name} | row for name, loop in self.loops.items() for row in loop.log]
        return sorted(rows, key=lambda row: row["step"])

    def state_dict(self) -> dict[str, Any]:
        """Give the states of the loops, in plain numbers and strings."""
        return {name: loop.state_dict() for name, loop in self.loops.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same layers."""
        if set(state) != set(self.loops):
            raise ValueError(
                f"the state is of the layers {sorted(state)}, these are {sorted(self.loops)}"
            )
        for name, loop in self.loops.items():
            loop.load_state_dict(state[name])
