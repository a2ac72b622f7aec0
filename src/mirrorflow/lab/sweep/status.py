"""Progress of a sweep and its records as one table, read from stored files."""

from __future__ import annotations

import csv
import fcntl
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .driver import PLANNED
from .work import LOCK

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
        "finished", "running", "failed", "interrupted" (it has stored parts), or "waiting".
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
    """
    folder = Path(folder)
    if not (folder / PLANNED).exists():
        raise FileNotFoundError(f"no sweep has begun in {folder}: it holds no {PLANNED}")
    runs = json.loads((folder / PLANNED).read_text(encoding="utf-8"))["runs"]
    return [RunState(key, changes, *_state(folder / key)) for key, changes in runs.items()]


def _state(folder: Path) -> tuple[str, str]:
    """Read the state of a run from its folder."""
    if (path := folder / "result.json").exists():
        seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"]
        return "finished", f"{seconds:.1f} s"
    parts = len(list(folder.glob("parts/*.json")))
    if _held(folder / LOCK):
        return "running", f"{parts} parts finished"
    if (path := folder / "failure.json").exists():
        return "failed", json.loads(path.read_text(encoding="utf-8"))["reason"]
    return ("interrupted", f"{parts} parts finished") if folder.exists() else ("waiting", "")


def _held(path: Path) -> bool:
    """Whether a process holds a lock."""
    if not path.exists():
        return False
    with path.open("r") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


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
