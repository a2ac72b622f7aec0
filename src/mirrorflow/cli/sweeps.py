"""The commands of sweeps: run one, see how far it is, take its table."""

from __future__ import annotations

import json as encoding
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .errors import INTERRUPTED, UserError, disk_error
from .terminal import columns, say, shown

if TYPE_CHECKING:
    from ..lab.sweep.driver import Outcome, Progress

__all__ = ["sweeps"]


class _StudyFirst(TyperGroup):
    """Take `mirrorflow sweep study.toml` for `mirrorflow sweep run study.toml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


sweeps = typer.Typer(
    cls=_StudyFirst,
    help="Run many configurations: mirrorflow sweep STUDY.toml (short for sweep run STUDY.toml).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Out = Annotated[Path, typer.Option("--out", help="The folder of all results.")]
Folder = Annotated[Path, typer.Argument(help="The sweep's folder of results: OUT/EXPERIMENT.")]


@sweeps.command()
def run(
    study: Annotated[Path, typer.Argument(help="A TOML file: experiment, preset, grid, seeds.")],
    out: Out = Path("runs"),
    workers: Annotated[int, typer.Option(help="Runs at a time; 0 for one per core.")] = 0,
    retries: Annotated[int, typer.Option(help="Tries again for a run whose process died.")] = 2,
    engine: Annotated[str, typer.Option(help="local, ray, or slurm.")] = "local",
    address: Annotated[str, typer.Option(help="Of the Ray cluster.")] = "auto",
    cpus: Annotated[float, typer.Option(help="CPUs of a run on a cluster.")] = 1.0,
    gpus: Annotated[float, typer.Option(help="GPUs of a run on a cluster; may be 0.25.")] = 0.0,
    store: Annotated[str, typer.Option(help="An object store: s3://bucket/path.")] = "",
    hook: Annotated[
        list[str] | None, typer.Option(help="An observer of runs: module:function.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option(help="Write event files beside results.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Say what there is to do, and stop.")] = False,
) -> None:
    """Run a study; the same command goes on after whatever has stopped it.

    Exit code 1 if runs have failed; each is listed with its reason.
    """
    from ..lab import sweep as package

    hooks = (
        *(hook or ()),
        *(("mirrorflow.lab.sweep.observers:tensorboard",) if tensorboard else ()),
    )
    try:
        chosen = package.Study.read(study)
        if dry_run:
            say(str(package.plan(chosen, out)))
            return
        where = _engine(engine, address, out, workers, (cpus, gpus), store, hooks)
        with _shown() as watch:
            outcome = package.sweep(
                chosen, out, workers=workers, retries=retries, store=store, hooks=hooks,
                engine=where, watch=watch,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise UserError(INTERRUPTED, 130) from None
    except OSError as error:
        raise disk_error(error, out) from error
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(str(error)) from error
    _conclude(outcome, out / chosen.module.NAME)


@sweeps.command()
def status(
    folder: Folder,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say how far a sweep is, run by run."""
    from ..lab import sweep as package

    try:
        runs = package.status(folder)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    states = [found.state for found in runs]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    if json:
        return print(
            encoding.dumps({"counts": counts, "runs": [asdict(r) for r in runs]}, indent=1)
        )
    if runs:
        print(shown(columns((r.key, r.state, _changes(r.changes), r.detail) for r in runs)))
    say(", ".join(f"{count} {state}" for state, count in counts.items()))


def _changes(changes: dict[str, Any]) -> str:
    """Write what is particular to a run."""
    return ", ".join(f"{key}={value}" for key, value in changes.items())


@sweeps.command()
def export(
    folder: Folder,
    output: Annotated[Path, typer.Argument(help="A .parquet or .csv file.")],
) -> None:
    """Write the records of all finished runs into one table."""
    from ..lab import sweep as package

    try:
        rows = package.export(folder, output)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    print(f"{rows} rows: {output}")


def _engine(
    name: str, address: str, out: Path, workers: int, resources: tuple[float, float], store: str,
    hooks: tuple[str, ...],
) -> Any:  # fmt: skip
    """Make the engine; None for this machine, which the sweep makes itself."""
    if name == "local":
        return None
    if name == "ray":
        from ..lab.sweep.engines.ray_cluster import OnRay

        return OnRay(out, address, workers, resources, store, hooks)
    if name == "slurm":
        from ..lab.sweep.engines.slurm import OnSlurm

        return OnSlurm(out, workers, resources, store, hooks)
    raise UserError(f"--engine is local, ray or slurm, not {name}")


def _conclude(outcome: Outcome, folder: Path) -> None:
    """Say how it ended."""
    for label, reason in outcome.failed.items():
        say(f"failed: {label}: {reason}")
    finished = len(outcome.plan.runs) - len(outcome.failed)
    print(f"{finished} of {len(outcome.plan.runs)} runs finished: {folder}")
    if outcome.failed:
        print("the same command tries the failed ones again")
        raise typer.Exit(1)
    print(f"next: mirrorflow sweep export {shlex.quote(str(folder))} records.csv")


@contextmanager
def _shown() -> Iterator[Callable[[Progress], None]]:
    """Show the progress: live on a terminal, a line for each run that ends in a log."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.live import Live

        with Live(console=Console(stderr=True), transient=True, refresh_per_second=4) as live:
            yield _after_plan(lambda progress: live.update(_text(progress)))
        return
    last = (-1, -1)

    def watch(progress: Progress) -> None:
        nonlocal last
        if (ended := (progress.finished, progress.failed)) != last:
            last = ended
            print(_counts(progress), flush=True)

    yield _after_plan(watch)


def _after_plan(watch: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """Print the plan before the first progress is shown."""
    told = False

    def tell(progress: Progress) -> None:
        nonlocal told
        if not told:
            told = True
            say(str(progress.plan))
            sys.stdout.flush()
        watch(progress)

    return tell


def _counts(progress: Progress) -> str:
    """Count the runs."""
    return (
        f"{progress.finished} of {len(progress.plan.runs)} runs finished, "
        f"{len(progress.running)} jobs running, {progress.failed} failed"
    )


def _text(progress: Progress) -> str:
    """Write the counts, the time that is left, and a line for each job that runs."""
    left = progress.left()
    head = _counts(progress) + ("" if left is None else f", about {left / 60:.0f} min left")
    rows = [
        f"  {100 * done // max(1, total):3d}%  {label}"
        for done, total, label in progress.running.values()
    ]
    return "\n".join([head, *rows])
