"""What the rate of a schedule stands for, and what it spends over a run."""

import math
import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch.optim import SGD, Adam, AdamW, Muon
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

import optimizers
from mirrorflow.schedule import Constant, SwitchOff
from mirrorflow.weightdecay import (
    CoupledDecayWarning,
    HoldRatio,
    OffAtBudget,
    PerLayer,
    Scaled,
    ScaledFunction,
    WeightDecayScheduler,
    budget,
    coupling,
    learning_rates,
    preview,
    scale_to_budget,
)
from mirrorflow.weightdecay.conventions import (
    CONVENTIONS,
    NEED_PEAK,
    UnknownPeakError,
    number_for,
    peak_lr,
)
from mirrorflow.weightdecay.coupling import COUPLINGS
from optimizers import FALL, Plain, quiet

LRS = (0.1, 0.4, 0.5, 0.25, 0.05)  # a warm-up and a fall
PEAK = 0.5
RATES = (0.5, 0.4, 0.3, 0.2, 0.0)
FRACTION = {name: partial(fraction, peak=PEAK) for name, fraction in optimizers.FRACTION.items()}
ALL = (None, *CONVENTIONS)
# The optimizer, and what its own number makes of the weights.
KIND = {
    "decoupled": (AdamW, lambda number, lr: lr * number),
    "fixed": (Plain, lambda number, lr: number),
    "sgd": (SGD, lambda number, lr: lr * number),
}


def weight():
    return torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))


def shrunk(make, numbers):
    """Step the optimizer with a gradient of 0 and these decays; give what is left of 1."""
    w = weight()
    optimizer = make([w], lr=1.0)
    for lr, number in zip(LRS, numbers, strict=True):
        optimizer.param_groups[0].update(lr=lr, weight_decay=number)
        w.grad = torch.zeros_like(w)
        optimizer.step()
    return w[0, 0].item()


def by_hand(fractions):
    w = 1.0
    for fraction in fractions:
        w -= fraction * w
    return w


def test_every_convention_has_its_formula_in_the_tests():
    assert set(FRACTION) == set(CONVENTIONS)


@pytest.mark.parametrize("kind", KIND)
@pytest.mark.parametrize("convention", ALL)
def test_a_rate_acts_as_its_convention_says_whatever_the_optimizer(kind, convention):
    make, own = KIND[kind]
    assert coupling(make([weight()], lr=1.0), make([weight()], lr=1.0).param_groups[0]) == kind
    steps = list(zip(RATES, LRS, strict=True))
    written = [number_for(convention, rate, lr, PEAK, kind) for rate, lr in steps]
    if convention is not None:
        expected = [CONVENTIONS[convention](rate, lr, PEAK, kind) for rate, lr in steps]
        assert written == pytest.approx(expected, rel=1e-12)
    wanted = FRACTION.get(convention, own)  # without one, what the optimizer makes of the number
    assert shrunk(make, written) == pytest.approx(by_hand(wanted(r, lr) for r, lr in steps))


@pytest.mark.parametrize("kind", sorted(set(COUPLINGS) - set(KIND)))
@pytest.mark.parametrize("convention", ALL)
def test_l2_in_the_gradient_is_taken_for_lr_times_decay(kind, convention):
    """The only reading there is: its number times lr is what plain SGD would make of it."""
    for rate, lr in zip(RATES, LRS, strict=True):
        wanted = FRACTION.get(convention, FRACTION["follow-lr"])(rate, lr)
        assert lr * number_for(convention, rate, lr, PEAK, kind) == pytest.approx(wanted)


def test_at_a_learning_rate_of_0_nothing_is_divided_by_it():
    for name in CONVENTIONS:
        assert number_for(name, 0.5, 0.0, 0.0, "decoupled") in (0.5, 0.0)
    assert number_for("fixed", 0.5, 0.0, 0.0, "fixed") == 0.5


def triangle(step):
    return abs((step % 8) - 4) / 8


def test_a_cycle_is_a_function_of_the_step():
    optimizer = AdamW([w := weight()], lr=0.5, weight_decay=0.1)
    scheduler = WeightDecayScheduler(optimizer, triangle)
    for _ in range(20):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    rates = [0.5, 0.375, 0.25, 0.125, 0.0, 0.125, 0.25, 0.375] * 3
    assert w[0, 0].item() == pytest.approx(by_hand(0.5 * rate for rate in rates[:20]))
    assert scheduler.get_last_weight_decay() == [0.125]  # of step 19


# The peak


