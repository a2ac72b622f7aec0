"""The balance laws of discrete training hold to rounding, for any optimizer, batch and noise."""

import io
import math
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch

from mirrorflow.balance import BalanceAccount, diagonal_step, gauge_projection, product_step

SEEDS = range(8)
OPTIMIZERS = {
    "sgd": lambda p, lr, wd: torch.optim.SGD(p, lr, weight_decay=wd),
    "momentum": lambda p, lr, wd: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=wd),
    "nesterov": lambda p, lr, wd: torch.optim.SGD(
        p, lr, momentum=0.8, nesterov=True, weight_decay=wd, foreach=True
    ),
    "adam": lambda p, lr, wd: torch.optim.Adam(p, lr, weight_decay=wd, foreach=False),
    "adamw": lambda p, lr, wd: torch.optim.AdamW(p, lr, weight_decay=wd, foreach=False),
    "adamw foreach": lambda p, lr, wd: torch.optim.AdamW(p, lr, weight_decay=wd, foreach=True),
}


def drawn(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def random_shape(generator):
    n, r, m = torch.randint(1, 9, (3,), generator=generator).tolist()
    return [(), (3,), (2, 2)][torch.randint(3, (), generator=generator)], n, r, m


def literal(A, B):
    """D of each entry of a batch, by NumPy."""
    A, B = A.detach().double().numpy(), B.detach().double().numpy()
    return torch.from_numpy(np.swapaxes(A, -1, -2) @ A - B @ np.swapaxes(B, -1, -2))


def size(*factors):
    return max(1e-300, sum(f.detach().double().square().sum().item() for f in factors))


def close(a, b, scale, tol=1e-12):
    return (a - b).abs().max().item() <= tol * scale


class Run:
    """A regression through A B, not quadratic, and its steps."""

    def __init__(
        self, seed, optimizer="sgd", lr=0.02, decay=0.3, batch=None, shape=(5, 3, 4), start=1.0
    ):
        self.random = torch.Generator().manual_seed(seed)
        n, r, m = shape
        self.A = (start * drawn(self.random, n, r)).requires_grad_()
        self.B = (start * drawn(self.random, r, m)).requires_grad_()
        self.Z, self.Y = drawn(self.random, 32, n), drawn(self.random, 32, m)
        self.batch, self.lr, self.decay = batch, lr, decay
        self.optimizer = OPTIMIZERS[optimizer]([self.A, self.B], lr, decay)

    @property
    def pair(self):
        return self.A, self.B

    def step(self):
        """Take a step; give the factors before and after."""
        before = [f.detach().clone() for f in self.pair]
        rows = slice(None)
        if self.batch:
            rows = torch.randint(32, (self.batch,), generator=self.random)
        self.optimizer.zero_grad()
        error = self.Z[rows] @ self.A @ self.B - self.Y[rows]
        (error.square() + 0.1 * error**4 / (1 + error**2)).mean().backward()
        self.optimizer.step()
        return (*before, *(f.detach().clone() for f in self.pair))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rates", [(0.1, 0.3), (0.0, 0.3), (0.1, (0.3, 0.0)), ((0.1, 0.4), 2.0)])
def test_the_parts_are_the_terms_of_the_identity(seed, rates):
    random = torch.Generator().manual_seed(seed)
    batch, n, r, m = random_shape(random)
    A, B, dA, dB = (drawn(random, *batch, *s) for s in ((n, r), (r, m)) * 2)
    lr, decay = rates
    (lr_a, lr_b), (wd_a, wd_b) = (v if isinstance(v, tuple) else (v, v) for v in rates)
    s_a, s_b = 1 - lr_a * wd_a, 1 - lr_b * wd_b
    A_next, B_next = s_a * A - lr_a * dA, s_b * B - lr_b * dB
    found = product_step(A, B, A_next, B_next, lr, decay)
    bracket = s_a * lr_a * (A.mT @ dA + dA.mT @ A) - s_b * lr_b * (dB @ B.mT + B @ dB.mT)
    scale = size(A, B, A_next, B_next)
    decayed = (s_a**2 - 1) * A.mT @ A - (s_b**2 - 1) * B @ B.mT
    assert close(found.decay, decayed, scale)
    assert close(found.optimizer, -bracket, scale)
    assert close(found.second_order, lr_a**2 * dA.mT @ dA - lr_b**2 * dB @ dB.mT, scale)
    assert close(found.D, literal(A, B), scale)
    assert close(found.D_next, literal(A_next, B_next), scale)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("batch", [None, 4])
def test_the_parts_add_up_for_every_optimizer_and_batch(optimizer, batch):
    for seed in range(4):
        run = Run(seed, optimizer, batch=batch, shape=(7, 1 + seed, 5))
        for _ in range(3):
            A, B, A_next, B_next = run.step()
            found = product_step(A, B, A_next, B_next, run.lr, run.decay)
            assert close(found.D_next, literal(A_next, B_next), size(A, B, A_next, B_next))


@pytest.mark.parametrize("batch", [None, 4])
def test_gradient_descent_has_no_optimizer_part_and_others_have_one(batch):
    for seed in range(3):
        for optimizer in OPTIMIZERS:
            run = Run(seed, optimizer, batch=batch)
            account = BalanceAccount([run.pair])
            for _ in range(6):
                run.step()
                account.step([run.pair], 1 - run.lr * run.decay)
            (split,) = account.report()
            if optimizer == "sgd":
                assert close(split.optimizer, 0, size(*run.pair), 1e-13)
                assert split.second_order.abs().max() > 1e-6 * size(*run.pair)
            else:
                assert split.optimizer.abs().max() > 1e-4 * size(*run.pair)


def test_factors_with_different_rates_give_gradient_descent_an_optimizer_part():
    run = Run(0)
    run.optimizer = torch.optim.SGD(
        [{"params": [run.A]}, {"params": [run.B], "lr": 0.1, "weight_decay": 0.0}], run.lr,
        weight_decay=run.decay,
    )  # fmt: skip
    A, B, A_next, B_next = run.step()
    found = product_step(A, B, A_next, B_next, (run.lr, 0.1), (run.decay, 0.0))
    assert close(found.D_next, literal(A_next, B_next), size(A, B))
    assert found.optimizer.abs().max() > 1e-3 * size(A, B)


def test_decay_alone_is_all_there_is_without_gradients():
    for seed in SEEDS:
        random = torch.Generator().manual_seed(seed)
        batch, n, r, m = random_shape(random)
        A, B = (drawn(random, *batch, *s).requires_grad_() for s in ((n, r), (r, m)))
        optimizer = torch.optim.AdamW([A, B], lr=0.1, weight_decay=0.5)
        account, kept, D_0 = BalanceAccount([(A, B)]), 1.0, literal(A, B)
        for k in range(12):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + k)
            A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
            optimizer.step()
            account.step([(A, B)], 1 - 0.05 / (1 + k))
            kept *= (1 - 0.05 / (1 + k)) ** 2
        (split,) = account.report()
        scale = size(A, B)
        assert close(split.D, kept * D_0, scale) and close(split.left_by_decay, kept * D_0, scale)
        assert close(split.optimizer, 0, scale) and close(split.second_order, 0, scale)
        assert close(split.fraction_left, split.decay_alone, 1) and split.note == ""


