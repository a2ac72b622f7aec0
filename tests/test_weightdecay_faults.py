"""Optimizers that step in parts, stand in for others or come wrapped, and schedules of nothing."""

import pickle
import warnings

import pytest
import torch
from torch.optim import SGD, AdamW

import mirrorflow as mf
from mirrorflow.weightdecay import WeightDecayScheduler, coupling, lint, preview
from optimizers import OFF, named, pull, quiet, weights

# Steps in parts, as of the sub-groups of ZeRO-3


def in_parts(make, parts, steps, scheduler=None, groups=1, empty=True, **options):
    """Step each tensor alone, as ZeRO-3 does; return the scheduler and the tensors."""
    params = weights(parts)
    optimizer = make([{"params": params[g::groups]} for g in range(groups)])
    if empty:
        for group in optimizer.param_groups:
            group["params"] = []
    scheduler = WeightDecayScheduler(optimizer, scheduler or OFF, **options)
    for group in optimizer.param_groups:
        group["params"] = []
    for _ in range(steps):
        for place, p in enumerate(params):
            optimizer.param_groups[place % groups]["params"] = [p]
            p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.param_groups[place % groups]["params"] = []
        scheduler.step()
    return scheduler, params


@quiet
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda g: AdamW(g, lr=0.1, weight_decay=0.3), {}),
        (lambda g: AdamW(g, lr=0.1, weight_decay=0.3), {"decoupled": True}),
        (lambda g: SGD(g, lr=0.1, weight_decay=0.3), {}),
        (lambda g: SGD(g, lr=0.1, momentum=0.9, weight_decay=0.3), {}),
        (lambda g: SGD(g, lr=0.1, momentum=0.9, weight_decay=0.3), {"exact_off": True}),
    ],
    ids=["adamw", "outside", "plain", "sgd", "exact"],
)
def test_a_step_in_parts_is_one_step(make, options, parts, groups, empty):
    scheduler, params = in_parts(make, parts, 9, groups=groups, empty=empty, **options)
    whole = weights(parts)
    optimizer = make([{"params": whole[g::groups]} for g in range(groups)])
    expected = WeightDecayScheduler(optimizer, OFF, **options)
    for _ in range(9):
        for p in whole:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert scheduler.steps == 9
    assert scheduler.accumulated == pytest.approx(expected.accumulated, rel=1e-12)
    torch.testing.assert_close(params, whole)


def test_a_part_that_failed_is_tried_again_in_the_same_step():
    params = weights(2)
    optimizer = AdamW(params, lr=0.1, weight_decay=0.3)
    scheduler = WeightDecayScheduler(optimizer, OFF)

    def closure(p, good):
        if not good:
            raise KeyboardInterrupt
        p.grad = torch.zeros_like(p)

    for _ in range(3):
        for p in params:
            optimizer.param_groups[0]["params"] = [p]
            with pytest.raises(KeyboardInterrupt):
                optimizer.step(lambda p=p: closure(p, False))
            optimizer.step(lambda p=p: closure(p, True))
    assert scheduler.steps == 3
    assert scheduler.accumulated == [pytest.approx(-0.1 * sum(map(OFF.rate, range(3))))]


@quiet
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("momentum", [None, 0.0, 0.9])
def test_a_step_with_new_tensors_in_the_place_of_all_is_a_step(momentum, outside):
    """As where Gaussians are split: the parameter is made anew, with its state or without."""

    def begun():
        w, options = torch.nn.Parameter(torch.ones(3)), {"lr": 0.1, "weight_decay": 0.1}
        if momentum is None:
            optimizer = AdamW([w], **options)
        else:
            optimizer = SGD([w], momentum=momentum, **options)
        return w, WeightDecayScheduler(optimizer, mf.SwitchOff(0.1, at=20), decoupled=outside)

    def step(w, optimizer):
        w.grad = torch.zeros_like(w)
        optimizer.step()

    (w, scheduler), (whole, expected) = begun(), begun()
    optimizer = scheduler.optimizer
    for number in range(40):
        step(w, optimizer)
        step(whole, expected.optimizer)
        if number % 5 == 4:
            before, w = w, torch.nn.Parameter(w.detach().clone())
            if before in optimizer.state:
                optimizer.state[w] = optimizer.state.pop(before)
            optimizer.param_groups[0]["params"] = [w]
            del before
    assert scheduler.steps == 40
    assert scheduler.accumulated == expected.accumulated
    torch.testing.assert_close(w, whole)


