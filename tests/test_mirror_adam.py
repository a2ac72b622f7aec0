"""MirrorAdam against a literal loop, the law of the flow, `limit`, and torch's own optimizers."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mirrorflow as mf
from mirrorflow.optim import MirrorAdam

TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-4}


def literal(m, w, gradients, lrs, decays, beta1, beta2, eps):
    """The rule of the class, a number at a time: returns m, w, a and mu."""
    M, mu, s, a = [0.0] * len(m), [0.0] * len(m), 0.0, 0.0
    m, w = list(map(float, m)), list(map(float, w))
    for t, (G, lr, decay) in enumerate(zip(gradients, lrs, decays, strict=True), start=1):
        s = beta2 * s + (1 - beta2) * sum(g * g for g in G) / len(m)
        root = math.sqrt(s / (1 - beta2**t)) + eps
        for i, g in enumerate(G):
            M[i] = beta1 * M[i] + (1 - beta1) * g
            h = lr * M[i] / (1 - beta1**t) / root
            u, v = m[i] + w[i], m[i] - w[i]
            u, v = (1 - lr * decay) * math.exp(-h) * u, (1 - lr * decay) * math.exp(h) * v
            m[i], w[i], mu[i] = (u + v) / 2, (u - v) / 2, mu[i] - h
        a += math.log(1 - lr * decay)
    return np.array(m), np.array(w), a, np.array(mu)


def train(pairs, optimizer, gradients, lrs, decays):
    """Feed the gradients of the factors that gradients in x make, as autograd does."""
    for row, lr, decay in zip(gradients, lrs, decays, strict=True):
        optimizer.param_groups[0].update(lr=lr, weight_decay=decay)
        for (m, w), G in zip(pairs, row, strict=True):
            G = torch.as_tensor(G, dtype=m.dtype)
            m.grad, w.grad = G * w.detach(), G * m.detach()
        optimizer.step()


def parameters(rng, sizes, dtype):
    return [
        tuple(torch.nn.Parameter(torch.tensor(rng.normal(size=n), dtype=dtype)) for _ in "mw")
        for n in sizes
    ]


def runs(rng, sizes, steps):
    """Gradients of changing size, learning rates, and a decay that is on and off."""
    size = 10 ** rng.uniform(-3, 3)
    gradients = [[size * rng.normal(size=n) for n in sizes] for _ in range(steps)]
    lrs = rng.uniform(0, 0.1, steps)
    return gradients, lrs, np.where(rng.random(steps) < 0.5, 0.0, rng.uniform(0, 2, steps))


def entropy_law(m0, w0, a, mu):
    """x = A0 e^{2a} sinh(2 mu + rho), with the signs of u0 and v0, in NumPy."""
    u0, v0 = (m0 + w0) / np.sqrt(2), (m0 - w0) / np.sqrt(2)
    # u^2 - v^2 = A (e^t - e^-t), whatever the signs of u0 and v0
    t = 2 * mu + np.log(np.abs(u0 / v0))
    return np.abs(u0 * v0) * np.exp(2 * a) * np.sinh(t)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.0), (0.0, 0.0)]),
    eps=st.sampled_from([1e-8, 0.1]),
)
def test_every_step_is_that_of_the_literal_loop(seed, dtype, sizes, betas, eps):
    rng, steps = np.random.default_rng(seed), 12
    pairs = parameters(rng, sizes, dtype)
    starts = [tuple(f.detach().double().numpy().copy() for f in pair) for pair in pairs]
    gradients, lrs, decays = runs(rng, sizes, steps)
    optimizer = MirrorAdam(pairs, betas=betas, eps=eps, keep_mu=True)
    train(pairs, optimizer, gradients, lrs, decays)
    for i, ((m, w), account) in enumerate(zip(pairs, optimizer.account(), strict=True)):
        seen = [row[i] for row in gradients]
        expected = literal(*starts[i], seen, lrs, decays, *betas, eps)
        found = (m.detach().numpy(), w.detach().numpy(), account.a, account.mu.numpy())
        for ours, theirs in zip(found, expected, strict=True):
            scale = max(1.0, np.abs(theirs).max())
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE[dtype] * scale)
        assert account.steps == steps


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_the_law_holds_for_any_noise_and_decay(seed, dtype):
    """Heavy-tailed gradients that come from nowhere: a is the decay's alone, mu the sum of h."""
    rng, sizes, steps = np.random.default_rng(seed), (3, 5), 60
    pairs = parameters(rng, sizes, dtype)
    starts = [tuple(f.detach().double().numpy().copy() for f in pair) for pair in pairs]
    gradients, lrs, decays = runs(rng, sizes, steps)
    gradients = [[G * rng.standard_cauchy(G.shape) for G in row] for row in gradients]
    optimizer = MirrorAdam(pairs, keep_mu=True)
    train(pairs, optimizer, gradients, lrs, decays)
    for (m, w), start, account in zip(pairs, starts, optimizer.account(), strict=True):
        x = (m * w).detach().double().numpy()
        law = entropy_law(*start, account.a, account.mu.double().numpy())
        np.testing.assert_allclose(x, law, rtol=0, atol=TOLERANCE[dtype] * (1 + np.abs(law).max()))
        assert account.a == pytest.approx(np.log1p(-lrs * decays).sum(), abs=TOLERANCE[dtype])


