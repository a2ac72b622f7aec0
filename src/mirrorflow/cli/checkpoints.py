"""The commands that look at what training has saved: `audit` and `lint`."""

from __future__ import annotations

import json as encoding
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from .errors import UserError, disk_error, unreadable
from .terminal import say, width

__all__ = ["audit", "lint"]

PAIR = "--pair mlp=fc2.weight,fc1.weight"


def audit(
    path: Annotated[Path, typer.Argument(help="A safetensors file, a model folder, an adapter.")],
    level: Annotated[str, typer.Option(help="layer, or head")] = "layer",
    match: Annotated[str | None, typer.Option(help="A regular expression on names.")] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=A,B",
            help="Also the product of the weights A and B, as in mlp=fc2.weight,fc1.weight; .T at "
            "the end of a name transposes its weight. May be given again.",
        ),
    ] = None,
    values: Annotated[
        bool, typer.Option("--values", help="Also W_O W_V of attention layers.")
    ] = False,
    compare: Annotated[
        Path | None, typer.Option(help="Another checkpoint of the model: differences per product.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    page: Annotated[Path | None, typer.Option(help="Also write an HTML page.")] = None,
) -> None:
    """Measure the spectra of a checkpoint's products: LoRA's B A, attention's Q K^T.

    Beside each ratio stand the mean of random factors of that shape and the most that is possible,
    then the ranks that hold 90, 95 and 99% of the squared singular values. The file is read pair by
    pair: memory stays below 16 copies of the largest pair in float64.
    """
    from .. import spectrum
    from ..spectrum.pairs import NothingToMeasure

    pairs = _pairs(pair or [])
    _check_audit(match, page)
    try:
        found, *other = (
            spectrum.audit(file, level=level, match=match, pairs=pairs, values=values)
            for file in (path, compare) if file is not None
        )  # fmt: skip
    except NothingToMeasure as error:
        raise UserError(str(error).replace(error.call, PAIR)) from error
    except (OSError, ValueError, ImportError) as error:
        hint = f"\nHere: {PAIR}" if "pairs={" in str(error) else ""  # how a program says it
        raise UserError(f"{error}{hint}") from error
    content, text = found.to_dict(), spectrum.table(found, width())
    if other:
        both = spectrum.compare(found, other[0])
        content |= {"comparison": both.to_dict()}
        text += f"\n\ncompared with {compare}:\n{both.table(width())}"
    print(encoding.dumps(content, indent=1, allow_nan=False)) if json else say(text)
    if page is not None:
        _write_audit(content, path.name, page)


def _pairs(given: list[str]) -> dict[str, tuple[str, str]]:
    """Read the options --pair NAME=A,B."""
    pairs: dict[str, tuple[str, str]] = {}
    for text in given:
        name, _, weights = text.partition("=")
        parts = [part.strip() for part in weights.split(",")]
        if not name or len(parts) != 2 or not all(parts):
            raise UserError(f"--pair {text!r}: NAME=A,B is needed, as in {PAIR}")
        if name in pairs:
            raise UserError(f"--pair {text!r}: there is a pair {name!r} already")
        pairs[name] = (parts[0], parts[1])
    return pairs


def _check_audit(match: str | None, page: Path | None) -> None:
    """Refuse before measuring what could not be used after it."""
    try:
        re.compile(match or "")
    except re.error as error:
        raise UserError(f"--match {match!r} must be a regular expression: {error}.") from error
    if page is not None and page.is_dir():
        raise UserError(f"--page {page} is a folder: name a file, as in {page / 'audit.html'}")


def _write_audit(content: dict[str, Any], source: str, page: Path) -> None:
    """Write the page of an audit."""
    from ..lab.report.checkpoint import audit_page

    try:
        written = audit_page(content, source, page, __version__)
    except OSError as error:
        raise disk_error(error, page, "--page") from error
    print(f"page: {written.resolve()}", file=sys.stderr)


def lint(
    path: Annotated[
        Path, typer.Argument(help="A saved optimizer: optimizer.pt, a checkpoint, or its folder.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Look for mistakes in the weight decay of saved optimizers.

    Exit code 0 without mistakes (notes do not count), 1 with mistakes, 2 for an unreadable file.
    """
    from ..weightdecay import lint_file

    try:
        found = lint_file(path)
    except OSError as error:
        raise unreadable(error, path, "Give a saved optimizer.") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    if json:
        print(encoding.dumps([asdict(finding) for finding in found], indent=1))
    else:
        say("\n".join(map(str, found)) or "nothing found")
    raise typer.Exit(1 if any(finding.level == "warning" for finding in found) else 0)
