"""Notes on attention: what no product shows, and what names and configuration add."""

import pytest
import torch
from torch import nn

from attention import forward, prepared
from mirrorflow.spectrum import SpectralTracker, audit
from mirrorflow.spectrum.audit import heads
from test_layouts import EXPERTS, GEMMA4, GROUPED, HALF, PARTLY, SHORT, SMALL, D, Timm

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


class Config:
    def __init__(self, model_type):
        self.model_type = model_type


@pytest.mark.parametrize(
    ("weight", "model_type", "reason"),
    [
        (
            "qkv",
            "unheard_of",
            "order of the rows of qkv is not known for unheard_of: name the pair",
        ),
        ("qkv_proj", "minimax", "minimax passes Q and K through an activation"),
        ("qkv_proj", "codegen", "codegen stores its rows in an order of its own"),
        ("wqkv", "", "order of the rows of wqkv is not known without the model"),
        ("query_key_value", "", "differs from model to model"),
        ("kv_b_proj", "deepseek_v3", "latent attention forms K through a norm"),
        ("q_b_proj", "deepseek_v4", "latent attention forms Q through a norm"),
        ("q_proj", "gemma4_text", "there is no K beside it: it is another layer's"),
    ],
)
def test_an_order_that_is_not_known_is_listed_with_the_reason(weight, model_type, reason):
    model = nn.ModuleDict({"a": nn.ModuleDict({weight: nn.Linear(D, 3 * D)}), "b": Timm(True)})
    model["a"].config = Config(model_type)
    tracker = SpectralTracker(model)
    assert [p.name for p in tracker.pairs] == ["b"]
    ((name, said),) = tracker.skipped
    assert name == f"a.{weight}.weight" and reason in said


def test_two_thirds_of_a_fused_weight_are_not_taken_for_three():
    model = Timm(False)
    model.qkv = nn.Linear(D, 2 * D)  # timm's GCViT has K and V alone in it
    with pytest.raises(ValueError, match="48 x 24 divides into Q, K and V is unknown"):
        SpectralTracker(model)


def test_the_lightning_attention_of_minimax_is_refused_and_its_other_layers_are_not():
    tf = pytest.importorskip("transformers")
    options = {**HALF, "num_hidden_layers": 2, "num_local_experts": 2}
    layers = ["linear_attention", "full_attention"]
    model = tf.MiniMaxModel(tf.MiniMaxConfig(**options, layer_types=layers))
    tracker = SpectralTracker(model)
    assert [p.name for p in tracker.pairs] == ["layers.1.self_attn"]
    ((name, reason),) = tracker.skipped
    assert name == "layers.0.self_attn.qkv_proj.weight" and "through an activation" in reason


def test_a_weight_that_q_and_k_share_and_those_that_are_no_linear_modules_are_told():
    tf = pytest.importorskip("transformers")
    options = {
        "attn_layers": ["lsh", "local"],
        "axial_pos_shape": [2, 4],
        "axial_pos_embds_dim": [8, 16],
        "num_hidden_layers": 2,
    }
    config = tf.ReformerConfig(**SMALL | options, attention_head_size=6, feed_forward_size=16)
    tracker = SpectralTracker(tf.ReformerModel(config))
    assert len(tracker.pairs) == 1
    ((name, reason),) = tracker.skipped
    assert name.endswith("query_key.weight") and "it is the same W for both" in reason

    model = prepared(tf.XLNetModel(tf.XLNetConfig(d_model=D, n_layer=1, n_head=4, d_inner=16)))
    with pytest.raises(ValueError, match=r"rel_attn.q: XLNet's Q and K are not Linear") as raised:
        SpectralTracker(model)
    named = {"0": ("layer.0.rel_attn.q", "layer.0.rel_attn.k.T", 4)}
    assert "('layer.0.rel_attn.q', 'layer.0.rel_attn.k.T', heads)" in str(raised.value)
    records = SpectralTracker(model, pairs=named, level="head").measure().records
    layer = model.layer[0].rel_attn
    products = torch.einsum("ihd,jhd->hij", layer.q.detach(), layer.k.detach())
    for record, product in zip(records, products, strict=True):
        assert record.nuclear == pytest.approx(torch.linalg.svdvals(product).sum().item())


def test_heads_of_cvt_are_those_of_its_projections_and_the_convolution_is_noted(tmp_path):
    tf = pytest.importorskip("transformers")
    config = tf.CvtConfig(depth=[1, 2, 3], embed_dim=[8, 16, 24], num_heads=[1, 2, 3])
    model = prepared(tf.CvtModel(config))
    tracker = SpectralTracker(model, level="head")
    written = SpectralTracker(model, match="value", values=True).pairs
    pairs = (*tracker.pairs, *written)
    assert len(written) == 6 and all("after a convolution" in pair.notes[-1] for pair in pairs)
    records = tracker.measure().records
    assert [r.head for r in records] == [0, *[0, 1] * 2, *[0, 1, 2] * 3]
    last = model.encoder.stages[2].layers[2].attention.attention
    Q, K = last.projection_query.weight[16:], last.projection_key.weight[16:]
    dense = torch.linalg.svdvals((Q.mT @ K).detach())
    assert records[-1].nuclear == pytest.approx(dense.sum().item())
    model.save_pretrained(tmp_path)
    assert [r.head for r in audit(tmp_path, level="head").records] == [r.head for r in records]