def test_the_mirror_map_of_the_start_reads_mu():
    rng = np.random.default_rng(4)
    pairs = parameters(rng, (6,), torch.float64)
    R = mf.legendre(mf.Hadamard(), mf.WeightDecay(), tuple(f.detach().clone() for f in pairs[0]))
    optimizer = MirrorAdam(pairs, keep_mu=True)
    train(pairs, optimizer, *runs(rng, (6,), 50))
    (account,) = optimizer.account()
    x = (pairs[0][0] * pairs[0][1]).detach()
    torch.testing.assert_close(R.mirror(x, account.a), account.mu, rtol=1e-10, atol=1e-10)


# The end of training


def regression(seed, n=8, d=20, nonzero=2):
    rng = np.random.default_rng(seed)
    Z, x = rng.normal(size=(n, d)), np.zeros(d)
    x[rng.choice(d, nonzero, replace=False)] = rng.choice([-1.0, 1.0], nonzero)
    return torch.tensor(Z), torch.tensor(x)


def fit(Z, y, optimizer, m, w, steps, batch, noise, rng, lr=0.05):
    """Decay in the first half, noisy labels all along, a falling learning rate."""
    for t in range(steps):
        rate = 0.5 * lr * (1 + math.cos(math.pi * t / steps))
        optimizer.param_groups[0].update(lr=rate, weight_decay=0.1 if 2 * t < steps else 0.0)
        rows = torch.as_tensor(rng.choice(len(y), batch, replace=False))
        labels = y[rows] + noise * torch.tensor(rng.normal(size=batch))
        with torch.no_grad():
            G = Z[rows].T @ (Z[rows] @ (m * w) - labels) / batch
            m.grad, w.grad = G * w, G * m
        optimizer.step()
    return (m * w).detach()


def diagonal(d):
    """A start with x = 0, A = 1/2, and its R."""
    w0 = torch.zeros(d).double(), torch.ones(d).double()
    R = mf.legendre(mf.Hadamard(), mf.WeightDecay(), w0)
    return R, *(torch.nn.Parameter(f.clone()) for f in w0)


def distance(x, y):
    return float((x - y).norm() / y.norm())


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 8),
    noise=st.sampled_from([0.0, 1.0]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.0)]),
    steps=st.integers(1, 60),
)
def test_every_iterate_has_the_least_entropy_of_all_that_predict_the_same(
    seed, batch, noise, betas, steps
):
    """x_t = argmin {R_a(x) : Zx = Z x_t} at any t, a the decay's alone, not only at the end."""
    rng, (Z, truth), (R, m, w) = np.random.default_rng(seed), regression(seed), diagonal(20)
    optimizer = MirrorAdam([(m, w)], betas=betas)
    x = fit(Z, Z @ truth, optimizer, m, w, steps, batch, noise, rng)
    assert distance(mf.limit(R, Z, Z @ x, optimizer.account()[0].a).value, x) < 1e-8


def test_a_run_that_fits_ends_at_the_limit():
    (Z, truth), (R, m, w) = regression(0), diagonal(20)
    optimizer = MirrorAdam([(m, w)])
    x = fit(Z, Z @ truth, optimizer, m, w, 1000, 8, 0.0, np.random.default_rng(0))
    assert distance(x, mf.limit(R, Z, Z @ truth, optimizer.account()[0].a).value) < 1e-3