def stepped(make, steps=50):
    optimizer = SGD([weight()], lr=0.1, momentum=0.9)
    lr = make(optimizer)
    return optimizer, lr, max(learning_rates(lr, steps))


@pytest.mark.parametrize(
    "make",
    [
        lambda o: CosineAnnealingLR(o, T_max=9),
        lambda o: OneCycleLR(o, max_lr=0.3, total_steps=60),
        lambda o: LambdaLR(o, lambda t: min(1.0, (t + 1) / 10)),
        lambda o: StepLR(o, step_size=3),
    ],
)
def test_the_peak_is_known_from_what_schedulers_write(make):
    optimizer, _, peak = stepped(make)
    assert peak_lr(optimizer.param_groups[0]) == pytest.approx(peak)


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_a_peak_above_what_was_written_is_an_error_that_asks_for_it():
    """CyclicLR writes its lowest learning rate; the decay would be ten times the rate."""
    optimizer, lr, peak = stepped(lambda o: CyclicLR(o, 0.1, 1.0, step_size_up=10))
    assert peak == pytest.approx(1.0)
    group = optimizer.param_groups[0]
    for _ in range(10):
        lr.step()
    with pytest.raises(ValueError, match=r"learning rate 1 is above its peak 0\.1.*peak=max"):
        peak_lr(group)
    assert peak_lr(group, peak) == peak
    assert number_for("adamc", 0.1, group["lr"], peak_lr(group, peak)) == pytest.approx(0.1)


def test_without_a_learning_rate_scheduler_the_peak_is_asked_for():
    group = SGD([weight()], lr=0.1).param_groups[0]
    with pytest.raises(UnknownPeakError, match=r"rate is not known.*peak=0\.1"):
        peak_lr(group)
    assert peak_lr(group, 0.25) == 0.25
    for wrong in (0.0, -1.0, math.nan, math.inf, 0.05):
        with pytest.raises(ValueError, match="above its peak"):
            peak_lr(group, wrong)
    assert set(NEED_PEAK) < set(CONVENTIONS)


# Budgets


@pytest.mark.parametrize("kind", KIND)
@pytest.mark.parametrize("convention", ALL)
def test_equal_budgets_are_equal_under_every_convention(kind, convention):
    settings = {"convention": convention, "kind": kind}
    wanted = FRACTION.get(convention, KIND[kind][1])
    constant = sum(wanted(0.1, lr) for lr in LRS)
    assert budget(Constant(0.1), LRS, **settings) == pytest.approx(constant)
    matched = scale_to_budget(SwitchOff(0.3, at=2), Constant(0.1), LRS, **settings)
    spent = sum(wanted(matched.rate(t), lr) for t, lr in enumerate(LRS))
    assert spent == pytest.approx(constant)
    assert isinstance(matched, Scaled) and matched.rate(2) == 0


def test_a_fixed_decay_under_a_cosine_is_matched_in_the_run():
    def spent(schedule):
        optimizer = AdamW([w := weight()], lr=0.1, weight_decay=0.1)
        scheduler = WeightDecayScheduler(optimizer, schedule, convention="fixed")
        lr = CosineAnnealingLR(optimizer, T_max=10)
        rates = learning_rates(lr, 10)
        for _ in range(10):
            w.grad = torch.zeros_like(w)
            optimizer.step()
            lr.step()
        return scheduler.accumulated[0], rates

    constant, rates = spent(Constant(0.01))
    matched = scale_to_budget(SwitchOff(1.0, at=3), Constant(0.01), rates, convention="fixed")
    assert constant == pytest.approx(-0.1)
    assert spent(matched)[0] == pytest.approx(constant, rel=1e-12)
    plain = scale_to_budget(SwitchOff(1.0, at=3), Constant(0.01), rates)
    assert spent(plain)[0] != pytest.approx(constant, rel=0.1)


@pytest.mark.parametrize("convention", ALL)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_budget_through_momentum_is_what_the_ledger_counts(momentum, convention):
    """Decay acts 1 / (1 - momentum) times by and by: a budget without that is a tenth of it."""
    optimizer = SGD([w := weight()], lr=0.1, momentum=momentum, weight_decay=0.1)
    lr = CosineAnnealingLR(optimizer, T_max=40)
    settings = {"convention": convention, "kind": "sgd", "momentum": momentum}
    wanted = budget(SwitchOff(0.01, at=20), lr, 40, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoupledDecayWarning)
        scheduler = WeightDecayScheduler(optimizer, SwitchOff(0.01, at=20), convention=convention)
    for _ in range(40):
        w.grad = torch.zeros_like(w)
        optimizer.step()
        lr.step()
    assert -scheduler.accumulated[0] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("convention", NEED_PEAK)
