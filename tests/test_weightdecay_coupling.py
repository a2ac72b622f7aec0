"""How an optimizer's decay acts, and decay from outside that acts as AdamW's."""

import inspect
import math
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, NAdam, RAdam, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR

from mirrorflow.schedule import Constant, SwitchOff
from mirrorflow.weightdecay import (
    CoupledDecayWarning,
    OffAtBudget,
    WeightDecayScheduler,
    coupling,
)
from mirrorflow.weightdecay.coupling import OptimizerProbe, known_coupling, needs_no_gradient
from optimizers import OFF, STEPS, Plain, assert_near, by_hand, pull, two_groups, weights

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
    assert_near(params, by_hand(twin, OFF.rate), twin)


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
    assert_near(params, [w])
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


# How a decay acts, and its notes


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
def test_coupling_is_found(make, kind):
    params = weights(1)
    optimizer = make(params)
    CosineAnnealingLR(optimizer, T_max=9)  # patches step with one that steps this optimizer
    before = params[0].detach().clone()
    state = dict(optimizer.state)
    assert coupling(optimizer, optimizer.param_groups[0]) == kind
    assert torch.equal(params[0], before) and dict(optimizer.state) == state


OWN = [
    cls
    for _, cls in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
]


@pytest.mark.parametrize("cls", OWN, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("flag", [None, False, True])
def test_the_table_of_torchs_optimizers_says_what_the_probe_finds(cls, flag):
    """SGD apart, whose momentum the ledger follows, and those without a decay."""
    optimizer = cls(weights(1), lr=0.1)
    group = optimizer.param_groups[0]
    if flag is not None and (cls is AdamW or "decoupled_weight_decay" not in group):
        return  # AdamW sets the flag again whenever its state is set
    if flag is not None:
        group["decoupled_weight_decay"] = flag
    known, probe = known_coupling(optimizer, group), OptimizerProbe(optimizer, group)
    assert known is not None
    if cls is not SGD:
        assert probe.coupling() == known
    assert not probe.needs_no_gradient()


# Optimizers whose decay depends on the gradient, or needs none


class Decaying(torch.optim.Optimizer):
    """A step of the signs of the gradient, with a decay that each subclass defines."""

    def __init__(self, params, lr=0.1, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.decay(p, group["lr"], group["weight_decay"])
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad.sign())


class Cautious(Decaying):
    def decay(self, p, lr, decay):
        p.mul_(1 - lr * decay * (p.grad * p >= 0))


class Strict(Decaying):
    def decay(self, p, lr, decay):
        p.mul_(1 - lr * decay * (p.grad * p > 0))


class Clipped(Decaying):
    """StableAdamW's shape: the step, and with it the decay, shrinks when the gradient grows."""

    def decay(self, p, lr, decay):
        square = p.grad.square().mean()
        mean = self.state[p].setdefault("mean", square.clone())
        size = lr / max(1.0, (square / mean.clamp(min=1e-12)).sqrt().item())
        mean.lerp_(square, 0.01)
        p.mul_(1 - size * decay)


class Eager(Decaying):
    def decay(self, p, lr, decay):
        p.mul_(1 - lr * decay)


class Late(Decaying):
    """The decay after the update, as in transformers' first AdamW."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign()).mul_(1 - group["lr"] * group["weight_decay"])


class Signs(Decaying):
    """L2 inside the sign: without memory, and no decay of the weights either."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (p.grad + group["weight_decay"] * p).sign())


class Noisy(Late):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.add_(0.01 * torch.randn_like(p))
        super().step()


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Cautious, "masked"),
        (Strict, "masked"),
        (Clipped, "scaled"),
        (Eager, "decoupled"),
        (Late, "decoupled"),
        (Signs, "coupled"),
    ],
)
def test_decay_that_depends_on_the_gradient_is_not_booked_as_decoupled(make, kind):
    optimizer = make(weights(1))
    assert coupling(optimizer, optimizer.param_groups[0]) == kind
    assert needs_no_gradient(optimizer, optimizer.param_groups[0]) == (make is Eager)


def test_the_probe_draws_none_of_the_programs_random_numbers():
    optimizer = Noisy(weights(1))
    state = torch.get_rng_state()
    coupling(optimizer, optimizer.param_groups[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_masked_decay_has_no_sum_and_is_counted_from_outside():
    """Half of the weights decay: a sum of lr x decay is twice what the mean weight has lost."""
    w = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizer = Cautious([w], lr=0.01, weight_decay=0.5)
    with pytest.warns(UserWarning, match="Cautious decays a weight only where") as caught:
        scheduler = WeightDecayScheduler(optimizer, SwitchOff(0.5, at=3))
        for _ in range(4):
            w.grad = torch.ones_like(w)
            optimizer.step()
    assert len(caught) == 1 and not isinstance(caught[0].message, CoupledDecayWarning)
    assert math.isnan(scheduler.accumulated[0]) and scheduler.pending == [0.0]
    with pytest.raises(ValueError, match=r"OffAtBudget counts lr x decay.*decoupled=True"):
        WeightDecayScheduler(Cautious(weights(), weight_decay=0.5), OffAtBudget(0.5, 0.1))


@pytest.mark.parametrize("decoupled", [False, True])
def test_what_decays_without_a_gradient_is_counted_without_one(decoupled):
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = Eager([w], lr=0.1, weight_decay=0.1)
    scheduler = WeightDecayScheduler(optimizer, Constant(0.1), decoupled=decoupled)
    for _ in range(4):
        optimizer.step()
    assert w[0].item() == pytest.approx(1.0 if decoupled else 0.99**4)
    assert scheduler.accumulated == [pytest.approx(0.0 if decoupled else -0.04)]


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
def test_coupled_decay_warns_where_it_matters(make, schedule, said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        WeightDecayScheduler(make(weights(), weight_decay=0.1), schedule)
    assert [w.category for w in caught] == [CoupledDecayWarning] * said


def test_the_user_may_set_the_coupling():
    class Odd(Plain):
        def step(self, closure=None):
            if self.table.ready:  # not plain, so that trying it fails
                super().step()

    def make():
        optimizer = Odd(weights(), lr=0.5, weight_decay=0.1)
        optimizer.table = SimpleNamespace(ready=True)
        return optimizer

    with pytest.warns(CoupledDecayWarning, match='coupling="decoupled"'):
        WeightDecayScheduler(make(), Constant(0.1))
    optimizer = make()
    scheduler = WeightDecayScheduler(optimizer, Constant(0.1), coupling="fixed")
    pull(optimizer.param_groups[0]["params"])
    optimizer.step()
    assert scheduler.accumulated == [-0.1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decay_from_outside_is_not_rounded_to_the_precision_of_the_weights(dtype):
    """torch's foreach multiplies bfloat16 by 0.98828 on a CPU, where 0.99 was meant."""
    start = torch.linspace(1, 2, 1000).to(dtype)
    w, v = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([w, v], lr=0.1)
    WeightDecayScheduler(optimizer, None, groups=[(0, Constant(0.1))], decoupled=True)
    for p in (w, v):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    spacing = torch.finfo(dtype).eps * torch.exp2(start.double().mul(0.99).log2().floor())
    assert ((w.detach().double() - start.double() * 0.99).abs() <= 0.501 * spacing).all()
    assert v.detach().tolist() == pytest.approx([0.99] * 3)
