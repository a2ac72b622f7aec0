"""Optimizers that are not torch's: how their decay is found out, and what is refused for them."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch.optim import SGD, AdamW

from mirrorflow.schedule import Constant, SwitchOff
from mirrorflow.weightdecay import (
    CoupledDecayWarning,
    OffAtBudget,
    WeightDecayScheduler,
    coupling,
    lint,
)
from optimizers import FRACTION, OFF, Plain, pull, weights


def sign_update(p, grad, lr, decay):
    """Lion's shape: a function of the module, which the optimizer keeps in an attribute."""
    p.mul_(1 - lr * decay)
    p.sub_(lr * grad.sign())


class LionLike(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.update, self.betas = sign_update, [0.9, 0.99]

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, p.grad, group["lr"], group["weight_decay"])


class OwnStep(torch.optim.Optimizer):
    """Prodigy's shape: d x lr is the step size, lr = 1, nothing is done without a gradient."""

    def __init__(self, params, lr=1.0, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "d": 1e-3})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            size = group["d"] * group["lr"]
            for p in group["params"]:
                if p.grad is None or not p.grad.any():
                    continue
                self.state[p].setdefault("step", 0)  # which it never counts
                p.mul_(1 - size * group["weight_decay"]).sub_(size * p.grad.sign())


class Relative(torch.optim.Optimizer):
    """Adafactor's shape: lr=None, and a step size of its own."""

    def __init__(self, params, weight_decay=0.0):
        super().__init__(params, {"lr": None, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                size = 0.01 if group["lr"] is None else 0.01 * p.norm()
                p.mul_(1 - size * group["weight_decay"]).sub_(0.01 * p.grad)


class Averaging(torch.optim.Optimizer):
    """The schedule-free shape: the weights move towards iterates that the optimizer keeps."""

    def __init__(self, params, lr=0.1, weight_decay=0.0):
        defaults = {"lr": lr, "weight_decay": weight_decay, "k": 0, "train_mode": False}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("call .train() first")
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                z.sub_(group["lr"] * (p.grad + group["weight_decay"] * p))
                p.lerp_(z, 1 / group["k"])


class WithClosure(Averaging):
    """As schedule-free's closure variants: a step without a closure is an error."""

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
        super().step()


class LookingAhead(AdamW):
    """Lookahead's shape: every fifth step goes back half of the way to a slow copy."""

    def __init__(self, params, weight_decay=0.0):
        super().__init__(params, lr=0.1, weight_decay=weight_decay)
        self.taken = 0

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        super().step()
        for p in params:
            self.state[p].setdefault("slow", p.clone())
        self.taken += 1
        for p in params if self.taken % 5 == 0 else []:
            p.copy_(self.state[p]["slow"].lerp_(p, 0.5))


class MySGD(SGD):
    def __init__(self, params, **options):
        super().__init__(params, lr=0.1, momentum=0.9, **options)


class NoLR(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"size": 0.5})

    @torch.no_grad()
    def step(self, closure=None):
        pass


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (LionLike, "decoupled"),
        (OwnStep, "scaled"),
        (Relative, "scaled"),
        (Averaging, "averaged"),
        (WithClosure, "averaged"),
        (LookingAhead, "averaged"),
        (MySGD, "sgd"),
        (NoLR, "unknown"),
    ],
)
def test_how_they_decay_is_found_by_trying(make, kind):
    params = weights(1)
    optimizer = make(params)
    before = params[0].detach().clone(), str(optimizer.state_dict())
    assert coupling(optimizer, optimizer.param_groups[0]) == kind
    assert torch.equal(params[0], before[0]) and str(optimizer.state_dict()) == before[1]


def test_an_attribute_that_holds_the_parameters_is_not_tried():
    """A twin that shares them would step the optimizer's own."""

    class Holding(Plain):
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.held[0]:
                p.mul_(0.5)

    params = weights(1)
    optimizer = Holding(params)
    optimizer.held = [params]
    before = params[0].detach().clone()
    assert coupling(optimizer, optimizer.param_groups[0]) == "unknown"
    assert torch.equal(params[0], before)


PATCHED = []


def step_of_all():
    """A function of the module that somebody has put in the place of a method."""
    for optimizer in PATCHED:
        type(optimizer).step(optimizer)


def test_a_method_that_is_covered_is_not_tried():
    params = weights(1)
    optimizer = AdamW(params, lr=0.1, weight_decay=0.3)
    optimizer.step = step_of_all
    PATCHED[:] = [optimizer]
    pull(params)
    before = params[0].detach().clone()
    assert coupling(optimizer, optimizer.param_groups[0]) == "decoupled"
    assert torch.equal(params[0], before)


