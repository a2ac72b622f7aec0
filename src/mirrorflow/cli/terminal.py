"""Text on a terminal: as wide as it is; what files hold is shown, and never obeyed."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from itertools import zip_longest

__all__ = ["columns", "fitted", "pairs", "say", "shown", "tell", "width"]

# What moves the cursor, colours, or turns the direction of text round.
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    r"""Return text in which control characters are written out, and letters that are not there.

    Examples
    --------
    >>> shown("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    plain = CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return plain.encode(encoding, "backslashreplace").decode(encoding)


def width() -> int:
    """Return the columns to fill: COLUMNS, or those of the terminal, or 80; at least 40."""
    return max(40, shutil.get_terminal_size((80, 24)).columns)


def fitted(text: str) -> str:
    """Return text whose long lines are folded, indented below their beginning; words stay whole.

    Examples
    --------
    >>> import os
    >>> os.environ["COLUMNS"] = "40"
    >>> print(fitted("  yes regular: no row of J_g vanishes along the flow"))
      yes regular: no row of J_g vanishes
        along the flow
    >>> del os.environ["COLUMNS"]
    """
    room = width()
    return "\n".join(_folded(line, room) for line in text.split("\n"))


def _folded(line: str, room: int) -> str:
    """Fold one line."""
    if len(line) <= room:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(
        line, room, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def columns(rows: Iterable[tuple[str, ...]]) -> str:
    """Return rows with aligned columns; the last one is folded within its own column.

    Examples
    --------
    >>> print(columns([("a", "first"), ("bcd", "second")]))
    a    first
    bcd  second
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    lines = []
    for *cells, last in rows:
        head = "".join(f"{cell:<{size}}  " for cell, size in zip(cells, widths, strict=True))
        room = max(20, width() - len(head))
        parts = textwrap.wrap(last, room, break_long_words=False, break_on_hyphens=False) or [""]
        lines += [(head + parts[0]).rstrip(), *(" " * len(head) + part for part in parts[1:])]
    return "\n".join(lines)


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Return rows of two texts, each folded within its half of the width.

    Examples
    --------
    >>> print(pairs([("the error", "0.1"), ("its range", "0.05 to 0.2")]))
    the error  0.1
    its range  0.05 to 0.2
    """
    rows = list(rows)
    left = min(max(len(first) for first, _ in rows), width() // 2 - 1)
    lines = []
    for first, second in rows:
        sides = (textwrap.wrap(first, left), textwrap.wrap(second, width() - left - 2))
        lines += [f"{a:<{left}}  {b}".rstrip() for a, b in zip_longest(*sides, fillvalue="")]
    return "\n".join(lines)


def say(text: str) -> None:
    """Print text that fits the terminal."""
    print(fitted(shown(text)))


def tell(message: str) -> None:
    """Print one line beside the output."""
    print(f"mirrorflow: {shown(message)}", file=sys.stderr)
