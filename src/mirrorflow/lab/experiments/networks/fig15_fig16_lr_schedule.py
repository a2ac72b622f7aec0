"""Fine-tuning a ViT with a constant and with a restarted learning rate, under weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from ...framework.contract import Part, Record, Recorder, Trajectory, Verdict, checksum
from ...framework.trunks import Checkpoints, Timeline
from ._study import Array, diverged, interval, values
from ._vision import ImageConfig

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure

    from ._training import Session, Watch

NAME = "fig15_fig16_lr_schedule"
TITLE = "A falling learning rate: does it act like switching the decay off?"
PAPER = "Figures 15 and 16"
NEEDS = ("transformers.models.vit.modeling_vit",)
PRETRAINING = "pretraining"
OPTIMIZERS = ("adamw", "sgd")
# "held": the learning rate falls, what the decay does to a weight in a step stays.
RATES = ("constant", "restarts", "held")


class Config(ImageConfig):
    """The setting of Appendix G.

    Attributes
    ----------
    pretraining : int
        Steps of AdamW that train the own model before.
    lr, sgd_lr, momentum : float
        Of AdamW; of SGD.
    steps, restart, every : int
        Steps of fine-tuning; of a cycle of CosineAnnealingWarmRestarts; between measurements.
    decays, sgd_decays : tuple of float
        The decay under AdamW, and under SGD (L2 in the gradient, as torch has it).
    seeds : tuple of int
        Of the start and of the order of the data; the images and the model are of `ImageConfig`.
    """

    pretraining: int = Field(default=20_000, ge=1)
    lr: float = Field(default=1e-4, gt=0)
    sgd_lr: float = Field(default=1e-2, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    steps: int = Field(default=20_000, ge=2)
    restart: int = Field(default=10_000, ge=1)
    every: int = Field(default=500, ge=1)
    decays: tuple[float, ...] = Field(default=(0.001, 0.003, 0.005, 0.007, 0.01), min_length=2)
    sgd_decays: tuple[float, ...] = Field(default=(0.001, 0.003, 0.005, 0.007, 0.01), min_length=2)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)

    @model_validator(mode="after")
    def _paired(self) -> Config:
        """Refuse lists of decays that cannot be drawn side by side."""
        if len(self.decays) != len(self.sgd_decays):
            raise ValueError("decays and sgd_decays must have the same length")
        return self

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (digits, seconds), cpu (a smaller ViT, minutes) or full (longer runs)."""
        if name == "smoke":
            return cls(
                data="digits", size=8, patch=4, width=16, layers=1, heads=2, batch=64,
                validation=100, pretraining=20, lr=1e-3, steps=8, restart=4, every=2,
                decays=(1.0, 10.0), sgd_decays=(0.01, 0.1),
            )  # fmt: skip
        if name == "full":
            return cls()
        return cls(
            patch=8, width=64, layers=6, heads=4, validation=5000, pretraining=1500, lr=3e-4,
            steps=400, restart=200, every=40, decays=(0.3, 0.9, 1.5, 2.1, 3.0),
            seeds=(0, 1, 2),
        )  # fmt: skip

    def lrs(self, optimizer: str, rate: str) -> Array:
        """Return the learning rate of each step."""
        peak = self.lr if optimizer == "adamw" else self.sgd_lr
        if rate == "constant":
            return np.full(self.steps, peak)
        within = np.arange(self.steps) % self.restart / self.restart
        return peak * (1 + np.cos(np.pi * within)) / 2

    def plans(self) -> dict[str, RatePlan]:
        """Name the runs."""
        lists = {"adamw": self.decays, "sgd": self.sgd_decays}
        found = [
            RatePlan(optimizer, rate, decay, seed)
            for seed in self.seeds
            for optimizer in OPTIMIZERS
            for rate in RATES
            for decay in lists[optimizer]
        ]
        return {plan.key: plan for plan in found}


