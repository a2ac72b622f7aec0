"""Schedules: rate and integral against quadrature, and what they refuse."""

import argparse
import copy
import inspect
import json
import math
import pickle
import shlex
from collections import UserDict, UserList
from dataclasses import FrozenInstanceError
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

import mirrorflow as mf
from mirrorflow.schedule import Joined, serialization

EVERY = {
    "constant": mf.Constant(0.3),
    "zero": mf.Constant(0),
    "off": mf.SwitchOff(0.7, at=1.3),
    "up": mf.Linear(0.0, 0.4, 1.7),
    "down": mf.Linear(0.5, -0.2, 0.9),
    "cosine": mf.Cosine(0.5, 0.1, 1.6),
    "warm": mf.Cosine(0.0, 1.0, 0.7),
    "piecewise": mf.Piecewise((0.4, 1.0, 1.9), (0.1, 0.6, -0.2, 0.05)),
    "one piece": mf.Piecewise((), (0.3,)),
    "joined": mf.join([(mf.Linear(0, 0.3, 0.6), 0.6), (mf.Cosine(0.3, 0.0, 1.0), 0.5),
                       (mf.SwitchOff(0.2, at=0.4), None)]),
    "cut": mf.join([(mf.SwitchOff(1.0, at=2.0), 0.7), (mf.Piecewise((0.3,), (0.0, 1.0)), 0.9),
                    (mf.Constant(0.0), math.inf)]),
}  # fmt: skip
EVERY["nested"] = mf.join([(EVERY["joined"], 1.35), (EVERY["cut"], 1.0), (EVERY["up"], 5.0)])
EVERY["cyclic"] = mf.Cyclic(EVERY["warm"], 0.6, 3)
EVERY["wheels"] = mf.Cyclic(mf.join([(EVERY["down"], 0.5), (EVERY["cyclic"], None)]), 1.1, 4)
each = pytest.mark.parametrize("schedule", EVERY.values(), ids=EVERY)
some = settings(max_examples=60, deadline=None, derandomize=True, database=None)
strengths = st.floats(-2, 2)
times = st.floats(1e-3, 20)


@st.composite
def pieces(draw):
    count = draw(st.integers(0, 3))
    jumps = sorted(draw(st.sets(times, min_size=count, max_size=count)))
    return mf.Piecewise(jumps, [draw(strengths) for _ in range(count + 1)])


def joins(parts):
    return st.lists(st.tuples(parts, times), min_size=1, max_size=3).map(mf.join)


STRENGTHS = {"rate", "start", "end"}  # the parameters of a schedule that are strengths, not times
FORMULAS = [
    cls
    for cls in vars(mf.schedule).values()
    if isinstance(cls, type) and issubclass(cls, mf.Schedule) and cls is not mf.Schedule
]


def built(cls):
    """Draw schedules of a class by the names of its parameters."""
    names = inspect.signature(cls).parameters
    return st.builds(cls, *(strengths if name in STRENGTHS else times for name in names))


# Of a new schedule with such parameters every law below is tested without an entry here.
simple = st.one_of(
    pieces(), *(built(c) for c in FORMULAS if c not in (mf.Piecewise, mf.Cyclic, Joined))
)


def cycles(parts):
    return st.builds(mf.Cyclic, parts, times, st.integers(1, 4))


schedules = st.recursive(simple, lambda parts: st.one_of(joins(parts), cycles(parts)), max_leaves=5)


def quadrature(schedule, start, end):
    """Integrate the rate numerically between breakpoints."""
    edges = [start, *(b for b in schedule.breakpoints if start < b < end), end]
    return math.fsum(
        quad(schedule.rate, a, b, epsabs=1e-12, epsrel=1e-12)[0] for a, b in pairwise(edges)
    )


# Values.


@each
def test_the_integral_is_that_of_the_rate(schedule):
    for t in (0.0, 0.2, 0.4, 1.0, 1.3, 1.75, 2.9, 11.0):
        assert schedule.integral(t) == pytest.approx(quadrature(schedule, 0.0, t), abs=1e-13)


