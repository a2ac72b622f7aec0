"""The driver of a sweep: what may start, what has ended, what is tried again."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..framework import hold, needs, remove_drafts, write_json
from .engines.local import Event, Local
from .jobs import Job, SweepPlan, plan, trunk_folder
from .study import Study
from .work import Store

__all__ = ["Engine", "Outcome", "Progress", "sweep"]

PLANNED = "sweep.json"


class Engine(Protocol):
    """What carries jobs out: this machine, or a cluster.

    ``slots`` is how many jobs it takes at a time; ``wait`` gives events, and "died" stands for a
    job that left no result: its process, or its machine, is gone.
    """

    slots: int

    def submit(self, job: Job) -> None:
        """Start a job."""
        ...

    def wait(self, timeout: float) -> list[Event]:
        """Return what has happened, after at most ``timeout`` seconds."""
        ...

    def close(self) -> None:
        """End what is running."""
        ...


@dataclass
class Progress:
    """How far a sweep is, for whoever shows it.

    Attributes
    ----------
    plan : SweepPlan
    running : dict of str to (int, int, str)
        done, total and label of each job that runs, by its key.
    finished, failed : int
        Runs.
    ended : int
        Jobs, beginnings too.
    started : float
        On the monotonic clock.
    """

    plan: SweepPlan
    running: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    finished: int = 0
    failed: int = 0
    ended: int = 0
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float | None:
        """Estimate the seconds that are left, from the share of the jobs that is done."""
        part = sum(done / max(1, total) for done, total, _ in self.running.values())
        share = (self.ended + part) / max(1, len(self.plan.jobs))
        spent = time.monotonic() - self.started
        return spent * (1 - share) / share if share > 0 else None


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended.

    Attributes
    ----------
    plan : SweepPlan
        What there was to do.
    failed : dict of str to str
        The reason, by the label of each run that has failed.
    """

    plan: SweepPlan
    failed: dict[str, str]

    @property
    def complete(self) -> bool:
        """Whether every run is finished."""
        return not self.failed


