"""The sparse coding experiments: their data, and the claims of their summaries."""

import numpy as np
import pytest
import sklearn.datasets

from mirrorflow.lab.experiments.coding import _problem as _coding
from mirrorflow.lab.experiments.coding import fig10_coding_power, fig12_coding_log
from mirrorflow.lab.framework import contract


def test_digits_stand_in_for_faces_with_a_warning(monkeypatch):
    def missing():
        raise OSError("no network")

    monkeypatch.setattr(sklearn.datasets, "fetch_olivetti_faces", missing)
    with pytest.warns(UserWarning, match="not at hand"):
        X, source = _coding.images("auto")
    assert source == "digits" and X.shape == (1797, 64)
    with pytest.raises(OSError, match="no network"):
        _coding.images("olivetti")


def test_atoms_have_norm_1():
    X, _ = _coding.images("digits")
    D = _coding.learned(X[:100], 10, 0, 2)
    np.testing.assert_allclose(np.linalg.norm(D, axis=1), 1)


def results(module, config, tmp_path):
    folder = contract.execute(module, config, tmp_path)
    (result,) = contract.find_results(tmp_path)
    return result["records"], contract.trajectory(folder)


def test_the_curves_of_all_k_meet_on_the_clock_of_their_speed(tmp_path):
    config = fig10_coding_power.Config.preset("smoke").model_copy(update={"steps": 100})
    records, curves = results(fig10_coding_power, config, tmp_path)
    slow, fast = records[1], records[-1]
    ratio = fast["speed"] / slow["speed"]
    assert ratio > 3
    late = np.arange(0, 100, 10)
    slowed = np.interp(late / ratio, np.arange(101), curves[f"k{fast['k']}/mse"])
    plain = curves[f"k{slow['k']}/mse"][late]
    start = plain[0]
    assert np.abs(slowed - plain).max() < 0.1 * start
    assert np.abs(curves[f"k{fast['k']}/mse"][late] - plain).max() > 0.3 * start


def test_decay_raises_the_norm_of_log_codes(tmp_path):
    records, _ = results(fig12_coding_log, fig12_coding_log.Config.preset("smoke"), tmp_path)
    ends = [r["nuclear_end"] for r in sorted(records, key=lambda r: r["alpha"])]
    assert np.all(np.diff(ends) > 0)
    assert all(r["scale"] <= 1 for r in records)
