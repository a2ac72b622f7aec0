"""What the preview knows of closed loops, metrics, and groups of one name."""

import math
import warnings

import matplotlib
import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau, StepLR

from mirrorflow.control import ControlledDecay
from mirrorflow.schedule import Constant, SwitchOff
from mirrorflow.weightdecay import (
    HoldRatio,
    OffAtBudget,
    WeightDecayScheduler,
    budget,
    preview,
    table,
)
from optimizers import FALL


def weight():
    return torch.nn.Parameter(torch.ones(2, 2))


def train(control, params, steps, lr):
    for _ in range(steps):
        for p in params:
            p.grad = torch.zeros_like(p)
        control.scheduler.optimizer.step()
        lr.step()
        control.step()


def test_off_at_a_budget_is_seen_where_it_will_be_in_the_run():
    net = torch.nn.Linear(2, 2, bias=False)
    optimizer = AdamW(net.parameters(), lr=0.5, weight_decay=0.1)
    loop = OffAtBudget(0.1, budget=0.2)
    control = ControlledDecay(net, optimizer, loop)
    lr = CosineAnnealingLR(optimizer, T_max=20)
    seen = preview(control.scheduler, 12, lr)
    assert loop.current == 0.1 and not loop.log  # the loop itself has not moved
    train(control, list(net.parameters()), 5, lr)
    later = preview(control.scheduler, 7, lr)
    train(control, list(net.parameters()), 7, lr)
    assert seen.rows == later.rows == control.scheduler.audit()
    decays = seen.curves["0"][1]
    assert 0 < decays.count(0.1) < 12 and set(decays) == {0.0, 0.1}
    assert seen.remarks == [] and loop.current == 0.0


def test_the_budget_of_a_loop_is_the_most_that_its_groups_have_absorbed():
    groups = [{"params": [weight()], "lr": 0.1}, {"params": [weight()], "lr": 1.0}]
    optimizer = AdamW(groups, weight_decay=0.1)
    scheduler = WeightDecayScheduler(optimizer, OffAtBudget(0.1, budget=0.25))
    seen = preview(scheduler, 6)
    for name in "01":  # the second group spends 0.1 in a step, so that the third is the last
        assert seen.curves[name][1] == [0.1, 0.1, 0.1, 0.0, 0.0, 0.0]


def test_what_answers_to_measurements_is_named():
    optimizer = AdamW([weight()], lr=0.5, weight_decay=0.1)
    seen = preview(WeightDecayScheduler(optimizer, HoldRatio(3.0, 0.1, 0.1)), 3)
    assert seen.remarks == ["HoldRatio answers to measurements: shown as if it kept its rate"]
    assert str(seen).startswith(f"{table(seen.rows)}\n{seen.remarks[0]}\n")


def test_groups_of_one_name_get_different_labels():
    matplotlib.use("Agg")
    groups = [
        {"params": [weight()], "name": "layer", "lr": 0.5},
        {"params": [weight()], "name": "layer", "lr": 0.25},
        {"params": [weight()], "name": "head", "lr": 1.0},
    ]
    scheduler = WeightDecayScheduler(AdamW(groups, weight_decay=0.1), Constant(0.5))
    seen = preview(scheduler, 2)
    assert {name: curve[0] for name, curve in seen.curves.items()} == {
        "layer (group 0)": [0.5, 0.5],
        "layer (group 1)": [0.25, 0.25],
        "head": [1.0, 1.0],
    }
    assert [row["group"] for row in seen.rows] == list(seen.curves)
    assert len(seen.plot().axes[0].lines) == 3


@pytest.mark.parametrize(("count", "name"), [(1, "all"), (24, "layers.{}"), (3, "{}" + 70 * "x")])
def test_the_legend_lies_below_the_curves_and_inside_the_picture(count, name):
    groups = [{"params": [weight()], "name": name.format(i)} for i in range(count)]
    scheduler = WeightDecayScheduler(AdamW(groups, lr=1e-3, weight_decay=0.1), Constant(0.5))
    figure = preview(scheduler, 20).plot()
    figure.draw_without_rendering()  # warnings are errors: a layout that does not fit fails here
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert len(legend.get_texts()) == count
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    for axis in figure.axes:
        assert axis.get_legend() is None and box.y1 <= axis.get_window_extent().y0
        assert axis.get_window_extent().height > 100
    lines = figure.axes[0].lines
    assert len({line.get_linestyle() for line in lines[:4]}) == min(count, 4)


