"""Weight decay and spectra in Lightning: a callback.

.. code-block:: python

    from mirrorflow.integrations.lightning import DecayCallback
    control = DecayCallback(mf.SwitchOff(0.1, at=200), track_every=50)
    lightning.Trainer(callbacks=[control]).fit(model)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..spectrum import Measurement
from ..weightdecay import WeightDecayScheduler
from .loop import ControlledDecay, check_settings

__all__ = ["DecayCallback"]


class DecayCallback(Callback):
    """Let a schedule set the weight decay of one of a module's optimizers, and log what it does.

    It logs with the module's loggers, at ``log_every_n_steps`` or when something was measured:
    ``weight_decay`` (the largest of the groups), ``absorbed_decay`` (the largest -a_T) and the
    spectra. Its state is saved with Lightning's checkpoints and restored with them.

    Parameters
    ----------
    schedule : Schedule, callable, Feedback or PerLayer
        The rate at each optimizer step. `HoldRatio` and `OffWhenLevel` are fed the mean ratio of
        each measurement, in `PerLayer` that of their layer, so that they need ``track_every``.
        `OffAtBudget` answers to what has been absorbed, at every step.
    track_every : int
        Measure the spectra every so many steps of the optimizer; 0 for never.
    optimizer : int
        Which of the module's optimizers; one callback for each that shall be scheduled.
    **settings
        ``level`` and ``match`` as for `SpectralTracker`, the rest for `WeightDecayScheduler`.

    Attributes
    ----------
    scheduler : WeightDecayScheduler or None
        None before training.
    measurements : list of (step, Measurement)
        What was measured.
    """

    def __init__(
        self, schedule: Any, *, track_every: int = 0, optimizer: int = 0, **settings: Any
    ) -> None:
        check_settings(schedule, track_every)
        self.schedule, self.index = schedule, optimizer
        self._settings: dict[str, Any] = {"track_every": track_every, **settings}
        self._loop: ControlledDecay | None = None
        self._saved: Mapping[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Tell the callbacks of several optimizers apart."""
        return self._generate_state_key(optimizer=self.index)

    @property
    def scheduler(self) -> WeightDecayScheduler | None:
        """What sets the decay."""
        return None if self._loop is None else self._loop.scheduler

    @property
    def measurements(self) -> list[tuple[int, Measurement]]:
        """What was measured."""
        return [] if self._loop is None else self._loop.measurements

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the optimizer, which has loaded its own state by now."""
        if self._loop is not None:
            self._loop.close()
        if self.index >= len(trainer.optimizers):
            raise ValueError(
                f"DecayCallback(optimizer={self.index}): the module has "
                f"{len(trainer.optimizers)} optimizers"
            )
        self._loop = loop = ControlledDecay(
            pl_module, trainer.optimizers[self.index], self.schedule, **self._settings
        )
        if self._saved is not None:
            loop.load_state_dict(self._saved)
            self._saved = None
        elif loop.track_every and loop.scheduler.steps == 0:
            loop.measure(0)
            self._log(trainer, loop.logs())

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Measure and log where it is due."""
        assert self._loop is not None
        if not self._loop.scheduler.account.fresh:
            return  # a batch of accumulated gradients
        every = trainer.log_every_n_steps
        if numbers := self._loop.step():
            self._log(trainer, numbers)
        elif every > 0 and self._loop.scheduler.steps % every == 0:
            self._log(trainer, self._loop.logs(spectra=False))

    def _log(self, trainer: Trainer, numbers: dict[str, float]) -> None:
        """Hand the numbers to the loggers."""
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Give the state, in plain numbers and strings."""
        return {} if self._loop is None else self._loop.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there is an optimizer; Lightning loads it first."""
        self._saved = state_dict or None
