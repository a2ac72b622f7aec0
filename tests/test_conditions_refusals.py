"""`check` on arguments that are refused, and at the edge of its domain."""

import math

import numpy as np
import pytest
import torch

import mirrorflow as mf

DECAY, TERMS, custom = mf.WeightDecay(), mf.Separable(), mf.CustomRegularizer
AT = torch.from_numpy(np.random.default_rng(5).uniform(0.6, 1.1, (4, 3)))
TWO, THREE = (AT[0], AT[1] / 2), (AT[0], AT[1], AT[2])


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# Bad input.

NAN = math.nan


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"g": mf.Hadamard}, TypeError, "check: g and h must be a Reparam and a Regularizer"),
        ({"h": None}, TypeError, "got Hadamard and NoneType. Wrap torch functions"),
        ({"h": TERMS}, TypeError, "Use WeightDecay.. for m . w"),
        ({"w0": AT[0]}, ValueError, r"w must hold \(m, w\), got 1 tensor"),
        ({"w0": THREE}, ValueError, r"w must hold \(m, w\), got 3 tensor"),
        ({"w0": (AT[0], AT[0, :2])}, ValueError, r"one shape, got m \(3,\), w \(2,\)"),
        ({"w0": (AT[0], vector(1, NAN, 2))}, ValueError, "w must be finite, got NaN or inf"),
        ({"w0": (vector(1, math.inf, 2), AT[0])}, ValueError, "m must be finite, got NaN or inf"),
        ({"w0": (AT[0], torch.ones(3, dtype=torch.int64))}, TypeError, "w must have a floating"),
        ({"w0": (AT[0].numpy(), AT[0].numpy())}, TypeError, "must be a torch tensor"),
        ({"w0": (vector(), vector())}, ValueError, r"g\(w0\) must hold numbers, got none"),
        ({"g": mf.LogRatio(), "w0": (AT[0], -AT[0])}, ValueError, "v must be positive"),
        ({"g": mf.SymmetricFactor(), "w0": AT[0]}, ValueError, "U must be a matrix"),
        ({"g": mf.Product(), "w0": (AT, AT)}, ValueError, "A and B must be"),
        ({"g": mf.CommutingQuadratic(torch.eye(2)[None])}, ValueError, r"w must hold \(w\)"),
        ({"g": mf.CommutingQuadratic(torch.eye(2)[None]), "w0": AT[0]}, ValueError, r"shape \(2,"),
        ({"g": mf.PowerDifference(2), "h": mf.Separable((1,))}, ValueError, "c must have 2 entr"),
        ({"g": mf.CustomReparam(torch.log), "w0": -AT[0]}, ValueError, r"g\(w0\) must be finite"),
        (
            {"g": mf.Identity(), "h": custom(lambda x: x.sqrt().sum()), "w0": -AT[0]},
            ValueError,
            r"grad h\(w0\) must be finite, got NaN",
        ),
        ({"h": custom(lambda w: w[0])}, ValueError, "fn must return a scalar"),
        ({"sensing": AT.numpy()}, TypeError, "sensing must be a torch tensor, got ndarray"),
        ({"sensing": AT[0]}, ValueError, r"sensing must have shape \(m, 3\), m > 0, got \(3,\)"),
        ({"sensing": AT[:, :2]}, ValueError, r"sensing must have shape \(m, 3\)"),
        ({"sensing": AT[:0]}, ValueError, r"got \(0, 3\)"),
        ({"sensing": AT * NAN}, ValueError, "sensing must be finite, got NaN"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        mf.check(**{"g": mf.Hadamard(), "h": DECAY, "w0": TWO, **change})


def test_measurements_of_a_vector():
    assert mf.check(mf.Hadamard(), DECAY, TWO, sensing=AT).applies


def test_a_derivative_that_is_infinite_is_not_regular_and_ends():
    """sqrt at 0: SciPy's integrator would not come back from a velocity that is NaN."""
    report = mf.check(mf.CustomReparam(torch.sqrt, elementwise=True), DECAY, vector(0.0, 1.0))
    assert not report.applies and not report.regular


@pytest.mark.parametrize(
    ("fn", "error", "said"),
    [
        (lambda w: 5, TypeError, "must be a torch tensor, got int"),
        (lambda w: (w[0] * w[1]).detach().numpy(), TypeError, "got ndarray"),
        (lambda w: torch.ones(3), ValueError, "must depend on w, got a constant or detached"),
        (lambda w: (w[0] * w[1]).detach(), ValueError, "must depend on w"),
    ],
)
def test_a_g_without_a_derivative_is_named(fn, error, said):
    w0 = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    with pytest.raises(error, match=said):
        mf.check(mf.CustomReparam(fn, elementwise=True), mf.WeightDecay(), w0)