def discounted(run, steps, shrinks):
    """The account by a literal loop: parts of each step, shrunk by the decay of those after it."""
    parts = torch.zeros(2, run.A.shape[1], run.A.shape[1], dtype=torch.float64)
    states = [tuple(f.detach().clone() for f in run.pair)]
    for k in range(steps):
        A, B, A_next, B_next = run.step()
        found = product_step(A, B, A_next, B_next, 1.0, 1 - shrinks[k])
        parts = shrinks[k] ** 2 * parts + torch.stack([found.optimizer, found.second_order])
        states.append((A_next, B_next))
    return parts, states


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_account_is_the_sum_of_its_steps_however_often_it_is_fed(optimizer):
    for seed in range(2):
        run = Run(seed, optimizer, batch=3)
        shrinks = [1 - run.lr * run.decay] * 30
        parts, states = discounted(run, 30, shrinks)
        random = np.random.default_rng(seed)
        every, seldom = BalanceAccount(states[:1]), BalanceAccount(states[:1], each_step=False)
        edges = [0, *sorted(random.choice(range(1, 30), 4, replace=False).tolist()), 30]
        for k in range(30):
            every.step([states[k + 1]], shrinks[k])
        for start, stop in pairwise(edges):
            seldom.interval([states[stop]], math.prod(shrinks[start:stop]))
        (full,), (ends,) = every.report(), seldom.report()
        scale = size(*states[0], *states[-1])
        assert close(full.optimizer, parts[0], scale) and close(full.second_order, parts[1], scale)
        for split in (full, ends):
            assert close(split.left_by_decay, shrinks[0] ** 60 * literal(*states[0]), scale)
            assert close(split.D, literal(*states[-1]), scale)
            assert close(sum(split.shares.values()), 1, 1)
        assert close(ends.unsplit, parts.sum(0), scale)
        assert full.note == "" and "5 interval" in ends.note
        assert (full.n_steps, full.n_intervals, ends.n_steps, ends.n_intervals) == (30, 0, 0, 5)


