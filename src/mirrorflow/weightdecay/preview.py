"""The decay that will really act, learning rate included, before the run."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .scheduler import WeightDecayScheduler

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Preview", "learning_rates", "preview", "table"]

_COLUMNS = ("group", "kind", "start", "stop", "decay", "decay_end", "lr", "lr_end", "absorbed", "a")


@dataclass(frozen=True)
class Preview:
    """What a scheduler will do in a run.

    Parameters
    ----------
    rows : list of dict
        Runs of steps, as in `WeightDecayScheduler.audit`.
    curves : dict of str to (lr, decay, a)
        For each group the lists over the steps.
    """

    rows: list[dict[str, Any]]
    curves: dict[str, tuple[list[float], list[float], list[float]]]

    def __str__(self) -> str:
        """Give the table."""
        return table(self.rows)

    def plot(self) -> Figure:
        """Draw decay, lr x decay, and the accumulated sum."""
        from matplotlib.figure import Figure  # pyright: ignore[reportPrivateImportUsage]

        figure = Figure(figsize=(9, 2.8), layout="constrained")
        axes = figure.subplots(1, 3)
        for name, (lrs, decays, sums) in self.curves.items():
            acting = [lr * decay for lr, decay in zip(lrs, decays, strict=True)]
            for axis, values in zip(axes, (decays, acting, sums), strict=True):
                axis.plot(range(len(values)), values, label=f"group {name}")
        for axis, title in zip(axes, ("decay", "lr × decay", "accumulated $a$"), strict=True):
            axis.set(title=title, xlabel="step")
        axes[0].legend(frameon=False)
        return figure


def preview(
    scheduler: WeightDecayScheduler,
    steps: int,
    lr: LRScheduler | Iterable[float] | None = None,
) -> Preview:
    """Run the scheduler without a model, from where it is, and keep the account.

    Parameters
    ----------
    scheduler : WeightDecayScheduler
        Neither it nor its optimizer is changed.
    steps : int
        How many optimizer steps to look ahead.
    lr : LRScheduler or iterable of float, optional
        The learning-rate scheduler, stepped after each optimizer step, or the learning rate of
        each step for all groups; without it, it stays as it is.

    Examples
    --------
    >>> from mirrorflow import SwitchOff
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.AdamW([w], lr=0.5, weight_decay=1.0)
    >>> cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    >>> print(preview(WeightDecayScheduler(optimizer, SwitchOff(0.25, at=4)), 8, cosine))
    group  kind       start  stop  decay  decay_end  lr    lr_end   absorbed  a
    0      decoupled  0      4     0.25   0.25       0.5   0.34567  0.43835   -0.43835
    0      decoupled  4      8     0      0          0.25  0.01903  0         -0.43835
    """
    shadow = _shadow(scheduler.optimizer)
    entries = [copy.deepcopy(entry) for entry in scheduler.account.entries]
    curves: list[tuple[list[float], list[float], list[float]]] = [([], [], []) for _ in entries]
    for step, _ in enumerate(_moved(shadow, scheduler.optimizer, lr, steps), scheduler.steps):
        rates = scheduler.rates(step)
        decays = scheduler.decays(rates, shadow.param_groups)
        for target, rate, decay, entry, curve in zip(
            scheduler.targets, rates, decays, entries, curves, strict=True
        ):
            group = shadow.param_groups[target.group]
            if scheduler.exact_off and rate == 0 and entry.held:
                entry.held = 0.0
            if target.params(scheduler.optimizer.param_groups[target.group]):
                entry.record(step, decay, group)
            _extend(curve, float(group["lr"]), decay, entry.accumulated)
    names = [scheduler.name(target) for target in scheduler.targets]
    rows = [row for name, entry in zip(names, entries, strict=True) for row in entry.rows(name)]
    return Preview(rows, dict(zip(names, curves, strict=True)))


def learning_rates(scheduler: LRScheduler, steps: int) -> list[float]:
    """Give the learning rates of the first group over the next steps of a scheduler.

    Parameters
    ----------
    scheduler : LRScheduler
        Any that steps without a metric; neither it nor its optimizer is changed.
    steps : int
        How many.

    Examples
    --------
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.5)
    >>> learning_rates(torch.optim.lr_scheduler.StepLR(optimizer, step_size=2), 4)
    [0.5, 0.5, 0.05, 0.05]
    """
    shadow = _shadow(scheduler.optimizer)
    moved = _moved(shadow, scheduler.optimizer, scheduler, steps)
    return [float(shadow.param_groups[0]["lr"]) for _ in moved]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Make text of the rows of a preview or an audit.

    Examples
    --------
    >>> print(table([{"group": "0", "start": 0, "stop": 10, "absorbed": 0.5, "a": -0.5}]))
    group  start  stop  absorbed  a
    0      0      10    0.5       -0.5
    """
    columns = [c for c in _COLUMNS if any(c in row for row in rows)]
    cells = [columns, *([_cell(row.get(c)) for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    """Show a value."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _extend(curve: tuple[list[float], ...], *values: float) -> None:
    """Put a value at the end of each list."""
    for points, value in zip(curve, values, strict=True):
        points.append(value)


def _shadow(optimizer: Optimizer) -> Optimizer:
    """Make an optimizer with the settings of each group, and a single number for its weights."""
    groups = []
    for group in optimizer.param_groups:
        settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        groups.append(copy.deepcopy(settings) | {"params": [torch.zeros((), requires_grad=True)]})
    return torch.optim.SGD(groups, lr=1.0)


def _moved(
    shadow: Optimizer, optimizer: Optimizer, lr: LRScheduler | Iterable[float] | None, steps: int
) -> Iterable[None]:
    """Yield at each step, with its learning rates in the shadow's groups."""
    if lr is None or isinstance(lr, LRScheduler):
        scheduler = copy.deepcopy(lr, {id(optimizer): shadow})
        for step in range(steps):
            if step and scheduler is not None:
                _step(scheduler)
            yield
        return
    rates = [float(rate) for rate in lr]
    if len(rates) < steps:
        raise ValueError(f"{len(rates)} learning rates for {steps} steps")
    for rate in rates[:steps]:
        for group in shadow.param_groups:
            group["lr"] = rate
        yield


def _step(scheduler: LRScheduler) -> None:
    """Step a copied scheduler, whose optimizer takes no steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of step() before optimizer.step()
        scheduler.step()
