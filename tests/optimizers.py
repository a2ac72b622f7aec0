"""Optimizers to schedule, and the loop over their groups written by hand."""

from functools import partial

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, Muon

from mirrorflow.schedule import Linear, SwitchOff

FALL = Linear(0.5, 0.0, duration=6)
OFF = SwitchOff(0.5, at=4)
STEPS = 9

# The fraction by which a step shall shrink the weights, (rate, lr, peak), as the papers write it:
# one entry for each convention, from which the tests of conventions are made.
FRACTION = {
    "follow-lr": lambda rate, lr, peak: lr * rate,
    "fixed": lambda rate, lr, peak: rate,
    "adamc": lambda rate, lr, peak: lr**2 / peak * rate,
    "schedule-only": lambda rate, lr, peak: lr / peak * rate,
}

quiet = pytest.mark.filterwarnings("ignore::mirrorflow.weightdecay.CoupledDecayWarning")


class Plain(torch.optim.Optimizer):
    """A third-party optimizer: decays by 1 - wd, and keeps settings of its own in itself."""

    def __init__(self, params, lr=0.1, weight_decay=0.0, scale=1.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.scale = scale

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["weight_decay"]).sub_(self.scale * group["lr"] * p.grad)


MAKE = {
    "sgd": partial(SGD, lr=0.1),
    "sgd momentum": partial(SGD, lr=0.1, momentum=0.9, dampening=0.3),
    "sgd nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "sgd fused": partial(SGD, lr=0.1, momentum=0.9, fused=True),
    "adam": partial(Adam, lr=0.1),
    "adam fused": partial(Adam, lr=0.1, fused=True),
    "adamw": partial(AdamW, lr=0.1),
    "adamw foreach": partial(AdamW, lr=0.1, foreach=True),
    "adamw fused": partial(AdamW, lr=0.1, fused=True),
    "muon": partial(Muon, lr=0.1),
    "third party": partial(Plain, lr=0.1, scale=2.0),
}
optimizers = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def weights(n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(n)]


def pull(params):
    """The gradient of a loss whose minimum is not 0."""
    for i, p in enumerate(params):
        p.grad = (p.detach() - 1.0 - i) * 0.5


def two_groups(make, params, decay=0.3):
    return make(
        [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}], weight_decay=decay
    )


def by_hand(make, schedule, steps=STEPS, lr_at=None):
    params = weights()
    optimizer = two_groups(make, params)
    for t in range(steps):
        optimizer.param_groups[0]["weight_decay"] = schedule(t)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(t) if lr_at else group["lr"]
        pull(params)
        optimizer.step()
    return params


def assert_equal(ours, theirs):
    """The same path run twice, to the bit: a resumed run, or weights that were left alone."""
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def assert_near(ours, theirs, make=None):
    """Two paths to the same weights, which may round differently; Muon's steps are in bfloat16."""
    tolerance = 5e-3 if getattr(make, "func", make) is Muon else 2e-6
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_nets_near(ours, theirs):
    """The same for models with attention, trained by Adam."""
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        pair = p.detach(), q.detach()
        if name.endswith("in_proj_bias"):  # keys' has a gradient of 0: Adam takes rounding for one
            pair = (torch.cat(bias.chunk(3)[::2]) for bias in pair)
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)


def named(*parts):
    return torch.nn.ModuleDict({part: torch.nn.Linear(2, 2) for part in parts})
