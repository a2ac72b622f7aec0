"""Transformers that train under decay, and what cutting the ranks of their heads then costs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from ...framework import contract
from ...framework.contract import Part, Record, Recorder, Trajectory, Verdict, checksum
from ...framework.trunks import Checkpoints, Timeline
from ._study import Array, PlannedRun, diverged, run_plans, timeline

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure
    from torch import Tensor
    from torch.nn import Module

    from ._training import Session, Watch

NAME = "beyond_compression"
TITLE = "How much decay for which rank: heads of attention truncated after training"
PAPER = "Beyond the paper (Table 2 and Figure 3b measure ratios; here ranks are cut)"
NEEDS = ("transformers.models.gpt2.modeling_gpt2", "transformers.models.vit.modeling_vit")

BLOCK = re.compile(r"\.(?:h|layers?)\.\d+\.")  # a matrix of a block, of the GPT or the ViT
BIASES = ("c_attn.bias", "q_proj.bias", "k_proj.bias", "v_proj.bias")


class Config(contract.Config):
    """The setting of the runs.

    Attributes
    ----------
    network : {"gpt", "vit"}
        What is trained from scratch.
    data : str
        The GPT's text, as "tiny_shakespeare", "pydoc" or a file; the ViT's images, "cifar10" or
        "digits".
    width, layers, heads : int
        Of the network. Its queries, keys and values have no biases; its matrices start as those of
        torch.nn.Linear.
    length : int
        Tokens in a window of the GPT.
    size, patch : int
        Pixels of the side of the ViT's images, and of its patches.
    batch, validation : int
        Windows or images in a step, and in the validation.
    lr, warmup
        Of AdamW; steps in which it rises, after which it falls along a cosine.
    steps, off, every : int
        Steps in all, the step of switching off, steps between measurements.
    absorbed : tuple of float
        The a at the end, -sum of lr x decay: 0, and the negative ones, each with decay that is
        kept and with decay that is switched off at ``off``.
    kept : tuple of float
        The parts of each head's rank that truncation keeps, in (0, 1).
    more, more_lr
        Steps after truncation, without decay, by a new AdamW whose learning rate falls to 0.
    seeds : tuple of int
        Of the start and of the order of the data.
    """

    network: Literal["gpt", "vit"] = "gpt"
    data: str = "tiny_shakespeare"
    width: int = Field(default=384, ge=1)
    layers: int = Field(default=6, ge=1)
    heads: int = Field(default=6, ge=1)
    length: int = Field(default=256, ge=2)
    size: int = Field(default=32, ge=1)
    patch: int = Field(default=4, ge=1)
    batch: int = Field(default=64, ge=1)
    validation: int = Field(default=400, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    warmup: int = Field(default=100, ge=0)
    steps: int = Field(default=5000, ge=2)
    off: int = Field(default=3000, ge=1)
    every: int = Field(default=250, ge=1)
    absorbed: tuple[float, ...] = Field(default=(0.0, -0.75, -1.5, -2.5, -3.5, -5.0), min_length=2)
    kept: tuple[float, ...] = Field(default=(0.75, 0.5, 0.25), min_length=1)
    more: int = Field(default=250, ge=1)
    more_lr: float = Field(default=1e-4, gt=0)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        """Refuse what cannot be trained, compared or cut."""
        if self.width % self.heads or (self.network == "vit" and self.size % self.patch):
            raise ValueError("heads must divide width, and patch must divide size")
        if not self.off < self.steps:
            raise ValueError(f"off must lie within the {self.steps} steps, got {self.off}")
        if 0 not in self.absorbed or max(self.absorbed) > 0:
            raise ValueError(f"absorbed must hold 0 and negative numbers, got {self.absorbed}")
        if bad := [part for part in self.kept if not 1 <= self.rank(part) < self.rank(1)]:
            raise ValueError(f"kept must leave 1 to {self.rank(1) - 1} ranks of a head, got {bad}")
        return self

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (seconds), cpu (a GPT of 64 wide), or full (384 wide, for a GPU)."""
        if name == "smoke":
            return cls(
                data="pydoc", width=16, layers=1, heads=2, length=16, batch=4, validation=8,
                lr=1e-2, warmup=2, steps=20, off=12, every=10, absorbed=(0.0, -1.5),
                kept=(0.5, 0.25), more=2, more_lr=1e-3, seeds=(0, 1),
            )  # fmt: skip
        if name == "full":
            return cls()
        return cls(
            width=64, layers=3, heads=4, length=64, batch=12, validation=256, lr=3e-3, warmup=50,
            steps=1000, off=600, every=200, more=50, more_lr=3e-4,
        )  # fmt: skip

    def rank(self, part: float) -> int:
        """Return the rank that a part of a head's is, its nearest whole number."""
        return round(part * self.width / self.heads)

    def lrs(self) -> Array:
        """Return the learning rate of each step."""
        steps = np.arange(self.steps)
        rise = np.minimum(1.0, (steps + 1) / max(1, self.warmup))
        fall = np.clip((steps - self.warmup) / max(1, self.steps - self.warmup), 0, 1)
        return self.lr * rise * (1 + np.cos(np.pi * fall)) / 2

    def more_lrs(self) -> Array:
        """Return the learning rate of each step after truncation."""
        return self.more_lr * (1 + np.cos(np.pi * np.arange(self.more) / self.more)) / 2

    def plans(self) -> dict[str, PlannedRun]:
        """Name the runs; those of one a absorb the same, so that a switched-off decay is larger."""
        lrs, found = self.lrs(), []
        for seed in self.seeds:
            for a in self.absorbed:
                if a == 0:
                    found.append(PlannedRun(a, "none", 0.0, None, seed))
                    continue
                for kind, off in (("constant", None), ("off", self.off)):
                    found.append(PlannedRun(a, kind, float(-a / lrs[:off].sum()), off, seed))
        return {plan.key: plan for plan in found}


