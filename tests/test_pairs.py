"""The pairs that are found in the libraries' own models, against products that are really formed.

The oracle shares nothing with the finder: dense SVDs of W_Q^T W_K, with the weights taken out of
the modules by hand, and of PEFT's own `get_delta_weight`.
"""

import pytest
import torch
from torch import nn

from mirrorflow.spectrum import SpectralTracker
from mirrorflow.spectrum.pairs import clean

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

D, HEADS, LAYERS = 24, 4, 2
SMALL = {
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 16,
}
WORDS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2():
    tf = pytest.importorskip("transformers")
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=D, n_layer=LAYERS, n_head=HEADS, n_positions=16, **WORDS)
    )


def gpt2_cross():
    tf = pytest.importorskip("transformers")
    return tf.GPT2Model(
        tf.GPT2Config(
            n_embd=D, n_layer=1, n_head=HEADS, n_positions=16, add_cross_attention=True, **WORDS
        )
    )


def llama():
    tf = pytest.importorskip("transformers")
    return tf.LlamaForCausalLM(tf.LlamaConfig(num_key_value_heads=2, **SMALL, **WORDS))


def mistral():
    tf = pytest.importorskip("transformers")
    config = tf.MistralConfig(num_key_value_heads=1, head_dim=8, **SMALL, **WORDS)
    return tf.MistralForCausalLM(config)


def qwen3():
    tf = pytest.importorskip("transformers")
    config = tf.Qwen3Config(num_key_value_heads=2, head_dim=8, **SMALL, **WORDS)
    return tf.Qwen3ForCausalLM(config)


def bert():
    tf = pytest.importorskip("transformers")
    return tf.BertModel(tf.BertConfig(max_position_embeddings=16, **SMALL, **WORDS))


def vit():
    tf = pytest.importorskip("transformers")
    return tf.ViTModel(tf.ViTConfig(image_size=8, patch_size=4, **SMALL))


def t5():
    tf = pytest.importorskip("transformers")
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            d_model=D, d_kv=5, d_ff=16, num_layers=LAYERS, num_heads=HEADS,
            vocab_size=40, decoder_start_token_id=0,
        )
    )  # fmt: skip


def distilbert():
    tf = pytest.importorskip("transformers")
    config = tf.DistilBertConfig(
        dim=D, n_layers=LAYERS, n_heads=HEADS, hidden_dim=16, max_position_embeddings=16,
        vocab_size=40, pad_token_id=0,
    )  # fmt: skip
    return tf.DistilBertModel(config)


def phi3():
    tf = pytest.importorskip("transformers")
    return tf.Phi3ForCausalLM(tf.Phi3Config(num_key_value_heads=2, **SMALL, **WORDS))


class TimmAttention(nn.Module):
    """As timm's: one Linear for Q, K and V, rows [Q, K, V]."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()


def timm():
    return nn.Sequential(TimmAttention(D, HEADS), TimmAttention(D, HEADS))


def torch_encoder():
    layer = nn.TransformerEncoderLayer(D, HEADS, 16)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)


def kdim():
    return nn.MultiheadAttention(D, HEADS, kdim=10, vdim=7)


def beside(query, key):
    """Q and K as modules of one attention module, weights (out, in)."""
    return lambda module: (getattr(module, query).weight, getattr(module, key).weight)


def conv1d(module):
    return module.c_attn.weight.T[:D], module.c_attn.weight.T[D : 2 * D]


def thirds(weight):
    return weight[: len(weight) // 3], weight[len(weight) // 3 : 2 * len(weight) // 3]


def cross(module):
    if hasattr(module, "q_attn"):
        return module.q_attn.weight.T, module.c_attn.weight.T[:D]
    return conv1d(module)


def phi(module):
    weight = module.qkv_proj.weight
    return weight[:D], weight[D : D + 2 * (D // HEADS)]


def neox():
    tf = pytest.importorskip("transformers")
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL, **WORDS))


def bloom():
    tf = pytest.importorskip("transformers")
    config = tf.BloomConfig(hidden_size=D, n_layer=LAYERS, n_head=HEADS, **WORDS)
    return tf.BloomForCausalLM(config)


def falcon(**options):
    def build():
        tf = pytest.importorskip("transformers")
        return tf.FalconForCausalLM(tf.FalconConfig(**SMALL, **WORDS, **options))

    return build


def divided(split):
    """Q and K as the model's own code divides them: its output for the identity."""

    def weights(module):
        fused = module.query_key_value.weight.detach().T[None]
        return tuple(part.mT.flatten(0, 1) for part in split(module, fused))  # (heads x width, in)

    return weights


