"""Which groups and tensors follow which schedule."""

import copy

import pytest
import torch
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import CosineAnnealingLR

from mirrorflow.schedule import Constant
from mirrorflow.weightdecay import (
    WeightDecayScheduler,
    WeightDecaySchedulers,
)
from optimizers import (
    FALL,
    STEPS,
    named,
    pull,
    weights,
)


def test_groups_by_name_module_index_and_parameter():
    model = named("query", "value", "head", "rest")
    groups = [{"params": list(m.named_parameters(prefix=n))} for n, m in model.items()]
    optimizer = AdamW(groups, weight_decay=0.1)
    optimizer.param_groups[3]["weight_decay"] = 0.0
    rules = [
        (r"^query\.", Constant(0.2)),
        (model["value"], Constant(0.3)),
        (list(model["head"].parameters()), None),
        (3, Constant(0.4)),
    ]
    scheduler = WeightDecayScheduler(optimizer, None, groups=rules)
    assert scheduler.get_last_weight_decay() == [0.2, 0.3, 0.1, 0.4]


def test_names_from_the_model_and_of_groups():
    model = named("lora_A", "other")
    optimizer = AdamW([{"params": m.parameters()} for m in model.values()], weight_decay=0.1)
    rule = [("lora_", Constant(0.7))]
    scheduler = WeightDecayScheduler(optimizer, Constant(0.2), groups=rule, model=model)
    assert scheduler.get_last_weight_decay() == [0.7, 0.2]
    scheduler.close()
    with pytest.raises(ValueError, match="model="):
        WeightDecayScheduler(optimizer, Constant(0.2), groups=rule)
    optimizer.param_groups[0]["name"], optimizer.param_groups[1]["name"] = "other", "lora_x"
    scheduler = WeightDecayScheduler(optimizer, Constant(0.2), groups=rule)
    assert scheduler.get_last_weight_decay() == [0.2, 0.7]
    assert [scheduler.name(target) for target in scheduler.targets] == ["other", "lora_x"]


def test_part_of_a_group_needs_decay_from_outside():
    model = named("a")
    optimizer = AdamW(model.named_parameters(), lr=0.5, weight_decay=0.1)
    rules = [(r"bias$", Constant(0.0)), (r"weight$", Constant(0.2))]
    with pytest.raises(ValueError, match=r"1 of the 2 tensors.*decoupled=True"):
        WeightDecayScheduler(optimizer, None, groups=rules)
    scheduler = WeightDecayScheduler(optimizer, None, groups=rules, decoupled=True)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    weight, bias = model.parameters()
    assert torch.equal(weight, before[0] * 0.9) and torch.equal(bias, before[1])
    assert scheduler.accumulated == [0.0, -0.1]
    assert [row["group"] for row in scheduler.audit()] == ["0[a.bias]", "0[a.weight]"]


def test_a_rule_that_chooses_nothing_is_said():
    optimizer = AdamW(named("a").named_parameters(), weight_decay=0.1)
    with pytest.warns(UserWarning, match="'lora_' chooses no parameter"):
        WeightDecayScheduler(optimizer, FALL, groups=[("lora_", FALL)])


def test_groups_added_later_are_picked_up():
    a, b, c = weights(3)
    optimizer = AdamW([a], lr=0.1, weight_decay=0.1)
    scheduler = WeightDecayScheduler(optimizer, FALL)
    cosine = CosineAnnealingLR(optimizer, T_max=100)
    for t in range(STEPS):
        if t == 2:
            optimizer.add_param_group({"params": [b]})
            optimizer.add_param_group({"params": [c], "weight_decay": 0.0})
        pull([a, b, c])
        optimizer.step()
        if t < 2:
            cosine.step()
        assert optimizer.param_groups[0]["weight_decay"] == FALL.rate(t)
        assert t < 2 or optimizer.param_groups[1]["weight_decay"] == FALL.rate(t)
    assert optimizer.param_groups[2]["weight_decay"] == 0.0
    assert scheduler.accumulated[1] == pytest.approx(-0.1 * sum(FALL.rate(t) for t in range(2, 9)))
    assert scheduler.accumulated[2] == 0.0


def test_several_optimizers_count_their_own_steps():
    (w,), (v,) = weights(1), weights(1, seed=1)
    muon, adam = Muon([w], lr=0.1, weight_decay=0.1), AdamW([v], lr=0.1, weight_decay=0.1)
    both = WeightDecaySchedulers([WeightDecayScheduler(o, FALL) for o in (muon, adam)])
    for t in range(4):
        pull([w, v])
        muon.step()
        if t % 2:
            adam.step()
        both.step()
    assert both.get_last_weight_decay() == [FALL.rate(4), FALL.rate(2)]
    again = WeightDecaySchedulers(copy.deepcopy(both.schedulers))
    again.load_state_dict(both.state_dict())
    assert again.accumulated == both.accumulated
    with pytest.raises(ValueError, match="2 schedulers, these are 1"):
        WeightDecaySchedulers(both.schedulers[:1]).load_state_dict(both.state_dict())
    both.close()
    pull([w])
    muon.step()
    assert muon.param_groups[0]["weight_decay"] == FALL.rate(4)