def test_a_function_in_an_attribute_does_not_make_the_sum_nan():
    params = weights()
    optimizer = LionLike(params, weight_decay=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = WeightDecayScheduler(optimizer, OFF)
        for _ in range(6):
            pull(params)
            optimizer.step()
    assert scheduler.accumulated == [pytest.approx(-0.1 * 0.5 * 4)] and scheduler.pending == [0.0]


@pytest.mark.parametrize("make", [OwnStep, Relative])
def test_a_step_size_of_its_own_makes_no_sum_but_ends_exactly(make):
    """No alarm about counts, and none about moments."""
    w = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = make([w], weight_decay=0.3)
    with pytest.warns(UserWarning, match=r"finds itself.*`accumulated` is NaN") as caught:
        scheduler = WeightDecayScheduler(optimizer, SwitchOff(0.5, at=2))
        for _ in range(3):
            w.grad = torch.full_like(w, 1e-30)
            optimizer.step()
    assert len(caught) == 1 and not isinstance(caught[0].message, CoupledDecayWarning)
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    assert math.isnan(scheduler.accumulated[0]) and scheduler.pending == [0.0]
    assert {row["kind"] for row in scheduler.audit()} == {"scaled"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (OwnStep, r"OwnStep steps by a size of its own.*decoupled=False.*convention=\"fixed\""),
        (Relative, "Relative steps by a size of its own"),
        (Averaging, "Averaging moves them back"),
        (NoLR, r"NoLR has no learning rate.*convention=\"fixed\""),
    ],
)
def test_decay_from_outside_is_refused_where_it_would_be_another(make, message):
    optimizer = make(weights())
    before = set(optimizer.param_groups[0])
    with pytest.raises(ValueError, match=message):
        WeightDecayScheduler(optimizer, None, groups=[(0, OFF)], decoupled=True)
    assert set(optimizer.param_groups[0]) == before


def test_without_a_decay_of_its_own_there_is_nothing_to_multiply():
    """The advice to make the optimizer with a weight_decay would be none."""
    with pytest.raises(ValueError, match=r"NoLR has no weight_decay: with relative=False"):
        options = {"decoupled": True, "convention": "fixed"}
        WeightDecayScheduler(NoLR(weights()), OFF, relative=True, **options)


@pytest.mark.parametrize("make", [OwnStep, Relative, NoLR])
def test_a_rate_that_acts_itself_needs_no_learning_rate(make):
    w = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = make([w])
    rules = [(0, SwitchOff(0.25, at=2))]
    options = {"groups": rules, "decoupled": True, "convention": "fixed"}
    scheduler = WeightDecayScheduler(optimizer, None, **options)
    for _ in range(3):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    assert w[0].item() == 0.75**2 and scheduler.accumulated == [-0.5]
    assert scheduler.get_last_weight_decay() == [0.0]


def test_without_a_learning_rate_a_convention_has_nothing_to_follow():
    with (
        pytest.warns(UserWarning, match="finds itself"),
        pytest.raises(ValueError, match="convention='adamc' needs a learning rate"),
    ):
        WeightDecayScheduler(Relative(weights(), weight_decay=0.1), OFF, convention="adamc")


def test_averages_move_shrunken_weights_back():
    """What the refusal is for."""
    w = torch.nn.Parameter(torch.ones(1))
    optimizer = Averaging([w])
    optimizer.param_groups[0]["train_mode"] = True
    path = []
    for t in range(4):
        with torch.no_grad():
            w.mul_(0.5 if t == 1 else 1.0)
        w.grad = torch.zeros_like(w)
        optimizer.step()
        path.append(w.item())
    assert path[1] < path[2] < path[3]


@pytest.mark.parametrize("make", [Averaging, WithClosure, LookingAhead])
def test_the_advice_for_averages_is_not_what_is_refused(make):
    """No decay from outside, no alarm about moments; what else does not do says what does."""
    with pytest.warns(UserWarning, match=r"rules its own weight_decay.*is NaN") as caught:
        scheduler = WeightDecayScheduler(make(weights(), weight_decay=0.1), OFF)
    assert len(caught) == 1 and not isinstance(caught[0].message, CoupledDecayWarning)
    assert "decoupled" not in str(caught[0].message)
    assert [f.code for f in lint(scheduler.optimizer) if f.level == "warning"] == []
    for schedule, options, said in [
        (OFF, {"exact_off": True}, f"{make.__name__} moves .* leave exact_off out"),
        (OffAtBudget(0.5, 0.1), {}, r"is averaged: SwitchOff\(rate, at=...\)"),
        (OFF, {"decoupled": True}, "use its own weight_decay"),
    ]:
        with pytest.raises(ValueError, match=said) as refused:
            WeightDecayScheduler(make(weights(), weight_decay=0.1), schedule, **options)
        assert "decoupled=True" not in str(refused.value) or options == {"decoupled": True}


def test_a_budget_is_not_refused_with_advice_that_is_refused():
    with pytest.raises(ValueError, match=r'is scaled: convention="fixed", decoupled=True'):
        WeightDecayScheduler(OwnStep(weights(), weight_decay=0.1), OffAtBudget(0.5, 0.1))
    options = {"convention": "fixed", "decoupled": True}
    WeightDecayScheduler(OwnStep(weights(), weight_decay=0.1), OffAtBudget(0.5, 0.1), **options)


