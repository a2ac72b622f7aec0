"""Weight decay and spectra in a training loop of your own; what the callbacks are made of.

.. code-block:: python

    from mirrorflow.integrations.loop import ControlledDecay
    control = ControlledDecay(model, optimizer, mf.SwitchOff(0.1, at=200), track_every=50)
    ...
        optimizer.step()
        logs = control.step()  # of a step at which something was measured
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..spectrum import Measurement, SpectralTracker
from ..spectrum.pairs import clean
from ..weightdecay import Feedback, OffAtBudget, PerLayer, WeightDecayScheduler

__all__ = ["ControlledDecay", "check_settings"]


class ControlledDecay:
    """A scheduler of weight decay, and a tracker of spectra that tells it what to answer to.

    Parameters
    ----------
    model : torch.nn.Module
        The model that trains, prepared (DDP, FSDP2, compiled) or not.
    optimizer : torch.optim.Optimizer
        Its optimizer, likewise.
    schedule : Schedule, callable, Feedback or PerLayer
        The rate at each optimizer step. `HoldRatio` and `OffWhenLevel` are fed the mean ratio of
        each measurement, in `PerLayer` that of their layer, so that they need ``track_every``.
        `OffAtBudget` answers to what has been absorbed, at every step. `PerLayer` acts on the
        factors of each product, tensor by tensor (``decoupled=True``); other weights keep the
        decay of their groups.
    track_every : int
        Measure the spectra every so many steps; 0 for never.
    level, match : str
        What is measured, as for `SpectralTracker`.
    **options
        For `WeightDecayScheduler`.

    Attributes
    ----------
    scheduler : WeightDecayScheduler
    tracker : SpectralTracker or None
    measurements : list of (step, Measurement)
        What was measured, since this object was made.

    Examples
    --------
    >>> from mirrorflow.weightdecay import HoldRatio
    >>> model = torch.nn.MultiheadAttention(8, 2)
    >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    >>> hold = PerLayer(lambda layer: HoldRatio(target=2.0, rate=0.1, gain=0.1))
    >>> control = ControlledDecay(model, optimizer, hold, track_every=2)
    >>> for _ in range(2):
    ...     model(*3 * [torch.ones(1, 1, 8)])[0].sum().backward()
    ...     optimizer.step()
    ...     logs = control.step()
    >>> logs["spectrum/ratio"] > 1, len(hold.log)
    (True, 1)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        schedule: Any,
        *,
        track_every: int = 0,
        level: str = "layer",
        match: str | None = None,
        **options: Any,
    ) -> None:
        check_settings(schedule, track_every)
        self.schedule, self.track_every = schedule, track_every
        self.tracker = SpectralTracker(model, level=level, match=match) if track_every else None
        self.measurements: list[tuple[int, Measurement]] = []
        if isinstance(schedule, PerLayer):
            own = schedule.rules(self._layers(model))
            options = {"decoupled": True} | options | {"groups": [*own, *options.get("groups", ())]}
            schedule = None
        self.scheduler = WeightDecayScheduler(optimizer, schedule, model=model, **options)

    def step(self) -> dict[str, float]:
        """Take note of the optimizer's step; measure, and give the numbers for a log, where due.

        Returns
        -------
        dict of str to float
            Empty if nothing was measured; `logs` gives the numbers at any time.
        """
        account = self.scheduler.account
        if not account.fresh:  # accumulated gradients, or a step that GradScaler skipped
            return {}
        account.fresh = False
        return self.logs() if self.advance(self.scheduler.steps) else {}

    def advance(self, step: int) -> bool:
        """Do what is due at a step, counted by a framework; tell whether spectra were measured."""
        for loop in self._loops():
            if isinstance(loop, OffAtBudget) and loop.current and self._spent(loop) >= loop.budget:
                loop.update(step, self._spent(loop))
        due = bool(self.track_every) and step % self.track_every == 0
        if due:
            self.measure(step)
        self.scheduler.step()
        return due

    def measure(self, step: int) -> Measurement:
        """Measure now, and let the loops answer; every process has to."""
        if self.tracker is None:
            raise ValueError("nothing is tracked: track_every is 0")
        found = self.tracker.measure()
        self.measurements.append((step, found))
        ratios = _agreed({None: found.mean_ratio} | _ratios(found))
        if isinstance(self.schedule, PerLayer):
            self.schedule.update(step, {name: ratios[name] for name in self.schedule.loops})
        elif isinstance(self.schedule, Feedback) and not isinstance(self.schedule, OffAtBudget):
            self.schedule.update(step, ratios[None])
        self.scheduler.step()
        return found

    def logs(self, spectra: bool = True) -> dict[str, float]:
        """Give the numbers for a log, without those that are NaN."""
        numbers = {
            "weight_decay": max(self.scheduler.get_last_weight_decay()),
            "absorbed_decay": max(0.0 - a for a in self.scheduler.accumulated),
        }
        if spectra and self.measurements:
            numbers |= self._spectra(self.measurements[-1][1])
        return {key: value for key, value in numbers.items() if not math.isnan(value)}

    def _spectra(self, found: Measurement) -> dict[str, float]:
        """Give the numbers of a measurement, by layer if the loops are."""
        numbers = {
            "spectrum/ratio": found.mean_ratio,
            "spectrum/ratio_of_means": found.ratio_of_means,
            "spectrum/gap": found.summary()["mean_gap"],
            "spectrum/undefined": float(found.undefined),
        }
        if isinstance(self.schedule, PerLayer):
            ratios = _ratios(found)
            for name, loop in self.schedule.loops.items():
                numbers |= {f"ratio/{name}": ratios[name], f"weight_decay/{name}": loop.current}
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """Give the state, in plain numbers and strings."""
        loops = self.schedule if isinstance(self.schedule, (Feedback, PerLayer)) else None
        feedback = None if loops is None else loops.state_dict()
        return {"scheduler": self.scheduler.state_dict(), "feedback": feedback}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        if isinstance(self.schedule, (Feedback, PerLayer)) and state["feedback"] is not None:
            self.schedule.load_state_dict(state["feedback"])
        self.scheduler.load_state_dict(state["scheduler"])

    def close(self) -> None:
        """Let the optimizer go."""
        self.scheduler.close()

    def _loops(self) -> list[Feedback]:
        """Give the loops, one for all or one for each layer."""
        if isinstance(self.schedule, PerLayer):
            return list(self.schedule.loops.values())
        return [self.schedule] if isinstance(self.schedule, Feedback) else []

    def _spent(self, loop: Feedback) -> float:
        """Give the most that the weights of a loop have absorbed."""
        rows = zip(self.scheduler.targets, self.scheduler.accumulated, strict=True)
        return max((0.0 - a for target, a in rows if target.schedule is loop), default=0.0)

    def _layers(self, model: torch.nn.Module) -> dict[str, list[torch.Tensor]]:
        """Give the weights of each pair that is tracked."""
        assert self.tracker is not None
        wrapped = isinstance(
            model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
        )
        bare = model.module if wrapped else model
        weights = {clean(name): p for name, p in bare.named_parameters()}
        return {
            pair.label: [weights[key] for key in dict.fromkeys((pair.left.key, pair.right.key))]
            for pair in self.tracker.pairs
        }


def check_settings(schedule: Any, track_every: Any) -> None:
    """Raise unless what the schedule answers to is measured."""
    if not isinstance(track_every, int) or track_every < 0:
        raise ValueError(f"track_every must be an integer >= 0, got {track_every!r}")
    fed = isinstance(schedule, (Feedback, PerLayer)) and not isinstance(schedule, OffAtBudget)
    if fed and not track_every:
        raise ValueError(f"{type(schedule).__name__} needs track_every > 0: it is fed by measuring")


def _ratios(found: Measurement) -> dict[str, float]:
    """Give the mean ratio of each product over its heads; NaN where none is defined."""
    ratios: dict[str, list[float]] = {}
    for record in found.records:
        name = f"{record.name} [{record.adapter}]" if record.adapter else record.name
        ratios.setdefault(name, []).extend([record.ratio] if record.status == "ok" else [])
    return {name: sum(r) / len(r) if r else math.nan for name, r in ratios.items()}


def _agreed(values: dict[Any, float]) -> dict[Any, float]:
    """Give what the first process has measured, so that all decide alike."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values
    shared = [values]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]
