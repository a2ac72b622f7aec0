"""Tables as lines of text, in blocks of columns where they are wider than the terminal."""

from __future__ import annotations

import os.path
from collections.abc import Sequence

__all__ = ["aligned"]

GAP = 2  # spaces between columns


def aligned(rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Return rows of cells as lines: the first column to the left, the others to the right.

    Parameters
    ----------
    rows : sequence of sequence of str
        The heads, then the rows; all of one length.
    width : int, optional
        Columns of the terminal. A wider table loses what all names begin with, up to a dot, and is
        then cut into blocks of columns, each beside the names; a name of more than half the width
        loses its middle.

    Examples
    --------
    >>> for line in aligned([["name", "x"], ["model.a", "1"], ["model.b", "2.5"]], width=10):
    ...     print(line)
    names begin with: model.
    name    x
    a       1
    b     2.5
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if width is None or sum(widths) + GAP * (len(widths) - 1) <= width:
        return _lines(rows, widths)
    shorter, said = _shortened(rows, width)
    widths[0] = max(len(row[0]) for row in shorter)
    lines: list[str] = []
    for block in _blocks(widths, width):
        chosen = [0, *block]
        cells = [[row[i] for i in chosen] for row in shorter]
        lines += [*([""] if lines else []), *_lines(cells, [widths[i] for i in chosen])]
    return [*said, *lines]


def _lines(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    """Return rows of cells padded to the widths of their columns."""
    gap = " " * GAP
    return [
        gap.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def _shortened(rows: Sequence[Sequence[str]], width: int) -> tuple[list[list[str]], list[str]]:
    """Return the rows without what their dotted names share, and a line that says so."""
    head, *body = map(list, rows)
    names = [row[0] for row in body if "." in row[0]]
    common = os.path.commonprefix(names)  # noqa: RUF071 - letter by letter, then up to a dot
    prefix = common[: common.rfind(".") + 1]
    for row in body:
        row[0] = _elided(row[0].removeprefix(prefix), max(12, width // 2))
    return [head, *body], [f"names begin with: {prefix}"] if prefix else []


def _elided(name: str, room: int) -> str:
    """Return a name without its middle, if it needs more room."""
    if len(name) <= room:
        return name
    half = (room - 2) // 2
    return f"{name[: room - 2 - half]}..{name[-half:]}"


def _blocks(widths: Sequence[int], width: int) -> list[list[int]]:
    """Return which columns stand side by side, beside the first; each block has at least one."""
    blocks: list[list[int]] = []
    used = width + 1
    for i, size in enumerate(widths[1:], 1):
        if used + GAP + size > width:
            blocks.append([])
            used = widths[0]
        blocks[-1].append(i)
        used += GAP + size
    return blocks
