"""The command that says before a run what its weight decay comes to: `plan`."""

from __future__ import annotations

import json as encoding
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UserError, disk_error
from .terminal import say

__all__ = ["plan_command"]

_LARGEST = 1 << 20  # bytes of a file of arguments


def plan_command(
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="TrainingArguments as JSON; other options change them."),
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, adamw_fused, sgd, ...")] = None,
    lr: Annotated[float | None, typer.Option(help="The highest learning rate.")] = None,
    lr_schedule: Annotated[
        str | None, typer.Option(help="constant, constant_with_warmup, linear, or cosine.")
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of the warmup.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of the run.")] = None,
    decay: Annotated[
        str | None,
        typer.Option(help='A number, or a schedule: {"kind": "SwitchOff", "rate": 0.1, "at": 600}'),
    ] = None,
    momentum: Annotated[float | None, typer.Option(help="Of SGD.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: float32, bfloat16, or float16.")
    ] = None,
    outside: Annotated[
        bool, typer.Option("--outside", help="The decay comes from mirrorflow, decoupled=True.")
    ] = False,
    size: Annotated[
        float | None, typer.Option(help="A typical singular value of the products.")
    ] = None,
    start: Annotated[
        float | None, typer.Option(help="A_0 of the products; 0.167 for PEFT's LoRA.")
    ] = None,
    target: Annotated[float, typer.Option(help="The part that products shall shrink by.")] = 0.5,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what a run's weight decay comes to: does it act, is it enough, which decay would be.

    Nothing is trained, and no model is needed. In Python, mf.preview says the same of your own
    optimizer and schedules.
    """
    from ..weightdecay import TrainingRun

    given = {
        "optimizer": optimizer, "lr": lr, "lr_schedule": lr_schedule, "warmup": warmup,
        "steps": steps, "decay": _decay(decay), "momentum": momentum, "dtype": dtype,
        "outside": outside or None,
    }  # fmt: skip
    changes = {name: value for name, value in given.items() if value is not None}
    try:
        if from_ is not None:
            run = TrainingRun.from_arguments(_read(from_), **changes)
        else:
            _need(changes, "steps", "lr", "decay")
            run = TrainingRun(**changes)
        seen = run.preview(size=size, start=start, target=target)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    print(encoding.dumps(seen.to_dict(), indent=1)) if json else say(seen.verdict)


def _decay(text: str | None) -> Any:
    """Return the decay: a number, or the plain values of a schedule."""
    if text is None:
        return None
    try:
        return float(text)  # like the other options: .1 is not a number in JSON
    except ValueError:
        pass
    try:
        value = encoding.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, bool) or not isinstance(value, (int, float, dict)):
        raise UserError(
            f"--decay must be a number or a schedule in JSON, got {text!r}. Give 0.1, or "
            '{"kind": "SwitchOff", "rate": 0.1, "at": 600}.'
        )
    return value


def _read(path: Path) -> dict[str, Any]:
    """Return the settings in a file."""
    try:
        if not path.is_file():
            raise UserError(f"--from must be a file, got {path}. Give TrainingArguments as JSON.")
        with path.open("rb") as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise UserError(
                f"{path} must be smaller than 1 MB, got more. Give one run's arguments."
            )
        value = encoding.loads(text)
    except OSError as error:
        raise disk_error(error, path) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} must hold TrainingArguments as JSON, as args.to_json_string() writes them, "
            f"got: {error}."
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(value).__name__}.")
    return value


def _need(changes: dict[str, Any], *names: str) -> None:
    """Raise if a setting is missing that nothing else gives."""
    if missing := [f"--{name}" for name in names if name not in changes]:
        raise UserError(
            f"plan must have {', '.join(missing)}, got none. Give them, or --from "
            "training_args.json."
        )
