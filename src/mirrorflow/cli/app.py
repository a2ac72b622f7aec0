"""The command line: parse, call, print. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from .. import __version__
from .checkpoints import audit, lint
from .errors import INTERRUPTED, UserError, disk_error
from .plan import plan_command
from .sweeps import sweeps
from .terminal import shown
from .truncate import truncate_command

__all__ = ["UserError", "app", "main"]

app = typer.Typer(
    help="What weight decay does to a model, and when to switch it off.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # a traceback that can be pasted into an issue
)
app.add_typer(sweeps, name="sweep")
# Which extra brings a package that only some commands need.
EXTRAS = {
    "altair": "lab",
    "filelock": "lab",
    "matplotlib": "lab",
    "pydantic": "lab",
    "vl_convert": "lab",
    "transformers": "hf",
    "peft": "hf",
    "PIL": "networks",
    "pyarrow": "networks",
}
PRESETS = "smoke (seconds), cpu (minutes), or full (the paper's)"
Out = Annotated[Path, typer.Option("--out", help="The folder of all results.")]


def main() -> None:
    """Run the command line; a user's mistake ends with exit code 2, Ctrl-C with 130."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # or what cannot be written shows when it is too late
    except UserError as error:
        _fail(str(error), error.code)
    except OSError as error:
        _drop_output()
        _fail(f"{error.filename or 'the output'} cannot be written: {error.strerror or error}", 2)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        extra = EXTRAS[package]
        _fail(f"this command needs {package}, of the extra {extra}: pip install '.[{extra}]'", 2)


def _drop_output() -> None:
    """Let Python end without trying again to write what cannot be written."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(message: str) -> None:
    """Print one line beside the output."""
    print(f"mirrorflow: {shown(message)}", file=sys.stderr)


def _fail(message: str, code: int) -> NoReturn:
    """Print one line and end with an exit code."""
    _tell(message)
    sys.exit(code)


def _version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Take the options that come before a command."""


@app.command("list")
def list_(out: Out = Path("runs")) -> None:
    """List the experiments, the figures they reproduce, and whether results are stored."""
    from ..lab import framework

    if out.exists() and not out.is_dir():
        raise UserError(f"--out must be a folder, got the file {out}. Give the folder of results.")
    stored = [result["experiment"] for result in framework.find_results(out, _tell)]
    for name in framework.experiments():
        module = framework.load(name)
        count = stored.count(module.NAME)
        print(f"{name}\n    {module.TITLE}\n    {module.PAPER}\n    results in {out}: {count}")


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="An experiment, as `mirrorflow list` names it.")],
    preset: Annotated[str, typer.Option(help=PRESETS)] = "cpu",
    config: Annotated[Path | None, typer.Option(help="A TOML file of settings.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; may be given again.")] = None,
    out: Out = Path("runs"),
    force: Annotated[bool, typer.Option(help="Compute again what is there.")] = False,
) -> None:
    """Run an experiment, unless its result is stored already."""
    overrides = {"seeds": tuple(seed)} if seed else {}
    folder = _execute(name, preset, config, overrides, out, force)
    print(f"result: {folder / 'result.json'}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of results.")],
    output: Annotated[Path | None, typer.Option(help="The page; FOLDER/index.html.")] = None,
) -> None:
    """Make one self-contained page from stored results."""
    try:
        print(f"page: {_build(folder, output or folder / 'index.html')}")
    except ValueError as error:
        raise UserError(str(error)) from error


@app.command()
def check(
    target: Annotated[str, typer.Argument(help="path/to/file.py:name")],
) -> None:
    """Check whether the theory holds for your own g and h.

    The file is run as a Python program, with your rights: give only a file that you trust.

    NAME is a tuple (g, h, w0) in the file, or a function without arguments that returns one. Exit
    code 0 if Theorem 3.2 applies, 1 if it does not, 2 if the file or its functions fail.
    """
    from ..conditions import check as check_pair

    g, h, w0 = _load_pair(target)
    try:
        found = check_pair(g, h, w0)
        text = found.explain()
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    except Exception as error:  # of the functions in the user's file
        raise UserError(f"{target} failed: {type(error).__name__}: {error}") from error
    print(text)
    raise typer.Exit(0 if found.applies else 1)


app.command()(audit)
app.command()(lint)
app.command("truncate")(truncate_command)
app.command("plan")(plan_command)


@app.command()
def demo(out: Out = Path("demo")) -> None:
    """Run the central experiment, draw the shapes of R_a, and make the page."""
    for name in ("fig02_matrix_sensing", "fig09_fig11_fig14_legendre"):
        overrides = {"seeds": (0,)} if name.startswith("fig02") else {}
        folder = _execute(name, "cpu", None, overrides, out, force=False)
        print(f"\n{_summary(folder)}\n")
    page = _build(out, out / "index.html")
    print(f"page: {page.resolve()}")


def _execute(
    name: str,
    preset: str,
    config: Path | None,
    overrides: dict[str, Any],
    out: Path,
    force: bool,
) -> Path:
    """Configure an experiment and run it, with progress."""
    from ..lab import framework

    if name not in framework.experiments():
        known = ", ".join(framework.experiments())
        raise UserError(f"experiment must be one of {known}, got {name!r}.")
    module = framework.load(name)
    try:
        chosen = framework.config_from(module, preset, config, overrides)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    try:
        with _progress(name) as advance:
            return framework.execute(module, chosen, out, force=force, progress=advance)
    except OSError as error:
        raise disk_error(error, out) from error
    except (ImportError, ArithmeticError) as error:  # a training that diverged
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        raise UserError(INTERRUPTED, 130) from None


