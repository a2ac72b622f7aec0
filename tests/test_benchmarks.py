"""The benchmarks at small sizes: what they time is the same problem, solved."""

from importlib.util import find_spec

import numpy as np
import pytest
from benchmarks import (
    bench_neighbour,
    bench_paths,
    bench_pursuit,
    bench_regression,
    bench_scaling,
    bench_spectrum,
)
from benchmarks._measure import kept, measure, once


@pytest.fixture
def installed(monkeypatch):
    """Leave out celer where it is not installed: it comes with the extra of the benchmarks."""
    if not find_spec("celer"):
        monkeypatch.delitem(bench_pursuit.SLOW, "celer")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_all_solvers_of_basis_pursuit_find_the_sparse_truth(installed):
    row = bench_pursuit.compare(30, 100, 3, -300.0, {"HiGHS": 50.0}, repeats=1)
    names = ["limit", "LassoLars", *bench_pursuit.SLOW]
    assert row["status"] == "vertex" and row["target to HiGHS"] == 50
    for name in names:
        accuracy = 1e-3 if name == "celer" else 1e-8  # celer solves a lasso
        assert row[f"residual of {name}"] < accuracy, name
        assert row[f"error of {name}"] < max(accuracy, 1e-5), name
        assert abs(row[f"norm of {name} above the least"]) < max(accuracy, 1e-6), name
    for name in names[1:]:
        ratio = row[f"{name}, seconds"] / row["seconds"]
        assert row[f"ratio to {name}"] == pytest.approx(ratio)


def test_a_path_and_separate_solves_end_at_the_same_points(monkeypatch):
    monkeypatch.setattr(bench_paths, "find_spec", lambda name: None)
    for nonzero in (0, 3):
        row = bench_paths.compare(20, 60, nonzero, points=5, repeats=1)
        assert row["relative difference"] < 1e-6
        assert row["ratio"] == pytest.approx(row["separate solves, seconds"] / row["seconds"])
        assert "not installed" in row["celer_path"]


@pytest.mark.slow
def test_exponents_are_slopes_and_every_case_can_be_drawn(tmp_path):
    assert bench_scaling.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    sizes = {name: (20, 40) for name in bench_scaling.SIZES} | {"MatrixSensing, rank": (1, 2)}
    sizes["limit, d"] = (200, 400)  # more columns than the hundred rows
    rows = bench_scaling.run(sizes, repeats=1)
    assert [len(row["seconds of each size"]) for row in rows] == [2] * len(sizes)
    drawn = bench_scaling.draw(rows, tmp_path / "scaling.svg").read_text()
    assert "<svg" in drawn
    assert bench_scaling.draw(rows, tmp_path / "again.svg").read_text() == drawn


def test_calls_take_turns_and_leave_their_last_result():
    made, found = [], {}
    calls = {"a": lambda: made.append("a") or len(made), "b": lambda: made.append("b") or len(made)}
    assert set(measure(kept(calls, found), 1)) == {"a", "b"}
    turns = "".join(made).lstrip("a").lstrip("b")  # after the calls that say how many make a turn
    assert turns == "a" * turns.count("a") + "b" * turns.count("b") and found["b"] == len(made)
    before = len(made)
    assert set(once(kept(calls, found))) == {"a", "b"} and made[before:] == ["a", "b"]
    assert found == {"a": before + 1, "b": before + 2}


@pytest.mark.slow
def test_spectra_are_measured_in_processes_of_their_own():
    (row,) = bench_spectrum.in_processes([("a few", 3, 20, 4, None, 1)], count=1)
    dense = row["dense SVDs in float64, seconds"]
    assert row[bench_spectrum.RATIO] == pytest.approx(dense / row["seconds"])
    assert row["ratios of 1 processes"] == [row[bench_spectrum.RATIO]] * 2
    assert row["relative error of the nuclear norm"] < 1e-11


def test_a_neighbour_is_busy_meanwhile_and_gone_afterwards():
    made = []
    (row,) = bench_neighbour.compare({"nothing": lambda: made.append(0)}, repeats=1)
    assert row["case"] == "nothing, with a busy neighbour" and made
    assert row["ratio"] == pytest.approx(row["seconds"] / row["without, seconds"])


def test_both_cross_validations_predict_and_their_ratios_are_those_of_their_times():
    X, y = bench_regression.spectra(60, 20)
    row = bench_regression.compare("spectra", X, y, 1, 3.0)
    ratio = row["processor seconds"] / row["LassoCV, processor seconds"]
    assert row["times LassoCV's processor time"] == pytest.approx(ratio)
    for name in ("", "LassoCV: "):
        assert row[f"{name}error on the samples left out"] < 0.1 * y.var()
    neighbours = np.corrcoef(X.T)[np.arange(19), np.arange(1, 20)]
    assert neighbours.min() > 0.9


def test_the_memory_of_a_fit_holds_its_data():
    row = bench_regression.memory(50, 2000)
    assert 2 < row["times X"] < 8  # X and its centred copy, and what small problems add
