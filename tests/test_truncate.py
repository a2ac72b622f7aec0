"""Truncated products are those of dense SVDs, and truncated adapters load as such."""

import json
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirrorflow.spectrum import product_spectrum
from mirrorflow.spectrum.truncate import plan_truncation, truncate
from mirrorflow.spectrum.truncation import RankChoice, distance, truncated_product

safetensors = pytest.importorskip("safetensors.torch")

sizes = st.integers(1, 9)


def draw(seed, n, r, m, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, r, dtype=torch.float64)
    A = torch.randn(n, r, generator=generator, dtype=torch.float64) * scales
    return A.to(dtype), torch.randn(r, m, generator=generator, dtype=torch.float64).to(dtype)


def dense(product, k):
    """The truncated SVD of a formed product, and its relative error."""
    U, values, Vh = torch.linalg.svd(product.double(), full_matrices=False)
    kept = (U[:, :k] * values[:k]) @ Vh[:k]
    return kept, (torch.linalg.norm(product.double() - kept) / torch.linalg.norm(product)).item()


def held(product, energy):
    """The rank that holds a share of the energy: a literal loop over dense singular values."""
    squares = (torch.linalg.svdvals(product) ** 2).tolist()
    return next(k for k in range(1, 99) if sum(squares[:k]) >= energy * sum(squares) * (1 - 1e-9))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), sizes, sizes, sizes, st.integers(1, 9))
def test_a_truncated_product_is_that_of_the_dense_svd(seed, n, r, m, rank):
    A, B = draw(seed, n, r, m)
    found = truncated_product(A, B, rank=rank)
    expected, error = dense(A @ B, rank)
    assert found.rank == min(rank, n, r, m) and found.left.shape == (n, found.rank)
    torch.testing.assert_close(found.left @ found.right, expected, rtol=0, atol=1e-10)
    assert found.error == pytest.approx(error, abs=1e-10)
    assert found.energy == pytest.approx(1 - error**2, abs=1e-10)
    assert distance(A, B, found.left, found.right) == pytest.approx(error, abs=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), sizes, sizes, sizes)
def test_truncated_factors_are_balanced(seed, n, r, m):
    A, B = draw(seed, n, r, m)
    found = truncated_product(A, B, rank=3)
    values = torch.diag(found.singular_values[: found.rank])
    for gram in (found.left.mT @ found.left, found.right @ found.right.mT):
        torch.testing.assert_close(gram, values, rtol=0, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), sizes, sizes, sizes, st.floats(0.01, 1))
def test_the_rank_of_an_energy_is_the_smallest_that_holds_it(seed, n, r, m, energy):
    A, B = draw(seed, n, r, m)
    expected = held(A @ B, energy)
    assert product_spectrum(A, B).rank_for(energy).item() == expected
    assert truncated_product(A, B, energy=energy).rank == expected
    found = truncated_product(A, B, error=math.sqrt(1 - energy))
    assert found.rank in (expected, expected + (energy > 1 - 1e-7))
    assert found.error <= math.sqrt(1 - energy) * (1 + 1e-9) + 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_of_the_energy_is_the_numerical_rank(dtype):
    A, B = draw(0, 20, 3, 15, dtype)
    wide = torch.cat(
        [A, A @ torch.ones(3, 4, dtype=dtype)], 1
    )  # rank 3, up to the dtype's rounding
    tall = torch.cat([B, torch.zeros(4, 15, dtype=dtype)])
    assert product_spectrum(wide, tall).rank_for(1).item() == 3
    assert truncated_product(wide, tall, energy=1).rank == 3
    assert truncated_product(wide, tall, error=0).rank == 3


def test_small_singular_values_count_for_a_small_error():
    A = torch.diag(torch.tensor([1.0, 1e-6, 1e-9], dtype=torch.float64))
    ranks = [truncated_product(A, torch.eye(3), error=e).rank for e in (2e-6, 2e-9, 1e-10, 0)]
    assert ranks == [1, 2, 3, 3]


def test_a_share_at_a_singular_value_is_held_by_it():
    A = torch.diag(torch.tensor([3.0, 1.0]))
    assert product_spectrum(A, torch.eye(2)).rank_for(0.9).item() == 1
    assert truncated_product(A, torch.eye(2), energy=0.9).rank == 1


