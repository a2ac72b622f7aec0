"""Closed loops in a training run: one for each layer, fed by spectra, resumed from anywhere."""

import copy
import io
import itertools
import math

import pytest
import torch

import mirrorflow as mf
from mirrorflow.control import ControlledDecay
from mirrorflow.weightdecay import PerLayer
from optimizers import assert_nets_near

LR, STEPS, STOP, EVERY = 0.01, 12, 7, 2


def hold(layer):
    """A loop whose target depends on the layer, so that the rates go apart."""
    return mf.HoldRatio(
        1.8 if "0" in layer else 3.5, 0.3, gain=0.8, bounds=(0.05, 0.6), slew=0.1, deadband=0.01
    )


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(torch.nn.MultiheadAttention(16, 2) for _ in range(2))
        self.head = torch.nn.Linear(16, 1)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x, x, x, need_weights=False)[0]
        return self.head(x)


def assemble(schedule, decay=0.1, **options):
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=decay)
    return net, optimizer, ControlledDecay(net, optimizer, schedule, track_every=EVERY, **options)


def backward(net, step):
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(step))
    (net(x) - x.sum(-1, keepdim=True)).square().mean().backward()


def train(net, optimizer, control, start, stop):
    logs = []
    for step in range(start, stop):
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()
        if control is not None:
            logs.append(control.step())
    return logs


def values(net):
    return [p.detach().clone() for p in net.parameters()]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_each_layer_has_its_own_rate_as_in_a_loop_by_hand():
    held = PerLayer(hold)
    net, optimizer, control = assemble(held)
    train(net, optimizer, control, 0, STEPS)
    log = {layer: {r["step"]: r["rate"] for r in held.loops[layer].log} for layer in held.loops}
    assert list(log) == ["blocks.0", "blocks.1"]
    assert log["blocks.0"][STEPS] > 0.3 > log["blocks.1"][STEPS]

    by_hand = Net()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=LR, weight_decay=0.0)
    rates = dict.fromkeys(log, 0.3)
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(by_hand, step)
        with torch.no_grad():
            for name, p in by_hand.named_parameters():
                layer = name.split(".in_proj_weight")[0]
                p.mul_(1 - LR * rates.get(layer, 0.1))  # the others keep the decay of their group
        optimizer.step()
        rates = {layer: log[layer].get(step + 1, rates[layer]) for layer in log}
    assert_nets_near(net, by_hand)


def test_the_answer_is_to_the_measurement_of_the_layer():
    held = PerLayer(hold)
    net, optimizer, control = assemble(held)
    logs = train(net, optimizer, control, 0, STEPS)
    measured = {step: {r.name: r.ratio for r in m.records} for step, m in control.measurements}
    assert [(row["step"], row["value"]) for row in held.log if row["layer"] == "blocks.1"] == [
        (step, measured[step]["blocks.1"]) for step in range(EVERY, STEPS + 1, EVERY)
    ]
    assert logs[0] == {} and logs[1]["ratio/blocks.0"] == measured[2]["blocks.0"]
    assert logs[1]["weight_decay/blocks.0"] == held.loops["blocks.0"].log[0]["rate"]
    assert logs[-1]["spectrum/ratio"] == pytest.approx(sum(measured[STEPS].values()) / 2)


def test_bounds_slew_and_deadband_hold_for_every_layer():
    held = PerLayer(hold)
    train(*assemble(held), 0, 40)
    for loop in held.loops.values():
        rates = [0.3, *(row["rate"] for row in loop.log)]
        assert all(0.05 <= rate <= 0.6 for rate in rates) and len(set(rates)) > 3
        assert max(abs(b - a) for a, b in itertools.pairwise(rates)) <= 0.1 + 1e-12
    assert {"raising, slew limit", "lowering, slew limit", "at its upper bound"} <= {
        row["reason"] for row in held.log
    }


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda: PerLayer(hold), "everything"),
        (lambda: PerLayer(hold), "the optimizer"),
        (lambda: mf.HoldRatio(1.8, 0.3, gain=0.8, deadband=0.0), "the optimizer"),
        (lambda: mf.OffWhenLevel(0.3, window=3, tol=0.5, earliest=4), "the optimizer"),
        (lambda: PerLayer(lambda layer: mf.OffAtBudget(0.3, budget=0.025)), "the optimizer"),
    ],
)
def test_a_stopped_loop_continues_bit_for_bit(make, kept):
    """Also if nothing but weights and optimizer was saved, as most frameworks do."""
    whole = make()
    net, optimizer, control = assemble(whole)
    train(net, optimizer, control, 0, STEPS)
    expected = values(net)

    net, optimizer, control = assemble(make())
    train(net, optimizer, control, 0, STOP)
    buffer = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict(), control.state_dict()], buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)

    again = make()
    net, optimizer, control = assemble(again)
    net.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    if kept == "everything":
        control.load_state_dict(saved[2])
        train(net, optimizer, control, STOP, STEPS)
        assert again.log == whole.log
    else:
        with pytest.warns(UserWarning, match=f"record of steps 0 to {STOP}"):
            train(net, optimizer, control, STOP, STEPS)
        rows = [row for row in whole.log if row["step"] > STOP]
        assert again.log == rows
    assert equal(values(net), expected)


