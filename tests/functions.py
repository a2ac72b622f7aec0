"""Legendre functions and points for their tests."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import settings

import mirrorflow as mf
from cases import EVERY, FAST

DOUBLE = torch.float64
each_form = pytest.mark.parametrize("case", FAST, ids=str)
elementwise = pytest.mark.parametrize("case", [c for c in FAST if c.g.elementwise], ids=str)
few = settings(max_examples=10, deadline=None, derandomize=True, database=None)
A = -0.3


def tensor(*values):
    return torch.tensor(values, dtype=DOUBLE)


@cache
def made(id, seed):
    (case,) = (c for c in EVERY if c.id == id)
    return mf.legendre(case.g, case.h, case.start(seed))


def legendre(case, seed=0):
    return made(case.id, seed)


def symmetric(m):
    return (m + m.mT) / 2 if m.ndim > 1 else m


def at(R, seed=0, size=0.05, a=A):
    """Return a mu, symmetric for matrices, and its x."""
    mu = size * symmetric(torch.from_numpy(np.random.default_rng(seed).standard_normal(R.shape)))
    return mu, R.primal(mu, a)


def one(k, u=0.9, v=0.8):
    """Return R_a of one coordinate of u^2k - v^2k."""
    return mf.legendre(mf.PowerDifference(k), mf.Separable(), (tensor(u), tensor(v)))


def log_ratio(u=1.8, v=1.7):
    return mf.legendre(mf.LogRatio(), mf.Separable(), (tensor(u), tensor(v)))


def identity_start(n):
    return mf.legendre(mf.SymmetricFactor(), mf.WeightDecay(), torch.eye(n, dtype=DOUBLE))


def apply(metric, direction, inverse=False):
    """Apply a metric, or its inverse, to a direction."""
    if metric.ndim == 1:
        return direction / metric if inverse else metric * direction
    flat = direction.reshape(-1)
    moved = torch.linalg.pinv(metric, rtol=1e-12) @ flat if inverse else metric @ flat
    return moved.reshape(direction.shape)


def gap(one, two):
    return float((one - two).abs().max() / two.abs().max())