def neox_split(module, fused):
    """As in GPTNeoXAttention.forward: (heads, in, width) each."""
    return fused[0].view(D, -1, 3 * module.head_size).transpose(0, 1).chunk(3, dim=-1)[:2]


def bloom_split(module, fused):
    return [part[0] for part in module._reshape(fused)[:2]]


def falcon_split(key_heads):
    def split(module, fused):
        query, key, _ = (part[0].transpose(0, 1) for part in module._split_heads(fused))
        return query, key[:: max(1, len(key) // key_heads)]  # each key head once

    return split


# build, the weights of an attention module, query heads, key heads
FAMILIES = {
    "gpt2": (gpt2, conv1d, 4, 4),
    "gpt2 cross": (gpt2_cross, cross, 4, 4),
    "llama": (llama, beside("q_proj", "k_proj"), 4, 2),
    "mistral": (mistral, beside("q_proj", "k_proj"), 4, 1),
    "qwen3": (qwen3, beside("q_proj", "k_proj"), 4, 2),
    "bert": (bert, beside("query", "key"), 4, 4),
    "vit": (vit, beside("q_proj", "k_proj"), 4, 4),
    "t5": (t5, beside("q", "k"), 4, 4),
    "distilbert": (distilbert, beside("q_lin", "k_lin"), 4, 4),
    "phi3": (phi3, phi, 4, 2),
    "timm": (timm, lambda m: thirds(m.qkv.weight), 4, 4),
    "torch": (torch_encoder, lambda m: thirds(m.in_proj_weight), 4, 4),
    "neox": (neox, divided(neox_split), 4, 4),
    "bloom": (bloom, divided(bloom_split), 4, 4),
    "falcon rw": (falcon(multi_query=False), divided(falcon_split(4)), 4, 4),
    "falcon 7b": (falcon(multi_query=True), divided(falcon_split(1)), 4, 1),
    "falcon 40b": (
        falcon(new_decoder_architecture=True, num_kv_heads=2),
        divided(falcon_split(2)),
        4,
        2,
    ),
    "torch kdim": (kdim, lambda m: (m.q_proj_weight, m.k_proj_weight), 4, 4),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    torch.manual_seed(0)
    build, weights, heads, key_heads = FAMILIES[request.param]
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model, weights, heads, key_heads


def attention(model, name):
    """The module that a pair names: the model itself has no name of its own."""
    return model if name == "attention" else model.get_submodule(name)


def check(record, product, scale=1.0):
    dense = torch.linalg.svdvals(product.detach().double()) * abs(scale)
    assert record.status == "ok"
    assert record.nuclear == pytest.approx(dense.sum().item(), rel=1e-6)
    assert record.frobenius == pytest.approx(dense.norm().item(), rel=1e-6)
    assert record.spectral == pytest.approx(dense[0].item(), rel=1e-6)
    assert record.ratio == pytest.approx((dense.sum() / dense.norm()).item(), rel=1e-6)


def test_attention_of_whole_layers_and_of_heads_agrees_with_dense_products(family):
    model, weights, heads, key_heads = family
    tracker = SpectralTracker(model)
    expected = [n for n, m in model.named_modules() if _holds(m, weights)]
    assert {p.name for p in tracker.pairs} == {name or "attention" for name in expected}
    whole = tracker.measure().records
    by_head = SpectralTracker(model, level="head").measure().records
    assert len(whole) == len(tracker.pairs) and len(by_head) == heads * len(whole)
    for i, record in enumerate(whole):
        Q, K = (w.detach().double() for w in weights(attention(model, record.name)))
        Qs, Ks = Q.unflatten(0, (heads, -1)), K.unflatten(0, (key_heads, -1))
        Ks = Ks.repeat_interleave(heads // key_heads, 0)
        A, B = Qs.flatten(0, 1).T, Ks.flatten(0, 1)
        check(record, A @ B)
        assert record.gap == pytest.approx(
            ((A.norm() ** 2 + B.norm() ** 2) / 2 - torch.linalg.svdvals(A @ B).sum()).item()
        )
        assert record.imbalance == pytest.approx((A.T @ A - B @ B.T).norm().item())
        for head in range(heads):
            part = by_head[i * heads + head]
            assert (part.name, part.head) == (record.name, head)
            check(part, Qs[head].T @ Ks[head])


def _holds(module, weights):
    try:
        return weights(module) is not None
    except (AttributeError, TypeError):
        return False


def test_normalized_and_shared_heads_are_noted():
    (pair, *_) = SpectralTracker(qwen3()).pairs
    assert any("scale is inert" in note for note in pair.notes)
    assert any("4 query heads share 2 key heads" in note for note in pair.notes)
    assert SpectralTracker(timm()).pairs[0].notes == ()  # its q_norm is the identity


def adapted(model, targets, name="default", **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config, adapter_name=name)


@pytest.mark.parametrize("options", [{"r": 4, "lora_alpha": 12}, {"r": 9, "use_rslora": True}])
@pytest.mark.parametrize(
    ("build", "targets"),
    [(llama, ["q_proj", "embed_tokens"]), (gpt2, ["c_attn", "wte"]), (bert, ["query"])],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_lora_agrees_with_the_update_that_peft_forms(build, targets, options):
    torch.manual_seed(1)
    model = adapted(build(), targets, **options)
    tracker = SpectralTracker(model)
    records = tracker.measure().records
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    assert {r.name for r in records} == set(layers) and len(records) == len(layers)
    assert all(r.kind == "lora" and r.adapter == "default" for r in records)
    for record in records:
        layer = layers[record.name]
        check(record, layer.get_delta_weight("default"))
        assert record.scale == layer.scaling["default"]
    assert {p.name for p in tracker.frozen} or build is bert  # attention below does not train


def test_lora_on_a_convolution_is_the_product_of_its_flattened_weights():
    model = adapted(nn.Sequential(nn.Conv2d(3, 8, 3)), ["0"], r=2)
    (record,) = SpectralTracker(model).measure().records
    layer = model.base_model.model[0]
    check(record, layer.get_delta_weight("default").flatten(1))


def test_several_adapters_and_dora_are_told_apart():
    peft = pytest.importorskip("peft")
    model = adapted(llama(), ["q_proj"], name="first", r=2)
    model.add_adapter(
        "second",
        peft.LoraConfig(
            r=3, target_modules=["k_proj"], use_dora=True, lora_alpha=6, init_lora_weights=False
        ),
    )
    model.add_adapter("third", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    records = SpectralTracker(model, frozen=True, match="lora").measure().records
    found = {(r.name.rpartition(".")[2], r.adapter, r.shape[1], r.scale) for r in records}
    assert found == {
        ("q_proj", "first", 2, 4),
        ("k_proj", "second", 3, 2),
        ("q_proj", "third", 2, 4),
    }
    notes = {r.adapter: r.notes for r in records}
    assert notes["first"] == () and notes["third"] == ("not active",)
    assert "DoRA" in notes["second"][-1]
    assert {r.adapter for r in records if r.status == "undefined"} == {"third"}
    by_default = SpectralTracker(model, match="lora").measure().records
    assert {r.adapter for r in by_default} == {"first"}  # the active adapter is the one that trains


def test_attention_below_adapters_is_measured_as_base_weights():
    model = adapted(llama(), ["q_proj"], r=2)
    pairs = SpectralTracker(model, frozen=True, match="attention").pairs
    assert len(pairs) == LAYERS and all("base weights" in p.notes[-1] for p in pairs)


def test_adalora_and_interleaved_weights_are_listed_and_not_measured():
    peft, tf = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=3, target_r=2)
    tracker = SpectralTracker(peft.get_peft_model(llama(), config), frozen=True)
    assert any("third factor" in reason for _, reason in tracker.skipped)
    fused = nn.ModuleDict({"query_key_value": nn.Linear(8, 24)})
    with pytest.raises(ValueError, match="differs from model to model"):
        SpectralTracker(fused)
    codegen = tf.CodeGenConfig(n_embd=24, n_layer=1, n_head=4, rotary_dim=2, **WORDS)
    with pytest.raises(ValueError, match="codegen stores its rows in an order of its own"):
        SpectralTracker(tf.CodeGenForCausalLM(codegen))


def test_stacked_experts_are_not_one_product():
    peft, tf = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = tf.MixtralConfig(num_local_experts=2, num_key_value_heads=2, **SMALL, **WORDS)
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    model = peft.get_peft_model(tf.MixtralForCausalLM(config), peft.LoraConfig(r=2, **targets))
    tracker = SpectralTracker(model)
    assert {p.name.rpartition(".")[2] for p in tracker.pairs} == {"q_proj"}
    assert any("stacked experts" in reason for _, reason in tracker.skipped)


def test_users_name_the_pairs_that_are_not_known():
    model = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 5), nn.Linear(7, 3))
    with pytest.raises(
        ValueError, match=r"no LoRA or attention pairs .* Sequential[\s\S]*Name them"
    ):
        SpectralTracker(model)
    named = {"mlp": ("2.weight", "0.weight"), "turned": ("0.weight.T", "3.weight")}
    records = SpectralTracker(model, pairs=named).measure().records
    first, second, third = model[0].weight, model[2].weight, model[3].weight
    check(records[0], second @ first)
    check(records[1], first.T @ third)
    assert records[0].kind == "named" and records[0].shape == (5, 3, 6)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("2.weight", "0.wieght"), r"got '0.wieght'. Did you mean 0.weight"),
        (("0.weight", "2.weight"), r"one inner dimension, got .* Append .T"),
        (("2.bias", "0.weight"), "must be a matrix"),
        ("2.weight", "must hold two names, .* got '2.weight'"),
        (("2.weight", "0.weight", 2), "heads must be a whole number that divides 3, got 2"),
        (("2.weight[1:4]", "0.weight"), r"rows must lie within 0:3, got 2.weight\[1:4\]"),
    ],
)
def test_a_wrong_name_says_what_is_wrong(pair, message):
    model = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 5))
    with pytest.raises(ValueError, match=message):
        SpectralTracker(model, pairs={"mlp": pair})


