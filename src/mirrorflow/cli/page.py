"""The page of stored results, made section by section as their experiments describe them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import __version__
from .errors import UserError, disk_error
from .terminal import tell

__all__ = ["build_page", "difference", "draw_figures"]


def build_page(folder: Path, output: Path) -> Path:
    """Read the stored results of a folder and make the page."""
    from ..lab import framework
    from ..lab import report as page

    results = framework.find_results(folder, tell)
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
        raise disk_error(error, output.parent, "--output") from error


def draw_figures(folder: Path, output: Path) -> list[Path]:
    """Draw the printable figure of each stored result, as SVG."""
    from ..lab import framework

    drawn = []
    try:
        output.mkdir(parents=True, exist_ok=True)
        for result in framework.find_results(folder, tell):
            module = framework.load(result["experiment"])
            figure = module.draw(result["records"], framework.trajectory(result["folder"]))
            path = output / f"{module.NAME}-{result['hash'][:12]}.svg"
            figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
            drawn.append(path)
    except OSError as error:
        raise disk_error(error, output, "--output") from error
    return drawn


def _section_if_whole(folder: Path, result: dict[str, Any], results: list[dict[str, Any]]) -> Any:
    """Return the section of a stored run, or None, and say why, where a file of it is broken."""
    try:
        return _section(folder, result, results)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever a broken file makes its figures raise
        tell(f"{result['folder']} is left out: {type(error).__name__}: {error}")
        return None


def _section(folder: Path, result: dict[str, Any], results: list[dict[str, Any]]) -> Any:
    """Return the page's section of a stored run, as its experiment describes it."""
    from ..lab import framework
    from ..lab import report as page

    module, records = framework.load(result["experiment"]), result["records"]
    curves = framework.trajectory(result["folder"])  # never a path that the file names
    return page.Section(
        title=module.TITLE + difference(result, results),
        paper=module.PAPER,
        verdicts=module.verdicts(records),
        result=result,
        charts=module.charts(records, curves),
        table=module.table(records),
        command=_command(module, result["config"]),
    )


def difference(result: dict[str, Any], results: list[dict[str, Any]]) -> str:
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