def sweep(
    study: Study,
    out: str | Path = "runs",
    *,
    workers: int = 0,
    retries: int = 2,
    store: str = "",
    hooks: tuple[str, ...] = (),
    engine: Engine | None = None,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Run every configuration of a study; the same call goes on after whatever has stopped it.

    Beginnings that several runs share are trained once. Finished runs are never run again: the
    hash of a configuration names its folder, and result.json is written last. A run that fails
    does not stop the others; a run whose process died is tried again.

    Parameters
    ----------
    study : Study
    out : path
        The folder of results on this machine.
    workers : int
        Processes at a time; 0 for one per core.
    retries : int
        How often a job is tried again whose process, or machine, has died.
    store : str
        The URL of an object store that mirrors the folder; needs fsspec.
    hooks : tuple of str
        Observers of what runs log, as "module:function": called with the folder and the job of a
        run, the function gives a callable that takes the numbers.
    engine : Engine, optional
        Where jobs run; this machine without it.
    watch : callable
        Called with the `Progress` several times a second.

    Returns
    -------
    Outcome

    Raises
    ------
    ValueError
        For a configuration that the experiment refuses, before anything runs.
    RuntimeError
        If another sweep is working on the same experiment in this folder; it says which process.

    Examples
    --------
    >>> import tempfile
    >>> study = Study(
    ...     experiment="fig09_fig11_fig14_legendre", preset="smoke", grid={"points": [21, 31]}
    ... )
    >>> sweep(study, tempfile.mkdtemp(), workers=1).complete  # doctest: +SKIP
    True
    """
    out = Path(out)
    folder = out / study.module.NAME
    folder.mkdir(parents=True, exist_ok=True)

    def busy(holder: str) -> None:
        raise RuntimeError(
            f"another sweep is working in {folder} ({holder}): wait for it, or give another --out"
        )

    with hold(folder / ".sweep", busy):
        remove_drafts(folder)
        if engine is None:  # jobs on a cluster may outlive their driver, and still write
            remove_drafts(trunk_folder(out, study.module.NAME))
        if store:
            for draft in folder.rglob(".*.fetched-*"):
                draft.unlink(missing_ok=True)
            Store(store, out).fetch(folder)
        todo = plan(study, out)
        write_json(folder / PLANNED, {"study": study.model_dump(mode="json"), "runs": todo.runs})
        chosen = engine or Local(out, workers, store, hooks, needs(study.module))
        try:
            failed = _Driver(chosen, todo, retries, watch).run()
        finally:
            chosen.close()
        if store:
            Store(store, out).fetch(folder)  # what other machines have finished
        if not failed:
            shutil.rmtree(trunk_folder(out, study.module.NAME), ignore_errors=True)
    return Outcome(todo, failed)


class _Driver:
    """Keep the engine busy until no job is left that may start."""

    def __init__(
        self, engine: Engine, todo: SweepPlan, retries: int, watch: Callable[[Progress], None]
    ) -> None:
        self.engine, self.watch, self.retries = engine, watch, retries
        self.waiting = {job.key: job for job in todo.jobs}
        self.running: dict[str, Job] = {}
        self.deaths: dict[str, int] = {}
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}  # by key, beginnings too
        self.jobs = dict(self.waiting)
        self.progress = Progress(todo, finished=todo.done)

    def run(self) -> dict[str, str]:
        """Carry everything out, and give the reasons of the runs that failed."""
        self.watch(self.progress)
        while self.waiting or self.running:
            self._start()
            for key, kind, content in self.engine.wait(0.5):
                getattr(self, f"_{kind}")(self.jobs[key], content)
            self.watch(self.progress)
        return {
            self.jobs[key].label: reason
            for key, reason in self.failed.items()
            if not self.jobs[key].line
        }

    def _start(self) -> None:
        """Submit what may start; what needs a beginning that has failed fails with it."""
        for job in list(self.waiting.values()):
            if broken := [key for key in job.needs if key in self.failed]:
                del self.waiting[job.key]
                start = self.jobs[broken[0]].label
                self._end(job, f"its beginning ({start}) failed: {self.failed[broken[0]]}")
            elif len(self.running) < self.engine.slots and self._ready(job):
                del self.waiting[job.key]
                self.running[job.key] = job
                self.progress.running[job.key] = (0, 1, job.label)
                self.engine.submit(job)

    def _ready(self, job: Job) -> bool:
        """Whether all that comes before a job is done."""
        return all(key in self.done for key in job.needs)

    def _progress(self, job: Job, content: tuple[int, int, str]) -> None:
        """Note how far a job is."""
        done, total, label = content
        shown = job.label if job.line else f"{job.label}: {label}"
        self.progress.running[job.key] = (done, total, shown)

    def _done(self, job: Job, content: str) -> None:
        """Note that a job is done."""
        self.done.add(job.key)
        self.progress.finished += not job.line
        self._end(job)

    def _failed(self, job: Job, content: str) -> None:
        """Note that a job raised: it would raise again."""
        self._end(job, content)

    def _died(self, job: Job, content: str) -> None:
        """Try a job again whose process is gone: it goes on from what it has stored."""
        self.deaths[job.key] = self.deaths.get(job.key, 0) + 1
        if self.deaths[job.key] > self.retries:
            self._end(job, f"{content} ({self.deaths[job.key]} times)")
            return
        del self.running[job.key]
        self.progress.running.pop(job.key, None)
        self.waiting[job.key] = job

    def _end(self, job: Job, reason: str = "") -> None:
        """Take a job off the list."""
        self.running.pop(job.key, None)
        self.progress.running.pop(job.key, None)
        self.progress.ended += 1
        if reason:
            self.failed[job.key] = reason
            self.progress.failed += not job.line
