"""Figures of fine-tuning with a constant and with a restarted learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...framework.contract import Record, Trajectory, Verdict
from ...framework.drawing import DASHES, emphasized, name_band, short, zoomable
from ._study import interval, values

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["changes", "draw_figure", "make_charts", "verdicts"]

NAMES = {"adamw": "AdamW", "sgd": "SGD"}
RATES = {
    "constant": "learning rate constant",
    "restarts": "cosine with warm restarts",
    "held": "the same cosine, lr·decay held",
}
CHANGE = "change of nuclear / Frobenius norm"  # seeds begin with models of other ratios
LABELS = {"ratio": "mean nuclear / Frobenius norm", "accuracy": "validation accuracy (%)"}


def changes(records: list[Record], **where: Any) -> list[float]:
    """Return for each seed by how much the ratio has changed: the models begin with other ones."""
    ends, starts = (values(records, key, **where) for key in ("ratio", "ratio at the start"))
    return [end - start for end, start in zip(ends, starts, strict=True)]


def _mean(records: list[Record], key: str, **where: Any) -> float:
    return float(np.mean(values(records, key, **where)))


def _effects(records: list[Record], optimizer: str, rate: str) -> Any:
    """Return for each seed how much smaller the strongest decay's ratio is than the weakest's."""
    ranks = {r["rank"] for r in records}
    low, high = (
        np.array(values(records, "ratio", optimizer=optimizer, rate=rate, rank=rank))
        for rank in (min(ranks), max(ranks))
    )
    return low - high


def _accuracies(records: list[Record], optimizer: str, rate: str) -> Any:
    """Return for each seed the accuracy, mean over the decays."""
    ranks = sorted({r["rank"] for r in records})
    found = [values(records, "accuracy", optimizer=optimizer, rate=rate, rank=k) for k in ranks]
    return np.mean(found, axis=0)


def _said(numbers: Any, form: str, unit: str = "") -> str:
    """Write a mean over seeds, with its 95% interval if there are several."""
    mean, width = interval([float(n) for n in numbers])
    return f"{mean:{form}}{unit}" + (f" ± {width:.1g}" if width > 0 else "")


def verdicts(records: list[Record]) -> list[Verdict]:
    """Say what the falling learning rate does, and what is left of it at held decay."""
    seeds = len({r["seed"] for r in records})
    return [
        *(row for optimizer in NAMES for row in _verdicts(records, optimizer)),
        (
            "Reading",
            "a falling learning rate acts on the ratio like less decay, as Appendix G says, as far "
            "as holding lr·decay brings the effect back; the rest is the learning rate's own",
        ),
        (
            "Numbers",
            f"means over {seeds} seed{'s' * (seeds != 1)}{', with 95% intervals' * (seeds > 1)}; "
            "differences are taken within a seed",
        ),
    ]


def _verdicts(records: list[Record], optimizer: str) -> list[Verdict]:
    """Compare the three learning rates under one optimizer."""
    fixed, fallen, held = (_effects(records, optimizer, rate) for rate in RATES)
    accuracy = [_accuracies(records, optimizer, rate) for rate in RATES]
    absorbed = [_mean(records, "budget", optimizer=optimizer, rate=rate) for rate in RATES]
    weaker = float(np.mean(fixed - fallen))
    back = f"{float(np.mean(held - fallen)) / weaker:.0%}" if weaker else "none"
    name, share = NAMES[optimizer], absorbed[1] / absorbed[0]
    return [
        (
            f"{name}: fall of the ratio from the weakest to the strongest decay, at a constant "
            "learning rate",
            _said(fixed, ".2g"),
        ),
        (f"{name}: under the cosine, which absorbs {share:.0%} as much", _said(fallen, ".2g")),
        (
            f"{name}: under the cosine with lr·decay held",
            f"{_said(held, '.2g')}, which brings {back} of the difference back",
        ),
        (
            f"{name}: accuracy (mean over the decays), at a constant learning rate",
            f"{_said(accuracy[0], '.1f', '%')}; {_said(accuracy[1] - accuracy[0], '+.1f')} points "
            f"by the cosine, {_said(accuracy[2] - accuracy[0], '+.1f')} at held decay",
        ),
    ]


def draw_figure(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw the ratio and the accuracy, a row for each optimizer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 3, gridspec_kw={"width_ratios": [1.1, 1.1, 1]})
    for row, (optimizer, name) in zip(axes, NAMES.items(), strict=True):
        _draw_curves(row[0], records, trajectory, optimizer, "ratio")
        _draw_curves(row[1], records, trajectory, optimizer, "accuracy")
        _draw_ends(row[2], records, optimizer)
        row[0].set_title(f"{name}: strongest and weakest decay", fontsize=10, loc="left")
    name_band(axes[0, 0])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_curves(
    axis: Axes, records: list[Record], trajectory: Trajectory, optimizer: str, key: str
) -> None:
    """Draw the weakest and the strongest decay: the mean over the seeds, and their range."""
    ranks = sorted({r["rank"] for r in records})
    for shown, rank in enumerate((ranks[0], ranks[-1])):
        for dash, (rate, name) in zip(DASHES, RATES.items(), strict=False):
            found = _chosen(records, optimizer=optimizer, rate=rate, rank=rank)
            steps = trajectory[f"{found[0]['part']}/{key}.step"]
            drawn = np.array([trajectory[f"{r['part']}/{key}"] for r in found])
            if key == "ratio":
                drawn = drawn - drawn[:, :1]
            axis.plot(
                steps, drawn.mean(0), linestyle=dash, linewidth=1.6,
                color=("#0072B2", "#B34700")[shown], marker=("", "s")[shown], markersize=4,
                label=f"{'strongest' if shown else 'weakest'} decay, {name}",
            )  # fmt: skip
            axis.fill_between(steps, drawn.min(0), drawn.max(0), alpha=0.12,
                              color=("#0072B2", "#B34700")[shown], linewidth=0)  # fmt: skip
    axis.set_xlabel("step of fine-tuning")
    axis.set_ylabel(CHANGE if key == "ratio" else LABELS[key])
    axis.grid(alpha=0.25)


def _chosen(records: list[Record], **where: Any) -> list[Record]:
    return [r for r in records if all(r[k] == v for k, v in where.items())]


def _draw_ends(axis: Axes, records: list[Record], optimizer: str) -> None:
    """Draw how the ratio has changed over what was absorbed: one line if decay alone decides."""
    for dash, marker, (rate, name) in zip(DASHES, "osD", RATES.items(), strict=False):
        ranks = sorted({r["rank"] for r in records})
        wheres = [{"optimizer": optimizer, "rate": rate, "rank": rank} for rank in ranks]
        x = [_mean(records, "budget", **where) for where in wheres]
        y, widths = zip(*(interval(changes(records, **where)) for where in wheres), strict=True)
        axis.errorbar(x, y, yerr=widths, linestyle=dash, marker=marker, color="0.25",
                      markersize=5, capsize=3, label=name)  # fmt: skip
    axis.set_xlabel("absorbed decay −a at the end")
    axis.set_ylabel(CHANGE)
    axis.legend(fontsize=7.5, frameon=False)
    axis.grid(alpha=0.25)


# --- Interactive ----------------------------------------------------------------------------------


def make_charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make a chart of the ratio and one of the accuracy, with menus."""
    return [
        (f"{label[0].upper()}{label[1:]}, mean over seeds, for the chosen optimizer and learning "
         f"rate.",
         zoomable(_chart(records, trajectory, key, label)))
        for key, label in LABELS.items()
    ]  # fmt: skip


