"""Figures of networks trained with decay kept, switched off and halved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...framework.contract import Record, Trajectory, Verdict
from ...framework.drawing import MARKERS, name_band
from ._study import Study, compared, interval, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "KINDS",
    "NONE",
    "RATIO",
    "around",
    "curves",
    "draw_figure",
    "ends",
    "rows",
    "verdicts",
]

KINDS = {
    "constant": "kept",
    "off": "switched off",
    "half": "half of it",
    "budget": "constant, same Σ lr·decay",
    "none": "no decay at all",
    "time": "switched off at another step",
    "hold": "ratio held by closed loop",
    "level": "off when the ratio is level",
}
AGAINST = {
    "constant": "keeping it",
    "half": "half of it",
    "budget": "the constant one of equal budget",
    "none": "no decay at all",
}
RATIO = "mean nuclear / Frobenius norm"
# Colour by family and kind, lightness falling from what is kept to what is halved.
COLOURS = (("#7F3C00", "#E66100", "#F5B27A"), ("#00264D", "#0072B2", "#7CC0E8"))
SHORT = {"half": " (half)", "budget": " (same budget)", "none": " (none)"}
DRAWN = ("constant", "off", "half")
NONE = "#000000"  # no decay at all belongs to no family
LINES = {"constant": "solid", "off": (0, (5, 1.5)), "half": (0, (1.2, 1.2))}


# --- In words and numbers -------------------------------------------------------------------------


def verdicts(study: Study, records: list[Record]) -> list[Verdict]:
    """Say whether the paper's claim holds in these runs, at equal budget too."""
    found = compared(study, records)
    parts = [row for family in dict.fromkeys(c["family"] for c in found)
             for row in _verdicts(family, found)]  # fmt: skip
    seeds = found[0]["seeds"]
    return [
        *parts,
        ("Best of all runs", _best(study, records)),
        (
            "Gains",
            f"of {study.label}, means over {seeds} "
            f"seed{'s, with 95% intervals of the differences within a seed' * (seeds != 1)}",
        ),
        ("The paper's numbers in the table", f"are for {study.setting}"),
    ]


def _best(study: Study, records: list[Record]) -> str:
    """Name the best of all runs: less decay may be better than any decay switched off."""
    sound = [end for end in ends(study, records) if not end["diverged"]]
    if not sound:
        return "every run has diverged"
    best = max(sound, key=lambda end: study.better * end["mean"])
    return (
        f"decay {best['run']} ({KINDS[best['kind']]}): {best['mean']:.4g} at a ratio of "
        f"{best['ratio']:.3g}"
    )


def _verdicts(family: float, found: list[Record]) -> list[Verdict]:
    """Judge one family; where a run has diverged, a difference says nothing."""
    sound = {c["against"]: c for c in found if c["family"] == family and not c["diverged"]}
    lost = [AGAINST[c["against"]] for c in found if c["family"] == family and c["diverged"]]
    rows = [
        (
            f"Decay {family:g} switched off ends better than kept, and than half of it",
            _judged(sound),
        )
    ]
    rows += [
        (f"Decay {family:g}: gain against {AGAINST[kind]}", _gain(c)) for kind, c in sound.items()
    ]
    if lost:
        note = "runs diverged (their loss ends above its start): nothing follows"
        rows.append((f"Decay {family:g}: against {', '.join(lost)}", note))
    return rows


def _judged(sound: dict[str, Record]) -> str:
    """Say whether the claim holds, by what has not diverged."""
    if not {"constant", "half"} <= set(sound):
        return "cannot be judged"
    judged = [sound["constant"], sound["half"]]
    holds, clear = (all(c[key] for c in judged) for key in ("holds", "clear"))
    unsure = "holds on average" if judged[0]["seeds"] > 1 else "holds in its one seed"
    return ("holds" if clear else unsure) if holds else "does not hold"


def _gain(found: Record) -> str:
    """Write a gain with its interval."""
    return f"{found['gain']:+.2g}" + (f" ± {found['width']:.1g}" if found["seeds"] > 1 else "")


def ends(study: Study, records: list[Record]) -> list[Record]:
    """Return for each run the mean over seeds and its interval."""
    found = []
    for name in dict.fromkeys((r["family"], r["kind"], r["run"]) for r in records):
        where = dict(zip(("family", "kind", "run"), name, strict=True))
        keys = (study.metric, "ratio", "budget", "diverged")
        numbers = {key: values(records, key, **where) for key in keys}
        mean, width = interval(numbers[study.metric])
        found.append({**where, "mean": mean, "width": width, "all": numbers[study.metric],
                      "ratio": interval(numbers["ratio"])[0],
                      "diverged": sum(numbers["diverged"]),
                      "budget": interval(numbers["budget"])[0]})  # fmt: skip
    return found


def rows(study: Study, records: list[Record]) -> list[Record]:
    """Return the rows of the table: a run each, the paper's number beside it."""
    ranks = {family: i for i, family in enumerate(dict.fromkeys(r["family"] for r in records))}
    return [
        {
            "decay": end["run"],
            "what": KINDS[end["kind"]] + _lost(end),
            study.label: end["mean"],
            "± 95%": end["width"] or None,
            "paper (decay)": study.paper.get((ranks[end["family"]], end["kind"]), ""),
            RATIO: end["ratio"],
            "absorbed, −a": end["budget"],
        }
        for end in ends(study, records)
    ]


