"""The paper, formula by formula: what holds as printed, or as docs/errata.md corrects it."""

import runpy

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from scipy.special import softmax

import mirrorflow as mf
from paper import (
    EXACT,
    PAGE,
    PAIRS,
    STARTS,
    Y,
    Z,
    commuting_sensing,
    end_point,
    gap,
    least_squares,
    legendre,
    matrix_flow,
    mirror,
    tensors,
    train,
)


@pytest.mark.parametrize("name", list(PAIRS))
def test_theorem_3_2_the_mirror_of_x_is_mu_for_every_loss_and_schedule(name):
    R, pair, w0 = legendre(name), PAIRS[name][0], STARTS[name]
    losses = (
        least_squares,
        lambda x: np.tanh(x) - 0.1,
        lambda x: softmax(x) - 0.3,
    )
    for slope in losses:
        for pieces in ([(1.0, 0.1)], [(0.5, 0.3), (0.3, 0.0), (0.4, 0.1)], [(0.4, -0.2)]):
            end = train(pair, w0, pieces, slope)
            np.testing.assert_allclose(mirror(R, end.x, end.a), end.mu, atol=EXACT)


@pytest.mark.parametrize("name", list(PAIRS))
def test_equation_7_with_the_gradient_of_y_at_fixed_a(name):
    R, pair = legendre(name), PAIRS[name][0]
    end, alpha = train(pair, STARTS[name], [(1.0, 0.1)]), 0.37
    slope = least_squares(end.x)
    # dx/dt = J dw/dt; J is diagonal in each factor.
    J = pair.pull(end.w, np.ones(4))
    velocity = -(J * (pair.pull(end.w, slope) + alpha * pair.decay(end.w))).sum(0)
    x = torch.from_numpy(end.x).requires_grad_()
    a = torch.tensor(end.a, dtype=torch.float64, requires_grad=True)
    (minus_y,) = torch.autograd.grad(R.value(x, a), a, create_graph=True)
    (minus_grad_y,) = torch.autograd.grad(minus_y, x)
    w = tuple(torch.from_numpy(f) for f in end.w)
    assert -minus_y.item() == pytest.approx(PAIRS[name][2].value(w, PAIRS[name][1]).item())
    inverse = 1 / R.metric(x, a).detach().numpy()
    np.testing.assert_allclose(
        -inverse * (slope - alpha * minus_grad_y.numpy()), velocity, atol=1e-9
    )


@pytest.mark.parametrize("name", ["hadamard", "power", "log"])
def test_theorem_3_6_the_end_minimizes_R_a_where_the_switch_left_it(name):
    R, pair = legendre(name), PAIRS[name][0]
    end = train(pair, STARTS[name], [(1.0, 0.1), (200.0, 0.0)])
    assert abs(Z @ end.x - Y).max() < 1e-9
    predicted = end_point(lambda mu: R.primal(torch.from_numpy(mu), end.a).numpy())
    assert gap(predicted, end.x) < 1e-9
    base = R.value(torch.from_numpy(end.x), end.a)
    for direction in np.linalg.svd(Z)[2][2:]:  # Z direction = 0
        for step in (-0.1, 0.1):
            assert R.value(torch.from_numpy(end.x + step * direction), end.a) > base


def test_theorem_3_10_the_gradient_of_the_potential_is_g():
    rng = np.random.default_rng(0)
    V = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    A = np.einsum("ij,kj,lj->kil", V, rng.normal(size=(3, 5)), V)
    B, w0 = V @ np.diag([1, 0.5, 0, 2, 1]) @ V.T, rng.normal(size=5)

    def w(mu, a):
        return expm(a * B + np.tensordot(mu, A, 1)) @ w0

    def potential(mu, a):
        return 0.25 * (w(mu, a) ** 2).sum()

    mu, a, d = np.array([0.3, -0.2, 0.1]), -0.4, 1e-5
    here = w(mu, a)
    slopes = [(potential(mu + d * e, a) - potential(mu - d * e, a)) / (2 * d) for e in np.eye(3)]
    np.testing.assert_allclose(slopes, [0.5 * here @ Ai @ here for Ai in A], rtol=1e-7)
    along_a = (potential(mu, a + d) - potential(mu, a - d)) / (2 * d)
    assert along_a == pytest.approx(0.5 * here @ B @ here, rel=1e-7)  # h = 1/2 w^T B w >= 0


