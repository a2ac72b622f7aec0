"""What happens to runs: killed, changed, poisoned; each with what is said, and what goes on."""

import copy
import math
import signal
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from torch.optim import SGD, AdamW

import mirrorflow as mf
from mirrorflow.control import ControlledDecay
from mirrorflow.weightdecay import PerLayer, WeightDecayScheduler, preview
from optimizers import FALL, MAKE, OFF, STEPS, assert_equal, pull, quiet, two_groups, weights


def run(params, optimizer, steps):
    for _ in range(steps):
        pull(params)
        optimizer.step()


# Killed

KILLED = """
    import os, signal, sys, torch
    sys.path.insert(0, {tests!r})
    from optimizers import FALL, MAKE, pull, two_groups, weights
    from mirrorflow.weightdecay import WeightDecayScheduler

    params = weights()
    optimizer = two_groups(MAKE["adamw"], params)
    scheduler = WeightDecayScheduler(optimizer, FALL)
    for step in range(6):
        pull(params)
        optimizer.step()
        if step in (2, 4):
            torch.save(params, {folder!r} + "/weights.pt")
            torch.save(optimizer.state_dict(), {folder!r} + "/optimizer.pt")
            if step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            torch.save(scheduler.state_dict(), {folder!r} + "/scheduler.pt")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.slow
def test_killed_between_the_optimizers_save_and_the_schedulers(tmp_path):
    code = KILLED.format(tests=str(__file__).rsplit("/", 1)[0], folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=600)
    assert done.returncode == -signal.SIGKILL
    load = partial(torch.load, weights_only=True)
    params = [torch.nn.Parameter(p.detach()) for p in load(tmp_path / "weights.pt")]
    optimizer = two_groups(MAKE["adamw"], params)
    scheduler = WeightDecayScheduler(optimizer, FALL)
    optimizer.load_state_dict(load(tmp_path / "optimizer.pt"))
    scheduler.load_state_dict(load(tmp_path / "scheduler.pt"))
    with pytest.warns(UserWarning, match="at step 5, the state of WeightDecayScheduler at step 3"):
        run(params, optimizer, STEPS - 5)

    whole = weights()
    optimizer = two_groups(MAKE["adamw"], whole)
    expected = WeightDecayScheduler(optimizer, FALL)
    run(whole, optimizer, STEPS)
    assert_equal(params, whole)
    assert scheduler.accumulated == pytest.approx(expected.accumulated, rel=1e-12)


@pytest.mark.parametrize("lost", ["the scheduler's", "the optimizer's"])
def test_counts_that_disagree_are_said(lost):
    """One state of two was never there: the optimizer's own count shows it after a step."""
    params = weights()
    optimizer = two_groups(MAKE["adamw"], params)
    if lost == "the scheduler's":
        run(params, optimizer, 3)  # before there was a scheduler
        WeightDecayScheduler(optimizer, FALL)
        message = "AdamW has taken 4 steps but the decay schedule is at step 1"
    else:
        state = {"steps": 3, "entries": [{"taken": 3, "absorbed": 0.1, "held": None, "span": 1,
                                          "pieces": []}] * 2}  # fmt: skip
        WeightDecayScheduler(optimizer, FALL).load_state_dict(state)
        message = "AdamW has taken 1 steps but the decay schedule is at step 4"
    with pytest.warns(UserWarning, match=message):
        run(params, optimizer, 1)
    run(params, optimizer, 1)  # said once


@pytest.mark.parametrize("entry", [{}, {"taken": 3}, 3])
def test_a_state_whose_ledgers_lack_numbers_is_refused(entry):
    params = weights()
    scheduler = WeightDecayScheduler(AdamW(params, lr=0.1, weight_decay=0.3), FALL)
    before = str(scheduler.state_dict())
    with pytest.raises(ValueError, match="ledger 0 of the state must have the keys absorbed, held"):
        scheduler.load_state_dict({"steps": 3, "entries": [entry]})
    assert str(scheduler.state_dict()) == before


