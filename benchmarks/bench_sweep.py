"""Sweeps: what shared beginnings save, and what a run of a second costs beside its own work."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks._measure import measure
from mirrorflow.lab.experiments.networks import tab02_fig03b_fig13_vit as tab02
from mirrorflow.lab.experiments.networks._study import PlannedRun
from mirrorflow.lab.experiments.networks._training import train
from mirrorflow.lab.framework.trunks import Checkpoints, branch_points, steps_saved
from mirrorflow.lab.sweep import Study, sweep

FEW, RUNS, WORKERS = 8, 32, 2
STEPS = 2000  # of a run of about a second


def run() -> list[dict[str, Any]]:
    return [sharing(), overhead()]


def sharing() -> dict[str, Any]:
    """Train Table 2's six configurations and ten switch-off times, shared and one by one."""
    config = tab02.Config.preset("smoke").model_copy(
        update={"width": 32, "steps": 220, "off": 110, "every": 20, "seeds": (0,), "loops": False,
                "times": tuple(range(20, 220, 20))}
    )  # fmt: skip
    kinds = ("constant", "off", "half", "time")
    plans = {key: plan for key, plan in config.plans().items() if plan.kind in kinds}
    lines = {key: tab02.timelines(config)[key] for key in plans}
    alone, shared = steps_saved(lines)

    def all_runs(keep: dict[str, tuple[int, ...]], store: Callable[[], Path]) -> None:
        common = Checkpoints(store())
        for key, plan in plans.items():
            place = common if keep else Checkpoints(store())
            train(lambda p=plan: session(config, p), lines[key], place, keep=keep.get(key, ()))

    def fresh() -> Path:
        return Path(tempfile.mkdtemp())

    torch.set_num_threads(1)
    taken = measure(
        {"shared": lambda: all_runs(branch_points(lines), fresh),
         "one by one": lambda: all_runs({}, fresh)},
        repeats=3,
    )  # fmt: skip
    return {
        "case": "Table 2's six configurations and ten switch-off times",
        "runs": len(plans),
        "steps one by one": alone,
        "steps shared": shared,
        "steps saved": 1 - shared / alone,
        "seconds one by one": taken["one by one"],
        "seconds shared": taken["shared"],
        "seconds saved": 1 - taken["shared"] / taken["one by one"],
    }


def session(config: tab02.Config, plan: PlannedRun) -> Any:
    return tab02._session(config, plan)


def overhead() -> dict[str, Any]:
    """Compare a sweep's time with the seconds that its runs count themselves.

    A small sweep and a large one tell what each run adds from what the start of a sweep takes.
    """
    few, few_own = swept(FEW)
    many, many_own = swept(RUNS)
    each = ((many - few) * WORKERS - (many_own - few_own)) / (RUNS - FEW)
    return {
        "case": f"{RUNS} runs of about a second on {WORKERS} processes",
        "seconds of a run": many_own / RUNS,
        "seconds of the sweep": many,
        "seconds that a run adds beside its own": each,
        "overhead per run": each / (many_own / RUNS),
        "seconds until the first run starts": few - (few_own + FEW * each) / WORKERS,
        "overhead of the whole sweep": (many * WORKERS - many_own) / many_own,
    }


def swept(runs: int) -> tuple[float, float]:
    """Sweep, and give its seconds and those that the runs count themselves."""
    study = Study(
        experiment="fig02_matrix_sensing", preset="smoke", set={"steps": STEPS},
        grid={"start": [0.1 + 0.01 * i for i in range(runs)]},
    )  # fmt: skip
    out = Path(tempfile.mkdtemp())
    started = time.perf_counter()
    outcome = sweep(study, out, workers=WORKERS)
    seconds = time.perf_counter() - started
    assert outcome.complete, outcome.failed
    own = [json.loads(path.read_text())["seconds"] for path in out.glob("*/*/result.json")]
    return seconds, sum(own)
