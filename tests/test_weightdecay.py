"""WeightDecayScheduler against loops over param_groups written by hand."""

import copy
import io
import math
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, NAdam, RAdam, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from mirrorflow.schedule import Constant, Linear, SwitchOff
from mirrorflow.weightdecay import (
    CoupledDecayWarning,
    WeightDecayLR,
    WeightDecayScheduler,
    WeightDecaySchedulers,
    coupling,
)

FALL = Linear(0.5, 0.0, duration=6)
OFF = SwitchOff(0.5, at=4)
STEPS = 9

quiet = pytest.mark.filterwarnings("ignore::mirrorflow.weightdecay.CoupledDecayWarning")


class Plain(torch.optim.Optimizer):
    """A third-party optimizer: decays by 1 - wd, and keeps settings of its own in itself."""

    def __init__(self, params, lr=0.1, weight_decay=0.0, scale=1.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.scale = scale

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["weight_decay"]).sub_(self.scale * group["lr"] * p.grad)


MAKE = {
    "sgd": partial(SGD, lr=0.1),
    "sgd momentum": partial(SGD, lr=0.1, momentum=0.9, dampening=0.3),
    "sgd nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "sgd fused": partial(SGD, lr=0.1, momentum=0.9, fused=True),
    "adam": partial(Adam, lr=0.1),
    "adam fused": partial(Adam, lr=0.1, fused=True),
    "adamw": partial(AdamW, lr=0.1),
    "adamw foreach": partial(AdamW, lr=0.1, foreach=True),
    "adamw fused": partial(AdamW, lr=0.1, fused=True),
    "muon": partial(Muon, lr=0.1),
    "third party": partial(Plain, lr=0.1, scale=2.0),
}
optimizers = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def weights(n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(n)]


def pull(params):
    """The gradient of a loss whose minimum is not 0."""
    for i, p in enumerate(params):
        p.grad = (p.detach() - 1.0 - i) * 0.5


def two_groups(make, params, decay=0.3):
    return make(
        [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}], weight_decay=decay
    )


def by_hand(make, schedule, steps=STEPS, lr_at=None):
    params = weights()
    optimizer = two_groups(make, params)
    for t in range(steps):
        optimizer.param_groups[0]["weight_decay"] = schedule(t)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(t) if lr_at else group["lr"]
        pull(params)
        optimizer.step()
    return params


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


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
    assert_equal(params, by_hand(make, schedule.rate))
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
@pytest.mark.parametrize("convention", ["follow-lr", "fixed", "adamc"])
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

    factor = {
        "follow-lr": lambda t: FALL.rate(t),
        "fixed": lambda t: FALL.rate(t) / lr_at(t),
        "adamc": lambda t: FALL.rate(t) * lr_at(t) / 0.1,
    }[convention]
    for ours, theirs in zip(params, by_hand(MAKE["adamw"], factor, lr_at=lr_at), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_learning_rate_of_0_is_no_division_by_0():
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


# Which groups


def named(*parts):
    return torch.nn.ModuleDict({part: torch.nn.Linear(2, 2) for part in parts})


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
    assert [row["group"] for row in scheduler.audit()] == ["0[1]", "0[0]"]


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
    with pytest.raises(ValueError, match=r"LBFGS has no weight_decay.*decoupled=True"):
        WeightDecayScheduler(optimizer, OFF)
    scheduler = WeightDecayScheduler(optimizer, SwitchOff(0.5, at=1), decoupled=True)
    before = [p.detach().clone() for p in params]

    def closure():
        for p in params:
            p.grad = torch.zeros_like(p)
        return torch.zeros(())

    optimizer.step(closure)
    optimizer.step(closure)
    assert_equal(params, [p * 0.75 for p in before])
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
    assert_equal(params, by_hand(MAKE["adamw"], FALL.rate))


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
    assert_equal(params, by_hand(MAKE["adamw"], FALL.rate, steps=3))


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


# Decay from outside


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize(
    ("plain", "twin"),
    [
        (partial(Adam, lr=0.1), partial(AdamW, lr=0.1)),
        (partial(NAdam, lr=0.1), partial(NAdam, lr=0.1, decoupled_weight_decay=True)),
        (partial(RAdam, lr=0.1), partial(RAdam, lr=0.1, decoupled_weight_decay=True)),
        (partial(Muon, lr=0.1), partial(Muon, lr=0.1)),
    ],
    ids=["adam", "nadam", "radam", "muon"],
)
def test_decay_from_outside_is_the_optimizers_own_decoupled_one(plain, twin, with_closure):
    params = weights()
    optimizer = two_groups(plain, params)
    WeightDecayScheduler(optimizer, OFF, decoupled=True)
    for _ in range(STEPS):
        if with_closure:
            optimizer.step(lambda: pull(params))
        else:
            pull(params)
            optimizer.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]
    assert_equal(params, by_hand(twin, OFF.rate))


