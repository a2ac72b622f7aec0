"""Ranks cut after training under decay: the cuts, the comparisons, and the verdicts."""

import copy
import statistics

import pytest
import torch
from scipy.stats import t as student

import mirrorflow.lab.framework as ex
from mirrorflow.lab.experiments.networks import _compression_figures as figures
from mirrorflow.lab.experiments.networks import beyond_compression as compression
from mirrorflow.lab.experiments.networks._training import go_on, train
from mirrorflow.lab.framework.trunks import Checkpoints

pytest.importorskip("transformers")
SMOKE = compression.Config.preset("smoke")
VIT = {
    "network": "vit", "data": "digits", "size": 8, "patch": 4, "batch": 64, "validation": 50,
}  # fmt: skip


def trained(config, tmp_path, kind="none"):
    """A run that has ended, and its task."""
    what = compression.task(config)
    key = next(k for k, plan in config.plans().items() if plan.kind == kind)
    session = train(
        lambda: compression._session(config, config.plans()[key], what),
        compression.timelines(config)[key],
        Checkpoints(tmp_path),
    )
    return session, what


def heads_of(model, config):
    """Each head's W_Q, W_K, W_V and W_O^T, (rank, width) in float64, read off GPT-2 or the ViT."""
    found, size = [], config.rank(1)
    for module in model.modules():
        if hasattr(module, "c_attn"):
            weights = [w.T for w in module.c_attn.weight.split(config.width, 1)]
            weights.append(module.c_proj.weight)
        elif hasattr(module, "q_proj"):
            weights = [getattr(module, f"{name}_proj").weight for name in "qkv"]
            weights.append(module.o_proj.weight.T)
        else:
            continue
        parts = [w.detach().double().split(size) for w in weights]
        found += zip(*parts, strict=True)
    return found


def products(model, config):
    return [m for q, k, v, o in heads_of(model, config) for m in (q.T @ k, o.T @ v)]


def dense(product, k):
    U, values, Vh = torch.linalg.svd(product)
    return (U[:, :k] * values[:k]) @ Vh[:k]


@pytest.mark.parametrize("change", [{}, VIT], ids=["gpt", "vit"])
def test_every_head_is_cut_to_its_best_approximation_and_stays_cut(change, tmp_path):
    config = ex.config_from(compression, "smoke", None, change)
    session, what = trained(config, tmp_path)
    rank, whole = config.rank(0.5), products(session.model, config)
    assert len(whole) == 2 * config.layers * config.heads
    model = copy.deepcopy(session.model)
    energy = compression._truncated(model, rank)
    expected = [dense(product, rank) for product in whole]
    for found, best in zip(products(model, config), expected, strict=True):
        torch.testing.assert_close(found, best, rtol=0, atol=1e-5 * float(best.norm()))
    shares = [float((b.norm() / w.norm()) ** 2) for b, w in zip(expected, whole, strict=True)]
    assert energy == pytest.approx(statistics.fmean(shares), rel=1e-4)
    before = products(model, config)
    go_on(model, lambda step: what.loss(model, 0, step), config.more_lrs())
    assert all(not torch.equal(a, b) for a, b in zip(before, products(model, config), strict=True))
    for weights in heads_of(model, config):  # what is 0 on both sides gets no gradient
        assert all(not weight[rank:].any() and weight[:rank].any() for weight in weights)


def test_queries_keys_and_values_have_no_biases(tmp_path):
    session, _ = trained(SMOKE, tmp_path, "constant")
    biases = [p for name, p in session.model.named_parameters() if name.endswith("c_attn.bias")]
    assert len(biases) == SMOKE.layers and not any(bias.any() for bias in biases)


@pytest.mark.parametrize("change", [{}, VIT], ids=["gpt", "vit"])
def test_the_matrices_of_the_blocks_start_as_those_of_torch(change):
    config = ex.config_from(compression, "smoke", None, {**change, "width": 64})
    one, again, other = (compression.task(config).build(seed) for seed in (3, 3, 4))
    for left, right, new in zip(*(heads_of(m, config) for m in (one, again, other)), strict=True):
        for weight, same, differs in zip(left, right, new, strict=True):
            assert torch.equal(weight, same) and not torch.equal(weight, differs)
            assert weight.abs().max() <= 64**-0.5
            assert float(weight.square().mean()) == pytest.approx(1 / (3 * 64), rel=0.1)