@some
@given(schedule=schedules, start=st.floats(0, 60), span=st.floats(0, 60))
def test_the_integral_is_that_of_the_rate_for_random_schedules(schedule, start, span):
    gained = schedule.integral(start + span) - schedule.integral(start)
    assert gained == pytest.approx(quadrature(schedule, start, start + span), abs=1e-10)


@some
@given(schedule=schedules)
def test_the_rate_is_right_continuous_at_the_breakpoints(schedule):
    points = schedule.breakpoints
    assert list(points) == sorted(set(points)) and all(b > 0 for b in points)
    after = [schedule.rate(np.nextafter(b, np.inf)) for b in points]
    assert [schedule.rate(b) for b in points] == pytest.approx(after, abs=1e-9)


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (EVERY["constant"], ()),
        (EVERY["off"], (1.3,)),
        (EVERY["up"], (1.7,)),
        (EVERY["cosine"], (1.6,)),
        (EVERY["piecewise"], (0.4, 1.0, 1.9)),
        (EVERY["joined"], (0.6, 1.1, 1.5)),
        (EVERY["cut"], (0.7, 1.0, 1.6)),
        (EVERY["cyclic"], (0.6, 1.2, 1.9)),
        (mf.Cyclic(EVERY["off"], 2.0, 2), (1.3, 2.0, 3.3)),
        (mf.join([(mf.Constant(1.0), 2.0)]), ()),
        (mf.join([(mf.join([(mf.Constant(1.0), 1.0), (mf.Constant(2.0), 1.0)]), 1.0),
                  (mf.SwitchOff(1.0, at=3.0), 3.0), (mf.Constant(0.5), None)]), (1.0, 4.0)),
    ],
)  # fmt: skip
def test_breakpoints(schedule, points):
    assert schedule.breakpoints == pytest.approx(points, abs=1e-13)


def test_rates_at_and_between_the_breakpoints():
    assert mf.SwitchOff(0.7, at=1.3).rate([0, 1.2999999, 1.3, 9]).tolist() == [0.7, 0.7, 0, 0]
    assert mf.Linear(1.0, 0.2, 4.0).rate([0, 1, 4, 5]).tolist() == [1.0, 0.8, 0.2, 0.2]
    np.testing.assert_allclose(
        mf.Cosine(1.0, 0.2, 3.0).rate([0, 1, 1.5, 3, 4]), [1.0, 0.8, 0.6, 0.2, 0.2], rtol=1e-13
    )
    assert mf.Piecewise((1, 2), (3, 4, 5)).rate([0.99, 1, 1.99, 2]).tolist() == [3, 4, 4, 5]
    joined = mf.join([(mf.Constant(1.0), 2.0), (mf.Linear(3.0, 4.0, 1.0), 0.5), (EVERY["off"], 9)])
    assert joined.rate([1.999, 2.0, 2.25, 2.5, 3.7, 3.9]).tolist() == [1, 3, 3.25, 0.7, 0.7, 0]


@pytest.mark.parametrize("end", (0.0, 0.1, 0.3))
@pytest.mark.parametrize("kind", (mf.Linear, mf.Cosine))
def test_a_ramp_ends_exactly_at_its_end(kind, end):
    """So that a decay that was switched off is off: `weightdecay` compares with 0."""
    for duration in (0.1, 1 / 3, 7.0, 1e5):
        ramp = kind(0.7, end, duration)
        assert ramp.rate([duration, 2 * duration, 1e9]).tolist() == [end] * 3


def test_a_leading_zero_is_the_start_of_the_first_rate():
    assert mf.Piecewise((0, 1, 2), (3, 4, 5)) == mf.Piecewise((1, 2), (3, 4, 5))
    assert mf.Piecewise((0,), (3,)).integral(2) == 6


@each
def test_accumulated_is_minus_the_integral(schedule):
    t = np.linspace(0, 5, 31)
    assert schedule.accumulated(t).tolist() == (-schedule.integral(t)).tolist()
    assert math.copysign(1, schedule.accumulated(0.0)) == 1  # 0, not -0
    assert schedule.integral(0.0) == 0


# Numbers and arrays.


