"""The Trainer, run after run: fresh loops, late starts, damaged files, and settings."""

import json
import shutil
import types
import warnings

import pytest
import torch

import mirrorflow as mf

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from mirrorflow.integrations.huggingface import control_decay  # noqa: E402
from mirrorflow.weightdecay import PerLayer  # noqa: E402
from test_huggingface import OFF, STEPS, STOP, Tokens, _StopAt, model, train, trainer  # noqa: E402

LR = 1e-2


def again_and_again(folder, **changes):
    """A trainer that makes a new model for each run, as searches do."""
    args = trainer(folder, **changes).args
    return transformers.Trainer(args=args, model_init=model, train_dataset=Tokens())


# Fresh loops


LOOPS = {
    "budget": lambda: mf.OffAtBudget(0.5, budget=4 * LR * 0.5),
    "level": lambda: mf.OffWhenLevel(0.5, window=2, tol=0.9),
    "hold": lambda: mf.HoldRatio(2.0, 0.3, gain=0.5, deadband=0.0),
    "layers": lambda: PerLayer(lambda layer: mf.HoldRatio(1.5, 0.3, gain=0.5)),
}


@pytest.mark.parametrize(
    ("kind", "place"),
    [("budget", "schedule"), ("level", "schedule"), ("layers", "schedule"), ("budget", "groups"),
     ("hold", "groups")],
)  # fmt: skip
@pytest.mark.sample(1)
def test_a_second_run_is_as_the_first(tmp_path, kind, place):
    given = LOOPS[kind]()
    rules = {"schedule": given} if place == "schedule" else {"groups": [(0, given)]}
    made = again_and_again(tmp_path)
    control = control_decay(made, **rules, track_every=2)
    found = []
    for _ in range(2):
        weights = train(made)
        state = control._loop.state_dict()
        found.append((weights, control.scheduler.accumulated, state["loops"], state["layers"]))
    assert all(torch.equal(found[1][0][key], value) for key, value in found[0][0].items())
    assert found[0][1:] == found[1][1:]
    assert min(found[0][1]) < 0 and control.scheduler.steps == STEPS
    assert given.log == []  # the user's own is not used up
    if place == "schedule":
        assert control.schedule is not given and control.schedule.log != []


def test_without_a_run_the_schedule_is_the_users(tmp_path):
    loop = mf.OffAtBudget(0.5, budget=1.0)
    control = control_decay(trainer(tmp_path), loop)
    assert control.schedule is loop and control.rows() == [] == control.measurements


def test_a_loop_in_groups_is_fed_and_resumes(tmp_path):
    def rules():
        return {"groups": [(0, mf.HoldRatio(1.6, 0.3, gain=0.5, deadband=0.0))], "track_every": 2}

    whole = trainer(tmp_path / "whole")
    control = control_decay(whole, **rules())
    expected = train(whole)
    first = trainer(tmp_path / "parts")
    control_decay(first, **rules())
    first.add_callback(_StopAt(STOP))
    train(first)
    second = trainer(tmp_path / "parts")
    resumed = control_decay(second, **rules())
    found = train(second, resume=str(tmp_path / "parts" / f"checkpoint-{STOP}"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert resumed._loop.state_dict() == control._loop.state_dict()
    (loop,) = control._loop.state_dict()["loops"]
    assert [row["step"] for row in loop["log"]] == list(range(0, STEPS + 1, 2))
    assert len({row["rate"] for row in loop["log"]}) > 3


# Late starts


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.sample(1)
def test_a_run_that_was_begun_without_mirrorflow(tmp_path, optim):
    """The schedule goes on from the run's step, not from 0, and says so."""
    first = trainer(tmp_path, optim=optim)
    first.add_callback(_StopAt(STOP))
    train(first)
    second = trainer(tmp_path, optim=optim)
    control = control_decay(second, mf.SwitchOff(0.5, at=STOP + 2), track_every=4)
    with pytest.warns(UserWarning, match=f"resumes at step {STOP} without a saved state"):
        second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    rows = [(r["start"], r["stop"], r["decay"]) for r in control.scheduler.audit()
            if r["group"] == "0"]  # fmt: skip
    assert rows == [(STOP, STOP + 2, 0.5), (STOP + 2, STEPS, 0.0)]
    assert control.scheduler.accumulated[0] == pytest.approx(-LR * 0.5 * 2)
    assert [step for step, _ in control.measurements] == [8, 12]

    third = trainer(tmp_path, optim=optim, max_steps=STEPS + 2)  # and from its own checkpoint
    resumed = control_decay(third, mf.SwitchOff(0.5, at=STOP + 2))
    train(third, resume=str(tmp_path / f"checkpoint-{STEPS}"))
    assert resumed.scheduler.steps == STEPS + 2
    assert resumed.scheduler.accumulated == control.scheduler.accumulated


# Damaged files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    made = trainer(folder)
    control_decay(made, mf.SwitchOff(0.5, at=OFF))
    made.add_callback(_StopAt(STOP))
    train(made)
    return folder


@pytest.fixture
def saved(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    return tmp_path / f"checkpoint-{STOP}" / "mirrorflow.json"


def resume(saved):
    made = trainer(saved.parents[1])
    control = control_decay(made, mf.SwitchOff(0.5, at=OFF))
    train(made, resume=str(saved.parent))
    return control


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:40], "JSONDecodeError"),
        (lambda text: "", "JSONDecodeError"),
        (lambda text: "[1, 2]", "state must have the keys scheduler, layers and loops"),
        (lambda text: '{"feedback": null}', "state must have the keys scheduler, layers and loops"),
        (lambda text: text.replace('"taken"', '"token"'), "ledger 0 of the state must"),
        (lambda text: json.dumps(json.loads(text) | {"scheduler": None}), "NoneType"),
        (lambda text: json.dumps(json.loads(text) | {"loops": [{}]}), "closed loops"),
    ],
)
@pytest.mark.sample(2)
def test_a_damaged_file_is_named(saved, damage, said):
    text = saved.read_text()
    assert json.loads(text)["scheduler"]["steps"] == STOP
    saved.write_text(damage(text))
    with pytest.raises(ValueError) as error:
        resume(saved)
    assert str(saved) in str(error.value) and said in str(error.value)


