"""Decay from outside acts where its mask says, and the ledger counts that part of it."""

import copy

import pytest
import torch
from torch.optim import LBFGS, SGD, AdamW, Muon

import mirrorflow as mf
from mirrorflow.weightdecay import WeightDecayScheduler

LR, DECAY = 0.1, 0.3
FIXED = torch.tensor([1.0, 0.0, 0.25, 1.0])
MAKE = {
    "sgd": lambda ps: SGD(ps, lr=LR, momentum=0.9, weight_decay=1.0),
    "adamw": lambda ps: AdamW(ps, lr=LR, weight_decay=1.0),
    "muon": lambda ps: Muon(ps, lr=LR, weight_decay=1.0),
}
LOOPS = {
    "cautious": lambda w, g: (w * g >= 0).to(w.dtype),
    "touched-rows": lambda w, g: (g != 0).any(1, keepdim=True).to(w.dtype).expand_as(w),
    "tensor": lambda w, g: FIXED.to(w.dtype).expand_as(w),
}


def start(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((6, 4), (3, 4))
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        grad = torch.randn(p.shape, generator=generator)
        p.grad = (grad * (torch.rand(len(p), 1, generator=generator) < 0.5)).to(p.dtype)


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("name", LOOPS)
def test_a_masked_run_is_the_loop_written_by_hand_and_is_counted(make, name):
    params, twins = start(), start()
    optimizer, bare = MAKE[make](params), MAKE[make](twins)
    bare.param_groups[0]["weight_decay"] = 0.0
    mask = FIXED if name == "tensor" else name
    scheduler = WeightDecayScheduler(optimizer, mf.Constant(DECAY), decoupled=True, mask=mask)
    taken = [0.0, 0.0]
    for step in range(12):
        gradients(params, step)
        gradients(twins, step)
        optimizer.step()
        with torch.no_grad():
            for i, w in enumerate(twins):
                m = LOOPS[name](w, w.grad)
                taken[i] += float((w * LR * DECAY * m * w).sum() / (w * w).sum())
                w.copy_(w * (1 - LR * DECAY * m))
        bare.step()
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b)
    assert [-row["a"] for row in scheduler.by_tensor()] == pytest.approx(taken, rel=1e-5)
    mean = sum(n * a for n, a in zip((24, 12), taken, strict=True)) / 36
    assert scheduler.accumulated == pytest.approx([-mean], rel=1e-5)


def test_a_mapping_masks_some_parameters_and_leaves_the_rest_whole():
    params = start()
    optimizer = SGD(params, lr=LR, weight_decay=1.0)
    mask = {params[0]: torch.zeros(1)}
    scheduler = WeightDecayScheduler(optimizer, mf.Constant(DECAY), decoupled=True, mask=mask)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(params[0].detach(), before[0])
    torch.testing.assert_close(params[1].detach(), before[1] * (1 - LR * DECAY))
    assert [row["a"] for row in scheduler.by_tensor()] == pytest.approx([0.0, -LR * DECAY])


def test_rows_of_a_sparse_gradient_are_those_it_names():
    table = torch.nn.Embedding(8, 3, sparse=True)
    optimizer = SGD(table.parameters(), lr=LR, weight_decay=1.0)
    optimizer.param_groups[0]["weight_decay"] = 1.0
    mask = "touched-rows"
    scheduler = WeightDecayScheduler(optimizer, mf.Constant(DECAY), decoupled=True, mask=mask)
    before = table.weight.detach().clone()
    (table(torch.tensor([1, 5, 1])) * 0.0).sum().backward()
    optimizer.step()
    kept = [0, 2, 3, 4, 6, 7]
    assert torch.equal(table.weight.detach()[kept], before[kept])
    torch.testing.assert_close(table.weight.detach()[[1, 5]], before[[1, 5]] * (1 - LR * DECAY))
    part = before[[1, 5]].square().sum() / before.square().sum()
    assert scheduler.accumulated == pytest.approx([-LR * DECAY * float(part)], rel=1e-5)


@pytest.mark.parametrize("rounding", [None, "stochastic"])
def test_masks_in_half_precision_count_what_was_rounded(rounding):
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(300, 200, generator=generator).bfloat16())
    optimizer = SGD([w], lr=0.01, weight_decay=1.0)
    scheduler = WeightDecayScheduler(
        optimizer, mf.Constant(0.3), decoupled=True, mask="cautious", rounding=rounding
    )
    total = 0.0
    for _ in range(10):
        before = w.detach().double()
        signs = torch.where(torch.rand(w.shape, generator=generator) < 0.5, 1e-30, -1e-30)
        w.grad = signs.bfloat16()
        optimizer.step()
        total += float((before * (before - w.detach().double())).sum() / (before * before).sum())
    assert -scheduler.accumulated[0] == pytest.approx(total, rel=0.02)
    assert 0.4 * 0.03 < total < 0.7 * 0.03