@each
def test_arrays_are_evaluated_like_numbers(schedule):
    grid = np.linspace(0, 4, 24).reshape(2, 3, 4)
    for method in (schedule.rate, schedule.integral, schedule.accumulated):
        values = method(grid)
        assert values.shape == grid.shape and values.dtype == np.float64
        assert values.ravel().tolist() == [method(float(t)) for t in grid.ravel()]
        assert method([]).shape == (0,) and method(grid[:1, :1, :1]).shape == (1, 1, 1)
        assert method(grid.tolist()).tolist() == values.tolist()
        torched = method(torch.from_numpy(grid))
        assert isinstance(torched, np.ndarray) and torched.tolist() == values.tolist()


@each
@pytest.mark.parametrize(
    "make", (int, float, np.float32, np.float64, np.int64, np.array, torch.tensor, Fraction)
)
def test_numbers_of_any_kind_give_a_float(schedule, make):
    for method in (schedule.rate, schedule.integral, schedule.accumulated):
        value = method(make(2))
        assert type(value) is float and value == method(2.0)


@each
def test_single_precision_times_are_evaluated_in_double(schedule):
    t = np.linspace(0, 4, 9, dtype=np.float32)
    assert schedule.integral(t).dtype == np.float64
    assert schedule.integral(t).tolist() == schedule.integral(t.astype(float)).tolist()


# Digits.


def test_long_durations_keep_their_digits():
    """300,000 updates of a large model, and far beyond: relative errors of a few eps."""
    for t in (3e5, 1e12, 1e15):
        exact = Fraction(1 / 3) * Fraction(t)
        assert mf.Constant(1 / 3).integral(t) == pytest.approx(float(exact), rel=2e-15)
        assert mf.SwitchOff(1e-5, at=t / 2).integral(t) == pytest.approx(t * 5e-6, rel=2e-15)
        assert mf.Linear(0.1, 0.0, t).integral(2 * t) == pytest.approx(0.05 * t, rel=2e-15)
        assert mf.Cosine(0.1, 0.0, t).integral(2 * t) == pytest.approx(0.05 * t, rel=2e-15)
        many = mf.join([(mf.Constant(0.1), t), (mf.Constant(0.0), t), (mf.Constant(0.2), None)])
        assert many.integral(3 * t) == pytest.approx(0.3 * t, rel=2e-15)


@pytest.mark.parametrize("duration", (1.0, 1e6, 1e12))
def test_the_start_of_a_long_warmup_keeps_its_digits(duration):
    """t^2 end / (2 duration), which end t - end t (1 - t / (2 duration)) would lose."""
    for t in (1e-6, 1e-3, 0.7):
        got = mf.Linear(0.0, 0.3, duration).integral(t)
        assert got == pytest.approx(0.15 * t * t / duration, rel=1e-13)


@pytest.mark.parametrize("at", (0.1, 0.3, 0.7, 1 / 3))
def test_a_switch_after_a_long_time_is_over_at_its_breakpoint(at):
    """(start + at) - start may round to less than at; an integrator restarts at the breakpoint."""
    for start in (0.2, 1e3 / 7, 1e6, 1e9 / 3):
        joined = mf.join([(mf.Constant(0.5), start), (mf.SwitchOff(0.4, at=at), None)])
        _, switch = joined.breakpoints
        assert joined.rate(switch) == 0 and joined.rate(np.nextafter(switch, 0)) == 0.4
        assert switch == pytest.approx(start + at, rel=2e-15)


# Values, not objects.


@each
def test_schedules_are_values(schedule):
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert twin == schedule and hash(twin) == hash(schedule) and repr(twin) == repr(schedule)
        assert twin.integral(2.3) == schedule.integral(2.3)
    others = [s for s in EVERY.values() if s is not schedule]
    assert all(s != schedule for s in others)
    name = next(iter(vars(schedule)))
    with pytest.raises(FrozenInstanceError):
        setattr(schedule, name, 1.0)


def test_equal_numbers_make_equal_schedules():
    assert mf.Constant(1) == mf.Constant(1.0) == mf.Constant(torch.tensor(1.0))
    assert mf.Piecewise([1, 2], [0, 1, 0]) == mf.Piecewise((1.0, 2.0), np.array([0, 1, 0]))
    assert mf.Linear(0, 1, 2) != mf.Cosine(0, 1, 2)


