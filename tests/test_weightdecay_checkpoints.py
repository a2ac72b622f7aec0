"""Checkpoints that are not of this run, of this program, or of an optimizer that has stepped."""

import copy
import io
import json
import math

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, AdamW, Muon

from mirrorflow.schedule import Constant, Linear, Piecewise, SwitchOff
from mirrorflow.weightdecay import HoldRatio, OffWhenLevel, WeightDecayScheduler
from optimizers import FALL, OFF, Plain, pull, quiet, weights


def made(schedule, make=AdamW, steps=0, decay=0.3, **options):
    """A run of some steps: parameters, optimizer, scheduler."""
    params = weights()
    optimizer = make(params, lr=0.1, weight_decay=decay)
    scheduler = WeightDecayScheduler(optimizer, schedule, **options)
    advance(params, optimizer, steps)
    return params, optimizer, scheduler


def advance(params, optimizer, steps):
    for _ in range(steps):
        pull(params)
        optimizer.step()


def saved(*parts):
    """Through a file, and JSON for what is not the optimizer's."""
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in parts], buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    return [states[0], *(json.loads(json.dumps(state)) for state in states[1:])]


# The checkpoint of another run


@pytest.mark.parametrize(("ours", "theirs"), [(5, 5), (3, 5), (5, 3)])
@pytest.mark.parametrize("rates", [(0.1, 0.9), (0.9, 0.1)])
def test_population_based_training_takes_over_the_total(ours, theirs, rates):
    """An optimizer of another member comes in, at the same step or another."""
    _, optimizer, winner = made(Constant(rates[0]), steps=theirs)
    state = copy.deepcopy(optimizer.state_dict())
    params, optimizer, scheduler = made(Constant(rates[1]), steps=ours)
    optimizer.load_state_dict(state)
    assert scheduler.steps == theirs and scheduler.accumulated == winner.accumulated
    total = sum(row["absorbed"] for row in scheduler.audit())
    assert -total == pytest.approx(winner.accumulated[0], rel=1e-12)
    with pytest.warns(UserWarning, match="lost to audit"):
        advance(params, optimizer, 1)
    assert scheduler.accumulated == [pytest.approx(winner.accumulated[0] - 0.1 * rates[1])]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(("lr", "steps"), [(0.7, 7), (0.7, 5), (0.01, 5), (0.01, 7), (0.7, 2)])
def test_both_states_of_another_member_are_that_member(lr, steps, order):
    """Wherever the process was before, and whichever state comes first."""
    whole = made(Constant(0.1), steps=5)
    states = saved(*whole[1:])
    parts = made(Constant(0.1), decay=0.4)
    parts[1].param_groups[0]["lr"] = lr
    advance(*parts[:2], steps)
    with torch.no_grad():
        for p, value in zip(parts[0], whole[0], strict=True):
            p.copy_(value)
    for i in order:
        parts[1 + i].load_state_dict(states[i])
    assert parts[2].audit() == whole[2].audit()
    advance(*whole[:2], 2)
    advance(*parts[:2], 2)
    assert parts[2].audit() == whole[2].audit()


def test_the_way_back_within_a_run_keeps_the_record():
    """The sum of the checkpoint is that of the record up to there, so nothing is lost."""
    params, optimizer, scheduler = made(FALL, steps=3)
    state, rows = copy.deepcopy(optimizer.state_dict()), scheduler.audit()
    advance(params, optimizer, 3)
    optimizer.load_state_dict(state)
    known = ("group", "start", "stop", "decay", "a")
    for ours, theirs in zip(scheduler.audit(), rows, strict=True):
        assert [ours[k] for k in known] == [theirs[k] for k in known]
    advance(params, optimizer, 1)  # without a warning


# torch.distributed.checkpoint, which takes a step to make the state


def linear(schedule, make=AdamW, **options):
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 2)
    optimizer = make(net.parameters(), lr=0.1, weight_decay=0.5)
    return net, optimizer, WeightDecayScheduler(optimizer, schedule, **options)


