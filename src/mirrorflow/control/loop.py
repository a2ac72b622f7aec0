"""Weight decay and spectra in a training loop of your own; what the callbacks are made of.

.. code-block:: python

    from mirrorflow.control import ControlledDecay
    control = ControlledDecay(model, optimizer, mf.SwitchOff(0.1, at=200), track_every=50)
    ...
        optimizer.step()
        logs = control.step()  # of a step at which something was measured
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..spectrum import Measurement, SpectralTracker
from ..spectrum.pairs import Named, checked, clean
from ..spectrum.records import COLUMNS
from ..weightdecay import Feedback, OffAtBudget, PerLayer, WeightDecayScheduler
from ..weightdecay._checks import one_of
from ..weightdecay._targets import check_schedule, rules
from ..weightdecay.coupling import COUPLINGS
from ..weightdecay.units import CONVENTIONS
from .balance import RunBalance
from .readings import Metric, by_layer, decay_numbers, finite, rows, spectrum_numbers, value_of
from .report import RunReport
from .verdict import D_rows, decay_rows, first_numbers, loop_rows, product_rows, verdict

__all__ = ["ControlledDecay", "check_settings"]


class ControlledDecay:
    """A scheduler of weight decay with a tracker of spectra whose measurements feed closed loops.

    Parameters
    ----------
    model : torch.nn.Module
        The model that trains, prepared (DDP, FSDP2, compiled) or not.
    optimizer : torch.optim.Optimizer
        Its optimizer, likewise.
    schedule : Schedule, callable, Feedback or PerLayer
        The rate at each optimizer step. `HoldRatio`, `OffWhenLevel` and `OffBelow` are fed what is
        measured, here and in ``groups``, in `PerLayer` their layer's, so that they need
        ``track_every``. `OffAtBudget` answers to what has been absorbed, at every step. `PerLayer`
        acts on the factors of each product, tensor by tensor (``decoupled=True``); other weights
        keep the decay of their groups.
    track_every : int
        Measure the spectra every so many steps; 0 for never.
    metric : str or callable Measurement -> float
        What loops are fed: the mean over the products that have a ratio of "ratio", "nuclear",
        "frobenius", "effective_rank", "stable_rank", "gap" or "imbalance", or what a function
        makes of the measurement, in `PerLayer` of the records of a layer. NaN changes nothing.
    level, match, pairs, values, frozen
        What is measured, as for `SpectralTracker`.
    balance_every : int
        Keep the exact account of ``D = A^T A - B B^T`` of each product for the report: 1 splits
        each step into decay, optimizer, and step and noise, which takes a copy of the factors and
        well below 1% of a LoRA step; n > 1 tells decay from the rest, every n steps; 0 keeps none.
    **options
        For `WeightDecayScheduler`.

    Attributes
    ----------
    scheduler : WeightDecayScheduler
    tracker : SpectralTracker or None
        None if nothing is tracked and no account is kept.
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
        metric: Metric = "ratio",
        level: str = "layer",
        match: str | None = None,
        pairs: Named | None = None,
        values: bool = False,
        frozen: bool = False,
        balance_every: int = 0,
        **options: Any,
    ) -> None:
        options = check_settings(
            schedule, track_every, metric, level, match, options, balance_every
        )
        self.schedule, self.track_every, self.metric = schedule, track_every, metric
        self._loops = _loops([schedule, *(of_group for _, of_group in options["groups"])])
        self._fed = [loop for loop in self._loops if not isinstance(loop, OffAtBudget)]
        self.tracker = None
        if track_every or balance_every:
            self.tracker = SpectralTracker(
                model, level=level, match=match, pairs=pairs, values=values, frozen=frozen
            )
        self._reached: int | None = None  # the last step, as it was told
        self.measurements: list[tuple[int, Measurement]] = []
        self._first: dict[str, Any] | None = None  # of the whole run, also of a resumed one
        if isinstance(schedule, PerLayer):
            own = schedule.rules(self._weights(model))
            options = {"decoupled": True} | options | {"groups": [*own, *options["groups"]]}
            schedule = None
        self._balance = None
        if self.tracker is not None and balance_every:  # ahead of decay from outside
            self._balance = RunBalance(self.tracker, optimizer, balance_every)
        self.scheduler = self._scheduled(optimizer, schedule, model, options)
        for loop in (*self._fed, *self._layers.values()):
            loop.fed_every = track_every

    def _scheduled(
        self, optimizer: Any, schedule: Any, model: torch.nn.Module, options: Mapping[str, Any]
    ) -> WeightDecayScheduler:
        """Return the scheduler, which the account of D follows; if it fails, undo the latter."""
        try:
            scheduler = WeightDecayScheduler(optimizer, schedule, model=model, **options)
        except BaseException:
            if self._balance:
                self._balance.close()
            raise
        if self._balance:
            self._balance.follow(scheduler)
        return scheduler

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
        before = self._reached
        if before is None or before >= step:
            before = step - 1
        if self._balance:
            self._balance.take()
        self._reached = step  # there may be several from one time to the next
        due = bool(self.track_every) and step // self.track_every > before // self.track_every
        if due:
            self.measure(step)
        self.scheduler.step()
        return due

    def start_at(self, step: int) -> None:
        """Begin at a later step of a run that has trained without this object, with a warning."""
        account = self.scheduler.account
        account.steps = step
        account.share(self.scheduler.optimizer.param_groups)
        self.scheduler.step()
        warnings.warn(
            f"the run resumes at step {step} without a saved state of mirrorflow: the decay "
            f"schedule also continues at step {step}. The decay absorbed before is unknown, so "
            "the account begins at 0 here",
            stacklevel=3,
        )

    def measure(self, step: int) -> Measurement:
        """Measure now, and let the loops answer; every process has to."""
        if self.tracker is None:
            raise ValueError(
                "track_every must be positive to measure, got 0. Pass track_every=50, for example."
            )
        found = self.tracker.measure()
        self.measurements.append((step, found))
        if self._first is None:
            self._first = {"step": step, "products": first_numbers(found)}
        if self._fed:
            value = _agreed(value_of(found, self.metric))
            for loop in self._fed:
                loop.update(step, value)
        if isinstance(self.schedule, PerLayer):
            parts = by_layer(found)
            values = {name: value_of(parts[name], self.metric) for name in self._layers}
            self.schedule.update(step, _agreed(values))
        self.scheduler.step()
        return found

    def logs(self, spectra: bool = True) -> dict[str, float]:
        """Return the numbers for a log, without those that are NaN or infinite.

        Returns
        -------
        dict of str to float
            ``weight_decay``, ``decay_per_step`` (lr x decay), ``absorbed_decay`` (-a_T) and
            ``decay_timescale`` (1 / (lr x decay), in steps): the largest, and the shortest time
            scale; if several sets of weights are scheduled also each with ``/name``. With
            ``spectra`` the means of the last measurement as ``spectrum/...``, and with `PerLayer`
            what each layer's loop has answered to, such as ``ratio/...``.
        """
        names = {id(loop): name for name, loop in self._layers.items()}
        numbers = decay_numbers(self.scheduler, names)
        if spectra and self.measurements:
            numbers |= spectrum_numbers(self.measurements[-1][1], self.metric, self._layers)
        return finite(numbers)

    def rows(self) -> list[dict[str, Any]]:
        """Return the measurements as flat rows (step, layer, head, ...), for a table or CSV."""
        return rows(self.measurements)

    def report(self) -> RunReport:
        """Return what the run shows, and what it cannot show: ``print`` it, or take ``to_json()``.

        Decay asked and acted, ratio and rank of each product before, after and of random factors,
        what D consists of, and what has become of each loop. Nothing is measured for it: it is as
        of the last measurement. Under FSDP2 with ``balance_every`` every process has to call.

        Examples
        --------
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, weight_decay=0.1)
        >>> control = ControlledDecay(layer, optimizer, OffAtBudget(0.1, budget=5.0))
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> control.report().loops[0].outcome
        'did not fire: less than the budget of 5 was absorbed (0.05 was)'
        """
        first = self._first or {"step": 0, "products": {}}
        last = self.measurements[-1] if self.measurements else None
        pairs = self.tracker.pairs if self.tracker else ()
        splits = self._balance.report() if self._balance else {}
        return verdict(
            RunReport(
                type(self.scheduler.optimizer).__name__,
                self.scheduler.steps,
                (first["step"], last[0]) if last else None,
                self._balance.steps if self._balance and splits else None,
                decay_rows(self.scheduler),
                product_rows(first["products"], last[1] if last else None, pairs),
                D_rows(splits),
                loop_rows(self._named_loops(), self._absorbed()),
                track_every=self.track_every,
            )
        )

    def _named_loops(self) -> list[tuple[str, Feedback]]:
        """Return all loops, those of layers with the layer."""
        return [*(("", loop) for loop in self._loops), *self._layers.items()]

    def _absorbed(self) -> dict[int, float]:
        """Return the most that a tensor with a schedule has absorbed, by the schedule's id."""
        found: dict[int, float] = {}
        groups = self.scheduler.optimizer.param_groups
        pairs = zip(self.scheduler.targets, self.scheduler.account.entries, strict=True)
        for target, entry in pairs:
            key = id(target.schedule)
            absorbed = entry.foremost(target.count(groups[target.group])).absorbed
            found[key] = max(found.get(key, 0.0), absorbed)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state, in plain numbers and strings.

        Under FSDP2 with ``balance_every`` every process has to call.
        """
        layers = self.schedule.state_dict() if isinstance(self.schedule, PerLayer) else None
        loops = [loop.state_dict() for loop in self._loops]
        return {
            "scheduler": self.scheduler.state_dict(),
            "layers": layers,
            "loops": loops,
            "first": self._first,
            "balance": self._balance.state_dict() if self._balance else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises
        ------
        ValueError
            If the state belongs to a run with other loops.
        """
        self._check(state)
        self._reached = None
        self._first = state.get("first")
        if self._balance:
            self._balance.load_state_dict(state.get("balance"))
        for loop, saved in zip(self._loops, state["loops"], strict=True):
            loop.load_state_dict(saved)
        if isinstance(self.schedule, PerLayer):
            self.schedule.load_state_dict(state["layers"])
        self.scheduler.load_state_dict(state["scheduler"])

    def _check(self, state: Any) -> None:
        """Refuse a state that is malformed or of other loops."""
        if not isinstance(state, Mapping) or not {"scheduler", "layers", "loops"} <= set(state):
            known = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"state must have the keys scheduler, layers and loops, got {known}. Pass what "
                "ControlledDecay.state_dict() returned."
            )
        ours = len(self._loops), isinstance(self.schedule, PerLayer)
        theirs = len(state["loops"]), state["layers"] is not None
        if ours != theirs:
            raise ValueError(
                f"state must come from {ours[0]} closed loops and {'a' if ours[1] else 'no'} "
                f"PerLayer, got {theirs[0]} and {'a' if theirs[1] else 'none'}. Resume with the "
                "same schedules."
            )
        if self._balance:
            self._balance.check(state.get("balance"))

    def close(self) -> None:
        """Release the optimizer."""
        self.scheduler.close()
        if self._balance:
            self._balance.close()

    @property
    def answers(self) -> bool:
        """Whether anything here answers to measurements."""
        return bool(self._fed or self._layers)

    @property
    def _layers(self) -> dict[str, Feedback]:
        """Return the loops of the layers, by name."""
        return self.schedule.loops if isinstance(self.schedule, PerLayer) else {}

    def _weights(self, model: torch.nn.Module) -> dict[str, list[torch.Tensor]]:
        """Return the weights of each pair that is tracked."""
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


