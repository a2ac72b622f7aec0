"""Weight decay and spectra in Lightning: a callback.

.. code-block:: python

    from mirrorflow.integrations.lightning import DecayCallback
    control = DecayCallback(mf.SwitchOff(0.1, at=200), track_every=50)
    lightning.Trainer(callbacks=[control]).fit(model)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.rank_zero import (
        rank_zero_info,  # pyright: ignore[reportPrivateImportUsage]
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "DecayCallback needs lightning, of the extra lightning: pip install '.[lightning]'",
        name="lightning",
    ) from error

from ..control.loop import ControlledDecay
from ..control.plan import RunSettings
from ..control.readings import Metric
from ..control.report import RunReport, save_report
from ..schedule import Schedule
from ..spectrum import Measurement
from ..spectrum.pairs import Named
from ..weightdecay import Feedback, PerLayer, WeightDecayScheduler

__all__ = ["DecayCallback"]


class DecayCallback(Callback):
    """Let a schedule set the weight decay of one of a module's optimizers, and log what it does.

    It logs with the module's loggers, at ``log_every_n_steps`` or when something was measured:
    decay, lr x decay, what has been absorbed, the time scale and the means of the spectra, as
    `ControlledDecay.logs` gives them, at the steps of its own optimizer; if there are several, with
    ``optimizer0/`` before each name. Its state is saved with Lightning's checkpoints and restored
    with them. Each run begins with fresh closed loops, copies of those that were given.

    At the end it says `report` through Lightning's own log of level INFO, on the first process, and
    saves it as ``mirrorflow-report.json`` and ``.html`` in ``trainer.log_dir``; without a logger it
    does neither.

    Parameters
    ----------
    schedule : Schedule, callable, Feedback or PerLayer
        The rate at each optimizer step. `HoldRatio`, `OffWhenLevel` and `OffBelow` are fed what is
        measured, in `PerLayer` their layer's, so that they need ``track_every``.
        `OffAtBudget` answers to what has been absorbed, at every step.
    schedule_for : callable int -> schedule
        Instead of ``schedule``, for times that are fractions of the run: it gets the number of
        optimizer steps, Lightning's ``estimated_stepping_batches``.
    track_every : int
        Measure the spectra every so many steps of the optimizer; 0 for never.
    metric : str or callable Measurement -> float
        What closed loops are fed, as for `ControlledDecay`; the mean ratio by default.
    optimizer : int
        Which of the module's optimizers; one callback for each that shall be scheduled.
    level, match, pairs, values, frozen
        What is measured, as for `SpectralTracker`.
    balance_every : int
        Keep the exact account of D of each product for the report, as for `ControlledDecay`.
    **options
        For `WeightDecayScheduler`.

    Attributes
    ----------
    schedule : Schedule, callable, Feedback or PerLayer
        What acts in the run, or in the last one; before training, what was given.
    scheduler : WeightDecayScheduler or None
        None before training.
    measurements : list of (step, Measurement)
        What was measured.
    """

    def __init__(
        self,
        # Spelled out, because LightningCLI makes objects by the annotation.
        schedule: Schedule | Feedback | PerLayer | Callable[[int], float] | None = None,
        *,
        schedule_for: Callable[[int], Any] | None = None,
        track_every: int = 0,
        metric: Metric = "ratio",
        optimizer: int = 0,
        level: str = "layer",
        match: str | None = None,
        pairs: Named | None = None,
        values: bool = False,
        frozen: bool = False,
        balance_every: int = 0,
        **options: Any,
    ) -> None:
        tracked = {
            "level": level, "match": match, "pairs": pairs, "values": values, "frozen": frozen,
            "balance_every": balance_every,
        }  # fmt: skip
        self._plan = RunSettings(schedule, schedule_for, track_every, metric, tracked, options)
        self.index = optimizer
        self._loop: ControlledDecay | None = None
        self._saved: Mapping[str, Any] | None = None
        self._steps = 0  # of the optimizer, at the end of the last batch

    @property
    def state_key(self) -> str:
        """Tell the callbacks of several optimizers apart."""
        return self._generate_state_key(optimizer=self.index)

    @property
    def schedule(self) -> Any:
        """What acts."""
        return self._plan.schedule if self._loop is None else self._loop.schedule

    @property
    def scheduler(self) -> WeightDecayScheduler | None:
        """What sets the decay."""
        return None if self._loop is None else self._loop.scheduler

    @property
    def measurements(self) -> list[tuple[int, Measurement]]:
        """What was measured."""
        return [] if self._loop is None else self._loop.measurements

    def rows(self) -> list[dict[str, Any]]:
        """Return what was measured as flat rows, as `ControlledDecay.rows`."""
        return [] if self._loop is None else self._loop.rows()

    def report(self) -> RunReport:
        """Return what the run shows, and what it cannot show, as `ControlledDecay.report`."""
        if self._loop is None:
            raise ValueError(
                "the report must be asked for once training has begun, got none yet. Call fit()."
            )
        return self._loop.report()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the optimizer, which has loaded its own state by now."""
        if self._loop is not None:
            self._loop.close()
        if self.index not in range(len(trainer.optimizers)):
            raise ValueError(
                f"DecayCallback: optimizer must be the index of one of the module's "
                f"{len(trainer.optimizers)} optimizers, got {self.index}"
            )
        total = self._length(trainer, pl_module)
        self._loop = loop = self._plan.begin(pl_module, trainer.optimizers[self.index], total)
        if self._saved is not None:
            loop.load_state_dict(self._saved)
            self._saved = None
        elif trainer.global_step > 0 and loop.scheduler.steps == 0:
            self._start_late(loop, trainer)
        elif loop.track_every and loop.scheduler.steps == 0:
            loop.measure(0)
            self._log(trainer, loop.logs())
        self._steps = loop.scheduler.steps

    def _length(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Return the number of steps of a run, as far as it is known: else -1 or infinity."""
        if not pl_module.automatic_optimization and self._plan.schedule_for is None:
            return trainer.max_steps  # a batch may have several steps
        return trainer.estimated_stepping_batches

    def _start_late(self, loop: ControlledDecay, trainer: Trainer) -> None:
        """Begin in the middle of a run, where Lightning knows the step."""
        if len(trainer.optimizers) == 1:
            loop.start_at(trainer.global_step)
            return
        warnings.warn(
            f"DecayCallback(optimizer={self.index}) is new in a run that goes on from step "
            f"{trainer.global_step}, which counts the steps of all optimizers: its schedule begins "
            "at step 0",
            stacklevel=2,
        )

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Measure and log where it is due."""
        assert self._loop is not None
        if not self._loop.scheduler.account.fresh:
            return  # a batch of accumulated gradients
        every, before, steps = trainer.log_every_n_steps, self._steps, self._loop.scheduler.steps
        self._steps = steps
        if numbers := self._loop.step():
            self._log(trainer, numbers)
        elif every > 0 and steps // every > before // every:
            self._log(trainer, self._loop.logs(spectra=False))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say the report, and save it."""
        if self._loop is None or not trainer.loggers:
            return
        report = self._loop.report()  # on every process: shards meet in it
        folder = trainer.log_dir  # on every process, likewise
        if not trainer.is_global_zero:
            return
        name = f"optimizer{self.index}-" if len(trainer.optimizers) > 1 else ""
        if folder is not None:
            save_report(report, Path(folder) / f"mirrorflow-{name}report.json")
        rank_zero_info(f"\n{report}")

    def _log(self, trainer: Trainer, numbers: dict[str, float]) -> None:
        """Hand the numbers to the loggers, at the optimizer's own step."""
        assert self._loop is not None
        several = len(trainer.optimizers) > 1  # whose numbers would be one zigzag
        prefix = f"optimizer{self.index}/" if several else ""
        named = {f"{prefix}{name}": value for name, value in numbers.items()}
        for logger in trainer.loggers:
            logger.log_metrics(named, step=self._loop.scheduler.steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, in plain numbers and strings."""
        return {} if self._loop is None else self._loop.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there is an optimizer; Lightning loads it first."""
        self._saved = state_dict or None