def test_without_the_damaged_file_the_run_goes_on(saved):
    saved.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"mirrorflow.json cannot be used: Unicode.*remove it"):
        resume(saved)
    saved.unlink()
    assert resume(saved).scheduler.accumulated[0] == pytest.approx(-LR * 0.5 * OFF)


# A search


def test_a_trial_keeps_its_state_in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    made = again_and_again(tmp_path)
    control_decay(made, mf.SwitchOff(0.5, at=OFF))
    made.hp_search_backend = transformers.trainer_utils.HPSearchBackend.OPTUNA
    made.hp_space = lambda trial: {}
    trial = types.SimpleNamespace(number=3, params={})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.train(trial=trial)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("mirrorflow.json"))
    assert found == [f"run-3/checkpoint-{step}/mirrorflow.json" for step in (STEPS, STOP)]


# Settings


@pytest.mark.parametrize(
    ("rules", "kind", "message"),
    [
        ({"schedule": 0.1}, TypeError, r"use Constant\(0.1\)"),
        ({"schedule": mf.Constant(0.1), "trackevery": 3}, TypeError, "got 'trackevery'"),
        ({"schedule": mf.Constant(0.1), "level": "heads"}, ValueError, "level must be .*'heads'"),
        ({"schedule": mf.Constant(0.1), "metric": "loss"}, ValueError, "metric must be one of"),
        (
            {"groups": [(0, mf.OffBelow(0.1, 2.0))]},
            ValueError,
            "track_every must be positive with OffBelow",
        ),
        ({}, ValueError, "a schedule is missing"),
        ({"schedule_for": mf.Constant(0.1)}, TypeError, "schedule_for must be a function"),
        (
            {"schedule": mf.Constant(0.1), "schedule_for": mf.Constant},
            ValueError,
            "must not both be given",
        ),
    ],
)
def test_impossible_settings_are_named_at_once(tmp_path, rules, kind, message):
    made = trainer(tmp_path)
    before = len(made.callback_handler.callbacks)
    with pytest.raises(kind, match=message):
        control_decay(made, **rules)
    assert len(made.callback_handler.callbacks) == before