def test_steps_and_intervals_mix():
    run = Run(3, "adamw", batch=4)
    s = 1 - run.lr * run.decay
    parts, states = discounted(run, 20, [s] * 20)
    account = BalanceAccount(states[:1])
    for k in (*range(1, 8), 15, *range(16, 21)):
        (account.step if k != 15 else account.interval)([states[k]], s if k != 15 else s**8)
    (split,) = account.report()
    assert close(split.D, literal(*states[-1]), size(*states[0]))
    rest = split.optimizer + split.second_order + split.unsplit
    assert close(rest, parts.sum(0), size(*states[0]))
    assert split.optimizer.norm() > 0 and split.unsplit.norm() > 0


def test_many_pairs_of_all_kinds_are_accounted_for_together():
    random = torch.Generator().manual_seed(1)
    d, shapes = 12, [(12, 3, 12), (12, 3, 12), (9, 3, 12), (40000, 8, 5), (6, 2, 12), (6, 2, 6)]
    dtypes = [torch.float64, torch.float64, torch.float32, torch.float32, torch.bfloat16] * 2

    def state():
        pairs = [
            (drawn(random, n, r, dtype=t), drawn(random, r, m, dtype=t))
            for (n, r, m), t in zip(shapes, dtypes, strict=False)
        ]
        query, key = drawn(random, 4 * 3, d), drawn(random, 2 * 3, d)  # as attention stores them
        heads = query.view(4, 3, d).mT, key.view(2, 1, 3, d).expand(2, 2, 3, d).reshape(4, 3, d)
        return [*pairs, heads, (drawn(random, 3, d, d).mT, drawn(random, 1, d, 5))]

    states = [state() for _ in range(4)]
    shrinks = [[(1 - 0.01 * i * k, 0.9 + 0.02 * i) for i in range(8)] for k in range(1, 4)]
    account = BalanceAccount(states[0])
    for now, shrink in zip(states[1:], shrinks, strict=True):
        account.step(now, shrink)
    for i, split in enumerate(account.report()):
        alone = BalanceAccount(states[0][i : i + 1])
        for now, shrink in zip(states[1:], shrinks, strict=True):
            alone.step(now[i : i + 1], shrink[i : i + 1])
        (other,), scale = alone.report(), size(*states[0][i], *states[-1][i])
        assert close(split.D, literal(*states[-1][i]), scale)
        for name, part in split.parts.items():
            assert close(part, other.parts[name], scale), name


