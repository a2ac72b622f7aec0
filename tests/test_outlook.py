"""What a preview says decay comes to, beside literal sums and loops that really train."""

import math

import pytest
import torch
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from mirrorflow.control import ControlledDecay
from mirrorflow.optim import MirrorAdam
from mirrorflow.schedule import Constant, Cosine, Linear, SwitchOff
from mirrorflow.weightdecay import (
    HoldRatio,
    OffAtBudget,
    OffBelow,
    OffWhenLevel,
    WeightDecayScheduler,
    outlook_table,
    preview,
)
from mirrorflow.weightdecay._laws import LAWS, geometry, law_of

BF16 = torch.bfloat16
FALL = "ignore:.*decay in the gradient"


def weight(dtype=torch.float64, size=4):
    return torch.nn.Parameter(torch.ones(size, dtype=dtype))


def seen_of(optimizer, schedule, steps, lr=None, options=None, **scale):
    with WeightDecayScheduler(optimizer, schedule, **(options or {})) as scheduler:
        return preview(scheduler, steps, lr, **scale)


@pytest.mark.parametrize("seed", range(12))
def test_a_and_the_shrinkage_are_those_of_a_literal_loop(seed):
    rng = torch.Generator().manual_seed(seed)
    lr, decay = (float(torch.rand((), generator=rng)) * scale for scale in (0.3, 0.9))
    steps = 5 + seed
    schedule = [SwitchOff(decay, at=steps // 2), Linear(decay, 0.0, duration=steps)][seed % 2]
    optimizer = AdamW([weight()], lr=lr, weight_decay=0.1)
    (found,) = seen_of(
        optimizer, schedule, steps, CosineAnnealingLR(optimizer, T_max=steps)
    ).outlooks
    a, m, w = 0.0, 1.7, -0.4
    for t in range(steps):
        s = 0.5 * lr * (1 + math.cos(math.pi * t / steps)) * float(schedule.rate(t))
        a, m, w = a - s, (1 - s) * m, (1 - s) * w
    assert found.a == pytest.approx(a, rel=1e-12) == found.asked
    assert found.shrink == pytest.approx(1 - m * w / (1.7 * -0.4), rel=1e-10)
    assert found.part == 1 and not found.notes


def test_lora_at_the_usual_strength_comes_to_nothing():
    optimizer = AdamW([weight()], lr=5e-6, weight_decay=0.1)
    seen = seen_of(optimizer, Constant(0.1), 3000, size=0.1, start=1 / 6)
    (found,) = seen.outlooks
    assert found.a == pytest.approx(-0.0015) and found.shrink == pytest.approx(0.003, rel=2e-3)
    assert found.geometry.state == "still"
    first, second, third = (line.replace("\n", " ") for line in seen.to_dict()["sentences"])
    assert "a = -0.0015" in first and "all of it acts in float64" in first
    assert "0.3% at most" in second and "does not move" in second and "sign descent" in second
    assert "23.1, 231 times" in third


@pytest.mark.parametrize("seed", range(8))
def test_the_decay_that_is_needed_does_what_it_is_needed_for(seed):
    rng = torch.Generator().manual_seed(seed)
    lr, target = 0.01, 0.1 + 0.8 * float(torch.rand((), generator=rng))
    make = [lambda w: AdamW(w, lr=lr, weight_decay=0.1), lambda w: SGD(w, lr=lr, weight_decay=0.1)]
    found = seen_of(make[seed % 2]([weight()]), Constant(0.05), 400, target=target).outlooks[0]
    w = weight()
    optimizer = make[seed % 2]([w])
    for group in optimizer.param_groups:
        group["weight_decay"] = found.needed
    for _ in range(400):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    left = float(w.detach()[0] ** 2)
    assert 1 - left == pytest.approx(target, abs=0.01)  # up to the squares of lr x decay


def lost(draw, strength, steps, **options):
    """Return the weights before a run of AdamW in bfloat16, and a by what its decays took."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(draw(40_000).to(BF16))
    first, a = w.detach().clone(), 0.0
    optimizer = AdamW([w], lr=strength, weight_decay=1.0, **options)
    for _ in range(steps):
        with torch.no_grad():
            w.copy_(draw(40_000).to(BF16))  # as if updates had mixed the mantissas
        w.grad, before = torch.zeros_like(w), w.detach().double().clone()
        optimizer.step()
        a -= float(before @ (before - w.detach().double())) / float(before @ before)
    return torch.nn.Parameter(first), a


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("draw", [torch.randn, lambda n: torch.rand(n) - 0.5])
@pytest.mark.parametrize("strength", [1e-4, 1.8e-3, 2.5e-3, 4e-3, 1e-2])
def test_in_half_precision_a_is_what_a_loop_in_it_loses(strength, draw, foreach):
    w, real = lost(draw, strength, 10, foreach=foreach)
    optimizer = AdamW([w], lr=strength, weight_decay=1.0, foreach=foreach)
    (found,) = seen_of(optimizer, Constant(1.0), 10).outlooks
    assert found.asked == pytest.approx(-10 * strength, rel=1e-6)
    assert found.a == pytest.approx(real, rel=0.03, abs=1e-9)
    if strength < 2**-9 and not foreach:
        assert found.part == 0 and "bfloat16 swallows lr x decay below 0.002" in found.notes[0]


def test_of_a_mask_the_part_that_acts_is_said():
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(500, dtype=torch.float64))
    mask = torch.rand(500) < 0.3
    optimizer = AdamW([w], lr=1e-3, weight_decay=1.0)
    options = {"decoupled": True, "mask": mask}
    (found,) = seen_of(optimizer, Constant(1.0), 10, options=options).outlooks
    with WeightDecayScheduler(optimizer, Constant(1.0), **options) as scheduler:
        for _ in range(10):
            w.grad = torch.zeros_like(w)
            optimizer.step()
        (real,) = scheduler.accumulated
    assert found.a == pytest.approx(real, rel=0.02) and "mask" in found.notes[0]
    options = {"decoupled": True, "mask": "cautious"}
    (found,) = seen_of(optimizer, Constant(1.0), 10, options=options).outlooks
    assert math.isnan(found.a) and "cautious" in found.notes[0]


# At most: of the tensor, and of a mask the entries, on which most acts


def literal_shrink(before, after, mask=None):
    """Return 1 - (1 - s)^2 for the largest s of any tensor, where its mask is largest."""
    parts = []
    for w, v, m in zip(before, after, mask or [None] * len(before), strict=True):
        where = torch.ones_like(w, dtype=torch.bool) if m is None else m == m.max()
        w, v = w[where].double(), v[where].double()
        if float(w @ w):
            parts.append(float(w @ (w - v)) / float(w @ w))
    return 1 - (1 - max(parts)) ** 2


def test_at_most_is_of_the_tensors_that_decay_in_full():
    params = [weight(torch.float32), weight(BF16)]
    optimizer = AdamW(params, lr=1e-3, weight_decay=1.0)
    (found,) = seen_of(optimizer, Constant(1.0), 100).outlooks
    assert found.a == pytest.approx(-0.05) and found.part == pytest.approx(0.5)
    assert found.shrink == pytest.approx(1 - (1 - 1e-3) ** 200, rel=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_at_most_is_the_largest_of_any_tensor(seed):
    rng = torch.Generator().manual_seed(seed)
    draws = (
        lambda n: torch.randn(n, generator=rng),
        lambda n: torch.rand(n, generator=rng) - 0.5,
        torch.ones,  # as of a norm: all mantissas alike
        torch.zeros,
        lambda n: torch.randn(n, generator=rng).double(),
    )
    dtypes = [(BF16, torch.float16), (BF16,), (BF16, torch.float32)][seed % 3]
    params = [
        torch.nn.Parameter(draw(20 + 7 * i).to(dtypes[i % len(dtypes)]))
        for i, draw in enumerate(draws)
    ]
    strength = float(10 ** (-3.2 + 1.5 * torch.rand((), generator=rng)))
    # eps: the usual one is 0 in float16
    settings = {"lr": strength, "weight_decay": 1.0, "foreach": seed % 2 == 0, "eps": 1e-3}
    for options in ({}, {"decoupled": True}):
        copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
        optimizer = AdamW(copies, **settings)
        with WeightDecayScheduler(optimizer, Constant(1.0), **options) as scheduler:
            (found,) = preview(scheduler, 1).outlooks
            for p in copies:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        real = literal_shrink([p.detach() for p in params], [p.detach() for p in copies])
        assert found.shrink == pytest.approx(real, rel=1e-4, abs=1e-12)
        assert math.isfinite(real) and found.shrink >= 1 - (1 + found.a) ** 2 - 1e-12


@pytest.mark.parametrize("top", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, BF16])
def test_at_most_of_a_mask_is_where_it_is_largest(dtype, top):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(400).to(dtype))
    mask = top * (torch.rand(400) < 0.5)
    before = w.detach().clone()
    options = {"decoupled": True, "mask": mask}
    if dtype == BF16:
        options["rounding"] = "stochastic"
    optimizer = AdamW([w], lr=0.02, weight_decay=1.0)
    (found,) = seen_of(optimizer, Constant(1.0), 1, options=options).outlooks
    with WeightDecayScheduler(optimizer, Constant(1.0), **options):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    real = literal_shrink([before], [w.detach()], [mask])
    assert found.shrink == pytest.approx(real, rel=1e-9 if dtype != BF16 else 0.05, abs=1e-12)
    assert found.shrink == pytest.approx(1 - (1 - 0.02 * top) ** 2, rel=1e-9)


def test_what_a_mapping_of_masks_lacks_decays_in_full():
    params = [weight(), weight()]
    optimizer = AdamW(params, lr=0.02, weight_decay=1.0)
    options = {"decoupled": True, "mask": {params[0]: torch.tensor([1.0, 0.0, 0.0, 0.0]) / 2}}
    (found,) = seen_of(optimizer, Constant(1.0), 1, options=options).outlooks
    assert found.shrink == pytest.approx(1 - 0.98**2)


def test_tensors_whose_entries_lie_elsewhere_decay_in_full():
    params = [weight(size=0), weight(size=0)]  # as ZeRO-3 leaves them
    (found,) = seen_of(AdamW(params, lr=0.02, weight_decay=1.0), Constant(1.0), 1).outlooks
    assert found.shrink == pytest.approx(1 - 0.98**2)


def test_at_most_counts_what_acted_before_as_well():
    params = [weight(torch.float32), weight(BF16)]
    optimizer = AdamW(params, lr=1e-3, weight_decay=1.0)
    with WeightDecayScheduler(optimizer, Constant(1.0)) as scheduler:
        for _ in range(2):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        (found,) = preview(scheduler, 50).outlooks
    assert found.shrink == pytest.approx(1 - math.exp(-2 * 2e-3) * (1 - 1e-3) ** 100, rel=1e-9)


def test_the_weights_are_as_they_were():
    w = torch.nn.Parameter(torch.randn(1000).to(BF16))
    before = w.detach().clone()
    seen_of(AdamW([w], lr=0.01, weight_decay=1.0), Constant(1.0), 10)
    assert torch.equal(w.detach(), before)


def test_decay_from_outside_by_stochastic_rounding_acts_whole():
    optimizer = AdamW([weight(BF16)], lr=1e-4, weight_decay=1.0)
    options = {"decoupled": True, "rounding": "stochastic"}
    (found,) = seen_of(optimizer, Constant(1.0), 10, options=options).outlooks
    assert found.a == found.asked == pytest.approx(-1e-3) and found.part == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda w: AdamW(w, lr=1e-2, weight_decay=0.1, fused=True),
        lambda w: SGD(w, lr=1e-2, weight_decay=0.1),
    ],
)
def test_what_rounding_lets_through_of_a_joint_step_is_not_guessed(make):
    seen = seen_of(make([weight(BF16)]), Constant(0.1), 10)
    (found,) = seen.outlooks
    assert math.isnan(found.a) and math.isnan(found.shrink) and found.asked == pytest.approx(-0.01)
    assert "gradients" in found.notes[0] and "known before the run" in str(seen)
    assert found.to_dict()["a"] is None


@pytest.mark.filterwarnings("ignore::mirrorflow.weightdecay.CoupledDecayWarning")
def test_l2_in_a_rescaled_gradient_has_no_a():
    seen = seen_of(Adam([weight()], lr=0.1, weight_decay=0.1), Constant(0.1), 5)
    (found,) = seen.outlooks
    assert math.isnan(found.a) and math.isnan(found.needed) and "decoupled=True" in found.notes[0]
    assert len(seen.to_dict()["sentences"]) == 3


# The laws, by loops on x = m w


def two_factors(step, lr=1e-4, decay=0.5, steps=4000):
    """Return (m, w) before and after a run with decay on a loss of the product."""
    torch.manual_seed(1)
    m, w = 1.5 + torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    start, target = (m.clone(), w.clone()), torch.full((6,), 1.2, dtype=torch.float64)
    for _ in range(steps):
        grad = m * w - target
        dm, dw = step(grad * w), step(grad * m)
        m, w = (1 - lr * decay) * m - lr * dm, (1 - lr * decay) * w - lr * dw
    return start, (m, w), -lr * decay * steps


def test_under_gradient_descent_the_difference_of_squares_falls_as_e_to_2a():
    (m0, w0), (m, w), a = two_factors(lambda g: g)
    assert torch.allclose(m**2 - w**2, math.exp(2 * a) * (m0**2 - w0**2), rtol=1e-3)
    delta = (m.abs() - w.abs()) / (m0.abs() - w0.abs())
    assert not torch.allclose(delta, torch.full_like(delta, math.exp(a)), rtol=0.03)


def test_under_sign_descent_the_difference_of_sizes_falls_as_e_to_a():
    (m0, w0), (m, w), a = two_factors(torch.sign)
    assert torch.allclose(m.abs() - w.abs(), math.exp(a) * (m0.abs() - w0.abs()), rtol=1e-3)


@pytest.mark.parametrize("seed", range(20))
def test_the_geometry_arrives_at_the_a_that_is_named(seed):
    rng = torch.Generator().manual_seed(seed)
    size, start = torch.exp(2 * torch.randn(2, generator=rng)).tolist()
    for name, inverse_metric in (
        ("flow", lambda x, a: 2 * math.hypot(x, start * math.exp(2 * a))),
        ("sign", lambda x, a: math.sqrt(4 * x + 2 * start * math.exp(2 * a))),
    ):
        found = geometry(LAWS[name], -1.0, size, start)
        # far from the start's scale the metric is that of x alone, within a percent or five
        own = inverse_metric(size, -math.inf)
        at = inverse_metric(size, found.needed) / own
        assert at < {"flow": 1.0051, "sign": 1.049}[name]
        state = geometry(LAWS[name], found.needed - 1.0, size, start).state
        assert state in ("arrived", "before")
        if found.needed < -0.1:
            early = geometry(LAWS[name], 0.9 * found.needed, size, start).state
            assert early in ("moving", "still")
            assert inverse_metric(size, 0.5 * found.needed) / own > at


def test_loras_default_start_needs_a_of_minus_1_4():
    in_features, rank = 4096, 8
    a = torch.nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5))  # as PEFT
    start = float(torch.linalg.eigvalsh(a @ a.T).mean()) / 2  # B = 0
    assert start == pytest.approx(1 / 6, rel=0.03)
    assert geometry(LAWS["flow"], 0.0, 0.1, start).needed == pytest.approx(-1.4, abs=0.03)


def test_the_law_follows_the_optimizer():
    class Own(AdamW):
        pass

    pair = (weight(), weight())
    for optimizer, name in (
        (SGD([weight()], lr=0.1, weight_decay=0.1), "gradient flow"),
        (Own([weight()], lr=0.1), "sign descent"),
        (MirrorAdam([pair], lr=0.1), "gradient flow"),
        (torch.optim.Muon([torch.nn.Parameter(torch.ones(2, 2))], weight_decay=0.1), "not known"),
    ):
        assert law_of(optimizer, optimizer.param_groups[0]).name == name
    assert "never L1" in LAWS["sign"].stores


# Closed loops


def test_a_budget_that_the_run_cannot_spend_is_said_before_it():
    optimizer = AdamW([weight()], lr=1e-2, weight_decay=0.1)
    seen = seen_of(optimizer, OffAtBudget(0.1, budget=5), 100)
    assert any("OffAtBudget never switches off" in remark for remark in seen.remarks)
    assert "never switches off" in seen.verdict
    assert "its closed loop decides in the run" in seen.to_dict()["sentences"][2]
    assert math.isnan(seen.outlooks[0].needed)


def test_a_loop_is_named_only_where_there_is_one():
    optimizer = AdamW([w := weight()], lr=0.1, weight_decay=0.1)
    with WeightDecayScheduler(optimizer, SwitchOff(0.1, at=2)) as scheduler:
        for _ in range(3):
            w.grad = torch.zeros_like(w)
            optimizer.step()
        seen = preview(scheduler, 5)  # the decay is over, and not by a loop
    assert seen.outlooks[0].a == pytest.approx(-0.02)
    assert "before the run: nothing decays here." in seen.to_dict()["sentences"][2]


class OwnSize(torch.optim.Optimizer):
    """An optimizer without a learning rate."""

    def __init__(self, params):
        super().__init__(params, {"lr": None, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.mul_(1 - 0.1 * self.param_groups[0]["weight_decay"])


def test_without_a_learning_rate_that_is_the_reason():
    seen = seen_of(OwnSize([weight()]), Constant(0.1), 3, options={"coupling": "decoupled"})
    (found,) = seen.outlooks
    assert math.isnan(found.a) and "OwnSize makes its own step size (lr=None)" in found.notes[0]
    assert "lets through" not in str(seen)


@pytest.mark.filterwarnings("ignore:weights of parameter group")
def test_so_is_one_that_rounding_keeps_from_being_spent():
    optimizer = AdamW([weight(BF16)], lr=1e-3, weight_decay=1.0)
    seen = seen_of(optimizer, OffAtBudget(1.0, budget=0.05), 200)
    assert any("absorbs 0 of its budget" in remark for remark in seen.remarks)


@pytest.mark.parametrize(
    ("loop", "every", "said"),
    [
        (lambda: OffWhenLevel(0.1, window=5), 30, "cannot fire: it needs 5 more measurements"),
        (lambda: OffWhenLevel(0.1, window=2, earliest=9), 30, "needs 9 more"),
        (lambda: OffBelow(0.1, target=2.0), 200, "OffBelow cannot act: it is measured every 200"),
        (lambda: HoldRatio(2.0, 0.1, 0.1), 101, "HoldRatio cannot act"),
        (lambda: OffBelow(0.1, target=2.0), 50, None),
        (lambda: OffWhenLevel(0.1, window=3), 30, None),
    ],
)
def test_a_loop_that_is_measured_too_rarely_is_named(loop, every, said):
    model = torch.nn.MultiheadAttention(8, 2)
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    control = ControlledDecay(model, optimizer, loop(), track_every=every)
    remarks = preview(control.scheduler, 100).remarks
    told = [remark for remark in remarks if "cannot" in remark]
    assert [said in remark for remark in told] == ([True] if said else [])


# The table and what is refused


def test_the_table_fits_a_terminal_whatever_the_names():
    groups = [
        {"params": [weight()], "name": "model.layers." + 60 * "x" + str(i), "lr": 10.0**-i}
        for i in range(7)
    ]
    optimizer = AdamW(groups, weight_decay=0.1)
    seen = seen_of(optimizer, Cosine(0.1, 0.0, duration=50), 50, LinearLR(optimizer, total_iters=9))
    lines = seen.verdict.splitlines()
    assert max(map(len, lines)) <= 80 and len(outlook_table(seen.outlooks).splitlines()) == 8
    assert lines[0].startswith("Group model.layers.")


@pytest.mark.parametrize("wrong", [{"size": 0.0}, {"start": -1.0}, {"target": 1.0}, {"target": 0}])
def test_scales_that_no_product_has_are_refused(wrong):
    optimizer = AdamW([weight()], weight_decay=0.1)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        seen_of(optimizer, Constant(0.1), 3, **wrong)


@pytest.mark.parametrize(("lr", "decay"), [(1.0, 1.0), (5.0, 1.0), (0.5, 3.0)])
def test_a_step_that_erases_the_weights_is_told(lr, decay):
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([w], lr=lr, weight_decay=decay)
    seen = preview(WeightDecayScheduler(optimizer, Constant(decay)), 10)
    (found,) = seen.outlooks
    assert found.strength == lr * decay and math.isnan(found.shrink)
    words = " ".join(seen.verdict.split())
    assert f"lr x decay = {lr * decay:.3g} takes weights to 0 or beyond" in words
    assert "shrinks by" not in words