@pytest.mark.parametrize(
    ("query", "key"),
    [
        ("c_q", "c_k"), ("W_q", "W_k"), ("to_q", "to_k"), ("query_proj", "key_proj"), ("wq", "wk"),
        ("linear_q", "linear_k"), ("Wq", "Wk"), ("q_lin", "k_lin"), ("q", "k"), ("query", "key"),
    ],
)  # fmt: skip
def test_the_names_of_separate_projections(query, key):
    model = nn.ModuleDict({query: nn.Linear(8, 6), key: nn.Linear(5, 6)})
    (record,) = SpectralTracker(model).measure().records
    dense = torch.linalg.svdvals((model[query].weight.mT @ model[key].weight).detach().double())
    assert record.nuclear == pytest.approx(dense.sum().item()) and record.shape == (8, 6, 5)


def test_linear_attention_over_a_convolution_is_refused_and_latent_attention_said_once():
    tf = pytest.importorskip("transformers")
    linear = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
    widths = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    model = tf.OlmoHybridModel(tf.OlmoHybridConfig(**GROUPED | linear | widths))
    tracker = SpectralTracker(model)
    assert [p.name for p in tracker.pairs] == ["layers.1.self_attn"]
    ((name, reason),) = tracker.skipped
    assert name == "layers.0.linear_attn.q_proj.weight" and "K passes a convolution" in reason
    for rank in (8, None):  # with q_a and q_b, and with q_proj
        config = tf.DeepseekV3Config(**SMALL, q_lora_rank=rank, kv_lora_rank=8)
        with pytest.raises(ValueError, match="latent attention forms K") as caught:
            SpectralTracker(tf.DeepseekV3Model(config))
        assert str(caught.value).count("\n") == 2


def test_convolved_keys_of_zaya_are_refused():
    tf = pytest.importorskip("transformers")
    model = tf.ZayaModel(tf.ZayaConfig(**HALF | EXPERTS | {"num_experts_per_tok": 1}))
    with pytest.raises(ValueError, match="K passes a convolution over the tokens"):
        SpectralTracker(model)


def test_layers_that_borrow_their_keys_are_listed():
    tf = pytest.importorskip("transformers")
    options = HALF | SHORT | GEMMA4 | {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
    kinds = ["sliding_attention", "full_attention"] * 2
    model = tf.Gemma4TextModel(tf.Gemma4TextConfig(**options, layer_types=kinds))
    tracker = SpectralTracker(model, values=True)
    assert {p.name for p in tracker.pairs} == {"layers.0.self_attn", "layers.1.self_attn"}
    assert [name for name, _ in tracker.skipped] == [
        f"layers.{i}.self_attn.q_proj.weight" for i in (2, 3)
    ]
    notes = {p.kind: p.notes[-1] for p in tracker.pairs}
    assert notes["value-output"].startswith("V is normalized: its scale is inert")


@pytest.mark.parametrize(
    ("model_type", "kind", "inert"),
    [
        *(("muse_spark_text", "attention", True), ("muse_spark_vision", "attention", False)),
        *(("gemma4_text", "value-output", True), ("gemma4_audio", "value-output", False)),
    ],
)
def test_what_one_part_of_a_model_normalizes_is_not_said_of_another(model_type, kind, inert):
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})
    model.config = Config(model_type)
    (pair,) = [p for p in SpectralTracker(model, values=True).pairs if p.kind == kind]
    assert any("scale is inert" in note for note in pair.notes) == inert


def test_the_clipped_projections_of_the_encoders_of_gemma_4():
    tf = pytest.importorskip("transformers")
    config = tf.Gemma4VisionConfig(**HALF, patch_size=4, position_embedding_size=4)
    torch.manual_seed(0)
    model = prepared(tf.Gemma4VisionModel(config))
    module = model.get_submodule("encoder.layers.0.self_attn")
    x, turn = torch.zeros(D, 1, D, dtype=torch.float64), torch.ones(D, 1, 8, dtype=torch.float64)
    still = {"position_embeddings": (turn, 0 * turn), "position_ids": torch.zeros(D, 1, 2).long()}
    q, k, out = forward(model, module, lambda _: module(hidden_states=x, **still))
    tracker = SpectralTracker(model, level="head", match="attention")
    assert tracker.pairs[0].notes[0] == "its clipping is left out"
    k = k.repeat_interleave(2, 1)
    for record, a, b in zip(tracker.measure().records, q.unbind(1), k.unbind(1), strict=True):
        assert record.frobenius == pytest.approx((a @ b.T).norm().item())
    (whole,) = SpectralTracker(model, match="value", values=True).measure().records
    assert whole.frobenius == pytest.approx(out.norm().item())