def test_no_rank_holds_nothing_and_what_is_not_finite_has_none():
    A, B = draw(0, 6, 2, 5)
    batch = torch.stack([A, torch.zeros_like(A)])
    assert product_spectrum(batch, B).rank_for(0.9).tolist() == [held(A @ B, 0.9), 0.0]
    spectrum = product_spectrum(A, B)
    broken = type(spectrum)(spectrum.singular_values * torch.nan, spectrum.gram_a, spectrum.gram_b)
    assert math.isnan(broken.rank_for(0.9).item())
    nothing = truncated_product(torch.zeros(6, 2), B.float(), energy=0.9)
    assert nothing.is_zero and nothing.rank == 1
    assert (nothing.error, nothing.energy) == (0.0, 1.0) and not nothing.left.any()


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_the_error_of_very_small_and_large_products_is_known(scale):
    A, B = draw(1, 6, 3, 5)
    found = truncated_product(A * scale, B, rank=1)
    assert found.error == pytest.approx(dense(A @ B, 1)[1], rel=1e-9)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({}, "exactly one"),
        ({"rank": 2, "energy": 0.5}, "exactly one"),
        ({"rank": 0}, ">= 1"),
        ({"rank": True}, "whole number"),
        ({"rank": 2.0}, "whole number"),
        ({"energy": 0.0}, r"\(0, 1\]"),
        ({"energy": 1.1}, r"\(0, 1\]"),
        ({"energy": math.nan}, r"\(0, 1\]"),
        ({"error": 1.0}, r"\[0, 1\)"),
        ({"error": -0.1}, r"\[0, 1\)"),
    ],
)
def test_what_is_no_choice_is_refused(choice, said):
    with pytest.raises(ValueError, match=said):
        RankChoice(**choice)


@pytest.mark.parametrize(
    ("A", "B", "said"),
    [
        (torch.ones(3, 2), torch.ones(3, 2), "matrices"),
        (torch.ones(2, 3, 2), torch.ones(2, 3), "matrices"),
        (torch.full((3, 2), torch.nan), torch.ones(2, 3), "finite"),
    ],
)
def test_factors_without_a_product_are_refused(A, B, said):
    with pytest.raises(ValueError, match=said):
        truncated_product(A, B, rank=1)


# Adapters' files


def save(path, weights, **header):
    tensors = {k: v.contiguous() for k, v in weights.items()}
    safetensors.save_file(tensors, path, metadata=header or None)
    return path


def kohya(name, r, alpha, *shape, seed=0, dtype=torch.float32):
    """A LoRA module as networks/lora.py of kohya's scripts saves it: up, down, and alpha."""
    generator = torch.Generator().manual_seed(seed)
    out, *rest = shape
    up = torch.randn(out, r, *(1 for _ in rest[1:]), generator=generator).to(dtype)
    down = torch.randn(r, *rest, generator=generator).to(dtype)
    weights = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    return weights | ({} if alpha is None else {f"{name}.alpha": torch.tensor(alpha).to(dtype)})


def raw(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def update(weights, name):
    """What the scripts add: up @ down * (alpha / r), for convolutions flattened."""
    up, down = (weights[f"{name}.lora_{part}.weight"].double() for part in ("up", "down"))
    alpha = weights.get(f"{name}.alpha", torch.tensor(float(len(down))))
    return up.flatten(1) @ down.flatten(1) * (alpha.double() / len(down))


MODULES = {
    "lora_unet_attn1_to_q": (6, 1.0, 20, 16),
    "lora_te1_mlp_fc1": (8, 8.0, 12, 16),
    "lora_unet_conv_in": (5, 3.0, 10, 4, 3, 3),
    "lora_unet_plain": (4, None, 6, 7),
}


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10), (torch.bfloat16, 0.15)]
)
def test_a_kohya_file_is_truncated_as_dense_svds_are(dtype, atol, tmp_path):
    weights = {}
    for seed, (name, shape) in enumerate(MODULES.items()):
        weights |= kohya(name, *shape, seed=seed, dtype=dtype)
    file = save(tmp_path / "x.safetensors", weights, ss_network_dim="8", note="kept")
    report = truncate(file, rank=3, out=tmp_path / "small.safetensors")
    new = safetensors.load_file(tmp_path / "small.safetensors")
    assert new.keys() == weights.keys() and len(report.records) == len(MODULES)
    for record in report.records:
        expected, error = dense(update(weights, record.name), 3)
        found = update(new, record.name)
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)
        assert len(new[f"{record.name}.lora_down.weight"]) == record.new_rank == 3
        assert record.error == pytest.approx(error, abs=1e-9)
        lost = torch.linalg.norm(found - update(weights, record.name))
        whole = torch.linalg.norm(update(weights, record.name))
        assert record.stored_error == pytest.approx((lost / whole).item(), abs=1e-9)
    assert {k: v.dtype for k, v in new.items()} == {k: v.dtype for k, v in weights.items()}