def test_a_loop_made_after_the_optimizer_has_loaded():
    net, optimizer, control = assemble(PerLayer(hold))
    train(net, optimizer, control, 0, STOP)
    fresh = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.1)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    control.close()
    assert "weight_decay_feedback" not in optimizer.param_groups[0]
    rates = [loop.current for loop in control.schedule.loops.values()]
    held = PerLayer(hold)
    ControlledDecay(net, fresh, held, track_every=EVERY)
    assert [loop.current for loop in held.loops.values()] == rates != [0.3, 0.3]


def test_the_checkpoint_of_another_loop_is_refused():
    net, optimizer, control = assemble(PerLayer(hold))
    train(net, optimizer, control, 0, 3)
    saved = optimizer.state_dict()
    net, optimizer, control = assemble(PerLayer(lambda layer: mf.OffWhenLevel(0.1)))
    with pytest.raises(ValueError, match="state of HoldRatio, not of OffWhenLevel"):
        optimizer.load_state_dict(saved)


def test_a_budget_is_spent_to_the_step_and_needs_no_spectra():
    net = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.5)
    off = mf.OffAtBudget(0.5, budget=0.175)
    control = ControlledDecay(net, optimizer, off)
    for _ in range(6):
        net(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        assert control.step() == {}
    assert control.scheduler.accumulated == [pytest.approx(-0.2)]
    assert [(row["step"], row["rate"]) for row in off.log] == [(4, 0.0)]


def test_resuming_is_not_measuring():
    net, optimizer, control = assemble(PerLayer(hold))
    train(net, optimizer, control, 0, 2 * EVERY)
    saved = copy.deepcopy(optimizer.state_dict())
    net, optimizer, control = assemble(PerLayer(hold))
    optimizer.load_state_dict(saved)
    assert control.scheduler.steps == 2 * EVERY
    assert control.step() == {} and control.schedule.log == []
    backward(net, 0)
    with pytest.warns(UserWarning, match="record of steps 0 to 4"):
        optimizer.step()  # and back, before anybody has noted it
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert control.step() == {} and control.schedule.log == []


def test_accumulated_gradients_are_not_measured_twice():
    net, optimizer, control = assemble(mf.Constant(0.1))
    for micro in range(8):
        backward(net, micro)
        if micro % 2:
            optimizer.step()
        control.step()
    assert [step for step, _ in control.measurements] == [2, 4]


@pytest.mark.parametrize("slew", [math.inf, 0.04])
def test_without_authority_the_loop_gives_up(slew):
    loop = mf.HoldRatio(3.0, 0.1, gain=10.0, bounds=(0.0, 0.2), patience=5, slew=slew)
    with pytest.warns(RuntimeWarning, match=r"no authority.*goes back to 0.1"):
        for step in range(20):
            loop.update(step, 4.0)
    assert loop.current == pytest.approx(0.1) and max(row["rate"] for row in loop.log) == 0.2
    assert loop.log[-1]["reason"] == "without authority: given up"
    again = mf.HoldRatio(3.0, 0.1, gain=10.0, bounds=(0.0, 0.2), patience=5, slew=slew)
    again.load_state_dict(loop.state_dict())
    assert again.update(20, 6.0) == loop.update(20, 6.0) == pytest.approx(0.1)


def test_mistakes_are_named():
    w, v = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    with pytest.raises(TypeError, match="lambda layer"):
        PerLayer(mf.Constant(0.1).breakpoints)
    with pytest.raises(TypeError, match="must be a Feedback"):
        PerLayer(lambda layer: 0.1).rules({"a": [w]})
    with pytest.raises(ValueError, match="'a' and 'b' share a weight"):
        PerLayer(hold).rules({"a": [w], "b": [v, w]})
    same = hold("a")
    with pytest.raises(ValueError, match="a loop of its own"):
        PerLayer(lambda layer: same).rules({"a": [w], "b": [v]})
    held = PerLayer(hold)
    held.rules({"a": [w], "b": [v]})
    with pytest.raises(ValueError, match="no measurement of 'b'"):
        held.update(0, {"a": 2.0})
    with pytest.raises(ValueError, match=r"layers \['a'\], these are \['a', 'b'\]"):
        held.load_state_dict({"a": {}})
    with pytest.raises(ValueError, match="track_every must be positive with PerLayer"):
        ControlledDecay(Net(), torch.optim.SGD(Net().parameters()), held)
    with pytest.raises(ValueError, match="track_every must be positive"):
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters())
        ControlledDecay(net, optimizer, mf.Constant(0.1)).measure(0)
