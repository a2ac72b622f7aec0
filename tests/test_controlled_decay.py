"""`ControlledDecay`: what its loops are fed, what it logs, its rows, and what it refuses."""

import copy
import csv
import io
import math

import pytest
import torch

import mirrorflow as mf
from mirrorflow.control import ControlledDecay
from mirrorflow.weightdecay import PerLayer
from test_weightdecay_layers import EVERY, LR, STEPS, Net, assemble, backward, equal, train, values


def never(rate=0.3):
    return mf.OffBelow(rate, -1.0, lowest=-1.0)  # it only keeps what it is fed


def dense(net, layer):
    """The product that the paper measures, formed."""
    q, k, _ = net.blocks[layer].in_proj_weight.detach().double().chunk(3)
    return torch.linalg.svdvals(q.T @ k)


ORACLES = {
    "ratio": lambda s: s.sum() / s.norm(),
    "nuclear": lambda s: s.sum(),
    "frobenius": lambda s: s.norm(),
    "stable_rank": lambda s: (s.norm() / s.max()) ** 2,
    "effective_rank": lambda s: torch.exp(-(s / s.sum() * torch.log(s / s.sum())).sum()),
}


# What loops are fed


@pytest.mark.parametrize("metric", ORACLES)
@pytest.mark.parametrize("place", ["schedule", "groups"])
def test_a_loop_is_fed_the_mean_of_the_metric(metric, place):
    loop = never()
    rules = {"schedule": mf.Constant(0.1), "groups": [(0, loop)]}
    net, optimizer, control = assemble(
        **rules if place == "groups" else {"schedule": loop}, metric=metric
    )
    train(net, optimizer, control, 0, EVERY)
    svals = [dense(net, layer)[:16] for layer in range(2)]
    expected = sum(float(ORACLES[metric](s[s > 1e-9 * s.max()])) for s in svals) / 2
    assert [(row["step"], row["value"]) for row in loop.log] == [
        (EVERY, pytest.approx(expected, rel=1e-5))
    ]


def test_the_gap_and_a_function_of_the_measurement():
    def smallest(found):
        return torch.tensor(min(record.ratio for record in found.records))

    for metric in ("gap", smallest):
        loop = never()
        net, optimizer, control = assemble(loop, metric=metric)
        logs = train(net, optimizer, control, 0, EVERY)[-1]
        found = control.measurements[-1][1]
        expected = smallest(found) if callable(metric) else found.summary()["mean_gap"]
        assert loop.log[0]["value"] == pytest.approx(float(expected))
        assert logs["spectrum/gap"] == found.summary()["mean_gap"]
        assert ("spectrum/metric" in logs) == callable(metric)
    assert logs["spectrum/metric"] == pytest.approx(float(smallest(found)))


def test_the_loop_of_a_layer_is_fed_the_metric_of_the_layer():
    held = PerLayer(lambda layer: never())
    net, optimizer, control = assemble(held, metric="nuclear", level="head")
    logs = train(net, optimizer, control, 0, EVERY)[-1]
    for i in range(2):
        heads = [r.nuclear for r in control.measurements[0][1].records if r.name == f"blocks.{i}"]
        assert len(heads) == 2
        assert logs[f"nuclear/blocks.{i}"] == pytest.approx(sum(heads) / 2)
        assert held.loops[f"blocks.{i}"].log[0]["value"] == logs[f"nuclear/blocks.{i}"]


def test_off_below_switches_the_decay_of_a_run_off():
    at = assemble(mf.Constant(9.0), metric="nuclear")
    train(*at, 0, STEPS)
    nuclear = [found.summary()["mean_nuclear"] for _, found in at[2].measurements]
    loop = mf.OffBelow(9.0, target=(nuclear[2] + nuclear[3]) / 2)
    assert nuclear == sorted(nuclear, reverse=True)
    train(*(run := assemble(loop, metric="nuclear")), 0, STEPS)
    stop = 4 * EVERY
    assert [row["stop"] for row in run[2].scheduler.audit()] == [stop, STEPS]
    assert run[2].scheduler.accumulated == [pytest.approx(-LR * 9.0 * stop)]


