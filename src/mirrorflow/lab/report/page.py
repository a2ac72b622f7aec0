"""One self-contained HTML page from stored results: it renders and computes nothing.

The page holds everything it needs: the style, the charts with their data, the libraries that draw
them (once), the figures as SVG for print, and the explorer of R_a. This module imports nothing of
the theory: what an experiment makes of its stored records (figure, charts, table, summary) is
handed over as a `Section` by the command line.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from ._policy import inline, policy

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure

__all__ = ["Section", "build"]

LONG = 40  # rows of a table that are shown without a click
# Of result.json, which may be a stranger's: what the page reads, and the form of what names it.
FIELDS: dict[str, tuple[type, ...]] = {
    "experiment": (str,), "hash": (str,), "status": (str,), "started": (str,),
    "seconds": (int, float), "config": (Mapping,), "meta": (Mapping,),
}  # fmt: skip
FORMS = {"experiment": re.compile(r"[a-z0-9_]{1,80}"), "hash": re.compile(r"[0-9a-f]{1,64}")}
MARK = 'document.documentElement.classList.add("scripted");'  # at once: the style depends on it


@dataclass(frozen=True)
class Section:
    """What the page shows of one stored run.

    Attributes
    ----------
    title, paper, summary : str
        The heading, the figures of the paper, and what the run shows in two sentences.
    result : mapping
        The content of result.json: experiment, hash, config, status, seconds, started, meta.
    figure : matplotlib Figure
        The static figure, for print and for readers without JavaScript.
    charts : sequence of (caption, altair chart)
        The interactive ones.
    table : sequence of dict
        The numbers; the keys of the rows name the columns.
    command : str
        The command that makes this run.

    Raises
    ------
    ValueError
        If the result lacks a field, or its experiment or hash has not the form of one.
    """

    title: str
    paper: str
    summary: str
    result: Mapping[str, Any]
    figure: Figure
    charts: Sequence[tuple[str, TopLevelMixin]]
    table: Sequence[Mapping[str, Any]]
    command: str

    def __post_init__(self) -> None:
        """Refuse what would be more than a name in the page, and what is not there."""
        for key, kind in FIELDS.items():
            if isinstance(value := self.result.get(key), bool) or not isinstance(value, kind):
                what = " or ".join(one.__name__ for one in kind)
                raise ValueError(f"{key} must be {what}, got {value!r:.80}. Run it again.")
        for key, form in FORMS.items():
            if not form.fullmatch(value := self.result[key]):
                raise ValueError(f"{key} must match {form.pattern}, got {value!r:.80}.")

    @property
    def anchor(self) -> str:
        """The id of the section in the page."""
        return f"{self.result['experiment']}-{self.result['hash'][:12]}"


def build(sections: Sequence[Section], output: str | Path, version: str) -> Path:
    """Write the page to a file, replacing it in one step.

    Parameters
    ----------
    sections : sequence of Section
        In the order of the page.
    output : path
        The HTML file; its folder is created.
    version : str
        The version of mirrorflow that is named on the page.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    ValueError
        If a section cannot be drawn from its records; the message names it.
    """
    return _written(_page(sections, version), output)


def _written(page: str, output: str | Path) -> Path:
    """Write a page to a file, replacing it in one step."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        draft.write_text(page, encoding="utf-8", errors="replace")  # JSON may hold half characters
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)  # the disk may be full
    return output


def _page(sections: Sequence[Section], version: str) -> str:
    """Render the page as one string of HTML."""
    specs: dict[str, Any] = {}
    bodies = [_drawn(section, specs) for section in sections]
    scripts = [_charts_script(), _resource("explorer.js")]
    return _fill(
        "template.html",
        policy=escape(policy([MARK, *scripts])),
        mark=MARK,
        version=escape(version),
        css=_resource("page.css"),
        index="\n".join(f'<li><a href="#{s.anchor}">{escape(s.title)}</a></li>' for s in sections),
        sections="\n".join(bodies),
        scripts=f"{_data(specs)}\n{inline(scripts)}",
    )


def _drawn(section: Section, specs: dict[str, Any]) -> str:
    """Render a section, or say whose records cannot be drawn."""
    try:
        return _section(section, specs)
    except ImportError:
        raise
    except Exception as error:  # matplotlib and altair have many for numbers that are none
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise ValueError(f"{section.anchor} cannot be drawn: {reason}. Run it again.") from error


