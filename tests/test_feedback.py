"""Decay that answers to measurements: control, limits, authority, and resuming."""

import copy
import gc
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    assert any(row["reason"].endswith(", slew limit") for row in loop.log)


def test_the_sum_does_not_wind_up_at_a_bound():
    """After a long time at the bound the rate leaves it as soon as the error turns."""
    loop = mf.HoldRatio(3.0, 0.1, gain=0.1, integral=1.0, bounds=(0.0, 0.2), patience=1000)
    for step in range(200):
        loop.update(step, 6.0)
    assert loop.current == 0.2
    for step in range(200, 206):
        loop.update(step, 2.0)
    assert loop.current < 0.1


def relative(value, target, deadband=0.0):
    error = math.log(value / target)
    return 0.0 if abs(error) <= deadband else error


@st.composite
def controlled(draw):
    """A loop with limits, and what it measures: steps, drifts, and values on both sides."""
    low, high = draw(st.sampled_from([(0.0, 0.2), (0.0, 10.0), (0.05, 0.5), (0.1, 0.1)]))
    loop = mf.HoldRatio(
        2.0, 0.1, gain=10 ** draw(st.floats(-2, 1)), integral=10 ** draw(st.floats(0, 2)),
        bounds=(low, high), slew=draw(st.one_of(st.just(math.inf), st.floats(1e-4, 0.5))),
        deadband=draw(st.sampled_from([0.0, 0.02, 0.2])), patience=10**6,
    )  # fmt: skip
    runs = draw(st.lists(st.tuples(st.floats(-2, 2), st.integers(1, 30), st.floats(-0.05, 0.05)),
                         min_size=1, max_size=8))  # fmt: skip
    logs = [start + k * drift for start, length, drift in runs for k in range(length)]
    return loop, [2.0 * math.exp(x) for x in logs]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(case=controlled())
def test_the_rate_never_moves_away_from_the_target(case):
    """An error of the same sign that has not shrunk, or has turned, is answered in the same update.

    An error that shrinks may relax the rate: that is the proportional part.
    """
    loop, values = case
    before, last = 0.1, 0.0
    for step, value in enumerate(values):
        rate, error = loop.update(step, value), relative(value, 2.0, loop.deadband)
        assert loop.low <= rate <= loop.high
        assert abs(rate - before) <= loop.slew * (1 + 1e-12)
        if error * last <= 0 or abs(error) >= abs(last):
            assert (rate - before) * math.copysign(1, error) >= -1e-12 or error == 0
        before, last = rate, error


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(case=controlled(), side=st.sampled_from([0.5, 0.95, 1.05, 3.0]))
def test_after_anything_a_lasting_error_moves_the_rate_one_way(case, side):
    loop, values = case
    for step, value in enumerate(values):
        loop.update(step, value)
    rates = [loop.update(step, 2.0 * side) for step in range(300)]
    falls = [b - a <= 1e-12 for a, b in itertools.pairwise(rates)]
    rises = [b - a >= -1e-12 for a, b in itertools.pairwise(rates)]
    assert all(falls) if side < 1 else all(rises)


def test_the_sum_does_not_wind_up_under_the_slew_limit():
    loop = mf.HoldRatio(2.0, 0.1, gain=0.1, slew=0.001, patience=10**6)
    for step in range(120):
        loop.update(step, 4.0)
    assert loop.current == pytest.approx(0.22)
    rates = [loop.update(step, 1.9) for step in range(120, 620)]
    assert all(b <= a for a, b in itertools.pairwise([0.22 + 1e-12, *rates]))
    assert rates[-1] == 0.0  # and it does answer


@pytest.mark.parametrize("slew", [0.02, 0.005, 0.001])
def test_a_slew_limit_only_slows_the_loop_down(slew):
    """Wound up, the loop would swing about the target for thousands of updates."""
    seen = drive(mf.HoldRatio(3.0, 0.0, gain=0.5, deadband=0.0, slew=slew), 600)
    crossed = next(k for k, value in enumerate(seen) if value < 3.0)
    assert min(seen) > 2.0 and all(abs(v / 3.0 - 1) < 0.01 for v in seen[crossed + 150 :])


def test_within_the_deadband_nothing_moves():
    loop = mf.HoldRatio(3.0, 0.1, gain=1.0, deadband=0.05)
    assert loop.update(0, 3.1) == 0.1
    assert loop.log[-1]["reason"] == "within the deadband"


def test_a_loop_without_authority_warns():
    loop = mf.HoldRatio(3.0, 0.1, gain=10.0, bounds=(0.0, 0.2), patience=5)
    with pytest.warns(RuntimeWarning, match="no authority"):
        for step in range(8):
            loop.update(step, 4.0)