@pytest.mark.parametrize("name", ["hadamard", "one-sided", "power"])
def test_theorem_3_5_contracting_and_the_bound_of_its_proof(name):
    R, pair, w0 = legendre(name), PAIRS[name][0], STARTS[name]
    truth = np.array([0.5, 0.1, 0.3, 0.2])
    a_end, last, target = -0.3, np.inf, torch.from_numpy(truth)
    for t in np.linspace(0.1, 3.0, 8):
        end = train(pair, w0, [(t, 0.1)], lambda x: Z.T @ (Z @ (x - truth)) / 2)
        a = torch.tensor(end.a, dtype=torch.float64, requires_grad=True)
        (rate,) = torch.autograd.grad(R.value(target, a), a)
        assert rate.item() <= 0
        x, mu = torch.from_numpy(end.x), torch.from_numpy(end.mu)
        bound = (R.value(target, a_end) - R.value(x, end.a) - mu @ (target - x)).item()
        assert R.bregman(target, x, end.a).item() - 1e-12 <= bound < last
        last = bound


def test_section_4_decay_moves_the_centre_of_m_w_to_zero_and_the_type_to_L1():
    w0 = STARTS["hadamard"]
    R = legendre("hadamard")
    for a in (-0.5, -2.0):
        np.testing.assert_allclose(R.centre(a), np.exp(2 * a) * w0[0] * w0[1], rtol=1e-12)
    ones = mf.legendre(mf.Hadamard(), mf.WeightDecay(), tensors(np.array([[0.0], [1.0]])))

    def growth(a):  # R(2x)/R(x): 4 for L2, 2 for L1
        x = torch.tensor([1.0], dtype=torch.float64)
        base = ones.value(0 * x, a)
        return ((ones.value(2 * x, a) - base) / (ones.value(x, a) - base)).item()

    assert growth(+4.0) == pytest.approx(4, rel=1e-3)
    assert growth(0.0) > growth(-10.0) > growth(-100.0) > growth(-300.0) > 2
    assert growth(-300.0) == pytest.approx(2, rel=3e-3)


@pytest.mark.parametrize("k", [3, 4, 5])
def test_theorem_D2_the_bracket_is_4_minus_2k_times_the_other_factors(k):
    w = torch.linspace(0.5, 1.5, k, dtype=torch.float64)
    hessian = torch.func.hessian(lambda w: w.prod())(w)
    others = w.prod() / w
    bracket = 2 * others - hessian @ (2 * w)  # Hess h grad g - Hess g grad h, h = sum w_i^2
    torch.testing.assert_close(bracket, (4 - 2 * k) * others)
    # It is a multiple of grad g: they commute up to a change of clock (docs: beyond.md).
    assert mf.check(mf.Depth(k), mf.WeightDecay(), tuple(w[:, None])).degree == k


def test_appendix_D_both_models_start_alike_and_the_truth_has_ratio_root_5():
    m, w = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for g, start in ((mf.Hadamard(), (m, w)), (mf.Depth(3), (m, w, w))):
        speed = sum(f**2 for f in g.pullback(start, w))
        assert (g(start) == 0).all() and (speed == 1).all()
    truth = np.r_[np.ones(5), np.zeros(95)]
    assert abs(truth).sum() / np.linalg.norm(truth) == pytest.approx(2.23, abs=0.01)


def test_corollary_C3_the_spectrum_minimizes_the_entropy():
    beta, n = 0.1, 4
    A, y = commuting_sensing()
    X, _, a = matrix_flow(A, y, np.sqrt(beta) * np.eye(n), [(3.0, 0.1), (1e4, 0.0)], 1)
    assert abs(np.tensordot(A, X, 2) - y).max() < 1e-8
    R = mf.legendre(mf.SymmetricFactor(), mf.WeightDecay(), np.sqrt(beta) * torch.eye(n).double())
    # KKT: the mirror of X lies in the span of the A_i.
    flat, mu = A.reshape(len(A), -1), mirror(R, X, a).ravel()
    residual = mu - flat.T @ np.linalg.lstsq(flat.T, mu, rcond=1e-10)[0]
    assert np.linalg.norm(residual) < 1e-6 * np.linalg.norm(mu)


@pytest.mark.slow
def test_the_example_of_check_your_own_agrees_with_its_closed_form(capsys):
    example = runpy.run_path(str(PAGE.parent / "examples" / "own_pair.py"))
    (lower, upper), trained = example["main"]()
    assert trained.status is mf.Status.completed
    assert "does not apply" in capsys.readouterr().out
    # e^{-u} = e^{-u0} - mu - a and e^{-v} = e^{-v0} + mu - a.
    u0, v0 = example["w0"]
    mu, a = trained.path.mu[-1], float(trained.path.a[-1])
    x = 1 / (torch.exp(-u0) - mu - a) - 1 / (torch.exp(-v0) + mu - a)
    torch.testing.assert_close(trained.value, x, rtol=1e-7, atol=1e-9)
    assert a == -2.0
    torch.testing.assert_close(lower, a - torch.exp(-v0), rtol=1e-7, atol=0)
    torch.testing.assert_close(upper, torch.exp(-u0) - a, rtol=1e-7, atol=0)