@pytest.mark.parametrize("later", [False, True])
def test_the_peak_of_a_budget_is_that_of_the_run(convention, later):
    """Which is not the highest of the learning rates that are left, nor of whole steps."""
    optimizer = AdamW([w := weight()], lr=0.01, weight_decay=0.1)
    lr = OneCycleLR(optimizer, max_lr=0.05, total_steps=31)
    for _ in range(15 if later else 0):
        optimizer.step()
        lr.step()
    steps = 10 if later else 30
    wanted = budget(Constant(0.1), lr, steps, convention=convention)
    matched = scale_to_budget(SwitchOff(0.3, at=4), Constant(0.1), lr, steps, convention=convention)
    assert matched.factor == pytest.approx(
        wanted / budget(SwitchOff(0.3, at=4), lr, steps, convention=convention)
    )
    scheduler = WeightDecayScheduler(optimizer, Constant(0.1), convention=convention)
    for _ in range(steps):
        w.grad = torch.zeros_like(w)
        optimizer.step()
        lr.step()
    assert -scheduler.accumulated[0] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("steps", [0, -2, 2.5, True, "9"])
def test_a_number_of_steps_is_a_whole_one(steps):
    optimizer = AdamW([weight()], lr=0.1, weight_decay=0.1)
    for call in (
        lambda: budget(Constant(0.1), 0.1, steps),
        lambda: learning_rates(CosineAnnealingLR(optimizer, T_max=5), steps),
        lambda: preview(WeightDecayScheduler(optimizer, Constant(0.1)), steps),
    ):
        with pytest.raises(ValueError, match=f"steps must be a whole number >= 1, got {steps!r}"):
            call()


def test_momentum_is_that_of_sgd():
    with pytest.raises(ValueError, match=r"must be 0 unless kind=.sgd.*kind='decoupled'"):
        budget(Constant(0.1), 0.1, 5, momentum=0.9)
    for wrong in (1.0, -0.1, "0.9", math.nan):
        with pytest.raises(ValueError, match="momentum must be a number >= 0 and < 1"):
            budget(Constant(0.1), 0.1, 5, kind="sgd", momentum=wrong)


def test_functions_are_scaled_by_summing_and_can_be_pickled():
    matched = scale_to_budget(fall, Constant(0.1), 0.25, steps=20)
    assert isinstance(matched, ScaledFunction)
    assert 0.25 * sum(matched(t) for t in range(20)) == pytest.approx(0.25 * 20 * 0.1)
    assert matched(3) == matched.factor * fall(3)
    assert pickle.loads(pickle.dumps(matched))(3) == matched(3)
    scheduler = WeightDecayScheduler(AdamW([weight()], weight_decay=0.1), matched)
    assert scheduler.get_last_weight_decay() == [matched(0)]


def fall(step):
    return 0.9**step


@pytest.mark.parametrize("loop", [OffAtBudget(0.1, budget=1.0), HoldRatio(3.0, 0.1, 0.1)])
def test_what_decides_in_the_run_has_no_budget_before_it(loop):
    for call in (
        lambda: budget(loop, 0.1, 10),
        lambda: scale_to_budget(loop, Constant(0.1), 0.1, 10),
        lambda: scale_to_budget(Constant(0.1), loop, 0.1, 10),
    ):
        with pytest.raises(TypeError, match=f"{type(loop).__name__} decides in the run"):
            call()


@pytest.mark.parametrize(
    "lr", [0.25, np.float32(0.25), np.array(0.25), torch.tensor(0.25)], ids=lambda v: type(v)
)
def test_a_learning_rate_is_a_number_of_any_kind(lr):
    assert budget(Constant(0.5), lr, 8) == 1.0


