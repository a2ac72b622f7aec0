"""Which groups and tensors follow which schedule."""

import copy
import re

import numpy as np
import pytest
import torch
from torch.optim import SGD, AdamW, Muon
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, SequentialLR

from mirrorflow.schedule import Constant
from mirrorflow.weightdecay import (
    WeightDecayLR,
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
    torch.testing.assert_close(weight, before[0] * 0.9)
    assert torch.equal(bias, before[1])
    assert scheduler.accumulated == [0.0, -0.1]
    assert [row["group"] for row in scheduler.audit()] == ["0[a.bias]", "0[a.weight]"]


def test_several_at_once():
    """A list may hold whatever one may be: names, modules, parameters, indices."""
    model = named("query", "value", "head", "rest", "last")
    groups = [{"params": list(m.named_parameters(prefix=n))} for n, m in model.items()]
    optimizer = AdamW(groups, weight_decay=0.1)
    rules = [
        ([r"^query\.", model["value"]], Constant(0.2)),
        ((p for p in model["head"].parameters()), Constant(0.3)),
        ([np.int64(3)], Constant(0.4)),
        (np.int64(4), Constant(0.5)),
    ]
    scheduler = WeightDecayScheduler(optimizer, None, groups=rules)
    assert scheduler.get_last_weight_decay() == [0.2, 0.2, 0.3, 0.4, 0.5]


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([("(", FALL)], ValueError, r"must be a regular expression, got '\(': missing \)"),
        ([(-1, FALL)], ValueError, "index of a parameter group must be >= 0, got -1"),
        ([(1.0, FALL)], TypeError, "a module, parameters, or a list of them, got 1.0"),
        ([([None], FALL)], TypeError, "a list of them, got None"),
        ({0: FALL}, TypeError, r"Use list\(groups.items\(\)\)"),
        ("lora_", TypeError, r"list of \(what, schedule\) pairs, got 'lora_'"),
        (None, TypeError, r"list of \(what, schedule\) pairs, got None"),
        ([(0, 0.1)], TypeError, r"Constant\(0.1\)"),
    ],
)
def test_malformed_rules_are_refused(groups, error, message):
    optimizer = AdamW(named("a").named_parameters(), weight_decay=0.1)
    with pytest.raises(error, match=message):
        WeightDecayScheduler(optimizer, FALL, groups=groups)


@pytest.mark.parametrize("wrapped", ["module._orig_mod.", "_orig_mod.module.", ""])
@pytest.mark.parametrize("where", ["the group", "the model"])
def test_wrappers_do_not_hide_names(wrapped, where):
    """DDP and torch.compile put their own names before those of the model."""
    model = named("query", "value")
    for part in reversed(wrapped.split(".")[:-1]):
        model = torch.nn.ModuleDict({part: model})
    split = [
        [(n, p) for n, p in model.named_parameters() if key in n] for key in ("query", "value")
    ]
    if where == "the model":
        split = [[p for _, p in part] for part in split]
    optimizer = AdamW([{"params": part} for part in split], weight_decay=0.1)
    scheduler = WeightDecayScheduler(
        optimizer, Constant(0.2), groups=[(r"^query\.", Constant(0.7))], model=model
    )
    assert scheduler.get_last_weight_decay() == [0.7, 0.2]


def test_a_module_of_a_users_own_may_be_called_module():
    model = torch.nn.ModuleDict({"module": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    optimizer = AdamW([{"params": m.parameters()} for m in model.values()], weight_decay=0.1)
    rule = [(re.compile(r"^module\."), Constant(0.7))]
    scheduler = WeightDecayScheduler(optimizer, Constant(0.2), groups=rule, model=model)
    assert scheduler.get_last_weight_decay() == [0.7, 0.2]


def test_parts_of_a_group_are_named_by_what_is_in_them():
    net = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(named("q", "k") for _ in range(2))})
    net["head"] = torch.nn.Linear(2, 2)
    tensors = [[p for n, p in net.named_parameters() if f"blocks.{i}." in n] for i in range(2)]
    rules = [(part, Constant(0.1 * i)) for i, part in enumerate(tensors)]
    for model in (net, None):
        optimizer = AdamW(net.parameters(), lr=0.5, weight_decay=0.1)
        scheduler = WeightDecayScheduler(optimizer, FALL, groups=rules, decoupled=True, model=model)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        expected = ["0[blocks.0]", "0[blocks.1]", "0[head.weight and 1 more]"]
        if model is None:  # nothing to name them by
            expected = ["0[0,1,2,3]", "0[4,5,6,7]", "0[8,9]"]
        assert [row["group"] for row in scheduler.audit()] == expected
        assert [scheduler.name(target) for target in scheduler.targets] == expected