def _chart(records: list[Record], trajectory: Trajectory, key: str, label: str) -> Any:
    """Draw the curves of all decays for what the menus choose."""
    import altair as alt

    menus = [
        alt.param(
            name=f"{field}_{key}", value=next(iter(names)),
            bind=alt.binding_select(options=[*names], labels=[*names.values()], name=f"{field} "),
        )
        for field, names in (("optimizer", NAMES), ("rate", RATES))
    ]  # fmt: skip
    names = _strengths(records)
    colours = alt.Scale(domain=names, range=emphasized(len(names)))
    shapes = alt.Scale(domain=names)  # as the colours have it: one legend for both
    legend = alt.Legend(orient="bottom", columns=3, title=f"decay of {' / '.join(NAMES.values())}")
    return (
        alt.Chart(alt.Data(values=_points(records, trajectory, key)))
        .transform_filter(
            f"datum.optimizer == {menus[0].name} && datum.rate == {menus[1].name}"
        )
        .mark_line(point=alt.OverlayMarkDef(size=40), clip=True)
        .encode(
            x=alt.X("step:Q", scale=alt.Scale(nice=False), title="step of fine-tuning"),
            y=alt.Y("value:Q", title=label, scale=alt.Scale(zero=False)),
            color=alt.Color("strength:N", sort=names, scale=colours, legend=legend),
            shape=alt.Shape("strength:N", sort=names, scale=shapes, legend=legend),
            tooltip=["decay:Q", "step:Q", "value:Q"],
        )
        .add_params(*menus)
        .properties(height=300)
    )  # fmt: skip


def _strengths(records: list[Record]) -> list[str]:
    """Name each rank by the decays that have it, from weak to strong."""
    found = {(r["optimizer"], r["rank"]): f"{r['decay']:g}" for r in records}
    ranks = sorted({rank for _, rank in found})
    return [" / ".join(found[name, rank] for name in NAMES if (name, rank) in found)
            for rank in ranks]  # fmt: skip


def _points(records: list[Record], trajectory: Trajectory, key: str) -> list[Record]:
    """Return the points of all curves."""
    points = []
    strengths = dict(zip(sorted({r["rank"] for r in records}), _strengths(records), strict=True))
    for name in dict.fromkeys((r["optimizer"], r["rate"], r["decay"], r["rank"]) for r in records):
        where = dict(zip(("optimizer", "rate", "decay", "rank"), name, strict=True))
        found = _chosen(records, **where)
        steps = trajectory[f"{found[0]['part']}/{key}.step"]
        mean = np.mean([trajectory[f"{r['part']}/{key}"] for r in found], axis=0)
        points += [
            {**where, "strength": strengths[where["rank"]], "step": float(s), "value": short(v)}
            for s, v in zip(steps, mean, strict=True)
        ]
    return points
