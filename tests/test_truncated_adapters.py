"""Adapters by rank: what is cut, when, and the verdicts."""

import copy
import statistics

import pytest
import torch
from scipy.stats import t as student

import mirrorflow as mf
import mirrorflow.lab.framework as ex
from mirrorflow.lab.experiments.networks import _truncation_figures as figures
from mirrorflow.lab.experiments.networks import beyond_truncation as truncation
from mirrorflow.lab.experiments.networks._training import go_on, train
from mirrorflow.lab.framework.trunks import Checkpoints

pytest.importorskip("transformers")
pytest.importorskip("peft")
SMOKE = truncation.Config.preset("smoke")


def trained(tmp_path, kind="none", rank=SMOKE.rank, until=None):
    """A session of the smoke preset at a step of its run."""
    store, key = Checkpoints(tmp_path), f"{kind}-rank{rank}-seed0"
    plan = SMOKE.plans()[key]
    line = truncation.timelines(SMOKE)[key]
    return train(lambda: truncation._session(SMOKE, plan, store), line, store, until)


def adapters(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def factors(adapter):
    return adapter.lora_A["default"].weight, adapter.lora_B["default"].weight


def merged(model, rank):
    """A copy whose adapters add the dense truncation of their product to the weight below."""
    dense = copy.deepcopy(model)
    for adapter in adapters(dense):
        A, B = (factor.detach().double() for factor in factors(adapter))
        U, values, Vh = torch.linalg.svd(B @ A)
        best = (U[:, :rank] * values[:rank]) @ Vh[:rank]
        adapter.base_layer.weight.data += (adapter.scaling["default"] * best.T).float()  # Conv1D
        adapter.lora_B["default"].weight.data.zero_()
    return dense


@pytest.mark.parametrize("rank", SMOKE.ranks)
def test_a_cut_is_the_dense_one_and_leaves_the_model_as_it_was(rank, tmp_path):
    session = trained(tmp_path, "constant")
    for adapter in adapters(session.model):  # larger than in ten steps, so that a cut is seen
        adapter.lora_B["default"].weight.data.mul_(30)
    whole = session.evaluate()["loss"]
    loss = truncation._cut(session, rank)
    assert session.evaluate()["loss"] == whole != loss
    session.model.load_state_dict(merged(session.model, rank).state_dict())
    assert loss == pytest.approx(session.evaluate()["loss"], rel=1e-5)


def test_what_is_cut_on_the_way_goes_on_from_there_and_keeps_its_rank(tmp_path):
    session = trained(tmp_path / "one", until=SMOKE.off)
    left = SMOKE.steps - SMOKE.off
    loss = truncation._cut(session, 1, SMOKE.off)
    mf.truncate(session.model, rank=1)
    truncated = session.evaluate()["loss"]
    go_on(session.model, lambda later: session.loss(SMOKE.off + later), SMOKE.lrs()[-left:])
    assert session.evaluate()["loss"] == pytest.approx(loss, rel=1e-6) != truncated
    for adapter in adapters(session.model):
        A, B = factors(adapter)
        assert A[0].any() and B[:, 0].any() and not A[1:].any() and not B[:, 1:].any()


def test_every_rank_has_the_same_scale(tmp_path):
    for rank in (SMOKE.rank, *SMOKE.ranks):
        model = trained(tmp_path, rank=rank, until=0).model
        for adapter in adapters(model):
            assert adapter.scaling["default"] == SMOKE.scaling / SMOKE.rank
            assert factors(adapter)[0].shape[0] == rank


def test_all_ways_to_a_rank_are_stored(smoke):
    _, _, result, curves = smoke(truncation.NAME)
    records = result["records"]
    found = {(r["way"], r["kind"], r["rank"]) for r in records if r["seed"] == 0}
    lower = {(way, kind, rank) for way, kind in figures.WAYS for rank in SMOKE.ranks}
    assert found == lower | {("whole", kind, SMOKE.rank) for kind in figures.DECAYS}
    assert len(records) == len(found) * len(SMOKE.seeds)
    for record in records:
        absorbed = 0.0 if record["kind"] == "none" else SMOKE.absorbed
        assert record["a"] == pytest.approx(absorbed, rel=1e-9)
        if record["way"] == "whole":
            key = f"{record['kind']}-rank{record['rank']}-seed{record['seed']}"
            assert record["loss"] == curves[f"{key}/loss"][-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"off": 10}, "off must lie within the 10 steps, got 10"),
        ({"ranks": (3,)}, r"ranks must lie in 1 to 2, got \[3\]"),
        ({"ranks": (0,)}, "ranks must lie in 1 to 2"),
        ({"absorbed": 0.5}, "absorbed"),
    ],
)
def test_what_cannot_be_cut_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        ex.config_from(truncation, "smoke", None, change)


def made():
    """Records of a rank of 4 that is cut to 2, by way and decay."""
    losses = {
        ("whole", "none", 4): [2.0, 2.1, 2.2], ("whole", "constant", 4): [2.3, 2.3, 2.3],
        ("whole", "off", 4): [2.2, 2.2, 2.2], ("from the start", "none", 2): [2.1, 2.2, 2.3],
        ("on the way", "none", 2): [2.05, 2.14, 2.26], ("at the end", "none", 2): [2.5, 2.7, 2.9],
        ("at the end", "constant", 2): [2.4, 2.4, 2.4], ("at the end", "off", 2): [2.3, 2.3, 2.3],
    }  # fmt: skip
    return losses, [
        {"way": way, "kind": kind, "rank": rank, "seed": seed, "loss": loss}
        for (way, kind, rank), found in losses.items()
        for seed, loss in enumerate(found)
    ]


def test_ways_are_compared_within_a_seed():
    losses, records = made()
    told = " ".join(map(" ".join, figures.verdicts(records)))
    direct = losses["from the start", "none", 2]
    gaps = {
        way: [a - b for a, b in zip(losses[*way, 2], direct, strict=True)] for way in figures.WAYS
    }
    rows = {row["adapter"]: row for row in figures.rows(records)}
    for way, name in figures.WAYS.items():
        if way[0] == "from the start":
            assert rows[name]["above this rank from the start"] is None
            continue
        mean = statistics.fmean(gaps[way])
        half = student.ppf(0.975, 2) * statistics.stdev(gaps[way]) / 3**0.5
        assert rows[name]["above this rank from the start"] == pytest.approx(mean)
        assert rows[name]["gap ± 95%"] == pytest.approx(half)
        assert f"{mean:+.2g} ± {half:.1g} {name}" in told
    assert "; truncated on the way" in told
    assert "Rank 4, not truncated, ends at a validation loss of 2.1 ± 0.2 with no decay" in told
