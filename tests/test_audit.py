"""`audit` reads from disk what `SpectralTracker` measures in memory, or says what is wrong."""

import json
import re
import shutil

import pytest
import torch
from torch import nn

from commands import call
from mirrorflow.spectrum import SpectralTracker, audit, table

safetensors = pytest.importorskip("safetensors.torch")
tf = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

WORDS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    "hidden_size": 24, "num_hidden_layers": 11, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 16,
}  # fmt: skip


def llama():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, **WORDS))


def gpt2():
    torch.manual_seed(1)
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=24, n_layer=2, n_head=3, n_positions=8, **WORDS))


def t5():
    torch.manual_seed(2)
    config = tf.T5Config(
        d_model=24, d_kv=5, d_ff=16, num_layers=2, num_heads=4, vocab_size=40,
        decoder_start_token_id=0,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


def phi3():
    torch.manual_seed(3)
    return tf.Phi3ForCausalLM(tf.Phi3Config(**{**LLAMA, "num_hidden_layers": 2}, **WORDS))


def falcon():
    torch.manual_seed(4)
    config = tf.FalconConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=True, **WORDS,
    )  # fmt: skip
    return tf.FalconForCausalLM(config)


def same(found, expected):
    ours = {(r.name.rpartition("model.")[2], r.adapter, r.head): r for r in found.records}
    theirs = {(r.name.rpartition("model.")[2], "", r.head): r for r in expected.records}
    assert {key[::2] for key in ours} == {key[::2] for key in theirs} and len(ours) == len(theirs)
    for (name, _, head), record in ours.items():
        other = theirs[name, "", head]
        assert record.shape == other.shape and record.status == other.status
        for number in ("nuclear", "frobenius", "ratio", "gap", "imbalance", "scale"):
            value = getattr(other, number)
            assert getattr(record, number) == pytest.approx(value, rel=1e-9, nan_ok=True)
    assert found.mean_ratio == pytest.approx(expected.mean_ratio, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("level", ["layer", "head"])
@pytest.mark.parametrize("build", [llama, gpt2, t5, phi3, falcon])
def test_a_saved_model_is_what_the_model_was(build, level, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    found = audit(tmp_path, level=level)
    expected = SpectralTracker(model, level=level).measure()
    # save_pretrained drops the name of the head's inner model for some architectures
    strip = {r.name.removeprefix("transformer.").removeprefix("model.") for r in expected.records}
    assert {
        r.name.removeprefix("transformer.").removeprefix("model.") for r in found.records
    } == strip
    assert found.mean_ratio == pytest.approx(expected.mean_ratio, rel=1e-9)
    assert found.ratio_of_means == pytest.approx(expected.ratio_of_means, rel=1e-9)
    if build is llama:
        same(found, expected)


def test_a_sharded_folder_is_read_across_its_files(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    same(audit(tmp_path), SpectralTracker(model).measure())
    same(audit(tmp_path / "model.safetensors.index.json"), SpectralTracker(model).measure())


def test_layers_come_in_their_order(tmp_path):
    llama().save_pretrained(tmp_path)
    layers = [int(r.name.split(".")[2]) for r in audit(tmp_path).records]
    assert layers == list(range(11))


def test_a_file_alone_is_measured_by_layer_and_needs_the_config_for_heads(tmp_path):
    gpt2().save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path / "alone.safetensors")
    assert len(audit(tmp_path / "alone.safetensors").records) == 2
    with pytest.raises(ValueError, match="the number of heads is unknown"):
        audit(tmp_path / "alone.safetensors", level="head")
    assert len(audit(tmp_path / "whole" / "model.safetensors", level="head").records) == 6


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "use_rslora": True},
        {"r": 2, "rank_pattern": {"k_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}},
        {"r": 2, "use_dora": True},
    ],
)
def test_a_peft_adapter_has_the_scale_of_its_configuration(options, tmp_path):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "embed_tokens"]
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, **options)
    model = peft.get_peft_model(llama(), config)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    found = audit(tmp_path)
    same(found, SpectralTracker(model).measure())
    assert len(found.records) == 23
    assert any("DoRA" in note for r in found.records for note in r.notes) == ("use_dora" in options)