def test_a_loop_in_two_places_is_fed_once():
    loop = never()
    train(*assemble(loop, groups=[(0, loop)]), 0, EVERY)
    assert len(loop.log) == 1


def test_a_metric_that_gives_no_number_is_named():
    net, optimizer, control = assemble(never(), metric=lambda found: None)
    with pytest.raises(TypeError, match="gives None: a number is needed"):
        train(net, optimizer, control, 0, EVERY)


def test_nothing_to_measure_changes_nothing():
    net, _, control = assemble(loop := never(), metric="nuclear")
    with torch.no_grad():
        for block in net.blocks:
            block.in_proj_weight[:16] = 0.0  # Q
    control.measure(0)
    assert math.isnan(loop.log[0]["value"]) and loop.current == 0.3


@pytest.mark.parametrize("make", [never, lambda: PerLayer(lambda layer: never())])
def test_a_loop_that_is_measured_seldom_is_not_accused_of_being_unfed(make):
    control = ControlledDecay(
        net := Net(), torch.optim.AdamW(net.parameters(), weight_decay=0.1), make(),
        track_every=5000,
    )  # fmt: skip
    for step in range(1, 4000):  # under a bare scheduler a warning, which would be an error
        control.scheduler.account.steps = step
        control.scheduler.step()
    for loop in control._loops or control.schedule.loops.values():
        loop.update(4000, math.nan)  # and nothing in the end


@pytest.mark.parametrize("make", [never, lambda: PerLayer(lambda layer: never())])
def test_a_control_whose_step_is_forgotten_says_so(make):
    net, optimizer, control = assemble(make())
    with pytest.warns(
        UserWarning, match=rf"0 to 20 and was never fed.*every {EVERY} steps.*step\(\)"
    ):
        for _ in range(21):
            net(torch.ones(2, 3, 16)).sum().backward()
            optimizer.step()
    assert not control.measurements


def test_an_interval_longer_than_the_run_is_said_when_it_is_over():
    optimizer = torch.optim.AdamW((net := Net()).parameters(), weight_decay=0.1)
    control = ControlledDecay(net, optimizer, never(), track_every=500)
    train(net, optimizer, control, 0, 30)
    with pytest.warns(UserWarning, match=r"OffBelow .* 0 to 30 .* every 500 steps \(track"):
        control.close()


# What it remembers


def test_loops_in_groups_continue_with_their_logs():
    def make():
        return assemble(
            mf.OffAtBudget(0.3, budget=1.0), decoupled=True, groups=[
                (r"blocks.0", mf.HoldRatio(1.8, 0.3, gain=0.8)),
                (r"blocks.1", mf.OffAtBudget(0.3, budget=5 * LR * 0.3)),
            ],
        )  # fmt: skip

    whole = make()
    train(*whole, 0, STEPS)
    first = make()
    train(*first, 0, 7)
    saved = copy.deepcopy([part.state_dict() for part in first])
    again = make()
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    train(*again, 7, STEPS)
    assert equal(values(again[0]), values(whole[0]))
    logs = [[loop.log for loop in control._loops] for control in (whole[2], again[2])]
    assert logs[0] == logs[1] and [len(log) for log in logs[0]] == [0, STEPS // EVERY, 1]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([], "state must have the keys scheduler, layers and loops, got list"),
        ({"steps": 3, "entries": []}, r"state must have the keys.*\['entries', 'steps'\]"),
        ("another", "state must come from 0 closed loops and no PerLayer, got 1 and none"),
    ],
)
def test_the_state_of_something_else_is_refused(state, message):
    if state == "another":
        state = assemble(never())[2].state_dict()
    with pytest.raises(ValueError, match=message):
        assemble(mf.Constant(0.1))[2].load_state_dict(state)


# What it logs