def test_one_tensor_after_another_in_turn_is_a_step_each():
    """Experts that are routed in turn: the groups do not change, so each call is a step."""
    a, b = weights()
    optimizer = AdamW([{"params": [a]}, {"params": [b]}], lr=0.1, weight_decay=0.3)
    scheduler = WeightDecayScheduler(optimizer, OFF)
    for step in range(6):
        a.grad, b.grad = (torch.zeros_like(a), None) if step % 2 else (None, torch.zeros_like(b))
        optimizer.step()
    assert scheduler.steps == 6


def test_a_group_that_is_added_begins_no_part_of_the_last_step():
    a, b = weights()
    optimizer = AdamW([a], lr=0.1, weight_decay=0.3)
    scheduler = WeightDecayScheduler(optimizer, OFF)
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": [b]})
        a.grad, b.grad = (torch.zeros_like(a), None) if step < 2 else (None, torch.zeros_like(b))
        optimizer.step()
    assert scheduler.steps == 4


# Nothing to schedule, and why


def test_rules_that_match_nothing_are_named_as_the_reason():
    model = named("query", "key")
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with (
        pytest.warns(UserWarning, match="'lora_' chooses no parameter"),
        pytest.raises(ValueError, match=r"no rule of groups= chooses .* weight_decay \[0\.1\]"),
    ):
        WeightDecayScheduler(optimizer, None, groups=[("lora_", OFF)], model=model)
    assert "initial_weight_decay" not in optimizer.param_groups[0]


def test_groups_without_tensors_are_named_as_the_reason():
    groups = [{"params": weights(), "weight_decay": 0.0}, {"params": []}]
    with pytest.raises(ValueError, match=r"nothing to schedule: no tensor is in .*\[1\]"):
        WeightDecayScheduler(AdamW(groups, weight_decay=0.1), OFF)


@pytest.mark.parametrize("target", [0.5, 0.0, -1.0, 0.999])
def test_a_target_that_no_ratio_reaches_is_refused(target):
    with pytest.raises(ValueError, match=rf"target must be >= 1, .* got {target}\. .*lowest="):
        mf.OffBelow(0.1, target=target)
    off = mf.OffBelow(0.1, target=target, lowest=target)  # of a loss, say
    assert [off.update(k, target + v) for k, v in enumerate((1.0, 0.0))] == [0.1, 0.0]


LATE = [
    mf.SwitchOff(-0.1, at=5),
    mf.Constant(-0.1),
    mf.Linear(0.1, -0.1, 1000),
    mf.Cosine(0.1, -0.1, 1000),
    mf.Piecewise([900], [0.1, -0.1]),
    mf.join([(mf.Linear(0.1, -0.1, 900), 600), (mf.Constant(0.1), None)]),  # before a joint
    mf.Cyclic(mf.Linear(0.1, -0.1, 900), 800, 3),
]


@pytest.mark.parametrize("schedule", LATE, ids=repr)
@pytest.mark.parametrize("rules", [False, True])
def test_a_decay_that_is_negative_late_in_the_run_is_refused_before_it(schedule, rules):
    p = weights(1)
    optimizer = AdamW(p, lr=0.1, weight_decay=0.1)
    options = {"groups": [(0, schedule)]} if rules else {}
    with pytest.raises(ValueError, match="a weight decay must be >= 0 at all steps, got -0"):
        WeightDecayScheduler(optimizer, None if rules else schedule, **options)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("end", [7, 1000, 12345])
