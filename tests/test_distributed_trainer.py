"""The Trainer in two real processes: as in one, and a stop changes nothing."""

import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import processes
from trainer_ranks import CASES, both

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.skipif(sys.platform == "win32", reason="file:// rendezvous"),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-lora-{case[1]}")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return processes.launched(tmp_path_factory, "trainer_ranks.py")[0]


def assert_close(found, expected):
    for name, weight in expected["weights"].items():
        if name.endswith("c_attn.bias"):  # keys' has a gradient of 0: Adam takes rounding for one
            continue
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5)
    assert found["ratios"] == pytest.approx(expected["ratios"], rel=1e-4, nan_ok=True)
    assert found["a"] == pytest.approx(expected["a"], rel=1e-4)
    assert [row["stop"] for row in found["audit"]] == [row["stop"] for row in expected["audit"]]


@cases
def test_both_processes_have_the_same_decay_spectra_and_weights(ranks, case):
    first, second = (rank[case][0] for rank in ranks)
    assert first["a"] == second["a"] and first["a"][0] < 0
    assert first["audit"] == second["audit"] and len(first["ratios"]) == 5
    assert first["ratios"] == pytest.approx(second["ratios"], rel=0, abs=0, nan_ok=True)
    for name, weight in first["weights"].items():
        assert torch.equal(second["weights"][name], weight)


@cases
def test_as_in_one_process(ranks, case, tmp_path):
    whole, resumed = both(tmp_path, 1, *case)
    assert_close(ranks[0][case][0], whole)
    assert_close(ranks[0][case][1], resumed | {"audit": ranks[0][case][1]["audit"]})
    assert ranks[0][case][0]["decays"] == pytest.approx(whole["decays"], rel=1e-4)


@cases
def test_a_stop_changes_nothing(ranks, case):
    for rank in ranks:
        whole, resumed = rank[case]
        assert resumed["a"] == whole["a"] and resumed["audit"] == whole["audit"]
        assert resumed["ratios"] == whole["ratios"][-len(resumed["ratios"]) :]
        for name, weight in whole["weights"].items():
            assert torch.equal(resumed["weights"][name], weight)


def test_the_closed_loop_really_acts(ranks):
    whole = ranks[0]["hold", False][0]
    assert len(set(whole["decays"])) > 2