def learn(net, optimizer, steps):
    decays = []
    for _ in range(steps):
        pull(list(net.parameters()))
        optimizer.step()
        decays.append(optimizer.param_groups[0]["weight_decay"])
        optimizer.zero_grad()
    return decays


MAKERS = {
    "adamw": AdamW,
    "sgd": SGD,
    "sgd momentum": lambda *args, **kw: SGD(*args, momentum=0.9, dampening=0.3, **kw),
    "fixed": Plain,
}


@quiet
@pytest.mark.parametrize("name", MAKERS)
def test_the_step_that_makes_the_state_does_not_count(name):
    net, optimizer, scheduler = linear(SwitchOff(0.1, at=2), MAKERS[name])
    before = copy.deepcopy(net.state_dict())
    for _ in range(2):  # an SGD has no state, and takes that step each time
        get_optimizer_state_dict(net, optimizer)
    assert scheduler.steps == 0 and scheduler.get_last_weight_decay() == [0.1]
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert learn(net, optimizer, 3) == [0.1, 0.1, 0.0]
    get_optimizer_state_dict(net, optimizer)
    assert scheduler.steps == 3
    assert [row["stop"] for row in scheduler.audit()] == [2, 3]
    assert scheduler.audit()[0]["lr"] == 0.1


class Child(AdamW):
    """Its step calls that of its superclass, and the hooks run twice; it may fail."""

    fails = False

    def step(self, closure=None):
        if self.fails:
            raise MemoryError
        return super().step()


def test_the_step_that_makes_the_state_within_another_and_when_it_fails():
    net, optimizer, scheduler = linear(SwitchOff(0.1, at=2), Child)
    optimizer.fails = True
    with pytest.raises(MemoryError):
        get_optimizer_state_dict(net, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.1  # which torch has not put back
    optimizer.fails = False
    assert learn(net, optimizer, 1) == [0.1] and scheduler.steps == 1

    net, optimizer, scheduler = linear(SwitchOff(0.1, at=2), Child)
    get_optimizer_state_dict(net, optimizer)
    assert scheduler.steps == 0 and optimizer.state
    assert learn(net, optimizer, 3) == [0.1, 0.1, 0.0] and scheduler.steps == 3


def test_the_step_that_makes_the_state_puts_no_decay_into_momentum():
    net, optimizer, scheduler = linear(Constant(0.5), MAKERS["sgd momentum"])
    get_optimizer_state_dict(net, optimizer)
    state = optimizer.state[net.weight]
    assert not state["momentum_buffer"].any()
    net.weight.grad, net.bias.grad = torch.zeros(2, 2), torch.zeros(2)
    before = net.weight.detach().clone()
    optimizer.step()  # no longer the first, which torch takes into the buffer whole
    moved = ((before - net.weight) / before).detach()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1 * 0.7 * 0.5))
    assert scheduler.accumulated == [pytest.approx(-0.1 * 0.7 * 0.5)]


@pytest.mark.parametrize("scheduler_first", [True, False])
@pytest.mark.parametrize("name", ["adamw", "sgd momentum"])
def test_a_checkpoint_of_torch_distributed(name, scheduler_first):
    options = {"exact_off": True} if name != "adamw" else {}
    parts = linear(FALL, MAKERS[name], **options)
    learn(*parts[:2], 5)
    state = copy.deepcopy(get_optimizer_state_dict(*parts[:2]))
    account = copy.deepcopy(parts[2].state_dict())
    weights_then = copy.deepcopy(parts[0].state_dict())
    learn(*parts[:2], 3)

    net, optimizer, scheduler = linear(FALL, MAKERS[name], **options)
    net.load_state_dict(weights_then)
    if scheduler_first:
        scheduler.load_state_dict(account)
    set_optimizer_state_dict(net, optimizer, state)
    if not scheduler_first:
        scheduler.load_state_dict(account)
    assert scheduler.steps == 5
    learn(net, optimizer, 3)
    assert scheduler.audit() == parts[2].audit()
    assert all(
        torch.equal(p, q) for p, q in zip(net.parameters(), parts[0].parameters(), strict=True)
    )