def test_adamw_ends_elsewhere():
    """The control: with second moments per coordinate the same run is far from argmin R_a."""
    (Z, truth), (R, m, w) = regression(0), diagonal(20)
    optimizer = torch.optim.AdamW([m, w])
    x = fit(Z, Z @ truth, optimizer, m, w, 1000, 8, 0.0, np.random.default_rng(0))
    log_A = torch.log((m**2 - w**2).detach().abs() / 2)
    assert distance(mf.limit(R, Z, Z @ x, -1.25).value, x) > 0.05
    assert float((log_A - log_A.mean()).abs().max()) > 0.05  # its decay is not one number


# Invariances and edges


def test_steps_do_not_depend_on_the_scale_of_the_loss():
    rng = np.random.default_rng(1)
    gradients, lrs, decays = runs(rng, (5,), 20)
    ends = []
    for factor in (1.0, 1000.0):
        pairs = parameters(np.random.default_rng(2), (5,), torch.float64)
        optimizer = MirrorAdam(pairs, eps=1e-300)
        train(pairs, optimizer, [[factor * G for G in row] for row in gradients], lrs, decays)
        ends.append(torch.cat(pairs[0]).detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-14)


def test_steady_gradients_move_mu_by_the_learning_rate():
    pairs = parameters(np.random.default_rng(3), (50,), torch.float64)
    optimizer = MirrorAdam(pairs, keep_mu=True)
    G = np.random.default_rng(4).normal(size=50)
    train(pairs, optimizer, [[G]] * 10, [0.01] * 10, [0.0] * 10)
    mu = optimizer.account()[0].mu
    assert float(mu.square().mean().sqrt()) == pytest.approx(10 * 0.01, rel=1e-6)


def test_gradients_that_are_no_products_are_projected():
    """G is the least-squares solution of g_m = G w, g_w = G m."""
    rng = np.random.default_rng(5)
    pairs = parameters(rng, (9,), torch.float64)
    m, w = pairs[0]
    m.grad, w.grad = (torch.tensor(rng.normal(size=9)) for _ in "mw")
    G = []
    for column in torch.stack([w, m, m.grad, w.grad]).detach().T.numpy():
        G.append(np.linalg.lstsq(column[:2, None], column[2:], rcond=None)[0][0])
    optimizer = MirrorAdam(pairs, lr=0.1, keep_mu=True)
    optimizer.step()
    expected = -0.1 * np.array(G) / np.sqrt(np.mean(np.square(G)))
    np.testing.assert_allclose(optimizer.account()[0].mu, expected, rtol=1e-7)


def test_signs_of_u_and_v_are_kept_at_any_step_size():
    """A step that would overshoot in gradient descent, h = 3, multiplies by e^{-3} and e^3."""
    m, w = (torch.nn.Parameter(torch.tensor([f]).double()) for f in (1.0, 0.5))
    optimizer = MirrorAdam([(m, w)], lr=3.0)
    train([(m, w)], optimizer, [[[7.0]]], [3.0], [0.0])
    assert (m + w).item() == pytest.approx(1.5 * math.exp(-3), rel=1e-6)
    assert (m - w).item() == pytest.approx(0.5 * math.exp(3), rel=1e-6)


@pytest.mark.parametrize("sign", (1.0, -1.0))
def test_one_sided_starts_stay_one_sided(sign):
    """m = w or m = -w: x keeps its sign, exactly, as in the flow."""
    rng = np.random.default_rng(6)
    m = torch.nn.Parameter(torch.tensor(rng.normal(size=5)))
    w = torch.nn.Parameter(sign * m.detach())
    train([(m, w)], MirrorAdam([(m, w)]), *runs(rng, (5,), 30))
    assert torch.equal(w, sign * m)


def test_coordinates_at_zero_stay_there_and_spoil_nothing():
    m, w = (torch.nn.Parameter(torch.tensor([0.0, f])) for f in (1.0, 0.5))
    optimizer = MirrorAdam([(m, w)], lr=0.1)
    train([(m, w)], optimizer, [[[1.0, 1.0]]] * 3, [0.1] * 3, [0.1] * 3)
    assert m[0].item() == w[0].item() == 0 and torch.isfinite(m).all() and m[1].item() != 1.0