def test_a_masked_run_resumes_with_its_accounts():
    def build():
        params = start()
        optimizer = AdamW(params, lr=LR, weight_decay=1.0)
        options = {"decoupled": True, "mask": "cautious"}
        return params, optimizer, WeightDecayScheduler(optimizer, mf.Constant(DECAY), **options)

    params, optimizer, scheduler = build()
    for step in range(5):
        gradients(params, step)
        optimizer.step()
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    again, other, resumed = build()
    for p, value in zip(again, params, strict=True):
        p.data.copy_(value.data)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for ps, one in ((params, optimizer), (again, other)):
        for step in range(5, 9):
            gradients(ps, step)
            one.step()
    assert resumed.by_tensor() == scheduler.by_tensor()
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


@pytest.mark.parametrize("kind", ["bool", "float", "cautious"])
def test_the_bound_of_a_report_is_that_of_the_entries_that_decay(kind):
    net = torch.nn.ParameterDict({"a": torch.ones(2, 2), "b": torch.ones(2, 2)})
    mask = torch.tensor([[1.0, 1.0], [0.5, 0.0]])
    mask = {"bool": mask == 1, "float": mask * 0.5, "cautious": "cautious"}[kind]
    made = SGD(net.parameters(), lr=1e-6, weight_decay=1.0)
    options = {"decoupled": True, "mask": mask, "convention": "fixed"}
    control = mf.ControlledDecay(net, made, mf.Constant(0.02), **options)
    for _ in range(10):
        for p in net.parameters():
            p.grad = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
        made.step()
        control.step()
    (row,) = control.report().decay
    most = 1 - (net["a"] * net["b"]).min().item()
    assert row.shrinkage == pytest.approx(most, rel=1e-3)
    assert row.acted < 0.75 * (0.1 if kind == "float" else 0.2)  # the mean over the entries
    assert f"{100 * row.shrinkage:.3g}% of its size at most" in control.report().shows[-1]


def test_the_account_of_D_is_refused_with_a_mask():
    net = torch.nn.MultiheadAttention(8, 2)
    made = SGD(net.parameters(), lr=LR, weight_decay=1.0)
    options = {"decoupled": True, "mask": "cautious"}
    with pytest.raises(ValueError, match="balance_every must be 0 with mask=, got 1"):
        mf.ControlledDecay(net, made, mf.Constant(1.0), balance_every=1, **options)
    assert not made._optimizer_step_pre_hooks


def test_a_mask_of_another_shape_is_refused_before_the_run():
    options = {"decoupled": True, "mask": torch.ones(2)}
    optimizer = SGD([torch.nn.Parameter(torch.ones(3, 3))], lr=LR, weight_decay=1.0)
    with pytest.raises(ValueError, match=r"got \(2,\) for the parameter .* of shape \(3, 3\)"):
        WeightDecayScheduler(optimizer, mf.Constant(1.0), **options)
    assert set(optimizer.param_groups[0]) == set(SGD([torch.ones(1)]).param_groups[0])
    with pytest.raises(ValueError, match=r"got \(1, 3, 3\)"):
        mask = {optimizer.param_groups[0]["params"][0]: torch.ones(1, 3, 3)}
        WeightDecayScheduler(optimizer, mf.Constant(1.0), **options | {"mask": mask})
    still = torch.nn.Parameter(torch.ones(5))  # without decay, so that no mask acts on it
    optimizer.add_param_group({"params": [still], "weight_decay": 0.0})
    mask = torch.ones(3)
    scheduler = WeightDecayScheduler(optimizer, mf.Constant(1.0), **options | {"mask": mask})
    with pytest.raises(ValueError, match=r"of shape \(7,\)"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(7))]})
        scheduler.step()


def test_lint_does_not_take_a_mask_for_rounding():
    params = start()
    optimizer = SGD(params, lr=LR, weight_decay=1.0)
    scheduler = WeightDecayScheduler(optimizer, mf.Constant(0.1), decoupled=True, mask="cautious")
    gradients(params, 0)
    optimizer.step()
    assert scheduler.acting_parts[0] < 1
    assert not [f for f in mf.lint(optimizer, scheduler=scheduler) if f.code == "rounded"]


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        ("careful", ValueError, "cautious, touched-rows, got 'careful'"),
        (torch.tensor([2.0]), ValueError, r"\[0, 1\], got 2"),
        (3, TypeError, "got int"),
    ],
)
def test_what_is_not_a_mask_is_refused(mask, error, words):
    optimizer = SGD(start(), lr=LR, weight_decay=1.0)
    with pytest.raises(error, match=words):
        WeightDecayScheduler(optimizer, mf.Constant(DECAY), decoupled=True, mask=mask)


def test_a_mask_needs_decay_from_outside_and_a_gradient_before_it():
    optimizer = SGD(start(), lr=LR, weight_decay=1.0)
    with pytest.raises(ValueError, match="decoupled=False"):
        WeightDecayScheduler(optimizer, mf.Constant(DECAY), mask="cautious")
    search = LBFGS(start(), lr=LR)
    search.param_groups[0]["weight_decay"] = 1.0
    with pytest.raises(ValueError, match="asks its closure again"):
        WeightDecayScheduler(search, mf.Constant(DECAY), decoupled=True, mask="cautious")
