"""The ledger of weights in half precision is what acted; stochastic rounding lets all of it act."""

import copy
import json
import math
import warnings

import pytest
import torch
from torch.optim import SGD, AdamW

import mirrorflow as mf
from mirrorflow.weightdecay import RoundingWarning, WeightDecayScheduler, lint, rounded_fraction
from mirrorflow.weightdecay._stochastic import shrink_stochastically

BF16, FP16 = torch.bfloat16, torch.float16
HALVES = pytest.mark.parametrize("dtype", [BF16, FP16])
KERNELS = {
    "loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
swallowed = pytest.mark.filterwarnings("ignore::mirrorflow.weightdecay.RoundingWarning")


def start(n, dtype, size=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter((size * torch.randn(n, generator=generator)).to(dtype))


def steps_with_and_without(make, w, decay, gradient, steps):
    """Return the sum over steps of <w, w_free - w_decayed> / <w, w>, and that of the ledger.

    Each step is taken twice from the same weights and the same state, once without decay.
    """
    twin = torch.nn.Parameter(w.detach().clone())
    optimizer, free = make([w], weight_decay=decay), make([twin], weight_decay=0.0)
    scheduler = WeightDecayScheduler(optimizer, mf.Constant(decay))
    generator, total = torch.Generator().manual_seed(1), 0.0
    for _ in range(steps):
        before = w.detach().double()
        w.grad = (gradient * torch.randn(w.shape, generator=generator)).to(w.dtype)
        twin.data.copy_(w.data)
        twin.grad = w.grad.clone()
        free.state[twin] = copy.deepcopy(dict(optimizer.state[w]))
        free.step()
        optimizer.step()
        taken = twin.detach().double() - w.detach().double()
        total += float((before * taken).sum() / (before * before).sum())
    return total, -scheduler.accumulated[0]


@swallowed
@pytest.mark.parametrize("kernel", ["loop", "foreach"])
@pytest.mark.parametrize("strength", [1e-6, 1e-3, 3e-3, 1e-2, 1e-1])
def test_adamw_absorbs_what_its_multiplication_leaves(kernel, strength):
    def make(params, weight_decay):
        return AdamW(params, lr=1e-3, weight_decay=weight_decay, **KERNELS[kernel])

    w = start(8000, BF16)
    true, ledger = steps_with_and_without(make, w, strength / 1e-3, 0.01, 40)
    assert ledger == pytest.approx(true, rel=0.02, abs=1e-12)
    assert (true == 0) == (strength < 2**-9)


@swallowed
@pytest.mark.parametrize(("strength", "rel"), [(1e-4, 0.06), (3e-3, 0.02), (1e-1, 0.02)])
def test_fused_adamw_absorbs_what_is_rounded_with_the_update(strength, rel):
    def make(params, weight_decay):
        return AdamW(params, lr=1e-3, weight_decay=weight_decay, fused=True)

    w = start(40_000, BF16)
    true, ledger = steps_with_and_without(make, w, strength / 1e-3, 0.01, 60)
    assert ledger == pytest.approx(true, rel=rel)
    assert true > 0.8 * 60 * strength


@swallowed
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("kernel", ["loop", "foreach"])
@pytest.mark.parametrize("strength", [1e-3, 1e-2])
def test_sgd_absorbs_what_gets_into_its_gradient_and_out_of_it(dtype, kernel, strength):
    def make(params, weight_decay):
        return SGD(params, lr=0.1, weight_decay=weight_decay, **KERNELS[kernel])

    true, ledger = steps_with_and_without(make, start(20_000, dtype), strength / 0.1, 1.0, 40)
    assert ledger == pytest.approx(true, rel=0.02)


@swallowed
def test_sgd_swallows_decay_below_half_a_gap_of_the_gradient():
    def make(params, weight_decay):
        return SGD(params, lr=0.1, weight_decay=weight_decay)

    asked = 60 * 1e-4
    true, ledger = steps_with_and_without(make, start(40_000, BF16), 1e-3, 1.0, 60)
    assert 0.2 * asked < true < 0.5 * asked
    assert ledger == pytest.approx(true, rel=0.15)  # few entries act, by many gaps each


@swallowed
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_takes_the_decay_that_entered_it(nesterov):
    """The weights at the end of a run with decay, against one without, along the start."""
    ends = []
    for decay in (0.01, 0.0):
        w = start(100_000, BF16)
        first = w.detach().double()
        optimizer = SGD([w], lr=0.01, momentum=0.9, nesterov=nesterov, weight_decay=decay)
        if decay:
            scheduler = WeightDecayScheduler(optimizer, mf.Constant(decay))
        generator = torch.Generator().manual_seed(1)
        for _ in range(60):
            w.grad = (0.1 * torch.randn(w.shape, generator=generator)).to(BF16)
            optimizer.step()
        ends.append(w.detach().double() @ first)
    true = 1 - float(ends[0] / ends[1])
    assert -scheduler.accumulated[0] == pytest.approx(true, rel=0.06)
    assert -scheduler.accumulated[0] == pytest.approx(float(true), abs=0.01)


@swallowed
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_run_whose_weights_are_those_without_decay_has_absorbed_none(kernel):
    ends = []
    for decay in (1.0, 0.0):
        w = start(64, BF16)
        optimizer = AdamW([w], lr=1e-3, weight_decay=decay, **KERNELS[kernel])
        if decay:
            scheduler = WeightDecayScheduler(optimizer, mf.Constant(decay))
        for _ in range(300):
            w.grad = torch.zeros_like(w)
            optimizer.step()
        ends.append(w.detach())
    assert torch.equal(*ends) and scheduler.accumulated == [0.0] == scheduler.acting_parts


@swallowed
def test_a_kernel_that_leaves_the_weights_alone_absorbs_nothing():
    """torch 2.13's fused SGD on a CPU skips whole vectors in half precision."""
    w = start(512, BF16)
    optimizer = SGD([w], lr=0.1, weight_decay=0.5, fused=True)
    scheduler = WeightDecayScheduler(optimizer, mf.Constant(0.5))
    before = w.detach().clone()
    w.grad = torch.zeros_like(w)
    optimizer.step()
    moved = 1 - float((w.detach().double() @ before.double()) / (before.double() @ before.double()))
    assert -scheduler.accumulated[0] == pytest.approx(moved, abs=1e-3)


@swallowed
@HALVES
def test_decay_from_outside_is_counted_as_it_acted(dtype):
    w = start(6000, dtype)
    optimizer = SGD([w], lr=0.1, weight_decay=1.0)
    scheduler = WeightDecayScheduler(optimizer, mf.Constant(0.03), decoupled=True)
    total = 0.0
    for _ in range(30):
        before = w.detach().double()
        w.grad = torch.zeros_like(w)
        optimizer.step()
        total += float(before @ (before - w.detach().double()) / (before @ before))
    assert -scheduler.accumulated[0] == pytest.approx(total, rel=0.02)


def test_the_expected_fraction_is_the_mean_over_uniform_mantissas():
    m = (1 + torch.rand(400_000, generator=torch.Generator().manual_seed(0))).to(BF16)
    m = m[m < 2].double()
    for strength in (1e-3, 2.5e-3, 5e-3, 2e-2):
        left = (m * (1 - strength)).to(BF16).double()
        mean = float((m * (m - left)).sum() / (m * m).sum())
        assert rounded_fraction(strength, BF16) == pytest.approx(mean, rel=0.01, abs=1e-12)


@swallowed
def test_a_resumed_ledger_in_half_precision_is_the_same_to_the_bit():
    def build():
        ws = [start(3000, BF16), start(5000, BF16, seed=1)]
        optimizer = AdamW(ws, lr=1e-2, weight_decay=0.3)
        return ws, optimizer, WeightDecayScheduler(optimizer, mf.Constant(0.3))

    def train(ws, optimizer, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for w in ws:
                w.grad = torch.randn(w.shape, generator=generator).to(BF16)
            optimizer.step()

    ws, optimizer, whole = build()
    train(ws, optimizer, range(6))
    saved = copy.deepcopy((optimizer.state_dict(), whole.state_dict(), [w.detach() for w in ws]))
    train(ws, optimizer, range(6, 15))
    again, other, resumed = build()
    for w, value in zip(again, saved[2], strict=True):
        w.data.copy_(value)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, other, range(6, 15))
    assert resumed.state_dict() == whole.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(ws, again, strict=True))


# Several precisions in one group

mixed = pytest.mark.parametrize(
    "make",
    [
        lambda ws: AdamW(ws, lr=1e-3, weight_decay=1.0),
        lambda ws: AdamW(ws, lr=1e-3, weight_decay=1.0, foreach=True),
        lambda ws: SGD(ws, lr=1e-3, weight_decay=1.0),
        lambda ws: SGD(ws, lr=1e-4, weight_decay=1.0, momentum=0.9),
    ],
    ids=["adamw", "foreach", "sgd", "momentum"],
)


def taken(ws, before):
    """Return what has acted on each: the logarithm of what is left, in the mean."""
    pairs = zip(ws, before, strict=True)
    return [math.log((w0 * w.detach().double()).sum() / (w0 * w0).sum()) for w, w0 in pairs]


@swallowed
@mixed
def test_each_precision_in_a_group_has_its_account(make):
    ws = [start(4096, torch.float32, 1.0), start(4096, BF16, 1.0, 1), start(64, torch.float32)]
    before = [w.detach().double() for w in ws]
    scheduler = WeightDecayScheduler(make(ws), mf.Constant(1.0))
    for _ in range(60):
        for w in ws:
            w.grad = torch.zeros_like(w)
        scheduler.optimizer.step()
    accounts = [row["a"] for row in scheduler.by_tensor()]
    assert accounts == pytest.approx(taken(ws, before), rel=0.05, abs=1e-3)
    sizes = [w.numel() for w in ws]
    mean = sum(n * a for n, a in zip(sizes, accounts, strict=True)) / sum(sizes)
    assert scheduler.accumulated == [pytest.approx(mean)]
    entry = scheduler.account.entries[0]
    assert entry.others[0] is entry.others[2] is not entry.others[1]


@swallowed
@mixed
@pytest.mark.parametrize("last", [[], [0], [1]])
def test_a_group_of_several_precisions_resumes_to_the_bit(make, last):
    def build():
        ws = [start(300, torch.float32), start(300, BF16), start(9, torch.float16)]
        return ws, WeightDecayScheduler(make(ws), mf.Constant(1.0))

    def train(ws, scheduler, steps):
        for step in steps:
            for i, w in enumerate(ws):
                w.grad = None if i in last and step > 4 else torch.full_like(w, 1e-3)
            scheduler.optimizer.step()

    ws, whole = build()
    train(ws, whole, range(6))
    both = copy.deepcopy((whole.optimizer.state_dict(), whole.state_dict()))
    again, resumed = build()
    for w, value in zip(again, ws, strict=True):
        w.data.copy_(value.data)
    train(ws, whole, range(6, 12))
    resumed.optimizer.load_state_dict(both[0])
    resumed.load_state_dict(json.loads(json.dumps(both[1])))
    train(again, resumed, range(6, 12))
    assert resumed.by_tensor() == whole.by_tensor()
    assert resumed.accumulated == whole.accumulated


@swallowed
def test_a_state_from_before_precisions_had_accounts_is_taken():
    def build():
        ws = [start(300, torch.float32), start(300, BF16)]
        return ws, WeightDecayScheduler(AdamW(ws, lr=1e-3, weight_decay=1.0), mf.Constant(1.0))

    def step(ws, scheduler):
        for w in ws:
            w.grad = torch.zeros_like(w)
        scheduler.optimizer.step()

    ws, scheduler = build()
    step(ws, scheduler)
    state, optimizer = copy.deepcopy((scheduler.state_dict(), scheduler.optimizer.state_dict()))
    for key in ("left", "others"):
        del state["entries"][0][key]
    del optimizer["param_groups"][0]["weight_decay_tensors"]
    again, resumed = build()
    resumed.optimizer.load_state_dict(optimizer)
    resumed.load_state_dict(state)
    assert [row["a"] for row in resumed.by_tensor()] == [-0.0005] * 2  # it knows their mean only
    step(again, resumed)
    assert [row["a"] for row in resumed.by_tensor()] == [pytest.approx(-0.0015), -0.0005]


@swallowed
def test_the_bound_of_a_report_is_that_of_the_precision_that_lost_most():
    net = torch.nn.ParameterDict({"a": start(64, torch.float32), "b": start(64, BF16)})
    made = AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    control = mf.ControlledDecay(net, made, mf.Constant(0.1))
    for _ in range(100):
        for w in net.parameters():
            w.grad = torch.zeros_like(w)
        made.step()
        control.step()
    (row,) = control.report().decay
    assert row.acted == row.asked == pytest.approx(0.1)
    assert row.shrinkage == pytest.approx(1 - 0.999**200)
    assert "18.1% of its size at most" in control.report().shows[0]


# The warning, and lint


def test_swallowed_decay_is_named_once():
    w = start(64, BF16)
    optimizer = AdamW([w], lr=1e-3, weight_decay=1.0)
    scheduler = WeightDecayScheduler(optimizer, mf.Constant(1.0))
    with pytest.warns(RoundingWarning, match="let 0 times the decay") as caught:
        for _ in range(40):
            w.grad = torch.zeros_like(w)
            optimizer.step()
    assert len(caught) == 1
    assert [f.code for f in lint(optimizer, scheduler=scheduler) if f.code == "rounded"]


@pytest.mark.parametrize(
    ("make", "decay", "level"),
    [
        (AdamW, 1.0, "warning"),
        (AdamW, 100.0, None),
        (lambda p, **kw: AdamW(p, fused=True, **kw), 1.0, "note"),
        (SGD, 1.0, "note"),
        (SGD, 100.0, None),
    ],
)
def test_lint_finds_decay_that_the_precision_swallows(make, decay, level):
    optimizer = make([start(64, BF16).detach().view(8, 8)], lr=1e-3, weight_decay=decay)
    levels = [f.level for f in lint(optimizer) if f.code == "rounded"]
    assert levels == ([level] if level else [])
    full = make([torch.ones(8, 8)], lr=1e-3, weight_decay=decay)
    assert not [f for f in lint(full) if f.code == "rounded"]


# Stochastic rounding


@HALVES
@pytest.mark.parametrize("strength", [1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("ones", [False, True])
def test_stochastic_rounding_lets_all_of_the_decay_act(dtype, strength, ones):
    w = start(100_000, dtype)
    if ones:
        w.data.fill_(1.0)
    first, place = w.detach().double(), w.data_ptr()
    optimizer = SGD([w], lr=1.0, weight_decay=1.0)
    schedule = mf.Constant(strength)
    scheduler = WeightDecayScheduler(optimizer, schedule, decoupled=True, rounding="stochastic")
    steps = 60 if strength < 0.1 else 5
    for _ in range(steps):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    lost = 1 - float(first @ w.detach().double() / (first @ first))
    # 3 standard deviations of the number of entries that have moved by a gap, weighted with w^2
    slack = 3 * (3 / (len(w) * steps * strength / torch.finfo(dtype).eps)) ** 0.5
    assert lost == pytest.approx(1 - (1 - strength) ** steps, rel=max(0.01, slack))
    assert scheduler.accumulated == pytest.approx([-steps * strength])
    assert w.data_ptr() == place


@HALVES
def test_stochastic_rounding_yields_one_of_the_two_neighbours_with_the_right_mean(dtype):
    values = torch.tensor([1.0, 2.0, -1.0078125, 3.140625, 1e-3, -250.0, 6e-8, 0.0], dtype=dtype)
    count, strength = 20_000, 0.0137
    w = values.repeat_interleave(count).view(len(values), count)
    shrink_stochastically([w], strength, seed=3, step=7)
    exact = values.double() * (1 - strength)
    near = exact.to(dtype)
    for row, right, nearest in zip(w, exact, near, strict=True):
        found = row.unique()
        assert len(found) <= 2 and nearest in found
        width = float(found.max().double() - found.min().double())
        assert abs(float(row.double().mean() - right)) < 4 * 0.5 * width / count**0.5 + 1e-12


def test_stochastic_rounding_resumes_to_the_bit_and_repeats():
    def build(seed):
        ws = [start(1000, BF16), start(70_000, BF16, seed=1)]
        optimizer = AdamW(ws, lr=1e-2, weight_decay=0.1)
        options = {"decoupled": True, "rounding": "stochastic", "seed": seed}
        return ws, optimizer, WeightDecayScheduler(optimizer, mf.Constant(0.1), **options)

    def train(ws, optimizer, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for w in ws:
                w.grad = torch.randn(w.shape, generator=generator).to(BF16)
            optimizer.step()

    ws, optimizer, scheduler = build(seed=5)
    state = torch.random.get_rng_state()
    train(ws, optimizer, range(4))
    assert torch.equal(state, torch.random.get_rng_state())
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    kept = [w.detach().clone() for w in ws]
    train(ws, optimizer, range(4, 8))
    again, other, resumed = build(seed=0)  # the checkpoint's seed counts
    for w, value in zip(again, kept, strict=True):
        w.data.copy_(value)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, other, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(ws, again, strict=True))
    different, other, _ = build(seed=6)
    train(different, other, range(8))
    assert not torch.equal(different[1], ws[1])


def test_stochastic_rounding_leaves_float32_to_the_ordinary_product_and_is_refused_alone():
    half, full = start(64, BF16), torch.nn.Parameter(torch.ones(4))
    optimizer = SGD([half, full], lr=0.5, weight_decay=1.0)
    options = {"decoupled": True, "rounding": "stochastic"}
    WeightDecayScheduler(optimizer, mf.Constant(0.5), **options)
    for w in (half, full):
        w.grad = torch.zeros_like(w)
    optimizer.step()
    assert torch.equal(full.detach(), torch.full((4,), 0.75))
    with pytest.raises(ValueError, match="bfloat16 or float16, got float32"):
        WeightDecayScheduler(SGD([full], lr=0.5, weight_decay=1.0), mf.Constant(0.5), **options)
    with pytest.raises(ValueError, match="decoupled=False"):
        WeightDecayScheduler(
            SGD([half], lr=0.5, weight_decay=1.0), mf.Constant(0.5), rounding="stochastic"
        )


def test_float32_is_not_tried_at_all(monkeypatch):
    def refuse(*_):
        raise AssertionError("a step in float32 looked at its weights")

    monkeypatch.setattr("mirrorflow.weightdecay._step.RoundedSet", refuse)
    w = torch.nn.Parameter(torch.ones(4))
    optimizer = AdamW([w], lr=1e-3, weight_decay=1.0)
    scheduler = WeightDecayScheduler(optimizer, mf.Constant(1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            w.grad = torch.zeros_like(w)
            optimizer.step()
    assert scheduler.acting_parts == [1.0]
