"""Closed loops after the run: whether they fired, held their target, or why not."""

import math
import random

import pytest

import mirrorflow as mf

# What a loop says after the run


def test_a_target_that_is_missed_is_never_said_to_be_held():
    """A gain that is too small for its target: 27% off at each of 30 updates."""
    loop = mf.HoldRatio(3.0, 0.1, gain=1e-3)
    for step in range(30):
        loop.update(step, 1.27 * 3.0)
    assert {row["reason"] for row in loop.log} == {"raising"}
    assert loop.outcome().startswith("not held: the target is 3, the last value 3.81, 27.0% above")
    for step in range(30, 40):
        loop.update(step, 0.5 * 3.0)
    assert "lowering" in {row["reason"] for row in loop.log[30:]}
    assert "50.0% below" in loop.outcome() and "raising 30" in loop.outcome()


@pytest.mark.parametrize("seed", range(20))
def test_the_reason_is_what_the_rate_does(seed):
    rng = random.Random(seed)
    loop = mf.HoldRatio(
        2.0, 0.3, gain=rng.uniform(0.01, 2), bounds=(0.05, 0.6), slew=rng.choice([0.02, math.inf])
    )
    before = loop.current
    for step in range(60):
        value = rng.uniform(1.2, 3.4)
        loop.update(step, value)
        reason, rate = loop.log[-1]["reason"], loop.current
        if reason.startswith("raising"):
            assert rate > before
        elif reason.startswith("lowering"):
            assert rate < before
        elif reason.startswith("at its"):
            assert rate == (0.6 if "upper" in reason else 0.05)
        assert ("within" in reason) == (abs(math.log(value / 2)) <= loop.deadband)
        before = rate


def test_a_loop_that_did_not_fire_says_so_and_why():
    level, below = mf.OffWhenLevel(0.1, window=3, tol=0.01), mf.OffBelow(0.1, target=1.5)
    unfed, spent = mf.OffBelow(0.2, target=1.5), mf.OffAtBudget(0.1, budget=5.0)
    for step, value in enumerate([4.0, 3.0, 2.0]):
        level.update(step, value)
        below.update(step, value)
    assert "the last 3 differ by 50.00%, level is 1.00%" in level.outcome()
    assert "the lowest value was 2, the target is 1.5" in below.outcome()
    assert "never fed" in unfed.outcome() and "budget of 5" in spent.outcome()
    for loop in (level, below, unfed, spent):
        assert loop.fired_at is None and loop.outcome().startswith("did not fire")
    below.update(7, 1.25)
    below.update(8, 1.0)
    assert below.fired_at == 7 and below.outcome().endswith("switched off at step 7, at 1.25")
    spent.update(9, 5.0)
    assert spent.fired_at == 9 and "budget absorbed" in spent.outcome()


def test_a_loop_that_came_back_switched_off_does_not_claim_a_step():
    below = mf.OffBelow(0.1, target=1.5)
    below.update(3, 1.0)
    fresh = mf.OffBelow(0.1, target=1.5)
    fresh.recall(below.memory())
    fresh.update(4, 1.0)
    assert fresh.fired_at is None and fresh.outcome() == "off: it was so before this log begins"