@pytest.mark.parametrize("kind", [mf.Linear, mf.Cosine])
def test_a_ramp_to_zero_is_taken(kind, end):
    cycles = mf.Cyclic(kind(0.3, 0.0, end), end, 9)
    for schedule in (kind(0.3, 0.0, end), kind(0.0, 0.3, end), cycles):
        WeightDecayScheduler(AdamW(weights(1), lr=0.1, weight_decay=0.1), schedule)


@pytest.mark.parametrize("made", [None, mf.Constant(0.1), mf.OffAtBudget(0.1, budget=1.0)])
def test_a_preview_needs_a_scheduler_and_says_so(made):
    with pytest.raises(TypeError, match="scheduler must be a WeightDecayScheduler, got"):
        preview(made, 10)


@pytest.mark.parametrize("target", [0.5, 0.999])
def test_a_ratio_that_cannot_be_held_is_refused(target):
    with pytest.raises(ValueError, match=rf"target must be >= 1, .* got {target}\. .*lowest="):
        mf.HoldRatio(target, 0.1)
    hold = mf.HoldRatio(target, 0.1, lowest=0.0)  # of a norm, say
    assert hold.update(0, 2 * target) > 0.1


@pytest.mark.parametrize("budget", [0.05, 5.0])
def test_the_preview_says_that_a_budget_is_never_absorbed(budget):
    optimizer = AdamW(weights(), lr=0.1, weight_decay=0.1)
    seen = preview(WeightDecayScheduler(optimizer, mf.OffAtBudget(0.1, budget)), 20)
    assert [r.startswith("OffAtBudget never switches off") for r in seen.remarks] == [True] * (
        budget == 5.0
    )


# Optimizers that stand in for others, or are wrapped


class StandIn(torch.optim.Optimizer):
    """The Trainer's layer-wise optimizer: one tensor that nothing trains, and an empty step."""

    def __init__(self, **settings):
        super().__init__([torch.randn(1, 1)], {"lr": 0.1, **settings})

    def step(self, closure=None):
        pass


def test_a_stand_in_is_not_advised_to_decay_its_dummy():
    with pytest.raises(ValueError, match=r"StandIn whose tensors need no gradient") as refused:
        WeightDecayScheduler(StandIn(), OFF)
    assert "decoupled" not in str(refused.value)
    with pytest.raises(ValueError, match="stands in for others"):
        WeightDecayScheduler(StandIn(), OFF, decoupled=True)


def silent_steps(optimizer, steps, **options):
    """Return the warnings of a run without gradients."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        WeightDecayScheduler(optimizer, OFF, coupling="decoupled", **options)
        for _ in range(steps):
            optimizer.step()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("steps", [4, 5, 12])
def test_a_schedule_whose_tensors_never_get_a_gradient_warns_once_by_step_5(steps):
    (*said,) = silent_steps(AdamW(weights(), lr=0.1, weight_decay=0.1), steps)
    assert len(said) == (steps >= 5)
    assert all("group 0 had a gradient in the first 5 steps" in text for text in said)
    assert len(silent_steps(StandIn(weight_decay=0.1), steps)) == (steps >= 5)


def test_a_gradient_now_and_then_is_no_reason_to_warn():
    a, b = weights()
    optimizer = AdamW([{"params": [a]}, {"params": [b], "weight_decay": 0.0}], weight_decay=0.1)
    WeightDecayScheduler(optimizer, OFF)
    for step in range(9):
        a.grad = torch.zeros_like(a) if step == 3 else None
        optimizer.step()  # the second group has no schedule, and no gradient


class Zero:
    """DeepSpeed's ZeRO optimizer, which is not a torch optimizer and holds one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