def test_weights_of_half_precision_are_accounted_for_in_double():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for seed in SEEDS:
            random = torch.Generator().manual_seed(seed)
            A, B = drawn(random, 300, 4, dtype=dtype), drawn(random, 4, 200, dtype=dtype)
            A_next, B_next = 0.999 * A + 0.01, 0.999 * B
            assert A_next.dtype == dtype
            found = product_step(A, B, A_next, B_next, 0.01, 0.1)
            assert close(found.D_next, literal(A_next, B_next), size(A, B))


def test_the_parts_of_a_tiny_step_keep_their_digits():
    random = torch.Generator().manual_seed(0)
    A, B, dA, dB = (drawn(random, *shape) for shape in ((9, 3), (3, 7)) * 2)
    A_next, B_next = A - 1e-7 * dA, B - 1e-7 * dB
    dA, dB = A - A_next, B - B_next  # what is left of it in double precision
    found = product_step(A, B, A_next, B_next, 0.0, 0.0)
    wanted = dA.mT @ dA - dB @ dB.mT
    assert close(found.second_order, wanted, wanted.abs().max().item())  # of size 1e-14 |A|^2


def test_a_step_that_bfloat16_rounds_away_is_decay_undone_by_rounding():
    A, B = torch.full((8, 2), 0.5).bfloat16(), torch.zeros(2, 8).bfloat16()
    found = product_step(A, B, A, B, 1e-3, 0.1)
    assert close(found.D_next, found.D, size(A)) and found.decay.norm() > 0
    assert close(found.optimizer + found.second_order, -found.decay, size(A))


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_a_resumed_account_equals_an_uninterrupted_one(optimizer):
    for seed in range(2):
        run = Run(seed, optimizer, batch=3)
        s = 1 - run.lr * run.decay
        _, states = discounted(run, 20, [s] * 20)
        whole, first = (BalanceAccount([states[0], states[0]]) for _ in range(2))
        for k in range(1, 21):
            whole.step([states[k], states[20 - k]], s)
            if k <= 9:
                first.step([states[k], states[20 - k]], s)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        again = BalanceAccount([states[5], states[5]])  # made before the weights were loaded
        again.load_state_dict(torch.load(file, weights_only=True), [states[9], states[11]])
        for k in range(10, 21):
            again.step([states[k], states[20 - k]], s)
        for one, other in zip(whole.report(), again.report(), strict=True):
            for name, part in one.parts.items():
                assert close(part, other.parts[name], size(*states[0])), name
            assert close(one.decay_alone, other.decay_alone, 1)
            assert (one.n_steps, one.n_intervals) == (other.n_steps, other.n_intervals) == (20, 0)


def test_an_account_saved_within_an_interval_goes_on_with_what_is_known():
    run = Run(0, "adamw", batch=3)
    s = 1 - run.lr * run.decay
    parts, states = discounted(run, 12, [s] * 12)
    first = BalanceAccount(states[:1])
    first.interval([states[4]], s**4)
    again = BalanceAccount(states[:1])
    again.load_state_dict(first.state_dict(), [states[6]])  # the weights have moved on since
    again.interval([states[8]], s**4)
    for k in range(9, 13):
        again.step([states[k]], s)
    (split,) = again.report()
    assert close(split.D, literal(*states[-1]), size(*states[0]))
    rest = split.optimizer + split.second_order + split.unsplit
    assert close(rest, parts.sum(0), size(*states[0]))


def test_a_change_outside_of_training_is_counted_apart():
    run = Run(2, "adamw", batch=4)
    s, account = 1 - run.lr * run.decay, BalanceAccount([run.pair])
    for k in range(6):
        run.step()
        account.step([run.pair], s)
        if k == 3:
            (before,) = account.report()
            made = gauge_projection(*run.pair, before.left_by_decay)
            with torch.no_grad():
                run.A.copy_(made.A)
                run.B.copy_(made.B)
            account.moved([run.pair])
            (after,) = account.report()
            assert close(after.D, before.left_by_decay, size(*run.pair))
            assert close(after.outside, after.D - before.D, size(*run.pair))
    (split,) = account.report()
    assert close(split.D, literal(*run.pair), size(*run.pair))
    assert close(split.outside, s**4 * after.outside, size(*run.pair))