def test_named_pairs_take_rows_of_a_weight_and_heads():
    torch.manual_seed(0)
    model = nn.ModuleDict({"in": nn.Linear(10, 24), "conv": nn.Linear(24, 10)})
    named = {
        "whole": ("in.weight[:8].T", "in.weight[8:16]"),
        "heads": ("in.weight[:8].T", "in.weight[8:16]", 2),
        "turned": ("conv.weight[16:]", "conv.weight[:8].T", 2),  # stored as a Conv1D is
    }
    Q, K, _ = model["in"].weight.detach().chunk(3)
    for level, heads in (("layer", 1), ("head", 2)):
        records = SpectralTracker(model, level=level, pairs=named).measure().records
        found = {(r.name, r.head or 0): r for r in records}
        check(found["whole", 0], Q.T @ K)
        for head, (a, b) in enumerate(zip(Q.chunk(heads), K.chunk(heads), strict=True)):
            check(found["heads", head], a.T @ b)
        _, _, V = model["conv"].weight.detach().T.chunk(3)
        first = model["conv"].weight.detach().T[:8]
        for head, (a, b) in enumerate(zip(V.chunk(heads), first.chunk(heads), strict=True)):
            check(found["turned", head], a.T @ b)
    assert len(found) == 5


def test_named_pairs_have_to_be_a_mapping():
    with pytest.raises(TypeError, match=r'pairs must be a mapping, got list. Write \{"mlp": '):
        SpectralTracker(nn.Linear(3, 3), pairs=[("weight", "weight")])


def test_a_match_that_is_no_regular_expression_is_named():
    with pytest.raises(
        ValueError, match=r"match must be a regular expression, got '\(': missing \)"
    ):
        SpectralTracker(nn.MultiheadAttention(8, 2), match="(")


def test_grouped_heads_of_unknown_number_are_listed():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 4)

    with pytest.raises(ValueError, match="Q has 8 rows, K has 4, and the number of heads"):
        SpectralTracker(Attention())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_orig_mod.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight"),
        ("h.0._fsdp_wrapped_module.q_proj.base_layer.weight", "h.0.q_proj.weight"),
        ("h.0._checkpoint_wrapped_module._orig_mod.q.weight", "h.0.q.weight"),
        ("module.base_layers.weight", "module.base_layers.weight"),
    ],
)
def test_the_names_of_wrappers_are_dropped(name, expected):
    assert clean(name) == expected