def _loops(schedules: list[Any]) -> list[Feedback]:
    """Choose the closed loops, each once."""
    return list({id(s): s for s in schedules if isinstance(s, Feedback)}.values())


def _agreed(value: Any) -> Any:
    """Return what the first process has measured, so that all decide alike."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


# Settings of a controlled run, checked before anything begins.


def check_settings(
    schedule: Any,
    track_every: Any,
    metric: Any,
    level: str,
    match: str | None,
    options: Any,
    balance_every: Any = 0,
) -> dict[str, Any]:
    """Return the options, the rules of groups as a tuple, or raise if a setting is impossible.

    Raises
    ------
    TypeError, ValueError
        If one is not, with its name; also if a loop would never be fed.
    """
    if not isinstance(schedule, PerLayer):
        check_schedule(schedule, optional=True)
    for name, every in (("track_every", track_every), ("balance_every", balance_every)):
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise ValueError(f"{name} must be an integer >= 0, got {every!r}")
    checked(level)
    _check_match(match)
    if not callable(metric) and metric not in COLUMNS:
        raise ValueError(
            f"metric must be one of {', '.join(COLUMNS)}, or a function of the Measurement, "
            f"got {metric!r}"
        )
    options = _checked(options)
    if balance_every and options.get("mask") is not None:
        raise ValueError(
            f"balance_every must be 0 with mask=, got {balance_every}: where decay acts on a part "
            "of a weight, no factor of the whole weight describes it. Leave one of them out."
        )
    for loop in (schedule, *(of_group for _, of_group in options["groups"])):
        measured = isinstance(loop, (Feedback, PerLayer)) and not isinstance(loop, OffAtBudget)
        if measured and not track_every:
            raise ValueError(
                f"track_every must be positive with {type(loop).__name__}, got 0: the loop "
                "answers to measurements. Pass track_every=50, for example."
            )
    return options


def _check_match(match: str | None) -> None:
    """Raise unless it is a regular expression."""
    try:
        re.compile(match or "")
    except (re.error, TypeError) as error:
        raise ValueError(f"match must be a regular expression, got {match!r}: {error}") from error


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options for `WeightDecayScheduler`."""
    known = list(inspect.signature(WeightDecayScheduler).parameters)
    known = [name for name in known if name not in ("optimizer", "schedule", "model")]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(
            "options must be track_every, metric, level, match, pairs, values, frozen, "
            f"balance_every, or one of WeightDecayScheduler's ({', '.join(known)}), got "
            f"{', '.join(map(repr, unknown))}."
        )
    if options.get("convention") is not None:
        one_of("convention", options["convention"], CONVENTIONS)
    if options.get("coupling") is not None:
        one_of("coupling", options["coupling"], COUPLINGS)
    return {**options, "groups": rules(options.get("groups", ()))}
