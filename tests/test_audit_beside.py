"""What stands beside a measured product: random factors, shares of energy, another checkpoint."""

import json
import re

import numpy as np
import pytest
import torch

from commands import call
from mirrorflow.spectrum import audit, compare

safetensors = pytest.importorskip("safetensors.torch")


def save(weights, folder):
    """Save weights as a model's file."""
    safetensors.save_file(weights, folder / "model.safetensors")


def test_the_ranks_of_a_record_hold_their_share_of_a_dense_products_energy(tmp_path):
    torch.manual_seed(3)
    A, B = torch.randn(30, 12) * torch.logspace(0, -2, 12), torch.randn(12, 20)
    save({"b.lora_B.weight": A, "b.lora_A.weight": B}, tmp_path)
    (record,) = audit(tmp_path).records
    s = torch.linalg.svdvals(A.double() @ B.double()).square()
    for share, found in ((0.9, record.rank_90), (0.95, record.rank_95), (0.99, record.rank_99)):
        kept = [bool(s[:k].sum() >= share * s.sum()) for k in range(len(s) + 1)]
        assert found == kept.index(True)
    assert record.random_ratio == pytest.approx(12**0.5, rel=0.15)
    assert record.highest_ratio == 12**0.5 and record.ratio < record.random_ratio


@pytest.mark.parametrize(("spread", "said"), [(0, "about as high as"), (-2, "below")])
def test_the_verdict_says_whether_ratios_are_below_those_of_random_factors(tmp_path, spread, said):
    torch.manual_seed(4)
    names = [f"{i}.lora_{side}.weight" for i in range(3) for side in "BA"]
    scale = torch.logspace(0, spread, 8)
    weights = {n: torch.randn(60, 8) * scale if "B" in n else torch.randn(8, 50) for n in names}
    save(weights, tmp_path)
    found = audit(tmp_path)
    assert f"is {said} that" in found.verdict and found.to_dict()["verdict"] == found.verdict
    assert ("does not show that decay has acted" in found.verdict) == (said != "below")


def test_a_large_products_reference_is_that_of_its_proportions():
    from mirrorflow.spectrum.reference import LARGEST, random_product

    n, r, m = (2 * LARGEST, LARGEST + 120, 2 * LARGEST)
    rng = np.random.default_rng(0)
    s = np.linalg.svd(rng.standard_normal((n, r)) @ rng.standard_normal((r, m)), compute_uv=False)
    s = s[:r]
    found = random_product(n, r, m)
    assert found.ratio == pytest.approx(s.sum() / np.linalg.norm(s), rel=0.01)
    p = s / s.sum()
    assert found.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=0.01)


def pair_of_checkpoints(folder):
    """Save a model, and the same with one product smaller and of lower rank, and one more."""
    torch.manual_seed(5)
    weights = {f"{i}.self_attn.{n}_proj.weight": torch.randn(8, 8) for i in range(2) for n in "qk"}
    other = {**weights, "0.self_attn.q_proj.weight": weights["0.self_attn.q_proj.weight"].clone()}
    other["0.self_attn.q_proj.weight"][2:] *= 1e-3
    for name in "qk":
        other[f"2.self_attn.{name}_proj.weight"] = torch.randn(8, 8)
    for name, content in (("before", weights), ("after", other)):
        (folder / name).mkdir()
        save(content, folder / name)
        (folder / name / "config.json").write_text(json.dumps({"num_attention_heads": 2}))


def test_two_checkpoints_are_compared_product_by_product(tmp_path):
    pair_of_checkpoints(tmp_path)
    before, after = audit(tmp_path / "before"), audit(tmp_path / "after")
    found = compare(after, before)
    assert [a.label for a, _ in found.pairs] == ["0.self_attn", "1.self_attn"]
    assert found.only_here == ("2.self_attn",) and found.only_there == ()
    changed, same = found.to_dict()["products"]
    dense = [
        torch.linalg.svdvals(w["q"].double().T @ w["k"].double())
        for w in (
            {n: safetensors.load_file(tmp_path / name / "model.safetensors")[
                f"0.self_attn.{n}_proj.weight"] for n in "qk"}
            for name in ("after", "before")
        )
    ]  # fmt: skip
    ratios = [(s.sum() / s.norm()).item() for s in dense]
    assert changed["ratio_change"] == pytest.approx(ratios[0] - ratios[1])
    assert same["ratio_change"] == same["rank_99_change"] == 0
    assert "lower than in the other in 1 of 2 products" in found.verdict
    text = found.table(60)
    assert all(len(line) <= 60 for line in text.splitlines()[:-1])
    assert "only here: 2.self_attn" in text


def test_the_command_and_the_page_show_heads_and_the_other_checkpoint(
    tmp_path, monkeypatch, capsys
):
    pair_of_checkpoints(tmp_path)
    page, after, before = (tmp_path / name for name in ("page.html", "after", "before"))
    command = ["audit", after, "--level", "head", "--compare", before]
    assert call(monkeypatch, *command, "--page", page) == 0
    out = capsys.readouterr().out
    assert "compared with" in out and "only here: 2.self_attn head 1" in out
    html = page.read_text()
    specs = json.loads(re.findall(r'id="charts">(.*?)</script>', html, re.S)[0])
    heat = specs["audit-heads"]
    assert heat["mark"]["type"] == "rect" and len(heat["data"]["values"]) == 6
    assert ">change of the ratio</th>" in html and "lower than in the other" in html
    assert call(monkeypatch, *command, "--json") == 0
    products = json.loads(capsys.readouterr().out)["comparison"]["products"]
    assert [row["product"] for row in products][:2] == ["0.self_attn head 0", "0.self_attn head 1"]


def test_the_page_shows_the_notes_of_its_products(tmp_path):
    from mirrorflow.lab.report.checkpoint import audit_page

    torch.manual_seed(6)
    names = [f"{i}.lora_{side}.weight" for i in range(2) for side in "AB"]
    save({n: torch.randn(4, 4) for n in names}, tmp_path)
    found = audit(tmp_path)
    html = audit_page(found.to_dict(), "a", tmp_path / "page.html", "0").read_text()
    note = "2 products: its scale is unknown without adapter_config.json, taken as 1"
    assert note in html and found.verdict in html
