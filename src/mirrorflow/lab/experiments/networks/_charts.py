"""The interactive charts of networks trained with decay kept, switched off and halved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...framework.contract import Record, Trajectory
from ...framework.drawing import short, zoomable
from ._figures import COLOURS, KINDS, NONE, RATIO, around, curves, ends
from ._study import Study

if TYPE_CHECKING:
    from altair import TopLevelMixin

__all__ = ["make_charts"]

# How a run is called in a legend: its name says more than its kind, where it does.
CALLED = {
    "constant": ", kept",
    "half": ", half of it",
    "budget": ", equal budget",
    "none": ", no decay",
}  # fmt: skip
PATTERNS = {
    "constant": [1, 0], "off": [6, 2], "half": [2, 2], "budget": [6, 2, 1, 2],
    "none": [1, 0], "time": [12, 3], "hold": [1, 3], "level": [8, 2, 2, 2, 2, 2],
}  # fmt: skip

# The first decay kept, switched off and halved; no decay at all is the fourth that stands out.
CLAIMED = {(0, "constant"): "#D1440C", (0, "off"): "#2F6FDE", (0, "half"): "#B07D0A"}
GREYS = ("#4F555E", "#757B84", "#989EA7")


def make_charts(
    study: Study, records: list[Record], trajectory: Trajectory
) -> list[tuple[str, TopLevelMixin]]:
    """Make a chart of the ratio and one of the metric, all kinds of runs, and one of the ends."""
    made = []
    for up, label in (("ratio", RATIO), (study.metric, study.label)):
        caption = (
            f"{label[0].upper()}{label[1:]}, mean over seeds; click in the legend to single out"
        )
        chart = _chart(records, trajectory, up, label)
        made.append((f"{caption} a run.", zoomable(chart)))
    ending = f"Where each run ends: its ratio and its {study.label}, mean over seeds."
    if any(r["diverged"] for r in records):
        ending += " Runs that diverged lie outside of it."
    return [*made, (f"{ending}", zoomable(_scatter(study, records)))]


def _chart(records: list[Record], trajectory: Trajectory, up: str, label: str) -> Any:
    """Draw the curves of all runs of one quantity."""
    import altair as alt

    points, runs, lost = [], {}, set()
    for family, kind, run in dict.fromkeys((r["family"], r["kind"], r["run"]) for r in records):
        mine = [r for r in records if (r["family"], r["kind"], r["run"]) == (family, kind, run)]
        x, y = curves(mine, trajectory, family, kind, "step", up)
        name = f"{run}{CALLED.get(kind, '')}"
        runs.setdefault(name, (family, kind))
        if any(r["diverged"] for r in mine):
            lost.add(name)
        absorbed = -np.mean([np.interp(x, trajectory[f"{k}/a.step"], trajectory[f"{k}/a"])
                             for k in (r["part"] for r in mine)], axis=0)  # fmt: skip
        points += [
            {"run": name, "step": float(s), "value": short(v), "absorbed": short(a)}
            for s, v, a in zip(x, y.mean(0), absorbed, strict=True)
        ]
    shown = [p for p in points if p["run"] not in lost] or points
    later = [p["value"] for p in shown if p["step"] >= 0.3 * points[-1]["step"]]
    scale = alt.Scale(zero=False) if up == "ratio" else alt.Scale(domain=around(later), nice=False)
    pick = alt.selection_point(fields=["run"], bind="legend")
    axis = alt.param(
        name=f"across_{up}", value="step",
        bind=alt.binding_select(options=["step", "absorbed"], labels=["step", "absorbed decay −a"],
                                name="horizontal "),
    )  # fmt: skip
    order = list(runs)
    legend = alt.Legend(
        orient="bottom", columns=2, symbolType="stroke", symbolSize=300, title="decay"
    )
    colours = alt.Scale(domain=order, range=_colours(list(runs.values())))
    dashes = alt.Scale(domain=order, range=[PATTERNS[kind] for _, kind in runs.values()])
    return (
        alt.Chart(alt.Data(values=points))
        .transform_calculate(x=f"datum[{axis.name}]")
        .mark_line(point=alt.OverlayMarkDef(size=18), clip=True)
        .encode(
            x=alt.X("x:Q", title="step, or absorbed decay −a, as the menu says",
                    scale=alt.Scale(nice=False)),
            y=alt.Y("value:Q", title=label, scale=scale),
            color=alt.Color("run:N", sort=order, scale=colours, legend=legend),
            strokeDash=alt.StrokeDash("run:N", sort=order, scale=dashes, legend=legend),
            opacity=alt.condition(pick, alt.value(1.0), alt.value(0.12)),
            order="step:Q",
            tooltip=["run:N", "step:Q", "value:Q", "absorbed:Q"],
        )
        .add_params(pick, axis)
        .properties(height=320)
    )  # fmt: skip


def _colours(runs: list[tuple[float, str]]) -> list[str]:
    """Return the colour of each run: the claim's runs stand out, the others take greys in turn."""
    families = list(dict.fromkeys(family for family, _ in runs))
    before = [[f for f, _ in runs[:i]].count(family) for i, (family, _) in enumerate(runs)]
    return [
        NONE if kind == "none" else CLAIMED.get((families.index(family), kind))
        or GREYS[(place + families.index(family)) % 3]
        for (family, kind), place in zip(runs, before, strict=True)
    ]  # fmt: skip


def _scatter(study: Study, records: list[Record]) -> Any:
    """Draw the ends of all runs; those that diverged would hide how the others differ."""
    import altair as alt

    found = ends(study, records)
    shown = [end for end in found if not end["diverged"]] or found
    points = [
        {"run": f"{end['run']} ({KINDS[end['kind']]})",
         "decay": "none" if end["kind"] == "none" else f"{end['family']:g}",
         "kind": KINDS[end["kind"]], "metric": short(end["mean"]), "ratio": short(end["ratio"]),
         "absorbed": short(end["budget"])}
        for end in found
    ]  # fmt: skip
    decays = list(dict.fromkeys(p["decay"] for p in points if p["decay"] != "none"))
    shades = dict(zip(decays, (COLOURS[i % 2][1] for i in range(len(decays))), strict=True))
    shades |= {"none": NONE} if any(p["decay"] == "none" for p in points) else {}
    colours = alt.Scale(domain=list(shades), range=list(shades.values()))
    axes = {
        name: alt.Scale(domain=around([end[key] for end in shown]), nice=False, padding=12)
        for name, key in (("x", "ratio"), ("y", "mean"))
    }
    legend = alt.Legend(orient="bottom", columns=1)  # two beside each other fit a telephone
    return (
        alt.Chart(alt.Data(values=points))
        .mark_point(size=90, filled=True, clip=True)
        .encode(
            x=alt.X("ratio:Q", title=RATIO, scale=axes["x"]),
            y=alt.Y("metric:Q", title=study.label, scale=axes["y"]),
            color=alt.Color("decay:N", sort=list(shades), scale=colours, legend=legend),
            shape=alt.Shape("kind:N", sort=list(KINDS.values()), title="what happens to it",
                            legend=legend),
            tooltip=["run:N", "metric:Q", "ratio:Q", "absorbed:Q"],
        )
        .properties(height=320)
    )  # fmt: skip
