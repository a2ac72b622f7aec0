"""Adapters cut to a lower rank, at their end and on the way, beside those that begin with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import Field, model_validator

from ...framework.contract import Part, Record, Recorder, Trajectory, Verdict, checksum
from ...framework.trunks import Checkpoints, Timeline
from ._lora import PRETRAINING, AdapterConfig, base, pretraining, pretraining_line, tokens
from ._study import Array

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure

    from ._training import Session, Watch

NAME = "beyond_truncation"
TITLE = "LoRA: a low rank from the start, or a higher one that is truncated"
PAPER = "Beyond the paper (Table 3 trains at one rank)"
NEEDS = ("transformers.models.gpt2.modeling_gpt2", "peft")


class Config(AdapterConfig):
    """The setting of the runs.

    Attributes
    ----------
    ranks : tuple of int
        Those that adapters of ``rank`` are cut to, and that others begin with.
    lr, warmup
        Of AdamW; steps in which it rises, after which it falls along a cosine.
    steps, off, every : int
        Steps in all; the step at which decay is switched off, and at which a run without decay is
        truncated to go on; steps between measurements.
    absorbed : float
        The a at the end, < 0, of decay that is kept and of decay that is switched off.
    seeds : tuple of int
        Of the start and of the order of the data. The model, its adapters and the text are of
        `AdapterConfig`; alpha / rank is the same at every rank.
    """

    ranks: tuple[int, ...] = Field(default=(6, 4, 2), min_length=1)
    lr: float = Field(default=2e-3, gt=0)
    warmup: int = Field(default=20, ge=0)
    steps: int = Field(default=1000, ge=2)
    off: int = Field(default=600, ge=1)
    every: int = Field(default=100, ge=1)
    absorbed: float = Field(default=-1.5, lt=0)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2, 3, 4), min_length=1)

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        """Refuse what cannot be switched off, or cut."""
        if not self.off < self.steps:
            raise ValueError(f"off must lie within the {self.steps} steps, got {self.off}")
        if bad := [rank for rank in self.ranks if not 1 <= rank < self.rank]:
            raise ValueError(f"ranks must lie in 1 to {self.rank - 1}, got {bad}")
        return self

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (seconds), cpu (an own GPT-2, minutes), or full (GPT-2)."""
        if name == "smoke":
            return cls(
                width=16, layers=1, heads=2, pretraining=10, text="pydoc", characters=20_000,
                length=16, batch=4, validation=4, rank=3, scaling=3.0, ranks=(2, 1), lr=0.02,
                warmup=2, steps=10, off=6, every=5, seeds=(0, 1),
            )  # fmt: skip
        if name == "full":
            return cls(model="gpt2", length=1024, batch=8, lr=5e-4)
        return cls(
            width=64, layers=3, pretraining=1000, length=64, batch=12, validation=256, lr=5e-3,
            steps=300, off=180, every=60,
        )  # fmt: skip

    def lrs(self) -> Array:
        """Return the learning rate of each step."""
        steps = np.arange(self.steps)
        rise = np.minimum(1.0, (steps + 1) / max(1, self.warmup))
        fall = np.clip((steps - self.warmup) / max(1, self.steps - self.warmup), 0, 1)
        return self.lr * rise * (1 + np.cos(np.pi * fall)) / 2

    def plans(self) -> dict[str, AdapterPlan]:
        """Name the runs: of the highest rank under three decays, and of the lower ones without."""
        lrs, found = self.lrs(), []
        for seed in self.seeds:
            found.append(AdapterPlan("none", self.rank, 0.0, None, seed))
            for kind, off in (("constant", None), ("off", self.off)):
                rate = float(-self.absorbed / lrs[:off].sum())
                found.append(AdapterPlan(kind, self.rank, rate, off, seed))
            found += [AdapterPlan("none", rank, 0.0, None, seed) for rank in self.ranks]
        return {plan.key: plan for plan in found}


@dataclass(frozen=True)
class AdapterPlan:
    """One run: what its decay does ("none", "constant", "off"), its rank, rate, switch and seed."""

    kind: str
    rank: int
    rate: float
    off: int | None
    seed: int

    @property
    def key(self) -> str:
        """The name of the run's part."""
        return f"{self.kind}-rank{self.rank}-seed{self.seed}"


# --- Training, and cutting ------------------------------------------------------------------------


def timelines(config: Config) -> dict[str, Timeline]:
    """Return what each run does, and the pretraining of an own model."""
    without = {"seeds", "absorbed", "off", "rank", "ranks"}
    shared = {"experiment": NAME, **config.model_dump(mode="json", exclude=without)}
    lines = {PRETRAINING: pretraining_line(config)} if config.model == "own" else {}
    for key, plan in config.plans().items():
        rates = np.where(np.arange(config.steps) < (plan.off or config.steps), plan.rate, 0.0)
        lines[key] = Timeline({**shared, "rank": plan.rank, "seed": plan.seed}, rates)
    return lines


