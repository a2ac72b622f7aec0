"""LoRA on tiny_shakespeare: weight decay kept, switched off, and halved."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from ...framework.contract import Record, Recorder, checksum
from ...framework.trunks import Checkpoints, Timeline
from . import _figures
from ._charts import make_charts
from ._figures import draw_figure, rows
from ._lora import PRETRAINING, AdapterConfig, base, pretraining, pretraining_line, tokens
from ._study import PlannedRun, Study, SwitchConfig, absorbed, plans, run_plans, timeline

if TYPE_CHECKING:
    from ._training import Session, Watch

NAME = "tab03_fig03a_lora"
TITLE = "LoRA: weight decay switched off at 2/5 of the fine-tuning"
PAPER = "Table 3 and Figure 3a"
NEEDS = ("transformers.models.gpt2.modeling_gpt2", "peft")
STUDY = Study(
    metric="loss",
    label="validation loss",
    better=-1,
    paper={
        (0, "constant"): "3.44, xl 2.99 (1.0)",
        (0, "off"): "3.42, xl 2.96 (1.0, off)",
        (0, "half"): "3.43, xl 2.97 (0.5)",
        (1, "constant"): "3.43, xl 2.96 (0.2)",
        (1, "off"): "3.41, xl 2.95 (0.2, off)",
        (1, "half"): "3.42, xl 2.96 (0.1)",
    },
    setting="GPT-2 and GPT-2 xl, decay 1.0 and 0.2 at the learning rate 2e-4",
)


class Config(SwitchConfig, AdapterConfig):
    """The setting of Table 3.

    Attributes
    ----------
    lr, momentum : float
        Of SGD.
    steps, off, every, decays, times, loops, target, seeds
        Of `SwitchConfig`; the model, its adapters and the text are of `AdapterConfig`.
    """

    lr: float = Field(default=2e-4, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)

    steps: int = Field(default=500, ge=2)
    off: int = Field(default=200, ge=1)
    every: int = Field(default=20, ge=1)
    decays: tuple[float, ...] = Field(default=(1.0, 0.2), min_length=1)
    target: float = Field(default=1.5, gt=1)
    seeds: tuple[int, ...] = Field(default=(0, 1), min_length=1)

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (seconds), cpu (an own GPT-2, minutes), or full (the paper's GPT-2)."""
        if name == "smoke":
            return cls(
                width=16, layers=1, heads=2, pretraining=10, text="pydoc", characters=20_000,
                length=16, batch=4, validation=4, rank=2, lr=0.05, steps=20, off=8, every=4,
                decays=(0.1, 0.02), times=(4,), loops=True, seeds=(0, 1),
            )  # fmt: skip
        if name == "full":
            return cls(model="gpt2", length=1024, batch=8, times=(100, 300, 400), loops=True)
        return cls(
            lr=0.02, decays=(0.01, 0.002), times=(100, 300, 400), loops=True, seeds=(0, 1, 2, 3, 4)
        )

    def plans(self) -> dict[str, PlannedRun]:
        """Name the runs."""
        weights = absorbed(np.full(self.steps, self.lr), self.momentum)
        found = plans(self.decays, self.off, weights, self.seeds, self.times, self.loops)
        return {plan.key: plan for plan in found}


# --- Training -------------------------------------------------------------------------------------


def timelines(config: Config) -> dict[str, Timeline]:
    """Return what each run does, and the pretraining of an own model."""
    runs = config.plans()
    without = {"seeds", "decays", "off", "times", "loops"}
    shared = {"experiment": NAME, **config.model_dump(mode="json", exclude=without)}
    lines = {key: timeline(plan, config.steps, shared) for key, plan in runs.items()}
    if config.model == "own":
        lines[PRETRAINING] = pretraining_line(config)
    return lines


def advance(
    config: Config, name: str, until: int, checkpoints: Checkpoints, watch: Watch | None = None
) -> None:
    """Train one run up to a step and store its state there, for those that go on from it."""
    from ._training import train_to

    lines = timelines(config)
    build = pretraining(config) if name == PRETRAINING else _building(config, name, checkpoints)
    train_to(build, lines[name], checkpoints, until, watch)


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Train all runs."""
    lines, chosen = timelines(config), config.plans()
    ids = tokens(config).ids
    if PRETRAINING in lines:

        def watch(step: int, found: Mapping[str, float]) -> None:
            recorder.progress(step, config.pretraining, PRETRAINING)

        advance(config, PRETRAINING, config.pretraining, recorder.checkpoints, watch)
    runs = {key: line for key, line in lines.items() if key != PRETRAINING}
    return run_plans(
        recorder, chosen, runs,
        lambda plan: _building(config, plan.key, recorder.checkpoints)(), checksum(ids),
    )  # fmt: skip


def _building(config: Config, name: str, checkpoints: Checkpoints) -> Any:
    """Return what builds a run."""
    plan = config.plans()[name]

    def build() -> Session:
        import torch

        from mirrorflow import SpectralTracker

        from ._language import loss_of, mean_loss, with_lora
        from ._training import Session, controlled

        model = with_lora(base(config, checkpoints), config.rank, config.scaling, plan.seed)
        text = tokens(config)
        held = text.validation(config.validation)
        chosen = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(
            chosen, config.lr, momentum=config.momentum, weight_decay=plan.rate
        )
        schedule = plan.schedule(config.target, window=5)
        return Session(
            model, optimizer, controlled(optimizer, schedule), np.full(config.steps, config.lr),
            lambda step: loss_of(model, text.batch(plan.seed, step, config.batch)),
            lambda: {"loss": mean_loss(model, held, 2 * config.batch)},
            SpectralTracker(model), config.every,
        )  # fmt: skip

    return build


# What the page shows of it.
verdicts, table = partial(_figures.verdicts, STUDY), partial(rows, STUDY)
draw, charts = partial(draw_figure, STUDY), partial(make_charts, STUDY)