def test_the_optimizers_checkpoint_at_step_1_alone():
    parts = linear(Constant(0.1))
    learn(*parts[:2], 1)
    state = copy.deepcopy(get_optimizer_state_dict(*parts[:2]))
    net, optimizer, scheduler = linear(Constant(0.1))
    set_optimizer_state_dict(net, optimizer, state)
    assert scheduler.accumulated == parts[2].accumulated == [pytest.approx(-0.01)]
    with pytest.warns(UserWarning, match="record of steps 0 to 1"):
        learn(net, optimizer, 1)


def test_a_warm_up_from_0_counts():
    """A learning rate of 0 in the first step is usual, and that step is one."""
    params, optimizer, scheduler = made(FALL)
    optimizer.param_groups[0]["lr"] = 0.0
    advance(params, optimizer, 1)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert scheduler.steps == 2


# One of two states was never loaded


def momentum(params, **options):
    return SGD(params, momentum=0.9, **options)


@quiet
@pytest.mark.parametrize(("make", "lost"), [(Muon, True), (momentum, True), (SGD, False)])
def test_an_optimizer_that_counts_nothing_was_not_loaded(make, lost):
    """What it remembers is lost and said; an SGD without momentum remembers nothing."""
    state = saved(*made(FALL, make, steps=3)[1:])[1]
    params, optimizer, scheduler = made(FALL, make)
    scheduler.load_state_dict(state)
    if lost:
        with pytest.warns(
            UserWarning, match="continues from step 3, but .* has started with empty state"
        ):
            advance(params, optimizer, 1)
    advance(params, optimizer, 2 - lost)  # said once
    assert scheduler.steps == 5


@quiet
@pytest.mark.parametrize("make", [AdamW, Muon, momentum, SGD])
def test_a_scheduler_made_anew_beside_a_loaded_optimizer(make):
    """As a callback does that closes the last run's scheduler: nothing is lost, nothing said."""
    whole = made(FALL, make, steps=3)
    states = saved(*whole[1:])
    params, optimizer, scheduler = made(FALL, make, steps=1)
    optimizer.load_state_dict(states[0])
    scheduler.close()
    again = WeightDecayScheduler(optimizer, FALL)
    again.load_state_dict(states[1])
    advance(params, optimizer, 1)
    advance(*whole[:2], 1)
    assert again.audit() == whole[2].audit()


# Another way to decay


@quiet
@pytest.mark.parametrize("which", ["optimizer", "scheduler"])
@pytest.mark.parametrize(("was", "now"), [({}, {"decoupled": True}), ({"decoupled": True}, {})])
def test_the_past_is_not_relabelled(which, was, now):
    make = MAKERS["sgd momentum"]
    states = saved(*made(FALL, make, steps=2, **was)[1:])
    params, optimizer, scheduler = made(FALL, make, **now)
    before = str((optimizer.state_dict(), scheduler.state_dict()))
    with pytest.raises(ValueError, match=r"acts as .* here, and as .* in the checkpoint"):
        (optimizer if which == "optimizer" else scheduler).load_state_dict(
            states[which != "optimizer"]
        )
    assert str((optimizer.state_dict(), scheduler.state_dict())) == before  # nothing was loaded
    advance(params, optimizer, 1)


def test_the_checkpoint_of_another_loop_changes_nothing():
    state = saved(made(HoldRatio(3.0, 0.5, gain=0.1), steps=2)[1])[0]
    _, optimizer, scheduler = made(OffWhenLevel(0.1))
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match="state of HoldRatio, not of OffWhenLevel"):
        optimizer.load_state_dict(state)
    assert str(optimizer.state_dict()) == before and scheduler.steps == 0
    assert scheduler.schedule.current == 0.1


def test_the_checkpoint_of_other_groups_is_refused_as_such():
    a, b = weights()
    two = AdamW([{"params": [a]}, {"params": [b]}], weight_decay=0.1)
    WeightDecayScheduler(two, FALL)
    pull([a, b])
    two.step()
    _, optimizer, _ = made(FALL)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(two.state_dict())


