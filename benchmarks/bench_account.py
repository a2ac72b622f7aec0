"""What the exact account adds to `descend`: the same steps with it, and of a g it does not know."""

from __future__ import annotations

import numpy as np
import torch

import mirrorflow as mf
from benchmarks._diagonal import LR, problem, start
from benchmarks._measure import measure
from mirrorflow.reparam import Reparam

STEPS = 2000


class Unknown(Reparam):
    """m * w, of which `descend` keeps no account."""

    elementwise = True
    names = ("m", "w")

    def __call__(self, w):
        """Multiply the two factors."""
        return w[0] * w[1]

    def pullback(self, w, dx):
        """Return (w dx, m dx)."""
        return w[1] * dx, w[0] * dx


def compared(name: str, steps: int = STEPS, **options) -> dict:
    """Return the seconds of a step with and without the account, on 40 x 100."""
    Z, y = (torch.from_numpy(v) for v in problem())
    loss = mf.LeastSquares(Z, y)

    def trained(g):
        return mf.descend(
            loss, g, mf.WeightDecay(), start(), mf.Constant(0.01), LR, steps, **options
        )

    assert trained(Unknown()).path.account is None
    difference = (trained(mf.Hadamard()).value - trained(Unknown()).value).abs().max()
    seconds = measure(
        {"with": lambda: trained(mf.Hadamard()), "without": lambda: trained(Unknown())}, 5
    )
    return {
        "case": f"descend, m * w, 40 x 100, {name}",
        "step, seconds": seconds["with"] / steps,
        "without the account, seconds": seconds["without"] / steps,
        "ratio": seconds["with"] / seconds["without"],
        "apart": float(np.asarray(difference)),
    }


def run() -> list[dict]:
    """Measure full gradients, single rows, and single rows whose noise is split off at times."""
    return [
        compared("full gradient"),
        compared("batch 1", batch=1),
        compared("batch 1, split every 100 steps", batch=1, split_every=100),
    ]
