"""Timings side by side in one run, and where they were made; `write` puts both into results/."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from mirrorflow.lab.framework.provenance import checkout, provenance, versions

RESULTS = Path(__file__).parents[1] / "results"
COMMIT = checkout()  # of the code that is loaded, whatever is edited while it measures
PACKAGES = ("torchdiffeq", "numba", "skglm", "celer", "clarabel")


def measure(calls: Mapping[str, Callable[[], Any]], repeats: int = 5) -> dict[str, float]:
    """Return the median seconds of each call; see `timings`."""
    return {name: median(times) for name, times in timings(calls, repeats).items()}


def timings(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each call in each turn.

    The calls take turns, so that what else the machine does hits all of them alike; a call that
    takes less than 20 ms is repeated within its turn. One turn before the first is not counted.
    """
    counts = {name: _count(call) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(_turn(call, counts[name]))
    return taken


def _turn(call: Callable[[], Any], count: int) -> float:
    """Return the mean seconds of ``count`` calls in a row.

    Where the others' turn let the second core fall asleep, waking it takes a virtual machine half
    a millisecond: a call before the first is not counted where many are made.
    """
    if count > 1:
        call()
    return _seconds(call, count) / count


def _count(call: Callable[[], Any]) -> int:
    """Return how many calls take 20 ms, judged by five after a first that may load things."""
    taken = _seconds(call)
    return max(1, int(0.02 / max(_seconds(call, 5) / 5, 1e-7))) if taken < 0.1 else 1


def once(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the seconds of each call, made once: for what takes long beside the rest."""
    return {name: _seconds(call) for name, call in calls.items()}


def kept(
    calls: Mapping[str, Callable[[], Any]], found: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    """Return the calls, each of which leaves its last result in ``found``."""
    return {name: partial(_keep, name, call, found) for name, call in calls.items()}


def _keep(name: str, call: Callable[[], Any], found: dict[str, Any]) -> None:
    found[name] = call()


def _seconds(call: Callable[[], Any], count: int = 1) -> float:
    """Return the wall time of ``count`` calls."""
    started = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - started


def machine() -> dict[str, Any]:
    """Say where and with what the numbers were measured."""
    found = provenance([], "cpu", COMMIT)
    found["versions"] |= versions(PACKAGES)
    threads = {k: v for k, v in os.environ.items() if k.endswith("_NUM_THREADS")}
    return {**found, "machine": platform.machine(), "threads": threads or "as the libraries choose"}


def write(name: str, rows: list[dict[str, Any]], results: Path = RESULTS) -> Path:
    """Write rows to results/NAME.json and print them."""
    measured = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"benchmark": name, "measured": measured, "machine": machine(), "rows": rows}
    results.mkdir(exist_ok=True)
    path = results / f"{name}.json"
    draft = path.with_suffix(".partial")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
    for row in rows:
        print(f"\n{row['case']}")
        for key, value in row.items():
            if key != "case":
                print(f"  {key}: {value:.4g}" if isinstance(value, float) else f"  {key}: {value}")
    return path