def one_group(make=torch.optim.AdamW, schedule=None, parts=None, **options):
    net = torch.nn.Linear(3, 3)
    optimizer = make(parts(net) if parts else net.parameters(), lr=0.2, weight_decay=0.5)
    control = ControlledDecay(net, optimizer, schedule or mf.SwitchOff(0.5, at=3), **options)
    for _ in range(2):
        net(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        control.step()
    return control


def test_one_group_is_logged_by_plain_names():
    control = one_group()
    assert control.logs() == {
        "weight_decay": 0.5,
        "decay_per_step": pytest.approx(0.1),
        "absorbed_decay": pytest.approx(0.2),
        "decay_timescale": pytest.approx(10.0),
    }
    control.scheduler.account.steps = 3
    control.scheduler.step()
    assert control.logs() == {
        "weight_decay": 0.0, "decay_per_step": 0.0, "absorbed_decay": pytest.approx(0.2)
    }  # fmt: skip


def test_groups_are_logged_each_with_its_own_rate_and_the_largest_of_them():
    def groups(net):
        return [
            {"params": [net.weight], "name": "matrix", "lr": 0.2},
            {"params": [net.bias], "name": "vector", "lr": 0.4, "weight_decay": 0.1},
        ]

    logs = one_group(parts=groups, schedule=mf.Constant(2.0), relative=True).logs()
    expected = {"matrix": (1.0, 0.2, 0.4, 5.0), "vector": (0.2, 0.08, 0.16, 12.5)}
    names = ("weight_decay", "decay_per_step", "absorbed_decay", "decay_timescale")
    assert logs == {
        **{f"{n}/{group}": pytest.approx(v)
           for group, row in expected.items() for n, v in zip(names, row, strict=True)},
        **dict(zip(names, map(pytest.approx, (1.0, 0.2, 0.4, 5.0)), strict=True)),
    }  # fmt: skip


def test_sets_within_a_group_are_told_apart_and_those_without_a_schedule_left_out():
    logs = one_group(
        schedule=mf.Constant(0.5), decoupled=True, groups=[("bias", mf.Constant(0.1))]
    ).logs()
    assert logs["weight_decay/0.0"] == 0.1 and logs["weight_decay/0.1"] == 0.5
    control = one_group(
        parts=lambda net: [{"params": [net.weight]}, {"params": [net.bias], "weight_decay": 0.0}]
    )
    assert not [key for key in control.logs() if "/" in key]


@pytest.mark.filterwarnings("ignore::mirrorflow.weightdecay.CoupledDecayWarning")
def test_what_is_not_known_is_not_logged():
    logs = one_group(make=torch.optim.Adam).logs()
    assert logs == {"weight_decay": 0.5}


def test_layers_are_logged_by_their_names():
    net, optimizer, control = assemble(PerLayer(lambda layer: never()))
    logs = train(net, optimizer, control, 0, EVERY)[-1]
    for key in ("ratio", "weight_decay", "decay_per_step", "absorbed_decay", "decay_timescale"):
        assert {f"{key}/blocks.0", f"{key}/blocks.1"} <= set(logs)
    assert logs["absorbed_decay/blocks.0"] == pytest.approx(EVERY * LR * 0.3)
    assert logs["decay_timescale/blocks.1"] == pytest.approx(1 / (LR * 0.3))


def test_the_means_of_all_numbers_are_logged():
    net, optimizer, control = assemble(mf.Constant(0.1))
    logs = train(net, optimizer, control, 0, EVERY)[-1]
    summary = control.measurements[-1][1].summary()
    assert len(summary) == 10
    for name, value in summary.items():
        assert logs[f"spectrum/{name.removeprefix('mean_')}"] == value


# Rows


def test_measurements_are_rows_for_a_csv_file_and_a_frame():
    pandas = pytest.importorskip("pandas")
    net, optimizer, control = assemble(mf.Constant(0.1), level="head")
    train(net, optimizer, control, 0, 2 * EVERY)
    rows = control.rows()
    frame = pandas.DataFrame(rows)
    assert frame[["step", "layer", "head"]].values.tolist() == [
        [step, f"blocks.{i}", head] for step in (2, 4) for i in range(2) for head in range(2)
    ]
    means = frame.groupby("step")["ratio"].mean()
    assert means.tolist() == pytest.approx([m.mean_ratio for _, m in control.measurements])

    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    again = list(csv.DictReader(io.StringIO(file.getvalue())))
    for row, record in zip(again, control.measurements[0][1].records, strict=False):
        for name in ("nuclear", "spectral", "effective_rank", "gap", "imbalance", "scale"):
            assert float(row[name]) == getattr(record, name)
        assert (int(row["n"]), int(row["r"]), int(row["m"])) == record.shape


# What it refuses

LOOP = mf.OffBelow(0.1, 2.0)


@pytest.mark.parametrize(
    ("schedule", "settings", "kind", "message"),
    [
        (0.1, {}, TypeError, r"use Constant\(0.1\)"),
        (mf.Constant(0.1), {"trackevery": 3}, TypeError, "must be track_every.*'trackevery'"),
        (mf.Constant(0.1), {"lr": 3}, TypeError, "relative, groups, decoupled.*got 'lr'"),
        (mf.Constant(0.1), {"level": "heads"}, ValueError, "level must be .*'heads'"),
        (mf.Constant(0.1), {"match": "("}, ValueError, "match must be a regular expression"),
        (mf.Constant(0.1), {"metric": "rank"}, ValueError, "metric must be one of ratio.*'rank'"),
        (mf.Constant(0.1), {"track_every": True}, ValueError, "track_every must be an integer"),
        (mf.Constant(0.1), {"track_every": 2.0}, ValueError, "track_every must be an integer"),
        (mf.Constant(0.1), {"convention": "adam"}, ValueError, "convention must be one of"),
        (mf.Constant(0.1), {"coupling": "loose"}, ValueError, "coupling must be one of"),
        (mf.Constant(0.1), {"groups": [(0, 0.1)]}, TypeError, r"use Constant\(0.1\)"),
        (mf.Constant(0.1), {"groups": [(0, LOOP)]}, ValueError, "positive with OffBelow"),
        (LOOP, {}, ValueError, "track_every must be positive with OffBelow"),
        (mf.Constant(0.1), {"groups": [(0, PerLayer(lambda layer: LOOP))]}, TypeError, "PerLayer"),
    ],
)  # fmt: skip
def test_impossible_settings_are_named_at_once(schedule, settings, kind, message):
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.1)
    with pytest.raises(kind, match=message):
        ControlledDecay(net, optimizer, schedule, **settings)
    assert not optimizer._optimizer_step_pre_hooks


