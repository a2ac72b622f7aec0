"""The way of one `optimizer.step()` through the files of the package, counted with a profiler."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.optim import SGD, AdamW

import mirrorflow as mf
from mirrorflow.weightdecay import WeightDecayScheduler
from optimizers import pull, quiet, weights

SOURCE = Path(mf.__file__).parent
MOST = 6
MAKE = {
    "adamw": partial(AdamW, lr=0.1, weight_decay=0.1),
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
}
RAMP = mf.join([(mf.Linear(0.0, 0.1, 3.0), 3.0), (mf.Cyclic(mf.SwitchOff(0.1, at=4), 6, 2), None)])
SCHEDULES = {
    "switched off": lambda: mf.SwitchOff(0.1, at=50),
    "composed": lambda: RAMP,
    "function": lambda: lambda step: 0.1 / (step + 1),
    "held": lambda: mf.HoldRatio(target=1.5, rate=0.1, gain=0.1),
    "off below": lambda: mf.OffBelow(0.1, target=1.5),
    "budget": lambda: mf.OffAtBudget(0.1, budget=5.0),
}
OPTIONS = {
    "plain": {},
    "relative": {"relative": True},
    "decoupled": {"decoupled": True},
    "fixed": {"convention": "fixed"},
    "adamc": {"convention": "adamc", "peak": 0.1},
    "several": {"groups": [(1, mf.Constant(0.2))]},
}


def entered(call):
    """Return the files of the package that a call enters, in the order of the calls."""
    files = []

    def note(frame, event, arg):
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(SOURCE):
            files.append(Path(frame.f_code.co_filename).relative_to(SOURCE).as_posix())

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return files


def steady_step(make, schedule, options):
    """Return the files of a step in the midst of a run, measured values and all."""
    params = weights()
    optimizer = make([{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.05}])
    scheduler = WeightDecayScheduler(optimizer, schedule, **options)
    for step in range(6):
        pull(params)
        optimizer.step()
        if isinstance(schedule, (mf.HoldRatio, mf.OffBelow)):
            schedule.update(step, 1.6)
    files = entered(optimizer.step)
    assert scheduler.steps == 7
    return files


@quiet
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_step_stays_within_six_files(make, schedule, options):
    files = set(steady_step(make, schedule(), options))
    assert {"weightdecay/_step.py", "weightdecay/_ledger.py"} <= files
    assert len(files) <= MOST, sorted(files)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_step_that_keeps_momentum_apart_stays_within_six_files(schedule):
    files = set(steady_step(MAKE["sgd"], schedule(), {"exact_off": True}))
    assert "weightdecay/_momentum.py" in files and len(files) <= MOST, sorted(files)


def test_a_step_with_a_closure_stays_within_six_files():
    params = weights()
    optimizer = AdamW(params, lr=0.1, weight_decay=0.1)
    WeightDecayScheduler(optimizer, RAMP, decoupled=True)
    for _ in range(6):
        optimizer.step(lambda: pull(params))
    files = set(entered(lambda: optimizer.step(lambda: pull(params))))
    assert len(files) <= MOST, sorted(files)


def test_the_count_sees_every_file_that_a_call_enters():
    """Without the scheduler a step enters no file, and making one enters more than a step."""
    params = weights()
    optimizer = torch.optim.AdamW(params, weight_decay=0.1)
    pull(params)
    assert entered(optimizer.step) == []
    assert len(set(entered(lambda: WeightDecayScheduler(optimizer, RAMP)))) > MOST
