"""What the rate means, in runs: with learning rates that rise, and with none that are known."""

import pytest
import torch
from torch.optim.lr_scheduler import CyclicLR

from mirrorflow.schedule import Constant
from mirrorflow.weightdecay import WeightDecayScheduler, learning_rates
from optimizers import FRACTION, Plain


def cyclic(make):
    w = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer = make([w], lr=0.1, weight_decay=0.1)
    return w, optimizer, CyclicLR(optimizer, 0.1, 1.0, step_size_up=4, cycle_momentum=False)


@pytest.mark.parametrize("make", [torch.optim.AdamW, Plain])
@pytest.mark.parametrize("convention", FRACTION)
def test_with_a_learning_rate_that_rises_to_its_peak(make, convention):
    w, optimizer, lr = cyclic(make)
    peak = max(learning_rates(lr, 20))
    assert peak == 1.0
    WeightDecayScheduler(optimizer, Constant(0.1), convention=convention, peak=peak)
    left = 1.0
    for _ in range(12):
        left *= 1 - FRACTION[convention](0.1, optimizer.param_groups[0]["lr"], peak)
        w.grad = torch.zeros_like(w)
        optimizer.step()
        lr.step()
    assert w[0, 0].item() == pytest.approx(left)


def test_a_peak_that_is_not_known_is_asked_for_before_a_step_is_taken():
    w = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([w], lr=0.1, weight_decay=0.1)
    WeightDecayScheduler(optimizer, Constant(0.1), convention="adamc")
    w.grad = torch.zeros_like(w)
    with pytest.raises(ValueError, match="peak of the learning rate is not known"):
        optimizer.step()
    assert w[0, 0] == 1
    lr = CyclicLR(optimizer, 0.1, 1.0, step_size_up=4, cycle_momentum=False)
    optimizer.step()  # at 0.1, of which nobody can tell that it will rise
    lr.step()
    with pytest.raises(ValueError, match=r"above its peak 0\.1.*peak=max"):
        optimizer.step()
