"""The engine of a Ray cluster: each job a task in a process of its own, on whatever node has room.

Ray core is enough: its tasks are tried again when a worker or a node dies, and what makes a sweep
resume is the store of results, not Ray.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..jobs import Job
from ..work import Result, carry_out
from .local import Event

__all__ = ["OnRay"]

MANY = 10_000  # Ray queues what does not fit


class OnRay:
    """Run jobs as tasks of a Ray cluster.

    Parameters
    ----------
    out : path
        The folder of results, on every node: shared between them, or mirrored by ``store``.
    address : str
        Of the cluster ("auto" finds one that this machine belongs to); "local" starts one here.
    slots : int
        Tasks at a time; 0 for as many as fit.
    resources : (float, float)
        CPUs and GPUs of a task; GPUs may be a fraction.
    store : str
        The URL of an object store, or nothing.
    hooks : sequence of str
        Observers, as "module:function".
    retries : int
        How often Ray tries a task again whose worker or node has died.
    """

    def __init__(
        self,
        out: Path,
        address: str,
        slots: int,
        resources: tuple[float, float],
        store: str,
        hooks: tuple[str, ...],
        retries: int = 3,
    ) -> None:
        # Neither reports of usage nor a dashboard: they are set before Ray is imported.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray  # pyright: ignore[reportMissingImports]  # an extra
        except ImportError:
            raise ImportError("--engine ray needs Ray: pip install '.[ray]'") from None
        here: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        ray.init(address=address, log_to_driver=False, **here)
        self._ray: Any = ray
        self.slots = slots or MANY
        cpus, gpus = resources
        self._settings = (str(out.absolute()), store, hooks, max(1, int(cpus)))
        # A process for each task: what a job leaves behind in memory ends with it.
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_calls": 1}
        self._task: Any = ray.remote(max_retries=retries, **options)(_carry_out)
        self._running: dict[Any, str] = {}

    def submit(self, job: Job) -> None:
        """Start a task."""
        self._running[self._task.remote(job, *self._settings)] = job.key

    def wait(self, timeout: float) -> list[Event]:
        """Return the tasks that have ended, after at most ``timeout`` seconds."""
        ended, _ = self._ray.wait(list(self._running), timeout=timeout)
        return [self._event(reference) for reference in ended]

    def close(self) -> None:
        """Cancel what is running, and leave the cluster."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        self._ray.shutdown()

    def _event(self, reference: Any) -> Event:
        """Say how a task ended."""
        key = self._running.pop(reference)
        try:
            kind, reason = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # the job could not even begin
            return key, "failed", str(error.cause)
        except self._ray.exceptions.RayError as error:
            return key, "died", f"{type(error).__name__}, after Ray's own retries"
        return key, kind, reason


def _carry_out(job: Job, out: str, store: str, hooks: Sequence[str], threads: int) -> Result:
    """Carry a job out in a worker of Ray."""
    import torch

    torch.set_num_threads(threads)
    return carry_out(job, out, store, hooks, lambda done, total, label: None)
