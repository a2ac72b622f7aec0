"""Stopping and resuming: bit for bit, in any order of loading."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from mirrorflow.schedule import Constant, SwitchOff
from mirrorflow.weightdecay import (
    WeightDecayScheduler,
)
from optimizers import (
    FALL,
    MAKE,
    OFF,
    STEPS,
    assert_equal,
    named,
    pull,
    quiet,
    two_groups,
    weights,
)


class Halving:
    """A picklable schedule of a user."""

    def __call__(self, step):
        return 0.5 ** (step + 1)


def assemble(make, params, **options):
    optimizer = two_groups(make, params)
    scheduler = WeightDecayScheduler(optimizer, FALL, **options)
    return optimizer, scheduler, CosineAnnealingLR(optimizer, T_max=STEPS)


def advance(params, optimizer, scheduler, cosine, steps):
    for _ in range(steps):
        pull(params)
        optimizer.step()
        scheduler.step()
        cosine.step()


def stored(*objects):
    buffer = io.BytesIO()
    torch.save([o.state_dict() for o in objects], buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def summary(params, scheduler):
    values = [p.detach().clone() for p in params]
    return values, str((scheduler.accumulated, scheduler.pending, scheduler.audit()))


ORDERS = ("optimizer first", "scheduler first", "made after the optimizer's")


@quiet
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgd nesterov", {}),
        ("adam", {"relative": True}),
        ("adam", {"decoupled": True, "convention": "adamc"}),
        ("adamw fused", {"relative": True}),
        ("muon", {}),
        ("third party", {}),
    ],
)
@pytest.mark.sample(10)
def test_resuming_at_any_step_is_exact(name, options, order):
    make = MAKE[name]
    params = weights()
    whole = assemble(make, params, **options)
    advance(params, *whole, STEPS)
    expected = summary(params, whole[1])
    for stop in range(STEPS):
        params = weights()
        parts = assemble(make, params, **options)
        advance(params, *parts, stop)
        saved = stored(*parts)
        fresh = [torch.nn.Parameter(p.detach().clone()) for p in params]
        parts = resumed(make, fresh, saved, order, options)
        advance(fresh, *parts, STEPS - stop)
        values, account = summary(fresh, parts[1])
        assert_equal(values, expected[0])
        assert account == expected[1]


def resumed(make, params, saved, order, options):
    if order == "made after the optimizer's":
        optimizer = two_groups(make, params)
        optimizer.load_state_dict(saved[0])
        scheduler = WeightDecayScheduler(optimizer, FALL, **options)
        scheduler.load_state_dict(saved[1])
        cosine = CosineAnnealingLR(optimizer, T_max=STEPS)
        cosine.load_state_dict(saved[2])
        optimizer.load_state_dict(saved[0])  # the cosine's constructor wrote its first lr
        return optimizer, scheduler, cosine
    parts = assemble(make, params, **options)
    order = (0, 1, 2) if order == "optimizer first" else (2, 1, 0)
    for i in order:
        parts[i].load_state_dict(saved[i])
    return parts


@quiet
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("name", ["adamw", "sgd momentum"])
def test_killed_between_the_saves(name, order):
    params = weights()
    parts = assemble(MAKE[name], params)
    advance(params, *parts, 3)
    (old,) = stored(parts[1])
    advance(params, *parts, 2)
    new, _, rate = stored(*parts)
    expected = [p.detach().clone() for p in params]
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in params]
    advance(params, *parts, STEPS - 5)

    again = assemble(MAKE[name], fresh)
    assert_equal(fresh, expected)
    for i in order:
        again[i].load_state_dict((new, old)[i])
    assert again[1].steps == 5 and again[1].get_last_weight_decay()[0] == FALL.rate(5)
    again[2].load_state_dict(rate)
    with pytest.warns(UserWarning, match="at step 5, the state of WeightDecayScheduler at step 3"):
        advance(fresh, *again, 1)
    advance(fresh, *again, STEPS - 6)
    assert_equal(fresh, params)
    assert again[1].accumulated == pytest.approx(parts[1].accumulated, rel=1e-12)
    lost = [row for row in again[1].audit() if math.isnan(row["decay"])]
    assert [(row["start"], row["stop"]) for row in lost] == [(3, 5), (3, 5)]
    here = [row["absorbed"] for row in parts[1].audit() if 3 <= row["start"] < 5]
    assert sum(row["absorbed"] for row in lost) == pytest.approx(sum(here))


@pytest.mark.parametrize("loaded", [False, True])
def test_a_newer_or_a_lost_state_of_the_scheduler(loaded):
    params = weights()
    optimizer, scheduler, cosine = assemble(MAKE["adamw"], params)
    advance(params, optimizer, scheduler, cosine, 3)
    (old,), total, rows = stored(optimizer), scheduler.accumulated, scheduler.audit()
    advance(params, optimizer, scheduler, cosine, 2)
    new = scheduler.state_dict()

    fresh = weights()
    optimizer, scheduler, cosine = assemble(MAKE["adamw"], fresh)
    if loaded:
        scheduler.load_state_dict(new)
    optimizer.load_state_dict(old)
    assert scheduler.steps == 3 and scheduler.accumulated == total
    assert optimizer.param_groups[0]["weight_decay"] == FALL.rate(3)
    if loaded:
        known = ("group", "start", "stop", "decay", "decay_end", "absorbed", "a")
        for ours, theirs in zip(scheduler.audit(), rows, strict=True):
            assert {k: ours[k] for k in known} == {k: theirs[k] for k in known}
        advance(fresh, optimizer, scheduler, cosine, 1)
    else:
        with pytest.warns(UserWarning, match="record of steps 0 to 3"):
            advance(fresh, optimizer, scheduler, cosine, 1)


def test_going_back_in_the_same_process():
    params = weights()
    parts = assemble(MAKE["adamw"], params)
    advance(params, *parts, 3)
    saved, account = stored(*parts), summary(params, parts[1])[1]
    for order in ((0, 1, 2), (1, 0, 2)):
        advance(params, *parts, 4)
        for i in order:
            parts[i].load_state_dict(saved[i])
        assert summary(params, parts[1])[1] == account


def test_a_checkpoint_from_before_the_scheduler():
    params = weights()
    old = two_groups(MAKE["adamw"], params, decay=0.2)
    pull(params)
    old.step()
    (saved,) = stored(old)
    optimizer = two_groups(MAKE["adamw"], weights(), decay=0.2)
    scheduler = WeightDecayScheduler(optimizer, FALL, relative=True)
    optimizer.load_state_dict(saved)
    assert scheduler.steps == 0 and scheduler.get_last_weight_decay() == [0.5 * 0.2, 0.0]
    assert optimizer.param_groups[0]["weight_decay"] == 0.5 * 0.2


def test_the_base_survives_a_checkpoint_after_the_switch():
    params = weights()
    parts = assemble(MAKE["adamw"], params, relative=True)
    advance(params, *parts, 8)  # the decay is 0 now
    saved = stored(*parts)
    optimizer = two_groups(MAKE["adamw"], weights())
    optimizer.load_state_dict(saved[0])
    scheduler = WeightDecayScheduler(optimizer, Constant(1.0), relative=True)
    with pytest.warns(UserWarning, match=r"Linear\(.*\) is Constant\(1.0\)"):
        scheduler.load_state_dict(saved[1])
    assert scheduler.get_last_weight_decay() == [0.3, 0.0]


def test_a_state_of_other_groups_is_refused():
    one, two = AdamW(weights(), weight_decay=0.1), two_groups(MAKE["adamw"], weights())
    first, second = (WeightDecayScheduler(o, FALL) for o in (one, two))
    before = str(first.state_dict())
    with pytest.raises(ValueError, match="has 2 ledgers, this optimizer needs 1"):
        first.load_state_dict(second.state_dict())
    with pytest.raises(ValueError, match="steps and entries, got \\['last_epoch'\\]"):
        first.load_state_dict({"last_epoch": 3})
    assert str(first.state_dict()) == before


@pytest.mark.parametrize("order", [(0,), (0, 1), (1, 0)])
@pytest.mark.parametrize("options", [{}, {"decoupled": True}])
def test_a_group_that_was_added_in_the_run_is_added_then_loaded(options, order):
    def begun():
        params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        optimizer = AdamW(params[:1], lr=0.1, weight_decay=0.1)
        return params, optimizer, WeightDecayScheduler(optimizer, SwitchOff(0.1, at=4), **options)

    def step(params, optimizer):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()

    params, optimizer, scheduler = begun()
    step(params[:1], optimizer)
    optimizer.add_param_group({"params": params[1:]})
    step(params, optimizer)
    saved, values = stored(optimizer, scheduler), [p.detach().clone() for p in params]
    again, other, resumed = begun()
    other.add_param_group({"params": again[1:]})
    for one in order:
        (other, resumed)[one].load_state_dict(saved[one])
    for p, value in zip(again, values, strict=True):
        p.data.copy_(value)
    for _ in range(5):
        step(params, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if len(order) == 1 else "error")  # the audit lacks steps
            step(again, other)
    assert resumed.accumulated == scheduler.accumulated
    assert resumed.by_tensor() == scheduler.by_tensor()
    assert all(torch.equal(a, b) for a, b in zip(again, params, strict=True))


def test_a_checkpoint_written_with_other_rules_is_refused():
    def make():
        return AdamW(named("a").named_parameters(), weight_decay=0.1)

    optimizer = make()
    WeightDecayScheduler(optimizer, FALL, groups=[("bias", OFF)], decoupled=True)
    pull(optimizer.param_groups[0]["params"])
    optimizer.step()
    other = make()
    WeightDecayScheduler(other, FALL)
    with pytest.raises(ValueError, match="other rules"):
        other.load_state_dict(optimizer.state_dict())


def test_the_state_is_a_snapshot():
    params = weights()
    parts = assemble(MAKE["adamw"], params)
    advance(params, *parts, 2)
    states = [parts[0].state_dict(), parts[1].state_dict()]
    groups = str([(g["weight_decay_ledger"], g["weight_decay"]) for g in states[0]["param_groups"]])
    ledgers = str(states[1])
    advance(params, *parts, 1)
    assert ledgers == str(states[1])
    assert "2" in groups and parts[0].param_groups[0]["weight_decay_ledger"][0] == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_goes_on_by_itself(copied):
    params = weights()
    optimizer = two_groups(MAKE["adamw"], params)
    scheduler = WeightDecayScheduler(optimizer, Halving(), relative=True)
    pull(params)
    optimizer.step()
    twin = copied(scheduler)
    theirs = [p for group in twin.optimizer.param_groups for p in group["params"]]
    for _ in range(2):
        pull(theirs)
        twin.optimizer.step()
    assert (scheduler.steps, twin.steps) == (1, 3)
    pull(params)
    optimizer.step()
    pull(params)
    optimizer.step()
    assert_equal(params, theirs)
    assert scheduler.accumulated == twin.accumulated
