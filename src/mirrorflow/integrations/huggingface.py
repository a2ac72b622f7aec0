"""Weight decay and spectra in a Hugging Face `Trainer`: three lines in a script.

.. code-block:: python

    from mirrorflow.integrations.huggingface import control_decay
    control = control_decay(trainer, mf.SwitchOff(0.1, at=200), track_every=50)
    trainer.train()
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..spectrum import Measurement, SpectralTracker
from ..weightdecay import WeightDecayScheduler
from .loop import ControlledDecay, check_settings

__all__ = ["DecayControl", "control_decay"]

STATE = "mirrorflow.json"  # beside optimizer.pt in a checkpoint


def control_decay(
    trainer: Any,
    schedule: Any,
    *,
    track_every: int = 0,
    level: str = "layer",
    match: str | None = None,
    **options: Any,
) -> DecayControl:
    """Let a schedule set the weight decay of a `Trainer`, and log what it does.

    Parameters
    ----------
    trainer : transformers.Trainer
        With ``TrainingArguments(weight_decay=...)`` above 0: its value is replaced, but it says
        which parameters decay at all.
    schedule : Schedule, callable, Feedback or PerLayer
        The rate at each optimizer step. `HoldRatio` and `OffWhenLevel` are fed the mean ratio of
        each measurement, in `PerLayer` that of their layer, so that they need ``track_every``.
        `OffAtBudget` answers to what has been absorbed, at every step.
    track_every : int
        Measure the spectra every so many steps; 0 for never.
    level, match : str
        What is measured, as for `SpectralTracker`.
    **options
        For `WeightDecayScheduler`: ``relative``, ``groups``, ``decoupled``, ``exact_off``,
        ``convention``.

    Returns
    -------
    DecayControl
        Already added to the trainer. After training: ``scheduler.accumulated``,
        ``scheduler.audit()`` and ``measurements``.

    Raises
    ------
    ValueError
        When training begins: if no group of the optimizer decays, or nothing can be measured.
    """
    check_settings(schedule, track_every)
    settings = {"track_every": track_every, "level": level, "match": match} | options
    control = DecayControl(trainer, schedule, settings)
    trainer.add_callback(control)
    return control


class DecayControl(TrainerCallback):
    """The callback that `control_decay` adds.

    With the Trainer's own logs it logs ``weight_decay`` (the largest of the groups) and
    ``absorbed_decay`` (the largest -a_T), and with each measurement ``spectrum/ratio``,
    ``spectrum/ratio_of_means``, ``spectrum/gap`` and ``spectrum/undefined``, with `PerLayer` also
    the ratio and the decay of each layer. Its state is saved with every checkpoint and found again
    without any flag; where a checkpoint has been moved, the totals and the state of closed loops
    still come with the optimizer, only the rows of the audit and the log of decisions begin anew.

    Attributes
    ----------
    scheduler : WeightDecayScheduler or None
        None before training.
    tracker : SpectralTracker or None
        None before training, or if nothing is tracked.
    measurements : list of (step, Measurement)
        What was measured.
    """

    def __init__(self, trainer: Any, schedule: Any, settings: dict[str, Any]) -> None:
        self._trainer, self.schedule, self._settings = trainer, schedule, settings
        self._loop: ControlledDecay | None = None

    @property
    def scheduler(self) -> WeightDecayScheduler | None:
        """What sets the decay."""
        return None if self._loop is None else self._loop.scheduler

    @property
    def tracker(self) -> SpectralTracker | None:
        """What measures."""
        return None if self._loop is None else self._loop.tracker

    @property
    def measurements(self) -> list[tuple[int, Measurement]]:
        """What was measured."""
        return [] if self._loop is None else self._loop.measurements

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the optimizer, which has loaded its own state by now."""
        if self._loop is not None:
            self._loop.close()
        self._loop = loop = ControlledDecay(
            kwargs["model"], kwargs["optimizer"], self.schedule, **self._settings
        )
        saved = self._folder(args, state) / STATE
        if state.global_step > 0 and saved.exists():
            loop.load_state_dict(json.loads(saved.read_text(encoding="utf-8")))
        if loop.track_every and state.global_step == 0:
            loop.measure(0)
            self._trainer.log(loop.logs())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log with the Trainer's logs, and measure where it is due."""
        if self._loop is None:
            return
        due, should_log = self._loop.advance(state.global_step), control.should_log
        if due or should_log:
            self._trainer.log(self._loop.logs(spectra=due))
            control.should_log = should_log  # logging clears it, and the loss would not be logged

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the ledger beside the optimizer's state."""
        if self._loop is None or not state.is_world_process_zero:
            return
        path = self._folder(args, state) / STATE
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{STATE}.{os.getpid()}")
        draft.write_text(json.dumps(self._loop.state_dict()), encoding="utf-8")
        draft.replace(path)

    def _folder(self, args: Any, state: Any) -> Path:
        """Give the folder of the checkpoint of this step."""
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"
