"""One self-contained HTML page from stored results: it renders and computes nothing.

The page holds everything it needs: the style, the charts with their data, the libraries that draw
them (once), and the explorer of R_a. A chart is drawn when the reader comes near it, and before
printing. This module imports nothing of the theory: what an experiment makes of its stored records
(charts, table, verdicts) is handed over as a `Section` by the command line.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from ..._html import page_style
from ._policy import inline, policy

if TYPE_CHECKING:
    from altair import TopLevelMixin

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
    title, paper : str
        The heading, and the figures of the paper.
    verdicts : sequence of (str, str)
        What was asked or measured, and what came out; the main result first.
    result : mapping
        The content of result.json: experiment, hash, config, status, seconds, started, meta.
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
    verdicts: Sequence[tuple[str, str]]
    result: Mapping[str, Any]
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
        css=page_style(),
        claims=_claims(sections),
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
        verdicts=_verdicts(section.verdicts),
        charts="".join(containers),
        table=_folded(_table(section.table, f"Numbers: {section.title}"), len(section.table)),
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


def _claims(sections: Sequence[Section]) -> str:
    """Render the table that a reader sees first: each question, and what came out."""
    rows = []
    for section in sections:
        link = f'<a href="#{section.anchor}">{escape(section.title)}</a>'
        what, outcome = (section.verdicts or [("", "")])[0]
        said = f"{_signed(what)}: <b>{_signed(outcome)}</b>" if what else ""
        seeds = section.result["config"].get("seeds")
        count = str(len(seeds)) if isinstance(seeds, list | tuple) else ""
        cells = f"<td>{link}</td><td>{escape(section.paper)}</td><td>{said}</td>"
        rows.append(f'<tr>{cells}<td class="number">{count}</td></tr>')
    heads = "".join(f"<th>{head}</th>" for head in ("Question", "Where", "Main result"))
    return (
        f'<table class="claims"><thead><tr>{heads}<th class=number>Seeds</th></tr></thead><tbody>'
        f"{''.join(rows)}</tbody></table>"
    )


def _verdicts(rows: Sequence[tuple[str, str]]) -> str:
    """Render what a run shows: a question and an outcome a row."""
    cells = (f"<tr><th scope=row>{_signed(a)}</th><td>{_signed(b)}</td></tr>" for a, b in rows)
    return f'<table class="verdicts"><tbody>{"".join(cells)}</tbody></table>' if rows else ""


def _signed(text: str) -> str:
    """Escape a text, with the minus sign in its numbers, behind which no line breaks."""
    return escape(re.sub(r"-(?=\d)", "−", text))


def _responsive(spec: dict[str, Any], caption: str) -> dict[str, Any]:
    """Let a single or layered chart take the width of its container; others keep their own.

    Screen readers read the caption as the chart's name. Colours of text, axes and legends come from
    the page's style, which knows dark screens and paper.
    """
    across = {"labelFlush": False, "labelSeparation": 8}  # the ends of an axis run into no label
    look = {"font": "system-ui, sans-serif", "background": "transparent", "axisX": across}
    spec = {**_compact(spec), "description": caption}
    spec["config"] = {**spec.get("config", {}), **look}
    if spec.get("mark", {}).get("type") == "image":  # pictures keep their size, and would overlap
        return spec
    single = "mark" in spec or "layer" in spec
    faceted = any(channel in spec.get("encoding", {}) for channel in ("row", "column", "facet"))
    if single and not faceted:
        return {**spec, "width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    return spec


def _compact(value: Any) -> Any:
    """Return a specification whose data are columns, texts written once; charts.js unfolds them."""
    if isinstance(value, list):
        return [_compact(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    rows = value.get("values")
    if set(value) == {"values"} and isinstance(rows, list) and len(rows) > 8:
        return {"columns": _columns(rows)} if _alike(rows) else value
    return {key: _compact(entry) for key, entry in value.items()}


def _alike(rows: list[Any]) -> bool:
    """Return whether rows are of plain values under the same names."""
    names = set(rows[0]) if isinstance(rows[0], dict) else None
    return all(
        isinstance(row, dict)
        and set(row) == names
        and not any(isinstance(entry, dict | list) for entry in row.values())
        for row in rows
    )


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the columns of rows; one of texts as its different texts, and their places."""
    found: dict[str, Any] = {}
    for name in rows[0]:
        column = [row[name] for row in rows]
        if all(isinstance(entry, str) for entry in column):
            texts = {text: place for place, text in enumerate(dict.fromkeys(column))}
            found[name] = {"texts": list(texts), "at": [texts[text] for text in column]}
        else:
            found[name] = [_whole(entry) for entry in column]
    return found


def _whole(value: Any) -> Any:
    """Return a number without the zero behind its point, which JSON would carry."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _table(rows: Sequence[Mapping[str, Any]], label: str) -> str:
    """Render rows as a table whose numbers have the same digits behind the point."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return ""
    numeric = {c for c in columns if all(_is_number(row.get(c)) for row in rows)}
    forms = {c: _form([row.get(c) for row in rows]) for c in numeric}
    head = _cells("th", ((c, c in numeric) for c in columns))
    body = (
        _cells("td", ((_shown(row.get(c), forms.get(c, "")), c in numeric) for c in columns))
        for row in rows
    )
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{escape(label)}"><table><thead>'
        f"<tr>{head}</tr></thead><tbody>"
        + "".join(f"<tr>{cells}</tr>" for cells in body)
        + "</tbody></table></div>"
    )


def _form(column: Sequence[Any]) -> str:
    """Return how the numbers of a column are written: as many digits as the largest needs.

    Examples
    --------
    >>> _form([1.5, 0.25, None]), _form([2, 30]), _form([1.0, 1e-7])
    ('.3f', '.0f', '.2e')
    """
    if all(v is None or (float(v).is_integer() and abs(v) < 1e7) for v in column):
        return ".0f"
    sizes = [abs(v) for v in column if v and math.isfinite(v)]
    if not sizes:
        return ".4g"
    low, high = (math.floor(math.log10(size)) for size in (min(sizes), max(sizes)))
    if high > 6 or high - low > 3 or low < -4:
        return ".2e"
    return f".{max(0, 3 - high)}f"


def _cells(tag: str, cells: Iterable[tuple[str, bool]]) -> str:
    """Render the cells of one row."""
    return "".join(
        f"<{tag}{' class=number' if number else ''}>{escape(text)}</{tag}>"
        for text, number in cells
    )


def _is_number(value: Any) -> bool:
    """Whether a cell aligns to the right; an empty one does not decide."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _shown(value: Any, form: str = "") -> str:
    """Write a cell; zero and what is not finite keep their short form."""
    if value is None:
        return ""
    if not _is_number(value) or value == 0 or not math.isfinite(value):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{value:{form or '.4g'}}" if form or isinstance(value, float) else str(value)


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