def _lines(name: str) -> Callable[[int, int, str], None]:
    """Print a line for each new part and each tenth of the whole: a log is read, not watched."""
    printed: tuple[int, str] | None = None

    def advance(done: int, total: int, label: str) -> None:
        nonlocal printed
        if (now := (10 * done // total, label)) != printed:
            printed = now
            print(f"{name}: {100 * done // total}% {label}", flush=True)

    return advance


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar on a terminal, and plain lines in a log."""
    if not sys.stderr.isatty():
        yield _lines(name)
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task(name)
        yield lambda done, total, label: bar.update(
            task, completed=done, total=total, description=f"{name} {label}"
        )


def _summary(folder: Path) -> str:
    """Return in words what a stored run shows."""
    import json
    import textwrap

    from ..lab import framework

    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    module = framework.load(result["experiment"])
    return textwrap.fill(f"{module.TITLE}. {module.summary(result['records'])}", 100)


def _build(folder: Path, output: Path) -> Path:
    """Read the stored results of a folder and make the page."""
    from ..lab import framework
    from ..lab import report as page

    results = framework.find_results(folder, _tell)
    if not results:
        raise UserError(
            f"{folder} must hold finished results, got none. Make some with mirrorflow run."
        )
    # The paper's figures first, then the studies of our own.
    results.sort(key=lambda result: not result["experiment"].startswith(("fig", "tab")))
    sections = [s for result in results if (s := _section_if_whole(folder, result, results))]
    try:
        return page.build(sections, output, __version__)
    except OSError as error:
        raise disk_error(error, output.parent) from error


def _section_if_whole(folder: Path, result: dict[str, Any], results: list[dict[str, Any]]) -> Any:
    """Return the section of a stored run, or None, and say why, where a file of it is broken."""
    try:
        return _section(folder, result, results)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever a broken file makes its figures raise
        _tell(f"{result['folder']} is left out: {type(error).__name__}: {error}")
        return None


def _section(folder: Path, result: dict[str, Any], results: list[dict[str, Any]]) -> Any:
    """Return the page's section of a stored run, as its experiment describes it."""
    from ..lab import framework
    from ..lab import report as page

    module, records = framework.load(result["experiment"]), result["records"]
    curves = framework.trajectory(result["folder"])  # never a path that the file names
    return page.Section(
        title=module.TITLE + _difference(result, results),
        paper=module.PAPER,
        summary=module.summary(records),
        result=result,
        figure=module.draw(records, curves),
        charts=module.charts(records, curves),
        table=module.table(records),
        command=_command(module, result["config"]),
    )


def _difference(result: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """Name the settings that tell a run from the others of its experiment: names before numbers."""
    mine = result["config"]
    others = [r["config"] for r in results
              if r["experiment"] == result["experiment"] and r is not result]  # fmt: skip
    said = []
    for key in sorted(mine, key=lambda name: (not isinstance(mine[name], str), name)):
        alike = [other for other in others if other.get(key) == mine[key]]
        if isinstance(mine[key], str | int | float) and len(alike) < len(others):
            said.append(f"{key} {mine[key]}")
            others = alike
    if others:  # lists differ, or nothing but what the hash sees
        said.append(f"result {result['hash']}")
    return f" ({', '.join(said)})" if said else ""


def _command(module: Any, config: dict[str, Any]) -> str:
    """Return the command that makes a run: a preset, its seeds, and a file of other changes."""
    from ..lab import framework

    stored = module.Config(**config)
    changes = {p: _changes(framework.config_from(module, p), stored) for p in framework.PRESETS}
    preset = min(("cpu", "full", "smoke"), key=lambda p: len(changes[p]))
    seeds = changes[preset].pop("seeds", ())
    command = f"mirrorflow run {module.NAME} --preset {preset}"
    command += "".join(f" --seed {seed}" for seed in seeds)
    if not changes[preset]:
        return command
    lines = "\n".join(f"{key} = {_toml(value)}" for key, value in changes[preset].items())
    return f"{command} --config changes.toml\n\n# changes.toml\n{lines}"


def _changes(base: Any, config: Any) -> dict[str, Any]:
    """Return the settings in which two configurations differ."""
    left, right = base.model_dump(), config.model_dump()
    return {key: right[key] for key in right if right[key] != left[key]}


def _toml(value: Any) -> str:
    """Write a number, a string or a tuple of them as TOML."""
    import json

    return json.dumps(value)  # the same text for all of these


def _load_pair(target: str) -> tuple[Any, Any, Any]:
    """Load (g, h, w0) from path/to/file.py:name."""
    import runpy

    path, _, name = target.rpartition(":")
    if not path or not name:
        raise UserError(f"expected path/to/file.py:name, got {target!r}")
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist. Give path/to/file.py:name.")
    values = _ran(path, lambda: runpy.run_path(path))
    if name not in values:
        raise UserError(f"{path} defines no {name!r}")
    pair = _ran(target, values[name]) if callable(values[name]) else values[name]
    if not isinstance(pair, tuple) or len(pair) != 3:
        raise UserError(f"{name} in {path} must be (g, h, w0), or a function that returns that")
    return pair


def _ran(what: str, call: Callable[[], Any]) -> Any:
    """Run what is the user's; whatever it does wrong is the user's to read."""
    try:
        return call()
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} failed: {type(error).__name__}: {error}") from error
