"""Modules with weights m * w, and back: torch's own modules, counts and errors are the oracles."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import mirrorflow as mf
from mirrorflow.optim import HadamardFactors, MirrorAdam, fold, overparametrize


def net(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 4)
    return nn.Sequential(*layers).to(dtype)


def images(dtype=torch.float32):
    return torch.randn(3, 1, 5, 5, dtype=dtype, generator=torch.Generator().manual_seed(1))


def weights(module):
    return torch.cat([module[0].weight.ravel(), module[4].weight.ravel()]).detach()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(1e-6, 1e3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_start_has_the_weights_and_the_scale(seed, scale, dtype):
    """x = m w and A = |u0 v0|, with R_a's own reading of the start."""
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.normal(size=6) * 10 ** rng.uniform(-4, 2, 6) * rng.integers(0, 2, 6))
    x = x.to(dtype)
    m, w = HadamardFactors(scale).right_inverse(x)
    torch.testing.assert_close(m * w, x)
    big = x.abs() > 100 * scale  # there m^2 - w^2 cancels
    if not big.all():
        A = mf.legendre(mf.Hadamard(), mf.WeightDecay(), (m[~big], w[~big])).log_A0.exp()
        torch.testing.assert_close(A, torch.full_like(A, scale), rtol=1e-3, atol=0)
    assert (m > w.abs()).all() or dtype == torch.float32


def test_the_module_computes_what_it_did():
    plain, module = net(), net()
    overparametrize(module)
    torch.testing.assert_close(module(images()), plain(images()))
    assert module[4].in_features == 18 and isinstance(module[4], nn.Linear)


def test_every_trainable_parameter_is_a_factor_or_another():
    module = net()
    made = overparametrize(module)
    assert made.names == ("0.weight", "4.weight")
    listed = [f for pair in made.pairs for f in pair] + list(made.others)
    assert {id(p) for p in listed} == {id(p) for p in module.parameters()}
    assert len(listed) == len(set(map(id, listed)))
    for (m, w), layer in zip(made.pairs, (module[0], module[4]), strict=True):
        torch.testing.assert_close(m * w, layer.weight)


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (nn.Linear, ("4.weight",)),
        ("4.*", ("4.weight", "4.bias")),
        (["0.weight", nn.Linear], ("0.weight", "4.weight")),
        ("[04].weight", ("0.weight", "4.weight")),
        (nn.BatchNorm2d, ("1.weight",)),
    ],
)
def test_weights_are_chosen_by_pattern_and_type(chosen, names):
    assert overparametrize(net(), chosen).names == names


def test_a_parameter_of_a_users_own_module_can_be_chosen():
    class Diagonal(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.zeros(3))

    module = Diagonal()
    ((m, w),) = overparametrize(module, "x").pairs
    assert module.x.tolist() == w.tolist() == [0, 0, 0] and m.tolist() == [1, 1, 1]


def test_weights_without_gradients_are_left_alone():
    module = net()
    module[0].weight.requires_grad_(False)
    made = overparametrize(module)
    assert made.names == ("4.weight",) and not parametrize.is_parametrized(module[0])


def test_at_the_default_scale_zeros_move_as_plain_weights_do():
    """dx = -(m^2 + w^2) G = -G at x = 0, A = 1/2."""
    m, w = HadamardFactors(0.5).right_inverse(torch.zeros(2))
    assert (m**2 + w**2).tolist() == [1, 1]


def test_an_assigned_weight_starts_anew():
    module = net()
    overparametrize(module, scale=0.1)
    module[4].weight = torch.full((4, 18), 0.3)
    m, w = module[4].parametrizations.weight.original0, module[4].parametrizations.weight.original1
    torch.testing.assert_close(module[4].weight, torch.full((4, 18), 0.3))
    torch.testing.assert_close((m**2 - w**2) / 2, torch.full((4, 18), 0.1))


def test_checkpoints_of_the_factors_load():
    module, other = net(), net()
    overparametrize(module)
    overparametrize(other)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
    other.load_state_dict(module.state_dict())
    assert torch.equal(weights(module), weights(other))


# Back


def test_without_a_cut_the_plain_module_is_the_same():
    module = net()
    keys, kinds = set(module.state_dict()), [type(m) for m in module.modules()]
    made = overparametrize(module)
    train(module, made)
    module.eval()
    before = module(images()).detach()
    done = fold(module)
    assert torch.equal(module(images()), before)
    assert set(module.state_dict()) == keys and [type(m) for m in module.modules()] == kinds
    assert done.sizes == {"0.weight": 18, "4.weight": 72}
    assert done.zeros == {"0.weight": 0, "4.weight": 0} and np.isnan(done.threshold)
    assert all(p.is_leaf and p.requires_grad for p in module.parameters())


def train(module, made, steps=3):
    optimizer = MirrorAdam(made.pairs, lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        module(images()).square().mean().backward()
        optimizer.step()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), sparsity=st.floats(0, 1))
def test_a_sparsity_takes_the_smallest_across_layers(seed, sparsity):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    overparametrize(module)
    x = torch.cat([layer.weight.detach().ravel() for layer in module]).numpy()
    done = fold(module, sparsity=sparsity)
    cut = np.argsort(np.abs(x))[: round(sparsity * 32)]
    expected = x.copy()
    expected[cut] = 0
    found = torch.cat([layer.weight.detach().ravel() for layer in module]).numpy()
    np.testing.assert_array_equal(found, expected)
    assert sum(done.zeros.values()) == len(cut) and done.sparsity == len(cut) / 32
    if len(cut):
        assert done.threshold == np.abs(x[cut]).max()