def test_the_decay_in_the_account_is_the_one_that_acted():
    """In float32 1 - 1e-9 is 1: nothing is taken, and nothing is entered."""
    m, w = (torch.nn.Parameter(torch.tensor([f])) for f in (1.0, 0.25))
    optimizer = MirrorAdam([(m, w)], lr=1e-3, weight_decay=1e-6)
    train([(m, w)], optimizer, [[[0.0]]] * 50, [1e-3] * 50, [1e-6] * 50)
    assert m.item() == 1.0 and optimizer.account()[0].a == 0.0
    train([(m, w)], optimizer, [[[0.0]]] * 50, [1e-3] * 50, [1.0] * 50)
    assert optimizer.account()[0].a == pytest.approx(math.log(m.item()), rel=1e-4)


# As an optimizer of torch


def network():
    torch.manual_seed(0)
    pairs = parameters(np.random.default_rng(7), (4, 3), torch.float64)
    return pairs, [{"params": pairs[:1], "lr": 0.02}, {"params": pairs[1:], "betas": (0.5, 0.9)}]


def loss(pairs):
    return sum(((m * w - 1) ** 2).sum() for m, w in pairs)


def advance(optimizer, pairs, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(pairs).backward()
        optimizer.step()


def flat(pairs):
    return torch.cat([f.detach().ravel() for pair in pairs for f in pair])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_run_that_resumes_from_a_checkpoint_is_the_same(dtype):
    whole = parameters(np.random.default_rng(8), (4, 3), dtype)
    optimizer = MirrorAdam(whole, lr=0.05, weight_decay=0.1, keep_mu=True)
    advance(optimizer, whole, 5)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "pairs": whole}, file)
    advance(optimizer, whole, 5)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    later = saved["pairs"]
    resumed = MirrorAdam(later, lr=7.0)
    resumed.load_state_dict(saved["optimizer"])
    advance(resumed, later, 5)
    assert torch.equal(flat(whole), flat(later))
    for ours, theirs in zip(optimizer.account(), resumed.account(), strict=True):
        assert (ours.steps, ours.a) == (theirs.steps, theirs.a)
        assert torch.equal(ours.mu, theirs.mu)


def test_a_copy_goes_its_own_way():
    pairs, groups = network()
    optimizer = MirrorAdam(groups)
    advance(optimizer, pairs, 2)
    twin = copy.deepcopy(optimizer)
    before = flat(pairs)
    advance(twin, twin.pairs, 3)
    assert torch.equal(flat(pairs), before)
    advance(optimizer, pairs, 3)
    assert torch.equal(flat(pairs), flat(twin.pairs))


def test_groups_have_their_own_settings_and_may_come_later():
    pairs, groups = network()
    optimizer = MirrorAdam(groups[:1])
    advance(optimizer, pairs, 1)
    optimizer.add_param_group(groups[1])
    advance(optimizer, pairs, 2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.01]
    assert [account.steps for account in optimizer.account()] == [3, 2]
    assert [list(map(id, pair)) for pair in optimizer.pairs] == [list(map(id, p)) for p in pairs]
    alone = network()[0]
    single = MirrorAdam([{"params": alone[1:], "betas": (0.5, 0.9)}])
    advance(single, alone, 2)
    torch.testing.assert_close(flat(alone[1:]), flat(pairs[1:]), rtol=1e-14, atol=0)


def test_many_small_and_large_pairs_are_each_on_their_own():
    """However pairs are grouped for speed, each moves as it does alone."""
    sizes = (3, 70_000, 5, 1, 66_000, 2)
    together = parameters(np.random.default_rng(9), sizes, torch.float32)
    alone = copy.deepcopy(together)
    advance(MirrorAdam(together), together, 2)
    for pair in alone:
        advance(MirrorAdam([pair]), [pair], 2)
    torch.testing.assert_close(flat(together), flat(alone), rtol=1e-6, atol=1e-7)


def test_pairs_without_gradients_rest():
    pairs, groups = network()
    optimizer = MirrorAdam(groups, weight_decay=0.1)
    before = flat(pairs[1:])
    advance(optimizer, pairs[:1], 3)
    assert torch.equal(flat(pairs[1:]), before)
    assert [account.steps for account in optimizer.account()] == [3, 0]
    assert optimizer.account()[1].a == 0.0


def test_a_closure_is_evaluated_with_gradients():
    pairs, groups = network()
    optimizer = MirrorAdam(groups)

    def closure():
        optimizer.zero_grad()
        value = loss(pairs)
        value.backward()
        return value

    first = optimizer.step(closure)
    assert optimizer.step(closure).item() < first.item()