def test_a_fresh_adapter_is_undefined_and_said_to_be(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    found = audit(tmp_path)
    assert found.undefined == 11 and found.to_dict()["summary"]["mean_ratio"] is None
    assert "11 undefined" in table(found)


def test_an_adapter_without_its_configuration_says_that_its_scale_is_unknown(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert "taken as 1" in audit(tmp_path).records[0].notes[0]


def test_another_kind_of_adapter_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(llama(), peft.LoHaConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"peft_type must be LORA, .* got LOHA"):
        audit(tmp_path)


def save(folder, **weights):
    safetensors.save_file({k.replace("__", "."): v.clone() for k, v in weights.items()}, folder)


def test_names_of_compiled_models_are_understood_and_pairs_can_be_named(tmp_path):
    file = tmp_path / "x.safetensors"
    Q, K = torch.randn(6, 4), torch.randn(6, 5)
    save(file, _orig_mod__a__q_proj__weight=Q, _orig_mod__a__k_proj__weight=K, up=Q, down=K)
    found = audit(file, pairs={"mlp": ("up.T", "down")}, match="^mlp|attention")
    assert [r.name for r in found.records] == ["a", "mlp"]
    assert found.records[0].nuclear == pytest.approx(found.records[1].nuclear)
    dense = torch.linalg.svdvals(Q.double().T @ K.double())
    assert found.records[1].nuclear == pytest.approx(dense.sum().item())
    with pytest.raises(
        ValueError, match=r"must name weights of the model, got 'donw'. Did you mean down"
    ):
        audit(file, pairs={"mlp": ("up.T", "donw")})


def test_broken_and_quantized_weights_are_told(tmp_path):
    file = tmp_path / "x.safetensors"
    Q = torch.randn(6, 6)
    save(
        file,
        a__q_proj__weight=Q, a__k_proj__weight=Q * torch.nan,
        b__q_proj__weight=Q.to(torch.float8_e4m3fn), b__k_proj__weight=Q.to(torch.float8_e4m3fn),
        c__q_proj__weight=Q.bfloat16(), c__k_proj__weight=Q.bfloat16(),
    )  # fmt: skip
    found = audit(file)
    assert [(r.name, r.status) for r in found.records] == [("a", "not finite"), ("c", "ok")]
    assert found.skipped == (("b", "stored as F8_E4M3: quantized"),)
    assert json.loads(found.to_json())["skipped"][0]["name"] == "b"


def test_empty_weights_are_listed(tmp_path):
    file = tmp_path / "x.safetensors"
    empty, full = torch.zeros(0, 4), torch.randn(6, 4)
    save(file, a__q_proj__weight=empty, a__k_proj__weight=empty, b__q_proj__weight=full,
         b__k_proj__weight=full)  # fmt: skip
    found = audit(file)
    assert [r.name for r in found.records] == ["b"] and found.skipped == (("a", "it is empty"),)
    with pytest.raises(ValueError, match="pair 'x' must not be empty, got 4 x 0 x 4"):
        audit(file, pairs={"x": ("a.q_proj.weight.T", "a.k_proj.weight")})


def test_arguments_that_are_wrong_are_named(tmp_path):
    file = tmp_path / "x.safetensors"
    save(file, a__q_proj__weight=torch.eye(4), a__k_proj__weight=torch.eye(4))
    with pytest.raises(ValueError, match=r"match must be a regular expression, got '\['"):
        audit(file, match="[")
    with pytest.raises(TypeError, match="pairs must be a mapping"):
        audit(file, pairs=["a.q_proj.weight"])


@pytest.mark.parametrize("level", ["layer", "head"])
@pytest.mark.parametrize("build", [llama, gpt2, falcon])
def test_values_and_outputs_are_found_in_a_file_too(build, level, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    options = {"level": level, "values": True, "match": "value-output"}
    found, expected = audit(tmp_path, **options), SpectralTracker(model, **options).measure()
    assert len(found.records) == len(expected.records) > 0
    assert found.mean_ratio == pytest.approx(expected.mean_ratio, rel=1e-9)
    assert found.records[0].label.count("V-O") == 1


def test_a_fused_weight_without_a_configuration_says_what_it_was_taken_for(tmp_path):
    file = tmp_path / "x.safetensors"
    save(file, blocks__0__attn__qkv__weight=torch.randn(24, 8))
    assert audit(file).records[0].notes[-1].startswith("its rows are taken for [Q, K, V]")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "num_heads": 2}))
    assert audit(file).records[0].notes == ()
    for unknown in ({"architecture": "maxvit_rmlp_nano_rw_256"}, {"model_type": "unheard_of"}):
        config.write_text(json.dumps(unknown))
        with pytest.raises(ValueError, match="order of the rows of qkv is not known for"):
            audit(file)