def test_decay_from_outside_of_sgd_with_momentum_as_written_out():
    params = weights(1)
    optimizer = SGD(params, lr=0.25, momentum=0.5, weight_decay=1.0)
    scheduler = WeightDecayScheduler(optimizer, OFF, decoupled=True)
    w, b = params[0].detach().clone(), torch.zeros(3, 2)
    for t in range(STEPS):
        pull(params)
        optimizer.step()
        g = (w - 1.0) * 0.5
        w = w * (1 - 0.25 * OFF.rate(t))
        b = 0.5 * b + g
        w = w - 0.25 * b
    assert torch.equal(params[0], w)
    assert scheduler.accumulated == [-0.5] and scheduler.pending == [0.0]


@pytest.mark.parametrize("make", [partial(SGD, lr=0.1, momentum=0.9), partial(Adam, lr=0.1)])
def test_off_is_off_only_from_outside(make):
    def shrinks_after_the_switch(decoupled):
        w = torch.nn.Parameter(torch.ones(2, 2))
        optimizer = make([w], weight_decay=0.5)
        WeightDecayScheduler(optimizer, SwitchOff(0.5, at=2), decoupled=decoupled)
        values = []
        for _ in range(4):
            w.grad = torch.zeros_like(w)
            optimizer.step()
            values.append(w[0, 0].item())
        return values[-1] < values[1]

    with pytest.warns(CoupledDecayWarning, match="decoupled=True"):
        assert shrinks_after_the_switch(decoupled=False)
    assert not shrinks_after_the_switch(decoupled=True)


def test_weights_without_a_gradient_are_left_alone():
    a, b = weights()
    optimizer = SGD([a, b], lr=0.5, weight_decay=0.1)
    scheduler = WeightDecayScheduler(optimizer, Constant(0.5), decoupled=True)
    before = b.detach().clone()
    a.grad = torch.zeros_like(a)
    optimizer.step()
    assert torch.equal(b, before) and scheduler.accumulated == [-0.25]
    a.grad = None
    optimizer.step()
    assert scheduler.accumulated == [-0.25] and scheduler.steps == 2


# How a decay acts, and what is said of it


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (SGD, "sgd"),
        (Adam, "coupled"),
        (partial(Adam, fused=True), "coupled"),
        (partial(Adam, decoupled_weight_decay=True), "decoupled"),
        (AdamW, "decoupled"),
        (Muon, "decoupled"),
        (torch.optim.Adafactor, "decoupled"),
        (RMSprop, "coupled"),
        (Adagrad, "coupled"),
        (torch.optim.Adadelta, "coupled"),
        (torch.optim.Adamax, "coupled"),
        (NAdam, "coupled"),
        (partial(RAdam, decoupled_weight_decay=True), "decoupled"),
        (torch.optim.ASGD, "coupled"),
        (Plain, "fixed"),
        (torch.optim.LBFGS, "unknown"),
    ],
)
def test_coupling_is_found_by_trying(make, kind):
    params = weights(1)
    optimizer = make(params)
    CosineAnnealingLR(optimizer, T_max=9)  # patches step with one that steps this optimizer
    before = params[0].detach().clone()
    state = dict(optimizer.state)
    assert coupling(optimizer, optimizer.param_groups[0]) == kind
    assert torch.equal(params[0], before) and dict(optimizer.state) == state


@pytest.mark.parametrize(
    ("make", "schedule", "said"),
    [
        (partial(SGD, lr=0.1, momentum=0.9), OFF, True),
        (partial(SGD, lr=0.1, momentum=0.9), Constant(0.1), False),
        (partial(SGD, lr=0.1), OFF, False),
        (Adam, OFF, True),
        (AdamW, OFF, False),
        (Muon, OFF, False),
        (Plain, OFF, False),
    ],
)
def test_coupled_decay_is_said_where_it_matters(make, schedule, said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        WeightDecayScheduler(make(weights(), weight_decay=0.1), schedule)
    assert [w.category for w in caught] == [CoupledDecayWarning] * said


def test_who_knows_the_coupling_may_say_it():
    class Odd(Plain):
        def step(self, closure=None):
            if self.table["x"]:  # not plain, so that trying it fails
                super().step()

        table = property(lambda self: self.parts[0])

    def make():
        optimizer = Odd(weights(), lr=0.5, weight_decay=0.1)
        optimizer.parts = [{"x": 1}]
        return optimizer

    with pytest.warns(CoupledDecayWarning, match='coupling="decoupled"'):
        WeightDecayScheduler(make(), Constant(0.1))
    optimizer = make()
    scheduler = WeightDecayScheduler(optimizer, Constant(0.1), coupling="fixed")
    pull(optimizer.param_groups[0]["params"])
    optimizer.step()
    assert scheduler.accumulated == [-0.1]


# Stopping and resuming


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
    assert again[1].accumulated == pytest.approx(parts[1].accumulated, rel=1e-15)
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
    assert_equal(params, by_hand(MAKE["adamw"], FALL.rate, steps=3))
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "sgd momentum"])
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step(name):
    torch._dynamo.reset()
    params = weights()
    optimizer = two_groups(MAKE[name], params)
    scheduler = WeightDecayScheduler(optimizer, FALL)
    counters = torch._dynamo.utils.counters
    counters.clear()
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(12):
        pull(params)
        step()
    torch.testing.assert_close(params, by_hand(MAKE[name], FALL.rate, steps=12))
    assert scheduler.steps == 12
    assert counters["stats"]["unique_graphs"] <= 8  # not one a step
