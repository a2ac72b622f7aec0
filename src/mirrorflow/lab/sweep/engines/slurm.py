"""The engine of a SLURM cluster: each job one of SLURM's, by submitit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..jobs import Job
from ..work import carry_out
from .local import Event

__all__ = ["OnSlurm"]


class OnSlurm:
    """Run jobs on a SLURM cluster.

    Parameters
    ----------
    out : path
        The folder of results, shared by the nodes or mirrored by ``store``; submitit's own files
        go into ``.slurm`` in it.
    slots : int
        Jobs at a time; 0 for 100.
    resources : (float, float)
        CPUs and GPUs of a job; SLURM knows no fractions of a GPU.
    store : str
        The URL of an object store, or nothing.
    hooks : sequence of str
        Observers, as "module:function".
    cluster : str
        "slurm", or what else submitit knows: "local" runs jobs on this machine.
    hours : float
        The time limit of a job.
    """

    def __init__(
        self,
        out: Path,
        slots: int,
        resources: tuple[float, float],
        store: str,
        hooks: tuple[str, ...],
        cluster: str = "slurm",
        hours: float = 24.0,
    ) -> None:
        try:
            import submitit  # pyright: ignore[reportMissingImports]  # an extra
            from submitit.core import utils  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ImportError("--engine slurm needs submitit: pip install '.[slurm]'") from None
        cpus, gpus = resources
        if gpus != int(gpus):
            raise ValueError(f"SLURM gives whole GPUs, not {gpus}: use --engine ray for fractions")
        self._executor = submitit.AutoExecutor(folder=out.absolute() / ".slurm", cluster=cluster)
        self._executor.update_parameters(
            timeout_min=int(60 * hours), cpus_per_task=max(1, int(cpus)), gpus_per_node=int(gpus),
            name="mirrorflow",
        )  # fmt: skip
        self.slots = slots or 100
        self._uncompleted: Any = utils.UncompletedJobError
        self._settings = (str(out.absolute()), store, hooks)
        self._running: dict[str, Any] = {}

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._running[job.key] = self._executor.submit(carry_out, job, *self._settings, _silent)

    def wait(self, timeout: float) -> list[Event]:
        """Return the jobs that have ended, after at most ``timeout`` seconds."""
        end = time.monotonic() + timeout
        while not (ended := [key for key, job in self._running.items() if job.done()]):
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        return [self._event(key) for key in ended]

    def close(self) -> None:
        """Cancel what is queued or running."""
        for job in self._running.values():
            job.cancel()
        self._running.clear()

    def _event(self, key: str) -> Event:
        """Say how a job ended."""
        job = self._running.pop(key)
        try:
            kind, reason = job.result()
        except self._uncompleted as error:
            return key, "died", str(error).splitlines()[0]
        return key, kind, reason


def _silent(done: int, total: int, label: str) -> None:
    """Tell nothing: a job on another machine is seen when it ends."""
