"""Test accuracy after small weights are cut, for digits networks whose weights are m * w."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ...framework import contract
from ...framework.contract import Part, Record, Recorder, Trajectory, Verdict, checksum
from ...framework.drawing import STYLES, middle
from ._sparse import line_chart, medians

if TYPE_CHECKING:
    import torch
    from altair import TopLevelMixin
    from matplotlib.figure import Figure

NAME = "beyond_pruning"
TITLE = "With MirrorAdam and decay that is switched off, most weights of m * w are not needed"
PAPER = "Beyond the paper (its networks are trained as they are)"

# The optimizer of the weights, whether they are m * w, and whether decay acts.
WAYS: dict[str, tuple[str, bool, bool]] = {
    "MirrorAdam on m * w": ("MirrorAdam", True, True),
    "MirrorAdam on m * w, no decay": ("MirrorAdam", True, False),
    "AdamW on m * w": ("AdamW", True, True),
    "AdamW on plain weights": ("AdamW", False, True),
}
Way = Literal[
    "MirrorAdam on m * w", "MirrorAdam on m * w, no decay", "AdamW on m * w",
    "AdamW on plain weights",
]  # fmt: skip
CUTS = (0.0, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
Array = NDArray[np.float64]


class Config(contract.Config):
    """The setting of the runs.

    Attributes
    ----------
    width : int
        Of the two hidden layers of a perceptron on scikit-learn's digits, 8 x 8.
    epochs, batch : int
        Over 1,297 of the 1,797 images, in batches of this size; 500 are for the test.
    lr : float
        Of all optimizers, constant in the first half and falling to 0 in the second.
    a : float
        sum log(1 - lr * decay) of the first half, <= 0; in the second half decay is off.
    ways : tuple of str
        The trainings, in the order of `WAYS`.
    seeds : tuple of int
        One start, order of the images and split each.
    """

    width: int = Field(default=256, ge=1)
    epochs: int = Field(default=200, ge=2)
    batch: int = Field(default=32, ge=1, le=1297)
    lr: float = Field(default=0.003, gt=0)
    a: float = Field(default=-4.0, le=0)
    ways: tuple[Way, ...] = Field(default=get_args(Way), min_length=1)
    seeds: tuple[int, ...] = Field(default=tuple(range(5)), min_length=1)

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (a small network, 6 epochs), or five seeds of 256 units (cpu and full)."""
        return cls(width=16, epochs=6, lr=0.01, seeds=(0,)) if name == "smoke" else cls()


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Train in each way from each seed, and cut the smallest weights."""
    return recorder.records(
        [
            (_key(way, seed), f"{way}, seed {seed}", partial(_part, config, way, seed))
            for seed in config.seeds
            for way in config.ways
        ]
    )


def _key(way: str, seed: Any) -> str:
    """Return the name of a part."""
    return f"{list(WAYS).index(way)}-seed{seed}"


def _part(config: Config, way: str, seed: int) -> Part:
    """Train once; return the accuracy at each cut, and the sorted sizes of the weights."""
    import torch

    torch.manual_seed(seed)
    train, test = _digits(seed)
    net = _perceptron(config.width)
    losses = _train(net, config, way, seed, train)
    sizes = _sizes(net)
    records: list[Record] = [
        {"way": way, "seed": seed, "cut": cut, "accuracy": _accuracy(_cut(net, way, cut), test),
         "loss": float(losses[-20:].mean())}
        for cut in CUTS
    ]  # fmt: skip
    quantiles = np.quantile(sizes, np.linspace(0, 1, 201))
    return Part(records, {"sizes": quantiles, "loss": losses}, checksum(train[0].numpy()))


def _digits(seed: int) -> tuple[Any, Any]:
    """Return (images, labels) for training and test, in an order drawn by the seed."""
    import torch
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    X = torch.from_numpy(digits.data[order] / 16).to(torch.float32)
    y = torch.from_numpy(digits.target[order])
    return (X[:1297], y[:1297]), (X[1297:], y[1297:])


def _perceptron(width: int) -> torch.nn.Sequential:
    """Return a perceptron with two hidden layers."""
    from torch import nn

    return nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def _train(net: Any, config: Config, way: str, seed: int, data: Any) -> Array:
    """Train in place, decay in the first half of the steps only; return the losses."""
    import torch

    (X, y), batches = data, 1297 // config.batch
    optimizer, biases = _optimizers(net, way)
    decays = WAYS[way][2]
    steps, order = config.epochs * batches, torch.Generator().manual_seed(seed)
    half, losses = steps // 2, np.empty(steps)
    factor, rows = math.exp(config.a / half), torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if step % batches == 0:
            rows = torch.randperm(len(X), generator=order)
        fall = max(0.0, (step - half) / (steps - half))
        lr = 0.5 * config.lr * (1 + math.cos(math.pi * fall))
        decay = (1 - factor) / lr if decays and step < half else 0.0
        optimizer.param_groups[0].update(lr=lr, weight_decay=decay)
        biases.param_groups[0].update(lr=lr)
        chosen = rows[step % batches * config.batch :][: config.batch]
        loss = torch.nn.functional.cross_entropy(net(X[chosen]), y[chosen])
        net.zero_grad()
        loss.backward()
        optimizer.step()
        biases.step()
        losses[step] = loss.item()
    return losses


def _optimizers(net: Any, way: str) -> tuple[Any, Any]:
    """Return the optimizer of the weights, made m * w where the way says so, and of the biases."""
    import torch

    from mirrorflow.optim import MirrorAdam, overparametrize

    name, product, _ = WAYS[way]
    biases = [p for key, p in net.named_parameters() if key.endswith("bias")]
    weights = [p for key, p in net.named_parameters() if key.endswith("weight")]
    if product:
        pairs = overparametrize(net).pairs
        weights = [factor for pair in pairs for factor in pair]
        if name == "MirrorAdam":
            return MirrorAdam(pairs), torch.optim.Adam(biases)
    return torch.optim.AdamW(weights), torch.optim.Adam(biases)


def _cut(net: Any, way: str, cut: float) -> Any:
    """Return a copy of the network whose smallest weights, of all layers, are 0."""
    from mirrorflow.optim import fold

    net = copy.deepcopy(net)
    if WAYS[way][1]:
        fold(net, sparsity=cut)
        return net
    weights = _weights(net)
    threshold = float(np.quantile(_sizes(net), cut)) if cut else -1.0
    for weight in weights:
        weight.detach().masked_fill_(weight.detach().abs() <= threshold, 0.0)
    return net


def _weights(net: Any) -> list[Any]:
    """Return the weights of the layers, products or plain."""
    return [layer.weight for layer in net if hasattr(layer, "weight")]


def _sizes(net: Any) -> Array:
    """Return the absolute values of all weights."""
    flat = [weight.detach().abs().flatten().numpy() for weight in _weights(net)]
    return np.concatenate(flat).astype(np.float64)


def _accuracy(net: Any, data: Any) -> float:
    """Return the part of images whose label is found."""
    import torch

    with torch.no_grad():
        return float((net(data[0]).argmax(1) == data[1]).double().mean())


# --- What the page shows of it --------------------------------------------------------------------


def _medians(records: list[Record]) -> dict[str, dict[float, float]]:
    """Return the median accuracies over the seeds, by way of training and cut."""
    return medians(records, "way", "cut", "accuracy")


def _worst_loss(records: list[Record], way: str, cut: float) -> float:
    """Return the largest number of points that a seed loses by a cut."""
    mine = [r for r in records if r["way"] == way]
    whole = {r["seed"]: float(r["accuracy"]) for r in mine if r["cut"] == 0}
    return max(100 * (whole[r["seed"]] - float(r["accuracy"])) for r in mine if r["cut"] == cut)


def verdicts(records: list[Record]) -> list[Verdict]:
    """Return what the run shows, with its numbers."""
    rows = [
        (
            f"{way}: test accuracy with all weights, 2% and 1% of them, not fine-tuned",
            f"{of[0.0]:.3f}, {of[0.98]:.3f}, {of[0.99]:.3f} (the worst seed loses "
            f"{_worst_loss(records, way, 0.98):.1f} points at 2%)",
        )
        for way, of in _medians(records).items()
    ]
    return [*rows, ("What it says about larger networks and sets", "nothing: one small one ran")]


def table(records: list[Record]) -> list[Record]:
    """Return a row for each training, with the median accuracy at each cut."""
    return [
        {"training": way, **{f"{100 * cut:g}% cut": of[cut] for cut in CUTS}}
        for way, of in _medians(records).items()
    ]


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw the accuracy over the part that is left, the sizes of the weights, and the loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    accuracy, sizes, losses = figure.subplots(1, 3)
    for i, (way, of) in enumerate(_medians(records).items()):
        style = STYLES[i % len(STYLES)]
        left = [100 * (1 - cut) for cut in of]
        accuracy.plot(left, list(of.values()), marker="os^D"[i % 4], markersize=4, label=way,
                      **style)  # fmt: skip
        first = next(r["seed"] for r in records if r["way"] == way)
        name = _key(way, first)
        share = np.linspace(0, 100, 201)
        sizes.plot(share, np.maximum(trajectory[f"{name}/sizes"], 1e-12), **style)
        loss = trajectory[f"{name}/loss"]
        window = max(1, len(loss) // 100)
        means = loss[: len(loss) // window * window].reshape(-1, window).mean(1)
        losses.plot(window * np.arange(1, len(means) + 1), means, **style)
    accuracy.set(xscale="log", xlabel="weights that are left, %", ylabel="test accuracy")
    accuracy.xaxis.set_major_formatter("{x:g}")
    accuracy.invert_xaxis()
    sizes.set(yscale="log", xlabel="part of the weights, %", ylabel="|x|, sorted (first seed)")
    losses.set(yscale="log", xlabel="step", ylabel="training loss (first seed)")
    for axis in figure.axes:
        axis.grid(alpha=0.25)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the interactive chart of the accuracy over the part that is left."""
    import altair as alt

    found = {
        way: {100 * (1 - cut): value for cut, value in of.items()}
        for way, of in _medians(records).items()
    }
    colours = [STYLES[i % len(STYLES)]["color"] for i in range(len(found))]
    reverse = alt.Scale(type="log", reverse=True, nice=False)
    x = alt.X("x:Q", title="weights that are left, %", scale=reverse)
    y = alt.Y("y:Q", title="test accuracy", scale=alt.Scale(zero=False))
    return [
        (
            "Test accuracy over the part of the weights that is left after the smallest are cut"
            f"{middle(records)}.",
            line_chart(found, colours, None, x, y),
        )
    ]