def test_rules_that_can_be_read_once_are_read_once():
    parts = assemble(
        mf.Constant(0.1), decoupled=True, groups=(pair for pair in [("blocks", mf.Constant(0.5))])
    )
    assert set(parts[2].scheduler.get_last_weight_decay()) == {0.5, 0.1}


# In a plain loop


def test_the_plain_loop_of_the_readme():
    net, lines = Net(), []
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.1)
    log = lines.append

    control = ControlledDecay(net, optimizer, mf.SwitchOff(0.1, at=6), track_every=3)
    for step in range(9):
        backward(net, step)
        optimizer.step()
        log(control.step())  # {} between the measurements
    state = {"optimizer": optimizer.state_dict(), "control": control.state_dict()}

    assert [bool(line) for line in lines] == 3 * [False, False, True]
    assert [line["weight_decay"] for line in lines if line] == [0.1, 0.0, 0.0]
    assert all(line["spectrum/ratio"] > 1 for line in lines if line)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["control"]["scheduler"]["steps"] == 9


def test_another_product_of_attention_can_have_a_loop():
    loops = PerLayer(lambda layer: never())
    net, optimizer, control = assemble(loops, values=True, match="value-output")
    logs = train(net, optimizer, control, 0, EVERY)[-1]
    found = {r.label: r.ratio for r in control.measurements[-1][1].records}
    assert list(found) == list(loops.loops) == ["blocks.0 V-O", "blocks.1 V-O"]
    assert all(logs[f"ratio/{name}"] == ratio for name, ratio in found.items())


def test_a_multiple_that_was_passed_is_measured():
    control = assemble(mf.Constant(0.1))[2]
    control.track_every = 5
    state = control.state_dict()
    assert [step for step in (2, 4, 6, 9, 10, 23, 24) if control.advance(step)] == [6, 10, 23]
    control.load_state_dict(state)
    assert [step for step in (51, 54, 55) if control.advance(step)] == [55]
