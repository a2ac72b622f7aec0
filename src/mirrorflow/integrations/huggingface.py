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
from ..weightdecay import Feedback, OffAtBudget, WeightDecayScheduler

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
    schedule : Schedule, callable, or Feedback
        The rate at each optimizer step. `HoldRatio` and `OffWhenLevel` are fed the mean ratio of
        each measurement, `OffAtBudget` what has been absorbed; they need ``track_every``.
    track_every : int
        Measure the spectra every so many steps; 0 for never.
    level, match : str
        What is measured, as for `SpectralTracker`.
    **options
        For `WeightDecayScheduler`: ``relative``, ``groups``, ``decoupled``, ``convention``.

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
    if not isinstance(track_every, int) or track_every < 0:
        raise ValueError(f"track_every must be an integer >= 0, got {track_every!r}")
    if isinstance(schedule, Feedback) and not track_every:
        raise ValueError(f"{type(schedule).__name__} needs track_every > 0: it is fed by measuring")
    control = DecayControl(
        trainer, schedule, track_every, {"level": level, "match": match}, options
    )
    trainer.add_callback(control)
    return control


class DecayControl(TrainerCallback):
    """The callback that `control_decay` adds.

    With the Trainer's own logs it logs ``weight_decay`` (the largest of the groups) and
    ``absorbed_decay`` (the largest -a_T), and with each measurement ``spectrum/ratio``,
    ``spectrum/ratio_of_means``, ``spectrum/gap`` and ``spectrum/undefined``. Its state is saved
    with every checkpoint and found again without any flag; where a checkpoint has been moved, the
    totals still come with the optimizer, only the rows of the audit begin anew.

    Attributes
    ----------
    scheduler : WeightDecayScheduler or None
        None before training.
    tracker : SpectralTracker or None
        None before training, or if nothing is tracked.
    measurements : list of (step, Measurement)
        What was measured.
    """

    def __init__(
        self,
        trainer: Any,
        schedule: Any,
        track_every: int,
        tracking: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        self._trainer, self.schedule, self.track_every = trainer, schedule, track_every
        self._tracking, self._options = tracking, options
        self.scheduler: WeightDecayScheduler | None = None
        self.tracker: SpectralTracker | None = None
        self.measurements: list[tuple[int, Measurement]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the optimizer, which has loaded its own state by now."""
        if self.scheduler is not None:
            self.scheduler.close()
        model = kwargs["model"]
        self.scheduler = WeightDecayScheduler(
            kwargs["optimizer"], self.schedule, model=model, **self._options
        )
        saved = self._folder(args, state) / STATE
        if state.global_step > 0 and saved.exists():
            self._load(json.loads(saved.read_text(encoding="utf-8")))
        if self.track_every:
            self.tracker = SpectralTracker(model, **self._tracking)
            if state.global_step == 0:
                self._measure(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log with the Trainer's logs, and measure where it is due."""
        if self.scheduler is None:
            return
        due = self.track_every and state.global_step % self.track_every == 0
        if due:
            self._measure(state.global_step)
        if due or control.should_log:
            self._log(spectra=bool(due))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the ledger beside the optimizer's state."""
        if self.scheduler is None or not state.is_world_process_zero:
            return
        path = self._folder(args, state) / STATE
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{STATE}.{os.getpid()}")
        content = {"scheduler": self.scheduler.state_dict(), "feedback": None}
        if isinstance(self.schedule, Feedback):
            content["feedback"] = self.schedule.state_dict()
        draft.write_text(json.dumps(content), encoding="utf-8")
        draft.replace(path)

    def _load(self, saved: dict[str, Any]) -> None:
        """Continue from what `on_save` has written."""
        assert self.scheduler is not None
        if isinstance(self.schedule, Feedback) and saved["feedback"] is not None:
            self.schedule.load_state_dict(saved["feedback"])
        self.scheduler.load_state_dict(saved["scheduler"])

    def _folder(self, args: Any, state: Any) -> Path:
        """Give the folder of the checkpoint of this step."""
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"

    def _measure(self, step: int) -> None:
        """Measure the spectra; every process must. A schedule with feedback takes its answer."""
        assert self.tracker is not None and self.scheduler is not None
        found = self.tracker.measure()
        self.measurements.append((step, found))
        if isinstance(self.schedule, Feedback):
            budget = isinstance(self.schedule, OffAtBudget)
            value = -min(self.scheduler.accumulated) if budget else found.mean_ratio
            self.schedule.update(step, value)
            self.scheduler.step()

    def _log(self, spectra: bool) -> None:
        """Hand the numbers to the Trainer, and thereby to all its reporters."""
        assert self.scheduler is not None
        logs = {
            "weight_decay": max(self.scheduler.get_last_weight_decay()),
            "absorbed_decay": max(-a for a in self.scheduler.accumulated),
        }
        if spectra:
            found = self.measurements[-1][1]
            logs |= {
                "spectrum/ratio": found.mean_ratio,
                "spectrum/ratio_of_means": found.ratio_of_means,
                "spectrum/gap": found.summary()["mean_gap"],
                "spectrum/undefined": float(found.undefined),
            }
        self._trainer.log({k: v for k, v in logs.items() if v == v})  # without NaN