def test_a_bound_that_has_not_been_reached_is_not_accused():
    """What the error asks for is beyond it at once; the slew limit lets the rate get there late."""
    loop = mf.HoldRatio(1.5, 0.1, gain=10.0, bounds=(0.0, 0.5), slew=0.001, patience=10)
    for step in range(399):
        loop.update(step, 3.0)
    assert not loop.given_up and loop.current == pytest.approx(0.499)
    with pytest.warns(RuntimeWarning, match="no authority: 10 updates at its upper bound 0.5"):
        for step in range(399, 412):
            loop.update(step, 3.0)
    reasons = [row["reason"] for row in loop.log]
    assert max(row["rate"] for row in loop.log) == 0.5
    assert [row["rate"] for row in loop.log].count(0.5) == reasons.count("at its upper bound") == 10


def test_a_ratio_at_its_target_is_not_accused():
    loop = mf.HoldRatio(2.0, 0.1, gain=1.0, bounds=(0.0, 0.1), patience=3)
    for step in range(20):
        loop.update(step, 2.0)
    assert not loop.given_up


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


def absorbing(loop, steps, lr=0.1, **options):
    """Train a plain loop in which nobody feeds anything; give the scheduler and the weight."""
    w = torch.nn.Parameter(torch.ones(2))
    scheduler = mf.WeightDecayScheduler(
        torch.optim.AdamW([w], lr=lr, weight_decay=0.5), loop, **options
    )
    for _ in range(steps):
        w.grad = torch.zeros_like(w)
        scheduler.optimizer.step()
    return scheduler, w


def test_a_bare_scheduler_feeds_a_budget():
    loop = mf.OffAtBudget(0.5, budget=0.2)
    scheduler, w = absorbing(loop, 20)
    assert scheduler.accumulated == [pytest.approx(-0.2)]
    assert w[0].item() == pytest.approx(0.95**4)
    assert [(row["step"], row["rate"]) for row in loop.log] == [(4, 0.0)]
    assert scheduler.get_last_weight_decay() == [0.0]


@pytest.mark.parametrize("steps", [3, 7, 10, 100])
def test_rounding_does_not_cost_a_step_of_the_budget(steps):
    """10 x 0.1 is 0.9999999999999999 as a sum."""
    scheduler, _ = absorbing(mf.OffAtBudget(1.0, budget=0.1 * steps), 3 * steps)
    assert [row["stop"] for row in scheduler.audit()] == [steps, 3 * steps]


def test_a_budget_continues_where_the_optimizer_stopped():
    """Also if it was spent in the last step before the stop, of which nobody took note."""
    for stop in (3, 4, 5):
        first, w = absorbing(mf.OffAtBudget(0.5, budget=0.2), stop)
        saved = copy.deepcopy(first.optimizer.state_dict())
        optimizer = torch.optim.AdamW([w], lr=0.1, weight_decay=0.5)
        second = mf.WeightDecayScheduler(optimizer, mf.OffAtBudget(0.5, budget=0.2))
        optimizer.load_state_dict(saved)
        with pytest.warns(UserWarning, match="record of steps 0 to"):
            for _ in range(4):
                w.grad = torch.zeros_like(w)
                optimizer.step()
        assert second.accumulated == [pytest.approx(-0.2)]


def test_each_group_or_layer_has_a_budget_of_its_own():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.2}]
    shared = mf.OffAtBudget(0.5, budget=0.4)
    own = [mf.OffAtBudget(0.5, budget=0.3), mf.OffAtBudget(0.5, budget=0.6)]
    for rules, expected in [
        ({"schedule": shared}, [-0.2, -0.4]),  # off for all when the first has spent it
        ({"schedule": None, "groups": [(0, own[0]), (1, own[1])]}, [-0.3, -0.6]),
    ]:
        optimizer = torch.optim.AdamW([dict(group) for group in groups], weight_decay=0.5)
        scheduler = mf.WeightDecayScheduler(optimizer, **rules)
        for _ in range(10):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        assert scheduler.accumulated == pytest.approx(expected)


def test_a_budget_that_cannot_be_counted_is_refused():
    w = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.Adam([w], lr=0.1, weight_decay=0.5)
    for rules in ({"schedule": mf.OffAtBudget(0.5, 0.2)},
                  {"schedule": None, "groups": [(0, mf.OffAtBudget(0.5, 0.2))]}):  # fmt: skip
        with pytest.raises(ValueError, match=r"OffAtBudget counts.*Adam.*decoupled=True"):
            mf.WeightDecayScheduler(adam, **rules)
    scheduler = mf.WeightDecayScheduler(adam, mf.OffAtBudget(0.5, 0.2), decoupled=True)
    for _ in range(10):
        w.grad = torch.zeros_like(w)
        adam.step()
    assert scheduler.accumulated == [pytest.approx(-0.2)] and not scheduler.pending[0]


