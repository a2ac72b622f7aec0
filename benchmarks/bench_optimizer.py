"""A step of MirrorAdam against torch's AdamW on the same factors m and w."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks._measure import measure
from mirrorflow.optim import MirrorAdam

TARGET = 1.5  # times AdamW with foreach
CASES = {
    "perceptron, 64-256-256-10": [(256, 64), (256, 256), (10, 256)],
    "8 weights of 1,024 x 1,024": [(1024, 1024)] * 8,
    "40 weights of 64 x 64": [(64, 64)] * 40,
}


def pairs(shapes):
    """Return factors with gradients."""
    torch.manual_seed(0)
    made = [tuple(torch.randn(shape).requires_grad_() for _ in "mw") for shape in shapes]
    for pair in made:
        for factor in pair:
            factor.grad = 0.01 * torch.randn_like(factor)
    return made


def compared(name: str, shapes) -> dict:
    """Return the seconds of a step of each optimizer, on factors of its own."""

    def adamw(**options):
        flat = [factor for pair in pairs(shapes) for factor in pair]
        return torch.optim.AdamW(flat, lr=1e-5, **options)

    optimizers = {
        "MirrorAdam": MirrorAdam(pairs(shapes), lr=1e-5, weight_decay=0.1),
        "AdamW, foreach": adamw(foreach=True),
        "AdamW, for-loop": adamw(foreach=False),
        "AdamW, fused": adamw(fused=True),
    }
    seconds = measure({key: partial(one.step) for key, one in optimizers.items()}, repeats=9)
    ratios = {f"ratio to {key}": seconds["MirrorAdam"] / seconds[key] for key in seconds}
    del ratios["ratio to MirrorAdam"]
    return {"case": name, **{f"{k}, seconds": v for k, v in seconds.items()}, **ratios,
            "target, to foreach": TARGET}  # fmt: skip


def run() -> list[dict]:
    """Measure three sets of weights."""
    return [compared(name, shapes) for name, shapes in CASES.items()]