# Changed between the runs


def test_an_optimizer_with_another_number_of_groups():
    params = weights()
    two = two_groups(MAKE["adamw"], params)
    run(params, two, 2)
    one = AdamW(weights(), lr=0.1, weight_decay=0.3)
    scheduler = WeightDecayScheduler(one, FALL)
    before = str(scheduler.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        one.load_state_dict(two.state_dict())
    first = WeightDecayScheduler(two, FALL)
    with pytest.raises(ValueError, match="has 2 ledgers, this optimizer needs 1"):
        scheduler.load_state_dict(first.state_dict())
    assert str(scheduler.state_dict()) == before


def test_a_group_that_was_added_in_the_run_is_added_again():
    def assemble():
        params = weights(3)
        optimizer = two_groups(MAKE["adamw"], params[:2])
        return params, optimizer, WeightDecayScheduler(optimizer, FALL)

    def grow(params, optimizer):
        optimizer.add_param_group({"params": params[2:], "weight_decay": 0.2})

    whole, optimizer, expected = assemble()
    run(whole, optimizer, 3)
    grow(whole, optimizer)
    run(whole, optimizer, 2)
    saved = copy.deepcopy((optimizer.state_dict(), expected.state_dict()))
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in whole]
    run(whole, optimizer, 2)

    params, optimizer, scheduler = assemble()
    with pytest.raises(ValueError, match="Add the groups that were added in the run, then load"):
        scheduler.load_state_dict(saved[1])
    grow(params, optimizer)
    with torch.no_grad():
        for p, value in zip(params, fresh, strict=True):
            p.copy_(value)
    scheduler.step()
    for part, state in zip((scheduler, optimizer), saved[::-1], strict=True):
        part.load_state_dict(state)
    run(params, optimizer, 2)
    assert_equal(params, whole)
    assert scheduler.audit() == expected.audit()


# NaN


@quiet
@pytest.mark.parametrize("options", [{}, {"decoupled": True}, {"exact_off": True}])
def test_nan_in_one_tensor_stays_there(options):
    params = weights()
    optimizer = SGD(params, lr=0.1, momentum=0.9, weight_decay=0.5)
    scheduler = WeightDecayScheduler(optimizer, OFF, **options)
    with torch.no_grad():
        params[0].fill_(math.nan)
    run(params, optimizer, STEPS)
    assert torch.isfinite(params[1]).all() and scheduler.steps == STEPS
    assert math.isfinite(scheduler.accumulated[0]) and scheduler.get_last_weight_decay() == [0.0]


def test_nan_in_one_layer_leaves_the_other_loops_working():
    net = torch.nn.ModuleList(torch.nn.MultiheadAttention(8, 2) for _ in range(2))
    optimizer = AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    held = PerLayer(lambda layer: mf.HoldRatio(1.5, 0.1, gain=0.5))
    control = ControlledDecay(net, optimizer, held, track_every=1)
    with torch.no_grad():
        net[0].in_proj_weight.fill_(math.nan)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    logs = control.step()
    reasons = {name: loop.log[-1]["reason"] for name, loop in held.loops.items()}
    assert reasons == {"0": "nothing to measure", "1": "raising"}
    assert held.loops["0"].current == 0.1 < held.loops["1"].current
    assert all(map(math.isfinite, logs.values()))


# Optimizers and schedules that do not fit


def test_an_optimizer_without_weight_decay_is_decayed_from_outside():
    class Bare(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.5})

        def step(self, closure=None):
            pass

    params = weights()
    with pytest.raises(ValueError, match=r"group of Bare must have weight_decay.*decoupled=True"):
        WeightDecayScheduler(Bare(params), OFF)
    with pytest.raises(ValueError, match=r"group of Bare must have weight_decay.*decoupled=True"):
        WeightDecayScheduler(Bare(params), OFF, exact_off=True)
    optimizer, before = Bare(params), [p.detach().clone() for p in params]
    scheduler = WeightDecayScheduler(optimizer, OFF, decoupled=True)
    run(params, optimizer, STEPS)
    torch.testing.assert_close(params, [p * 0.75**4 for p in before])
    assert scheduler.accumulated == [-1.0]