def test_a_threshold_takes_all_up_to_it():
    module = net()
    overparametrize(module)
    x = weights(module)
    done = fold(module, threshold=0.1)
    assert torch.equal(weights(module), torch.where(x.abs() <= 0.1, 0.0, x))
    assert done.zeros["4.weight"] == int((x[18:].abs() <= 0.1).sum()) > 0
    assert done.threshold == x.abs()[x.abs() <= 0.1].max()


def test_ties_are_cut_to_the_count():
    module = nn.Linear(4, 1, bias=False)
    nn.init.ones_(module.weight)
    overparametrize(module)
    assert fold(module, sparsity=0.5).zeros == {"weight": 2}


def test_a_copy_can_be_folded_alone():
    """torch's deepcopy shares the class of a parametrized module, from which folding deletes."""
    module = net()
    overparametrize(module)
    twin = copy.deepcopy(module)
    fold(twin, sparsity=0.9)
    torch.testing.assert_close(weights(module), weights(net()))
    assert parametrize.is_parametrized(module[4]) and not parametrize.is_parametrized(twin[4])
    fold(module)
    torch.testing.assert_close(weights(module), weights(net()))


def test_frozen_factors_fold_to_a_frozen_parameter():
    module = net()
    overparametrize(module)
    module.requires_grad_(False)
    with torch.no_grad():
        fold(module)
    assert isinstance(module[4].weight, nn.Parameter) and not module[4].weight.requires_grad


def test_other_parametrizations_stay():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    nn.utils.parametrizations.weight_norm(module[0])
    overparametrize(module, "1.weight")
    assert fold(module).sizes == {"1.weight": 9}
    assert parametrize.is_parametrized(module[0])


def test_a_folded_module_can_be_trained_again():
    module = net()
    overparametrize(module)
    fold(module)
    made = overparametrize(module)
    train(module, made)
    assert fold(module, sparsity=0.5).sparsity == 0.5


def test_plain_sparse_regression_ends_sparse():
    """The way through: an L1-like end by decay, cut without loss."""
    rng = np.random.default_rng(0)
    Z, truth = torch.tensor(rng.normal(size=(12, 20))).float(), torch.zeros(20)
    truth[[3, 11]] = torch.tensor([1.0, -1.0])
    module = nn.Linear(20, 1, bias=False)
    nn.init.zeros_(module.weight)
    made = overparametrize(module)
    optimizer = MirrorAdam(made.pairs, lr=0.1, weight_decay=0.2)
    for t in range(400):
        optimizer.param_groups[0].update(lr=0.1 * (1 - t / 400), weight_decay=0.2 * (t < 200))
        optimizer.zero_grad()
        (module(Z).squeeze(1) - Z @ truth).square().mean().backward()
        optimizer.step()
    assert fold(module, sparsity=0.9).zeros == {"weight": 18}
    torch.testing.assert_close(module.weight.detach().ravel(), truth, rtol=0, atol=0.05)


# What is refused


def tied():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    return module


@pytest.mark.parametrize(
    ("module", "options", "error", "message"),
    [
        (
            nn.ReLU(),
            {},
            ValueError,
            "weights must choose trainable parameters, got 'Linear, Conv1d",
        ),
        (net(), {"weights": "5.*"}, ValueError, r"got '5\.\*', which matches none"),
        (net(), {"weights": ["*.bias", "x"]}, ValueError, "got 'x', which matches none"),
        (net(), {"scale": 0.0}, ValueError, "scale must be a finite number > 0, got 0.0"),
        (net(), {"scale": float("nan")}, ValueError, "scale must be"),
        (tied(), {}, ValueError, "0.weight must not be tied, got 2 names of it"),
        (net(torch.bfloat16), {}, TypeError, "0.weight must be float32 or float64, got torch.bf"),
    ],
)
def test_what_cannot_be_a_product_is_named(module, options, error, message):
    with pytest.raises(error, match=message):
        overparametrize(module, **options)
    assert not any(parametrize.is_parametrized(m) for m in module.modules())


def test_lazy_and_parametrized_weights_are_named():
    with pytest.raises(ValueError, match="weight must have a shape"):
        overparametrize(nn.LazyLinear(3))
    module = net()
    overparametrize(module)
    with pytest.raises(ValueError, match="which matches none"):
        overparametrize(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.1, "sparsity": 0.5}, "must not both be given"),
        ({"threshold": -1.0}, "threshold must be a finite number >= 0, got -1.0"),
        ({"sparsity": 1.5}, r"sparsity must be in \[0, 1\], got 1.5"),
    ],
)
def test_a_bad_cut_is_named_and_changes_nothing(options, message):
    module = net()
    overparametrize(module)
    with pytest.raises(ValueError, match=message):
        fold(module, **options)
    assert parametrize.is_parametrized(module[4])


def test_what_cannot_be_folded_is_named():
    with pytest.raises(ValueError, match="module must have weights m \\* w, got none"):
        fold(net())
    module = net()
    overparametrize(module)
    parametrize.register_parametrization(module[4], "weight", nn.Tanh(), unsafe=True)
    with pytest.raises(
        ValueError, match=r"4.weight must have one parametrization, got Hadamard.*Tanh"
    ):
        fold(module)
    assert parametrize.is_parametrized(module[0])