def _lost(end: Record) -> str:
    """Say how many of a run's seeds diverged."""
    return f" ({end['diverged']} of {len(end['all'])} diverged)" if end["diverged"] else ""


# --- The figure -----------------------------------------------------------------------------------


def draw_figure(study: Study, records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw ratio and metric by step, the ratio by what was absorbed, and the ends of all runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, across, up in (
        (axes[0, 0], "step", "ratio"),
        (axes[0, 1], "step", study.metric),
        (axes[1, 0], "a", "ratio"),
    ):
        _draw_curves(axis, records, trajectory, across, up)
        axis.set_ylabel(study.label if up == study.metric else RATIO)
        axis.set_xlabel("step" if across == "step" else "absorbed decay −a = Σ lr·decay")
    _zoom(axes[0, 1], study, records, trajectory)
    _draw_ends(axes[1, 1], study, records)
    name_band(axes[0, 0])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_curves(
    axis: Axes, records: list[Record], trajectory: Trajectory, across: str, up: str
) -> None:
    """Draw the mean over seeds of the paper's runs, and the range."""
    for rank, family in enumerate(dict.fromkeys(r["family"] for r in records)):
        for kind, colour in zip(DRAWN, COLOURS[rank % 2], strict=True):
            x, y = curves(records, trajectory, family, kind, across, up)
            name = next(r["run"] for r in records if (r["family"], r["kind"]) == (family, kind))
            axis.plot(x, y.mean(0), color=colour, linestyle=LINES[kind], label=f"decay {name}",
                      linewidth=1.8, marker=("", "s")[rank % 2], markersize=4,
                      markevery=max(1, len(x) // 8))  # fmt: skip
            axis.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)
            _mark_switch(axis, records, x, y, family, kind, across, colour)
    axis.grid(alpha=0.25)


def _mark_switch(
    axis: Axes, records: list[Record], x: Any, y: Any, family: float, kind: str, across: str,
    colour: str,
) -> None:  # fmt: skip
    """Mark where the decay is switched off."""
    off = next(r["off"] for r in records if (r["family"], r["kind"]) == (family, kind))
    if across == "step" and off is not None:
        axis.plot([off], [np.interp(off, x, y.mean(0))], "o", color=colour, markersize=5)


def curves(
    records: list[Record], trajectory: Trajectory, family: float, kind: str, across: str, up: str
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the points of a run of each seed: (points,), (seeds, points)."""
    keys = [r["part"] for r in records if (r["family"], r["kind"]) == (family, kind)]
    steps = trajectory[f"{keys[0]}/{up}.step"]
    y = np.array([trajectory[f"{key}/{up}"] for key in keys])
    if across == "step":
        return steps, y
    absorbed = [
        np.interp(steps, trajectory[f"{key}/a.step"], trajectory[f"{key}/a"]) for key in keys
    ]
    return -np.mean(absorbed, axis=0), y


def _zoom(axis: Axes, study: Study, records: list[Record], trajectory: Trajectory) -> None:
    """Show the later training: its differences are small beside the beginning's."""
    found = []
    for family in dict.fromkeys(r["family"] for r in records):
        for kind in DRAWN:
            sound = [r for r in records if (r["family"], r["kind"]) == (family, kind)]
            if any(r["diverged"] for r in sound):
                continue
            x, y = curves(records, trajectory, family, kind, "step", study.metric)
            found.append(y[:, x >= 0.3 * x[-1]])
    if found:
        axis.set_ylim(*around(np.concatenate(found, axis=None)))


def around(numbers: Any) -> tuple[float, float]:
    """Return the limits of an axis that holds numbers."""
    low, high = float(np.min(numbers)), float(np.max(numbers))
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _draw_ends(axis: Axes, study: Study, records: list[Record]) -> None:
    """Draw the mean of each run with its interval, and each seed."""
    found = ends(study, records)
    ranks = {family: i for i, family in enumerate(dict.fromkeys(r["family"] for r in records))}
    for place, end in enumerate(found):
        colour = NONE if end["kind"] == "none" else COLOURS[ranks[end["family"]] % 2][1]
        marker = MARKERS[list(KINDS).index(end["kind"]) % len(MARKERS)]
        axis.plot(end["all"], [place] * len(end["all"]), "|", color=colour, markersize=9)
        axis.errorbar([end["mean"]], [place], xerr=[end["width"]], color=colour, marker=marker,
                      capsize=3, markersize=6)  # fmt: skip
    labels = [
        end["run"] + SHORT.get(end["kind"], "") + " diverged" * bool(end["diverged"])
        for end in found
    ]
    axis.set_yticks(range(len(found)), labels, fontsize=8)
    axis.invert_yaxis()
    sound = [value for end in found if not end["diverged"] for value in end["all"]]
    if len(sound) < sum(len(end["all"]) for end in found) and sound:
        axis.set_xlim(*around(sound))  # what has diverged is named, and would hide the others
    axis.set_xlabel(f"{study.label} at the end: mean, 95% interval, seeds")
    axis.set_ylabel("run")
    axis.grid(alpha=0.25, axis="x")
