"""accelerate: a small real model is trained, stopped, resumed, and compared with no stop."""

import warnings

import pytest
import torch

import mirrorflow as mf
from mirrorflow.control import ControlledDecay
from mirrorflow.weightdecay import PerLayer, learning_rates

accelerate = pytest.importorskip("accelerate")

STEPS, STOP, OFF, LR = 10, 6, 4, 0.01


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = torch.nn.MultiheadAttention(8, 2)
        self.head = torch.nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def prepared(accumulate=1):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    return accelerator, *accelerator.prepare(net, optimizer, cosine)


def train(accelerator, net, optimizer, cosine, control, start, stop):
    for step in range(start, stop):
        x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(step))
        with accelerator.accumulate(net):
            accelerator.backward((net(x) - 1).square().mean())
            optimizer.step()
            control.step()
            cosine.step()
            optimizer.zero_grad()


def equal(ours, theirs):
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def off(net, optimizer):
    return mf.WeightDecayScheduler(optimizer, mf.SwitchOff(0.5, at=OFF))


def hold(net, optimizer):
    loops = PerLayer(lambda layer: mf.HoldRatio(1.5, 0.3, gain=0.8, deadband=0.0))
    return ControlledDecay(net, optimizer, loops, track_every=2)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
@pytest.mark.parametrize("make", [off, hold])
def test_a_stopped_run_continues_bit_for_bit(tmp_path, make):
    def assemble():
        parts = prepared()
        control = make(*parts[1:3])
        parts[0].register_for_checkpointing(control)
        return *parts, control

    whole = assemble()
    train(*whole, 0, STEPS)
    first = assemble()
    train(*first, 0, STOP)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of accelerate's saving
        first[0].save_state(str(tmp_path))
        second = assemble()
        second[0].load_state(str(tmp_path))
    train(*second, STOP, STEPS)
    assert equal(second[1], whole[1])
    scheduler = getattr(second[-1], "scheduler", second[-1])
    assert scheduler.steps == STEPS
    assert scheduler.audit() == getattr(whole[-1], "scheduler", whole[-1]).audit()


def test_accumulated_gradients_and_the_wrapped_optimizer():
    parts = prepared(accumulate=3)
    scheduler = off(*parts[1:3])
    assert scheduler.optimizer is parts[2].optimizer
    train(*parts, scheduler, 0, 9)
    assert scheduler.steps == 3
    assert scheduler.accumulated == [pytest.approx(-0.5 * (LR + lrs(2)))]


def lrs(steps):
    """The learning rates after the first of so many steps, added up."""
    optimizer = torch.optim.SGD(Net().parameters(), lr=LR)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    return sum(learning_rates(cosine, steps + 1)[1:])


def test_a_prepared_scheduler_is_left_alone():
    """What is an LRScheduler accelerate would step once per process; this is none."""
    accelerator, net, optimizer, _ = prepared()
    scheduler = off(net, optimizer)
    assert accelerator.prepare(scheduler) is scheduler