def test_a_scheduler_that_needs_a_metric_is_refused_with_what_to_do():
    optimizer = SGD([weight()], lr=0.5, weight_decay=0.1)
    scheduler = WeightDecayScheduler(optimizer, FALL)
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau answers to metrics.*learning rates"):
        preview(scheduler, 5, ReduceLROnPlateau(optimizer))


class Needs(StepLR):
    def step(self, loss):  # pyright: ignore
        super().step()


def test_so_is_one_that_is_not_of_torch():
    optimizer = SGD([weight()], lr=0.5, weight_decay=0.1)
    lr = StepLR(optimizer, 2)
    lr.__class__ = Needs  # made as a StepLR, whose constructor steps without a loss
    with pytest.raises(ValueError, match="Needs answers to loss"):
        preview(WeightDecayScheduler(optimizer, FALL), 5, lr)


def test_a_scheduler_of_another_optimizer_and_no_learning_rates_are_refused():
    optimizer, other = (SGD([weight()], lr=0.5, weight_decay=0.1) for _ in range(2))
    scheduler = WeightDecayScheduler(optimizer, SwitchOff(0.1, at=2))
    with pytest.raises(ValueError, match="StepLR belongs to another optimizer"):
        preview(scheduler, 5, StepLR(other, 2))
    with pytest.raises(TypeError, match=r"the learning rate of each step, got 0\.5"):
        preview(scheduler, 5, 0.5)  # pyright: ignore


@pytest.mark.parametrize("make", [AdamW, SGD])
@pytest.mark.parametrize(
    ("lrs", "error", "said"),
    [
        ([0.1, -0.1, 0.1], ValueError, r"finite number >= 0, got -0\.1 at step 1\. Correct it"),
        ([math.nan] * 3, ValueError, "a learning rate must be a finite number >= 0, got nan"),
        ([0.1, 0.1, math.inf], ValueError, "finite number >= 0, got inf at step 2"),
        (["a"] * 3, TypeError, "a learning rate must be a number, got 'a'"),
        ([0.1, None, 0.1], TypeError, "a learning rate must be a number, got None"),
    ],
)
def test_learning_rates_are_checked_as_those_of_a_budget(make, lrs, error, said):
    scheduler = WeightDecayScheduler(make([weight()], lr=0.5, weight_decay=0.1), Constant(0.1))
    for call in (lambda: preview(scheduler, 3, lrs), lambda: budget(Constant(0.1), lrs)):
        with pytest.raises(error, match=said):
            call()


def test_so_are_those_of_a_scheduler_and_of_the_groups():
    optimizer = SGD([weight()], lr=0.5, weight_decay=0.1)
    below = LambdaLR(optimizer, lambda step: 1.0 - step)
    scheduler = WeightDecayScheduler(optimizer, Constant(0.1))
    assert preview(scheduler, 2, below).curves["0"][0] == [0.5, 0.0]
    with pytest.raises(ValueError, match=r"got -0\.5 at step 2\. Correct it, or the scheduler"):
        preview(scheduler, 3, below)
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="got nan at step 0"):
        preview(scheduler, 3)


def test_accelerates_wrapped_scheduler_is_taken():
    accelerate = pytest.importorskip("accelerate")
    net = torch.nn.Linear(2, 2)
    optimizer = AdamW(net.parameters(), lr=0.5, weight_decay=0.1)
    lr = StepLR(optimizer, step_size=2)
    wrapped = accelerate.Accelerator(cpu=True).prepare(lr)
    assert not isinstance(wrapped, StepLR)
    scheduler = WeightDecayScheduler(optimizer, Constant(0.1))
    assert preview(scheduler, 3, wrapped).curves["0"][0] == [0.5, 0.5, 0.05]


def test_a_budget_of_several_precisions_is_spent_when_the_run_spends_it():
    def make():
        whole = torch.nn.Parameter(torch.ones(8, 8))
        half = torch.nn.Parameter(torch.ones(8, 8).bfloat16())
        optimizer = torch.optim.AdamW([whole, half], lr=1e-3, weight_decay=1.0)
        return optimizer, WeightDecayScheduler(optimizer, OffAtBudget(1.0, budget=0.02))

    decays = preview(make()[1], 40).curves["0"][1]
    optimizer, _ = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what rounding swallows
        for decay in decays:
            for w in optimizer.param_groups[0]["params"]:
                w.grad = torch.zeros_like(w)
            optimizer.step()
            assert optimizer.param_groups[0]["weight_decay"] == decay
    assert set(decays) == {0.0, 1.0}
