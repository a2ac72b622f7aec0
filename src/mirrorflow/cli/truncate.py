"""The command that shrinks adapters: `truncate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .errors import UserError, disk_error
from .terminal import say, width

__all__ = ["truncate_command"]


def truncate_command(
    adapter: Annotated[
        Path, typer.Argument(help="A LoRA adapter: PEFT's folder, or a safetensors file.")
    ],
    rank: Annotated[int | None, typer.Option(help="The rank to keep, at most.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="The share of each product's squared singular values to keep."),
    ] = None,
    error: Annotated[
        float | None, typer.Option(help="The largest relative error of each product.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write it: a new folder or file. Without it, only the report."),
    ] = None,
    match: Annotated[str | None, typer.Option(help="A regular expression on names.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Truncate the products B A of a LoRA adapter by exact singular value decompositions.

    One of --rank, --energy and --error says how much is kept. The errors are printed before
    anything is written; the input is never changed.
    """
    from ..spectrum.truncate import plan_truncation

    try:
        plan = plan_truncation(adapter, rank=rank, energy=energy, error=error, match=match)
        print(plan.report.to_json()) if json else say(plan.report.table(width()))
        if out is not None:
            print(f"adapter: {plan.write(out).resolve()}", file=sys.stderr)
    except OSError as problem:
        raise disk_error(problem, out or adapter) from problem
    except (ValueError, ImportError) as problem:
        raise UserError(str(problem)) from problem