def test_energy_and_error_give_each_product_its_rank(tmp_path):
    weights = kohya("a", 6, 6.0, 20, 16) | kohya("b", 8, 4.0, 12, 16, seed=1)
    file = save(tmp_path / "x.safetensors", weights)
    for choice, energy in (({"energy": 0.8}, 0.8), ({"error": 0.3}, 0.91)):
        plan = plan_truncation(file, **choice)
        ranks = {record.name: record.new_rank for record in plan.report.records}
        assert ranks == {name: held(update(weights, name), energy) for name in "ab"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_the_scale_is_kept_where_alpha_cannot_hold_it(dtype, tmp_path):
    weights = kohya("a", 7, 3.0, 20, 16, dtype=torch.float64)
    weights["a.alpha"] = torch.tensor(3).to(dtype)
    plan = plan_truncation(save(tmp_path / "x.safetensors", weights), rank=5)
    new = safetensors.load_file(plan.write(tmp_path / "y.safetensors"))
    assert new["a.alpha"].dtype == dtype
    expected, _ = dense(update(weights, "a"), 5)
    torch.testing.assert_close(update(new, "a"), expected, rtol=0, atol=1e-10)


def test_the_header_of_kohya_has_the_new_rank_and_no_old_hash(tmp_path):
    header = {"ss_network_dim": "6", "ss_network_alpha": "3", "sshs_model_hash": "abc", "x": "y"}
    weights = kohya("a", 6, 3.0, 20, 16) | kohya("b", 6, 3.0, 8, 16, seed=2)
    file = save(tmp_path / "x.safetensors", weights, **header)
    plan = plan_truncation(file, rank=2)
    assert plan.metadata == {"ss_network_dim": "2", "ss_network_alpha": "1.0", "x": "y"}
    assert any("sshs_model_hash" in note for note in plan.report.notes)
    plan = plan_truncation(file, rank=2, match="^a$")
    assert plan.metadata["ss_network_dim"] == plan.metadata["ss_network_alpha"] == "Dynamic"


def test_diffusers_header_has_the_new_rank_and_alpha(tmp_path):
    weights = {
        "transformer.blocks.0.to_q.lora_A.weight": torch.randn(8, 12),
        "transformer.blocks.0.to_q.lora_B.weight": torch.randn(10, 8),
    }
    config = {"r": 8, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {}}
    packed = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    file = save(tmp_path / "x.safetensors", weights, lora_adapter_metadata=packed)
    found = json.loads(plan_truncation(file, rank=2).metadata["lora_adapter_metadata"])
    assert (found["transformer.r"], found["transformer.lora_alpha"]) == (2, 1)


def test_a_scale_that_depends_on_the_rank_in_an_unknown_way_is_not_changed(tmp_path):
    weights = kohya("a", 6, None, 20, 16) | kohya("b", 6, 3.0, 20, 16)
    file = save(tmp_path / "x.safetensors", weights, network_alpha="3")
    report = plan_truncation(file, rank=2).report
    assert [record.name for record in report.records] == ["b"]
    assert [(name, "network_alpha" in reason) for name, reason in report.skipped] == [("a", True)]


def test_what_is_no_product_or_has_none_is_copied_and_listed(tmp_path):
    weights = (
        kohya("good", 4, 2.0, 20, 16)
        | kohya("mid", 4, 2.0, 20, 16, 3, 3)
        | kohya("zero", 4, 2.0, 9, 7)
        | kohya("nan", 4, 2.0, 9, 7)
        | {"odd.lora_x": torch.ones(3), "other.bias": torch.arange(5)}
    )
    weights["mid.lora_mid.weight"] = torch.ones(4, 4, 3, 3)
    weights["zero.lora_up.weight"].zero_()
    weights["nan.lora_up.weight"][0, 0] = torch.nan
    weights["third.lora_A.weight"], weights["third.lora_B.weight"] = (
        torch.ones(2, 5),
        torch.ones(5, 2),
    )
    weights["third.lora_diag"] = torch.ones(2)
    file = save(tmp_path / "x.safetensors", weights)
    plan = plan_truncation(file, rank=2)
    reasons = dict(plan.report.skipped)
    assert [record.name for record in plan.report.records] == ["good"]
    assert "three factors" in reasons["mid.lora_mid.weight"] and "A B = 0" in reasons["zero"]
    assert "NaN" in reasons["nan"] and "not known" in reasons["odd.lora_x"]
    assert "lora_diag" in reasons["third"]
    new = safetensors.load_file(plan.write(tmp_path / "y.safetensors"))
    for key, value in weights.items():
        if not key.startswith("good."):
            assert new[key].dtype == value.dtype
            assert raw(new[key]) == raw(value)


def test_a_product_that_keeps_its_rank_is_copied(tmp_path):
    weights = kohya("a", 2, 2.0, 20, 16) | kohya("b", 6, 2.0, 20, 16, seed=1)
    report = truncate(save(tmp_path / "x.safetensors", weights), rank=4, out=tmp_path / "new")
    assert {r.name: (r.new_rank, r.error > 0) for r in report.records} == {
        "a": (2, False), "b": (4, True),
    }  # fmt: skip
    new = safetensors.load_file(tmp_path / "new" / "x.safetensors")
    assert all(new[key].equal(weights[key]) for key in weights if key.startswith("a."))


def test_nothing_is_written_before_write_and_never_over_anything(tmp_path):
    file = save(tmp_path / "x.safetensors", kohya("a", 6, 3.0, 20, 16))
    before = file.read_bytes()
    plan = plan_truncation(file, rank=2)
    assert plan.report.records[0].error > 0 and os.listdir(tmp_path) == ["x.safetensors"]
    for out in (file, tmp_path):
        with pytest.raises(ValueError, match="differ from the input"):
            plan.write(out)
    plan.write(tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="must be new"):
        plan.write(tmp_path / "y.safetensors")
    assert file.read_bytes() == before and len(os.listdir(tmp_path)) == 2


def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch):
    file = save(tmp_path / "x.safetensors", kohya("a", 6, 3.0, 20, 16))
    plan = plan_truncation(file, rank=2)

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors, "save_file", full)
    for out in (tmp_path / "y.safetensors", tmp_path / "folder"):
        with pytest.raises(OSError, match="No space"):
            plan.write(out)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 2}, "out must be given"),
        ({"rank": 2, "out": "x", "frozen": True}, "frozen"),
        ({"out": "x"}, "exactly one"),
        ({"rank": 2, "out": "x", "match": "nothing"}, "leaves none"),
    ],
)
def test_wrong_arguments_for_a_file_are_named(options, said, tmp_path):
    file = save(tmp_path / "x.safetensors", kohya("a", 6, 3.0, 20, 16))
    with pytest.raises(ValueError, match=said):
        truncate(file, **options)