# --- What is trained ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A network and its data.

    Attributes
    ----------
    build : callable, seed -> Module
    loss : callable, (model, seed, step) -> scalar tensor
    evaluate : callable, model -> dict of float
        What is measured on the validation part, "loss" among it.
    data : str
        The checksum of the data.
    """

    build: Callable[[int], Module]
    loss: Callable[[Module, int, int], Tensor]
    evaluate: Callable[[Module], dict[str, float]]
    data: str


def task(config: Config) -> Task:
    """Return the network and the data of a configuration."""
    return _gpt(config) if config.network == "gpt" else _vit(config)


def _gpt(config: Config) -> Task:
    """Return a GPT that reads characters."""
    from torch.nn import GELU

    from ._language import Tokens, characters, loss_of, mean_loss, own_model, text
    from ._training import device

    tokens = Tokens(characters(text(config.data)), config.length)
    held = tokens.validation(config.validation)
    sizes = config.width, config.layers, config.heads, config.length

    def build(seed: int) -> Module:
        model = own_model(*sizes, seed)[0]
        for block in model.transformer.h:
            block.mlp.act = GELU("tanh")  # the same function in one kernel
        return _prepared(model, seed).to(device())

    return Task(
        build,
        lambda model, seed, step: loss_of(model, tokens.batch(seed, step, config.batch)),
        lambda model: {"loss": mean_loss(model, held, 4 * config.batch)},
        checksum(tokens.ids),
    )


def _vit(config: Config) -> Task:
    """Return a ViT."""
    from ._vision import accuracy, images, loss_of, vit

    training, validation = images(config.data, config.size)
    held = validation.parts(config.validation, 4 * config.batch)
    sizes = config.size, config.patch, config.width, config.layers, config.heads

    def build(seed: int) -> Module:
        return _prepared(vit("own", *sizes, training.classes, seed), seed)

    return Task(
        build,
        lambda model, seed, step: loss_of(model, training.batch(seed, step, config.batch, False)),
        lambda model: accuracy(model, held),
        checksum(training.labels),
    )


def _prepared(model: Module, seed: int) -> Module:
    """Start the matrices of the blocks as torch.nn.Linear does, and Q, K and V without biases.

    transformers' 0.02 is for GPT-2's width: at 64 it starts every head near 0, so that little of a
    head is random at the end, whatever the decay. With a bias of Q or V a truncated head would keep
    one dimension more for it, which then trains.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2 or not BLOCK.search(name):
            continue
        inputs = weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]
        random = torch.rand(weight.shape, generator=generator)
        weight.data.copy_((2 * random - 1) / inputs**0.5)  # on the CPU, whatever trains
    for name, parameter in model.named_parameters():
        if name.endswith(BIASES):
            parameter.data.zero_()
            parameter.requires_grad_(False)
    return model