@dataclass(frozen=True)
class RatePlan:
    """One run: its optimizer, its learning rate (one of `RATES`), its decay."""

    optimizer: str
    rate: str
    decay: float
    seed: int

    @property
    def key(self) -> str:
        """The name of the run's part."""
        return f"{self.optimizer}-{self.rate}-{self.decay:g}-seed{self.seed}"


def timelines(config: Config) -> dict[str, Timeline]:
    """Return what each run does, and the pretraining of each seed."""
    without = {"seeds", "decays", "sgd_decays"}
    shared = {"experiment": NAME, **config.model_dump(mode="json", exclude=without)}
    fine = {
        key: Timeline(
            {**shared, "optimizer": p.optimizer, "rate": p.rate, "seed": p.seed},
            np.full(config.steps, p.decay),
        )
        for key, p in config.plans().items()
    }
    if config.model != "own":
        return fine
    names = ("data", "size", "patch", "width", "layers", "heads", "batch", "pretraining")
    own = {"experiment": NAME, PRETRAINING: {name: shared[name] for name in names}}
    lines = {
        f"{PRETRAINING}-seed{seed}": Timeline({**own, "seed": seed}, np.zeros(config.pretraining))
        for seed in config.seeds
    }
    return {**lines, **fine}


def advance(
    config: Config, name: str, until: int, checkpoints: Checkpoints, watch: Watch | None = None
) -> None:
    """Train one run up to a step and store its state there, for those that go on from it."""
    from ._training import train_to

    if name.startswith(PRETRAINING):
        seed = int(name.rpartition("seed")[2])
        build = partial(_pretraining, config, seed)
    else:
        build = partial(_session, config, config.plans()[name], checkpoints)
    train_to(build, timelines(config)[name], checkpoints, until, watch)


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Train the own model, and fine-tune it in every way."""
    from ._training import device
    from ._vision import images

    recorder.device = device()
    lines, records, done = timelines(config), [], 0
    data = checksum(images(config.data, config.size)[0].labels)
    steps = sum(line.steps for line in lines.values())
    for key, line in lines.items():

        def watch(step: int, found: Mapping[str, float], key: str = key, base: int = done) -> None:
            if found and not key.startswith(PRETRAINING):
                recorder.log(step=step, run=key, **found)
            recorder.progress(base + step, steps, key)

        if key.startswith(PRETRAINING):
            advance(config, key, line.steps, recorder.checkpoints, watch)
        else:
            part = recorder.part(key, lambda k=key, w=watch: _part(config, k, recorder, w, data))
            records += part.records
        done += line.steps
    return records


def _part(config: Config, key: str, recorder: Recorder, watch: Watch, data: str) -> Part:
    """Train a run, and give its record and its curves."""
    from ._training import train

    plan, line = config.plans()[key], timelines(config)[key]
    session = train(
        lambda: _session(config, plan, recorder.checkpoints), line, recorder.checkpoints,
        watch=watch,
    )  # fmt: skip
    curves = {name: np.array(found) for name, found in session.curves.items()}
    lists = {"adamw": config.decays, "sgd": config.sgd_decays}
    record = {
        "part": key,
        "optimizer": plan.optimizer,
        "rate": plan.rate,
        "decay": plan.decay,
        "rank": lists[plan.optimizer].index(plan.decay),
        "seed": plan.seed,
        "budget": 0.0 - float(curves["a"][-1]),
        "ratio at the start": float(curves["ratio"][0]),
        "ratio": float(curves["ratio"][-1]),
        "accuracy": float(curves["accuracy"][-1]),
        "loss": float(curves["loss"][-1]),
        "diverged": diverged(curves),
    }
    return Part([record], curves, data)


def _pretraining(config: Config, seed: int) -> Session:
    """Build the training of the own model."""
    import torch

    from mirrorflow import Constant, SpectralTracker

    from ._training import Session, controlled
    from ._vision import accuracy, images, loss_of, parameter_groups

    training, validation = images(config.data, config.size)
    model, steps = _model(config, seed), np.arange(config.pretraining)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), 1e-3)
    held = validation.parts(config.validation, 4 * config.batch)
    lrs = 1e-3 * np.minimum(1, (steps + 1) / 100)
    return Session(
        model, optimizer, controlled(optimizer, Constant(0.05)), lrs,
        lambda step: loss_of(model, training.batch(seed, step, config.batch, augment=False)),
        lambda: accuracy(model, held), SpectralTracker(model), config.pretraining,
    )  # fmt: skip


def _model(config: Config, seed: int) -> Any:
    """Make the model that is trained, or loaded."""
    from ._vision import images, vit

    classes = images(config.data, config.size)[0].classes
    return vit(
        config.model, config.size, config.patch, config.width, config.layers, config.heads,
        classes, seed,
    )  # fmt: skip


def _session(config: Config, plan: RatePlan, checkpoints: Checkpoints) -> Session:
    """Build a run of fine-tuning."""
    import torch

    from mirrorflow import Constant, SpectralTracker

    from ._training import Session, controlled
    from ._vision import accuracy, images, loss_of, parameter_groups

    training, validation = images(config.data, config.size)
    model = _trained(config, plan.seed, checkpoints)
    groups, held = parameter_groups(model, plan.decay), plan.rate == "held"
    lrs = config.lrs(plan.optimizer, plan.rate)
    if plan.optimizer == "adamw":
        optimizer: Any = torch.optim.AdamW(groups, lrs[0])
    else:
        optimizer = torch.optim.SGD(groups, lrs[0], momentum=config.momentum)
    # What L2 adds to SGD's momentum acts 1/(1 - momentum) times: the control decays as much.
    gain = 1 / (1 - config.momentum) if plan.optimizer == "sgd" else 1.0
    acts = Constant(plan.decay * float(lrs[0]) * gain if held else plan.decay)
    options: dict[str, Any] = {"convention": "fixed", "decoupled": True} if held else {}
    windows = validation.parts(config.validation, 4 * config.batch)
    first = config.pretraining  # goes on in the order of the data
    return Session(
        model, optimizer, controlled(optimizer, acts, **options), lrs,
        lambda s: loss_of(model, training.batch(plan.seed, first + s, config.batch, False)),
        lambda: accuracy(model, windows), SpectralTracker(model), config.every,
    )  # fmt: skip


def _trained(config: Config, seed: int, checkpoints: Checkpoints) -> Any:
    """Return the model to fine-tune; an own one is trained first, unless it is stored."""
    from ._training import train

    if config.model != "own":
        return _model(config, seed)
    line = timelines(config)[f"{PRETRAINING}-seed{seed}"]
    session = train(
        lambda: _pretraining(config, seed), line, checkpoints, keep=(config.pretraining,)
    )
    session.decay.close()
    return session.model


# --- What the page shows of it --------------------------------------------------------------------


def verdicts(records: list[Record]) -> list[Verdict]:
    """Say what the falling learning rate does, and what is left of it at held decay."""
    from . import _rate_figures

    return _rate_figures.verdicts(records)


def table(records: list[Record]) -> list[Record]:
    """Return a row for each optimizer, learning rate and decay: means over seeds, and intervals."""
    from ._rate_figures import changes

    rows = []
    for name in dict.fromkeys((r["optimizer"], r["rate"], r["decay"]) for r in records):
        where = dict(zip(("optimizer", "rate", "decay"), name, strict=True))
        row: Record = {}
        for key in ("ratio at the start", "ratio", "loss", "budget"):
            row[key] = interval(values(records, key, **where))[0]
        for key, numbers in (
            ("change of the ratio", changes(records, **where)),
            ("accuracy", values(records, "accuracy", **where)),
        ):
            row[key], width = interval(numbers)
            row[f"{key} ± 95%"] = width or None
        rows.append({**where, **row})
    return rows


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw ratio and accuracy along the way, for each optimizer and learning rate."""
    from ._rate_figures import draw_figure

    return draw_figure(records, trajectory)


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the interactive versions."""
    from ._rate_figures import make_charts

    return make_charts(records, trajectory)
