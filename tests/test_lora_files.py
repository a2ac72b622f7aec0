"""LoRA as tools other than PEFT store it: kohya's scripts, OneTrainer, ai-toolkit, diffusers."""

import pytest
import torch
from torch import nn

from mirrorflow.spectrum import SpectralTracker, audit, table

safetensors = pytest.importorskip("safetensors.torch")


def save(folder, weights):
    safetensors.save_file({k: v.contiguous() for k, v in weights.items()}, folder / "x.safetensors")
    return folder / "x.safetensors"


def kohya(name, r, alpha, *shape, seed=0):
    """A LoRA module as networks/lora.py of kohya's scripts saves it: up, down, and alpha."""
    generator = torch.Generator().manual_seed(seed)
    out, *rest = shape
    weights = {
        f"{name}.lora_up.weight": torch.randn(out, r, *(1 for _ in rest[1:]), generator=generator),
        f"{name}.lora_down.weight": torch.randn(r, *rest, generator=generator),
    }
    return weights | ({} if alpha is None else {f"{name}.alpha": torch.tensor(float(alpha))})


def update(weights, name):
    """What the scripts add: up @ down * (alpha / r), for convolutions flattened."""
    up, down = (weights[f"{name}.lora_{part}.weight"].double() for part in ("up", "down"))
    alpha = weights.get(f"{name}.alpha", torch.tensor(float(len(down))))
    return up.flatten(1) @ down.flatten(1) * (alpha.double() / len(down))


def test_kohyas_files_are_measured_with_their_alpha(tmp_path):
    unet = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    weights = (
        kohya(unet, 4, 1, 20, 16)
        | kohya("lora_te1_text_model_encoder_layers_0_mlp_fc1", 8, 8, 12, 16, seed=1)
        | kohya("lora_unet_conv_in", 2, 3, 10, 4, 3, 3, seed=2)
        | kohya("lora_unet_plain", 4, None, 6, 7, seed=3)
    )
    found = audit(save(tmp_path, weights))
    records = {r.name: r for r in found.records}
    assert len(records) == 4 and found.skipped == ()
    for name, record in records.items():
        dense = torch.linalg.svdvals(update(weights, name))
        assert record.kind == "lora" and record.status == "ok"
        assert record.nuclear == pytest.approx(dense.sum().item(), rel=1e-6)
        assert record.ratio == pytest.approx((dense.sum() / dense.norm()).item(), rel=1e-6)
    assert records[unet].scale == 0.25 and records["lora_unet_conv_in"].scale == 1.5
    assert "no alpha" in records["lora_unet_plain"].notes[0] and records[unet].notes == ()


def test_half_precision_and_dora_are_understood(tmp_path):
    weights = {k: v.bfloat16() for k, v in kohya("m", 4, 2, 20, 16).items()}
    weights["m.dora_scale"] = torch.ones(20, 1)
    (record,) = audit(save(tmp_path, weights)).records
    dense = torch.linalg.svdvals(update(weights, "m"))
    assert record.nuclear == pytest.approx(dense.sum().item(), rel=1e-9)
    assert "DoRA" in record.notes[0]


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"m.hada_w1_a": (4, 2), "m.hada_w1_b": (2, 4)}, "LoHa's update is not a product"),
        ({"m.lokr_w1": (4, 2), "m.lokr_w2": (2, 4)}, "LoKr's update is a Kronecker product"),
        ({"m.lora_up.weight": (4, 2, 1, 1), "m.lora_down.weight": (2, 4, 1, 1),
          "m.lora_mid.weight": (2, 2, 3, 3)}, "lora_mid has three factors"),
        ({"m.lora_down.weight": (2, 4)}, r"m\.lora_up\.weight is missing"),
        ({"m.lora_up.weight": (4, 0), "m.lora_down.weight": (0, 4)}, r"down\.weight: it is empty"),
    ],
)  # fmt: skip
def test_what_is_no_product_of_two_factors_says_why(weights, reason, tmp_path):
    weights = {name: torch.ones(shape) for name, shape in weights.items()}
    with pytest.raises(ValueError, match=reason):
        audit(save(tmp_path, weights))


def test_the_names_of_diffusers_before_peft(tmp_path):
    A, B = torch.randn(4, 16), torch.randn(12, 4)
    weights = {"attn1.to_q_lora.down.weight": A, "attn1.to_q_lora.up.weight": B}
    (record,) = audit(save(tmp_path, weights)).records
    assert record.nuclear == pytest.approx(torch.linalg.svdvals((B @ A).double()).sum().item())
    assert "scale is unknown" in record.notes[0] and "scale is unknown" in table(
        audit(tmp_path / "x.safetensors")
    )


def test_a_network_of_kohyas_is_tracked_while_it_trains():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_down, self.lora_up = nn.Linear(9, 3, bias=False), nn.Linear(3, 7, bias=False)
            self.register_buffer("alpha", torch.tensor(6.0))

    model = nn.Sequential(Module())
    (record,) = SpectralTracker(model).measure().records
    product = (model[0].lora_up.weight @ model[0].lora_down.weight).detach().double() * 2
    assert record.scale == 2
    assert record.nuclear == pytest.approx(torch.linalg.svdvals(product).sum().item())


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_a_convolution_in_groups_is_listed_with_the_reason():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Linear(2, 2))
    config = peft.LoraConfig(r=2, target_modules=["0", "1"])
    tracker = SpectralTracker(peft.get_peft_model(model, config))
    assert [p.name.rpartition(".")[2] for p in tracker.pairs] == ["1"]
    ((name, reason),) = tracker.skipped
    assert "lora_A" in name and reason == "a convolution in 2 groups has a product for each"


def test_scales_and_active_adapters_are_those_of_the_moment():
    peft = pytest.importorskip("peft")
    config = {"target_modules": ["0"], "init_lora_weights": False}
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(6, 5)), peft.LoraConfig(r=2, **config), adapter_name="x"
    )
    model.add_adapter("y", peft.LoraConfig(r=2, **config))
    tracker = SpectralTracker(model, frozen=True)

    def noted():
        return {r.adapter: r.notes for r in tracker.measure().records}

    assert noted() == {"x": (), "y": ("not active",)} and "not active" in repr(tracker)
    model.set_adapter("y")
    assert noted() == {"x": ("not active",), "y": ()}
    before = tracker.measure().records[1]
    layer = model.base_model.model[0]
    layer.set_scale("y", 3)
    after = tracker.measure().records[1]
    assert after.scale == layer.scaling["y"] == 3 * before.scale
    assert after.nuclear == pytest.approx(3 * before.nuclear) and after.gap == before.gap


@pytest.mark.parametrize("leave", ["merge_and_unload", "unload", "delete_adapter"])
def test_an_adapter_that_has_left_the_model_is_not_measured_any_more(leave):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
    tracker = SpectralTracker(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert tracker.measure().defined
    getattr(model, leave)(*(["default"] if leave == "delete_adapter" else []))
    with pytest.raises(ValueError, match=r"lora_B.default.weight must still be in the model"):
        tracker.measure()


def test_an_adapter_that_is_switched_off_is_noted():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
    tracker = SpectralTracker(model)
    with model.disable_adapter():
        assert tracker.measure().records[0].notes == ("not active",)
    assert tracker.measure().records[0].notes == ()