def test_the_vision_part_has_heads_and_an_architecture_of_its_own(tmp_path):
    file = tmp_path / "x.safetensors"
    save(
        file,
        visual__blocks__0__attn__qkv__weight=torch.randn(24, 8),
        model__layers__0__self_attn__q_proj__weight=torch.randn(8, 8),
        model__layers__0__self_attn__k_proj__weight=torch.randn(4, 8),
    )
    vision = {"model_type": "qwen2_vl_vision", "num_heads": 4}
    config = {"model_type": "qwen2_vl", "num_attention_heads": 2, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = audit(file, level="head")
    names = ["model.layers.0.self_attn"] * 2 + ["visual.blocks.0.attn"] * 4
    assert [r.name for r in found.records] == names


def test_the_normalization_of_llama_4_is_in_its_configuration(tmp_path):
    config = tf.Llama4TextConfig(
        **{**LLAMA, "num_hidden_layers": 2}, num_local_experts=2, head_dim=6,
        no_rope_layers=[1, 0], **WORDS,
    )  # fmt: skip
    tf.Llama4TextModel(config).save_pretrained(tmp_path)
    noted = [any("inert" in note for note in r.notes) for r in audit(tmp_path).records]
    assert noted == [True, False]


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "foreign"])
def test_a_damaged_or_foreign_file_is_an_error_that_names_it(damage, tmp_path):
    file = tmp_path / "x.safetensors"
    save(file, q_proj__weight=torch.eye(6), k_proj__weight=torch.eye(6))
    whole = file.read_bytes()
    file.write_bytes(
        {
            "truncated": whole[:-10],
            "header": whole[:8] + b"x" + whole[9:],
            "empty": b"",
            "foreign": b"GGUF" + bytes(100),
        }[damage]
    )
    with pytest.raises(ValueError, match=r"x\.safetensors must be a whole safetensors file"):
        audit(file)


def test_what_is_missing_or_unusable_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        audit(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must hold a safetensors file$"):
        audit(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds no weights by their names"):
        audit(tmp_path)
    save(tmp_path / "mlp.safetensors", fc__weight=torch.eye(6))
    with pytest.raises(ValueError, match=r"no LoRA or attention pairs [\s\S]*audit\(..., pairs="):
        audit(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        audit(tmp_path)


def test_a_folder_whose_shards_are_not_all_there_is_refused(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    first, *_ = sorted(tmp_path.glob("*.safetensors"))
    kept = first.read_bytes()
    first.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"must exist, as model.safetensors.index.json names it"
    ):
        audit(tmp_path)
    save(first, other=torch.eye(2))
    with pytest.raises(ValueError, match=r"must hold .* which the index names"):
        audit(tmp_path)
    first.write_bytes(kept)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match="must have a weight_map"):
        audit(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"lora_alpha": "x"}, "lora_alpha must be a number, got 'x'"),
        ({"lora_alpha": None}, "lora_alpha must be a number, got None"),
        ({"lora_alpha": 4, "alpha_pattern": [1]}, r"alpha_pattern must be of type dict, got \[1\]"),
        (
            {"lora_alpha": 4, "alpha_pattern": {"a": "b"}},
            "alpha_pattern must map patterns to numbers",
        ),
        (
            {"lora_alpha": 4, "alpha_pattern": {"(": 3}},
            r"alpha_pattern must hold regular expressions .*'\('",
        ),
    ],
)
def test_a_damaged_adapter_config_is_named(config, said, tmp_path):
    save(tmp_path / "x.safetensors", a__lora_A__weight=torch.eye(2, 4),
         a__lora_B__weight=torch.eye(4, 2))  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{said}"):
        audit(tmp_path)


@pytest.mark.parametrize("text", ["x", None, [], {}])
def test_an_odd_config_is_as_none(text, tmp_path):
    save(tmp_path / "x.safetensors", q_proj__weight=torch.eye(4), k_proj__weight=torch.eye(4))
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    assert audit(tmp_path).mean_ratio == pytest.approx(2.0)


def test_files_that_hold_the_same_names_are_not_mixed(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / f"{name}.safetensors", q_proj__weight=torch.eye(4),
             k_proj__weight=torch.eye(4))  # fmt: skip
    with pytest.raises(
        ValueError,
        match=r"k_proj.weight must stand in one file .*a\.safetensors and b\.safetensors",
    ):
        audit(tmp_path)
    assert audit(tmp_path / "b.safetensors").mean_ratio == pytest.approx(2.0)


