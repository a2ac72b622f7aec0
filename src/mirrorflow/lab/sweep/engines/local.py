"""The engine of one machine: each job in a process of its own, from the standard library."""

from __future__ import annotations

import multiprocessing as mp
import os
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ..jobs import Job
from ..work import in_process

__all__ = ["Event", "Local"]

# (key of the job, "progress" | "done" | "failed" | "died", what belongs to it)
Event = tuple[str, str, Any]
PRELOAD = (
    "torch", "sklearn.linear_model", "mirrorflow.flow", "mirrorflow.limit", "mirrorflow.descent",
    "mirrorflow.lab.framework", "mirrorflow.lab.sweep.work",
)  # fmt: skip


class Local:
    """Run jobs in processes that end with this one.

    They are forked from a server that has imported what they need and has no threads, so that a
    job starts in a few hundredths of a second; where there is no such server they are spawned.

    Parameters
    ----------
    out : path
        The folder of results.
    slots : int
        Jobs at a time; 0 for one per core. They share the cores, unless OMP_NUM_THREADS says how
        many threads each has: results are the same to the bit only at the same number.
    store : str
        The URL of an object store, or nothing.
    hooks : sequence of str
        Observers, as "module:function".
    modules : sequence of str
        What the jobs import besides.
    """

    def __init__(
        self, out: Path, slots: int, store: str, hooks: tuple[str, ...], modules: tuple[str, ...]
    ) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.slots = slots or cores or 1
        chosen = os.environ.get("OMP_NUM_THREADS", "")
        self._threads = int(chosen) if chosen.isdigit() else max(1, (cores or 1) // self.slots)
        self._settings = (str(out), store, hooks, self._threads)
        method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
        self._context: Any = mp.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload([*PRELOAD, *modules])
        self._running: dict[str, tuple[Any, Any]] = {}

    def submit(self, job: Job) -> None:
        """Start a job."""
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=in_process, args=(job, *self._settings, there), name=job.label
        )
        process.start()
        there.close()
        self._running[job.key] = (process, here)

    def wait(self, timeout: float) -> list[Event]:
        """Return what has happened, after at most ``timeout`` seconds."""
        wait([line for _, line in self._running.values()], timeout)
        return [event for key in list(self._running) for event in self._read(key)]

    def close(self) -> None:
        """End what is running."""
        for process, _ in self._running.values():
            process.terminate()
        for process, line in self._running.values():
            process.join(5)
            process.kill()
            line.close()
        self._running.clear()

    def _read(self, key: str) -> list[Event]:
        """Read what a job has sent; its line ends when its process does."""
        process, line = self._running[key]
        events: list[Event] = []
        try:
            while line.poll():
                kind, content = line.recv()
                events.append((key, kind, content))
        except EOFError:
            process.join()
            if not events or events[-1][1] == "progress":
                events.append((key, "died", _death(process.exitcode)))
        if events and events[-1][1] != "progress":
            process.join()
            line.close()
            del self._running[key]
        return events


def _death(code: int) -> str:
    """Say how a process ended that has sent no result."""
    if code == -9:
        return "killed with signal 9: by hand, or because the machine was out of memory"
    return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
