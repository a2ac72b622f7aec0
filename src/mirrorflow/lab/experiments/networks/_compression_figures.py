"""Figures of what truncation costs over the decay that was absorbed."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from ...framework.contract import Record, Verdict
from ...framework.drawing import DASHES, emphasized, name_band, short, zoomable
from ._study import interval, values

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["costs", "draw_figure", "make_charts", "rows", "verdicts"]

KINDS = {"constant": "kept", "off": "switched off"}
PANELS = {
    "loss": "validation loss, as truncated",
    "after": "validation loss after {}",
    "ratio": "mean nuclear / Frobenius norm of a head",
}
ACROSS = "absorbed decay −a = Σ lr·decay"


def _arms(records: Sequence[Record]) -> list[tuple[float, str]]:
    """Return a and kind of the runs, the one without decay first."""
    found = dict.fromkeys((r["absorbed"], r["kind"]) for r in records)
    return sorted(found, key=lambda arm: (-arm[0], arm[1]))


def _parts(records: Sequence[Record]) -> list[float]:
    """Return the parts of the ranks that are kept, 1 first."""
    return sorted({r["kept"] for r in records}, reverse=True)


def _name(part: float) -> str:
    """Write a part of the ranks."""
    return "not truncated" if part == 1 else f"{Fraction(part).limit_denominator(64)} of the ranks"


def costs(records: Sequence[Record], part: float, key: str = "loss", **where: Any) -> list[float]:
    """Return by how much a truncated model's loss is above the loss of the same model before."""
    cut, whole = (values(records, key, kept=kept, **where) for kept in (part, 1.0))
    return [a - b for a, b in zip(cut, whole, strict=True)]


def _said(numbers: Sequence[float], form: str = ".3g") -> str:
    """Write a mean over seeds, with its 95% interval if there are several."""
    mean, width = interval(numbers)
    return f"{mean:{form}}" + (f" ± {width:.1g}" if width > 0 else "")


