"""Tensors of a group that differ have accounts of their own, and these are what acted on each."""

import copy
import math

import pytest
import torch
from torch.optim import SGD, AdamW

import mirrorflow as mf
from mirrorflow.weightdecay import WeightDecayScheduler

MAKE = {
    "adamw": lambda params: AdamW(params, lr=0.01, weight_decay=0.5),
    "sgd": lambda params: SGD(params, lr=0.01, weight_decay=0.5),
    "outside": lambda params: SGD(params, lr=0.01, weight_decay=0.5),
}
makes = pytest.mark.parametrize("make", MAKE)


def build(make, count=4):
    """Return tensors of different sizes at 1, their optimizer and its scheduler."""
    ws = [torch.nn.Parameter(torch.ones(2 + i, dtype=torch.float64)) for i in range(count)]
    optimizer = MAKE[make](ws)
    outside = make == "outside"
    return ws, optimizer, WeightDecayScheduler(optimizer, mf.Constant(0.5), decoupled=outside)


def train(ws, optimizer, routed):
    """Take steps in each of which some tensors have a gradient, of 0."""
    for active in routed:
        for i, w in enumerate(ws):
            w.grad = torch.zeros_like(w) if i in active else None
        optimizer.step()


def routes(steps, seed=0, count=4):
    generator = torch.Generator().manual_seed(seed)
    found = [torch.nonzero(torch.rand(count, generator=generator) < 0.6) for _ in range(steps)]
    return [{int(i) for i in one} - {count - 1} for one in found]  # the last is frozen


@makes
@pytest.mark.parametrize("seed", range(5))
def test_the_account_of_each_tensor_is_what_shrank_it(make, seed):
    ws, optimizer, scheduler = build(make)
    train(ws, optimizer, routes(20, seed))
    for w, row in zip(ws, scheduler.by_tensor(), strict=True):
        assert row["a"] == pytest.approx(row["steps"] * -0.005, abs=1e-15)
        assert w[0].item() == pytest.approx((1 - 0.005) ** row["steps"])
    assert scheduler.by_tensor()[-1]["a"] == 0
    moved = [(w.numel(), row["a"]) for w, row in zip(ws, scheduler.by_tensor(), strict=True)][:-1]
    mean = sum(n * a for n, a in moved) / sum(n for n, _ in moved)
    assert scheduler.accumulated == pytest.approx([mean])


def test_a_tensor_that_is_unfrozen_half_way_has_half():
    ws, optimizer, scheduler = build("adamw", count=2)
    train(ws, optimizer, [{0}] * 10 + [{0, 1}] * 10)
    assert [row["a"] for row in scheduler.by_tensor()] == pytest.approx([-0.1, -0.05])


def test_momentum_of_a_tensor_that_waits_keeps_what_it_holds():
    """The coefficient of the weights in a buffer, by the recursion of the buffer, per tensor."""
    ws = [torch.nn.Parameter(torch.full((1,), 1e6, dtype=torch.float64)) for _ in range(2)]
    optimizer = SGD(ws, lr=1e-9, momentum=0.9, weight_decay=0.5)
    scheduler = WeightDecayScheduler(optimizer, mf.Constant(0.5))
    train(ws, optimizer, [{0, 1}, {0}, {0}, {0, 1}, {1}])
    for w, row in zip(ws, scheduler.by_tensor(), strict=True):
        assert row["a"] == pytest.approx(math.log(w.item() / 1e6), rel=1e-6)


@makes
@pytest.mark.parametrize("whole", [True, False])
def test_the_accounts_resume_with_the_scheduler_or_the_optimizer_alone(make, whole):
    routed = routes(16)
    ws, optimizer, scheduler = build(make)
    train(ws, optimizer, routed[:9])
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    train(ws, optimizer, routed[9:])
    again, other, resumed = build(make)
    other.load_state_dict(saved[0])
    if whole:
        resumed.load_state_dict(saved[1])
        train(again, other, routed[9:])
        assert resumed.state_dict() == scheduler.state_dict()
    else:
        with pytest.warns(UserWarning, match="was not loaded"):
            train(again, other, routed[9:])
    assert resumed.by_tensor() == scheduler.by_tensor()
    assert resumed.accumulated == scheduler.accumulated


@pytest.mark.parametrize("resumed", [False, True])
def test_a_budget_is_that_of_the_tensor_that_absorbed_most(resumed):
    """Experts that are routed in turn, each of which decays in every fourth step."""
    experts = torch.nn.ModuleList(torch.nn.Linear(2, 2, bias=False) for _ in range(4))

    def begun():
        optimizer = AdamW(experts.parameters(), lr=0.01, weight_decay=1.0)
        return mf.ControlledDecay(experts, optimizer, mf.OffAtBudget(1.0, budget=0.05))

    def step(control, number):
        for i, expert in enumerate(experts):
            expert.weight.grad = torch.zeros(2, 2) if i == number % 4 else None
        control.scheduler.optimizer.step()
        control.step()

    control = begun()
    for number in range(24):
        if resumed and number == 10:
            saved = control.state_dict()
            optimizer = control.scheduler.optimizer.state_dict()
            control.close()
            control = begun()
            control.scheduler.optimizer.load_state_dict(optimizer)
            control.load_state_dict(saved)
        step(control, number)
    accounts = [row["a"] for row in control.scheduler.by_tensor()]
    assert accounts == pytest.approx([-0.05, -0.04, -0.04, -0.04])
    (row,), (loop,) = control.report().decay, control.report().loops
    assert (row.asked, row.acted, row.steps) == (pytest.approx(0.05), pytest.approx(0.05), 24)
    assert loop.fired_at == row.off_from == 17
    assert mf.preview(control.scheduler, 8).remarks == []


def test_what_a_run_has_left_of_a_budget_is_that_of_its_tensors():
    ws = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = AdamW(ws, lr=0.01, weight_decay=1.0)
    scheduler = WeightDecayScheduler(optimizer, mf.OffAtBudget(1.0, budget=0.5))
    train(ws, optimizer, [{step % 2} for step in range(20)])
    (remark,) = mf.preview(scheduler, 10).remarks
    assert "by step 30 it absorbs 0.2 of its budget" in remark


@makes
def test_the_accounts_of_older_checkpoints_are_taken(make):
    """They have a row for each tensor, with its place and three numbers."""
    routed = routes(16)
    ws, optimizer, scheduler = build(make)
    train(ws, optimizer, routed[:9])
    groups, state = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    rows = [(p, *row[1:4]) for row in state["entries"][0]["others"] for p in row[0]]
    assert len(rows) > 2
    state["entries"][0]["others"] = [list(row) for row in rows]
    del state["entries"][0]["left"]
    groups["param_groups"][0]["weight_decay_tensors"] = (tuple(rows),)
    train(ws, optimizer, routed[9:])
    again, other, resumed = build(make)
    other.load_state_dict(groups)
    resumed.load_state_dict(state)
    assert resumed.by_tensor() != scheduler.by_tensor()
    train(again, other, routed[9:])
    assert resumed.by_tensor() == scheduler.by_tensor()


def test_tensors_are_named_as_the_model_names_them():
    model = torch.nn.Linear(2, 2)
    optimizer = AdamW(model.named_parameters(), lr=0.1, weight_decay=0.1)
    scheduler = WeightDecayScheduler(optimizer, mf.Constant(0.1))
    assert [row["tensor"] for row in scheduler.by_tensor()] == ["weight", "bias"]
