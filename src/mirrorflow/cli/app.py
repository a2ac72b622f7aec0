"""The command line: parse, call, print. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json as encoding
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from .. import __version__
from .checkpoints import audit, lint
from .errors import INTERRUPTED, UserError, disk_error, unreadable
from .page import build_page, draw_figures
from .plan import plan_command
from .sweeps import sweeps
from .terminal import fitted, pairs, say, shown, tell
from .truncate import truncate_command

__all__ = ["UserError", "app", "main"]

app = typer.Typer(
    help="What weight decay does to a model, and when to switch it off.",
    no_args_is_help=True,
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
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
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


def _fail(message: str, code: int) -> NoReturn:
    """Print one line and end with an exit code."""
    tell(message)
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
def list_(out: Out = Path("runs"), json: Json = False) -> None:
    """List the experiments, the figures they reproduce, and whether results are stored."""
    from ..lab import framework

    if out.exists() and not out.is_dir():
        raise UserError(f"--out must be a folder, got the file {out}. Give the folder of results.")
    stored = [result["experiment"] for result in framework.find_results(out, tell)]
    modules = [framework.load(name) for name in framework.experiments()]
    rows = [
        {"name": m.NAME, "title": m.TITLE, "paper": m.PAPER, "results": stored.count(m.NAME)}
        for m in modules
    ]
    if json:
        return print(encoding.dumps(rows, indent=1))
    for row in rows:
        say(f"{row['name']}\n    {row['title']}\n    {row['paper']}")
        say(f"    results in {out}: {row['results']}")


def _beginnings(incomplete: str) -> list[str]:
    """Return the experiments that a name may become, for the completion of a shell."""
    from ..lab import framework

    return [name for name in framework.experiments() if name.startswith(incomplete)]


@app.command()
def run(
    name: Annotated[
        str,
        typer.Argument(
            help="An experiment, as `mirrorflow list` names it, or a part of its name.",
            autocompletion=_beginnings,
        ),
    ],
    preset: Annotated[str, typer.Option(help=PRESETS)] = "cpu",
    config: Annotated[Path | None, typer.Option(help="A TOML file of settings.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; may be given again.")] = None,
    out: Out = Path("runs"),
    force: Annotated[bool, typer.Option(help="Compute again what is there.")] = False,
) -> None:
    """Run an experiment, unless its result is stored already, and say what it shows."""
    overrides = {"seeds": tuple(seed)} if seed else {}
    folder = _execute(_chosen(name), preset, config, overrides, out, force)
    print(_shows(folder))
    print(f"result: {folder / 'result.json'}\nnext: mirrorflow report {shlex.quote(str(out))}")


def _chosen(name: str) -> str:
    """Return the only experiment whose name is this, begins so, or has it as a part."""
    from ..lab import framework

    known = framework.experiments()
    if name in known:
        return name
    found = [k for k in known if k.startswith(name)] or [k for k in known if name in k]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"experiment must be one, got {name!r}, which may be {', '.join(found)}.")
    raise UserError(f"experiment must be one of {', '.join(known)}, got {name!r}.")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of results.")],
    output: Annotated[Path | None, typer.Option(help="The page; FOLDER/index.html.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="A folder for the printable figures, as SVG files.")
    ] = None,
) -> None:
    """Make one self-contained page from stored results."""
    try:
        for path in draw_figures(folder, figures) if figures is not None else ():
            print(f"figure: {path}")
        print(f"page: {build_page(folder, output or folder / 'index.html')}")
    except ValueError as error:
        raise UserError(str(error)) from error


@app.command()
def check(
    target: Annotated[str, typer.Argument(help="path/to/file.py:name")],
    json: Json = False,
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
        text = encoding.dumps(found.to_dict(), indent=1) if json else found.explain()
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    except Exception as error:  # of the functions in the user's file
        raise UserError(f"{target} failed: {type(error).__name__}: {error}") from error
    print(text) if json else say(text)
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
        print(f"\n{_shows(folder)}\n")
    page = build_page(out, out / "index.html")
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

    module = framework.load(name)
    try:
        chosen = framework.config_from(module, preset, config, overrides)
    except OSError as error:
        raise unreadable(error, config, "Give a TOML file of settings.") from error
    except ValueError as error:
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
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name)
        yield lambda done, total, label: bar.update(
            task, completed=done, total=total, description=f"{name} {label}"
        )


def _shows(folder: Path) -> str:
    """Return in words and numbers what a stored run shows."""
    from ..lab import framework

    result = framework.read_result(folder / "result.json")
    module = framework.load(result["experiment"])
    return shown(f"{fitted(module.TITLE)}\n\n{pairs(module.verdicts(result['records']))}\n")


def _load_pair(target: str) -> tuple[Any, Any, Any]:
    """Load (g, h, w0) from path/to/file.py:name."""
    import runpy

    path, _, name = target.rpartition(":")
    if not path or not name:
        raise UserError(f"expected path/to/file.py:name, got {target!r}")
    if not Path(path).is_file():
        got = "a folder" if Path(path).is_dir() else "nothing there"
        raise UserError(f"{path} must be a file, got {got}. Give path/to/file.py:name.")
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
