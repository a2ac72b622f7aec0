"""One self-contained HTML page of the spectra that an audit of a checkpoint has found."""

from __future__ import annotations

import os.path
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..._html import page_style
from ._policy import inline, policy
from .page import (
    MARK,
    _charts_script,
    _data,
    _fill,
    _responsive,
    _table,
    _written,
)

__all__ = ["audit_page"]

NUMBERS = {  # of a record, and the heads of their columns
    "ratio": "ratio", "random_ratio": "random", "highest_ratio": "at most",
    "effective_rank": "effective rank", "stable_rank": "stable rank", "rank_90": "90%",
    "rank_95": "95%", "rank_99": "99%", "nuclear": "nuclear", "frobenius": "Frobenius",
    "gap": "gap", "imbalance": "imbalance",
}  # fmt: skip
OTHER = {"ratio_other": "ratio, other", "ratio_change": "change of the ratio",
         "effective_rank_change": "change of the effective rank"}  # fmt: skip
HEAT = (
    "The ratio of each head over the ratio of random factors of its shape, layer by layer: dark "
    "is low."
)
CHARTS = {"ratio": "nuclear / Frobenius norm", "effective_rank": "effective rank"}
HEADS = {"place": "no.", "inner": "r", **NUMBERS, **OTHER}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#9457B8"]
ROW = 16  # pixels of a layer in the heat map


def audit_page(content: Mapping[str, Any], source: str, output: str | Path, version: str) -> Path:
    """Write the page of a measurement.

    Parameters
    ----------
    content : mapping
        ``Measurement.to_dict()``.
    source : str
        What was measured, as the page calls it.
    output : path
        The HTML file; its folder is created.
    version : str
        The version of mirrorflow that is named on the page.

    Returns
    -------
    Path
        Of the page.
    """
    rows = _rows(content["records"], content.get("comparison"))
    alike = {key for key in ("kind", "status") if len({row[key] for row in rows}) == 1}
    hidden = {"layer", "head"} | alike  # in the product's name, or the same for all
    charts = {
        f"audit-{key}": (_caption(label), _chart(rows, key, label)) for key, label in CHARTS.items()
    }
    if any(row["head"] is not None for row in _defined(rows)):
        charts = {"audit-heads": (HEAT, _heat_map(rows)), **charts}
    specs = {key: _responsive(chart.to_dict(), caption) for key, (caption, chart) in charts.items()}
    script = _charts_script()
    page = _fill(
        "audit.html",
        policy=escape(policy([MARK, script])),
        mark=MARK,
        version=escape(version),
        css=page_style(),
        source=escape(source),
        lead=escape(_lead(content)),
        charts="".join(
            _fill("chart.html", id=key, caption=escape(caption))
            for key, (caption, _) in charts.items()
        ),
        table=_table(
            [{HEADS.get(k, k): v for k, v in row.items() if k not in hidden} for row in rows],
            f"Spectra of {source}",
        ),
        remarks=_notes(content["records"]) + _remarks(content["skipped"]),
        scripts=f"{_data(specs)}\n{inline([script])}",
    )
    return _written(page, output)


def _caption(label: str) -> str:
    """Say what a chart shows."""
    what = f"{label[0].upper()}{label[1:]} of each product"
    return f"{what}, numbered as in the table, in the order of the checkpoint."