def test_an_account_keeps_no_reference_to_the_factors():
    A, B = torch.randn(500, 40, dtype=torch.float64), torch.randn(40, 500, dtype=torch.float64)
    account = BalanceAccount([(A, B)])
    account.step([(A, B)], 1.0)
    kept = weakref.ref(A.untyped_storage()), weakref.ref(A)
    del A
    assert kept[1]() is None
    assert account.report()[0].n_steps == 1


@pytest.mark.parametrize("seed", range(3))
def test_the_size_of_D_does_not_say_how_much_decay_a_run_with_adam_has_absorbed(seed):
    run = Run(seed, "adamw", lr=0.05, decay=0.1, batch=4, shape=(12, 4, 10), start=0.3)
    account, s = BalanceAccount([run.pair]), 1 - 0.05 * 0.1
    for _ in range(400):
        run.step()
        account.step([run.pair], s)
    (split,) = account.report()
    assert math.isclose(split.decay_alone.item(), s**800, rel_tol=1e-9)  # e^{2a}: 0.018
    assert split.fraction_left > 0.2
    # What decay left of the start is not what is there: the rest was made on the way.
    assert close(split.D, literal(*run.pair), size(*run.pair))
    assert abs(split.shares["left_by_decay"].item()) < 0.1
    assert split.shares["optimizer"] > 0.8


def test_slow_gradient_descent_follows_the_law_of_the_flow():
    run = Run(0, lr=0.004, decay=0.4)
    account, s = BalanceAccount([run.pair]), 1 - 0.004 * 0.4
    for _ in range(500):
        run.step()
        account.step([run.pair], s)
    (split,) = account.report()
    assert math.isclose(split.fraction_left.item(), math.exp(-2 * 0.8), rel_tol=0.02)
    assert split.shares["left_by_decay"] > 0.98


def test_a_fraction_of_nothing_is_not_a_number():
    A, B = torch.eye(3)[:, :2], torch.eye(3)[:2]
    (split,) = BalanceAccount([(A, B)]).report()
    assert split.fraction_left.isnan() and split.decay_alone.isnan()
    assert all(share.isnan() for share in split.shares.values())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_account_of_a_diagonal_run_gives_x_exactly(seed, noise):
    random = torch.Generator().manual_seed(seed)
    m, w = (drawn(random, 6).requires_grad_() for _ in range(2))
    u, v = (m + w).detach(), (m - w).detach()
    A_0, rho = (u * v).abs() / 2, (u / v).abs().log()
    Z, y = drawn(random, 20, 6), drawn(random, 20)
    optimizer = torch.optim.SGD([m, w], lr=0.05, weight_decay=0.1)
    a = mu = torch.zeros(6, dtype=torch.float64)
    for k in range(60):
        rows = torch.randint(20, (2,), generator=random)
        target = y[rows] + noise * drawn(random, 2)
        x = (m * w).detach().requires_grad_()
        (Z[rows] @ x - target).square().mean().backward()
        taken = diagonal_step(m, w, x.grad, 0.05, 0.1 if k < 30 else 0.0)
        optimizer.zero_grad()
        optimizer.param_groups[0]["weight_decay"] = 0.1 if k < 30 else 0.0
        (Z[rows] @ (m * w) - target).square().mean().backward()
        optimizer.step()
        assert close(taken.m, m, size(m, w) ** 0.5) and close(taken.w, w, size(m, w) ** 0.5)
        a, mu = a + taken.a, mu + taken.mu
        end = A_0 * (2 * a).exp() * torch.sinh(2 * mu + rho)
        assert close(end, m * w, max(1, size(m, w)), 1e-11)