def test_a_loop_without_measurements_warns_once():
    with pytest.warns(UserWarning, match="OffBelow has set the decay of steps 0 to 1000") as said:
        absorbing(mf.OffBelow(0.5, 2.0), 2500, lr=1e-5)
    assert len(said) == 1


def test_a_loop_that_is_fed_now_and_then_is_not_accused():
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([w], lr=1e-5, weight_decay=0.5)
    loop = mf.OffBelow(0.5, 2.0)
    scheduler = mf.WeightDecayScheduler(optimizer, loop)
    for step in range(2500):
        if step == 900:
            loop.update(step, math.nan)
        scheduler.account.steps = step
        scheduler.step()
    scheduler.close()  # a warning would be an error


@pytest.mark.slow
def test_a_program_that_ends_warns_of_loops_without_measurements():
    run = """
import mirrorflow as mf
from test_feedback import absorbing

fed = mf.OffBelow(0.5, 2.0)
runs = [absorbing(loop, 300, lr=1e-5) for loop in (mf.OffWhenLevel(0.5), fed)]
fed.update(300, 3.0)
runs.append(absorbing(mf.OffAtBudget(0.5, 2.0), 300, lr=1e-5))
"""
    folder = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", run], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([folder, *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "OffWhenLevel has set the decay of steps 0 to 299 and was never fed" in done.stderr
    assert done.stderr.count("never fed") == 1


def test_a_loop_warns_when_the_scheduler_is_closed_or_the_loop_is_dropped():
    with pytest.warns(UserWarning, match="steps 0 to 29 and was never fed.*stays at 0.5") as said:
        scheduler, _ = absorbing(mf.OffBelow(0.5, 2.0), 30)
        scheduler.close()
        scheduler.close()
        del scheduler
        gc.collect()
    assert len(said) == 1
    with pytest.warns(UserWarning, match="OffWhenLevel has set the decay of steps 0 to 29"):
        absorbing(mf.OffWhenLevel(0.5), 30)
        gc.collect()


def test_a_trial_of_a_few_steps_is_not_accused():
    scheduler, _ = absorbing(mf.OffBelow(0.5, 2.0), 20)
    scheduler.close()
    del scheduler
    gc.collect()


def test_copies_are_not_accused_and_watch_for_themselves():
    scheduler, _ = absorbing(mf.OffBelow(0.5, 2.0), 30)
    copied = pickle.loads(pickle.dumps(scheduler))
    mf.preview(scheduler, 10)
    del copied
    gc.collect()
    scheduler.schedule.update(30, 3.0)
    scheduler.close()


def test_what_a_loop_was_fed_before_the_stop_is_not_known():
    """A resumed run may be shorter than the interval; after 1,000 steps it is late all the same."""
    first, w = absorbing(mf.OffBelow(0.5, 2.0), 30, lr=1e-5)
    first.schedule.update(30, 3.0)
    saved = copy.deepcopy(first.optimizer.state_dict())
    for steps in (30, 1001):
        optimizer = torch.optim.AdamW([w], lr=1e-5, weight_decay=0.5)
        second = mf.WeightDecayScheduler(optimizer, mf.OffBelow(0.5, 2.0))
        optimizer.load_state_dict(saved)
        second.load_state_dict(first.state_dict())
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(steps):
                w.grad = torch.zeros_like(w)
                optimizer.step()
            second.close()
        late = ["OffBelow has set the decay of steps 30 to 1030"] if steps > 1000 else []
        assert [str(one.message)[:46] for one in said] == late


@pytest.mark.parametrize("schedule", [
    mf.SwitchOff(0.1, at=0.6), mf.Linear(0.1, 0.0, 0.9), mf.Piecewise((0.2, 0.6), (1, 2, 0)),
    mf.join([(mf.Constant(0.1), 0.5), (mf.Constant(0.0), None)]),
])  # fmt: skip
def test_times_that_are_fractions_of_a_run_are_questioned(schedule):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], weight_decay=0.5)
    for rules in ({"schedule": schedule}, {"schedule": None, "groups": [(0, schedule)]}):
        with (
            pytest.warns(UserWarning, match=r"not a fraction of the run.*at=0.6 \* total"),
            mf.WeightDecayScheduler(optimizer, **rules),
        ):
            pass


