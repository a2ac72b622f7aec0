"""Lightning: a small real model is trained, stopped, resumed, and compared with no stop."""

import warnings

import pytest
import torch

import mirrorflow as mf
from mirrorflow.weightdecay import PerLayer, WeightDecayLR, WeightDecayScheduler
from optimizers import assert_nets_near

lightning = pytest.importorskip("lightning.pytorch")

from mirrorflow.integrations.lightning import DecayCallback  # noqa: E402

STEPS, STOP, OFF, LR = 12, 7, 5, 0.01


class Net(lightning.LightningModule):
    def __init__(self, schedule=None, decay=0.3, optimizers=1):
        super().__init__()
        torch.manual_seed(0)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = torch.nn.Linear(8, 1)
        self.schedule, self.decay, self.count = schedule, decay, optimizers
        self.automatic_optimization = optimizers == 1

    def training_step(self, batch, index):
        # By the step: Lightning begins the loader anew where a run resumes within an epoch.
        seeded = torch.Generator().manual_seed(self.global_step)
        batch = torch.randn(4, 3, 8, generator=seeded)
        loss = (self.head(self.attention(batch, batch, batch)[0]) - 1).square().mean()
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def configure_optimizers(self):
        if self.count == 2:
            parts = (self.attention, self.head)
            return [torch.optim.AdamW(p.parameters(), lr=LR, weight_decay=0.3) for p in parts]
        optimizer = torch.optim.AdamW(self.parameters(), lr=LR, weight_decay=self.decay)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
        schedulers = [cosine]
        if self.schedule is not None:
            self.scheduler = WeightDecayScheduler(optimizer, self.schedule)
            schedulers.append(WeightDecayLR(self.scheduler))
        return [optimizer], [{"scheduler": s, "interval": "step"} for s in schedulers]


class Numbers(lightning.loggers.logger.DummyLogger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        if "weight_decay" in metrics:
            self.rows.append((step, metrics))


def fit(net, callbacks=(), steps=STEPS, resume=None, logger=False, said=None, **options):
    batches = torch.zeros(40, 1)
    with warnings.catch_warnings(record=said is not None) as warned:
        # Of Lightning and torch themselves there are many.
        warnings.simplefilter("ignore" if said is None else "always")
        warnings.filterwarnings("error", module="mirrorflow")
        trainer = lightning.Trainer(
            max_steps=steps, callbacks=list(callbacks), logger=logger, accelerator="cpu",
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            log_every_n_steps=4, **options,
        )  # fmt: skip
        trainer.fit(net, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=resume)
    if said is not None:
        said += [str(warning.message) for warning in warned]
    return trainer


def equal(ours, theirs):
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def hold():
    return PerLayer(lambda layer: mf.HoldRatio(1.5, 0.3, gain=0.8, deadband=0.0))


@pytest.mark.parametrize("make", [lambda: mf.SwitchOff(0.5, at=OFF), hold])
def test_a_stopped_run_continues_bit_for_bit(tmp_path, make):
    whole, control = Net(), DecayCallback(make(), track_every=2)
    fit(whole, [control])
    path = tmp_path / "stopped.ckpt"
    fit(Net(), [DecayCallback(make(), track_every=2)], steps=STOP).save_checkpoint(path)
    again, resumed = Net(), DecayCallback(make(), track_every=2)
    fit(again, [resumed], resume=path)
    assert equal(again, whole) and resumed.scheduler.steps == STEPS
    assert resumed.scheduler.audit() == control.scheduler.audit()
    assert getattr(resumed.schedule, "log", 0) == getattr(control.schedule, "log", 0)
    later = [(step, m.mean_ratio) for step, m in control.measurements if step > STOP]
    assert later == [(step, m.mean_ratio) for step, m in resumed.measurements]


def test_the_decay_is_that_of_the_schedule_and_is_logged():
    logger, control = Numbers(), DecayCallback(mf.SwitchOff(0.5, at=OFF), track_every=6)
    fit(Net(), [control], logger=logger)
    rows = [(r["start"], r["stop"], r["decay"]) for r in control.scheduler.audit()]
    assert rows == [(0, OFF, 0.5), (OFF, STEPS, 0.0)]
    logged = dict(logger.rows)
    assert list(logged) == [0, 4, 6, 8, 12] and len(logger.rows) == 5
    assert [logged[step]["weight_decay"] for step in logged] == [0.5, 0.5, 0.0, 0.0, 0.0]
    assert logged[12]["absorbed_decay"] == -control.scheduler.accumulated[0]
    assert [step for step in logged if "spectrum/ratio" in logged[step]] == [0, 6, 12]


def test_accumulated_batches_are_one_step():
    logger, control = Numbers(), DecayCallback(mf.Constant(0.5), track_every=2)
    fit(Net(), [control], steps=4, accumulate_grad_batches=3, logger=logger)
    assert control.scheduler.steps == 4
    assert [step for step, _ in control.measurements] == [0, 2, 4]
    assert [step for step, _ in logger.rows] == [0, 2, 4]


def test_several_optimizers_by_a_callback_each():
    controls = [DecayCallback(mf.SwitchOff(0.5, at=2), optimizer=0),
                DecayCallback(mf.Constant(0.2), optimizer=1)]  # fmt: skip
    trainer = fit(Net(optimizers=2), controls, steps=8)
    assert [c.scheduler.accumulated for c in controls] == [
        [pytest.approx(-LR * 0.5 * 2)], [pytest.approx(-LR * 0.2 * 4)]
    ]  # fmt: skip
    assert len({c.state_key for c in controls}) == 2 and len(trainer.optimizers) == 2
    with pytest.raises(ValueError, match=r"one of the module.s 1 optimizers"):
        fit(Net(), controls[1:])


def test_beside_a_learning_rate_scheduler_as_one(tmp_path):
    """Without the callback: in the shape that Lightning takes from configure_optimizers."""
    whole = Net(mf.SwitchOff(0.5, at=OFF))
    fit(whole)
    path = tmp_path / "stopped.ckpt"
    fit(Net(mf.SwitchOff(0.5, at=OFF)), steps=STOP).save_checkpoint(path)
    again = Net(mf.SwitchOff(0.5, at=OFF))
    fit(again, resume=path)
    assert equal(again, whole)
    assert again.scheduler.audit() == whole.scheduler.audit()
    controlled = Net()
    fit(controlled, [DecayCallback(mf.SwitchOff(0.5, at=OFF))])
    assert_nets_near(controlled, whole)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="track_every must be positive with HoldRatio"):
        DecayCallback(mf.HoldRatio(1.5, 0.3, gain=0.8))
    with pytest.raises(ValueError, match="nothing to schedule"):
        fit(Net(decay=0.0), [DecayCallback(mf.Constant(0.5))])
