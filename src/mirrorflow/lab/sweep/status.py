"""Progress of a sweep and its records as one table, read from stored files."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..framework import held, read_result, run_lock
from .driver import PLANNED

__all__ = ["RunState", "export", "status"]


@dataclass(frozen=True)
class RunState:
    """One run of a sweep.

    Attributes
    ----------
    key : str
        The hash of its configuration, which names its folder.
    changes : dict
        What is particular to it.
    state : str
        "finished", "running", "failed", "interrupted" (it has stored parts), "broken" (its result
        cannot be read; the sweep runs it again), or "waiting".
    detail : str
        The reason, the seconds it took, or how much is stored.
    """

    key: str
    changes: dict[str, Any]
    state: str
    detail: str


def status(folder: str | Path) -> list[RunState]:
    """Return the state of every run of a sweep.

    Parameters
    ----------
    folder : path
        <out>/<experiment>.

    Raises
    ------
    FileNotFoundError
        If no sweep has begun there.
    ValueError
        If its plan cannot be read; the sweep's command writes it again.
    """
    folder = Path(folder)
    if not (folder / PLANNED).exists():
        raise FileNotFoundError(f"no sweep has begun in {folder}: it holds no {PLANNED}")
    runs = _content(folder / PLANNED).get("runs")
    if not isinstance(runs, dict) or not all(isinstance(run, dict) for run in runs.values()):
        raise ValueError(
            f"{folder / PLANNED} must be the plan of a sweep, got none that can be read. Give the "
            "sweep's command again."
        )
    return [RunState(key, changes, *_state(folder / key)) for key, changes in runs.items()]


def _state(folder: Path) -> tuple[str, str]:
    """Read the state of a run from its folder."""
    if (path := folder / "result.json").exists():
        try:
            return "finished", f"{read_result(path)['seconds']:.1f} s"
        except ValueError as error:
            return "broken", str(error)
    parts = len(list(folder.glob("parts/*.json")))
    if held(run_lock(folder)):
        return "running", f"{parts} parts finished"
    if (path := folder / "failure.json").exists():
        return "failed", str(_content(path).get("reason", "for a reason that cannot be read"))
    return ("interrupted", f"{parts} parts finished") if folder.exists() else ("waiting", "")


def _content(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def export(folder: str | Path, output: str | Path) -> int:
    """Write the records of all finished runs into one table.

    Parameters
    ----------
    folder : path
        <out>/<experiment>.
    output : path
        A file that ends in .parquet (needs pyarrow) or .csv.

    Returns
    -------
    int
        The number of rows. What is particular to a run is in the columns "set.<key>".
    """
    folder, output = Path(folder), Path(output)
    rows = []
    for run in status(folder):
        if run.state == "finished":
            result = json.loads((folder / run.key / "result.json").read_text(encoding="utf-8"))
            named = {f"set.{key}": _cell(value) for key, value in run.changes.items()}
            rows += [{"run_hash": run.key, **named, **record} for record in result["records"]]
    if output.suffix == ".parquet":
        _parquet(rows, output)
    elif output.suffix == ".csv":
        _csv(rows, output)
    else:
        raise ValueError(f"a table is a .parquet or a .csv file, not {output.name}")
    return len(rows)


def _cell(value: Any) -> Any:
    """Return what fits into a cell."""
    return value if isinstance(value, (str, int, float, bool)) else json.dumps(value)


def _parquet(rows: list[dict[str, Any]], output: Path) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError(
            "a parquet file needs pyarrow: pip install pyarrow, or take .csv"
        ) from None
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = pyarrow.table({key: [row.get(key) for row in rows] for key in columns})
    parquet.write_table(table, output)


def _csv(rows: list[dict[str, Any]], output: Path) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with output.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
