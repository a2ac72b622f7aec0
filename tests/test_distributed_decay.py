"""Two real processes: the same decay and account on both, and stops that change nothing."""

import sys

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

import processes
from mirrorflow.spectrum import product_spectrum
from ranks import CASES, SCHEDULES, STEPS, STOP, account, assemble, full, low_rank, train

cases = pytest.mark.parametrize("case", CASES, ids=" ".join)

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.skipif(sys.platform == "win32", reason="file:// rendezvous"),
]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What each process found, and the folder of its checkpoints."""
    return processes.launched(tmp_path_factory, "ranks.py")


@pytest.fixture(params=["ddp", "fsdp"])
def ranks(request, launched):
    """The same for one way to spread a model."""
    results, folder = launched
    chosen = [{key[1:]: v for key, v in r.items() if key[0] == request.param} for r in results]
    return request.param, chosen, folder / request.param


def alone(case):
    """The same training in one process, on the whole batches."""
    parts = assemble(lambda net: net, SCHEDULES[case[0]](), case[1])
    return account(parts[0], parts[2], train(*parts, 0, STEPS))


def assert_same(ours, theirs):
    for mine, other in zip(ours["weights"], theirs["weights"], strict=True):
        assert torch.equal(mine, other)
    assert {k: v for k, v in ours.items() if k != "weights"} == {
        k: v for k, v in theirs.items() if k != "weights"
    }


@cases
def test_every_rank_has_the_same_decay_and_ledger(ranks, case):
    _, (first, second), _ = ranks
    assert_same(first[case][0], second[case][0])


@cases
def test_as_in_one_process(ranks, case):
    _, (first, _), _ = ranks
    ours, theirs = first[case][0], alone(case)
    for mine, other in zip(ours["weights"], theirs["weights"], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    for key in ("a", "ratios"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-3)
    for mine, other in zip(ours["decays"], theirs["decays"], strict=True):
        assert mine == pytest.approx(other, rel=1e-3)


def test_the_loops_really_act(ranks):
    _, (first, _), _ = ranks
    for schedule in ("overall", "per layer"):
        decays = {tuple(decays) for decays in first[schedule, "adamw"][0]["decays"]}
        assert len(decays) > 2
    assert len(set(first["per layer", "adamw"][0]["decays"][-1])) > 2  # the layers differ


@cases
def test_a_stop_changes_nothing(ranks, case):
    _, results, _ = ranks
    for found in results:
        whole, resumed = found[case]
        assert all(
            torch.equal(a, b) for a, b in zip(whole["weights"], resumed["weights"], strict=True)
        )
        assert resumed["a"] == whole["a"] and resumed["audit"] == whole["audit"]
        assert resumed["log"] == whole["log"]


@cases
def test_a_checkpoint_goes_on_in_another_world_size(ranks, case):
    """Two processes wrote it, one reads it: the ledger and the loops go on, and the training."""
    scenario, (first, _), folder = ranks
    saved = torch.load(folder / " ".join(case) / "saved.pt", weights_only=True)
    net, optimizer, control = parts = assemble(lambda net: net, SCHEDULES[case[0]](), case[1])
    if scenario == "ddp":
        net.load_state_dict({k.removeprefix("module."): v for k, v in saved[0].items()})
        optimizer.load_state_dict(saved[1])
    else:
        options = StateDictOptions(full_state_dict=True)
        set_state_dict(
            net, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=options
        )
    control.load_state_dict(saved[2])
    assert control.scheduler.steps == STOP
    train(*parts, STOP, STEPS)
    whole = first[case][0]
    for mine, other in zip(full(net), whole["weights"], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    assert control.scheduler.accumulated == pytest.approx(whole["a"], rel=1e-3)


def test_two_processes_measure_the_spectra_that_one_measures(launched):
    """From unequal shards, by a process group and by all placements of DTensors."""
    whole = product_spectrum(*low_rank())
    for found in launched[0]:
        assert len(found["spectra",]) == 5
        for values, imbalance in found["spectra",]:
            torch.testing.assert_close(values, whole.singular_values, rtol=1e-6, atol=0)
            torch.testing.assert_close(imbalance, whole.imbalance.norm(), rtol=1e-10, atol=0)
