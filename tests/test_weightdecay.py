"""WeightDecayScheduler against loops over param_groups written by hand."""

import math
from functools import partial

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from mirrorflow.schedule import Constant, Linear, SwitchOff
from mirrorflow.weightdecay import (
    WeightDecayLR,
    WeightDecayScheduler,
    coupling,
)
from optimizers import (
    FALL,
    FRACTION,
    MAKE,
    OFF,
    STEPS,
    assert_near,
    by_hand,
    optimizers,
    pull,
    quiet,
    two_groups,
    weights,
)

# The decay that is written


@quiet
@optimizers
@pytest.mark.parametrize("schedule", [FALL, OFF, Linear(0.0, 0.6, duration=5)])
@pytest.mark.parametrize("stepped", [0, 1, 3])
def test_as_the_loop_over_groups(make, schedule, stepped):
    params = weights()
    optimizer = two_groups(make, params)
    scheduler = WeightDecayScheduler(optimizer, schedule)
    for t in range(STEPS):
        assert scheduler.steps == t
        pull(params)
        optimizer.step()
        for _ in range(stepped):
            scheduler.step()
    assert_near(params, by_hand(make, schedule.rate), make)
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    assert type(optimizer.param_groups[0]["weight_decay"]) is float


@quiet
def test_sgd_with_momentum_as_written_out():
    params = weights(1)
    scheduler = WeightDecayScheduler(
        SGD(params, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=1.0), OFF
    )
    w, b = params[0].detach().double(), None
    for t in range(STEPS):
        pull(params)
        scheduler.optimizer.step()
        g = (w - 1) * 0.5 + (0.5 if t < 4 else 0.0) * w
        b = g if b is None else 0.9 * b + 0.7 * g
        w = w - 0.1 * b
    torch.testing.assert_close(params[0].detach().double(), w, rtol=1e-6, atol=1e-6)


def test_relative_multiplies_each_groups_own_decay():
    a, b, c = weights(3)
    optimizer = AdamW(
        [
            {"params": [a], "weight_decay": 0.2},
            {"params": [b], "weight_decay": 0.6},
            {"params": [c], "weight_decay": 0.0},
        ]
    )
    scheduler = WeightDecayScheduler(optimizer, lambda step: 0.5**step, relative=True)
    assert scheduler.get_last_weight_decay() == [0.2, 0.6, 0.0]
    pull([a, b, c])
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_weight_decay() == [0.1, 0.3, 0.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.3, 0.0]


