"""Results as tables in notebooks and pages without scripts: every text in them is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

__all__ = ["html_page", "html_table", "page_style"]

MOST = 60  # rows that a notebook shows
# Nothing runs in a page of tables, and nothing is loaded.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)

# A heading, then the heads and rows of a table, or sentences.
Section = tuple[str, Sequence[str], Sequence[Sequence[str]] | Sequence[str]]


def html_table(
    title: str, heads: Sequence[str], rows: Iterable[Sequence[Any]], notes: Iterable[str] = ()
) -> str:
    """Return a title, a table and notes as HTML, for ``_repr_html_``.

    Parameters
    ----------
    title : str
    heads : sequence of str
        Of the columns; empty for none.
    rows : iterable of sequences
        Numbers are written with four digits and stand on the right.
    notes : iterable of str
        Sentences below the table.

    Examples
    --------
    >>> html_table("a < b", [], [["x", 0.123456]])
    '<div><p><b>a &lt; b</b></p><table><tr><td style="text-align:left">x</td>\
<td style="text-align:right">0.1235</td></tr></table></div>'
    """
    rows = list(rows)
    head = "".join(f"<th>{escape(str(text))}</th>" for text in heads)
    body = [f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:MOST]]
    lines = [*([f"<tr>{head}</tr>"] if heads else []), *body]
    table = f"<table>{''.join(lines)}</table>" if lines else ""
    said = [*notes, *([f"{len(rows) - MOST} more rows"] if len(rows) > MOST else [])]
    below = "".join(f"<p>{escape(str(text))}</p>" for text in said)
    return f"<div><p><b>{escape(title)}</b></p>{table}{below}</div>"


def html_page(title: str, lead: str, sections: Iterable[Section]) -> str:
    """Return a page of tables and lists that runs nothing and needs no network.

    Parameters
    ----------
    title, lead : str
        The heading, and the sentence below it.
    sections : iterable of (str, sequence of str, sequence)
        A heading; the heads of a table and its rows of texts, the first column to the left and the
        others to the right; or no heads, and sentences. Those without rows are left out.

    Examples
    --------
    >>> page = html_page("a < b", "", [("shown", [], ["x & y"])])
    >>> "<li>x &amp; y</li>" in page, "<h1>a &lt; b</h1>" in page, "<script" in page
    (True, True, False)
    """
    parts = (_section(heading, heads, rows) for heading, heads, rows in sections if rows)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{page_style()}
</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>
<main>
{"".join(parts)}</main>
</body>
</html>
"""


def page_style() -> str:
    """Return the style of the pages, for light and dark screens, telephones and paper."""
    return resources.files("mirrorflow").joinpath("page.css").read_text(encoding="utf-8")


def _section(heading: str, heads: Sequence[str], rows: Sequence[Any]) -> str:
    """Return a section of a page: a table, or a list."""
    if not heads:
        body = f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in rows)}</ul>"
    else:
        lines = [_row("th", heads), *(_row("td", row) for row in rows)]
        body = (
            f'<div class="table" tabindex="0" role="region" aria-label="{escape(heading)}">'
            f"<table><thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table></div>"
        )
    return f"<section><h2>{escape(heading)}</h2>{body}</section>\n"


def _row(tag: str, cells: Sequence[str]) -> str:
    """Return a row of a table: a name, and what belongs to it on the right."""
    kinds = ("", *[" class=number"] * (len(cells) - 1))
    row = (f"<{tag}{kind}>{escape(c)}</{tag}>" for kind, c in zip(kinds, cells, strict=True))
    return f"<tr>{''.join(row)}</tr>"


def _cell(value: Any) -> str:
    """Return a cell."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f'<td style="text-align:{"right" if number else "left"}">{escape(text)}</td>'