# Another program


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        (OFF, SwitchOff(0.5, at=5), r"SwitchOff\(0.5, at=4.0\) is SwitchOff\(0.5, at=5.0\)"),
        (FALL, Constant(0.5), r"Linear\(.*\) is Constant\(0.5\)"),
        (Piecewise([0], [0.5]), lambda step: 0.5, r"Piecewise\(.*\) is .*<lambda>"),
        (lambda step: 0.5, lambda step: 0.5 if step < 700 else 0.0, r"0.5 at step 7\d\d, .*, 0"),
    ],
)
def test_another_schedule_warns_or_is_refused(was, now, said):
    states = saved(*made(was, steps=2)[1:])
    params, optimizer, scheduler = made(now)
    optimizer.load_state_dict(states[0])
    with pytest.warns(UserWarning, match=said):
        scheduler.load_state_dict(states[1])
    assert scheduler.steps == 2
    advance(params, optimizer, 1)

    params, optimizer, scheduler = made(now, on_change="error")
    optimizer.load_state_dict(states[0])
    before = str(scheduler.state_dict())
    with pytest.raises(ValueError, match=said):
        scheduler.load_state_dict(states[1])
    assert str(scheduler.state_dict()) == before

    _, optimizer, scheduler = made(now, on_change="program")
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])  # without a word
    assert scheduler.steps == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(0.5, 0.0, duration=6),
        lambda: lambda step: 0.5 / (step + 1),
        lambda: [0.5, 0.4, 0.3].__getitem__,
        lambda: HoldRatio(3.0, 0.5, gain=0.1),
    ],
    ids=["schedule", "function", "list", "loop"],
)
def test_the_same_schedule_made_again_is_the_same(make):
    states = saved(*made(make(), steps=2)[1:])
    _, optimizer, scheduler = made(make(), on_change="error")
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    assert scheduler.steps == 2


def test_a_schedule_of_one_group_is_named():
    def make(rate):
        a, b = weights()
        optimizer = AdamW([{"params": [a]}, {"params": [b]}], weight_decay=0.1)
        return WeightDecayScheduler(optimizer, FALL, groups=[(1, Constant(rate))])

    with pytest.warns(UserWarning, match=r"checkpoint's: Constant\(0.1\) is Constant\(0.2\)\. The"):
        make(0.2).load_state_dict(make(0.1).state_dict())


@pytest.mark.parametrize(
    ("options", "counts"), [({}, 0.3), ({"on_change": "program"}, 0.05)], ids=["warn", "program"]
)
def test_the_decay_that_is_multiplied_is_the_checkpoints(options, counts):
    state = saved(made(FALL, relative=True, steps=2)[1])[0]
    _, optimizer, scheduler = made(FALL, relative=True, decay=0.05, **options)
    if options:
        optimizer.load_state_dict(state)
    else:
        with pytest.warns(UserWarning, match="group 0 had 0.3 and has 0.05"):
            optimizer.load_state_dict(state)
    assert scheduler.get_last_weight_decay() == [pytest.approx(counts * FALL.rate(2))]

    _, optimizer, scheduler = made(FALL, relative=True, decay=0.05, on_change="error")
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"group 0 had 0.3 and has 0.05.*on_change"):
        optimizer.load_state_dict(state)
    assert str(optimizer.state_dict()) == before and scheduler.steps == 0


def test_a_decay_that_is_replaced_anyway_may_differ():
    state = saved(made(FALL, steps=2)[1])[0]
    _, optimizer, scheduler = made(FALL, decay=0.05, on_change="error")
    optimizer.load_state_dict(state)
    assert scheduler.get_last_weight_decay() == [FALL.rate(2)]


def test_a_policy_that_there_is_not():
    with pytest.raises(ValueError, match="on_change must be one of warn, error, program"):
        made(FALL, on_change="checkpoint")


def test_a_state_from_before_schedules_were_described_is_taken():
    state = saved(*made(FALL, steps=2)[1:])[1]
    del state["schedules"], state["follows"]
    _, _, scheduler = made(Constant(0.1), on_change="error")
    scheduler.load_state_dict(state)
    assert scheduler.steps == 2 and math.isfinite(scheduler.accumulated[0])
