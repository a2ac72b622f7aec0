"""Decay that answers to measurements: control, limits, authority, and resuming."""

import copy
import itertools
import json
import math

import pytest
import torch

import mirrorflow as mf


def plant(ratio, rate):
    """A ratio that falls towards 2 under decay and rises without it."""
    return ratio + 0.1 * (6 / (1 + 20 * rate) - ratio)


def drive(loop, updates, ratio=6.0):
    """Run the plant in closed loop; give the ratios."""
    seen = []
    for step in range(updates):
        loop.update(step, ratio)
        ratio = plant(ratio, loop(step))
        seen.append(ratio)
    return seen


@pytest.mark.parametrize("target", [3.0, 4.5])
def test_the_ratio_is_held_at_the_target(target):
    seen = drive(mf.HoldRatio(target, 0.0, gain=0.2, deadband=0.0), 300)
    assert all(abs(value / target - 1) < 0.01 for value in seen[-50:])


def test_bounds_and_slew_are_kept():
    loop = mf.HoldRatio(3.0, 0.1, gain=5.0, bounds=(0.05, 0.3), slew=0.02)
    drive(loop, 100)
    rates = [0.1, *(row["rate"] for row in loop.log)]
    assert all(0.05 <= rate <= 0.3 for rate in rates)
    assert all(abs(b - a) <= 0.02 + 1e-12 for a, b in itertools.pairwise(rates))
    assert {"slew limit"} <= {row["reason"] for row in loop.log}


def test_the_sum_does_not_wind_up_at_a_bound():
    """After a long time at the bound the rate leaves it as soon as the error turns."""
    loop = mf.HoldRatio(3.0, 0.1, gain=0.1, integral=1.0, bounds=(0.0, 0.2), patience=1000)
    for step in range(200):
        loop.update(step, 6.0)
    assert loop.current == 0.2
    for step in range(200, 206):
        loop.update(step, 2.0)
    assert loop.current < 0.1


def test_within_the_deadband_nothing_moves():
    loop = mf.HoldRatio(3.0, 0.1, gain=1.0, deadband=0.05)
    assert loop.update(0, 3.1) == 0.1
    assert loop.log[-1]["reason"] == "within the deadband"


def test_no_authority_is_said():
    loop = mf.HoldRatio(3.0, 0.1, gain=10.0, bounds=(0.0, 0.2), patience=5)
    with pytest.warns(RuntimeWarning, match="no authority"):
        for step in range(8):
            loop.update(step, 4.0)


def test_a_saturated_decay_that_works_is_not_accused():
    loop = mf.HoldRatio(3.0, 0.1, gain=10.0, bounds=(0.0, 0.2), patience=5)
    for step in range(8):
        loop.update(step, 6.0 * 0.95**step)


def test_what_is_not_there_yet_changes_nothing():
    loop = mf.HoldRatio(3.0, 0.1, gain=1.0)
    assert loop.update(0, math.nan) == 0.1
    assert loop.log[-1]["reason"] == "nothing to measure"


def test_level_is_judged_on_the_window_and_is_for_good():
    loop = mf.OffWhenLevel(0.1, window=3, tol=0.01, earliest=6)
    values = [3.0, 3.0, 3.0, 3.0, math.nan, 3.0, 3.0, 9.0]
    assert [loop.update(k, v) for k, v in enumerate(values)] == [0.1] * 6 + [0.0, 0.0]


def test_the_budget_is_that_of_the_ledger():
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1, weight_decay=0.5)
    loop = mf.OffAtBudget(0.5, budget=0.2)
    scheduler = mf.WeightDecayScheduler(optimizer, loop)
    for step in range(10):
        w.grad = torch.zeros_like(w)
        optimizer.step()
        loop.update(step, -min(scheduler.accumulated))
        scheduler.step()
    assert scheduler.accumulated == [pytest.approx(-0.2)]
    assert w[0].item() == pytest.approx(0.95**4)


@pytest.mark.parametrize("loop", [
    mf.HoldRatio(3.0, 0.1, gain=0.5, bounds=(0.0, 0.4), slew=0.05),
    mf.OffWhenLevel(0.1, window=4, tol=0.3),
    mf.OffAtBudget(0.1, budget=3.5),
])  # fmt: skip
def test_a_stopped_loop_continues_as_if_it_had_not_stopped(loop):
    fresh = copy.deepcopy(loop)
    values = [6 / (1 + 0.1 * k) for k in range(30)]
    for step, value in enumerate(values[:13]):
        loop.update(step, value)
    state = json.loads(json.dumps(loop.state_dict()))
    fresh.load_state_dict(state)
    for step, value in enumerate(values[13:], 13):
        assert fresh.update(step, value) == loop.update(step, value)
    assert fresh.log == loop.log


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: mf.HoldRatio(0.0, 0.1, 1.0), "target"),
        (lambda: mf.HoldRatio(3.0, -0.1, 1.0), "rate"),
        (lambda: mf.HoldRatio(3.0, 0.1, 0.0), "gain"),
        (lambda: mf.HoldRatio(3.0, 2.0, 1.0), "within bounds"),
        (lambda: mf.HoldRatio(3.0, 0.1, 1.0, slew=0.0), "slew"),
        (lambda: mf.OffWhenLevel(0.1, window=1), "window"),
        (lambda: mf.OffAtBudget(0.1, 0.0), "budget"),
        (lambda: mf.HoldRatio(3.0, 0.1, 1.0).update(0, -1.0), "value"),
    ],
)
def test_bad_settings_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
