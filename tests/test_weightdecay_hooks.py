"""What acts in a step is read before it: hooks of others, closures, line searches."""

import pytest
import torch
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import StepLR

from mirrorflow.schedule import Constant, SwitchOff
from mirrorflow.weightdecay import WeightDecayScheduler
from optimizers import pull, weights


def one(value=1.0):
    return torch.nn.Parameter(torch.full((1,), value, dtype=torch.float64))


def still(w):
    w.grad = torch.zeros_like(w)


# Hooks of others, before ours and after


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("options", [{}, {"decoupled": True}])
def test_a_learning_rate_that_moves_in_a_post_hook(options, first):
    w = one()
    optimizer = AdamW([w], lr=1.0, weight_decay=0.5)
    cosine = StepLR(optimizer, 1, gamma=0.5)
    if first:
        optimizer.register_step_post_hook(lambda *args: cosine.step())
    scheduler = WeightDecayScheduler(optimizer, Constant(0.1), **options)
    if not first:
        optimizer.register_step_post_hook(lambda *args: cosine.step())
    for _ in range(3):
        still(w)
        optimizer.step()
    assert w.item() == pytest.approx(0.9 * 0.95 * 0.975, rel=1e-12)
    assert scheduler.accumulated == [pytest.approx(-0.175, rel=1e-12)]
    assert [row["lr"] for row in scheduler.audit()] == [1.0]
    assert scheduler.audit()[0]["lr_end"] == 0.25


def test_a_learning_rate_that_moves_in_a_pre_hook_made_before():
    w = one()
    optimizer = AdamW([w], lr=1.0, weight_decay=0.5)
    rates = iter([0.5, 0.25])
    optimizer.register_step_pre_hook(
        lambda *args: optimizer.param_groups[0].__setitem__("lr", next(rates))
    )
    scheduler = WeightDecayScheduler(optimizer, Constant(0.1))
    for _ in range(2):
        still(w)
        optimizer.step()
    assert w.item() == pytest.approx(0.95 * 0.975, rel=1e-12)
    assert scheduler.accumulated == [pytest.approx(-0.075, rel=1e-12)]


@pytest.mark.parametrize("options", [{}, {"decoupled": True}])
@pytest.mark.parametrize("with_closure", [False, True])
def test_gradients_that_a_post_hook_sets_to_none(options, with_closure):
    a, b = one(), one()
    optimizer = AdamW([{"params": [a]}, {"params": [b]}], lr=1.0, weight_decay=0.5)
    optimizer.register_step_post_hook(lambda *args: optimizer.zero_grad())
    scheduler = WeightDecayScheduler(optimizer, Constant(0.1), **options)
    for _ in range(3):
        if with_closure:
            optimizer.step(lambda: still(a))
        else:
            still(a)
            optimizer.step()
    assert a.item() == pytest.approx(0.9**3) and b.item() == 1.0
    assert scheduler.accumulated == [pytest.approx(-0.3), 0.0]
    assert [(row["group"], row["stop"]) for row in scheduler.audit()] == [("0", 3)]


# Closures


@pytest.mark.parametrize("options", [{}, {"decoupled": True}])
def test_a_closure_that_changes_the_learning_rate_and_who_has_a_gradient(options):
    a, b = one(), one()
    optimizer = AdamW([{"params": [a]}, {"params": [b]}], lr=1.0, weight_decay=0.5)
    scheduler = WeightDecayScheduler(optimizer, Constant(0.1), **options)
    still(a)  # from before, and gone when the step is taken

    def closure():
        optimizer.zero_grad()
        still(b)
        for group in optimizer.param_groups:
            group["lr"] = 0.5

    optimizer.step(closure)
    assert (a.item(), b.item()) == (1.0, pytest.approx(0.95))
    assert scheduler.accumulated == [0.0, pytest.approx(-0.05)]


