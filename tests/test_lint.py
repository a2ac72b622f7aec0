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
    assert codes(mf.lint(optimizer)) == [("overwritten", 1)]  # and not as vectors once more


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


def test_numpy_scalars():
    optimizer = torch.optim.AdamW(groups(model()))
    optimizer.param_groups[0]["weight_decay"] = np.float64(0.1)
    (found,) = mf.lint(optimizer)
    assert (found.code, found.group) == ("numpy-scalar", 0) and "NumPy float64" in str(found)


def test_a_graph_is_at_stake_only_where_a_decay_changes():
    """Nothing is captured yet, so that it is a note, and nothing is said of a constant decay."""
    optimizer = torch.optim.AdamW(groups(model()), lr=torch.tensor(0.1), capturable=True)
    assert mf.lint(optimizer) == []
    with mf.WeightDecayScheduler(optimizer, mf.Constant(0.1)) as scheduler:
        assert mf.lint(optimizer, None, scheduler) == []
    with mf.WeightDecayScheduler(optimizer, mf.SwitchOff(0.1, at=3)) as scheduler:
        (found,) = mf.lint(optimizer, None, scheduler)
    assert (found.code, found.group, found.level) == ("frozen-in-graph", 0, "note")
    assert str(found).startswith("note: frozen-in-graph (group 0): capturable=True")
    optimizer.param_groups[0]["capturable"] = False
    with mf.WeightDecayScheduler(optimizer, mf.SwitchOff(0.1, at=3)) as scheduler:
        assert mf.lint(optimizer, None, scheduler) == []


def test_biases_that_decay_are_named():
    net = model()
    found = mf.lint(torch.optim.AdamW(net.parameters(), weight_decay=0.1), net)
    assert codes(found) == [("decayed-vectors", 0)]
    assert "0.bias" in found[0].message


def test_a_group_of_vectors_that_was_overwritten_is_found_without_any_record_of_it():
    net = model()
    optimizer = torch.optim.AdamW(groups(net))
    assert mf.lint(optimizer, net) == []
    for group in optimizer.param_groups:  # the loop that everybody writes by hand
        group["weight_decay"] = 0.05
    (found,) = mf.lint(optimizer, net)
    assert (found.code, found.group) == ("decayed-vectors", 1)
    assert "nothing but biases or scales, 3 of them (0.bias, 1.weight, 1.bias)" in found.message
    assert "overwritten" in found.remedy and "decays by 0.05" in found.message


def test_vectors_that_are_all_there_is_may_decay():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], weight_decay=0.1)
    assert mf.lint(optimizer) == []


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


def test_the_optimizer_inside_accelerates_wrapper_is_looked_at():
    accelerate = pytest.importorskip("accelerate")
    optimizer = torch.optim.Adam(groups(model()))
    wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer)
    assert type(wrapped) is not torch.optim.Adam
    assert codes(mf.lint(wrapped)) == codes(mf.lint(optimizer)) == [("coupled", 0)]


def test_what_cannot_be_looked_at_is_refused():
    optimizer, other = (torch.optim.AdamW(groups(model())) for _ in range(2))
    scheduler = mf.WeightDecayScheduler(other, mf.Constant(0.1))
    with pytest.raises(ValueError, match="got one of another AdamW"):
        mf.lint(optimizer, None, scheduler)
    with pytest.raises(TypeError, match="must be the WeightDecayScheduler of this optimizer"):
        mf.lint(optimizer, None, torch.optim.lr_scheduler.StepLR(optimizer, 2))  # pyright: ignore
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got Linear"):
        mf.lint(torch.nn.Linear(1, 1))  # pyright: ignore
    for wrong in (None, "0.1", torch.ones(2), float("nan"), -0.1):
        optimizer.param_groups[1]["weight_decay"] = wrong
        with pytest.raises(ValueError, match="group 1: weight_decay must be a finite number"):
            mf.lint(optimizer)


def test_an_optimizer_whose_trial_fails_is_unknown():
    class Strange(torch.optim.SGD):
        def step(self, closure=None):
            raise NotImplementedError

    (found,) = mf.lint(Strange(groups(model()), lr=0.1))
    assert (found.code, found.group, found.level) == ("unknown-coupling", 0, "note")
