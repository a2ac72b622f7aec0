"""Sweeps: many configurations of an experiment, with shared beginnings, here or on a cluster.

- `Study` says which configurations; `Study.read` reads it from a TOML file.
- `plan` makes its jobs: the beginnings that several runs share, and the runs.
- `sweep` carries them out and survives whatever is killed; the same call goes on.
- `status` says how far a sweep is, and `export` writes the records of its runs into one table.
"""

from .driver import Outcome, sweep
from .jobs import Job, SweepPlan, plan
from .status import RunState, export, status
from .study import Study

__all__ = ["Job", "Outcome", "RunState", "Study", "SweepPlan", "export", "plan", "status", "sweep"]
