"""A truncated PEFT adapter loads in PEFT, and gives what the truncated products give."""

import json

import pytest
import torch

from mirrorflow.spectrum import audit
from mirrorflow.spectrum.truncate import plan_truncation, truncate

tf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_B.bias"),  # PEFT takes it for a sharded weight
]

WORDS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOKENS = torch.tensor([[5, 7, 11, 3, 9, 30], [4, 4, 8, 21, 6, 12]])


def llama():
    config = tf.LlamaConfig(
        hidden_size=24, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=16, **WORDS,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(config).double().eval()


def gpt2():
    torch.manual_seed(1)
    config = tf.GPT2Config(
        n_embd=24, n_layer=2, n_head=3, n_positions=8, tie_word_embeddings=False, **WORDS
    )
    return tf.GPT2LMHeadModel(config).double().eval()


def adapted(build, folder, **options):
    """Save an adapter of random products, and give its model."""
    config = peft.LoraConfig(init_lora_weights=False, **options)
    torch.manual_seed(2)
    model = peft.get_peft_model(build(), config).double().eval()
    for name, weight in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def truncated(update, k):
    """The truncated SVD of a dense update, of a convolution as a matrix."""
    U, values, Vh = torch.linalg.svd(update.flatten(1), full_matrices=False)
    return ((U[:, :k] * values[:k]) @ Vh[:k]).view_as(update)


def densely(model, ranks):
    """Merge the truncated dense updates of all layers into the base weights."""
    for name, layer in layers(model).items():
        update = layer.get_delta_weight("default").detach()
        layer.base_layer.weight.data += truncated(update, ranks[name])
        if layer.lora_bias["default"]:
            layer.base_layer.bias.data += layer.lora_B["default"].bias * layer.scaling["default"]
        layer.scaling["default"] = 0.0
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


CASES = {
    "plain": (llama, {"r": 6, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}),
    "rsLoRA": (llama, {"r": 6, "use_rslora": True, "target_modules": ["q_proj"]}),
    "patterns": (
        llama,
        {
            "r": 4, "lora_alpha": 5, "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"k_proj": 7, "layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 5, ".*down_proj": 3},
        },
    ),
    "Conv1D": (gpt2, {"r": 6, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "Embedding": (gpt2, {"r": 6, "target_modules": ["wte", "c_proj"], "fan_in_fan_out": True}),
    "bias": (gpt2, {"r": 5, "lora_bias": True, "target_modules": ["c_fc"], "fan_in_fan_out": True}),
}  # fmt: skip


@pytest.mark.parametrize("choice", [{"rank": 3}, {"energy": 0.8}])
@pytest.mark.parametrize("case", CASES)
def test_a_truncated_adapter_gives_the_logits_of_truncated_products(case, choice, tmp_path):
    build, options = CASES[case]
    model = adapted(build, tmp_path / "old", **options)
    report = truncate(tmp_path / "old", out=tmp_path / "new", **choice)
    assert report.skipped == () and len(report.records) == len(layers(model))
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path / "new").double().eval()
    ranks = {record.name: record.new_rank for record in report.records}
    for name, layer in layers(loaded).items():
        before = layers(model)[name]
        assert layer.r["default"] == ranks[name]
        assert layer.scaling["default"] == pytest.approx(before.scaling["default"], rel=1e-15)
    expected = logits(densely(model, ranks))
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-10)
    assert len({*ranks.values()}) == 1 or "rank" not in choice or case == "patterns"


def test_the_errors_are_those_of_the_dense_updates(tmp_path):
    model = adapted(llama, tmp_path / "old", r=6, target_modules=["q_proj", "k_proj"])
    report = plan_truncation(tmp_path / "old", error=0.5).report
    assert {record.new_rank for record in report.records} > {3}
    for record in report.records:
        update = layers(model)[record.name].get_delta_weight("default").detach()
        lost = torch.linalg.norm(update - truncated(update, record.new_rank))
        assert record.error == pytest.approx((lost / torch.linalg.norm(update)).item(), rel=1e-5)
        assert record.error <= 0.5 and record.energy >= 0.75