def _section(section: Section, specs: dict[str, Any]) -> str:
    """Render a section, and add its charts to ``specs`` under the ids of their containers."""
    containers = []
    for number, (caption, chart) in enumerate(section.charts):
        key = f"{section.anchor}-chart{number}"
        specs[key] = _responsive(chart.to_dict(), caption)
        containers.append(_fill("chart.html", id=key, caption=escape(caption)))
    return _fill(
        "section.html",
        anchor=section.anchor,
        title=escape(section.title),
        paper=escape(section.paper),
        summary=escape(section.summary),
        charts="".join(containers),
        figure=_svg(section.figure, section.anchor, section.title),
        table=_folded(_table(section.table), len(section.table)),
        command=escape(section.command),
        config=escape(_settings(section.result["config"])),
        provenance="<br>".join(escape(line) for line in _provenance(section.result)),
    )


def _settings(config: Mapping[str, Any]) -> str:
    """Write a configuration as JSON, a line for each setting: lists take no page of print."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in config.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def _folded(table: str, rows: int) -> str:
    """Close a table that would take screens; it is printed all the same."""
    if rows <= LONG:
        return table
    return f"<details><summary>The table: {rows} rows</summary>{table}</details>"


def _responsive(spec: dict[str, Any], caption: str) -> dict[str, Any]:
    """Let a single or layered chart take the width of its container; others keep their own.

    Screen readers read the caption as the chart's name.
    """
    across = {"labelFlush": False, "labelSeparation": 8}  # the ends of an axis run into no label
    look = {"font": "system-ui, sans-serif", "background": "white", "axisX": across}
    spec = {**spec, "description": caption, "config": {**spec.get("config", {}), **look}}
    if spec.get("mark", {}).get("type") == "image":  # pictures keep their size, and would overlap
        return spec
    single = "mark" in spec or "layer" in spec
    faceted = any(channel in spec.get("encoding", {}) for channel in ("row", "column", "facet"))
    if single and not faceted:
        return {**spec, "width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    return spec


def _svg(figure: Figure, name: str, label: str) -> str:
    """Render a figure as SVG that scales with the page; ``name`` keeps its ids apart."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r'^<svg (.*?)width="\S+" ', r"<svg \1", text[text.index("<svg") :], count=1)
    return f'<svg role="img" aria-label="{escape(label)}" {text.removeprefix("<svg ")}'


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Render rows as a table whose numbers align to the right."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return ""
    numeric = {c for c in columns if all(_is_number(row.get(c)) for row in rows)}
    head = _cells("th", ((c, c in numeric) for c in columns))
    body = (_cells("td", ((_shown(row.get(c)), c in numeric) for c in columns)) for row in rows)
    return (
        f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>'
        + "".join(f"<tr>{cells}</tr>" for cells in body)
        + "</tbody></table></div>"
    )


def _cells(tag: str, cells: Iterable[tuple[str, bool]]) -> str:
    """Render the cells of one row."""
    return "".join(
        f"<{tag}{' class=number' if number else ''}>{escape(text)}</{tag}>"
        for text, number in cells
    )


def _is_number(value: Any) -> bool:
    """Whether a cell aligns to the right; an empty one does not decide."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _shown(value: Any) -> str:
    """Write a cell: four digits are what a reader compares."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _provenance(result: Mapping[str, Any]) -> list[str]:
    """Say when, how long, on what and with which versions a run was made."""
    lines = [
        f"{result['status']}; started {result['started']}, {result['seconds']:.1f} s; "
        f"result {result['hash']}"
    ]
    for key, value in result["meta"].items():
        pairs = isinstance(value, Mapping)
        lines.append(
            f"{key}: {', '.join(f'{k} {v}' for k, v in value.items()) if pairs else value}"
        )
    return lines


def _data(specs: Mapping[str, Any]) -> str:
    """Return what charts draw, as an element that is read and never run."""
    data = json.dumps(specs, separators=(",", ":")).replace("<", "\\u003c")  # no </script> inside
    return f'<script type="application/json" id="charts">{data}</script>'


def _charts_script() -> str:
    """Return the script that draws the charts, with the libraries."""
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.split(".")[:2])
    # Its stub asks for a snippet; without one it makes vegaEmbed global, which charts.js uses.
    libraries = vl_convert.javascript_bundle(vl_version=version)  # pyright: ignore[reportCallIssue]
    return f"{libraries}\n{_resource('charts.js')}"


def _fill(name: str, **values: str) -> str:
    """Fill a template of this folder; a name without a value is an error."""
    return Template(_resource(name)).substitute(values)


def _resource(name: str) -> str:
    """Read a file of this folder."""
    return resources.files("mirrorflow.lab.report").joinpath(name).read_text(encoding="utf-8")