def test_targets_that_are_none_are_named(tmp_path):
    with pytest.raises(TypeError, match="must be a path"):
        truncate(3, rank=2)
    with pytest.raises(FileNotFoundError):
        truncate(tmp_path / "missing", rank=2, out=tmp_path / "out")
    save(tmp_path / "model.safetensors", {"q_proj.weight": torch.eye(4)})
    with pytest.raises(ValueError, match="got none"):
        plan_truncation(tmp_path, rank=2)
    save(tmp_path / "other.safetensors", kohya("a", 6, 3.0, 20, 16))
    with pytest.raises(ValueError, match="one adapter"):
        plan_truncation(tmp_path, rank=2)


# The command


@pytest.fixture
def command(capsys):
    """Call the command in this process: its exit code, what it prints, and its errors."""
    typer = pytest.importorskip("typer")
    from mirrorflow.cli.errors import UserError
    from mirrorflow.cli.truncate import truncate_command

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(truncate_command)

    def call(*args):
        try:
            app([str(arg) for arg in args], standalone_mode=False)
            return 0, *capsys.readouterr()
        except UserError as error:
            return error.code, *capsys.readouterr()[:1], str(error)

    return call


def test_the_command_prints_the_errors_and_writes_only_where_it_is_told(command, tmp_path):
    file = save(tmp_path / "x.safetensors", kohya("a", 6, 3.0, 20, 16))
    code, printed, _ = command(file, "--rank", 2)
    assert code == 0 and printed.split()[:4] == ["product", "rank", "kept", "error"]
    assert os.listdir(tmp_path) == ["x.safetensors"]
    code, printed, told = command(file, "--error", 0.5, "--out", tmp_path / "new", "--json")
    assert code == 0 and json.loads(printed)["records"][0]["error"] <= 0.5
    assert str(tmp_path / "new" / "x.safetensors") in told


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "exactly one"),
        (("--rank", 2, "--energy", 0.9), "exactly one"),
        (("--energy", 2), r"(0, 1]"),
        (("--rank", 2, "--out", "x.safetensors"), "differ from the input"),
        (("--rank", 2, "--match", "("), "regular expression"),
    ],
)
def test_mistakes_of_the_user_end_with_two_and_one_line(command, args, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "x.safetensors", kohya("a", 6, 3.0, 20, 16))
    code, _, told = command("x.safetensors", *args)
    assert code == 2 and said in told
    assert command("missing.safetensors", "--rank", 2)[0] == 2