@pytest.mark.parametrize("schedule", [
    mf.SwitchOff(0.1, at=1), mf.Constant(0.1), mf.Piecewise((0.5, 7), (1, 2, 0)),
    mf.Piecewise((), (1,)),
])  # fmt: skip
def test_times_in_steps_are_not_questioned(schedule):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], weight_decay=0.5)
    mf.WeightDecayScheduler(optimizer, schedule)  # a warning would be an error


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("make", [
    lambda: mf.OffWhenLevel(0.1, window=2), lambda: mf.OffBelow(0.1, 2.0),
    lambda: mf.OffAtBudget(0.1, 2.0), lambda: mf.HoldRatio(2.0, 0.1, gain=1.0),
])  # fmt: skip
def test_what_is_infinite_decides_nothing(make, value):
    """A loss that has overflowed has not levelled off, and has not reached a target."""
    loop = make()
    loop.update(0, 1.9 if isinstance(loop, mf.OffAtBudget) else 2.1)
    before = loop.memory()
    for step in range(1, 5):
        loop.update(step, value)
    assert loop.memory() == before and loop.log[-1]["reason"] == "not finite"


@pytest.mark.parametrize("value", [torch.tensor(2.5), np.float32(2.5), torch.tensor([[2.5]])])
def test_the_log_is_of_plain_numbers(value):
    loop = mf.OffBelow(0.1, 2.0)
    loop.update(1, value)
    assert json.loads(json.dumps(loop.state_dict())) == loop.state_dict()
    assert type(loop.log[0]["value"]) is float


@pytest.mark.parametrize("value", [None, "high", torch.ones(2), []])
def test_a_value_that_is_not_a_number_is_refused(value):
    for make in (lambda: mf.OffBelow(0.1, 2.0), lambda: mf.HoldRatio(2.0, 0.1, gain=1.0)):
        with pytest.raises(TypeError, match="value must be a number, got"):
            make().update(0, value)
    with pytest.raises(TypeError, match="rate must be a number, got"):
        mf.OffBelow(value, 2.0)
    with pytest.raises(TypeError, match=r"bounds must be the lowest and .* rate, got 0\.5"):
        mf.HoldRatio(2.0, 0.1, gain=1.0, bounds=0.5)


@pytest.mark.parametrize(
    "loop", [mf.OffAtBudget(0.3, budget=0.1), mf.OffBelow(0.3, 2.0), mf.HoldRatio(2.0, 0.3, 0.1)]
)
def test_a_loop_that_has_decided_in_another_run_is_not_used_silently(loop):
    def scheduler():
        net = torch.nn.Linear(3, 3)
        return mf.WeightDecayScheduler(torch.optim.AdamW(net.parameters()), loop)

    scheduler()  # a warning would be an error
    loop.update(7, 1.5)
    with pytest.warns(
        UserWarning, match=f"this {type(loop).__name__} has decided before, at step 7"
    ):
        scheduler()


def test_below_is_reached_and_for_good():
    loop = mf.OffBelow(0.1, target=2.0)
    values = [3.0, math.nan, 2.001, 2.0, 5.0, 1.0]
    assert [loop.update(k, v) for k, v in enumerate(values)] == [0.1, 0.1, 0.1, 0, 0, 0]
    assert [row["reason"] for row in loop.log] == [
        "above the target", "nothing to measure", "above the target",
        "target reached: switched off", "off", "off",
    ]  # fmt: skip


@pytest.mark.parametrize("loop", [
    mf.HoldRatio(3.0, 0.1, gain=0.5, bounds=(0.0, 0.4), slew=0.05),
    mf.HoldRatio(3.0, 0.1, gain=0.5, bounds=(0.0, 0.4), slew=0.001),
    mf.OffWhenLevel(0.1, window=4, tol=0.3),
    mf.OffBelow(0.1, 3.3),
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
        (lambda: mf.OffBelow(0.1, math.nan), "target"),
        (lambda: mf.OffBelow(-0.1, 2.0), "rate"),
        (lambda: mf.HoldRatio(3.0, 0.1, 1.0).update(0, -1.0), "value"),
        (
            lambda: mf.HoldRatio(3.0, 0.1, 1.0, bounds=(0.5, 0.1)),
            "bounds must ascend, the lowest rate first",
        ),
        (lambda: mf.HoldRatio(3.0, 0.1, 1.0, patience=2.5), "patience must be a whole number"),
        (lambda: mf.OffWhenLevel(0.1, window=2.5), "window must be a whole number"),
        (lambda: mf.OffWhenLevel(0.1, earliest=1.7), "earliest must be a whole number"),
    ],
)
def test_bad_settings_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_the_gain_is_by_default_a_multiple_of_the_rate():
    assert mf.HoldRatio(2.0, 0.1).gain == pytest.approx(1.6)
    assert mf.HoldRatio(2.0, 0.1, 0.5).gain == 0.5
    with pytest.raises(ValueError, match="gain must be given where rate is 0"):
        mf.HoldRatio(2.0, 0.0)
