"""Fine-tuning under a restarted learning rate: its steps, its control, what is shared."""

import warnings

import numpy as np
import pytest
import torch

from mirrorflow.lab.experiments.networks import fig15_fig16_lr_schedule as fig15
from mirrorflow.lab.experiments.networks._training import train
from mirrorflow.lab.framework.trunks import Checkpoints, steps_saved


@pytest.fixture(scope="module")
def smoke():
    return fig15.Config.preset("smoke")


@pytest.mark.parametrize("optimizer", fig15.OPTIMIZERS)
def test_the_restarts_are_those_of_torch(optimizer):
    config = fig15.Config(steps=50, restart=20)
    peak = config.lr if optimizer == "adamw" else config.sgd_lr
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(inner, T_0=20)
    found = []
    for _ in range(50):
        found.append(inner.param_groups[0]["lr"])
        inner.step()
        scheduler.step()
    np.testing.assert_allclose(config.lrs(optimizer, "restarts"), found, rtol=1e-12)
    assert set(config.lrs(optimizer, "constant")) == {peak}


@pytest.mark.parametrize("optimizer", fig15.OPTIMIZERS)
def test_the_control_decays_as_at_a_constant_learning_rate(optimizer, smoke, tmp_path):
    """Each step shrinks by lr x decay of the constant run; L2 in momentum counts as it ends up."""
    store, ends = Checkpoints(tmp_path), {}
    for rate in fig15.RATES:
        plan = next(p for p in smoke.plans().values() if (p.optimizer, p.rate) == (optimizer, rate))
        session = train(
            lambda p=plan: fig15._session(smoke, p, store),
            fig15.timelines(smoke)[plan.key],
            store,
        )
        ends[rate] = -min(session.decay.accumulated)
        pending = -min(session.decay.pending) if optimizer == "sgd" else 0.0
        ends[rate] += pending
    assert ends["held"] == pytest.approx(ends["constant"], rel=1e-6)
    assert ends["restarts"] < 0.8 * ends["constant"]


def test_the_pretraining_is_shared_by_all_runs_of_a_seed(smoke, tmp_path):
    store = Checkpoints(tmp_path)
    name = f"{fig15.PRETRAINING}-seed0"
    fig15.advance(smoke, name, smoke.pretraining, store)
    assert store.has(fig15.timelines(smoke)[name], smoke.pretraining)
    starts = [
        train(
            lambda p=plan: fig15._session(smoke, p, store), fig15.timelines(smoke)[plan.key],
            Checkpoints(tmp_path / plan.key), until=0,
        ).curves["ratio"][0]
        for plan in list(smoke.plans().values())[:3]
    ]  # fmt: skip
    assert len(set(starts)) == 1
    lines = fig15.timelines(smoke)
    assert steps_saved({**lines, "again": lines[name]})[1] == sum(x.steps for x in lines.values())


def test_lists_of_decays_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="the same length"):
        fig15.Config(decays=(1.0, 2.0, 3.0), sgd_decays=(1.0, 2.0))


def test_no_run_warns(smoke, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig15.advance(smoke, "sgd-held-0.01-seed0", 3, Checkpoints(tmp_path))