@pytest.mark.parametrize("decay_first", [True, False])
@pytest.mark.parametrize("convention", FRACTION)
def test_with_a_learning_rate_scheduler_in_either_order(decay_first, convention):
    params = weights()
    optimizer = two_groups(MAKE["adamw"], params)
    made = (
        (lambda: WeightDecayScheduler(optimizer, FALL, convention=convention)),
        (lambda: CosineAnnealingLR(optimizer, T_max=STEPS)),
    )
    schedulers = [make() for make in (made if decay_first else made[::-1])]
    for _ in range(STEPS):
        pull(params)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()

    def lr_at(t):
        return 0.05 * (1 + math.cos(math.pi * t / STEPS))

    def factor(t):
        return FRACTION[convention](FALL.rate(t), lr_at(t), 0.1) / lr_at(t)

    for ours, theirs in zip(params, by_hand(MAKE["adamw"], factor, lr_at=lr_at), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_learning_rate_of_0_causes_no_division_by_0():
    params = weights()
    optimizer = AdamW(params, lr=0.0, weight_decay=0.1)
    scheduler = WeightDecayScheduler(optimizer, Constant(0.1), convention="fixed")
    pull(params)
    optimizer.step()
    assert scheduler.accumulated == [0.0]


def test_a_tensor_is_filled_in_place():
    params = weights()
    decay = torch.tensor(0.25)
    optimizer = SGD(params, lr=torch.tensor(0.5), weight_decay=decay, foreach=False)
    live = optimizer.param_groups[0]["weight_decay"]
    scheduler = WeightDecayScheduler(optimizer, SwitchOff(0.5, at=1))
    assert optimizer.param_groups[0]["weight_decay"] is live and live == 0.5
    pull(params)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["weight_decay"] is live and live == 0.0
    assert scheduler.accumulated == [-0.25]


def test_capturable_groups_are_scheduled():
    # torch has no capturable step on the CPU, so only what is written and what is probed.
    optimizer = AdamW(weights(), lr=torch.tensor(0.1), weight_decay=0.1, capturable=True)
    scheduler = WeightDecayScheduler(optimizer, FALL)
    assert scheduler.get_last_weight_decay() == [0.5]
    assert scheduler.audit() == [] and coupling(optimizer, optimizer.param_groups[0]) == "decoupled"


def test_a_captured_step_is_refused(monkeypatch):
    params = weights()
    optimizer = AdamW(params, weight_decay=0.1)
    WeightDecayScheduler(optimizer, FALL)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = params[0].detach().clone()
    pull(params)
    with pytest.raises(RuntimeError, match="CUDA graph"):
        optimizer.step()
    assert torch.equal(before, params[0])


# Which steps count


def test_accumulated_gradients_are_one_step():
    params = weights()
    optimizer = AdamW(params, weight_decay=0.1)
    scheduler = WeightDecayScheduler(optimizer, FALL)
    for micro in range(12):
        pull(params)
        if micro % 4 == 3:
            optimizer.step()
        scheduler.step()
    assert scheduler.steps == 3 and scheduler.get_last_weight_decay() == [FALL.rate(3)]


@quiet
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(
    "make", [MAKE["adamw"], MAKE["adamw fused"], MAKE["sgd fused"], MAKE["adam fused"]]
)
def test_steps_that_a_grad_scaler_skips_do_not_count(make, decoupled):
    params = weights(1)
    optimizer = make(params, weight_decay=0.3)
    scheduler = WeightDecayScheduler(optimizer, FALL, decoupled=decoupled)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for t in range(5):
        # Not the first: torch's fused SGD leaves its momentum unset there, and uses it later.
        target = math.inf if t in (1, 3) else 1.0
        optimizer.zero_grad()
        scaler.scale((params[0] * target).sum()).backward()
        before = params[0].detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, params[0]) == (t in (1, 3))
    assert scheduler.steps == 3
    scheduler.step()
    assert scheduler.get_last_weight_decay() == [FALL.rate(3)]
    if decoupled or make is not MAKE["adam fused"]:
        assert sum(row["stop"] - row["start"] for row in scheduler.audit()) == 3


def test_closures_count_once():
    params = weights()
    optimizer = AdamW(params, lr=0.1, weight_decay=0.1)
    scheduler = WeightDecayScheduler(optimizer, FALL)
    for _ in range(3):
        optimizer.step(lambda: pull(params))
    assert scheduler.steps == 3
    assert scheduler.accumulated == [pytest.approx(-0.1 * sum(map(FALL.rate, range(3))))]


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_calls_the_step_of_its_superclass_counts_once(decoupled, with_closure):
    class Child(AdamW):
        def step(self, closure=None):
            return super().step(closure)

    params = weights()
    optimizer = two_groups(partial(Child, lr=0.1), params)
    scheduler = WeightDecayScheduler(optimizer, FALL, decoupled=decoupled)
    for _ in range(STEPS):
        pull(params)
        optimizer.step((lambda: pull(params)) if with_closure else None)
    assert scheduler.steps == STEPS
    assert_near(params, by_hand(MAKE["adamw"], FALL.rate))


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_step_that_failed_is_tried_again(decoupled):
    params = weights()
    optimizer = two_groups(MAKE["adamw"], params)
    scheduler = WeightDecayScheduler(optimizer, FALL, decoupled=decoupled)

    def closure(good):
        if not good:
            raise KeyboardInterrupt
        pull(params)

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(lambda: closure(False))
        optimizer.step(lambda: closure(True))
    assert scheduler.steps == 3
    assert_near(params, by_hand(MAKE["adamw"], FALL.rate, steps=3))


def test_nan_weights_do_not_stop_the_schedule():
    params = weights()
    optimizer = AdamW(params, lr=0.1, weight_decay=0.1)
    scheduler = WeightDecayScheduler(optimizer, OFF)
    with torch.no_grad():
        params[0].fill_(math.nan)
    for _ in range(5):
        pull(params)
        optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    assert scheduler.accumulated == [pytest.approx(-0.1 * 4 * 0.5)]
    assert torch.isfinite(params[1]).all()


# What is refused


def test_scheduling_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"TrainingArguments\(weight_decay=0.1\)"):
        WeightDecayScheduler(SGD(weights(), lr=0.1), OFF)
    peft = AdamW([{"params": weights(), "weight_decay": 0.0}, {"params": [], "weight_decay": 0.1}])
    with pytest.raises(ValueError, match="nothing to schedule"):
        WeightDecayScheduler(peft, OFF)
    asked = WeightDecayScheduler(SGD(weights(), lr=0.1), None, groups=[(0, OFF)])
    assert asked.get_last_weight_decay() == [0.5]
    with pytest.raises(ValueError, match="multiplies the decay of group 0, which is 0"):
        WeightDecayScheduler(SGD(weights(), lr=0.1), None, relative=True, groups=[(0, OFF)])