@pytest.mark.parametrize("closed", [False, True])
def test_averages_are_scheduled_as_by_a_loop_of_ones_own(closed):
    ends = []
    for scheduled in (False, True):
        w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = (WithClosure if closed else Averaging)([w], weight_decay=0.3)
        optimizer.param_groups[0]["train_mode"] = True
        if scheduled:
            with pytest.warns(UserWarning, match="copies or averages"):
                scheduler = WeightDecayScheduler(optimizer, OFF)

        def closure(w=w):
            w.grad = w.detach() - 0.25
            return w.sum()

        closure()
        for t in range(9):
            if not scheduled:
                optimizer.param_groups[0]["weight_decay"] = OFF.rate(t)
            closure()
            optimizer.step(*([closure] if closed else []))
        ends.append(w.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)
    assert scheduler.steps == 9
    assert math.isnan(scheduler.accumulated[0]) and math.isnan(scheduler.pending[0])


def test_a_subclass_of_sgd_is_sgd():
    optimizer = MySGD(weights(), weight_decay=0.1)
    scheduler = WeightDecayScheduler(optimizer, OFF, exact_off=True)
    assert scheduler.account.entries[0].coupling == "sgd"


def test_what_is_sgd_has_sgds_settings():
    with pytest.raises(ValueError, match=r"momentum, dampening, nesterov.*Plain"):
        WeightDecayScheduler(Plain(weights(), weight_decay=0.1), OFF, coupling="sgd")
    with pytest.raises(ValueError, match=r"exact_off .* \(Adam's moments are not\)"):
        WeightDecayScheduler(torch.optim.Adam(weights(), weight_decay=0.1), OFF, exact_off=True)


# What the rate means, whatever the optimizer does with its decay


def by_convention(make, convention, lr=0.1, **options):
    w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = make([w], lr=0.2, weight_decay=0.5)
    optimizer.param_groups[0]["initial_lr"] = 0.2
    scheduler = WeightDecayScheduler(optimizer, Constant(0.01), convention=convention, **options)
    optimizer.param_groups[0]["lr"] = lr
    w.grad = torch.zeros_like(w)
    optimizer.step()
    return w.item(), scheduler.accumulated[0]


@pytest.mark.parametrize(
    ("make", "options"),
    [(AdamW, {}), (Plain, {}), (SGD, {}), (Plain, {"decoupled": True}), (SGD, {"decoupled": True})],
    ids=["decoupled", "fixed", "L2", "fixed, from outside", "L2, from outside"],
)
@pytest.mark.parametrize("convention", FRACTION)
def test_a_convention_says_what_acts(make, options, convention):
    acts = FRACTION[convention](0.01, 0.1, 0.2)
    value, accumulated = by_convention(make, convention, **options)
    assert value == pytest.approx(1 - acts, rel=1e-12)
    assert accumulated == pytest.approx(-acts, rel=1e-12)


@pytest.mark.parametrize(("make", "acts"), [(AdamW, 0.001), (Plain, 0.01)])
def test_without_a_convention_the_rate_is_the_optimizers_number(make, acts):
    assert by_convention(make, None)[0] == pytest.approx(1 - acts, rel=1e-12)


def test_a_fixed_decay_needs_no_learning_rate_that_is_not_0():
    assert by_convention(Plain, "fixed", lr=0.0)[0] == pytest.approx(0.99, rel=1e-12)
    assert by_convention(AdamW, "fixed", lr=0.0) == (1.0, 0.0)  # which multiplies it by 0


# Schedules of other libraries


class ZeroDim:
    """The shape of a JAX array: a number through __float__ and __array__, and no more."""

    ndim, shape, dtype = 0, (), np.dtype("float32")

    def __init__(self, value):
        self.value = np.float32(value)

    def __float__(self):
        return float(self.value)

    def __array__(self, *args, **kwargs):
        return np.asarray(self.value)


@pytest.mark.parametrize("options", [{}, {"decoupled": True}, {"relative": True}])
@pytest.mark.parametrize(
    "wrap", [ZeroDim, np.float64, np.float32, np.asarray, torch.tensor], ids=lambda w: w.__name__
)
def test_what_an_optax_schedule_gives_is_written_as_a_python_float(wrap, options):
    def linear(count):  # as optax.linear_schedule: of a count, clipped
        return wrap(0.5 * (1 - min(int(count), 4) / 4))

    params = weights()
    optimizer = AdamW(params, lr=0.1, weight_decay=1.0)
    scheduler = WeightDecayScheduler(optimizer, linear, **options)
    for t in range(6):
        pull(params)
        optimizer.step()
        written = optimizer.param_groups[0]["weight_decay"]
        expected = 0.0 if "decoupled" in options else 0.5 * (1 - min(t, 4) / 4)
        assert type(written) is float and written == expected
    (found,) = scheduler.get_last_weight_decay()
    assert type(found) is float and found == 0.0
    assert type(scheduler.accumulated[0]) is float