def test_the_runs_of_one_a_absorb_the_same_and_are_cut_alike(smoke):
    _, _, result, curves = smoke(compression.NAME)
    records = result["records"]
    assert len(records) == 2 * 3 * 3  # seeds; none, kept, switched off; whole and two cuts
    for record in records:
        assert record["a"] == pytest.approx(record["absorbed"], rel=1e-9)  # the ledger's
        assert record["rank"] == {1.0: 8, 0.5: 4, 0.25: 2}[record["kept"]]
        if record["kept"] == 1:  # as measured at the last step of the training
            assert record["loss"] == pytest.approx(curves[f"{record['part']}/loss"][-1], rel=1e-5)
    by = {(r["part"], r["kept"]): r["energy"] for r in records}
    assert all(by[part, 1.0] == 1 > by[part, 0.5] > by[part, 0.25] > 0 for part, _ in by)
    rates = {(r["kind"], r["seed"]): r["decay"] for r in records}
    assert rates["off", 0] > rates["constant", 0] > rates["none", 0] == 0


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    key = next(k for k, plan in SMOKE.plans().items() if plan.kind == "off")
    line, what = compression.timelines(SMOKE)[key], compression.task(SMOKE)
    compression.advance(SMOKE, key, 13, Checkpoints(tmp_path / "one"))
    ends = [
        train(
            lambda: compression._session(SMOKE, SMOKE.plans()[key], what), line,
            Checkpoints(tmp_path / folder),
        )
        for folder in ("one", "other")
    ]  # fmt: skip
    states = [session.state()["model"] for session in ends]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert ends[0].curves == ends[1].curves


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": 3}, "heads must divide width"),
        ({"network": "vit", "size": 8, "patch": 3}, "patch must divide size"),
        ({"off": 20}, "off must lie within the 20 steps, got 20"),
        ({"absorbed": (-1.0, -2.0)}, "absorbed must hold 0"),
        ({"absorbed": (0.0, 1.0)}, "absorbed must hold 0 and negative numbers"),
        ({"kept": (0.05,)}, "kept must leave 1 to 7 ranks of a head"),
        ({"kept": (1.0,)}, "kept must leave 1 to 7 ranks of a head"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        ex.config_from(compression, "smoke", None, change)


# The verdicts


def made(losses, diverged=()):
    """Records of losses by (a, kind, part), a list over the seeds each."""
    return [
        {
            "part": f"{kind}{a}-{seed}", "kind": kind, "absorbed": a, "a": a, "seed": seed,
            "kept": part, "loss": loss, "after": loss - 0.5, "ratio": 2.0 + a, "more": 0.05,
            "diverged": (a, kind) in diverged,
        }
        for (a, kind, part), found in losses.items()
        for seed, loss in enumerate(found)
    ]  # fmt: skip


LOSSES = {
    (0.0, "none", 1.0): [2.0, 2.1, 2.2], (0.0, "none", 0.5): [2.5, 2.7, 2.6],
    (-2.0, "constant", 1.0): [2.1, 2.2, 2.3], (-2.0, "constant", 0.5): [2.2, 2.32, 2.41],
    (-2.0, "off", 1.0): [2.1, 2.2, 2.3], (-2.0, "off", 0.5): [2.15, 2.26, 2.37],
}  # fmt: skip


def literal(numbers):
    half = student.ppf(0.975, 2) * statistics.stdev(numbers) / 3**0.5
    return statistics.fmean(numbers), half


def test_a_cost_is_taken_within_a_seed():
    rows = {(row["a"], row["decay"]): row for row in figures.rows(made(LOSSES))}
    for (a, kind), name in {
        (0.0, "none"): "none",
        (-2.0, "constant"): "kept",
        (-2.0, "off"): "switched off",
    }.items():
        whole, cut = LOSSES[a, kind, 1.0], LOSSES[a, kind, 0.5]
        mean, half = literal([x - y for x, y in zip(cut, whole, strict=True)])
        row = rows[a, name]
        assert row["cost of 1/2"] == pytest.approx(mean)
        assert row["cost of 1/2 ± 95%"] == pytest.approx(half)
        assert row["1/2, after more"] == pytest.approx(statistics.fmean(cut) - 0.5)
        assert row["loss"] == pytest.approx(statistics.fmean(whole))


def test_the_verdicts_name_the_lowest_loss_and_judge_switching_off_by_intervals():
    told = " ".join(map(" ".join, figures.verdicts(made(LOSSES))))
    assert "1/2 of" in told and "by 0.5 ± 0.2 without decay" in told
    assert "lowest at a = -2 (2.26 ± 0.3; without decay 2.6 ± 0.2)" in told
    mean, half = literal([2.15 - 2.2, 2.26 - 2.32, 2.37 - 2.41])
    assert mean < -half
    assert "ends clearly lower after 1 and clearly higher after 0 of 1 cuts" in told
    assert f"the largest difference is {mean:+.2g}" in told
    assert "Before any cut, a = -2 ends, from no decay +0.1" in told


def test_runs_that_diverged_are_left_out_and_counted():
    lost = {(a, k, p): (v if k != "off" else [9.0] * 3) for (a, k, p), v in LOSSES.items()}
    records = made(lost, diverged={(-2.0, "off")})
    told = " ".join(map(" ".join, figures.verdicts(records)))
    assert "Runs that diverged and are left out 3" in told and "cannot be compared" in told
    assert {row["decay"] for row in figures.rows(records)} == {
        "none", "kept", "switched off (3 of 3 diverged)",
    }  # fmt: skip
    axis = figures.draw_figure(records).axes[0]
    assert axis.get_ylim()[1] < 4