def test_an_optimizer_without_weight_decay():
    params = weights()
    optimizer = torch.optim.LBFGS(params, lr=0.5, max_iter=3)
    with pytest.raises(ValueError, match=r"group of LBFGS must have weight_decay.*decoupled=True"):
        WeightDecayScheduler(optimizer, OFF)
    scheduler = WeightDecayScheduler(optimizer, SwitchOff(0.5, at=1), decoupled=True)
    before = [p.detach().clone() for p in params]

    def closure():
        for p in params:
            p.grad = torch.zeros_like(p)
        return torch.zeros(())

    optimizer.step(closure)
    optimizer.step(closure)
    assert_near(params, [p * 0.75 for p in before])
    assert scheduler.accumulated == [-0.25] and "weight_decay" not in optimizer.param_groups[0]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda step: math.nan, "gives nan at step 0"),
        (lambda step: -0.1, "gives -0.1 at step 0"),
        ([0.1, 0.2].__getitem__, "no value at step 2"),
    ],
)
def test_a_schedule_without_a_value(schedule, message):
    params = weights()
    optimizer = AdamW(params, weight_decay=0.1)

    def run():
        WeightDecayScheduler(optimizer, schedule)
        for _ in range(3):
            pull(params)
            optimizer.step()

    with pytest.raises((ValueError, RuntimeError), match=message):
        run()


def test_mistakes_are_named():
    optimizer = AdamW(weights(), weight_decay=0.1)
    with pytest.raises(TypeError, match=r"use Constant\(0.1\)"):
        WeightDecayScheduler(optimizer, 0.1)
    with pytest.raises(TypeError, match="got Linear"):
        WeightDecayScheduler(torch.nn.Linear(1, 1), FALL)
    with pytest.raises(ValueError, match="follow-lr, fixed, adamc"):
        WeightDecayScheduler(optimizer, FALL, convention="linear")
    with pytest.raises(TypeError, match="pairs"):
        WeightDecayScheduler(optimizer, FALL, groups=[FALL])
    WeightDecayScheduler(optimizer, FALL)
    with pytest.raises(ValueError, match="close"):
        WeightDecayScheduler(optimizer, FALL)


def test_close_takes_the_hooks_away():
    params = weights()
    optimizer = AdamW(params, weight_decay=0.1)
    with WeightDecayScheduler(optimizer, FALL):
        pull(params)
        optimizer.step()
    pull(params)
    optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == FALL.rate(0)
    assert WeightDecayScheduler(optimizer, FALL).steps == 0


# Frameworks


def test_the_shape_of_a_learning_rate_scheduler():
    params = weights()
    optimizer = two_groups(MAKE["adamw"], params)
    adapter = WeightDecayLR(WeightDecayScheduler(optimizer, FALL))
    assert isinstance(adapter, LRScheduler) and "initial_lr" not in optimizer.param_groups[0]
    for t in range(3):
        pull(params)
        optimizer.step()
        adapter.step()
        adapter.step()
        assert (adapter.last_epoch, adapter.get_last_lr()) == (t + 1, [0.1, 0.1])
    assert_near(params, by_hand(MAKE["adamw"], FALL.rate, steps=3))
    fresh = WeightDecayLR(WeightDecayScheduler(two_groups(MAKE["adamw"], weights()), FALL))
    fresh.load_state_dict(adapter.state_dict())
    assert fresh.last_epoch == 3 and fresh.scheduler.accumulated == adapter.scheduler.accumulated


def test_a_wrapped_optimizer_is_unwrapped():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    optimizer = AdamW(weights(), weight_decay=0.1)
    scheduler = WeightDecayScheduler(Wrapper(optimizer), FALL)
    assert scheduler.optimizer is optimizer


@pytest.mark.parametrize("state", [None, [], {}, {"state": {}}])
def test_a_value_that_is_not_a_state_is_refused(state):
    scheduler = WeightDecayScheduler(AdamW(weights(), lr=0.1, weight_decay=0.1), FALL)
    with pytest.raises(ValueError, match="not a state of WeightDecayScheduler"):
        scheduler.load_state_dict(state)