# --- Training, and cutting ------------------------------------------------------------------------


def timelines(config: Config) -> dict[str, Timeline]:
    """Return what each run does."""
    after = {"seeds", "absorbed", "off", "kept", "more", "more_lr"}
    shared = {"experiment": NAME, **config.model_dump(mode="json", exclude=after)}
    return {key: timeline(p, config.steps, shared) for key, p in config.plans().items()}


def advance(
    config: Config, name: str, until: int, checkpoints: Checkpoints, watch: Watch | None = None
) -> None:
    """Train one run up to a step and store its state there, for those that go on from it."""
    from ._training import train_to

    plan, line = config.plans()[name], timelines(config)[name]
    build = partial(_session, config, plan, task(config))
    train_to(build, line, checkpoints, until, watch)


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Train all runs, and cut each at its end."""
    what = task(config)
    return run_plans(
        recorder, config.plans(), timelines(config), lambda plan: _session(config, plan, what),
        what.data, partial(_cut, config, what),
    )  # fmt: skip


def _session(config: Config, plan: PlannedRun, what: Task) -> Session:
    """Build a run."""
    import torch

    from mirrorflow import Constant, SpectralTracker, SwitchOff

    from ._training import Session, controlled
    from ._vision import parameter_groups

    model = what.build(plan.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, plan.rate), config.lr)
    schedule = Constant(plan.rate) if plan.off is None else SwitchOff(plan.rate, at=plan.off)
    return Session(
        model, optimizer, controlled(optimizer, schedule), config.lrs(),
        lambda step: what.loss(model, plan.seed, step), lambda: what.evaluate(model),
        SpectralTracker(model, level="head", values=True), config.every,
    )  # fmt: skip


def _cut(config: Config, what: Task, plan: PlannedRun, session: Session, data: str) -> Part:
    """Return a record of the trained model and of each truncation of it, before and after steps."""
    from ._training import go_on

    curves = {name: np.array(found) for name, found in session.curves.items()}
    about = {
        "part": plan.key,
        "kind": plan.kind,
        "absorbed": plan.family,
        "a": float(curves["a"][-1]),
        "decay": plan.rate,
        "off": plan.off,
        "seed": plan.seed,
        "ratio": float(curves["ratio"][-1]),
        "more": config.more / config.steps,
        "diverged": diverged(curves),
    }
    records = []
    for part in (1.0, *config.kept):
        model = copy.deepcopy(session.model)
        energy = 1.0 if part == 1 else _truncated(model, config.rank(part))
        loss = what.evaluate(model)["loss"]
        go_on(model, partial(_later, config, what, plan.seed, model), config.more_lrs())
        cut = {"kept": part, "rank": config.rank(part), "energy": energy}
        records.append({**about, **cut, "loss": loss, "after": what.evaluate(model)["loss"]})
    return Part(records, curves, data)


def _later(config: Config, what: Task, seed: int, model: Module, step: int) -> Tensor:
    """Return the loss of a step after the training, on data that follow its own."""
    return what.loss(model, seed, config.steps + step)


def _truncated(model: Module, rank: int) -> float:
    """Truncate every head's Q K^T and W_O W_V in place; return the mean part of their energy."""
    import mirrorflow as mf

    report = mf.truncate(model, rank=rank)
    return float(np.mean([record.energy for record in report.records]))


# --- What the page shows of it --------------------------------------------------------------------


def verdicts(records: list[Record]) -> list[Verdict]:
    """Say what the cuts cost, and what decay changes about that."""
    from . import _compression_figures

    return _compression_figures.verdicts(records)


def table(records: list[Record]) -> list[Record]:
    """Return a row for each a and kind: means over seeds, and intervals."""
    from ._compression_figures import rows

    return rows(records)


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw the losses over a: as trained, truncated, and after more steps; and the ratio."""
    from ._compression_figures import draw_figure

    return draw_figure(records)


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the interactive versions."""
    from ._compression_figures import make_charts

    return make_charts(records)
