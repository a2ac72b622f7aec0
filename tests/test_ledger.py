"""The account of what was absorbed, its units, and the preview of it."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
)

from mirrorflow.schedule import Constant, Cosine, Joined, Linear, SwitchOff, join
from mirrorflow.weightdecay import (
    Scaled,
    WeightDecayScheduler,
    budget,
    convert,
    learning_rates,
    preview,
    scale_to_budget,
    table,
)
from mirrorflow.weightdecay._ledger import Entry

FALL = Linear(0.5, 0.0, duration=6)
quiet = pytest.mark.filterwarnings("ignore::mirrorflow.weightdecay.CoupledDecayWarning")

matplotlib = pytest.importorskip("matplotlib")  # the lowest versions are tested without


def run(scheduler, steps, lr=None):
    """Step with a gradient of 0, so that the weights show the decay alone; give their path."""
    params = [p for group in scheduler.optimizer.param_groups for p in group["params"]]
    path = [params[0].detach().clone()]
    for _ in range(steps):
        for p in params:
            p.grad = torch.zeros_like(p)
        scheduler.optimizer.step()
        if lr is not None:
            lr.step()
        path.append(params[0].detach().clone())
    return torch.stack(path).double()


def one_weight():
    return [torch.nn.Parameter(torch.ones(1, dtype=torch.float64))]


# The sum


def test_decoupled_decay_is_the_product_that_the_weights_feel():
    scheduler = WeightDecayScheduler(AdamW(one_weight(), lr=0.01, weight_decay=0.1), FALL)
    path = run(scheduler, 8, CosineAnnealingLR(scheduler.optimizer, T_max=8))
    factors = (path[1:] / path[:-1]).ravel()
    assert scheduler.accumulated == [pytest.approx((factors - 1).sum().item(), rel=1e-12)]


@quiet
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.5, "fused": True, "nesterov": True},
    ],
)
@pytest.mark.parametrize("schedule", [FALL, SwitchOff(0.5, at=3)])
def test_momentum_is_accounted_for(schedule, options):
    """SGD is linear: w_T = w_0 - sum_s k_s decay_s w_s; the ledger is sum_s k_s decay_s."""
    optimizer = SGD(one_weight(), lr=0.1, weight_decay=1.0, **options)
    scheduler = WeightDecayScheduler(optimizer, schedule)
    steps = 10
    path = run(scheduler, steps)
    m, d = options.get("momentum", 0.0), options.get("dampening", 0.0)
    k = np.zeros(steps)
    for s in range(steps):
        for t in range(s, steps):
            enters = (
                1.0 if s == 0 else 1 - d
            )  # torch takes the first gradient into the buffer whole
            passed = m ** (t - s) * enters
            k[s] += 0.1 * (m * passed + (t == s) if options.get("nesterov") else passed)
    coefficients = k * [schedule.rate(s) for s in range(steps)]
    moved = (path[0] - path[-1]).item()
    assert moved == pytest.approx(float(coefficients @ path[:-1, 0].numpy()), rel=1e-12)
    assert scheduler.accumulated == [pytest.approx(-coefficients.sum(), rel=1e-12)]


@quiet
@pytest.mark.parametrize("nesterov", [False, True])
def test_pending_is_what_momentum_does_after_the_switch(nesterov):
    optimizer = SGD(one_weight(), lr=0.1, momentum=0.9, weight_decay=1.0, nesterov=nesterov)
    scheduler = WeightDecayScheduler(optimizer, SwitchOff(0.5, at=3))
    run(scheduler, 3)
    expected = scheduler.accumulated[0] + scheduler.pending[0]
    assert scheduler.pending[0] < -0.05
    run(scheduler, 400)
    assert scheduler.accumulated == [pytest.approx(expected, rel=1e-12)]
    assert scheduler.pending == [pytest.approx(0.0, abs=1e-15)]


def test_a_buffer_that_was_there_before_is_not_the_first():
    params = one_weight()
    optimizer = SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    scheduler = WeightDecayScheduler(optimizer, None, groups=[(0, Constant(0.5))])
    run(scheduler, 1)
    assert scheduler.accumulated == [-0.1 * 0.5 * 0.5]


def test_no_number_is_invented_for_adams_l2():
    with pytest.warns(UserWarning, match="`accumulated` is NaN"):
        scheduler = WeightDecayScheduler(
            Adam(one_weight(), lr=0.1, weight_decay=0.1), SwitchOff(0.1, at=2)
        )
    assert scheduler.accumulated == [0.0]
    run(scheduler, 4)
    assert math.isnan(scheduler.accumulated[0]) and math.isnan(scheduler.pending[0])
    assert {row["kind"] for row in scheduler.audit()} == {"coupled"}


# The record


def test_the_record_keeps_the_switch_and_sums_to_the_total():
    off = join([(Cosine(1.0, 0.1, duration=500), 500), (Constant(0.0), 300), (Constant(0.2), None)])
    entry = Entry("decoupled")
    for step in range(2000):
        entry.record(step, off.rate(step), {"lr": 1 / (step + 1)})
    assert len(entry.pieces) <= 64
    assert [p.start for p in entry.pieces[1:]] == [p.stop for p in entry.pieces[:-1]]
    assert {(p.start, p.stop) for p in entry.pieces if p.decay == 0} == {(500, 800)}
    exact = math.fsum(off.rate(t) / (t + 1) for t in range(2000))
    assert -entry.accumulated == pytest.approx(exact, rel=1e-13)
    assert sum(p.absorbed for p in entry.pieces) == pytest.approx(exact, rel=1e-13)


def test_the_record_of_nothing_but_switches_stays_short():
    entry = Entry("decoupled")
    for step in range(3000):
        entry.record(step, float(step % 2), {"lr": 1.0})
    assert len(entry.pieces) <= 64 and entry.absorbed == 1500.0
    assert sum(p.absorbed for p in entry.pieces) == 1500.0


def test_the_audit_as_a_table():
    scheduler = WeightDecayScheduler(
        AdamW(one_weight(), lr=0.5, weight_decay=0.1), SwitchOff(0.25, at=2)
    )
    run(scheduler, 3)
    assert table(scheduler.audit()).splitlines() == [
        "group  kind       start  stop  decay  decay_end  lr   lr_end  absorbed  a",
        "0      decoupled  0      2     0.25   0.25       0.5  0.5     0.25      -0.25",
        "0      decoupled  2      3     0      0          0.5  0.5     0         -0.25",
    ]


# The preview is the run


def warm_up(optimizer):
    parts = [LinearLR(optimizer, 0.1, total_iters=3), CosineAnnealingLR(optimizer, T_max=9)]
    return SequentialLR(optimizer, parts, milestones=[3])


@quiet
@pytest.mark.parametrize(
    "make_lr",
    [
        lambda optimizer: None,
        partial(CosineAnnealingLR, T_max=9),
        warm_up,
        partial(LambdaLR, lr_lambda=[lambda t: 1 / (t + 1), lambda t: 1.0]),
        partial(OneCycleLR, max_lr=0.3, total_steps=20),
    ],
)
@pytest.mark.parametrize("options", [{}, {"convention": "adamc", "peak": 0.3}, {"decoupled": True}])
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_the_preview_is_what_the_audit_finds(make_lr, options):
    groups = [{"params": one_weight()}, {"params": one_weight(), "weight_decay": 0.0}]
    optimizer = SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.2)
    scheduler = WeightDecayScheduler(optimizer, FALL, **options)
    lr = make_lr(optimizer)
    state = str(lr.state_dict()) if lr else None
    seen = preview(scheduler, 9, lr)
    assert scheduler.steps == 0 and (lr is None or str(lr.state_dict()) == state)
    path = run(scheduler, 4, lr)
    later = preview(scheduler, 5, lr)
    run(scheduler, 5, lr)
    assert seen.rows == later.rows == scheduler.audit()
    assert path.shape == (5, 1) and seen.curves["0"][2][-1] == scheduler.accumulated[0]


def test_the_preview_takes_learning_rates_and_draws():
    matplotlib.use("Agg")
    optimizer = AdamW(one_weight(), lr=0.5, weight_decay=0.1)
    scheduler = WeightDecayScheduler(optimizer, SwitchOff(0.5, at=2))
    seen = preview(scheduler, 3, [0.5, 0.25, 0.125])
    assert seen.curves["0"] == ([0.5, 0.25, 0.125], [0.5, 0.5, 0.0], [-0.25, -0.375, -0.375])
    drawn = [axis.lines[0].get_ydata().tolist() for axis in seen.plot().axes]
    assert drawn == [[0.5, 0.5, 0.0], [0.25, 0.125, 0.0], [-0.25, -0.375, -0.375]]
    assert str(seen).startswith(table(seen.rows) + "\n")
    with pytest.raises(ValueError, match="2 learning rates for 3 steps"):
        preview(scheduler, 3, [0.5, 0.25])


def test_learning_rates_are_those_of_the_scheduler():
    optimizer = SGD(one_weight(), lr=0.1)
    lr = warm_up(optimizer)
    seen = learning_rates(lr, 8)
    really = []
    for _ in range(8):
        really.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        lr.step()
    assert seen == really and len(set(really)) > 5


# Units


@pytest.mark.parametrize("unit", ["decay", "per step", "half-life", "time scale", "budget"])
def test_units_go_back_and_forth(unit):
    there = convert(0.3, "decay", unit, lr=0.01, steps=100)
    assert convert(there, unit, "decay", lr=0.01, steps=100) == pytest.approx(0.3, rel=1e-12)


def test_units_are_what_their_names_say():
    assert convert(0.5, "decay", "budget", lr=0.25, steps=8) == 1.0
    assert convert(0.5, "decay", "time scale", lr=0.25) == 8.0
    assert 0.875 ** convert(0.5, "decay", "half-life", lr=0.25) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="one of decay, per step, half-life"):
        convert(0.5, "decay", "fortnight", lr=0.25)
    with pytest.raises(ValueError, match="value must be a number > 0, got 0"):
        convert(0.0, "decay", "half-life", lr=0.25)
    for wrong, given in (
        ("value", {"value": "a"}),
        ("lr", {"lr": "0.1"}),
        ("steps", {"steps": None}),
    ):
        with pytest.raises(TypeError, match=f"{wrong} must be a number, got {given[wrong]!r}"):
            convert(**{"value": 0.5, "unit": "decay", "to": "budget", "lr": 0.25, **given})
    with pytest.raises(ValueError, match="< 1 for a half-life, got"):
        convert(4.0, "decay", "half-life", lr=0.25)


def test_equal_budgets_are_equal_in_a_run():
    def spent(schedule):
        optimizer = AdamW(one_weight(), lr=0.1, weight_decay=0.1)
        scheduler = WeightDecayScheduler(optimizer, schedule)
        lr = CosineAnnealingLR(optimizer, T_max=40)
        rates = learning_rates(lr, 40)
        run(scheduler, 40, lr)
        return scheduler.accumulated[0], rates

    constant, rates = spent(Constant(0.1))
    matched = scale_to_budget(SwitchOff(0.3, at=10), lambda step: 0.1, rates)
    assert isinstance(matched, Scaled) and matched.breakpoints == (10,)
    assert spent(matched)[0] == pytest.approx(constant, rel=1e-12)
    assert spent(SwitchOff(0.3, at=10))[0] != pytest.approx(constant, rel=0.1)
    assert matched.integral(7.0) == pytest.approx(matched.factor * 2.1)


def test_budget_mistakes_are_named():
    with pytest.raises(ValueError, match="needs steps="):
        budget(FALL, 0.1)
    with pytest.raises(ValueError, match="steps=3, but there are 2"):
        budget(FALL, [0.1, 0.2], steps=3)
    late: Joined = join([(Constant(0.0), 50), (Constant(1.0), None)])
    with pytest.raises(ValueError, match="is 0 over 10 steps"):
        scale_to_budget(late, FALL, 0.1, steps=10)


@pytest.mark.parametrize(("product", "part"), [(1e-4, 0.009), (1e-3, 0.11)])
def test_by_how_much_the_account_of_momentum_differs_where_decay_acts_alone(product, part):
    """docs/what-acts.md: by about the part lr decay mu / (1 - mu)^2, here at mu = 0.9."""
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = SGD([weight], lr=0.01, momentum=0.9, weight_decay=1.0)
    scheduler = WeightDecayScheduler(optimizer, Constant(product / 0.01))
    shrunk, told = [], []
    for _ in range(300):
        before, weight.grad = weight[0].item(), torch.zeros_like(weight)
        optimizer.step()
        shrunk.append(weight[0].item() / before - 1)
        told.append(scheduler.accumulated[0])
    steady = slice(100, None)  # the buffer has filled
    acted = sum(shrunk[steady]) / (told[-1] - told[99])
    assert acted - 1 == pytest.approx(part, rel=0.05)
    first = product * 0.9 / (1 - 0.9) ** 2
    assert acted - 1 == pytest.approx(first, rel=3 * first)