def test_an_index_says_which_of_two_is_meant(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    more = safetensors.load_file(first)
    other = {k: torch.zeros_like(v) for k, v in safetensors.load_file(second).items()}
    safetensors.save_file(more | other, first)
    same(audit(tmp_path), SpectralTracker(model).measure())


def test_a_folder_of_folders_says_which_to_name(tmp_path):
    for step in (4, 8):
        llama().save_pretrained(tmp_path / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="there are some in checkpoint-4, checkpoint-8: name one"):
        audit(tmp_path)


def test_a_second_adapter_is_not_left_out_silently(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(), config)
    model.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=1, target_modules=["k_proj"]))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "checkpoint-3")
    found = audit(tmp_path)
    assert len(found.records) == 11
    assert found.skipped == (("other", "another adapter, in a folder of its own: audit that"),)
    assert {r.scale for r in audit(tmp_path / "other").records} == {1 / 3}


def test_a_gguf_file_and_a_folder_as_a_file_are_told(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "x.gguf"):
        with pytest.raises(
            ValueError, match=r"a GGUF file, .* SpectralTracker\(model, frozen=True"
        ):
            audit(path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"model\.safetensors must be a plain file, got a folder"):
        audit(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_what_is_named_has_to_be_floating_too(dtype, tmp_path):
    file = tmp_path / "x.safetensors"
    save(file, up=torch.ones(4, 4, dtype=dtype), down=torch.ones(4, 4))
    with pytest.raises(
        ValueError, match=r"up must hold floating-point numbers, got .* Dequantize it first"
    ):
        audit(file, pairs={"mlp": ("up", "down")})


def test_only_one_pair_is_in_memory(tmp_path, monkeypatch):
    from mirrorflow.spectrum.audit import Checkpoint

    llama().save_pretrained(tmp_path)
    alive, most = [], 0
    original = Checkpoint.load

    def load(self, factor):
        nonlocal most
        tensor = original(self, factor)
        alive.append(torch.utils.weak.WeakIdRef(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "load", load)
    audit(tmp_path)
    assert len(alive) == 22 and most <= 2


def test_fused_weights_are_read_in_part(tmp_path):
    model = nn.MultiheadAttention(12, 3)
    safetensors.save_file(model.state_dict(), tmp_path / "x.safetensors")
    expected = SpectralTracker(model).measure()
    assert audit(tmp_path).mean_ratio == pytest.approx(expected.mean_ratio, rel=1e-9)


def test_the_page_holds_all_products_and_needs_no_network(tmp_path, monkeypatch, capsys):
    weights = {
        "a<b.q_proj.weight": torch.randn(8, 8), "a<b.k_proj.weight": torch.randn(8, 8),
        "zero.q_proj.weight": torch.zeros(8, 8), "zero.k_proj.weight": torch.randn(8, 8),
        "odd.query_key_value.weight": torch.randn(24, 8),
    }  # fmt: skip
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    page = tmp_path / "deep" / "page.html"
    assert call(monkeypatch, "audit", tmp_path, "--page", page) == 0
    assert str(page) in capsys.readouterr().err
    text = page.read_text()
    assert "a&lt;b" in text and "<td>a<b" not in text
    assert "2 products; mean ratio" in text and "1 are 0 and have no ratio" in text
    assert "odd.query_key_value.weight: " in text and "undefined" in text
    body = re.sub(r"<script.*?</script>", "", text, flags=re.S)  # libraries name their licences
    assert not re.search(r'(?:src|href)="(?!data:|#)', body)
    assert 'id="audit-ratio"' in body and ">99%</th>" in body and ">random</th>" in body
    # A point of the charts is found in the table by its number.
    assert ">no.</th>" in body and re.findall(r"<tr><td class=number>(\d)<", body) == ["1", "2"]


@pytest.mark.slow
def test_the_page_tells_the_two_products_of_attention_apart(tmp_path):
    from mirrorflow.lab.report.checkpoint import audit_page

    gpt2().save_pretrained(tmp_path)
    content = audit(tmp_path, values=True).to_dict()
    page = audit_page(content, "gpt2", tmp_path / "page.html", "0").read_text()
    names = re.findall(r"<td>([^<]*h\.\d\.attn[^<]*)</td>", page)
    assert len(names) == len(set(names)) == 4 and sum("V-O" in name for name in names) == 2