def test_learning_rates_come_from_a_sequence_or_a_scheduler():
    optimizer = SGD([{"params": [weight()], "lr": 0.5}, {"params": [weight()], "lr": 0.25}])
    lr = StepLR(optimizer, step_size=2)
    assert budget(Constant(0.5), lr, 4) == pytest.approx(0.5 * (0.5 + 0.5 + 0.05 + 0.05))
    for sequence in ([0.5, 0.25], np.array([0.5, 0.25], np.float32), torch.tensor([0.5, 0.25])):
        assert budget(Constant(0.5), sequence) == 0.375
    assert learning_rates(lr, 3, group=1) == [0.25, 0.25, 0.025]
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_mistakes_in_learning_rates_are_named():
    lr = StepLR(SGD([weight()], lr=0.5), step_size=2)
    for lrs, steps, error, message in (
        (lr, None, ValueError, "StepLR needs steps="),
        (np.float32(0.1), None, ValueError, "single learning rate needs steps="),
        ("0.1", 3, TypeError, "lrs must be a number"),
        (object(), 3, TypeError, "lrs must be a number"),
        ([0.1, -0.1], None, ValueError, "a learning rate must be a finite number >= 0, got -0.1"),
        ([0.1, math.nan], None, ValueError, "got nan at step 1. Correct it"),
        ([0.1, "a"], None, TypeError, "a learning rate must be a number, got 'a'"),
        (-0.1, 3, ValueError, "a learning rate must be a finite number >= 0, got -0.1"),
        ([0.1, 0.2], 3, ValueError, "steps=3, but there are 2"),
    ):
        with pytest.raises(error, match=message):
            budget(FALL, lrs, steps)
    plateau = ReduceLROnPlateau(SGD([weight()], lr=0.5))
    with pytest.raises(ValueError, match="ReduceLROnPlateau answers to metrics"):
        learning_rates(plateau, 5)
    below = LambdaLR(SGD([weight()], lr=0.5), lambda step: 1.0 - step)
    with pytest.raises(ValueError, match=r"finite number >= 0, got -0\.5 at step 2\..*scheduler"):
        learning_rates(below, 5)
    none = SGD([weight()], lr=0.5)
    of_none = StepLR(none, step_size=2)
    none.param_groups[0]["lr"] = None
    with pytest.raises(TypeError, match="learning rate of parameter group 0 must be a number, got"):
        learning_rates(of_none, 1)
    with pytest.raises(TypeError, match="a torch learning-rate scheduler, got float"):
        learning_rates(0.5, 5)  # pyright: ignore
    with pytest.raises(ValueError, match=f"one of {', '.join(CONVENTIONS)}"):
        budget(FALL, 0.1, 3, convention="linear")
    for kind in ("coupled", "unknown", "other"):
        with pytest.raises(ValueError, match="kind must be one of decoupled, fixed, sgd"):
            budget(FALL, 0.1, 3, kind=kind)
    with pytest.raises(ValueError, match="above its peak"):
        budget(FALL, [0.1, 0.2], convention="adamc", peak=0.1)
    with pytest.raises(ValueError, match="group must be one of 0, got 1"):
        learning_rates(lr, 3, group=1)


@pytest.mark.parametrize("spent", [budget, partial(scale_to_budget, Constant(0.2))])
def test_mistakes_in_settings_are_named_by_the_function_that_was_called(spent):
    name = "budget" if spent is budget else "scale_to_budget"
    for settings, error, message in (
        ({"foo": 1}, TypeError, f"^{name}.. got an unexpected keyword argument 'foo'"),
        ({"momentum": "a"}, ValueError, "momentum must be a number >= 0 and < 1, got 'a'"),
        ({"convention": "adamc", "peak": "a"}, TypeError, "peak must be a number, got 'a'"),
        ({"convention": ["adamc"]}, ValueError, r"convention must be one of .*, got \['adamc'\]"),
    ):
        with pytest.raises(error, match=message):
            spent(FALL, 0.1, 9, **settings)


# What is not a schedule


@quiet
@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (0.1, r"use Constant\(0\.1\)"),
        ("cosine", "SwitchOff"),
        ([0.1, 0.2], "lambda step: values"),
        ({"rate": 0.1}, "lambda step: values"),
        (PerLayer(lambda layer: HoldRatio(3.0, 0.1, 0.1)), r"groups=loops\.rules.*ControlledDecay"),
        (object(), "Piecewise"),
        (SwitchOff, r"class .*SwitchOff.*make one of the class, SwitchOff\(\.\.\.\)"),
        (lambda step: "high", "gives 'high' at step 0: a weight decay is a number"),
        (lambda step: torch.ones(2), r"at step 0: a weight decay is a number"),
    ],
    ids=lambda v: getattr(v, "__name__", type(v).__name__),
)
def test_what_is_given_instead_of_a_schedule_gets_its_own_advice(value, hint):
    with pytest.raises(TypeError, match=hint):
        WeightDecayScheduler(Adam([weight()], weight_decay=0.1), value)


def test_a_learning_rate_scheduler_is_not_a_schedule_of_decay():
    optimizer = Muon([weight()], weight_decay=0.1)
    with pytest.raises(TypeError, match=r"got a StepLR: .*convention="):
        WeightDecayScheduler(optimizer, StepLR(optimizer, step_size=2))
