"""Taking an optimizer over and letting it go: nothing is left behind, and nothing is lost."""

import copy
import math

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from mirrorflow.schedule import Constant, SwitchOff
from mirrorflow.weightdecay import WeightDecayScheduler
from optimizers import FALL, OFF, pull, weights


def keys(optimizer):
    return [set(group) for group in optimizer.param_groups]


def failing(step):
    raise ZeroDivisionError


# A scheduler that could not be made


@pytest.mark.parametrize(
    ("schedule", "options", "error"),
    [
        (FALL, {}, ValueError),  # every decay is 0
        (failing, {"groups": [(0, failing)]}, ZeroDivisionError),
        (None, {"relative": True, "groups": [(0, FALL)]}, ValueError),
        (FALL, {"groups": [("bias", FALL)]}, ValueError),  # no names
    ],
)
def test_what_failed_leaves_nothing_behind(schedule, options, error):
    optimizer = AdamW(weights(), lr=0.1, weight_decay=0.0)
    before = copy.deepcopy(optimizer.param_groups)
    with pytest.raises(error):
        WeightDecayScheduler(optimizer, schedule, **options)
    for ours, theirs in zip(optimizer.param_groups, before, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {
            k: v for k, v in theirs.items() if k != "params"
        }
    assert not optimizer._optimizer_step_pre_hooks


def test_the_advice_of_the_error_works():
    optimizer = AdamW(weights(), lr=0.1, weight_decay=0.0)
    with pytest.raises(ValueError, match="weight_decay > 0"):
        WeightDecayScheduler(optimizer, Constant(0.5))
    optimizer.param_groups[0]["weight_decay"] = 0.1
    scheduler = WeightDecayScheduler(optimizer, Constant(0.5), relative=True)
    assert scheduler.get_last_weight_decay() == [0.05]


def test_what_failed_leaves_the_tensors_that_groups_share():
    a, b = weights()
    optimizer = SGD([{"params": [a]}, {"params": [b]}], weight_decay=torch.tensor(0.25))
    with pytest.raises(ZeroDivisionError):
        WeightDecayScheduler(optimizer, failing)
    first, second = (group["weight_decay"] for group in optimizer.param_groups)
    assert first is second is optimizer.defaults["weight_decay"] and first == 0.25


# A scheduler that is closed


def test_close_takes_its_keys_away():
    optimizer = AdamW(weights(), lr=0.1, weight_decay=0.1)
    before = keys(optimizer)
    scheduler = WeightDecayScheduler(optimizer, Constant(0.1))
    assert keys(optimizer) != before
    scheduler.close()
    assert keys(optimizer) == before


@pytest.mark.parametrize("options", [{}, {"decoupled": True}])
def test_after_close_the_groups_own_decay_is_known(options):
    """Switched off, or moved outside: the next scheduler multiplies what was there before."""
    params = weights()
    optimizer = AdamW(params, lr=0.1, weight_decay=0.3)
    with WeightDecayScheduler(optimizer, SwitchOff(1.0, at=1), relative=True, **options):
        for _ in range(2):
            pull(params)
            optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    loaded = AdamW(weights(), lr=0.1, weight_decay=0.3)
    loaded.load_state_dict(optimizer.state_dict())
    for one in (optimizer, loaded):
        scheduler = WeightDecayScheduler(one, Constant(0.5), relative=True, **options)
        assert scheduler.get_last_weight_decay() == [0.15] and scheduler.steps == 0


def test_a_decay_set_after_close_is_the_groups_own():
    optimizer = AdamW(weights(), lr=0.1, weight_decay=0.1)
    WeightDecayScheduler(optimizer, OFF, relative=True).close()
    optimizer.param_groups[0]["weight_decay"] = 0.4
    scheduler = WeightDecayScheduler(optimizer, Constant(1.0), relative=True)
    assert scheduler.get_last_weight_decay() == [0.4]


# Groups that change


def test_tensors_appended_to_a_group_are_decayed():
    a, b, c, d = (torch.nn.Parameter(torch.ones(1)) for _ in range(4))
    optimizer = SGD([a, b], lr=0.5, weight_decay=0.1)
    rules = [([a, c], Constant(0.25))]
    scheduler = WeightDecayScheduler(optimizer, Constant(0.5), groups=rules, decoupled=True)
    optimizer.param_groups[0]["params"] += [c, d]
    for p in (a, b, c, d):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert [p.item() for p in (a, b, c, d)] == [0.875, 0.75, 0.875, 0.75]
    assert scheduler.accumulated == [-0.125, -0.25]


def test_tensors_that_divide_a_group_anew_are_refused():
    a, b = weights()
    optimizer = AdamW([a], lr=0.5, weight_decay=0.1)
    with pytest.warns(UserWarning, match="chooses no parameter"):
        WeightDecayScheduler(optimizer, FALL, groups=[([b], OFF)], decoupled=True)
    optimizer.param_groups[0]["params"].append(b)
    pull([a, b])
    with pytest.raises(RuntimeError, match=r"were 1 and are 2.*add_param_group"):
        optimizer.step()


def test_a_group_that_was_removed_is_named():
    a, b = weights()
    optimizer = AdamW([{"params": [a]}, {"params": [b]}], lr=0.1, weight_decay=0.1)
    scheduler = WeightDecayScheduler(optimizer, FALL)
    del optimizer.param_groups[1]
    pull([a])
    with pytest.raises(RuntimeError, match="has 1 parameter groups and had 2"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="has 1 parameter groups and had 2"):
        scheduler.step()


# One tensor for several groups


@pytest.mark.parametrize("make", [AdamW, SGD])
def test_groups_that_share_a_tensor_get_one_each(make):
    a, b, c = (torch.nn.Parameter(torch.ones(1)) for _ in range(3))
    shared = torch.tensor(0.5)
    options = {"lr": 0.5, "weight_decay": shared, "foreach": False}
    optimizer = make([{"params": [a]}, {"params": [b]}], **options)
    first = optimizer.param_groups[0]["weight_decay"]
    scheduler = WeightDecayScheduler(optimizer, Constant(0.5), groups=[(1, Constant(0.125))])
    optimizer.add_param_group({"params": [c], "weight_decay": optimizer.defaults["weight_decay"]})
    for p in (a, b, c):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert [p.item() for p in (a, b, c)] == [0.75, 0.9375, 0.75]
    assert scheduler.accumulated == [-0.25, -0.0625, -0.25]
    assert optimizer.param_groups[0]["weight_decay"] is first

    fresh = make([{"params": [a]}, {"params": [b]}, {"params": [c]}], **options)
    again = WeightDecayScheduler(fresh, Constant(0.5), groups=[(1, Constant(0.125))])
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:  # as one that was written without a scheduler
        group["weight_decay"] = shared
    fresh.load_state_dict(saved)
    assert [float(g["weight_decay"]) for g in fresh.param_groups] == [0.5, 0.125, 0.5]
    assert again.accumulated == scheduler.accumulated


def test_a_new_group_takes_the_default_not_what_was_filled_into_it():
    params = weights()
    optimizer = SGD(params[:1], lr=0.5, weight_decay=torch.tensor(0.25), foreach=False)
    scheduler = WeightDecayScheduler(optimizer, SwitchOff(1.0, at=1), relative=True)
    pull(params)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    optimizer.add_param_group({"params": params[1:]})
    scheduler.step()
    assert optimizer.param_groups[1]["initial_weight_decay"] == 0.25


# Too much


@pytest.mark.parametrize("options", [{}, {"decoupled": True}, {"convention": "follow-lr"}])
def test_a_decay_that_overshoots_warns_once(options):
    w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = AdamW([w], lr=0.1, weight_decay=0.1)
    WeightDecayScheduler(optimizer, Constant(30.0), **options)
    w.grad = torch.zeros_like(w)
    said = r"lr \* weight_decay = 3 >= 1 for group 0 at step 0: this step flips the sign"
    with pytest.warns(UserWarning, match=said):
        optimizer.step()
    assert w.item() == pytest.approx(-2.0)
    optimizer.step()


@pytest.mark.parametrize(
    ("rate", "said"), [(9.99, False), (10.0, True), (math.nextafter(10, 11), True)]
)
def test_where_too_much_begins(rate, said):
    w = torch.nn.Parameter(torch.ones(1))
    optimizer = SGD([w], lr=0.1, weight_decay=0.1)
    WeightDecayScheduler(optimizer, Constant(rate))
    w.grad = torch.zeros_like(w)
    if said:
        with pytest.warns(UserWarning, match=r"lr \* weight_decay = 1 >= 1"):
            optimizer.step()
    else:
        optimizer.step()


def test_a_rescaled_decay_does_not_warn_of_overshooting():
    w = torch.nn.Parameter(torch.ones(1))
    optimizer = Adam([w], lr=0.1, weight_decay=0.1)
    with pytest.warns(UserWarning, match="rescales"):
        WeightDecayScheduler(optimizer, Constant(30.0))
    w.grad = torch.zeros_like(w)
    optimizer.step()
