"""A vision transformer from scratch: weight decay kept, switched off, and halved."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from ...framework.contract import Record, Recorder, checksum
from ...framework.trunks import Checkpoints, Timeline
from . import _figures
from ._charts import make_charts
from ._figures import draw_figure, rows
from ._study import Array, PlannedRun, Study, SwitchConfig, absorbed, plans, run_plans, timeline
from ._vision import ImageConfig

if TYPE_CHECKING:
    from ._training import Session, Watch

NAME = "tab02_fig03b_fig13_vit"
TITLE = "Attention: weight decay switched off in the middle of a ViT's training"
PAPER = "Table 2, Figures 3b and 13"
NEEDS = ("transformers.models.vit.modeling_vit",)
STUDY = Study(
    metric="accuracy",
    label="validation accuracy (%)",
    better=1,
    paper={
        (0, "constant"): "52.38 ± 0.16 (0.2)",
        (0, "off"): "56.7 ± 0.39 (0.2, off)",
        (0, "half"): "54.95 ± 0.36 (0.1)",
        (1, "constant"): "57.05 ± 0.27 (0.02)",
        (1, "off"): "57.78 ± 0.32 (0.02, off)",
        (1, "half"): "57.33 ± 0.44 (0.01)",
    },
    setting="CIFAR-10, a larger ViT trained for longer, decay 0.2 and 0.02",
)


class Config(SwitchConfig, ImageConfig):
    """The setting of Table 2.

    Attributes
    ----------
    augment : bool
        Move and mirror the images.
    lr : float
        Of AdamW.
    warmup : int
        Steps in which the learning rate rises; it falls along a cosine after them.
    constant : bool
        Keep the learning rate instead (fine-tuning).
    steps, off, every, decays, times, loops, target, seeds
        Of `SwitchConfig`; the images and the model are of `ImageConfig`.
    """

    augment: bool = False
    lr: float = Field(default=1e-3, gt=0)
    warmup: int = Field(default=1000, ge=0)
    constant: bool = False

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (digits, seconds), cpu (a smaller ViT, 2 epochs), or full (the paper's)."""
        if name == "smoke":
            return cls(
                data="digits", size=8, patch=4, width=16, layers=2, heads=2, batch=64,
                validation=100, warmup=5, steps=20, off=10, every=5, decays=(2.0, 0.2),
                times=(5,), loops=True, target=2.0, seeds=(0, 1),
            )  # fmt: skip
        if name == "full":
            return cls(times=(9_750, 29_250), loops=True)
        return cls(
            patch=8, width=64, layers=4, heads=4, batch=64, validation=5000, warmup=100,
            steps=1500, off=750, every=75, decays=(8.0, 0.8), times=(375, 1125), loops=True,
            target=2.0,
        )  # fmt: skip

    def lrs(self) -> Array:
        """Return the learning rate of each step."""
        steps = np.arange(self.steps)
        if self.constant:
            return np.full(self.steps, self.lr)
        rise = np.minimum(1.0, (steps + 1) / max(1, self.warmup))
        fall = np.clip((steps - self.warmup) / max(1, self.steps - self.warmup), 0, 1)
        return self.lr * rise * (1 + np.cos(np.pi * fall)) / 2

    def plans(self) -> dict[str, PlannedRun]:
        """Name the runs."""
        weights = absorbed(self.lrs())
        found = plans(self.decays, self.off, weights, self.seeds, self.times, self.loops)
        return {plan.key: plan for plan in found}


def timelines(config: Config) -> dict[str, Timeline]:
    """Return what each run does."""
    without = {"seeds", "decays", "off", "times", "loops"}
    shared = {"experiment": NAME, **config.model_dump(mode="json", exclude=without)}
    return {key: timeline(p, config.steps, shared) for key, p in config.plans().items()}


def advance(
    config: Config, name: str, until: int, checkpoints: Checkpoints, watch: Watch | None = None
) -> None:
    """Train one run up to a step and store its state there, for those that go on from it."""
    from ._training import train_to

    plan, line = config.plans()[name], timelines(config)[name]
    train_to(partial(_session, config, plan), line, checkpoints, until, watch)


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Train all runs."""
    from ._vision import images

    data = checksum(images(config.data, config.size)[0].labels)
    lines, chosen = timelines(config), config.plans()
    return run_plans(recorder, chosen, lines, lambda plan: _session(config, plan), data)


def _session(config: Config, plan: PlannedRun) -> Session:
    """Build a run."""
    import torch

    from mirrorflow import SpectralTracker

    from ._training import Session, controlled
    from ._vision import accuracy, images, loss_of, parameter_groups, vit

    training, validation = images(config.data, config.size)
    model = vit(
        config.model, config.size, config.patch, config.width, config.layers, config.heads,
        training.classes, plan.seed,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(parameter_groups(model, plan.rate), config.lr)
    held = validation.parts(config.validation, 4 * config.batch)
    return Session(
        model, optimizer, controlled(optimizer, plan.schedule(config.target, window=5)),
        config.lrs(),
        lambda s: loss_of(model, training.batch(plan.seed, s, config.batch, config.augment)),
        lambda: accuracy(model, held), SpectralTracker(model), config.every,
    )  # fmt: skip


# What the page shows of it.
verdicts, table = partial(_figures.verdicts, STUDY), partial(rows, STUDY)
draw, charts = partial(draw_figure, STUDY), partial(make_charts, STUDY)