@pytest.mark.parametrize(
    "name", [n for n in EVERY if n not in ("joined", "cut", "nested", "wheels")]
)
def test_the_repr_makes_the_schedule_again(name):
    assert eval(repr(EVERY[name]), vars(mf)) == EVERY[name]


# Joins.


@some
@given(parts=st.lists(st.tuples(simple, times), min_size=1, max_size=4), t=st.floats(0, 100))
def test_a_join_runs_one_after_the_other(parts, t):
    left, gained, rate = t, 0.0, None
    for i, (schedule, duration) in enumerate(parts):
        if left < duration or i == len(parts) - 1:
            gained, rate = gained + schedule.integral(left), schedule.rate(left)
            break
        gained, left = gained + schedule.integral(duration), left - duration
    joined = mf.join(parts)
    assert joined.integral(t) == pytest.approx(gained, abs=1e-11)
    near = [b for b in joined.breakpoints if abs(b - t) < 1e-9]
    assert near or joined.rate(t) == pytest.approx(rate, abs=1e-8)


def test_a_join_of_joins_is_the_flat_join():
    a, b, c = mf.Linear(0, 1, 0.5), mf.Cosine(1, 0.2, 0.7), mf.SwitchOff(0.4, at=0.25)
    flat = mf.join([(a, 0.5), (b, 0.25), (c, None)])
    for deep in (
        mf.join([(mf.join([(a, 0.5), (b, 9.0)]), 0.75), (c, None)]),
        mf.join([(a, 0.5), (mf.join([(b, 0.25), (c, 1.0)]), 2.0)]),
    ):
        t = np.linspace(0, 2, 81)
        np.testing.assert_allclose(deep.rate(t), flat.rate(t), atol=1e-13)
        np.testing.assert_allclose(deep.integral(t), flat.integral(t), atol=1e-13)
        assert deep.breakpoints == flat.breakpoints == (0.5, 0.75, 1.0)


# Cycles.


@some
@given(part=simple, period=times, count=st.integers(1, 5), t=st.floats(0, 120))
def test_cycles_are_a_join_of_equal_parts(part, period, count, t):
    cyclic, joined = mf.Cyclic(part, period, count), mf.join([(part, period)] * count)
    assert cyclic.breakpoints == pytest.approx(joined.breakpoints, rel=1e-14)
    assert cyclic.integral(t) == pytest.approx(joined.integral(t), abs=1e-11)
    near = [b for b in joined.breakpoints if abs(b - t) < 1e-9]
    assert near or cyclic.rate(t) == pytest.approx(joined.rate(t), abs=1e-8)


@pytest.mark.parametrize("period", (0.1, 0.3, 1 / 3, 7.7, 1e5 / 7))
def test_every_cycle_starts_at_its_breakpoint(period):
    """t / period may round to a whole number too early or too late; restarts are where they say."""
    cyclic = mf.Cyclic(mf.Linear(1.0, 0.0, period), period, 1000)
    starts = np.array(cyclic.breakpoints[:999])
    assert (cyclic.rate(starts) == 1).all()
    assert (cyclic.rate(np.nextafter(starts, 0)) < 1e-9).all()


def test_after_the_last_cycle_its_clock_goes_on():
    cyclic = mf.Cyclic(mf.Piecewise((1.0, 3.0), (0.1, 0.2, 0.4)), 2.0, 2)
    assert cyclic.rate([0, 1, 2, 3, 4.5, 5, 99]).tolist() == [0.1, 0.2, 0.1, 0.2, 0.2, 0.4, 0.4]


# Plain values.


@each
def test_plain_values_make_the_schedule_again(schedule):
    plain = json.loads(json.dumps(mf.schedule_to_dict(schedule)))
    assert mf.schedule_from_dict(plain) == schedule


@some
@given(schedule=schedules)
def test_plain_values_make_random_schedules_again_bit_for_bit(schedule):
    plain = json.loads(json.dumps(mf.schedule_to_dict(schedule)))
    assert mf.schedule_from_dict(plain) == schedule


