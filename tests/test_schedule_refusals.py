"""Schedules that are refused: numbers, times and plain values."""

import math

import pytest
import torch

import mirrorflow as mf

# Refusals.

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mf.Constant(NAN), "Constant: rate must be a finite number, got nan"),
        (lambda: mf.Constant(INF), "Constant: rate must be a finite number, got inf"),
        (lambda: mf.Constant(None), "Constant: rate must be a finite number, got None"),
        (lambda: mf.Constant("strong"), "Constant: rate must be a finite number, got 'strong'"),
        (lambda: mf.Constant([1, 2]), r"Constant: rate must be a finite number, got \[1, 2\]"),
        (lambda: mf.SwitchOff(NAN, 1), "SwitchOff: rate must be a finite"),
        (lambda: mf.SwitchOff(1, 0), "SwitchOff: at must be positive, got 0"),
        (lambda: mf.SwitchOff(1, -1), "SwitchOff: at must be positive, got -1"),
        (lambda: mf.SwitchOff(1, INF), "SwitchOff: at must be a finite"),
        (lambda: mf.Linear(NAN, 0, 1), "Linear: start must be a finite"),
        (lambda: mf.Linear(0, -INF, 1), "Linear: end must be a finite"),
        (lambda: mf.Linear(0, 1, 0), "Linear: duration must be positive"),
        (lambda: mf.Cosine(0, 1, -2.0), "Cosine: duration must be positive, got -2.0"),
        (lambda: mf.Cosine(0, 1, NAN), "Cosine: duration must be a finite"),
        (lambda: mf.Piecewise((1, NAN), (1, 2, 3)), "Piecewise: times must be a finite"),
        (lambda: mf.Piecewise((1, 2), (1, INF, 3)), "Piecewise: rates must be a finite"),
        (lambda: mf.Piecewise((2, 1), (1, 2, 3)), "times must be positive and ascending"),
        (lambda: mf.Piecewise((1, 1), (1, 2, 3)), "times must be positive and ascending"),
        (lambda: mf.Piecewise((-1, 1), (1, 2, 3)), "times must be positive and ascending"),
        (lambda: mf.Piecewise((0, 1), (1, 2, 3)), "times must be positive and ascending"),
        (lambda: mf.Piecewise((1, 2), (1, 2)), r"one entry more than .* times \(2\), got 2"),
        (lambda: mf.Piecewise((1,), (1, 2, 3)), r"one entry more than .* times \(1\), got 3"),
        (lambda: mf.Piecewise((), ()), r"one entry more than .* times \(0\), got 0"),
        (lambda: mf.join([]), "join: parts must hold at least one"),
        (lambda: mf.join([(mf.Constant(1), None), (mf.Constant(2), 1)]), "join: duration"),
        (lambda: mf.join([(mf.Constant(1), INF), (mf.Constant(2), 1)]), "join: duration"),
        (lambda: mf.join([(mf.Constant(1), 0), (mf.Constant(2), 1)]), "join: duration"),
        (lambda: mf.join([(mf.Constant(1), -1.0)]), "join: duration must be positive"),
        (lambda: mf.join([(mf.Constant(1), NAN)]), "join: duration must be a finite"),
        (lambda: mf.Cyclic(mf.Constant(1), 0, 2), "Cyclic: period must be positive, got 0"),
        (lambda: mf.Cyclic(mf.Constant(1), INF, 2), "Cyclic: period must be a finite"),
        (lambda: mf.Cyclic(mf.Constant(1), 1, 0), "Cyclic: cycles must be positive, got 0"),
        (lambda: mf.Cyclic(mf.Constant(1), 1, 1.5), "Cyclic: cycles must be a whole number"),
        (lambda: mf.Cyclic(mf.Constant(1), 1, INF), "Cyclic: cycles must be a finite"),
    ],
)
def test_bad_numbers_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_join_needs_schedules():
    with pytest.raises(TypeError, match=r"join: parts must be \(Schedule, .* pairs, got 0.1"):
        mf.join([(mf.Constant(1), 1.0), (0.1, None)])
    for wrong in (mf.Constant(1), [mf.Constant(1)], [(mf.Constant(1), 1.0, 2.0)], 3):
        with pytest.raises(TypeError, match=r"join: parts must be .*\(Schedule, .* pairs, got "):
            mf.join(wrong)
    with pytest.raises(ValueError, match="a number in all pairs but the last, got None"):
        mf.join([(mf.Constant(1), None), (mf.Constant(0), None)])
    pairs = [(mf.Constant(1), 1.0), [mf.Constant(0), None]]
    assert mf.join(iter(pairs)) == mf.join(pairs)
    for wrong in (3, torch.tensor(3.0)):
        with pytest.raises(ValueError, match="Piecewise: times must be a sequence of numbers"):
            mf.Piecewise(wrong, (1, 2))
    with pytest.raises(TypeError, match=r"Cyclic: schedule must be a Schedule, got 0.1"):
        mf.Cyclic(0.1, 1.0, 2)


@pytest.mark.parametrize(
    "mapping",
    [
        {"kind": ["x"]}, {"kind": None}, {"kind": "Constant", "rate": 10**400},
        {"kind": "Piecewise", "times": 5, "rates": [1]}, {"kind": "Cyclic", "schedule": 5,
        "period": 1, "cycles": 2}, {"kind": "join", "schedules": 5, "starts": [0]},
        {"kind": "join", "schedules": [5], "starts": 0.0}, {"kind": "join", "schedules": [5],
        "starts": [0]}, {"kind": "SwitchOff", "rate": 1, 3: 1}, 5, None, [],
    ],
    ids=range(12),
)  # fmt: skip
def test_plain_values_of_other_types_are_a_value_error(mapping):
    with pytest.raises(ValueError, match=r"must|another type") as caught:
        mf.schedule_from_dict(mapping)
    assert len(str(caught.value)) < 300


def test_schedules_nested_without_end_are_a_value_error():
    mapping = {"kind": "Constant", "rate": 1}
    for _ in range(10_000):
        mapping = {"kind": "Cyclic", "schedule": mapping, "period": 1, "cycles": 2}
    with pytest.raises(ValueError, match="nested too deeply"):
        mf.schedule_from_dict(mapping)
