"""Figures of adapters by rank: from the start, truncated at the end, truncated on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...framework.contract import Record, Trajectory, Verdict
from ...framework.drawing import DASHES, MARKERS, short, zoomable
from ._study import interval, values

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["against_the_start", "draw_figure", "make_charts", "rows", "verdicts"]

# Way and decay, how the page calls them, and their colours.
WAYS = {
    ("from the start", "none"): "from the start",
    ("on the way", "none"): "truncated on the way",
    ("at the end", "none"): "truncated, no decay",
    ("at the end", "constant"): "truncated, decay kept",
    ("at the end", "off"): "truncated, decay off",
}
COLOURS = ("#000000", "#009E73", "#0072B2", "#E69F00", "#CC79A7")
DECAYS = {"none": "no decay", "constant": "decay kept", "off": "decay switched off"}


def _ranks(records: Sequence[Record]) -> list[int]:
    """Return the ranks that adapters are cut to, the highest first."""
    return sorted({r["rank"] for r in records if r["way"] != "whole"}, reverse=True)


def _losses(records: Sequence[Record], way: tuple[str, str], rank: int) -> list[float]:
    """Return the losses of a way to a rank, by seed."""
    return values(records, "loss", way=way[0], kind=way[1], rank=rank)


def against_the_start(records: Sequence[Record], way: tuple[str, str], rank: int) -> list[float]:
    """Return how far each seed ends above the adapter that had the rank from the start."""
    direct = _losses(records, ("from the start", "none"), rank)
    return [a - b for a, b in zip(_losses(records, way, rank), direct, strict=True)]


def _said(numbers: Sequence[float], form: str) -> str:
    """Write a mean over seeds, with its 95% interval if there are several."""
    mean, width = interval(numbers)
    return f"{mean:{form}}" + (f" ± {width:.1g}" if width > 0 else "")


def _highest(records: Sequence[Record]) -> int:
    """Return the rank that is cut."""
    return next(r["rank"] for r in records if r["way"] == "whole")


# --- In words and numbers -------------------------------------------------------------------------


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Return at which loss each way to each rank ends."""
    whole = ", ".join(
        f"{_said(values(records, 'loss', way='whole', kind=kind), '.4g')} with {name}"
        for kind, name in DECAYS.items()
    )
    seeds = len({r["seed"] for r in records})
    return [
        (f"Rank {_highest(records)}, not truncated, ends at a validation loss of", whole),
        *(row for rank in _ranks(records) for row in _of_rank(records, rank)),
        (
            "What is truncated on the way had no decay, and is trained on to the same number of "
            "steps; differences are taken within a seed",
            f"means over {seeds} seed{'s' * (seeds != 1)}{', 95% intervals' * (seeds > 1)}",
        ),
    ]


def _of_rank(records: Sequence[Record], rank: int) -> list[Verdict]:
    """Compare the ways to one rank with the direct one."""
    direct = ("from the start", "none")
    others = [way for way in WAYS if way != direct]
    gaps = ", ".join(
        f"{_said(against_the_start(records, way, rank), '+.2g')} {WAYS[way]}" for way in others
    )
    best = min(WAYS, key=lambda way: float(np.mean(_losses(records, way, rank))))
    return [
        (
            f"Rank {rank} from the start ends at, and the lowest is",
            f"{_said(_losses(records, direct, rank), '.4g')}; {WAYS[best]}",
        ),
        (f"Against rank {rank} from the start", gaps),
    ]


def rows(records: Sequence[Record]) -> list[Record]:
    """Return a row for each way and rank: means over seeds, and intervals."""
    found: list[Record] = []
    for kind, name in DECAYS.items():
        numbers = values(records, "loss", way="whole", kind=kind)
        found.append(_row(f"not truncated, {name}", _highest(records), numbers, []))
    for rank in _ranks(records):
        for way, name in WAYS.items():
            gaps = [] if way[0] == "from the start" else against_the_start(records, way, rank)
            found.append(_row(name, rank, _losses(records, way, rank), gaps))
    return found