def test_a_scale_for_each_dimension_of_q_is_noted():
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 6), "k_proj": nn.Linear(8, 6)})
    model.per_dim_scale = nn.Parameter(torch.ones(6))
    (pair,) = SpectralTracker(model).pairs
    assert pair.notes == ("per_dim_scale scales the dimensions of Q: it is left out",)


@pytest.mark.parametrize(
    ("config", "module", "expected"),
    [
        ({"hidden_size": 32, "num_attention_heads": 4}, "layers.0.self_attn", (4, 8)),
        ({"n_embd": 32, "n_head": 4, "head_dim": 5}, "h.0.attn", (4, 5)),
        ({"embed_dim": 16, "hidden_size": 64, "num_heads": 4}, "blocks.0.attn", (4, 4)),
        ({"hidden_size": 32, "num_attention_heads": 4, "head_ratio": 2}, "x.self", (2, None)),
        ({"num_heads": [2, 4], "embed_dim": 8}, "encoder.layers.1.blocks.0.attention", (4, None)),
        ({"decoder_attention_heads": 3, "num_attention_heads": 4}, "decoder.0", (3, None)),
        ({"num_decoder_attention_heads": 3}, "decoder.layers.0.cross_attn", (3, None)),
        ({"num_heads": 4, "vision_config": {"num_heads": 2}}, "visual.blocks.0.attn", (2, None)),
        ({"decoder_config": {"num_heads": 2}, "encoder_config": {"num_heads": 3}},
         "decoder.layers.0.encoder_attn", (2, None)),
        ({"thinker_config": {"text_config": {"n_heads": 2}}}, "thinker.model.h.0", (2, None)),
        ({"n_heads": 4, "attn_config": {"kv_n_heads": 2}}, "h.0.attn", (4, None)),
        ({"encoder_attention_heads": 4}, "encoder.0.text_enhancer_layer.self_attn", (None, None)),
        ({"num_attention_heads": 4}, "encoder.stages.0.downsample.assign", (None, None)),
    ],
)  # fmt: skip
def test_heads_are_read_from_the_part_of_a_configuration_that_is_meant(config, module, expected):
    assert heads(config, module) == expected


def test_wider_layers_of_gemma_are_read_from_either_form_of_its_configuration():
    base = {"num_attention_heads": 8, "head_dim": 256}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 512}
    for config in ({**base, **kinds}, {**base, "per_layer_config": {"1": {"head_dim": 512}}}):
        assert heads(config, "model.layers.0.self_attn") == (8, 256)
        assert heads(config, "model.layers.1.self_attn") == (8, 512)


def test_a_number_of_heads_that_contradicts_the_shapes_is_not_used(tmp_path):
    files = pytest.importorskip("safetensors.torch")
    weights = {f"{part}_proj.weight": torch.randn(48, 32) for part in "qk"}
    files.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"hidden_size": 32, "num_attention_heads": 4}')
    assert len(audit(tmp_path).records) == 1
    with pytest.raises(ValueError, match="the number of heads is unknown; level='layer' needs"):
        audit(tmp_path, level="head")


@pytest.mark.parametrize("weight", ["c_attn", "att_proj", "qkv", "qkv_proj", "Wqkv", "to_qkv"])
def test_the_names_of_fused_projections(weight):
    model = nn.ModuleDict({weight: nn.Linear(8, 24)})
    (record,) = SpectralTracker(model).measure().records
    Q, K, _ = model[weight].weight.detach().double().chunk(3)
    assert record.nuclear == pytest.approx(torch.linalg.svdvals(Q.T @ K).sum().item())


def test_normalized_queries_and_keys_are_noted():
    tf = pytest.importorskip("transformers")
    stable = {**PARTLY, "num_key_value_heads": 1, "qk_layernorm": True}
    four = {**HALF, "num_hidden_layers": 2, "no_rope_layers": [1, 0], "num_local_experts": 2}
    cases = [
        (tf.StableLmModel(tf.StableLmConfig(**stable)), [True]),
        (tf.HunYuanDenseV1Model(tf.HunYuanDenseV1Config(**HALF)), [True]),
        (tf.Llama4TextModel(tf.Llama4TextConfig(**four)), [True, False]),  # without a weight
        (tf.Llama4TextModel(tf.Llama4TextConfig(**four, use_qk_norm=False)), [False, False]),
    ]
    for model, expected in cases:
        pairs = SpectralTracker(model).pairs
        assert [any("scale is inert" in n for n in p.notes) for p in pairs] == expected
