"""A compiled step of the optimizer: the same numbers, and a few compilations however long it is."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from mirrorflow.schedule import Linear
from mirrorflow.weightdecay import WeightDecayScheduler
from optimizers import FALL, MAKE, OFF, by_hand, pull, two_groups, weights

# torch 2.13 warns of itself: of the profiler, and of hooks that it does not trace.
pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 14
NEAR = {"rtol": 1e-4, "atol": 2e-5}  # Adam's bias correction is in float32; a late decay moves 1e-2
RISE = Linear(0.1, 0.6, duration=12)


@pytest.mark.parametrize("schedule", [FALL, OFF, RISE], ids=["fall", "off", "rise"])
@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("adamw", {}, 3),
        ("sgd momentum", {}, 3),
        ("adam", {"decoupled": True}, 2),
        ("sgd nesterov", {"exact_off": True}, 3),
    ],
    ids=["adamw", "sgd", "from outside", "exact off"],
)
@pytest.mark.sample(3)
def test_a_changing_decay_is_compiled_a_few_times(name, options, most, schedule):
    """First with its value, then as any number, and once for 0, which is another branch."""
    torch._dynamo.reset()
    params = weights()
    optimizer = two_groups(MAKE[name], params)
    scheduler = WeightDecayScheduler(optimizer, schedule, **options)
    counter = CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)
    counts = []
    for _ in range(STEPS):
        pull(params)
        step()
        counts.append(counter.frame_count)
    assert counts[0] == 1 and counts[-1] == counts[8] <= most  # not one a step

    eager = weights()
    optimizer = two_groups(MAKE[name], eager)
    plain = WeightDecayScheduler(optimizer, schedule, **options)
    for _ in range(STEPS):
        pull(eager)
        optimizer.step()
    torch.testing.assert_close(params, eager, **NEAR)
    assert scheduler.steps == STEPS and scheduler.audit() == plain.audit()
    if not options:
        expected = by_hand(MAKE[name], schedule.rate, steps=STEPS)
        torch.testing.assert_close(params, expected, **NEAR)
