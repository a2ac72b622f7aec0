"""The jobs of a sweep: the beginnings that several runs share, and the runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from .. import framework
from ..framework import Checkpoints, Timeline, steps_saved
from .study import Study

__all__ = ["Job", "SweepPlan", "plan", "trunk_folder"]

PRETRAINING = "pretraining"  # timelines with such names are needed by all others of their run


@dataclass(frozen=True)
class Job:
    """A beginning that is trained up to a step, or a whole run.

    Attributes
    ----------
    key : str
        Its name within the sweep.
    experiment : str
    config : dict
        The configuration, as JSON.
    label : str
        What a person reads.
    needs : tuple of str
        The keys of the jobs that come before it.
    line : str
        The timeline that is trained, for a beginning; empty for a run.
    until : int
        Its last step.
    """

    key: str
    experiment: str
    config: Mapping[str, Any]
    label: str
    needs: tuple[str, ...] = ()
    line: str = ""
    until: int = 0


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep has to do.

    Attributes
    ----------
    jobs : list of Job
        Beginnings first; what is stored already is not among them.
    runs : dict of str to dict
        What is particular to each run, by the hash of its configuration: all runs of the study.
    done : int
        How many of them are finished.
    steps : (int, int)
        Training steps of all runs one by one, and with shared beginnings; zeros for experiments
        that do not train.
    """

    jobs: list[Job]
    runs: dict[str, dict[str, Any]]
    done: int
    steps: tuple[int, int] = field(default=(0, 0))

    def __str__(self) -> str:
        """Say what there is to do and what sharing saves."""
        alone, shared = self.steps
        text = f"{len(self.runs)} configurations, {self.done} of them finished"
        if not alone:
            return text
        return (
            f"{text}; {alone:,} training steps one by one, {shared:,} with shared beginnings: "
            f"{1 - shared / alone:.0%} saved"
        )


def trunk_folder(out: str | Path, experiment: str) -> Path:
    """Name the folder of the states that runs of an experiment share."""
    return Path(out) / ".trunks" / experiment


def plan(study: Study, out: str | Path) -> SweepPlan:
    """Make the jobs that are left of a study whose results are in a folder."""
    module = study.module
    configs = {
        framework.result_folder(module, config, out).name: (changes, config)
        for changes, config in study.configurations()
    }
    folder = Path(out) / module.NAME
    left = {
        key: config for key, (_, config) in configs.items() if not framework.finished(folder / key)
    }
    lines = {key: _timelines(module, config) for key, (_, config) in configs.items()}
    trunks = _trunks(module, left, {key: lines[key] for key in left}, out)
    runs = [
        Job(
            key=key,
            experiment=module.NAME,
            config=config.model_dump(mode="json"),
            label=_label(configs[key][0]) or key,
            needs=tuple(t.key for t in trunks if _passes(lines[key], t)),
        )
        for key, config in left.items()
    ]
    every = {f"{key}/{name}": line for key, found in lines.items() for name, line in found.items()}
    return SweepPlan(
        [*trunks, *runs],
        {key: changes for key, (changes, _) in configs.items()},
        len(configs) - len(left),
        steps_saved(every),
    )


def _timelines(module: Any, config: Any) -> dict[str, Timeline]:
    """Return the timelines of an experiment that trains; others have none."""
    return module.timelines(config) if hasattr(module, "timelines") else {}


def _label(changes: Mapping[str, Any]) -> str:
    """Write what is particular to a run."""
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in changes.items())


def _trunks(
    module: Any, configs: Mapping[str, Any], lines: Mapping[str, Mapping[str, Timeline]], out: Any
) -> list[Job]:
    """Make a job for each state that runs of different configurations go on from."""
    store = Checkpoints(trunk_folder(out, module.NAME))
    found: dict[str, Job] = {}
    for key, name, step in sorted(_shared(lines), key=lambda s: (not _first(s[1]), s[2])):
        line = lines[key][name]
        state = f"{step}-{line.key(step)}"
        if state in found or store.has(line, step):
            continue
        mine = [job for job in found.values() if _passes({name: line}, job)]
        before = [job for job in found.values() if _first(job.line) and _passes(lines[key], job)]
        needs = {job.key for job in (*mine, *before)}
        found[state] = Job(
            state, module.NAME, configs[key].model_dump(mode="json"), f"{name} to step {step}",
            tuple(sorted(needs)), name, step,
        )  # fmt: skip
    return list(found.values())


def _first(name: str) -> bool:
    """Whether a timeline comes before all others of its run."""
    return name.startswith(PRETRAINING)


def _passes(lines: Mapping[str, Timeline], trunk: Job) -> bool:
    """Whether a run passes through the state that a job stores."""
    key = trunk.key.partition("-")[2]
    return any(
        line.steps >= trunk.until and line.key(trunk.until) == key for line in lines.values()
    )


def _shared(lines: Mapping[str, Mapping[str, Timeline]]) -> Iterator[tuple[str, str, int]]:
    """Find the states where runs of different configurations part, or end as one."""
    alike: dict[str, list[tuple[str, str, Timeline]]] = {}
    for key, found in lines.items():
        for name, line in found.items():
            alike.setdefault(json.dumps(line.shared, sort_keys=True), []).append((key, name, line))
    for group in alike.values():
        for (key, name, line), (other, _, second) in combinations(group, 2):
            if key != other and (step := line.common(second)):
                yield key, name, step