def test_parts_of_one_module_have_names_of_their_own():
    net = named("a")["a"]
    net.scale = torch.nn.Parameter(torch.ones(2))
    rules = [([net.weight, net.bias], Constant(0.1)), ([net.scale], Constant(0.2))]
    optimizer = AdamW(torch.nn.ModuleDict({"a": net}).named_parameters(), weight_decay=0.1)
    scheduler = WeightDecayScheduler(optimizer, None, groups=rules, decoupled=True)
    names = [scheduler.name(target) for target in scheduler.targets]
    assert names == ["0[a]", "0[a.scale]"] and len(set(names)) == 2
    rules = [([net.weight, net.bias], Constant(0.1)), (r"^a\.", Constant(0.2))]
    net.shift = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW(torch.nn.ModuleDict({"a": net}).named_parameters(), weight_decay=0.1)
    scheduler = WeightDecayScheduler(optimizer, None, groups=rules, decoupled=True)
    names = [scheduler.name(target) for target in scheduler.targets]
    assert names == ["0[a.weight and 1 more]", "0[a.scale and 1 more]"]


def test_a_rule_that_chooses_nothing_warns():
    optimizer = AdamW(named("a").named_parameters(), weight_decay=0.1)
    with pytest.warns(UserWarning, match="'lora_' chooses no parameter"):
        WeightDecayScheduler(optimizer, FALL, groups=[("lora_", FALL)])


def test_a_rule_by_the_second_name_of_a_tied_weight_says_so():
    model = torch.nn.ModuleDict({"emb": torch.nn.Embedding(3, 2), "head": torch.nn.Linear(2, 3)})
    model["head"].weight = model["emb"].weight
    optimizer = AdamW(model["emb"].parameters(), weight_decay=0.1)
    options = {"groups": [("head.weight", None)], "model": model}
    with pytest.warns(UserWarning, match=r"yet: head\.weight is tied to emb\.weight\. Choose it"):
        WeightDecayScheduler(optimizer, FALL, **options)


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
    with pytest.raises(ValueError, match="must hold 1 schedulers, got 2"):
        WeightDecaySchedulers(both.schedulers[:1]).load_state_dict(both.state_dict())
    both.close()
    pull([w])
    muon.step()
    assert muon.param_groups[0]["weight_decay"] == FALL.rate(4)


def test_a_value_that_is_not_a_scheduler_is_refused():
    optimizer = AdamW(weights(), lr=0.1, weight_decay=0.1)
    for make in (WeightDecayLR, lambda o: WeightDecaySchedulers([o])):
        with pytest.raises(TypeError, match=r"is made of WeightDecayScheduler.*got AdamW"):
            make(optimizer)
    scheduler = WeightDecayScheduler(optimizer, FALL)
    with pytest.raises(TypeError, match="takes a list of them, got WeightDecayScheduler"):
        WeightDecaySchedulers(scheduler)
    adapter = WeightDecayLR(scheduler)
    with pytest.raises(TypeError, match=r"as SequentialLR does.*mf\.join"):
        SequentialLR(optimizer, [adapter, ConstantLR(optimizer)], [3])


@pytest.mark.parametrize("option", ["relative", "decoupled", "exact_off"])
def test_a_switch_is_true_or_false(option):
    """A third argument by position, such as the length of the run, would be ``relative``."""
    optimizer = AdamW(weights(), lr=0.1, weight_decay=0.1)
    with pytest.raises(TypeError, match=f"{option} must be True or False, got 1000"):
        WeightDecayScheduler(optimizer, FALL, **{option: 1000})
    with pytest.raises(TypeError, match="got a str"):
        WeightDecayScheduler(optimizer, FALL, model="net")


def test_several_as_one_report_what_each_reports():
    (w,), (v,) = weights(1), weights(1, seed=1)
    muon, sgd = Muon([w], lr=0.1, weight_decay=0.1), SGD([v], lr=0.1, momentum=0.9)
    sgd.param_groups[0]["weight_decay"] = 0.1
    with pytest.warns(UserWarning, match="by `pending`"):
        parts = [WeightDecayScheduler(o, FALL) for o in (muon, sgd)]
    with WeightDecaySchedulers(parts) as both:
        for t in range(4):
            pull([w, v])
            muon.step()
            if t % 2:
                sgd.step()
        assert both.steps == [4, 2]
        assert both.pending == [0.0, *parts[1].pending] and both.pending[1] < 0
        rows = [row for part in parts for row in part.audit()]
        assert [{k: v for k, v in row.items() if k != "optimizer"} for row in both.audit()] == rows
        assert {(row["optimizer"], row["kind"]) for row in both.audit()} == {
            (0, "decoupled"),
            (1, "sgd"),
        }
    assert not muon._optimizer_step_pre_hooks and not sgd._optimizer_step_pre_hooks
