"""Mistakes in how an optimizer decays weights, each made and found."""

import numpy as np
import pytest
import torch

import mirrorflow as mf
from mirrorflow.weightdecay import lint_file


def model():
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))


def groups(net, decay=0.1):
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def codes(found):
    return [(f.code, f.group) for f in found]


def test_a_sound_run_has_no_finding(tmp_path):
    net = model()
    optimizer = torch.optim.AdamW(groups(net))
    scheduler = mf.WeightDecayScheduler(optimizer, mf.SwitchOff(0.1, at=3))
    for _ in range(5):
        net(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        scheduler.step()
    assert mf.lint(optimizer, net, scheduler) == []
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert lint_file(tmp_path / "optimizer.pt") == []


def test_no_decay_at_all():
    found = mf.lint(torch.optim.AdamW(groups(model(), 0.0), weight_decay=0.0))
    assert codes(found) == [("zero-decay", None)]
    assert "TrainingArguments" in str(found[0])


def test_a_group_without_decay_that_was_overwritten():
    optimizer = torch.optim.AdamW(groups(model()))
    mf.WeightDecayScheduler(optimizer, mf.Constant(0.1))
    for group in optimizer.param_groups:  # the loop that everybody writes by hand
        group["weight_decay"] = 0.05
    assert ("overwritten", 1) in codes(mf.lint(optimizer))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda g: torch.optim.Adam(g), [("coupled", 0)]),
        (lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9), [("coupled", 0)]),
        (lambda g: torch.optim.SGD(g, lr=0.1), []),
        (lambda g: torch.optim.RAdam(g, decoupled_weight_decay=True), []),
    ],
)
def test_decay_in_the_gradient(make, expected, tmp_path):
    optimizer = make(groups(model()))
    assert codes(mf.lint(optimizer)) == expected
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "all.pt")
    assert codes(lint_file(tmp_path / "all.pt")) == expected


def test_decay_from_outside_is_not_accused():
    optimizer = torch.optim.Adam(groups(model()), weight_decay=0.1)
    scheduler = mf.WeightDecayScheduler(optimizer, mf.Constant(0.1), decoupled=True)
    assert mf.lint(optimizer, None, scheduler) == []


def test_numpy_scalars_and_numbers_frozen_in_a_graph():
    optimizer = torch.optim.AdamW(groups(model()))
    optimizer.param_groups[0]["weight_decay"] = np.float64(0.1)
    optimizer.param_groups[0]["capturable"] = True
    assert codes(mf.lint(optimizer)) == [("numpy-scalar", 0), ("frozen-in-graph", 0)]


def test_biases_that_decay_are_named():
    net = model()
    found = mf.lint(torch.optim.AdamW(net.parameters(), weight_decay=0.1), net)
    assert codes(found) == [("decayed-vectors", 0)]
    assert "0.bias" in found[0].message


def test_groups_beside_the_schedule():
    net = model()
    optimizer = torch.optim.AdamW(groups(net))
    optimizer.param_groups[1]["weight_decay"] = 0.3
    scheduler = mf.WeightDecayScheduler(optimizer, None, groups=[(0, mf.Constant(0.1))])
    assert ("unscheduled", 1) in codes(mf.lint(optimizer, None, scheduler))


def test_a_scheduler_that_has_missed_steps():
    net = model()
    optimizer = torch.optim.AdamW(groups(net))
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    scheduler = mf.WeightDecayScheduler(optimizer, mf.Constant(0.1))
    assert codes(mf.lint(optimizer, None, scheduler)) == [("double-stepping", None)]


def test_files_that_are_no_optimizer(tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="damaged"):
        lint_file(tmp_path / "text")
    torch.save({"model": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="no param_groups"):
        lint_file(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError):
        lint_file(tmp_path / "none")