def test_plain_values_as_a_file_has_them():
    found = mf.schedule_from_dict({
        "kind": "join", "starts": [0, 10, 30], "schedules": [
            {"kind": "Linear", "start": 0, "end": 0.1, "duration": 10},
            {"kind": "Cyclic", "period": 5, "cycles": 4,
             "schedule": {"kind": "Cosine", "start": 0.1, "end": 0, "duration": 5}},
            {"kind": "Constant", "rate": 0},
        ],
    })  # fmt: skip
    assert found == mf.join([(mf.Linear(0, 0.1, 10), 10),
                             (mf.Cyclic(mf.Cosine(0.1, 0, 5), 5, 4), 20),
                             (mf.Constant(0), None)])  # fmt: skip


def test_plain_values_as_a_command_line_has_them():
    """As a shell cuts the line, in the form that docs/training.md shows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--decay", type=json.loads)
    line = """train.py --decay '{"kind": "SwitchOff", "rate": 0.1, "at": 600}'"""
    args = parser.parse_args(shlex.split(line)[1:])
    assert mf.schedule_from_dict(args.decay) == mf.SwitchOff(0.1, at=600)


def test_plain_values_as_a_configuration_object_has_them():
    """OmegaConf's mappings and lists, for one, are neither a dict nor a list."""
    part = UserDict(kind="Piecewise", times=UserList([10, 20]), rates=UserList([0.1, 0.05, 0]))
    found = mf.schedule_from_dict(
        UserDict(kind="join", starts=UserList([0, 30]), schedules=UserList([part, part]))
    )
    pieces = mf.Piecewise((10, 20), (0.1, 0.05, 0))
    assert found == mf.join([(pieces, 30), (pieces, None)])
    assert hash(found) == hash(mf.join([(pieces, 30), (pieces, None)]))


def test_every_schedule_has_plain_values():
    names = {"join" if cls is Joined else cls.__name__ for cls in FORMULAS}
    assert names | {"join"} == set(serialization._makers())


KNOWN = ", ".join(serialization._makers())


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"kind": "Switchoff", "rate": 1, "at": 2}, f"one of {KNOWN}, got .*Switchoff"),
        ({"rate": 1}, f"one of {KNOWN}"),
        (0.1, f"one of {KNOWN}, got 0.1"),
        ({"kind": ["x"]}, f"one of {KNOWN}, got .*x"),
        ({"kind": None}, f"one of {KNOWN}"),
        ({"kind": "SwitchOff", "rate": 1}, "SwitchOff: the fields must be rate and at, got rate"),
        ({"kind": "Constant", "rate": 1, "at": 2}, "Constant: .* must be rate, got rate and at"),
        ({"kind": "Constant"}, "Constant: the fields must be rate, got none"),
        ({"kind": "SwitchOff", "rate": 1, "at": 0}, "SwitchOff: at must be positive"),
        ({"kind": "Cyclic", "schedule": {"kind": "x"}, "period": 1, "cycles": 2}, "one of Const"),
        *(
            ({"kind": "join", "schedules": [{"kind": "Constant", "rate": 1}] * 2, "starts": starts},
             "join: starts must ascend from 0, one for each of the 2")
            for starts in ([1, 2], [0, 0], [0], [], [0, 1, 2])
        ),
    ],
)  # fmt: skip
def test_plain_values_that_are_not_a_schedule_are_named(plain, message):
    with pytest.raises(ValueError, match=message):
        mf.schedule_from_dict(plain)


def test_a_schedule_without_plain_values_is_refused():
    class Own(mf.Constant):
        pass

    for schedule in (Own(0.1), lambda step: 0.1):
        with pytest.raises(TypeError, match=f"schedule must be one of {KNOWN}, got "):
            mf.schedule_to_dict(schedule)


@each
@pytest.mark.parametrize(
    "t", (-1e-9, -1, math.nan, math.inf, -math.inf, None, [0.0, math.nan], [1.0, -2.0, 3.0])
)
def test_times_are_finite_and_not_negative(schedule, t):
    for method in (schedule.rate, schedule.integral, schedule.accumulated):
        with pytest.raises(ValueError, match="t must be finite and >= 0, got"):
            method(t)
