"""Runs that share their beginnings: where they part, what that saves, what is stored there."""

import numpy as np
import pytest
import torch

from mirrorflow.lab.framework.trunks import Checkpoints, Timeline, branch_points, steps_saved


def switched(rate, off, steps=10, seed=0):
    return Timeline({"seed": seed, "lr": 0.1}, np.where(np.arange(steps) < off, rate, 0.0))


RUNS = {
    "on": switched(1.0, 10),
    "off at 4": switched(1.0, 4),
    "off at 7": switched(1.0, 7),
    "half": switched(0.5, 10),
    "another seed": switched(1.0, 10, seed=1),
}


@pytest.mark.parametrize(
    ("one", "two", "steps"),
    [
        ("on", "off at 4", 4),
        ("off at 4", "off at 7", 4),
        ("on", "off at 7", 7),
        ("on", "half", 0),
        ("on", "another seed", 0),
        ("on", "on", 10),
    ],
)
def test_runs_are_the_same_until_their_decay_or_anything_else_differs(one, two, steps):
    assert RUNS[one].common(RUNS[two]) == RUNS[two].common(RUNS[one]) == steps


def test_a_shorter_run_is_the_beginning_of_a_longer_one():
    assert switched(1.0, 20, steps=20).common(switched(1.0, 20, steps=5)) == 5


def test_states_have_the_same_name_exactly_as_long_as_the_runs_are_the_same():
    one, two = RUNS["on"], RUNS["off at 4"]
    assert [one.key(s) == two.key(s) for s in range(11)] == [True] * 5 + [False] * 6
    assert one.key(0) != RUNS["another seed"].key(0)


def test_branch_points_and_the_steps_they_save():
    points = branch_points(RUNS)
    assert points == {
        "on": (4, 7),
        "off at 4": (4,),
        "off at 7": (4, 7),
        "half": (),
        "another seed": (),
    }
    # on 10 + (off at 4) 6 + (off at 7) 3 + half 10 + another seed 10
    assert steps_saved(RUNS) == (50, 39)


def test_a_state_is_found_by_every_run_that_passes_through_it_and_by_no_other(tmp_path):
    store = Checkpoints(tmp_path / "trunks")
    assert store.latest(RUNS["on"]) == (0, None)
    store.save(RUNS["on"], 4, {"w": torch.arange(3.0), "step": 4})
    store.save(RUNS["on"], 8, {"w": torch.zeros(3), "step": 8})
    step, state = store.latest(RUNS["off at 4"])
    assert (step, state["step"]) == (4, 4)
    assert state["w"].tolist() == [0.0, 1.0, 2.0]
    assert store.latest(RUNS["on"])[0] == 8
    assert store.latest(RUNS["on"], until=7)[0] == 4
    assert store.latest(RUNS["half"]) == store.latest(RUNS["another seed"]) == (0, None)
    assert store.has(RUNS["off at 7"], 4)
    store.drop(RUNS["off at 7"], 4)
    assert not store.has(RUNS["on"], 4)


def test_a_killed_write_is_not_taken_for_a_state(tmp_path):
    (tmp_path / f".4-{RUNS['on'].key(4)}.pt.123").write_bytes(b"half of it")
    assert Checkpoints(tmp_path).latest(RUNS["on"]) == (0, None)


def test_bad_rates_and_steps_are_named():
    with pytest.raises(ValueError, match="finite float64"):
        Timeline({}, np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="step 11 is outside of a run of 10 steps"):
        RUNS["on"].key(11)