def test_equal_ranks_need_no_patterns_and_audit_reads_the_same_scales(tmp_path):
    adapted(llama, tmp_path / "old", r=6, lora_alpha=3, target_modules=["q_proj"])
    truncate(tmp_path / "old", rank=2, out=tmp_path / "new")
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 1)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    plan = plan_truncation(tmp_path / "old", energy=0.7)
    assert plan.config["rank_pattern"] and "rank_pattern" in plan.report.notes[0]
    plan.write(tmp_path / "energy")
    assert {r.scale for r in audit(tmp_path / "energy").records} == {0.5}


class Ends(torch.nn.Module):
    """Modules whose names end, or look like, those of others."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Module()
        self.a.fc = torch.nn.Linear(9, 9)
        self.x = torch.nn.Module()
        self.x.a = torch.nn.Module()
        self.x.a.fc = torch.nn.Linear(9, 9)
        first = torch.nn.ModuleList([torch.nn.Linear(9, 9)])
        self.net = torch.nn.ModuleList([first, *(torch.nn.Linear(9, 9) for _ in range(20))])
        self.conv = torch.nn.Conv2d(9, 7, 3)

    def forward(self, x):
        y = self.x.a.fc(self.a.fc(x))
        for layer in (self.net[0][0], *self.net[1:]):
            y = layer(y)
        return self.conv(y.view(-1, 9, 1, 1).expand(-1, 9, 3, 3)).flatten(1)


def test_patterns_hit_one_module_each_and_convolutions_are_truncated(tmp_path):
    torch.manual_seed(0)
    base = Ends().double()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    names = r".*fc|net\.0\.0|net\.[1-9]\d*|conv"
    config = peft.LoraConfig(r=5, lora_alpha=7, init_lora_weights=False, target_modules=names)
    model = peft.get_peft_model(base, config).double()
    model.save_pretrained(tmp_path / "old")
    report = truncate(tmp_path / "old", energy=0.9, out=tmp_path / "new")
    ranks = {record.name: record.new_rank for record in report.records}
    assert len({*ranks.values()}) > 2 and len(ranks) == 24
    again = Ends().double()
    again.load_state_dict(state)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "new").double()
    assert {name: m.r["default"] for name, m in layers(loaded).items()} == ranks
    x = torch.randn(4, 9, dtype=torch.float64)
    torch.testing.assert_close(loaded(x), densely(model, ranks)(x), rtol=0, atol=1e-10)


def test_what_is_saved_beside_the_products_is_copied(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 6}
    adapted(llama, old, **options)
    (old / "README.md").write_text("as it is")
    (old / "optimizer.pt").write_bytes(b"old shapes")
    (old / "adapter_model.bin").write_bytes(b"old weights")
    (old / "second").mkdir()
    (old / "second" / "adapter_config.json").write_text("{}")
    report = truncate(old, rank=2, out=new)
    assert {path.name for path in new.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert (new / "README.md").read_text() == "as it is"
    assert sum("old shapes" in note for note in report.notes) == 2
    assert [name for name, _ in report.skipped] == ["second"]
    before, after = (
        safetensors.load_file(folder / "adapter_model.safetensors") for folder in (old, new)
    )
    assert before.keys() == after.keys() and any("lm_head" in key for key in before)
    for key, value in before.items():
        assert "lora_" in key or after[key].equal(value)
    kept = json.loads((old / "adapter_config.json").read_text())
    changed = json.loads((new / "adapter_config.json").read_text())
    assert {k for k in kept if kept[k] != changed[k]} == {"r", "lora_alpha"}


def test_the_file_of_a_folder_is_written_with_its_configuration(tmp_path):
    adapted(llama, tmp_path / "old", r=6, target_modules=["q_proj"])
    file = tmp_path / "old" / "adapter_model.safetensors"
    truncate(file, rank=2, out=tmp_path / "new")
    assert audit(tmp_path / "new").records[0].shape == (24, 2, 24)
    (tmp_path / "old" / "adapter_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"adapter_config\.json must be beside the file, [^:]*got none$"
    ):
        plan_truncation(file, rank=2)


def test_a_folder_that_is_not_empty_and_the_input_are_refused(tmp_path):
    adapted(llama, tmp_path / "old", r=6, target_modules=["q_proj"])
    plan = plan_truncation(tmp_path / "old", rank=2)
    for out, said in ((tmp_path / "old", "differ from the input"), (tmp_path, "must be new")):
        with pytest.raises(ValueError, match=said):
            plan.write(out)
    (tmp_path / "empty").mkdir()
    plan.write(tmp_path / "empty")
    assert (tmp_path / "empty" / "adapter_config.json").exists()


def test_dora_is_truncated_before_its_normalization_and_says_so(tmp_path):
    model = adapted(llama, tmp_path / "old", r=6, use_dora=True, target_modules=["q_proj"])
    report = truncate(tmp_path / "old", rank=2, out=tmp_path / "new")
    assert all("DoRA" in record.notes[0] for record in report.records)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "new").double().eval()
    for name, layer in layers(model).items():
        update, scale = layer.get_delta_weight("default").detach(), layer.scaling["default"]
        left, values, right = torch.linalg.svd(update)
        layer.lora_B["default"].weight.data[:, :2] = left[:, :2] * values[:2] / scale
        layer.lora_A["default"].weight.data[:2] = right[:2]
        layer.lora_B["default"].weight.data[:, 2:] = 0
        assert name in layers(loaded)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "path_initial_model"),
        ({"use_bdlora": {"target_modules_bd_a": ["x"]}}, "use_bdlora"),
        ({"peft_type": "LOHA"}, "must be LORA"),
    ],
)
def test_adapters_whose_update_is_no_scaled_product_are_refused(changed, said, tmp_path):
    adapted(gpt2, tmp_path, r=4, target_modules=["c_fc"], fan_in_fan_out=True)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(ValueError, match=said):
        plan_truncation(tmp_path, rank=2)


def test_an_orthogonal_start_does_not_keep_odd_ranks_from_loading(tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, init_lora_weights="orthogonal", target_modules=["q_proj"])
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "old")
    report = truncate(tmp_path / "old", rank=1, out=tmp_path / "new")
    peft.PeftModel.from_pretrained(llama(), tmp_path / "new")
    assert any("orthogonal" in note for note in report.notes)


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 8, 8))
        self.fc = torch.nn.Linear(8, 8)

    def forward(self, x):
        return torch.einsum("bi,eio->bo", self.fc(x), self.weight)


class Mixture(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x):
        return self.experts(x)


def test_stacked_experts_keep_their_rank_beside_what_is_truncated(tmp_path):
    torch.manual_seed(0)
    base = Mixture()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["fc"], target_parameters=["experts.weight"],
        init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "old")
    report = truncate(tmp_path / "old", rank=2, out=tmp_path / "new")
    assert len(report.records) == 1 and "stacked experts" in report.skipped[0][1]
    again = Mixture()
    again.load_state_dict(state)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "new")
    found = {
        type(m).__name__: (m.r["default"], m.scaling["default"]) for m in layers(loaded).values()
    }
    assert found == {"Linear": (2, 1.5), "ParamWrapper": (4, 1.5)}


def test_the_benchmark_truncates_the_same_products_in_all_ways():
    from benchmarks import bench_truncate

    row = bench_truncate.product("a few", 2, 40)
    assert row["off the dense SVD, relative"] < 1e-6
    assert row["kohya's resize off it"] < 1e-5 and row["peft.convert_to_lora off it"] < 1e-5
    dense = row["dense SVDs in float64, seconds (one, times their number)"]
    assert row["ratio"] == pytest.approx(dense / row["seconds"])
