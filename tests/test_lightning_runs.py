"""Lightning, run after run: fresh loops, late starts, the length of a run, and names in logs."""

import warnings

import pytest
import torch

import mirrorflow as mf
from mirrorflow.weightdecay import PerLayer

lightning = pytest.importorskip("lightning.pytorch")

from mirrorflow.integrations.lightning import DecayCallback  # noqa: E402
from test_lightning import LR, OFF, STEPS, STOP, Net, Numbers, equal, fit  # noqa: E402


@pytest.mark.parametrize("make", [
    lambda: mf.OffAtBudget(0.5, budget=4 * LR * 0.5),
    lambda: mf.OffBelow(0.5, target=100.0),
    lambda: PerLayer(lambda layer: mf.HoldRatio(1.5, 0.3, gain=0.8, deadband=0.0)),
])  # fmt: skip
def test_a_second_fit_is_as_the_first(make):
    given = make()
    control, found = DecayCallback(given, track_every=2), []
    for _ in range(2):
        fit(net := Net(), [control])
        found.append((net, control.scheduler.accumulated, control.schedule.log))
    assert equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]
    assert given.log == [] != found[0][2]


def test_a_loop_in_groups_is_fed():
    loop = mf.HoldRatio(1.5, 0.3, gain=0.8, deadband=0.0)
    control = DecayCallback(groups=[(0, loop)], track_every=2)
    fit(Net(), [control])
    (state,) = control.state_dict()["loops"]
    measured = [(step, found.mean_ratio) for step, found in control.measurements]
    assert [(row["step"], row["value"]) for row in state["log"]] == measured
    assert len({row["rate"] for row in state["log"]}) > 3


@pytest.mark.parametrize("optimizers", [1, 2])
def test_a_run_that_was_begun_without_mirrorflow(tmp_path, optimizers):
    path = tmp_path / "stopped.ckpt"
    steps = STEPS * optimizers  # Lightning counts those of all optimizers
    fit(Net(optimizers=optimizers), steps=STOP * optimizers).save_checkpoint(path)
    control = DecayCallback(mf.SwitchOff(0.5, at=STOP + 2))
    said = "resumes at step 7 without" if optimizers == 1 else "which counts the steps of all"
    again = Net(optimizers=optimizers)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer = lightning.Trainer(
            max_steps=steps, callbacks=[control], logger=False, accelerator="cpu",
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        batches = torch.utils.data.DataLoader(torch.zeros(40, 1), batch_size=None)
        trainer.fit(again, batches, ckpt_path=path)
    assert any(said in str(warning.message) for warning in warned)
    rows = [(r["start"], r["stop"], r["decay"]) for r in control.scheduler.audit()]
    late = [(STOP, STOP + 2, 0.5), (STOP + 2, STEPS, 0.0)]
    assert rows == (late if optimizers == 1 else [(0, STEPS - STOP, 0.5)])


@pytest.mark.parametrize("length", [{"steps": STEPS}, {"steps": -1, "max_epochs": 1}])
def test_a_schedule_for_the_length_of_the_run(length):
    control = DecayCallback(schedule_for=lambda total: mf.SwitchOff(0.5, at=0.5 * total))
    trainer = fit(Net(), [control], **length)
    total = trainer.global_step
    assert total == (STEPS if length["steps"] > 0 else 40)
    assert control.schedule == mf.SwitchOff(0.5, at=total / 2)
    assert [row["stop"] for row in control.scheduler.audit()] == [total // 2, total]


def test_a_run_without_an_end_has_no_length():
    control = DecayCallback(schedule_for=lambda total: mf.SwitchOff(0.5, at=0.5 * total))
    with pytest.raises(ValueError, match="the end of this run is unknown"):
        fit(Net(), [control], steps=-1, max_epochs=-1, limit_train_batches=3)


@pytest.mark.parametrize(
    "length", [{"steps": 5}, {"steps": -1, "max_epochs": 1, "limit_train_batches": 5}]
)
def test_an_interval_that_is_longer_than_the_run_is_said(length):
    said = []
    control = DecayCallback(mf.OffBelow(0.5, target=1.0), track_every=6)
    fit(Net(), [control], said=said, **length)
    assert [text for text in said if "track_every=6 exceeds the run's 5 steps" in text]
    said.clear()
    fit(
        Net(),
        [control],
        said=said,
        **length | {"limit_train_batches": 6, "steps": -1, "max_epochs": 1},
    )
    fit(Net(optimizers=2), [control], said=said, **length | {"steps": -1, "max_epochs": 1})
    assert not [text for text in said if "track_every" in text]  # steps made by hand: unknown


def test_the_names_are_not_those_of_the_learning_rate_monitor():
    class Every(Numbers):
        def log_metrics(self, metrics, step=None):
            self.rows.append((step, dict(metrics)))

    logger = Every()
    monitor = lightning.callbacks.LearningRateMonitor(log_momentum=True, log_weight_decay=True)
    control = DecayCallback(mf.SwitchOff(0.5, at=OFF), track_every=6)
    fit(Net(), [control, monitor], logger=logger)
    ours = {key for _, row in logger.rows if "weight_decay" in row for key in row}
    theirs = {key for _, row in logger.rows if "weight_decay" not in row for key in row}
    assert {"decay_per_step", "decay_timescale", "absorbed_decay", "spectrum/ratio"} <= ours
    assert "lr-AdamW-weight_decay" in theirs and not ours & theirs


def test_rows_and_the_metric():
    never = mf.OffBelow(0.5, -1.0, lowest=-1.0)
    control = DecayCallback(never, track_every=4, metric="nuclear", level="head")
    assert control.rows() == []
    fit(Net(), [control])
    rows = control.rows()
    assert [(row["step"], row["head"]) for row in rows] == [
        (step, head) for step in (0, 4, 8, 12) for head in (0, 1)
    ]
    for row, first, second in zip(control.schedule.log, rows[::2], rows[1::2], strict=True):
        assert row["value"] == pytest.approx((first["nuclear"] + second["nuclear"]) / 2)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"schedule": 0.1}, TypeError, r"use Constant\(0.1\)"),
        ({"schedule": mf.Constant(0.1), "trackevery": 3}, TypeError, "got 'trackevery'"),
        ({"schedule": mf.Constant(0.1), "level": "heads"}, ValueError, "level must be .*'heads'"),
        ({}, ValueError, "a schedule is missing"),
    ],
)
def test_impossible_settings_are_named_at_once(settings, kind, message):
    with pytest.raises(kind, match=message):
        DecayCallback(**settings)


