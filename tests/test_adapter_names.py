"""LoRA under every name in use, its alpha wherever it stands, and quantized weights."""

import json
import re

import pytest
import torch
from torch import nn

from mirrorflow.spectrum import SpectralTracker, audit, plan_truncation
from mirrorflow.spectrum._adapters import FORMS

safetensors = pytest.importorskip("safetensors.torch")

OUT, IN, R = 12, 10, 3


def save(folder, weights, header=None, **files):
    """Save weights as a file, and JSON files beside it."""
    weights = {key: value.clone().contiguous() for key, value in weights.items()}
    safetensors.save_file(weights, folder / "x.safetensors", header)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / "x.safetensors"


def factors(seed=0):
    """Return A (r, in) and B (out, r)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(R, IN, generator=generator), torch.randn(OUT, R, generator=generator)


def nuclear(scale=1.0, seed=0):
    A, B = factors(seed)
    return scale * torch.linalg.svdvals(B.double() @ A.double()).sum().item()


# Name of A, name of B, the module, the adapter, whether they are stored transposed.
NAMES = [
    ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight",
     "base_model.model.q", "", False),
    ("base_model.model.q.lora_A.default.weight", "base_model.model.q.lora_B.default.weight",
     "base_model.model.q", "default", False),
    ("base_model.model.wte.lora_embedding_A", "base_model.model.wte.lora_embedding_B",
     "base_model.model.wte", "", False),
    ("q.lora_A", "q.lora_B", "q", "", False),  # loralib, Mochi
    ("q.lora_A.default", "q.lora_B.default", "q", "default", False),
    ("lora_unet_mid_block_to_q.lora_down.weight", "lora_unet_mid_block_to_q.lora_up.weight",
     "lora_unet_mid_block_to_q", "", False),
    ("lora_te1_text_model_q_proj.lora_down.weight", "lora_te1_text_model_q_proj.lora_up.weight",
     "lora_te1_text_model_q_proj", "", False),
    ("unet.attn1.processor.to_q_lora.down.weight", "unet.attn1.processor.to_q_lora.up.weight",
     "unet.attn1.processor.to_q_lora", "", False),
    ("attn1.to_q_lora.down", "attn1.to_q_lora.up", "attn1.to_q_lora", "", False),
    ("text_encoder.q_proj.lora_linear_layer.down.weight",
     "text_encoder.q_proj.lora_linear_layer.up.weight", "text_encoder.q_proj", "", False),
    ("q_proj.lora_linear_layer.down", "q_proj.lora_linear_layer.up", "q_proj", "", False),
    ("unet.attn1.to_q.lora.down.weight", "unet.attn1.to_q.lora.up.weight",
     "unet.attn1.to_q", "", False),
    ("transformer.blocks.0.attn.to_q.lora_A.weight", "transformer.blocks.0.attn.to_q.lora_B.weight",
     "transformer.blocks.0.attn.to_q", "", False),  # ai-toolkit
    ("diffusion_model.blocks.0.q.lora_A.weight", "diffusion_model.blocks.0.q.lora_B.weight",
     "diffusion_model.blocks.0.q", "", False),
    ("double_blocks.0.processor.qkv_lora1.down.weight",
     "double_blocks.0.processor.qkv_lora1.up.weight", "double_blocks.0.processor.qkv_lora1", "",
     False),  # XLabs
    ("single_blocks.3.processor.proj_lora.down.weight",
     "single_blocks.3.processor.proj_lora.up.weight", "single_blocks.3.processor.proj_lora", "",
     False),
    ("model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b",
     "model.layers.0.self_attn.q_proj", "", True),  # MLX
    ("layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight",
     "layers.0.attn.q_proj", "", False),  # torchtune
    ("decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight",
     "decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_out.weight",
     "decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter", "", False),  # NeMo
    ("decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight",
     "decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight",
     "decoder.layers.0.self_attention.linear_qkv.adapter", "", False),  # Megatron Bridge
]  # fmt: skip


def test_every_form_of_the_package_has_a_name_in_the_table():
    met = (next(f for f in FORMS if f.pattern.fullmatch(names[0])) for names in NAMES)
    assert set(met) == set(FORMS)


@pytest.mark.parametrize(("down", "up", "module", "adapter", "turned"), NAMES,
                         ids=[names[0] for names in NAMES])  # fmt: skip
def test_the_factors_are_found_under_a_tools_names(down, up, module, adapter, turned, tmp_path):
    A, B = factors()
    found = audit(save(tmp_path, {down: A.mT if turned else A, up: B.mT if turned else B}))
    (record,) = found.records
    assert (record.name, record.adapter, record.kind) == (module, adapter, "lora")
    assert record.shape == (OUT, R, IN) and record.nuclear == pytest.approx(nuclear())
    assert found.skipped == ()


def test_one_file_may_hold_all_of_these_names(tmp_path):
    weights = {}
    for i, (down, up, _, _, turned) in enumerate(NAMES):
        A, B = factors(i)
        weights |= {f"m{i}.{down}": A.mT if turned else A, f"m{i}.{up}": B.mT if turned else B}
    found = audit(save(tmp_path, weights))
    assert found.skipped == ()
    assert sorted(r.nuclear for r in found.records) == pytest.approx(
        sorted(nuclear(seed=i) for i in range(len(NAMES)))
    )


@pytest.mark.parametrize("size", [4, 12])
def test_arrays_of_mlx_between_equal_sizes_have_the_smaller_rank(size, tmp_path):
    a, b = torch.randn(size, 2), torch.randn(2, size)
    (record,) = audit(save(tmp_path, {"q.lora_a": a, "q.lora_b": b})).records
    assert record.shape == (size, 2, size)
    right = torch.linalg.svdvals(a.double() @ b.double()).sum().item()
    assert record.nuclear == pytest.approx(right)


# --- alpha ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("down", "up", "alpha"),
    [
        ("m.lora_down.weight", "m.lora_up.weight", "m.alpha"),
        ("m.lora_A.weight", "m.lora_B.weight", "m.alpha"),
        ("m.lora.down.weight", "m.lora.up.weight", "m.alpha"),
        ("m.lora.down.weight", "m.lora.up.weight", "m.lora.alpha"),
        ("m.lora_linear_layer.down.weight", "m.lora_linear_layer.up.weight",
         "m.lora_linear_layer.alpha"),
        ("m.to_q_lora.down.weight", "m.to_q_lora.up.weight", "m.to_q_lora.down.weight.alpha"),
        ("m.lora_A", "m.lora_B", "m.alpha"),
    ],
)  # fmt: skip
def test_alpha_is_read_from_a_tensor_and_kept_by_truncation(down, up, alpha, tmp_path):
    A, B = factors()
    path = save(tmp_path, {down: A, up: B, alpha: torch.tensor(6.0)})
    found = audit(path)
    assert found.records[0].scale == 2 and found.skipped == () and found.records[0].notes == ()
    plan = plan_truncation(path, rank=2)
    assert plan.tensors[alpha] == 4 and len(plan.tensors[down]) == 2
    plan.write(tmp_path / "small")
    (cut,) = audit(tmp_path / "small").records
    s = torch.linalg.svdvals(B.double() @ A.double())[:2].sum().item()
    assert cut.scale == 2 and cut.nuclear == pytest.approx(2 * s, rel=1e-5)


HEADERS = [
    ({"network_alpha": "12"}, 4, "its alpha is network_alpha of the file's header"),
    ({"ss_network_alpha": "1.5", "ss_network_dim": "3"}, 0.5, "its alpha is ss_network_alpha"),
    ({"ss_network_alpha": "Dynamic"}, 1, "its scale is unknown"),
    ({"lora_adapter_metadata": '{"transformer.lora_alpha": 12, "transformer.r": 3}'}, 4, None),
    ({"lora_adapter_metadata": '{"lora_alpha": 6, "r": 3}'}, 2, None),
    ({"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 12, "transformer.r": 3,
                                           "transformer.alpha_pattern": {"blocks.0.q": 3}})},
     1, None),
    ({"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 12, "unet.r": 3,
                                           "transformer.lora_alpha": 9, "transformer.r": 3})},
     3, None),
    ({"lora_adapter_metadata": '{"unet.lora_alpha": 12}'}, 1, "its scale is unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "scale", "note"), HEADERS)
def test_alpha_is_read_from_the_header(header, scale, note, tmp_path):
    A, B = factors()
    names = ("transformer.blocks.0.q.lora_A.weight", "transformer.blocks.0.q.lora_B.weight")
    path = save(tmp_path, dict(zip(names, (A, B), strict=True)), header)
    (record,) = audit(path).records
    assert record.scale == scale and record.nuclear == pytest.approx(nuclear(scale))
    assert (note is None and record.notes == ()) or note in record.notes[0]


def test_a_rank_stabilized_header_divides_by_the_root(tmp_path):
    A, B = factors()
    packed = {"unet.lora_alpha": 6, "unet.r": R, "unet.use_rslora": True}
    header = {"lora_adapter_metadata": json.dumps(packed)}
    path = save(tmp_path, {"unet.q.lora_A.weight": A, "unet.q.lora_B.weight": B}, header)
    assert audit(path).records[0].scale == pytest.approx(6 / R**0.5)


@pytest.mark.parametrize(
    ("parameters", "scale"),
    [({"rank": 3, "scale": 20.0}, 20), ({"rank": 3, "scale": 10.0, "alpha": 6}, 20)],
)
def test_mlx_keeps_its_scale_in_its_configuration(parameters, scale, tmp_path):
    A, B = factors()
    config = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": parameters}
    path = save(tmp_path, {"q.lora_a": A.mT, "q.lora_b": B.mT}, adapter_config=config)
    (record,) = audit(path).records
    assert record.scale == scale and record.notes == ()
    with pytest.raises(ValueError, match="keeps the rank in a configuration of its own"):
        plan_truncation(path, rank=1)
    config["lora_parameters"]["scale"] = "x"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"adapter_config\.json: scale must be a number, got 'x'"):
        audit(path)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq", True, "gaussian"])
def test_an_update_that_begins_at_a_part_of_the_weights_is_noted(start, tmp_path):
    A, B = factors()
    weights = {"base_model.model.q.lora_A.weight": A, "base_model.model.q.lora_B.weight": B}
    config = {"lora_alpha": 3, "r": R, "init_lora_weights": start}
    (record,) = audit(save(tmp_path, weights, adapter_config=config)).records
    assert bool(record.notes) == (start not in (True, "gaussian"))
    assert all("A B is not the update" in note for note in record.notes)


def test_the_tracker_notes_it_as_well():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
    tracker = SpectralTracker(model)
    assert any("A B is not the update" in note for note in tracker.measure().records[0].notes)


# --- Not measured, with the reason ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"m.oft_blocks": (2, 4, 4)}, "OFT multiplies"),
        ({"lora_unet_m.diff": (4, 4)}, "the whole difference of a weight"),
        ({"m.a1.weight": (4, 4)}, "GLoRA's update"),
        ({"m.fourierft_spectrum.default": (8,)}, "a part of an adapter of no known form"),
        ({"m.lora_A.weight": (2, 4)}, "m.lora_B.weight is missing"),
        ({"m.lora_left": (2, 4), "m.lora_right": (4, 2)}, "of no known form"),
        ({"m.lora_a": (3, 2, 4), "m.lora_b": (3, 4, 2)}, "LoRA on stacked experts"),
        ({"m.to_q_lora.down.weight": (2, 4)}, r"to_q_lora\.up\.weight is missing"),
    ],
)
def test_what_looks_like_an_adapter_and_is_not_measured_says_why(weights, reason, tmp_path):
    fit = {"n.lora_A.weight": torch.eye(2, 4), "n.lora_B.weight": torch.eye(4, 2)}
    odd = {name: torch.ones(shape) for name, shape in weights.items()}
    found = audit(save(tmp_path, fit | odd))
    assert len(found.records) == 1 and len(found.skipped) == 1
    assert re.search(reason, f"{found.skipped[0]}")


def test_what_stands_beside_two_factors_is_not_listed(tmp_path):
    A, B = factors()
    weights = {
        "lora_unet_m.lora_down.weight": A, "lora_unet_m.lora_up.weight": B,
        "lora_unet_m.alpha": torch.tensor(3.0), "lora_unet_m.dora_scale": torch.ones(OUT, 1),
        "lora_unet_m.diff_b": torch.ones(OUT),
        "n.lora_A.default.weight": A, "n.lora_B.default.weight": B,
        "n.lora_B.default.bias": torch.ones(OUT),
        "n.lora_magnitude_vector.default.weight": torch.ones(OUT),
    }  # fmt: skip
    assert audit(save(tmp_path, weights)).skipped == ()


# How a quantized attention layer is stored, and the reason that its record gives.
STORED = {
    "GPTQ": {"qweight": ((2, 8), torch.int32), "qzeros": ((1, 1), torch.int32),
             "scales": ((1, 8), torch.float16), "g_idx": ((8,), torch.int32)},
    "GPTQ or AWQ": {"qweight": ((8, 1), torch.int32), "qzeros": ((1, 1), torch.int32),
                    "scales": ((1, 8), torch.float16)},
    "bitsandbytes, 4 bits": {"weight": ((32, 1), torch.uint8),
                             "weight.absmax": ((1,), torch.float32),
                             "weight.quant_map": ((16,), torch.float32),
                             "weight.quant_state.bitsandbytes__nf4": ((9,), torch.uint8)},
    "bitsandbytes, 8 bits": {"weight": ((8, 8), torch.int8), "SCB": ((8,), torch.float32)},
    "compressed-tensors": {"weight_packed": ((8, 1), torch.int32),
                           "weight_scale": ((8, 1), torch.float16),
                           "weight_shape": ((2,), torch.int64)},
    "MLX": {"weight": ((8, 1), torch.uint32), "scales": ((8, 1), torch.float16),
            "biases": ((8, 1), torch.float16)},
    "HQQ": {"W_q": ((8, 4), torch.uint8), "scale": ((8, 1), torch.float16)},
    "weight_scale_inv": {"weight": ((8, 8), torch.float8_e4m3fn),
                         "weight_scale_inv": ((1, 1), torch.float32)},
    "F8_E4M3": {"weight": ((8, 8), torch.float8_e4m3fn)},
}  # fmt: skip


@pytest.mark.parametrize(("method", "stored"), STORED.items(), ids=list(STORED))
def test_quantized_attention_is_listed_with_the_method(method, stored, tmp_path):
    weights = {
        f"layers.{i}.self_attn.{name}_proj.{end}": torch.ones(shape).to(dtype)
        for i in range(2) for name in "qkv" for end, (shape, dtype) in stored.items()
    }  # fmt: skip
    path = save(tmp_path, weights)
    with pytest.raises(ValueError, match="no LoRA or attention pairs"):
        audit(path)
    weights |= {"n.q_proj.weight": torch.eye(4), "n.k_proj.weight": torch.eye(4)}
    found = audit(save(tmp_path, weights))
    assert len(found.records) == 1 and len(found.skipped) == 2
    for name, reason in found.skipped:
        assert name.startswith("layers.") and method in reason and "quantized" in reason


@pytest.mark.parametrize("scale", ["weight_scale_inv", "weight_scale"])
def test_scales_beside_floating_weights_are_noted(scale, tmp_path):
    weights = {f"m.{n}_proj.weight": torch.randn(4, 4).bfloat16() for n in "qk"}
    weights[f"m.k_proj.{scale}"] = torch.ones(1, 1)
    (record,) = audit(save(tmp_path, weights)).records
    assert record.notes == (f"{scale} stands beside its weights: it is left out",)


# --- Twice the same name, and normalizations ------------------------------------------------------


def test_names_that_differ_by_a_wrapper_only_are_both_measured(tmp_path):
    torch.manual_seed(0)
    plain = {f"m.{n}_proj.weight": torch.randn(4, 4) for n in "qk"}
    wrapped = {f"_orig_mod.m.{n}_proj.weight": torch.randn(4, 4) for n in "qk"}
    found = audit(save(tmp_path, plain | wrapped))
    right = {}
    for start, weights in (("m", plain), ("_orig_mod.m", wrapped)):
        query, key = (weights[f"{start}.{n}_proj.weight"].double() for n in "qk")
        right[start] = torch.linalg.svdvals(query.T @ key).sum().item()
    assert {r.name: r.nuclear for r in found.records} == pytest.approx(right)
    assert [r.name for r in audit(save(tmp_path, wrapped)).records] == ["m"]


@pytest.mark.parametrize(
    ("module", "fused", "norm"),
    [
        ("double_blocks.0.img_attn", True, "norm.query_norm.scale"),  # Flux
        ("joint_blocks.0.x_block.attn", True, "ln_q.weight"),  # SD3
        ("transformer_blocks.0.attn", False, "norm_q.weight"),
        ("layers.0.self_attn", False, "q_norm.weight"),
        ("layers.0.self_attn", False, "q_layernorm.weight"),
        ("layers.0.attn", False, "q_norm.scale"),
    ],
)
def test_normalized_queries_and_keys_are_noted_under_all_names(module, fused, norm, tmp_path):
    names = ("q_proj", "k_proj") if "layers" in module else ("to_q", "to_k")
    weights = {f"{module}.{name}.weight": torch.randn(8, 8) for name in names}
    if fused:
        weights = {f"{module}.qkv.weight": torch.randn(24, 8)}
    path = save(tmp_path, weights)
    assert not any("are normalized" in note for note in audit(path).records[0].notes)
    path = save(tmp_path, weights | {f"{module}.{norm}": torch.ones(8)})
    assert any("Q and K are normalized" in note for note in audit(path).records[0].notes)