def _rows(
    records: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Return a row for each product: its name, what it is, its numbers, those of the other."""
    others = {row["product"]: row for row in (comparison or {}).get("products", ())}
    rows = []
    for place, record in enumerate(records, 1):
        head = "" if record["head"] is None else f" head {record['head']}"
        adapter = f" [{record['adapter']}]" if record["adapter"] else ""
        values = " V-O" if record["kind"] == "value-output" else ""
        layer = f"{record['name']}{values}{adapter}"
        other = others.get(f"{layer}{head}", {})
        rows.append(
            {
                "place": place,
                "product": f"{layer}{head}",
                "layer": layer,
                "head": record["head"],
                "kind": record["kind"],
                "inner": record["shape"][1],
                "status": record["status"],
                **{key: record[key] for key in NUMBERS},
                **({key: other.get(key) for key in OTHER} if comparison else {}),
            }
        )
    return rows


def _lead(content: Mapping[str, Any]) -> str:
    """Say how many products there are, and their means."""
    summary = content["summary"]
    parts = [f"{len(content['records'])} products"]
    if summary["mean_ratio"] is not None:
        parts.append(
            f"mean ratio {summary['mean_ratio']:.4g}, ratio of the mean norms "
            f"{summary['ratio_of_means']:.4g}, mean effective rank "
            f"{summary['mean_effective_rank']:.4g}"
        )
    counts = {"undefined": "are 0 and have no ratio", "not_finite": "hold NaN or infinity"}
    parts += [f"{summary[key]:.0f} {text}" for key, text in counts.items() if summary[key]]
    said = (content.get("comparison") or {}).get("verdict", "")
    notes = [f"{note}." for note in content.get("notes", ())]
    verdict = content.get("verdict", "")
    return " ".join(filter(None, (f"{'; '.join(parts)}.", *notes, verdict, said)))


def _defined(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["status"] == "ok"]


def _heat_map(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Draw each head's ratio over the ratio of random factors, a row for each layer."""
    import altair as alt

    values = [
        {**row, "part": row["ratio"] / row["random_ratio"]}
        for row in _defined(rows) if row["head"] is not None
    ]  # fmt: skip
    layers = list(dict.fromkeys(row["layer"] for row in values))
    scale = alt.Scale(scheme="viridis", domain=_range(values))
    # Names of layers are compared letter by letter, which the rule warns of where names are paths.
    start = len(os.path.commonprefix(layers)) if len(layers) > 1 else 0  # noqa: RUF071
    return (
        alt.Chart(alt.Data(values=values))
        .mark_rect()
        .encode(
            x=alt.X("head:O", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("layer:N", sort=layers, title=None,
                    axis=alt.Axis(labelExpr=f"slice(datum.label, {start})", labelLimit=160)),
            color=alt.Color("part:Q", title="ratio / random", scale=scale,
                            legend=alt.Legend(orient="bottom", format=".2f")),
            tooltip=["product:N", *_tooltips()],
        )
        .properties(height=ROW * len(layers))
    )  # fmt: skip


def _tooltips() -> list[Any]:
    """Return what a point says of its numbers, in d3's formats: ranks are whole."""
    import altair as alt

    forms = {name: "d" if name.startswith("rank_") else ".4~g" for name in NUMBERS}
    return [alt.Tooltip(f"{name}:Q", format=form) for name, form in forms.items()]


def _range(values: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the ends of the colours: from one half to random, or more, lest noise has all hues."""
    parts = [row["part"] for row in values]
    return [min(0.5, *parts), max(1.0, *parts)]


def _chart(rows: Sequence[Mapping[str, Any]], key: str, label: str) -> Any:
    """Draw a number of each product, in the order of the checkpoint."""
    import altair as alt

    legend = alt.Legend(orient="bottom", columns=2)
    return (
        alt.Chart(alt.Data(values=[dict(row) for row in _defined(rows)]))
        .mark_point(filled=True, size=45, opacity=1)
        .encode(
            x=alt.X("place:Q", title="number of the product",
                    scale=alt.Scale(nice=False, zero=False, padding=8),
                    axis=alt.Axis(tickMinStep=1, format="d")),
            y=alt.Y(f"{key}:Q", title=label, scale=alt.Scale(zero=False, padding=8)),
            color=alt.Color("kind:N", scale=alt.Scale(range=COLOURS), legend=legend),
            shape=alt.Shape("kind:N", legend=legend),
            tooltip=["product:N", *_tooltips()],
        )
        .properties(height=260)
    )  # fmt: skip


def _notes(records: Sequence[Mapping[str, Any]]) -> str:
    """List what has to be known of measured products, and of how many."""
    counts = Counter(note for record in records for note in record["notes"])
    if not counts:
        return ""
    items = "".join(f"<li>{count} products: {escape(note)}</li>" for note, count in counts.items())
    return f"<p>To be known:</p><ul>{items}</ul>"


def _remarks(skipped: Sequence[Mapping[str, str]]) -> str:
    """List what was not measured."""
    if not skipped:
        return ""
    items = "".join(f"<li>{escape(s['name'])}: {escape(s['reason'])}</li>" for s in skipped)
    return f"<p>Not measured:</p><ul>{items}</ul>"