def test_several_optimizers_are_logged_by_their_own_names_and_steps():
    class Every(Numbers):
        def log_metrics(self, metrics, step=None):
            self.rows += [(step, name) for name in metrics if name.endswith("/weight_decay")]

    callbacks = [
        DecayCallback(mf.SwitchOff(0.5, at=OFF), track_every=6),
        DecayCallback(mf.Constant(0.1), optimizer=1),
    ]
    logger = Every()
    fit(Net(optimizers=2), callbacks, steps=2 * STEPS, logger=logger)
    first = [step for step, name in logger.rows if name == "optimizer0/weight_decay"]
    second = [step for step, name in logger.rows if name == "optimizer1/weight_decay"]
    assert first == [0, 4, 6, 8, 12] and second == [4, 8, 12]


def test_several_steps_in_a_batch_are_measured_when_they_have_passed_a_multiple():
    class Thrice(Net):
        def training_step(self, batch, index):
            for _ in range(3):
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                    self.manual_backward(self.head(torch.ones(1, 8)).square().mean())
                    optimizer.step()

    control = DecayCallback(mf.Constant(0.5), track_every=4, optimizer=1)
    logger = Numbers()
    logger.log_metrics = lambda metrics, step: logger.rows.extend((step, name) for name in metrics)
    fit(Thrice(optimizers=2), [control, DecayCallback(mf.Constant(0.1))], steps=24, logger=logger)
    assert [step for step, _ in control.measurements] == [0, 6, 9, 12]
    logged = [step for step, name in logger.rows if name == "optimizer0/weight_decay"]
    assert logged == [6, 9, 12]


@pytest.mark.parametrize("index", [1, -1, "first"])
def test_an_optimizer_that_does_not_exist_is_named(index):
    with pytest.raises(ValueError, match=rf"one of the module.s 1 optimizers, got {index}"):
        fit(Net(), [DecayCallback(mf.Constant(0.1), optimizer=index)])


def test_pairs_can_be_named():
    pairs = {"out": ("head.weight", "attention.out_proj.weight")}
    control = DecayCallback(mf.Constant(0.1), track_every=6, pairs=pairs, match="out")
    fit(Net(), [control])
    assert [row["layer"] for row in control.rows()] == 3 * ["out"]


class Batches(lightning.LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(40, 1), batch_size=None)


def test_lightning_cli_makes_the_schedule(monkeypatch):
    """By its arguments alone, as docs/frameworks.md has it."""
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    decay = ("track_every=5", "schedule=mirrorflow.SwitchOff", "schedule.rate=0.5", "schedule.at=6")
    monkeypatch.setattr("sys.argv", [
        "main.py", "fit", f"--trainer.max_steps={STEPS}", "--trainer.accelerator=cpu",
        *(f"--trainer.{setting}=false" for setting in off),
        "--trainer.callbacks+=mirrorflow.integrations.lightning.DecayCallback",
        *(f"--trainer.callbacks.{argument}" for argument in decay),
    ])  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning and torch themselves
        warnings.filterwarnings("error", module="mirrorflow")
        cli = LightningCLI(Net, Batches, save_config_callback=None, seed_everything_default=False)
    (control,) = (c for c in cli.trainer.callbacks if isinstance(c, DecayCallback))
    rows = [(row["start"], row["stop"], row["decay"]) for row in control.scheduler.audit()]
    assert rows == [(0, 6, 0.5), (6, STEPS, 0.0)] and len(control.measurements) >= 2