def descend(w, optimizer, steps):
    """Minimize a quartic with its minimum at 1; give the weights after each step."""

    def closure():
        optimizer.zero_grad()
        loss = ((w - 1) ** 4 + (w - 1) ** 2).sum()
        loss.backward()
        return loss

    path = []
    for _ in range(steps):
        optimizer.step(closure)
        path.append(w.item())
    return path


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_a_line_search_begins_from_the_decayed_weights(search):
    w = one()
    optimizer = LBFGS([w], lr=1.0, max_iter=20, line_search_fn=search)
    scheduler = WeightDecayScheduler(optimizer, SwitchOff(0.1, at=4), decoupled=True)
    path = descend(w, optimizer, 6)

    by_hand = one()
    other = LBFGS([by_hand], lr=1.0, max_iter=20, line_search_fn=search)
    expected = []
    for t in range(6):
        with torch.no_grad():
            by_hand.mul_(0.9 if t < 4 else 1.0)
        expected += descend(by_hand, other, 1)
    assert path == pytest.approx(expected, rel=1e-6)
    assert path == pytest.approx([1.0] * 6, abs=1e-3)
    assert scheduler.accumulated == [pytest.approx(-0.4)] and scheduler.steps == 6


class TwoGradients(torch.optim.Optimizer):
    """Moves by the gradient after a first step of its own, as sharpness-aware ones do."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "weight_decay": 0.1})

    def step(self, closure):
        (group,) = self.param_groups
        for _ in range(2):
            closure()
            with torch.no_grad():
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad)


def test_an_optimizer_that_asks_its_closure_twice_is_found_by_trying():
    w = one()
    optimizer = TwoGradients([w], lr=0.125)
    with pytest.warns(UserWarning, match="its coupling is unknown"):
        WeightDecayScheduler(optimizer, Constant(0.5)).close()
    WeightDecayScheduler(optimizer, Constant(0.5), decoupled=True)
    seen = []

    def closure():
        seen.append(w.item())
        w.grad = w.detach().clone()

    optimizer.step(closure)
    shrunk = 1 - 0.125 * 0.5
    assert seen == [shrunk, shrunk * 0.875] and w.item() == shrunk * 0.875**2


def test_a_step_without_gradients_after_a_line_search_moves_no_ledger():
    """Before the closure has run there are none: what may get one is decayed, the rest is not."""
    a, b = one(), one()
    b.requires_grad_(False)
    optimizer = LBFGS([a, b], lr=1.0)
    WeightDecayScheduler(optimizer, Constant(0.1), decoupled=True)
    optimizer.step(lambda: still(a) or torch.zeros(()))
    assert (a.item(), b.item()) == (pytest.approx(0.9), 1.0)


# Schedules that end with the run


@pytest.mark.parametrize("options", [{}, {"decoupled": True}, {"relative": True}])
def test_a_schedule_with_a_value_for_each_step_is_enough(options):
    """N values for N steps: what comes after the last step asks for none, a further step does."""
    params = weights()
    optimizer = AdamW(params, lr=0.1, weight_decay=0.5)
    schedule = [0.3, 0.2, 0.1].__getitem__
    scheduler = WeightDecayScheduler(optimizer, schedule, **options)
    for _ in range(3):
        pull(params)
        optimizer.step()
        scheduler.step()
    last = 0.05 if "relative" in options else 0.1
    assert scheduler.steps == 3 and scheduler.get_last_weight_decay() == [last]
    assert optimizer.param_groups[0]["weight_decay"] == (0.0 if "decoupled" in options else last)

    saved = optimizer.state_dict(), scheduler.state_dict()
    fresh = AdamW(weights(), lr=0.1, weight_decay=0.5)
    again = WeightDecayScheduler(fresh, schedule, **options)
    fresh.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert again.audit() == scheduler.audit() and again.steps == 3
    late = AdamW(weights(), lr=0.1, weight_decay=0.5)
    late.load_state_dict(saved[0])
    assert WeightDecayScheduler(late, schedule, **options).steps == 3

    before = [p.detach().clone() for p in params]
    pull(params)
    with pytest.raises(RuntimeError, match="no value at step 3"):
        optimizer.step()
    assert all(map(torch.equal, params, before)) and scheduler.steps == 3


def test_a_schedule_without_a_first_value_is_an_error_at_once():
    optimizer = SGD(weights(), lr=0.1, weight_decay=0.5)
    with pytest.raises(RuntimeError, match="no value at step 0"):
        WeightDecayScheduler(optimizer, [].__getitem__)