@pytest.mark.parametrize("seed", SEEDS)
def test_decay_step_and_noise_of_a_diagonal_step_add_up(seed):
    random = torch.Generator().manual_seed(seed)
    m, w, G, full = (drawn(random, 50) for _ in range(4))
    taken = diagonal_step(m, w, G, lr=0.5, decay=0.4, full_grad=full)
    log = torch.log
    s, u, v = 0.8, m + w, m - w
    u_next, v_next = (s - 0.5 * G) * u, (s + 0.5 * G) * v
    assert close(taken.a, log((u_next * v_next / (u * v)).abs()) / 2, 10)
    assert close(taken.mu, log((u_next / u * v / v_next).abs()) / 2, 10)
    assert close(taken.decay, math.log(s), 1)
    assert close(taken.decay + taken.step, log((s**2 - 0.25 * full**2).abs()) / 2, 10)
    assert close(taken.decay + taken.step + taken.noise, taken.a, 10)
    unknown = diagonal_step(m, w, G, lr=0.5, decay=0.4)
    assert unknown.step.isnan().all() and unknown.noise.isnan().all()
    assert close(unknown.step_and_noise, taken.step + taken.noise, 10)


def test_small_steps_keep_their_digits():
    one = torch.ones(1, dtype=torch.float64)
    taken = diagonal_step(one, 0 * one, 1e-9 * one, lr=1.0)
    assert math.isclose(taken.a.item(), -0.5e-18, rel_tol=1e-12)
    assert math.isclose(taken.mu.item(), -1e-9, rel_tol=1e-12)


def test_the_mean_of_noise_acts_as_decay():
    """Label noise +-delta at batch 1: alpha_i = (lr/2) delta^2 z_i^2, to first order in lr."""
    one, z, delta, lr = torch.ones(3, dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0]), 0.3, 1e-3
    steps = [
        diagonal_step(one, 0 * one, sign * delta * z.double(), lr, full_grad=0 * one)
        for sign in (-1, 1)
    ]
    rate = -(steps[0].noise + steps[1].noise) / (2 * lr)
    assert close(rate / (lr / 2 * delta**2 * z.double() ** 2), 1, 1, 1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_gauge_projection_gives_the_wanted_D_and_the_same_product(seed):
    random = torch.Generator().manual_seed(seed)
    batch, n, r, m = [(), (3,), (2, 2)][seed % 3], 7, 1 + seed % 5, 6
    A, B = drawn(random, *batch, n, r), drawn(random, *batch, r, m)
    wanted = 3 * drawn(random, *batch, r, r)
    for target in (wanted + wanted.mT, 0 * wanted, 0.5 * (A.mT @ A - B @ B.mT)):
        made = gauge_projection(A, B, target)
        scale = size(A, B, made.A, made.B)
        assert close(literal(made.A, made.B), target, scale)
        assert close(made.A @ made.B, A @ B, scale, 1e-11)
        assert close(made.A, A @ made.transform, scale)


def test_balanced_factors_have_the_roots_of_the_products_singular_values():
    for seed in SEEDS:
        random = torch.Generator().manual_seed(seed)
        A, B = drawn(random, 8, 3) * 10.0 ** (seed - 4), drawn(random, 3, 5)
        made = gauge_projection(A, B, torch.zeros(3, 3))
        roots = torch.linalg.svdvals(A @ B)[:3].sqrt()
        for factor in (made.A, made.B):
            assert torch.allclose(torch.linalg.svdvals(factor), roots, rtol=1e-9)


def test_the_start_of_lora_can_be_scaled_down():
    A, B = torch.zeros(6, 3), torch.randn(3, 6)
    made = gauge_projection(A, B, 0.25 * literal(A, B))
    assert made.A.dtype == torch.float32 and (made.A == 0).all()
    assert torch.allclose(literal(made.A, made.B), 0.25 * literal(A, B), atol=1e-6)
