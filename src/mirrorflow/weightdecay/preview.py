"""The decay that will really act, learning rate included, before the run."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LRScheduler

from .._html import html_table
from ._coverage import begin_entry
from ._expected import ExpectedPart
from ._ledger import Entry
from ._targets import Target
from .conventions import lr_of, rate_at
from .feedback import Feedback, OffAtBudget, whole
from .outlook import Outlook, Product, outlook, outlook_table, sentences, wrapped
from .scheduler import WeightDecayScheduler
from .units import ahead, shadow

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.optim import Optimizer

__all__ = ["Preview", "group_ahead", "preview", "table"]

_DASHES = ("-", "--", "-.", ":")
_COLUMNS = ("group", "kind", "start", "stop", "decay", "decay_end", "lr", "lr_end", "absorbed", "a")


@dataclass(frozen=True, repr=False)
class Preview:
    """The decay that a scheduler will apply in a run.

    Parameters
    ----------
    rows : list of dict
        Runs of steps, as in `WeightDecayScheduler.audit`.
    curves : dict of str to (lr, decay, a)
        For each group the lists over the steps.
    remarks : list of str
        What is not known before the run, and which closed loops cannot fire in it.
    outlooks : list of Outlook
        What the decay of each group comes to: how much acts, and what it does to a product.
    """

    rows: list[dict[str, Any]]
    curves: dict[str, tuple[list[float], list[float], list[float]]]
    remarks: list[str] = field(default_factory=list)
    outlooks: list[Outlook] = field(default_factory=list)

    def __repr__(self) -> str:
        """Say of how many groups it is, and what they would absorb."""
        ends = {name: curve[2][-1] for name, curve in self.curves.items() if curve[2]}
        said = "".join(f", a = {a:.4g} for {name}" for name, a in list(ends.items())[:3])
        return f"Preview({len(self.curves)} groups{said}{', ...' * (len(ends) > 3)})"

    def _repr_html_(self) -> str:
        """Show the runs of steps, and what they come to."""
        columns = [c for c in _COLUMNS if any(c in row for row in self.rows)]
        rows = [[row.get(c, "") for c in columns] for row in self.rows]
        return html_table(repr(self), columns, rows, [*sentences(self.outlooks), *self.remarks])

    def __str__(self) -> str:
        """Return the table, the remarks, and what it comes to in three sentences."""
        return "\n".join([table(self.rows), wrapped([*self.remarks, *sentences(self.outlooks)])])

    @property
    def verdict(self) -> str:
        """Return three sentences, the remarks, and a row for each group, in 80 columns."""
        said = wrapped([*sentences(self.outlooks), *self.remarks])
        return f"{said}\n\n{outlook_table(self.outlooks)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the outlooks, what they say, and the remarks as plain values."""
        return {
            "sentences": list(sentences(self.outlooks)),
            "remarks": list(self.remarks),
            "groups": [found.to_dict() for found in self.outlooks],
        }

    def plot(self) -> Figure:
        """Return a figure of decay, lr x decay, and the accumulated sum."""
        try:
            from matplotlib.figure import Figure  # pyright: ignore[reportPrivateImportUsage]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "plot needs matplotlib, of the extra lab: pip install '.[lab]'", name="matplotlib"
            ) from error

        abreast = max(1, min(3, 100 // (10 + max(map(len, self.curves), default=0))))
        lines = -(-len(self.curves) // abreast)  # of the legend, below the curves
        figure = Figure(figsize=(9, 2.8 + 0.25 * lines), layout="constrained")
        axes = figure.subplots(1, 3)
        for place, (name, (lrs, decays, sums)) in enumerate(self.curves.items()):
            acting = [lr * decay for lr, decay in zip(lrs, decays, strict=True)]
            style = _DASHES[place % len(_DASHES)]  # tells them apart in grey, and on one another
            for axis, values in zip(axes, (decays, acting, sums), strict=True):
                axis.plot(range(len(values)), values, linestyle=style, label=f"group {name}")
        for axis, title in zip(axes, ("decay", "lr × decay", "accumulated $a$"), strict=True):
            axis.set(title=title, xlabel="step")
            axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=abreast, frameon=False)
        return figure


def preview(
    scheduler: WeightDecayScheduler,
    steps: int,
    lr: LRScheduler | Iterable[float] | None = None,
    *,
    size: float | None = None,
    start: float | None = None,
    target: float = 0.5,
) -> Preview:
    """Return the decay that a scheduler will apply in its next steps; nothing is trained.

    `OffAtBudget` is fed after each step what has been absorbed by then, as `ControlledDecay` does.
    A loop that answers to measurements keeps its rate; the remarks name it, and say which loops
    cannot fire in the run. Of weights in bfloat16 or float16 the part that acts is that of
    their entries as they are now; where it depends on the gradients (fused kernels, L2 of SGD)
    a is NaN.

    Parameters
    ----------
    scheduler : WeightDecayScheduler
        Neither it nor its optimizer is changed.
    steps : int
        How many optimizer steps to look ahead.
    lr : LRScheduler or iterable of float, optional
        The learning-rate scheduler, stepped after each optimizer step, or the learning rate of
        each step for all groups. By default the current one is used for all steps.
    size : float, optional
        ``|x|``, > 0, of the products that decay shall change: a typical entry of m * w, or singular
        value of A B. With ``start`` it says whether their geometry moves.
    start : float, optional
        ``A_0 = |m_0^2 - w_0^2| / 2``, > 0, at their start; 1/6 for PEFT's LoRA.
    target : float
        The part, in (0, 1), by which products shall shrink: the outlooks name the decay for it.

    Raises
    ------
    TypeError
        If ``scheduler`` is not one, but a schedule, say, or a learning rate is not a number.
    ValueError
        If the learning-rate scheduler belongs to another optimizer, or needs a metric to step
        (ReduceLROnPlateau), or there are fewer learning rates than steps; if a learning rate is
        negative or not finite; if ``size``, ``start`` or ``target`` is out of range.

    Examples
    --------
    >>> from mirrorflow import SwitchOff
    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.AdamW([w], lr=0.5, weight_decay=1.0)
    >>> cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    >>> print(preview(WeightDecayScheduler(optimizer, SwitchOff(0.25, at=4)), 8, cosine))
    group  kind       start  stop  decay  decay_end  lr    lr_end   absorbed  a
    0      decoupled  0      4     0.25   0.25       0.5   0.34567  0.43835   -0.43835
    0      decoupled  4      8     0      0          0.25  0.01903  0         -0.43835
    AdamW's decay of 0.25 over 8 steps comes to a = -0.438 (-sum of lr x decay); all
    of it acts in float32.
    A product of two weights shrinks by 60.5% at most, and whether its geometry
    moves enough depends on the product's size and start; under AdamW at best the
    law of sign descent holds: decay stores |x|^{3/2} at most, never L1, whatever
    its strength.
    For a product to shrink by 50% a decay of 0.198 is enough, 0.79 of this one.
    """
    if not isinstance(scheduler, WeightDecayScheduler):
        raise TypeError(
            f"scheduler must be a WeightDecayScheduler, got {type(scheduler).__name__}. Make one: "
            "WeightDecayScheduler(optimizer, schedule)"
        )
    steps, copied = whole("steps", steps), shadow(scheduler.optimizer)
    product = Product(size, start, target)
    entries = [copy.deepcopy(entry) for entry in scheduler.account.entries]
    whole_ones = copy.deepcopy(entries)  # as if all of it acted
    most_ones = copy.deepcopy(entries)  # of the tensor on which most of it acts
    parts = [
        ExpectedPart(scheduler, which, entry.coupling)
        for which, entry in zip(scheduler.targets, entries, strict=True)
    ]
    # A run feeds budgets what the tensor has absorbed on which most acts, of a mask the mean.
    masked = scheduler.plan.mask is not None
    schedules = _copied_loops(scheduler.targets)
    counts = [t.count(scheduler.optimizer.param_groups[t.group]) for t in scheduler.targets]
    curves: list[tuple[list[float], list[float], list[float]]] = [([], [], []) for _ in entries]
    for account, part in zip(most_ones, parts, strict=True):
        account.absorbed = part.most_so_far(account)
    most = [[account.accumulated] for account in most_ones]
    moved = ahead(copied, scheduler.optimizer, lr, steps)
    for step, _ in enumerate(moved, scheduler.steps):
        rates = [None if s is None else rate_at(s, step) for s in schedules]
        decays = scheduler.decays(rates, copied.param_groups)
        for i, (which, rate, decay) in enumerate(
            zip(scheduler.targets, rates, decays, strict=True)
        ):
            accounts = entries[i], whole_ones[i], most_ones[i]
            group = copied.param_groups[which.group]
            if scheduler.exact_off and rate == 0 and entries[i].held:
                for account in accounts:
                    account.held = 0.0
            lr_now = lr_of(group)
            if which.params(scheduler.optimizer.param_groups[which.group]):
                mean, largest = parts[i](decay, lr_now)
                for account, reached in zip(accounts, (mean, 1.0, largest), strict=True):
                    account.record(step, decay, group, reached=reached)
            _extend(curves[i], lr_now, decay, entries[i].accumulated)
            most[i].append(most_ones[i].accumulated)
        spent = _foremost(entries if masked else most_ones, counts)
        _feed(schedules, spent, step + 1)
    names = [scheduler.name(target) for target in scheduler.targets]
    rows = [row for name, entry in zip(names, entries, strict=True) for row in entry.rows(name)]
    end = scheduler.steps + steps
    remarks = [
        *_remarks(schedules),
        *_cannot_fire(schedules, steps),
        *_unspent(schedules, _foremost(entries if masked else most_ones, counts), end),
    ]
    outlooks = [
        outlook(scheduler, i, name, curves[i], (whole_ones[i].accumulated, most[i]), product)
        for i, name in enumerate(names)
    ]
    return Preview(rows, dict(zip(names, curves, strict=True)), remarks, outlooks)


def group_ahead(
    optimizer: Optimizer, index: int, coupling: str, schedule: Any, steps: int, lr: Any = None
) -> list[float]:
    """Return a of a parameter group after each of its next steps, as if all decay acted.

    Parameters
    ----------
    optimizer : Optimizer
        It is not changed.
    index : int
        The place of the group.
    coupling : str
        How its decay acts.
    schedule : Schedule or callable step -> float
        Its decay; a closed loop keeps its rate.
    steps, lr
        As for `preview`.

    Examples
    --------
    >>> import torch
    >>> from mirrorflow import SwitchOff
    >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.5)
    >>> group_ahead(optimizer, 0, "decoupled", SwitchOff(0.25, at=2), steps=3)
    [-0.125, -0.25, -0.25]
    """
    copied, sums = shadow(optimizer), []
    entry = begin_entry(optimizer, optimizer.param_groups[index], coupling)
    for step, _ in enumerate(ahead(copied, optimizer, lr, steps)):
        entry.record(step, rate_at(schedule, step), copied.param_groups[index])
        sums.append(entry.accumulated)
    return sums


def _copied_loops(targets: Sequence[Target]) -> list[Any]:
    """Return the schedule of each target; of loops copies, which may be fed."""
    loops = {id(t.schedule): t.schedule for t in targets if isinstance(t.schedule, Feedback)}
    copies = {key: copy.deepcopy(loop) for key, loop in loops.items()}
    return [copies.get(id(t.schedule), t.schedule) for t in targets]


def _foremost(entries: Sequence[Entry], counts: Sequence[int]) -> list[float]:
    """Return the most that a tensor of each set has absorbed."""
    return [entry.foremost(n).absorbed for entry, n in zip(entries, counts, strict=True)]


def _feed(schedules: Sequence[Any], absorbed: Sequence[float], step: int) -> None:
    """Feed each `OffAtBudget` what has been absorbed: all that is known without a model."""
    for loop in {id(s): s for s in schedules if isinstance(s, OffAtBudget)}.values():
        pairs = zip(schedules, absorbed, strict=True)
        spent = max(value for schedule, value in pairs if schedule is loop)
        if loop.current:
            loop.update(step, spent)


def _remarks(schedules: Sequence[Any]) -> list[str]:
    """Return remarks on the loops whose decisions depend on measurements."""
    unknown = {type(s).__name__ for s in schedules if isinstance(s, Feedback)} - {"OffAtBudget"}
    return [f"{n} answers to measurements: shown as if it kept its rate" for n in sorted(unknown)]


def _cannot_fire(schedules: Sequence[Any], steps: int) -> list[str]:
    """Return remarks on the loops that receive too few measurements to decide anything."""
    remarks = []
    for loop in {id(s): s for s in schedules if isinstance(s, Feedback)}.values():
        name, count = type(loop).__name__, steps // loop.fed_every if loop.fed_every else 0
        if isinstance(loop, OffAtBudget) or not loop.current or not loop.fed_every:
            continue
        if count == 0:
            remarks.append(
                f"{name} cannot act: it is measured every {loop.fed_every} steps, the run has "
                f"{steps}"
            )
        elif count < (least := loop.waits()):
            remarks.append(
                f"{name} cannot fire: it needs {least} more measurements, the run has {count}"
            )
    return remarks


def _unspent(schedules: Sequence[Any], absorbed: Sequence[float], end: int) -> list[str]:
    """Return remarks on the budgets that the run does not absorb: their decay never ends."""
    remarks = []
    for loop in {id(s): s for s in schedules if isinstance(s, OffAtBudget)}.values():
        pairs = zip(schedules, absorbed, strict=True)
        spent = max(value for schedule, value in pairs if schedule is loop)
        if loop.current and math.isnan(spent):
            remarks.append(
                "OffAtBudget may never switch off: what acts is not known before the run"
            )
        elif loop.current and not loop.spent_by(spent):
            remarks.append(
                f"OffAtBudget never switches off: by step {end} it absorbs {spent:.4g} of its "
                f"budget of {loop.budget:g}"
            )
    return remarks


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of a preview or an audit as text.

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
    """Return a value as text."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _extend(curve: tuple[list[float], ...], *values: float) -> None:
    """Put a value at the end of each list."""
    for points, value in zip(curve, values, strict=True):
        points.append(value)
