"""Observers of what runs log, for those who watch it elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .jobs import Job

__all__ = ["tensorboard"]


def tensorboard(folder: Path, job: Job) -> Callable[[Mapping[str, Any]], None]:
    """Write the numbers of a run as TensorBoard events into ``tensorboard`` in its folder.

    Each part of the run is a series of its own, over its steps.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("event files need tensorboard: pip install tensorboard") from None
    writers: dict[str, Any] = {}

    def observe(numbers: Mapping[str, Any]) -> None:
        part = str(numbers.get("part", "run"))
        if part not in writers:
            writers[part] = SummaryWriter(str(folder / "tensorboard" / part))
        step = int(numbers.get("step", 0))
        for name, value in numbers.items():
            if isinstance(value, (int, float)) and name != "step":
                writers[part].add_scalar(name, value, step)
        writers[part].flush()

    return observe
