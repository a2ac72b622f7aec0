"""Results as tables in notebooks: every text in them is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

__all__ = ["html_table"]

MOST = 60  # rows that a notebook shows


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


def _cell(value: Any) -> str:
    """Return a cell."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f'<td style="text-align:{"right" if number else "left"}">{escape(text)}</td>'