class Wrapper(torch.optim.Optimizer):
    """accelerate's wrapper: an Optimizer by its class, made without its constructor."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_wrappers_are_unwrapped_down_to_what_steps():
    optimizer = AdamW(weights(), weight_decay=0.1)
    wrapped = Wrapper(Zero(Wrapper(optimizer)))
    assert WeightDecayScheduler(wrapped, OFF).optimizer is optimizer
    assert lint(wrapped) == []


@pytest.mark.parametrize("options", [{}, {"decoupled": True}])
def test_groups_that_are_stepped_one_by_one_make_one_step(options):
    def made():
        a, b = weights(), weights()
        groups = [{"params": a}, {"params": b, "weight_decay": 0.4}]
        return AdamW(groups, lr=0.01, weight_decay=0.1), [*a, *b]

    whole, right = made()
    expected = WeightDecayScheduler(whole, mf.SwitchOff(0.5, at=3), **options)
    lent, ours = made()
    scheduler = WeightDecayScheduler(lent, mf.SwitchOff(0.5, at=3), **options)
    for _ in range(6):
        for p in (*right, *ours):
            p.grad = torch.ones_like(p)
        whole.step()
        groups = lent.param_groups
        for group in groups:  # as ZeRO 1 and 2 do
            lent.param_groups = [group]
            lent.step()
            lent.param_groups = groups
    assert scheduler.steps == expected.steps == 6
    assert scheduler.accumulated == pytest.approx(expected.accumulated)
    assert all(torch.equal(p, q) for p, q in zip(ours, right, strict=True))
    assert [g["weight_decay"] for g in lent.param_groups] == [0.0, 0.0]
    copied = pickle.loads(pickle.dumps(lent.state_dict()))
    again, _ = made()
    fresh = WeightDecayScheduler(again, mf.SwitchOff(0.5, at=3), **options)
    again.load_state_dict(copied)
    assert fresh.steps == 6 and fresh.accumulated == pytest.approx(scheduler.accumulated)


@pytest.mark.parametrize("what", [Wrapper(Zero(None)), Wrapper(Zero(object()))])
def test_a_wrapper_around_nothing_that_steps_is_refused_in_a_sentence(what):
    with pytest.raises(TypeError, match="holds no torch"):
        WeightDecayScheduler(what, OFF)


# Lint


class Marked(torch.nn.Module):
    def __init__(self, mark):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3, bias=False)
        self.table = torch.nn.Parameter(torch.ones(4, 3))
        if mark:
            self.table._no_weight_decay = True

    def no_weight_decay(self):
        return {"module.table"}


def found(model, *code, make=AdamW):
    finding = lint(make(model.parameters(), weight_decay=0.1), model)
    return [(f.code, f.level) for f in finding if not code or f.code in code]


def test_tensors_whose_model_asks_for_no_decay_are_found():
    marked = Marked(mark=True)
    assert found(marked) == [("decayed-marked", "warning")]
    assert [f.code for f in lint(AdamW(marked.parameters(), weight_decay=0.1))] == [
        "decayed-marked"
    ]
    listed = Marked(mark=False)
    (only,) = lint(AdamW(listed.parameters(), weight_decay=0.1), listed)
    assert only.code == "decayed-marked" and "(table)" in str(only)
    groups = [
        {"params": [listed.linear.weight]},
        {"params": [listed.table], "weight_decay": 0.0},
    ]
    assert lint(AdamW(groups, weight_decay=0.1), listed) == []


def test_scales_of_shape_c_1_1_are_vectors():
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.ones(3, 3, 2, 2))
    model.scale = torch.nn.Parameter(torch.ones(3, 1, 1))
    assert found(model) == [("decayed-vectors", "warning")]
    model.scale = torch.nn.Parameter(torch.ones(3, 2, 1, 1))  # a convolution of one by one
    assert found(model) == []


def test_embeddings_that_decay_are_noted():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 3, bias=False))
    assert found(model) == [("decayed-embedding", "note")]
    groups = [
        {"params": model[0].parameters(), "weight_decay": 0.0},
        {"params": model[1].parameters()},
    ]
    assert lint(AdamW(groups, weight_decay=0.1), model) == []


def test_a_flat_parameter_is_noted():
    model = torch.nn.Module()
    model._flat_param = torch.nn.Parameter(torch.ones(50))
    assert found(model) == [("flat-parameter", "note")]
    assert coupling(AdamW(model.parameters()), {"params": []}) == "decoupled"
    pull(model.parameters())