@pytest.mark.parametrize(
    "schedule", [[0.3, 0.2, 0.1].__getitem__, {0: 0.3, 1: 0.2, 2: 0.1}.__getitem__]
)
def test_a_schedule_shorter_than_the_run(schedule):
    """The preview shows it before the run; in the run no step is taken with a decay made up."""
    params = weights()
    optimizer = two_groups(MAKE["adamw"], params)
    scheduler = WeightDecayScheduler(optimizer, schedule)
    with pytest.raises(RuntimeError, match=r"no value at step 3.*let it keep its last value"):
        preview(scheduler, 4)
    run(params, optimizer, 3)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="no value at step 3"):
        run(params, optimizer, 1)
    assert_equal(params, before)
    assert scheduler.steps == 3


def test_a_schedule_as_long_as_the_run_is_enough_for_what_calls_back():
    """A callback is called after the last step, too, and what it saves there can be loaded."""

    def assemble():
        net = torch.nn.Linear(3, 1)
        optimizer = AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
        return net, optimizer, ControlledDecay(net, optimizer, [0.3, 0.2, 0.1].__getitem__)

    net, optimizer, control = assemble()
    for _ in range(3):
        net(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        control.step()
    assert control.logs()["weight_decay"] == 0.1
    saved = copy.deepcopy((optimizer.state_dict(), control.state_dict()))
    for order in ((1, 2), (2, 1)):
        parts = assemble()
        for i in order:
            parts[i].load_state_dict(saved[i - 1])
        assert parts[2].scheduler.audit() == control.scheduler.audit()


def test_a_schedule_that_fails_in_its_own_way_says_so_itself():
    def broken(step):
        return 1 / (step - 1)

    optimizer = AdamW(weights(), weight_decay=0.1)
    with pytest.raises(ValueError, match=r"gives -1.0 at step 0"):
        WeightDecayScheduler(optimizer, broken)
    with pytest.raises(TypeError, match="gives None at step 0"):
        WeightDecayScheduler(optimizer, lambda step: None)
    with pytest.raises(ZeroDivisionError):
        WeightDecayScheduler(optimizer, lambda step: 1 / step)
    assert WeightDecayScheduler(optimizer, OFF).steps == 0  # nothing was left behind


# Weights without data


@quiet
@pytest.mark.parametrize("options", [{}, {"decoupled": True}, {"exact_off": True}])
def test_weights_on_the_meta_device(options):
    """A dry run: schedule and ledger work, spectra say what is missing."""
    with torch.device("meta"):
        net = torch.nn.MultiheadAttention(8, 2)
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    scheduler = WeightDecayScheduler(optimizer, OFF, **options)
    for _ in range(6):
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert scheduler.get_last_weight_decay() == [0.0] and scheduler.accumulated[0] < 0
    assert all(p.is_meta for p in net.parameters())
    with pytest.raises(ValueError, match="meta"):
        mf.SpectralTracker(net).measure()


def test_a_model_without_attention_is_refused_by_what_needs_one():
    net = torch.nn.Linear(3, 3)
    optimizer = AdamW(net.parameters(), weight_decay=0.1)
    with pytest.raises(ValueError, match="Linear"):
        ControlledDecay(net, optimizer, mf.Constant(0.1), track_every=5)
    control = ControlledDecay(net, optimizer, mf.Constant(0.1))
    assert control.tracker is None and control.logs() == {
        "weight_decay": 0.1,
        "decay_per_step": pytest.approx(1e-4),
        "absorbed_decay": 0.0,
        "decay_timescale": pytest.approx(1e4),
    }