def advance(
    config: Config, name: str, until: int, checkpoints: Checkpoints, watch: Watch | None = None
) -> None:
    """Train one run up to a step and store its state there, for those that go on from it."""
    from ._training import train_to

    def build() -> Session:
        if name == PRETRAINING:
            return pretraining(config)()
        return _session(config, config.plans()[name], checkpoints)

    line = timelines(config)[name]
    train_to(build, line, checkpoints, until, watch)


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Train all runs, and cut those of the highest rank."""
    from ._training import device

    recorder.device = device()
    records, chosen = [], config.plans()
    data = checksum(tokens(config).ids)
    for done, (key, plan) in enumerate(chosen.items()):

        def watch(step: int, found: Mapping[str, float], key: str = key, done: int = done) -> None:
            if found:
                recorder.log(step=step, run=key, **found)
            recorder.progress(done * config.steps + step, len(chosen) * config.steps, key)

        def compute(plan: AdapterPlan = plan, watch: Any = watch) -> Part:
            return _part(config, plan, recorder.checkpoints, watch, data)

        records += recorder.part(key, compute).records
    return records


def _session(config: Config, plan: AdapterPlan, checkpoints: Checkpoints) -> Session:
    """Build a run."""
    import torch

    from mirrorflow import Constant, SpectralTracker, SwitchOff

    from ._language import loss_of, mean_loss, with_lora
    from ._training import Session, controlled

    scaling = config.scaling * plan.rank / config.rank
    model = with_lora(base(config, checkpoints), plan.rank, scaling, plan.seed)
    text = tokens(config)
    held = text.validation(config.validation)
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, config.lr, weight_decay=plan.rate)
    schedule = Constant(plan.rate) if plan.off is None else SwitchOff(plan.rate, at=plan.off)
    return Session(
        model, optimizer, controlled(optimizer, schedule), config.lrs(),
        lambda step: loss_of(model, text.batch(plan.seed, step, config.batch)),
        lambda: {"loss": mean_loss(model, held, 4 * config.batch)},
        SpectralTracker(model), config.every,
    )  # fmt: skip


def _part(
    config: Config, plan: AdapterPlan, checkpoints: Checkpoints, watch: Watch, data: str
) -> Part:
    """Train a run; return its end, and those of the truncations of the highest rank."""
    from ._training import train

    line = timelines(config)[plan.key]
    high = plan.rank == config.rank
    on_the_way = (config.off,) if high and plan.kind == "none" else ()
    session = train(
        lambda: _session(config, plan, checkpoints), line, checkpoints, keep=on_the_way, watch=watch
    )
    curves = {name: np.array(found) for name, found in session.curves.items()}
    about = {"kind": plan.kind, "seed": plan.seed, "decay": plan.rate, "a": float(curves["a"][-1])}
    way = "whole" if high else "from the start"
    records = [{**about, "way": way, "rank": plan.rank, "loss": float(curves["loss"][-1])}]
    for rank in config.ranks if high else ():
        records.append({**about, "way": "at the end", "rank": rank, "loss": _cut(session, rank)})
    if on_the_way:
        early = train(lambda: _session(config, plan, checkpoints), line, checkpoints, config.off)
        records += [
            {**about, "way": "on the way", "rank": rank, "loss": _cut(early, rank, config.off)}
            for rank in config.ranks
        ]
    return Part(records, curves, data)


def _cut(session: Session, rank: int, step: int | None = None) -> float:
    """Return the loss of a session's model as truncated, or trained on from a step to the end.

    The model is left as it was.
    """
    import mirrorflow as mf

    from ._training import go_on

    whole = {n: p.detach().clone() for n, p in session.model.named_parameters() if p.requires_grad}
    mf.truncate(session.model, rank=rank)
    if step is not None:
        go_on(session.model, lambda later: session.loss(step + later), session.lrs[step:])
    loss = session.evaluate()["loss"]
    for name, parameter in session.model.named_parameters():
        if name in whole:
            parameter.data.copy_(whole[name])
    return loss


# --- What the page shows of it --------------------------------------------------------------------


def verdicts(records: list[Record]) -> list[Verdict]:
    """Say which way to a low rank ends best."""
    from . import _truncation_figures

    return _truncation_figures.verdicts(records)


def table(records: list[Record]) -> list[Record]:
    """Return a row for each way, decay and rank: means over seeds, and intervals."""
    from ._truncation_figures import rows

    return rows(records)


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw the losses by rank, their distances from the direct way, and the runs."""
    from ._truncation_figures import draw_figure

    return draw_figure(records, trajectory)


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the interactive version."""
    from ._truncation_figures import make_charts

    return make_charts(records)
