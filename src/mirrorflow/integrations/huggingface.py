"""Weight decay and spectra in a Hugging Face `Trainer`: three lines in a script.

.. code-block:: python

    from mirrorflow.integrations.huggingface import control_decay
    control = control_decay(trainer, mf.SwitchOff(0.1, at=200), track_every=50)
    trainer.train()
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    from transformers import Trainer, TrainerCallback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "control_decay needs transformers, of the extra hf: pip install '.[hf]'",
        name="transformers",
    ) from error

from ..control.loop import ControlledDecay
from ..control.plan import RunSettings
from ..control.readings import Metric
from ..control.report import RunReport, save_report
from ..spectrum import Measurement, SpectralTracker
from ..spectrum.pairs import Named
from ..weightdecay import WeightDecayScheduler

__all__ = ["DecayControl", "control_decay"]

STATE = "mirrorflow.json"  # beside optimizer.pt in a checkpoint
REPORT = "mirrorflow-report.json"  # in the folder of the run


def control_decay(
    trainer: Any,
    schedule: Any = None,
    *,
    schedule_for: Callable[[int], Any] | None = None,
    track_every: int = 0,
    metric: Metric = "ratio",
    level: str = "layer",
    match: str | None = None,
    pairs: Named | None = None,
    values: bool = False,
    frozen: bool = False,
    balance_every: int = 0,
    **options: Any,
) -> DecayControl:
    """Let a schedule set the weight decay of a `Trainer`, and log what it does.

    Parameters
    ----------
    trainer : transformers.Trainer
        With ``TrainingArguments(weight_decay=...)`` above 0: its value is replaced, but it says
        which parameters decay at all.
    schedule : Schedule, callable, Feedback or PerLayer
        The rate at each optimizer step. `HoldRatio`, `OffWhenLevel` and `OffBelow` are fed what is
        measured, in `PerLayer` their layer's, so that they need ``track_every``.
        `OffAtBudget` answers to what has been absorbed, at every step.
    schedule_for : callable int -> schedule
        Instead of ``schedule``, for times that are fractions of the run: it gets the number of
        optimizer steps, as in ``lambda total: mf.SwitchOff(0.1, at=0.6 * total)``.
    track_every : int
        Measure the spectra every so many steps; 0 for never.
    metric : str or callable Measurement -> float
        What closed loops are fed, as for `ControlledDecay`; the mean ratio by default.
    level, match, pairs, values, frozen
        What is measured, as for `SpectralTracker`.
    balance_every : int
        Keep the exact account of D of each product for the report, as for `ControlledDecay`.
    **options
        For `WeightDecayScheduler`: ``relative``, ``groups``, ``decoupled``, ``exact_off``,
        ``convention``.

    Returns
    -------
    DecayControl
        Already added to the trainer. After training: ``report()``, ``scheduler.accumulated``,
        ``scheduler.audit()``, ``measurements`` and ``rows()``.

    Raises
    ------
    TypeError, ValueError
        At once if a setting is not possible; when training begins, if no group of the optimizer
        decays, or nothing can be measured.
    """
    tracked = {
        "level": level, "match": match, "pairs": pairs, "values": values, "frozen": frozen,
        "balance_every": balance_every,
    }  # fmt: skip
    plan = RunSettings(schedule, schedule_for, track_every, metric, tracked, options)
    control = DecayControl(trainer, plan)
    trainer.add_callback(control)
    return control


class DecayControl(TrainerCallback):
    """The callback that `control_decay` adds.

    With the Trainer's own logs it logs decay, lr x decay, what has been absorbed and the time
    scale, and with each measurement the means of the spectra, with `PerLayer` also what each layer
    has answered to: see `ControlledDecay.logs`. Its state is saved with every checkpoint and found
    again without any flag; where a checkpoint has been moved, the totals and the state of closed
    loops still come with the optimizer, only the rows of the audit and the log of decisions begin
    anew. Each run begins with fresh closed loops, copies of those that were given.

    At the end of the run it prints `report`, and saves it as ``mirrorflow-report.json`` and
    ``.html`` in the folder of the run. It prints nothing where the Trainer logs nothing
    (``logging_strategy="no"``) or only errors (``log_level="error"`` or "critical").

    Attributes
    ----------
    schedule : Schedule, callable, Feedback or PerLayer
        What acts in the run, or in the last one; before training, what was given.
    scheduler : WeightDecayScheduler or None
        None before training.
    tracker : SpectralTracker or None
        None before training, or if nothing is tracked.
    measurements : list of (step, Measurement)
        What was measured.
    """

    def __init__(self, trainer: Any, plan: RunSettings) -> None:
        self._trainer, self._plan = trainer, plan
        self._loop: ControlledDecay | None = None
        self._logged = -1  # the step of the last row

    @property
    def schedule(self) -> Any:
        """What acts."""
        return self._plan.schedule if self._loop is None else self._loop.schedule

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

    def rows(self) -> list[dict[str, Any]]:
        """Return what was measured as flat rows, as `ControlledDecay.rows`."""
        return [] if self._loop is None else self._loop.rows()

    def report(self) -> RunReport:
        """Return what the run shows, and what it cannot show, as `ControlledDecay.report`."""
        if self._loop is None:
            raise ValueError(
                "the report must be asked for once training has begun, got none yet. Call train()."
            )
        return self._loop.report()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the optimizer, which has loaded its own state by now."""
        if self._loop is not None:
            self._loop.close()
        self._loop = loop = self._plan.begin(kwargs["model"], kwargs["optimizer"], state.max_steps)
        if state.global_step == 0:
            if loop.track_every:
                loop.measure(0)
                self._log(state, control)
            return
        saved = self._folder(state) / STATE
        if saved.exists():
            _load(loop, saved)
        elif loop.scheduler.steps == 0:  # nor does the optimizer know of any
            loop.start_at(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log with the Trainer's logs, and measure where it is due."""
        if self._loop is None:
            return
        due = self._loop.advance(state.global_step)
        if due or control.should_log:
            self._log(state, control, spectra=due)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log with the Trainer's logs of ``logging_strategy="epoch"``."""
        if self._loop is not None and control.should_log and self._logged != state.global_step:
            self._log(state, control, spectra=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the report, and save it."""
        if self._loop is None:
            return
        report = self._loop.report()  # on every process: shards meet in it
        if not state.is_world_process_zero:
            return
        save_report(report, self._run_folder(state) / REPORT)
        quiet = args.log_level in ("error", "critical")
        if args.logging_strategy != "no" and not quiet:
            print(f"\n{report}")

    def _log(self, state: Any, control: Any, spectra: bool = True) -> None:
        """Hand the numbers to whatever watches the training.

        Not by the log method of a subclass: TRL's trainers average their metrics there and begin
        anew with each call, so that theirs would be in our row, and of too few steps.
        """
        assert self._loop is not None
        should_log = control.should_log
        Trainer.log(self._trainer, self._loop.logs(spectra))
        control.should_log = should_log  # logging clears it, and the loss would not be logged
        self._logged = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the ledger beside the optimizer's state."""
        if self._loop is None:
            return
        saved = self._loop.state_dict()  # on every process: shards meet in it
        if not state.is_world_process_zero:
            return
        path = self._folder(state) / STATE
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{STATE}.{os.getpid()}")
        draft.write_text(json.dumps(saved), encoding="utf-8")
        draft.replace(path)

    def _folder(self, state: Any) -> Path:
        """Return the folder of the checkpoint of this step."""
        return self._run_folder(state) / f"checkpoint-{state.global_step}"

    def _run_folder(self, state: Any) -> Path:
        """Return the folder of the run; a trial of a search has its own."""
        trial = self._trainer._trial if state.is_hyper_param_search else None
        return Path(self._trainer._get_output_dir(trial))


def _load(loop: ControlledDecay, path: Path) -> None:
    """Continue from a file.

    Raises
    ------
    ValueError
        If it is damaged or of another run, with its name and what to do.
    """
    try:
        loop.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if type(error) is ValueError:  # it was read, and refused; errors of JSON are subclasses
            raise ValueError(f"{path}: {error}") from error
        raise ValueError(
            f"{path} cannot be used: {type(error).__name__}: {error}. If it is damaged, remove it: "
            "the optimizer's checkpoint has the step, the totals and the state of closed loops, "
            "only the rows of audit() and the log of decisions are lost with it"
        ) from error
