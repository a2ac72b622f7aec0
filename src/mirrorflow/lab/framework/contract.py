"""Contract of an experiment: its configuration, its run, and the folder that holds its result.

A run lives in ``<out>/<experiment>/<hash>/``, named by the hash of its configuration:

- ``config.json``: the configuration, whole.
- ``metrics.jsonl``: numbers on the way, a line each, flushed as they are written (until the run is
  done the file is called ``metrics.partial.jsonl``).
- ``parts/`` and ``trunks/``: what is finished of a run that is not (gone when it is).
- ``trajectory.npz``: the curves, under ``<part>/<name>``.
- ``result.json``: the records, where and when they were made, and the seconds that took, those of
  parts finished by interrupted runs included. It is written last: a folder
  with it holds a finished run. ``failure.json`` says why a run failed.

Every file is written under a temporary name, synced, and renamed. One process at a time works in
the folder of a run; it holds the lock ``<out>/<experiment>/.locks/<hash>``.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import time
import tomllib
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from .provenance import checkout, provenance
from .recorder import (
    Observer,
    Part,
    Progress,
    Record,
    Recorder,
    checksum,
    read_arrays,
    require_finite,
    write_arrays,
    write_json,
)
from .storage import hold, remove_drafts, run_lock

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure

__all__ = [
    "FORMAT",
    "PRESETS",
    "Config",
    "Experiment",
    "Part",
    "Recorder",
    "Trajectory",
    "Verdict",
    "checksum",
    "config_from",
    "execute",
    "experiments",
    "find_results",
    "finished",
    "load",
    "mistakes",
    "needs",
    "read_result",
    "read_toml",
    "result_folder",
    "trajectory",
    "write_json",
]

FORMAT = 1
# What a result.json holds, as far as others than its experiment read it.
_FIELDS = {
    "format": int, "experiment": str, "hash": str, "config": dict, "seconds": (int, float),
    "started": str, "records": list, "meta": dict,
}  # fmt: skip
PRESETS = ("smoke", "cpu", "full")

Trajectory = Mapping[str, NDArray[Any]]
Verdict = tuple[str, str]  # what was asked or measured, and what came out, with its numbers


_EXPERIMENTS = Path(__file__).parents[1] / "experiments"


class Config(BaseModel):
    """The configuration of an experiment; its subclasses are called Config too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return a preset: smoke (under 5 s), cpu (a minute or a few), full (the paper's)."""
        raise NotImplementedError  # pydantic's classes cannot be abstract without a metaclass


class Experiment(Protocol):
    """What the module of an experiment defines.

    One that needs packages of an extra names their modules in ``NEEDS``; one that trains gives its
    runs by ``timelines(config)`` and trains one of them to a step by ``advance``, so that sweeps
    share what runs have in common.

    ``run`` computes and never draws. ``draw``, ``charts``, ``table`` and ``verdicts`` read what was
    stored and never compute; matplotlib and altair are imported inside them.
    """

    NAME: str
    TITLE: str
    PAPER: str
    Config: type[Config]

    def run(self, config: Any, recorder: Recorder) -> list[Record]:
        """Compute the records: flat dicts of numbers and strings."""
        ...

    def verdicts(self, records: list[Record]) -> list[Verdict]:
        """Return what this run shows, with its numbers, the main result first."""
        ...

    def draw(self, records: list[Record], trajectory: Trajectory) -> Figure:
        """Draw the static figure."""
        ...

    def charts(
        self, records: list[Record], trajectory: Trajectory
    ) -> list[tuple[str, TopLevelMixin]]:
        """Make the interactive charts, each with its caption."""
        ...

    def table(self, records: list[Record]) -> list[Record]:
        """Return the rows of the table of the page."""
        ...


def needs(module: Experiment) -> tuple[str, ...]:
    """Return the modules of extras that an experiment imports.

    Raises
    ------
    ImportError
        If one is not installed; the message says what to install.
    """
    names: tuple[str, ...] = getattr(module, "NEEDS", ())
    missing = {n.partition(".")[0] for n in names if not find_spec(n.partition(".")[0])}
    if missing:
        raise ImportError(
            f"{module.NAME} needs {', '.join(sorted(missing))}: pip install '.[networks]'"
        )
    return names


def execute(
    module: Experiment,
    config: Config,
    out: str | Path,
    force: bool = False,
    progress: Progress | None = None,
    trunks: Path | None = None,
    observers: Sequence[Observer] = (),
) -> Path:
    """Run an experiment into its folder, unless a finished run is there already.

    A run that was interrupted (Ctrl-C, a crash) continues behind its last finished part. Where
    another process runs the same configuration, this one waits for it, and ``progress`` says for
    whom.

    Parameters
    ----------
    module : module
        The experiment, from `load`.
    config : Config
        Its configuration, from `config_from`.
    out : path
        The folder of all results.
    force : bool
        Compute again what is there.
    progress : callable, optional
        Called with (done, total, label).
    trunks : path, optional
        Where training runs store the states that others go on from, and find those of others;
        without it a folder of the run's own, gone when the run is done.
    observers : sequence of callable
        Called with the numbers that the run logs.

    Returns
    -------
    Path
        The folder of the run.

    Raises
    ------
    ImportError
        If a package is missing that the experiment needs.
    Exception
        Whatever the run raises, after failure.json says so. KeyboardInterrupt passes through.
    """
    needs(module)
    folder = result_folder(module, config, out)
    if not force and finished(folder):
        return folder

    def busy(holder: str) -> None:
        if progress is not None:
            progress(0, 1, f"waits for {holder}, which runs the same configuration")

    with hold(run_lock(folder), busy):
        if force:
            (folder / "result.json").unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        if not finished(folder):
            _execute(module, config, folder, progress, trunks, observers)
    return folder


def _execute(
    module: Experiment,
    config: Config,
    folder: Path,
    progress: Progress | None,
    trunks: Path | None,
    observers: Sequence[Observer],
) -> None:
    """Run an experiment into its folder, whose lock this process holds."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_drafts(folder, folder / "parts", folder / "trunks")
    for earlier in ("failure.json", "result.json"):  # a result that cannot be read is none
        (folder / earlier).unlink(missing_ok=True)
    write_json(folder / "config.json", config.model_dump(mode="json"))
    started, begun = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    commit = checkout()
    try:
        recorder = Recorder(folder, progress, trunks, observers)
        with recorder.logging():
            records = module.run(config, recorder)
        require_finite(module.NAME, Part(records))
    except Exception as error:  # whatever it is, it is written down, and raised again
        reason = {"reason": f"{type(error).__name__}: {error}", "started": started}
        with suppress(OSError):  # on a full disk the reason that is raised is the first
            write_json(folder / "failure.json", reason | {"traceback": traceback.format_exc()})
        raise
    write_arrays(folder / "trajectory.npz", recorder.arrays())
    result = {
        "format": FORMAT,
        "experiment": module.NAME,
        "hash": folder.name,
        "config": config.model_dump(mode="json"),
        "status": "completed",
        "seconds": recorder.earlier + time.perf_counter() - begun,
        "started": started,
        "records": records,
        "meta": provenance(
            [part.data for part in recorder.parts.values() if part.data], recorder.device, commit
        ),
    }
    write_json(folder / "result.json", result)
    for unfinished in ("parts", "trunks"):
        shutil.rmtree(folder / unfinished, ignore_errors=True)


def result_folder(module: Experiment, config: Config, out: str | Path) -> Path:
    """Name the folder of a run by the hash of its configuration."""
    content = {
        "experiment": module.NAME,
        "config": config.model_dump(mode="json"),
        "format": FORMAT,
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return Path(out) / module.NAME / hashlib.sha256(canonical.encode()).hexdigest()[:12]


def finished(folder: Path) -> bool:
    """Return whether a folder holds a finished run: a result.json that can be read."""
    try:
        return read_result(folder / "result.json")["format"] == FORMAT
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def find_results(
    out: str | Path, broken: Callable[[str], None] = warnings.warn
) -> list[dict[str, Any]]:
    """Read the result.json of every finished run below a folder.

    Parameters
    ----------
    out : path
        The folder of all results.
    broken : callable
        Called with a sentence about each file that is not a result; the others are read.

    Returns
    -------
    list of dict
        By experiment and time of start; "folder" is added: the path of the run.
    """
    found = []
    for path in sorted(Path(out).glob("*/*/result.json")):
        try:
            result = read_result(path)
        except (OSError, ValueError) as error:
            broken(str(error))
            continue
        if result["format"] == FORMAT:
            found.append({**result, "folder": path.parent})
    return sorted(found, key=lambda result: (result["experiment"], result["started"]))


def read_result(path: Path) -> dict[str, Any]:
    """Read a result.json; a ValueError says what is wrong with it."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error) if path.stat().st_size else "an empty file"
        raise ValueError(_not_a_result(path, reason)) from None
    if not isinstance(result, dict):
        raise ValueError(_not_a_result(path, f"a {type(result).__name__}"))
    for field, kind in _FIELDS.items():
        if not isinstance(result.get(field), kind):
            raise ValueError(_not_a_result(path, f"{result.get(field)!r:.60} for {field!r}"))
    if not all(isinstance(record, dict) for record in result["records"]):
        raise ValueError(_not_a_result(path, "records that are not objects"))
    return result


def _not_a_result(path: Path, reason: str) -> str:
    return (
        f"{path} must be the result of a run, got {reason}. Remove it, or give the command that "
        "made it again."
    )


def trajectory(folder: str | Path) -> dict[str, NDArray[Any]]:
    """Read the curves of a finished run."""
    return read_arrays(Path(folder) / "trajectory.npz")


def experiments() -> dict[str, str]:
    """Name the experiments, each with the module that defines it, without importing any."""
    files = sorted(_EXPERIMENTS.glob("*/*.py"), key=lambda path: path.stem)
    return {
        path.stem: f"mirrorflow.lab.experiments.{path.parent.name}.{path.stem}"
        for path in files
        if not path.stem.startswith("_")
    }


def load(name: str) -> Experiment:
    """Import an experiment; ValueError with the names that there are, if there is none."""
    known = experiments()
    if name not in known:
        raise ValueError(f"experiment must be one of {', '.join(known)}, got {name!r}.")
    module: Any = importlib.import_module(known[name])
    return module


def config_from(
    module: Experiment,
    preset: str = "cpu",
    toml_path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Make a configuration: a preset, changed by a TOML file, changed by ``overrides``.

    Raises
    ------
    ValueError
        For an unknown preset, an unknown key (with those that there are), or a bad value.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
    values = module.Config.preset(preset).model_dump()
    values |= _known(module, read_toml(Path(toml_path)), str(toml_path)) if toml_path else {}
    values |= _known(module, overrides or {}, "the overrides")
    try:
        found = module.Config(**values)
    except ValidationError as error:
        raise ValueError(f"{module.NAME}: {mistakes(error)}") from None
    seeds = getattr(found, "seeds", None) or (0,)
    if min(seeds) < 0:  # of no random generator
        raise ValueError(f"{module.NAME}: seeds must be >= 0, got {seeds}.")
    return found


def mistakes(error: ValidationError, most: int = 5) -> str:
    """Return a sentence with the first mistakes by field, and how many more there are."""
    found = [
        f"{'.'.join(map(str, e['loc'])) or 'the configuration'}: {e['msg']}" for e in error.errors()
    ]
    more = [f"and {len(found) - most} more"] if len(found) > most else []
    return "; ".join([*found[:most], *more])


def _known(module: Experiment, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Refuse keys that the configuration does not have."""
    allowed = module.Config.model_fields
    unknown = [key for key in values if key not in allowed]
    if unknown:
        raise ValueError(
            f"{module.NAME}: unknown key {', '.join(map(repr, unknown))} in {source}; "
            f"allowed are: {', '.join(allowed)}"
        )
    return dict(values)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file; ValueError names a file that is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of TOML, and of UTF-8
        raise ValueError(f"{path} is not TOML: {error}") from None
