"""One self-contained HTML page of the spectra that an audit of a checkpoint has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ._policy import inline, policy
from .page import (
    MARK,
    _charts_script,
    _data,
    _fill,
    _resource,
    _responsive,
    _table,
    _written,
)

__all__ = ["audit_page"]

SHOWN = ("ratio", "effective_rank", "stable_rank", "nuclear", "frobenius", "gap", "imbalance")
CHARTS = {"ratio": "nuclear / Frobenius norm", "effective_rank": "effective rank"}
HEADS = {"place": "no.", "frobenius": "Frobenius"}
COLOURS = ["#0072B2", "#B34700", "#009E73", "#7A3E9D"]


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
    rows = _rows(content["records"])
    specs = {f"audit-{key}": _chart(rows, key, label) for key, label in CHARTS.items()}
    script = _charts_script()
    page = _fill(
        "audit.html",
        policy=escape(policy([MARK, script])),
        mark=MARK,
        version=escape(version),
        css=_resource("page.css"),
        source=escape(source),
        lead=escape(_lead(content)),
        charts="".join(
            _fill("chart.html", id=f"audit-{key}", caption=escape(_caption(label)))
            for key, label in CHARTS.items()
        ),
        table=_table(
            [{HEADS.get(k, k.replace("_", " ")): v for k, v in r.items()} for r in rows],
            f"Spectra of {source}",
        ),
        remarks=_remarks(content["skipped"]),
        scripts=f"{_data(specs)}\n{inline([script])}",
    )
    return _written(page, output)


def _caption(label: str) -> str:
    """Say what a chart shows."""
    what = f"{label[0].upper()}{label[1:]} of each product"
    return f"{what}, numbered as in the table, in the order of the checkpoint."


def _rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each product: its name, what it is, its numbers."""
    rows = []
    for place, record in enumerate(records, 1):
        head = "" if record["head"] is None else f" head {record['head']}"
        adapter = f" [{record['adapter']}]" if record["adapter"] else ""
        values = " V-O" if record["kind"] == "value-output" else ""
        rows.append(
            {
                "place": place,
                "product": f"{record['name']}{values}{adapter}{head}",
                "kind": record["kind"],
                "inner dimension": record["shape"][1],
                "status": record["status"],
                **{key: record[key] for key in SHOWN},
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
    return f"{'; '.join(parts)}."


def _defined(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["status"] == "ok"]


def _chart(rows: Sequence[Mapping[str, Any]], key: str, label: str) -> dict[str, Any]:
    """Draw a number of each product, in the order of the checkpoint."""
    import altair as alt

    legend = alt.Legend(orient="bottom", columns=2)
    chart = (
        alt.Chart(alt.Data(values=[dict(row) for row in _defined(rows)]))
        .mark_point(filled=True, size=45)
        .encode(
            x=alt.X("place:Q", title="number of the product",
                    scale=alt.Scale(nice=False, zero=False, padding=8),
                    axis=alt.Axis(tickMinStep=1, format="d")),
            y=alt.Y(f"{key}:Q", title=label, scale=alt.Scale(zero=False, padding=8)),
            color=alt.Color("kind:N", scale=alt.Scale(range=COLOURS), legend=legend),
            shape=alt.Shape("kind:N", legend=legend),
            tooltip=["product:N", *(alt.Tooltip(f"{name}:Q", format=".4g") for name in SHOWN)],
        )
        .properties(height=260)
    )  # fmt: skip
    return _responsive(chart.to_dict(), _caption(label))


def _remarks(skipped: Sequence[Mapping[str, str]]) -> str:
    """List what was not measured."""
    if not skipped:
        return ""
    items = "".join(f"<li>{escape(s['name'])}: {escape(s['reason'])}</li>" for s in skipped)
    return f"<p>Not measured:</p><ul>{items}</ul>"