@pytest.mark.parametrize(
    ("length", "total"), [({"steps": STEPS}, STEPS), ({"steps": -1, "num_train_epochs": 2}, 32)]
)
@pytest.mark.sample(1)
def test_a_schedule_for_the_length_of_the_run(tmp_path, length, total):
    made = trainer(tmp_path, **length)
    control = control_decay(made, schedule_for=lambda total: mf.SwitchOff(0.5, at=0.5 * total))
    train(made)
    assert control.schedule == mf.SwitchOff(0.5, at=total / 2)
    rows = [(r["stop"], r["decay"]) for r in control.scheduler.audit() if r["group"] == "0"]
    assert rows == [(total // 2, 0.5), (total, 0.0)]


def test_what_schedule_for_makes_is_checked(tmp_path):
    for make, kind, message in [
        (lambda total: 0.5, TypeError, r"use Constant\(0.5\)"),
        (lambda total: mf.OffBelow(0.5, 2.0), ValueError, "track_every must be positive"),
    ]:
        made = trainer(tmp_path)
        control_decay(made, schedule_for=make)
        with pytest.raises(kind, match=message):
            train(made)


def test_numbers_in_the_logs_and_rows(tmp_path):
    made = trainer(tmp_path)
    control = control_decay(
        made,
        mf.OffBelow(0.5, -1.0, lowest=-1.0),
        track_every=6,
        metric=lambda found: found.records[0].nuclear,
    )
    train(made)
    logged = {row["step"]: row for row in made.state.log_history if "weight_decay" in row}
    assert list(logged) == [0, 2, 4, 6, 8, 10, 12]
    assert logged[8]["decay_per_step"] == pytest.approx(LR * 0.5)
    assert logged[8]["decay_timescale"] == pytest.approx(1 / (LR * 0.5))
    assert [step for step in logged if "spectrum/nuclear" in logged[step]] == [0, 6, 12]
    first = [row["nuclear"] for row in control.rows() if row["layer"] == control.rows()[0]["layer"]]
    assert [row["value"] for row in control.schedule.log] == first
    assert [logged[step]["spectrum/metric"] for step in (0, 6, 12)] == first
    own = {key for row in made.state.log_history if "loss" in row for key in row}
    assert own & set(logged[2]) == {"step", "epoch"}


@pytest.mark.parametrize("every", [0, 5])
@pytest.mark.sample(1)
def test_what_is_logged_by_epoch(tmp_path, every):
    made = trainer(
        tmp_path, steps=-1, num_train_epochs=2, logging_strategy="epoch", save_strategy="no"
    )
    control_decay(made, mf.SwitchOff(0.5, at=20), track_every=every)
    train(made)
    decays = [(r["step"], r["weight_decay"]) for r in made.state.log_history if "weight_decay" in r]
    steps = sorted({16, 32, *range(0, 33, 5)} if every else {16, 32})
    assert decays == [(step, 0.5 if step < 20 else 0.0) for step in steps]
    assert [r["step"] for r in made.state.log_history if "loss" in r] == [16, 32]


def test_metrics_that_a_subclass_averages_between_its_logs_are_its_own(tmp_path):
    """As TRL's trainers do: their log method adds the means since the last call, and resets."""

    class Averaging(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            self.seen.append(self.state.global_step)
            return super().compute_loss(*args, **kwargs)

        def log(self, logs, *args):
            logs["mean"] = sum(self.seen) / max(1, len(self.seen))
            super().log(logs, *args)
            self.seen.clear()

    def means(controlled):
        given = trainer(tmp_path / str(controlled), logging_steps=4)
        made = Averaging(model(), given.args, train_dataset=Tokens())
        made.seen = []
        if controlled:
            control_decay(made, mf.Constant(0.3), track_every=3)
        train(made)
        return [(r["step"], r["mean"]) for r in made.state.log_history if "mean" in r]

    assert means(True) == means(False) == [(4, 1.5), (8, 5.5), (12, 9.5), (12, 0.0)]


def test_a_refusal_is_not_taken_for_damage(saved):
    made = trainer(saved.parents[1])
    control_decay(made, mf.SwitchOff(0.5, at=OFF + 2), on_change="error")
    with pytest.raises(
        ValueError, match=r'SwitchOff.*refused because of on_change="error"'
    ) as error:
        train(made, resume=str(saved.parent))
    assert str(saved) in str(error.value) and "damaged" not in str(error.value)


def test_what_is_tracked_can_be_named(tmp_path):
    made = trainer(tmp_path)
    mlp = [f"transformer.h.0.mlp.{name}.weight" for name in ("c_fc", "c_proj")]
    control = control_decay(
        made, mf.Constant(0.5), track_every=6, pairs={"mlp": tuple(mlp)}, values=True, match="h.0"
    )
    train(made)
    rows = control.rows()[-3:]
    assert [row["kind"] for row in rows] == ["attention", "value-output", "named"]
    first, second = (made.model.get_parameter(name).detach().double() for name in mlp)
    dense = torch.linalg.svdvals(first @ second).sum().item()
    assert rows[2]["layer"] == "mlp" and rows[2]["nuclear"] == pytest.approx(dense, rel=1e-6)


def test_frozen_products_are_tracked_on_request(tmp_path):
    made = trainer(tmp_path, lora=True)
    control = control_decay(made, mf.Constant(0.5), track_every=6, frozen=True, match="attention")
    train(made)
    assert [row["kind"] for row in control.rows()] == 3 * 2 * ["attention"]