# --- In words and numbers -------------------------------------------------------------------------


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Return what the cuts cost, which decay ends best, and what switching off changes."""
    sound = [r for r in records if not r["diverged"]]
    seeds = len({r["seed"] for r in records})
    lost = len({r["part"] for r in records}) - len({r["part"] for r in sound})
    parts = [p for p in _parts(records) if p < 1]
    found = [row for part in parts for row in _of_cut(sound, part)]
    found.append(("Decay switched off against kept, at the same a", _of_switching(sound, parts)))
    found += _of_decay(sound)
    found.append(
        (
            "Losses are of validation; differences are taken within a seed",
            f"means over {seeds} seed{'s' * (seeds != 1)}{', 95% intervals' * (seeds > 1)}",
        )
    )
    return [*found, *([("Runs that diverged and are left out", str(lost))] if lost else [])]


def _of_cut(records: Sequence[Record], part: float) -> list[Verdict]:
    """Return what a cut costs without decay and with most, and which decay ends best after it."""
    arms = _arms(records)
    none, most = (costs(records, part, absorbed=arms[i][0], kind=arms[i][1]) for i in (0, -1))
    best, after = (_lowest(records, part, key) for key in ("loss", "after"))
    return [
        (
            f"With {_name(part)} of each head's QKᵀ and VO kept the loss rises",
            f"by {_said(none)} without decay, by {_said(most)} at a = {arms[-1][0]:g}",
        ),
        (f"The loss with {_name(part)} kept is", best),
        (f"The loss with {_name(part)} kept after {_more(records)} is", after),
    ]


def _lowest(records: Sequence[Record], part: float, key: str) -> str:
    """Say at which a a loss is lowest, and what it is there and without decay."""
    best, none = _best(records, part, key), _arms(records)[0]
    low, without = (
        _said(values(records, key, kept=part, absorbed=a, kind=kind), ".4g")
        for a, kind in (best, none)
    )
    return f"lowest at a = {best[0]:g} ({low}; without decay {without})"


def _more(records: Sequence[Record]) -> str:
    """Write how many steps are taken after a cut."""
    return f"{100 * records[0]['more']:g}% more steps"


def _best(records: Sequence[Record], part: float, key: str) -> tuple[float, str]:
    """Return the run of lowest mean loss."""
    return min(
        _arms(records),
        key=lambda arm: np.mean(values(records, key, kept=part, absorbed=arm[0], kind=arm[1])),
    )


def _of_switching(records: Sequence[Record], parts: Sequence[float]) -> str:
    """Compare the decay that is kept with the one that is switched off, at the same a."""
    pairs = [_switched(records, part, a) for part in parts for a in _decays(records)]
    if not pairs:
        return "cannot be compared"
    found = [interval(pair) for pair in pairs]
    better = sum(mean < -width < 0 for mean, width in found)
    worse = sum(mean > width > 0 for mean, width in found)
    largest = max(found, key=lambda pair: abs(pair[0]))
    return (
        f"ends clearly lower after {better} and clearly higher after {worse} of {len(found)} cuts; "
        f"the largest difference is {largest[0]:+.2g}"
    )


def _of_decay(records: Sequence[Record]) -> list[Verdict]:
    """Return what decay alone does to the loss, at the largest a that both kinds have come to."""
    if not (decays := _decays(records)):
        return []
    none = values(records, "loss", kept=1.0, absorbed=0.0)
    said = []
    for kind, name in KINDS.items():
        found = values(records, "loss", kept=1.0, absorbed=min(decays), kind=kind)
        gaps = [x - y for x, y in zip(found, none, strict=True)]
        said.append(f"{_said(gaps, '+.2g')} ({name})")
    return [(f"Before any cut, a = {min(decays):g} ends, from no decay", " and ".join(said))]


def _decays(records: Sequence[Record]) -> list[float]:
    """Return each a that every seed has come to in both ways."""
    seeds: dict[tuple[float, str], set[int]] = {}
    for record in records:
        seeds.setdefault((record["absorbed"], record["kind"]), set()).add(record["seed"])
    return [
        a for a, kind in seeds if kind == "off" and seeds[a, kind] == seeds.get((a, "constant"))
    ]


def _switched(records: Sequence[Record], part: float, a: float) -> list[float]:
    """Return for each seed the loss of decay switched off, minus the loss of decay kept."""
    off, on = (
        values(records, "loss", kept=part, absorbed=a, kind=kind) for kind in ("off", "constant")
    )
    return [x - y for x, y in zip(off, on, strict=True)]


def rows(records: Sequence[Record]) -> list[Record]:
    """Return a row for each a and kind: means over seeds, and intervals of the costs."""
    found = []
    for a, kind in _arms(records):
        where = {"absorbed": a, "kind": kind}
        runs = [r for r in records if (r["absorbed"], r["kind"], r["kept"]) == (a, kind, 1.0)]
        lost = sum(r["diverged"] for r in runs)
        row: Record = {
            "a": a,
            "decay": KINDS.get(kind, "none") + f" ({lost} of {len(runs)} diverged)" * bool(lost),
        }
        row["loss"], width = interval(values(records, "loss", kept=1.0, **where))
        row["loss ± 95%"] = width or None
        for part in _parts(records):
            if part == 1:
                continue
            short_name = str(Fraction(part).limit_denominator(64))
            row[f"cost of {short_name}"], width = interval(costs(records, part, **where))
            row[f"cost of {short_name} ± 95%"] = width or None
        for part in _parts(records):
            cut = "whole" if part == 1 else str(Fraction(part).limit_denominator(64))
            row[f"{cut}, after more"] = interval(values(records, "after", kept=part, **where))[0]
        row["ratio"] = interval(values(records, "ratio", kept=1.0, **where))[0]
        found.append(row)
    return found


# --- The figure -----------------------------------------------------------------------------------


def draw_figure(records: Sequence[Record]) -> Figure:
    """Draw the losses over a, as truncated and after more steps, and the ratio."""
    from matplotlib.figure import Figure

    sound = [r for r in records if not r["diverged"]]
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (key, label) in zip(axes, PANELS.items(), strict=True):
        parts = [1.0] if key == "ratio" else _parts(records)
        for number, part in enumerate(parts):
            colour = emphasized(len(_parts(records)))[number]
            for kind in KINDS:
                _draw_curve(axis, sound, key, part, kind, colour, DASHES[number % len(DASHES)])
        axis.set(xlabel=ACROSS, ylabel=label.format(_more(records)))
        axis.grid(alpha=0.25)
    name_band(axes[0])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_curve(
    axis: Axes, records: Sequence[Record], key: str, part: float, kind: str, colour: str, dash: Any
) -> None:
    """Draw the mean over seeds of one cut, and the range; both kinds begin without decay."""
    arms = [arm for arm in _arms(records) if arm[1] in (kind, "none")]
    numbers = [values(records, key, kept=part, absorbed=a, kind=k) for a, k in arms]
    x = [-a for a, _ in arms]
    off = kind == "off"
    axis.plot(
        x, [np.mean(found) for found in numbers], color=colour, linestyle=dash,
        linewidth=0.9 if off else 1.8, marker="s" if off else "o", markersize=6 if off else 5,
        markerfacecolor="none" if off else colour, label=f"{_name(part)}, decay {KINDS[kind]}",
    )  # fmt: skip
    low, high = ([f(found) for found in numbers] for f in (min, max))
    axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def make_charts(records: Sequence[Record]) -> list[tuple[str, TopLevelMixin]]:
    """Make a chart of the losses as truncated, and one after more steps."""
    return [
        (
            f"{label[0].upper()}{label[1:]}, over the decay that was absorbed; mean over seeds.",
            zoomable(_chart(records, key, label)),
        )
        for key in ("loss", "after")
        for label in [PANELS[key].format(_more(records))]
    ]


def _chart(records: Sequence[Record], key: str, label: str) -> Any:
    """Draw a loss over a, a line for each cut and kind."""
    import altair as alt

    sound, parts = [r for r in records if not r["diverged"]], _parts(records)
    points = [
        {"kept": _name(part), "decay": KINDS[kind], "absorbed": -a,
         "loss": short(np.mean(values(sound, key, kept=part, absorbed=a, kind=k)))}
        for part in parts
        for kind in KINDS
        for a, k in _arms(sound)
        if k in (kind, "none")
    ]  # fmt: skip
    names = [_name(part) for part in parts]
    legend = alt.Legend(orient="bottom", columns=2, title=None, symbolSize=120)
    kinds = alt.Legend(orient="top", columns=2, title=None, symbolSize=120)
    colours = alt.Scale(domain=names, range=emphasized(len(names)))
    shapes = alt.Scale(domain=list(KINDS.values()), range=["circle", "square"])
    dashes = alt.Scale(domain=list(KINDS.values()), range=[[1, 0], [5, 3]])
    return (
        alt.Chart(alt.Data(values=points), height=320)
        .mark_line(point=alt.OverlayMarkDef(size=55))
        .encode(
            x=alt.X("absorbed:Q", title=ACROSS, scale=alt.Scale(padding=12)),
            y=alt.Y("loss:Q", title=label, scale=alt.Scale(zero=False, padding=10)),
            color=alt.Color("kept:N", sort=names, scale=colours, legend=legend),
            strokeDash=alt.StrokeDash("decay:N", scale=dashes, legend=kinds),
            shape=alt.Shape("decay:N", scale=shapes, legend=kinds),
            tooltip=["kept:N", "decay:N", "absorbed:Q", "loss:Q"],
        )
    )