def test_accumulated_gradients_make_one_step():
    pairs, groups = network()
    optimizer, (halves, other) = MirrorAdam(groups), (network())
    split = MirrorAdam(other)
    advance(optimizer, pairs, 1)
    for _ in range(4):
        (0.25 * loss(halves)).backward()
    split.step()
    torch.testing.assert_close(flat(halves), flat(pairs), rtol=1e-13, atol=0)


@pytest.mark.parametrize("group", (0, 1))
def test_learning_rate_schedulers_set_the_step(group):
    pairs, groups = network()
    optimizer = MirrorAdam(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 if t < 2 else 0.0)
    for step in range(4):
        before = flat(pairs[group : group + 1])
        advance(optimizer, pairs, 1)
        scheduler.step()
        moved = (flat(pairs[group : group + 1]) - before).abs().max()
        assert moved < 1e-15 if step >= 2 else moved > 1e-3


def test_a_weight_decay_scheduler_writes_what_acts():
    pairs = network()[0]
    optimizer = MirrorAdam(pairs, lr=0.05, weight_decay=1.0)
    schedule = mf.SwitchOff(0.4, at=3)
    scheduler = mf.WeightDecayScheduler(optimizer, schedule, coupling="decoupled")
    for _ in range(6):
        advance(optimizer, pairs, 1)
        scheduler.step()
    assert optimizer.account()[0].a == pytest.approx(3 * math.log(1 - 0.05 * 0.4), rel=1e-12)
    assert scheduler.accumulated == pytest.approx([-3 * 0.05 * 0.4])


# What is refused


def one(*shape, **options):
    return torch.nn.Parameter(torch.ones(*shape, **options))


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        (one(2), TypeError, r"pairs must be a list of \(m, w\), got a Tensor"),
        ([one(2), one(2)], TypeError, r"pairs must hold \(m, w\), got a Parameter at 0"),
        ([(one(2),)], TypeError, "pairs must hold"),
        ([("weight", one(2))], TypeError, "pair 0 must hold two tensors, got a str"),
        ([(one(2), one(2)), (one(2), one(3))], ValueError, r"pair 1 .* one shape.*\(2,\).*\(3,\)"),
        ([(one(2), one(2, dtype=torch.float64))], ValueError, "pair 0 must have one shape, dtype"),
        ([(one(2, dtype=torch.bfloat16),) * 2], TypeError, "float32 or float64, got torch.bfl"),
        ([(one(2, dtype=torch.complex64),) * 2], TypeError, "float32 or float64"),
        ([(torch.ones(2).requires_grad_(),) * 2], ValueError, "got one of them twice"),
        ([], ValueError, "empty parameter list"),
        ([{"pairs": []}], TypeError, "must be a dict with 'params'"),
    ],
)
def test_bad_pairs_are_named(pairs, error, message):
    with pytest.raises(error, match=message):
        MirrorAdam(pairs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number >= 0, got -1.0"),
        ({"lr": math.nan}, "lr must be"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number >= 0"),
        ({"eps": 0.0}, "eps must be a finite number > 0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MirrorAdam([(one(2), one(2))], **options)
    optimizer = MirrorAdam([(one(2), one(2))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [(one(3), one(3))], **options})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m, w: setattr(w, "grad", None), "both factors of a pair must have a gradient"),
        (lambda m, w: setattr(w, "grad", w.detach().to_sparse()), "gradients must be dense"),
        (None, "lr \\* weight_decay must be < 1, got 2.5 for group 1"),
    ],
)
def test_a_step_that_is_refused_changes_nothing(spoil, message):
    pairs, groups = network()
    optimizer = MirrorAdam(groups)
    loss(pairs).backward()
    if spoil is None:
        optimizer.param_groups[1].update(lr=0.5, weight_decay=5.0)
    else:
        spoil(*pairs[1])
    before = flat(pairs)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(flat(pairs), before) and not optimizer.state


def test_mu_is_kept_from_the_first_step_or_not_at_all():
    pairs, groups = network()
    optimizer = MirrorAdam(groups)
    advance(optimizer, pairs, 1)
    assert optimizer.account()[0].mu is None
    optimizer.param_groups[0]["keep_mu"] = True
    with pytest.raises(ValueError, match="keep_mu must be set before the first step"):
        advance(optimizer, pairs, 1)