def _row(name: str, rank: int, losses: Sequence[float], gaps: Sequence[float]) -> Record:
    """Return a row of the table."""
    mean, width = interval(losses)
    gap = interval(gaps) if gaps else (None, None)
    return {
        "adapter": name, "rank": rank, "loss": mean, "± 95%": width or None,
        "above this rank from the start": gap[0], "gap ± 95%": gap[1] or None,
    }  # fmt: skip


# --- The figure -----------------------------------------------------------------------------------


def draw_figure(records: Sequence[Record], trajectory: Trajectory) -> Figure:
    """Draw the losses by rank, how far they are above the direct way, and the runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    by_rank, above, runs = figure.subplots(1, 3)
    for number, (way, name) in enumerate(WAYS.items()):
        look = {"color": COLOURS[number], "marker": MARKERS[number], "markersize": 5}
        for axis, numbers in ((by_rank, _losses), (above, against_the_start)):
            _draw_way(axis, records, way, numbers, {**look, "linestyle": DASHES[number % 4]}, name)
    for kind, colour in zip(DECAYS, (COLOURS[i] for i in (2, 3, 4)), strict=True):
        _draw_run(runs, records, trajectory, kind, colour)
    by_rank.set(xlabel="rank", ylabel="validation loss at the end")
    above.set(xlabel="rank", ylabel="above this rank from the start")
    runs.set(xlabel="step", ylabel=f"validation loss at rank {_highest(records)}")
    runs.legend(fontsize=8)
    for axis in (by_rank, above, runs):
        axis.grid(alpha=0.25)
    for axis in (by_rank, above):
        axis.set_xticks(_ranks(records))
    handles, labels = by_rank.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_way(
    axis: Axes, records: Sequence[Record], way: tuple[str, str], numbers: Any,
    look: dict[str, Any], name: str,
) -> None:  # fmt: skip
    """Draw the mean over seeds of one way at each rank, with its interval."""
    ranks = _ranks(records)
    found = [interval(numbers(records, way, rank)) for rank in ranks]
    means, widths = zip(*found, strict=True)
    axis.errorbar(ranks, means, yerr=widths, label=name, capsize=3, **look)


def _draw_run(
    axis: Axes, records: Sequence[Record], trajectory: Trajectory, kind: str, colour: str
) -> None:
    """Draw the runs of the highest rank under one decay: mean over seeds, and range."""
    seeds = sorted({r["seed"] for r in records})
    parts = [f"{kind}-rank{_highest(records)}-seed{seed}" for seed in seeds]
    losses = np.array([trajectory[f"{part}/loss"] for part in parts])
    steps = trajectory[f"{parts[0]}/loss.step"]
    axis.plot(steps, losses.mean(0), color=colour, label=DECAYS[kind])
    axis.fill_between(steps, losses.min(0), losses.max(0), color=colour, alpha=0.15, linewidth=0)


def make_charts(records: Sequence[Record]) -> list[tuple[str, TopLevelMixin]]:
    """Make a chart of the losses by rank."""
    import altair as alt

    names = list(WAYS.values())
    points = [
        {"way": name, "rank": rank, "loss": short(interval(_losses(records, way, rank))[0])}
        for way, name in WAYS.items()
        for rank in _ranks(records)
    ]
    legend = alt.Legend(orient="bottom", columns=1, title=None, symbolSize=120)
    whole = alt.Axis(values=_ranks(records), format="d")
    chart = (
        alt.Chart(alt.Data(values=points), height=300)
        .mark_line(point=alt.OverlayMarkDef(size=55))
        .encode(
            x=alt.X("rank:Q", scale=alt.Scale(padding=12), axis=whole),
            y=alt.Y("loss:Q", title="validation loss at the end", scale=alt.Scale(zero=False)),
            color=alt.Color(
                "way:N", sort=names, scale=alt.Scale(domain=names, range=list(COLOURS)),
                legend=legend,
            ),
            shape=alt.Shape("way:N", sort=names, scale=alt.Scale(domain=names), legend=legend),
            tooltip=["way:N", "rank:Q", "loss:Q"],
        )
    )  # fmt: skip
    caption = "Where each way to a rank ends: validation loss, mean over seeds."
    return [(caption, zoomable(chart))]
