"""Networks in which MirrorAdam does not pay: batch norm against pruning, a GPT against AdamW."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ...framework import contract
from ...framework.contract import Part, Record, Recorder, Trajectory, Verdict, checksum
from ...framework.drawing import STYLES, middle, short

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure
    from torch import Tensor
    from torch.nn import Module

NAME = "beyond_networks"
TITLE = "Where MirrorAdam does not pay: a CNN with batch norm, and a GPT"
PAPER = "Beyond the paper (its networks are trained as they are)"
NEEDS = ("transformers.models.gpt2.modeling_gpt2",)

Network = Literal["cnn", "gpt"]
Way = Literal["MirrorAdam", "MirrorAdam, more decay", "AdamW", "AdamW, pruned on the way"]
WAYS: tuple[Way, ...] = get_args(Way)
RISING = 0.05  # part of the steps in which the learning rate rises
PRUNED = (0.25, 0.75)  # parts of the steps between which weights are pruned on the way
PRUNINGS = 40  # times at which they are
CALIBRATED = 20  # batches from which batch norm measures its averages anew after a cut
Array = NDArray[np.float64]


class Config(contract.Config):
    """The setting of the runs.

    Attributes
    ----------
    networks : tuple of {"cnn", "gpt"}
        Three convolutions with batch norm, and a GPT that reads characters.
    images, size : str, int
        "cifar10" or "digits", and the pixels of a side.
    channels : int
        Of the first convolution; the next have 2 and 4 times as many.
    text : str
        "tiny_shakespeare", "pydoc" or a file.
    width, layers, heads, length : int
        Of the GPT, and the tokens of a window.
    cnn_batch, gpt_batch : int
        Images and windows in a step.
    steps : int
        Of every run.
    lr : float
        Of all optimizers; it rises, and then falls along a cosine.
    a, more_a : float
        sum log(1 - lr * decay) of the first half, <= 0; in the second half decay is off.
    cuts : tuple of float
        The parts of the weights (convolutions and the last layer; the matrices of the GPT's blocks)
        that are set to 0, in (0, 1).
    seeds : tuple of int
        One start and order of the data each.
    """

    networks: tuple[Network, ...] = Field(default=get_args(Network), min_length=1)
    images: str = "digits"
    size: int = Field(default=8, ge=8)
    channels: int = Field(default=16, ge=1)
    text: str = "tiny_shakespeare"
    width: int = Field(default=64, ge=1)
    layers: int = Field(default=3, ge=1)
    heads: int = Field(default=4, ge=1)
    length: int = Field(default=64, ge=2)
    cnn_batch: int = Field(default=64, ge=2)
    gpt_batch: int = Field(default=12, ge=1)
    steps: int = Field(default=500, ge=8)
    lr: float = Field(default=3e-3, gt=0)
    a: float = Field(default=-0.3, le=0)
    more_a: float = Field(default=-1.0, le=0)
    cuts: tuple[float, ...] = Field(default=(0.5, 0.8, 0.95), min_length=1)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (seconds), cpu (minutes), or full (wider, longer, for a GPU)."""
        if name == "smoke":
            return cls(
                channels=4, text="pydoc", width=16, layers=1, heads=2,
                length=16, cnn_batch=16, gpt_batch=4, steps=16, lr=1e-2, cuts=(0.5, 0.9), seeds=(0,)
            )  # fmt: skip
        if name == "full":
            return cls(
                images="cifar10", size=32, channels=64, width=384, layers=6, heads=6, length=256,
                cnn_batch=128, gpt_batch=64, steps=5000, lr=1e-3,
            )  # fmt: skip
        return cls()

    def lrs(self) -> Array:
        """Return the learning rate of each step."""
        steps, rising = np.arange(self.steps), max(1, round(RISING * self.steps))
        fall = np.clip((steps - rising) / (self.steps - rising), 0, 1)
        return self.lr * np.minimum(1.0, (steps + 1) / rising) * (1 + np.cos(np.pi * fall)) / 2

    def pruned(self, step: int, cut: float) -> float:
        """Return the part of the weights that is 0 after a step, of ``cut`` at the end."""
        first, last = (part * self.steps for part in PRUNED)
        done = min(1.0, max(0.0, (step - first) / (last - first)))
        return cut * (1 - (1 - done) ** 3)


@dataclass(frozen=True)
class Task:
    """A network and its data.

    Attributes
    ----------
    build : callable, seed -> Module
    weights : tuple of str
        Patterns of the weights that are m * w with MirrorAdam, and that are cut.
    loss : callable, (model, seed, step) -> scalar tensor
    evaluate : callable, model -> float
        The accuracy, or the loss, on data that were held out.
    data : str
        The checksum of the data.
    """

    build: Callable[[int], Module]
    weights: tuple[str, ...]
    loss: Callable[[Module, int, int], Tensor]
    evaluate: Callable[[Module], float]
    data: str


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Train each network in each way from each seed, and cut its small weights."""
    tasks = {"cnn": partial(_cnn, config), "gpt": partial(_gpt, config)}
    return recorder.records(
        [
            (
                f"{network}-{WAYS.index(way)}-seed{seed}", f"{network}, {way}, seed {seed}",
                partial(_part, config, tasks[network], network, way, seed),
            )
            for network in config.networks
            for seed in config.seeds
            for way in WAYS
        ]
    )  # fmt: skip


def _part(config: Config, make: Callable[[], Task], network: Network, way: Way, seed: int) -> Part:
    """Train, once or once for each cut that is made on the way, and measure at each cut."""
    task, found = make(), {}
    if way == WAYS[3]:
        for cut in config.cuts:
            model, losses = _trained(config, task, way, seed, cut)
            found[cut] = _value(task, model, seed)
    else:
        model, losses = _trained(config, task, way, seed)
        found = {cut: _value(task, _cut(model, task, way, cut), seed) for cut in (0, *config.cuts)}
    records: list[Record] = [
        {"network": network, "way": way, "seed": seed, "cut": float(cut), "value": value}
        for cut, value in found.items()
    ]
    return Part(records, {"loss": losses}, task.data)


# --- What is trained ------------------------------------------------------------------------------


def _cnn(config: Config) -> Task:
    """Return a CNN with batch norm."""
    from ._vision import images

    training, validation = images(config.images, config.size)
    held = validation.parts(2000, 500)

    def loss(model: Module, seed: int, step: int) -> Tensor:
        import torch

        pixels, labels = training.batch(seed, step, config.cnn_batch, False)
        return torch.nn.functional.cross_entropy(model(pixels), labels)

    def accuracy(model: Module) -> float:
        import torch

        with torch.inference_mode():
            right = sum(int((model(x).argmax(1) == labels).sum()) for x, labels in held)
        return right / sum(len(labels) for _, labels in held)

    build = partial(_convolutions, config.channels, training.classes)
    weights = ("conv*.weight", "head.weight")
    return Task(build, weights, loss, accuracy, checksum(training.labels))


def _convolutions(channels: int, classes: int, seed: int) -> Module:
    """Return three convolutions with batch norm, and a linear layer on the mean over pixels."""
    import torch
    from torch import nn

    from ._training import device

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers, last = OrderedDict[str, nn.Module](), 3
        for i, wide in enumerate((channels, 2 * channels, 4 * channels)):
            layers[f"conv{i}"] = nn.Conv2d(last, wide, 3, 1 if i == 0 else 2, 1, bias=False)
            layers[f"norm{i}"], layers[f"relu{i}"], last = nn.BatchNorm2d(wide), nn.ReLU(), wide
        layers["mean"], layers["flat"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        layers["head"] = nn.Linear(last, classes)
        return nn.Sequential(layers).to(device())


def _gpt(config: Config) -> Task:
    """Return a GPT that reads characters."""
    from ._language import Tokens, characters, loss_of, mean_loss, own_model, text
    from ._training import device

    tokens = Tokens(characters(text(config.text)), config.length)
    held = tokens.validation(128)
    sizes = config.width, config.layers, config.heads, config.length
    return Task(
        lambda seed: own_model(*sizes, seed)[0].to(device()),
        ("transformer.h.*.c_*.weight",),
        lambda model, seed, step: loss_of(model, tokens.batch(seed, step, config.gpt_batch)),
        lambda model: mean_loss(model, held, 4 * config.gpt_batch),
        checksum(tokens.ids),
    )


def _trained(
    config: Config, task: Task, way: Way, seed: int, cut: float = 0.0
) -> tuple[Module, Array]:
    """Train, with decay in the first half only; return the network and its losses."""
    model, losses = task.build(seed).train(), np.empty(config.steps)
    weights, others = _optimizers(model, task, way)
    half = config.steps // 2
    a = config.more_a if way == WAYS[1] else config.a
    factor, every = math.exp(a / half), max(1, config.steps // (2 * PRUNINGS))
    masks: list[Tensor] = []
    for step, lr in enumerate(config.lrs()):
        decay = (1 - factor) / lr if step < half else 0.0
        weights.param_groups[0].update(lr=lr, weight_decay=decay)
        others.param_groups[0].update(lr=lr)
        loss = task.loss(model, seed, step)
        model.zero_grad()
        loss.backward()
        weights.step()
        others.step()
        losses[step] = loss.item()
        if cut and step % every == 0:
            masks = _masks(_weights(model, task), config.pruned(step, cut))
        for weight, mask in zip(_weights(model, task) if cut else (), masks, strict=True):
            weight.data.mul_(mask)
    return model, losses


def _optimizers(model: Module, task: Task, way: Way) -> tuple[Any, Any]:
    """Return the optimizer of the weights, and of all else."""
    import torch

    from mirrorflow.optim import MirrorAdam, overparametrize

    if way in WAYS[:2]:
        made = overparametrize(model, task.weights)
        return MirrorAdam(made.pairs), torch.optim.Adam(made.others)
    weights = _weights(model, task)
    ours = {id(weight) for weight in weights}
    others = [p for p in model.parameters() if id(p) not in ours]
    return torch.optim.AdamW(weights), torch.optim.Adam(others)


def _weights(model: Module, task: Task) -> list[Any]:
    """Return the plain weights that are cut."""
    named = model.named_parameters()
    return [p for name, p in named if any(fnmatchcase(name, w) for w in task.weights)]


def _masks(weights: list[Any], cut: float) -> list[Tensor]:
    """Return 0 for the smallest weights of all layers together, else 1."""
    import torch

    sizes = torch.cat([weight.detach().abs().flatten() for weight in weights])
    count = round(cut * len(sizes))
    least = float(sizes.kthvalue(count).values) if count else -1.0
    return [(weight.detach().abs() > least).to(weight.dtype) for weight in weights]


def _cut(model: Module, task: Task, way: Way, cut: float) -> Module:
    """Return a copy with plain weights, the smallest of them 0."""
    from mirrorflow.optim import fold

    model = copy.deepcopy(model)
    if way in WAYS[:2]:
        fold(model, sparsity=cut)
        return model
    weights = _weights(model, task)
    for weight, mask in zip(weights, _masks(weights, cut), strict=True):
        weight.data.mul_(mask)
    return model


def _value(task: Task, model: Module, seed: int) -> float:
    """Return what the network is worth, after batch norm has measured its averages anew."""
    import torch

    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
    with torch.no_grad():
        for step in range(CALIBRATED if norms else 0):
            task.loss(model.train(), seed, step)
    return task.evaluate(model.eval())


# --- What the page shows of it --------------------------------------------------------------------


def _medians(records: list[Record], network: str) -> dict[str, dict[float, float]]:
    """Return the medians over the seeds, by way of training and cut."""
    found: dict[str, dict[float, list[float]]] = {}
    for r in records:
        if r["network"] == network:
            found.setdefault(r["way"], {}).setdefault(r["cut"], []).append(float(r["value"]))
    return {
        way: {cut: float(np.median(of[cut])) for cut in sorted(of)} for way, of in found.items()
    }


def _networks(records: list[Record]) -> list[str]:
    """Return the networks that were trained."""
    return list(dict.fromkeys(r["network"] for r in records))


WORTH = {"cnn": "accuracy of the CNN", "gpt": "loss of the GPT"}


def verdicts(records: list[Record]) -> list[Verdict]:
    """Return what each way is worth whole, and at the largest cut."""
    rows: list[Verdict] = []
    for network in _networks(records):
        found = _medians(records, network)
        most = max(float(r["cut"]) for r in records)
        whole = {way: of[0.0] for way, of in found.items() if 0.0 in of}
        rows += [
            (f"Validation {WORTH[network]}, {share}", _listed(values))
            for share, values in (
                ("with all weights", whole),
                (f"{100 * (1 - most):g}% left", {way: of[most] for way, of in found.items()}),
            )
        ]
    return [*rows, ("What it says", "two small networks, one learning rate, two a")]


def _listed(values: dict[str, float]) -> str:
    """Write numbers with their names."""
    return "; ".join(f"{way}: {value:.3f}" for way, value in values.items())


def table(records: list[Record]) -> list[Record]:
    """Return a row for each network and way, with the median at each cut."""
    cuts = sorted({float(r["cut"]) for r in records})
    return [
        {
            "validation": WORTH[network], "training": way,
            **{f"{100 * cut:g}% cut": of.get(cut) for cut in cuts},
        }
        for network in _networks(records)
        for way, of in _medians(records, network).items()
    ]  # fmt: skip


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw what each network is worth over the part that is left, and the losses in training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6 * len(_networks(records))), layout="constrained")
    axes = figure.subplots(len(_networks(records)), 2, squeeze=False)
    for (worth, losses), network in zip(axes, _networks(records), strict=True):
        for way, of in _medians(records, network).items():
            i = WAYS.index(way)
            left = [100 * (1 - cut) for cut in of]
            style = STYLES[i]
            worth.plot(left, list(of.values()), marker="os^D"[i], markersize=4, label=way, **style)
            first = next(r["seed"] for r in records if r["way"] == way)
            loss = trajectory[f"{network}-{i}-seed{first}/loss"]
            window = max(1, len(loss) // 60)
            means = loss[: len(loss) // window * window].reshape(-1, window).mean(1)
            losses.plot(window * np.arange(1, len(means) + 1), means, **style)
        worth.set(xscale="log", xlabel="weights that are left, %",
                  ylabel=f"validation {WORTH[network]}")  # fmt: skip
        worth.invert_xaxis()
        losses.set(xlabel="step", ylabel=f"training loss, {network.upper()} (first seed)")
    for axis in figure.axes:
        axis.grid(alpha=0.25)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the interactive charts: what each network is worth over the part that is left."""
    return [
        (
            f"Validation {WORTH[network]} over the part of the weights that is left"
            f"{middle(records)}.",
            _chart(_medians(records, network), network),
        )
        for network in _networks(records)
    ]


def _chart(found: dict[str, dict[float, float]], network: str) -> TopLevelMixin:
    """Make one chart."""
    import altair as alt

    rows = [
        {"line": way, "x": short(100 * (1 - cut)), "y": short(value)}
        for way, of in found.items()
        for cut, value in of.items()
    ]
    names, colours = list(found), [STYLES[WAYS.index(way)]["color"] for way in found]
    key = alt.Legend(orient="bottom", columns=1, title=None)
    scale = alt.Scale(type="log", reverse=True, nice=False)
    y = alt.Y("y:Q", title=f"validation {WORTH[network]}", scale=alt.Scale(zero=False))
    chart: Any = alt.Chart(alt.Data(values=rows), height=280).encode(
        x=alt.X("x:Q", title="weights that are left, %", scale=scale),
        y=y,
        color=alt.Color("line:N", scale=alt.Scale(domain=names, range=colours), legend=key),
        shape=alt.Shape("line:N", scale=alt.Scale(domain=names), legend=key),
        tooltip=["line:N", alt.Tooltip("x:Q", format=".4g"), alt.Tooltip("y:Q", format=".3g")],
    )
    return chart.mark_line() + chart.mark_point(filled=True, size=60)
