"""The layouts of fused and separate projections, against what each model's own code computes.

The oracle (attention.py) shares nothing with the finder: it feeds the forward basis vectors and
takes q and k from where they meet.
"""

import pytest
import torch
from torch import nn

from attention import forward, prepared
from mirrorflow.spectrum import SpectralTracker, audit

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

D, HEADS = 24, 4
WORDS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {
    "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": HEADS, "intermediate_size": 16,
    **WORDS,
}  # fmt: skip
GPT = {"n_embd": D, "n_layer": 1, "n_head": HEADS, "n_positions": 16, **WORDS}
GROUPED = {**SMALL, "num_key_value_heads": 2}
HALF = {**GROUPED, "head_dim": 8}
PARTLY = {**SMALL, "num_attention_heads": 3}  # rotates a part of a head, of width 8

MPT = {"d_model": D, "n_heads": HEADS, "n_layers": 1, "vocab_size": 40}
DBRX = {
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 1e6, "rope_theta": 1e4}, "max_seq_len": 16,
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1}, "pad_token_id": 0,
}  # fmt: skip
DISTIL = {"dim": D, "n_layers": 1, "n_heads": HEADS, "hidden_dim": 16, **WORDS}
T5 = {"d_model": D, "d_kv": 5, "d_ff": 16, "num_layers": 1, "num_heads": HEADS, "vocab_size": 40}
XLM = {"emb_dim": D, "n_layers": 1, "n_heads": HEADS, "n_words": 40, "n_langs": 1}
FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2}
SEEN = {"image_size": 4, "patch_size": 4}
CONV = {"head_ratio": 2, "embedding_size": D}  # half of the heads, of which a half is convolved
EXPERTS = {"num_experts": 2, "num_local_experts": 2, "moe_intermediate_size": 16}
GEMMA4 = {"global_head_dim": 12, "hidden_size_per_layer_input": 0, "num_hidden_layers": 2}
SHORT = {"sliding_window": 8}
WHISPER = {
    "d_model": D, "encoder_layers": 1, "encoder_attention_heads": HEADS, "decoder_layers": 1,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "decoder_attention_heads": HEADS, **WORDS,
}  # fmt: skip
SWIN = {"embed_dim": D, "depths": [1], "num_heads": [HEADS], "window_size": 1, **SEEN}
CPM = {"dim_head": 6, "dim_ff": 16, "prompt_length": 1, **SMALL}
FUNNEL = {
    "d_model": D, "n_head": HEADS, "d_head": 6, "d_inner": 16, "block_sizes": [1], "vocab_size": 40,
    "num_decoder_layers": 1, "separate_cls": False, "type_vocab_size": 2,
}  # fmt: skip
BARK = {
    "hidden_size": D, "num_layers": 1, "num_heads": HEADS, "block_size": 16,
    "input_vocab_size": 40, "output_vocab_size": 40,
}  # fmt: skip

# The names of the model and its configuration, its options, and the attention module.
FAMILIES = {
    "gpt2": ("GPT2", GPT, "h.0.attn"),
    "gpt_bigcode": ("GPTBigCode", GPT | {"multi_query": False}, "h.0.attn"),
    "gpt_bigcode mq": ("GPTBigCode", GPT, "h.0.attn"),
    "openai-gpt": ("OpenAIGPT", GPT, "h.0.attn"),
    "imagegpt": ("ImageGPT", GPT, "h.0.attn"),
    "llama": ("Llama", GROUPED, "layers.0.self_attn"),
    "llama4": ("Llama4Text", HALF | {"num_local_experts": 2}, "layers.0.self_attn"),
    "mistral": ("Mistral", HALF, "layers.0.self_attn"),
    "qwen2": ("Qwen2", GROUPED, "layers.0.self_attn"),
    "qwen3": ("Qwen3", HALF, "layers.0.self_attn"),
    "qwen3_next": ("Qwen3Next", HALF | {"layer_types": ["full_attention"]}, "layers.0.self_attn"),
    "qwen3_moe": ("Qwen3Moe", HALF | EXPERTS, "layers.0.self_attn"),
    "gemma": ("Gemma", HALF, "layers.0.self_attn"),
    "gemma2": ("Gemma2", HALF | SHORT, "layers.0.self_attn"),
    "gemma3": ("Gemma3Text", HALF | SHORT, "layers.0.self_attn"),
    "gemma4": ("Gemma4Text", HALF | SHORT | GEMMA4, "layers.0.self_attn"),
    "gemma4 wide": ("Gemma4Text", HALF | SHORT | GEMMA4, "layers.1.self_attn"),
    "gpt_oss": ("GptOss", HALF | EXPERTS | SHORT, "layers.0.self_attn"),
    "olmo2": ("Olmo2", GROUPED, "layers.0.self_attn"),
    "olmo3": ("Olmo3", GROUPED | SHORT, "layers.0.self_attn"),
    "smollm3": ("SmolLM3", GROUPED, "layers.0.self_attn"),
    "ministral": ("Ministral", HALF | SHORT, "layers.0.self_attn"),
    "glm4": ("Glm4", HALF, "layers.0.self_attn"),
    "cohere2": ("Cohere2", HALF | SHORT, "layers.0.self_attn"),
    "phi": ("Phi", PARTLY, "layers.0.self_attn"),
    "phi3": ("Phi3", GROUPED, "layers.0.self_attn"),
    "stablelm": ("StableLm", PARTLY | {"num_key_value_heads": 1}, "layers.0.self_attn"),
    "opt": ("OPT", SMALL | {"ffn_dim": 16, "word_embed_proj_dim": D}, "decoder.layers.0.self_attn"),
    "bert": ("Bert", SMALL, "encoder.layer.0.attention.self"),
    "vit": ("ViT", SMALL | SEEN, "layers.0.attention"),
    "blip": ("BlipVision", SMALL | SEEN, "encoder.layers.0.self_attn"),
    "distilbert": ("DistilBert", DISTIL, "transformer.layer.0.attention"),
    "modernbert": ("ModernBert", SMALL | {"cls_token_id": 1, "sep_token_id": 2}, "layers.0.attn"),
    "deberta": ("Deberta", SMALL, "encoder.layer.0.attention.self"),
    "deberta_v2": ("DebertaV2", SMALL, "encoder.layer.0.attention.self"),
    "t5": ("T5", T5, "encoder.block.0.layer.0.SelfAttention"),
    "gpt_neox": ("GPTNeoX", SMALL, "layers.0.attention"),
    "persimmon": ("Persimmon", PARTLY, "layers.0.self_attn"),
    "bloom": ("Bloom", {"n_layer": 1, "n_head": HEADS, "hidden_size": D}, "h.0.self_attention"),
    "falcon rw": ("Falcon", SMALL | {"multi_query": False}, "h.0.self_attention"),
    "falcon 7b": ("Falcon", SMALL, "h.0.self_attention"),
    "falcon 40b": ("Falcon", SMALL | FALCON, "h.0.self_attention"),
    "mpt": ("Mpt", MPT, "blocks.0.attn"),
    "dbrx": ("Dbrx", MPT | DBRX, "blocks.0.norm_attn_norm.attn"),
    "xlm": ("XLM", XLM, "attentions.0"),
    "ctrl": ("CTRL", GPT | {"dff": 16}, "h.0.multi_head_attention"),
    "convbert": ("ConvBert", SMALL | CONV, "encoder.layer.0.attention.self"),
    "roformer": ("RoFormer", SMALL, "encoder.layer.0.attention.self"),
    "siglip": ("SiglipVision", SMALL | SEEN, "encoder.layers.0.self_attn"),
    "swin": ("Swin", SWIN, "encoder.layers.0.blocks.0.attention"),
    "cpmant": ("CpmAnt", CPM, "encoder.layers.0.self_att.self_attention"),
    "bark": ("BarkSemantic", BARK, "layers.0.attn"),
    "funnel": ("Funnel", FUNNEL, "encoder.blocks.0.0.attention"),
}  # fmt: skip
# The output is projected in the module around, has the residual added, is gated.
OTHERWISE = (
    *("bert", "convbert", "roformer", "deberta", "deberta_v2", "bloom", "qwen3_next"),
    *("gpt_oss", "funnel"),  # a sink takes a part of each head; a residual is added
)


# Q and K are normalized without a module.
COSINE = {
    "yoso": ("Yoso", SMALL, "encoder.layer.0.attention.self"),
    "swinv2": ("Swinv2", SWIN, "encoder.layers.0.blocks.0.attention.self"),
}


def build(name, norms=False):
    tf = pytest.importorskip("transformers")
    family, options, path = {**FAMILIES, **COSINE}[name]
    model = getattr(tf, f"{'T5Encoder' if family == 'T5' else family}Model")
    torch.manual_seed(0)
    return prepared(model(getattr(tf, f"{family}Config")(**options)), norms), path


def run(model):
    """Return the output for one token for each dimension of the input."""
    if "Vi" in type(model).__name__ or "Swin" in type(model).__name__:
        return model(torch.zeros(D, 3, 4, 4, dtype=torch.float64))[0]
    return model(torch.arange(10, 10 + D).unsqueeze(1))[0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.sample(27)
def test_every_head_is_the_one_that_the_forward_of_the_model_uses(name):
    model, path = build(name)
    q, k, _ = forward(model, model.get_submodule(path), run)
    records = SpectralTracker(model, level="head", match="attention").measure().records
    mine = [r for r in records if r.name == path]
    assert [r.head for r in mine] == list(range(q.shape[1]))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    dense = torch.linalg.svdvals(torch.einsum("ihd,jhd->hij", q, k))
    factors = set()
    for record, values in zip(mine, dense, strict=True):
        ratio = values.sum() / values.norm()
        assert record.ratio == pytest.approx(ratio.item(), rel=1e-7)
        assert record.stable_rank == pytest.approx(
            (values.norm() / values[0]).item() ** 2, rel=1e-7
        )
        factors.add(round(record.nuclear / values.sum().item(), 6))
    assert len(factors) == 1  # scores are scaled by one number, before or after they are formed


def triple(model, pair):
    """Make Q and K three times as large."""
    for key in {pair.left.key, pair.right.key}:
        model.get_parameter(key).data.mul_(3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_note_says_whether_the_scale_of_q_and_k_reaches_the_scores(name):
    model, path = build(name, norms=True)
    (pair,) = [p for p in SpectralTracker(model).pairs if p.name == path]
    before = forward(model, model.get_submodule(path), run)
    triple(model, pair)
    after = forward(model, model.get_submodule(path), run)
    growth = [(b.norm() / a.norm()).item() for a, b in zip(before[:2], after[:2], strict=True)]
    inert = any("scale is inert" in note for note in pair.notes)
    assert growth == pytest.approx([1 if inert else 3] * 2, rel=1e-3)


@pytest.mark.parametrize("name", COSINE)
def test_a_normalization_of_q_and_k_without_a_module_is_noted(name):
    model, path = build(name, norms=True)
    (pair,) = SpectralTracker(model).pairs
    assert pair.name == path and "scale is inert" in pair.notes[-1]
    outputs = []
    for _ in range(2):
        with torch.no_grad():
            outputs.append(run(model))
        triple(model, pair)
    assert torch.allclose(*outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # of saving
@pytest.mark.parametrize("name", {**FAMILIES, **COSINE})
@pytest.mark.sample(20)
def test_a_saved_model_is_measured_as_in_memory(name, tmp_path):
    model, _ = build(name, norms=True)
    model.save_pretrained(tmp_path)
    tracked = SpectralTracker(model, level="head").measure().records
    read = audit(tmp_path, level="head").records

    def known(records):
        return sorted((round(r.ratio, 9), any("inert" in n for n in r.notes)) for r in records)

    assert known(read) == known(tracked)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in OTHERWISE])
def test_what_all_heads_write_is_the_output_of_the_module(name):
    model, path = build(name)
    _, _, out = forward(model, model.get_submodule(path), run)
    records = SpectralTracker(model, match="value-output", values=True).measure().records
    (record,) = [r for r in records if r.name == path]
    dense = torch.linalg.svdvals(out)
    assert record.kind == "value-output" and record.label == f"{path} V-O"
    assert record.nuclear == pytest.approx(dense.sum().item(), rel=1e-7)
    assert record.spectral == pytest.approx(dense[0].item(), rel=1e-7)


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gpt_bigcode", "falcon 40b", "phi3"])
def test_values_and_outputs_of_each_head_agree_with_their_product(name):
    model, path = build(name)
    module = model.get_submodule(path)
    output = [m for n, m in module.named_modules() if n in ("c_proj", "o_proj", "dense")]
    W_O = output[0].weight.detach()
    W_O = W_O.T if name == "gpt2" else W_O  # a Conv1D
    V = values_of(name, module)  # (key heads, width, in)
    V = V.repeat_interleave(HEADS // len(V), 0)
    tracker = SpectralTracker(model, level="head", match="value", values=True)
    records = tracker.measure().records
    assert [r.head for r in records] == list(range(HEADS)) and records[2].label.endswith("head 2")
    for record, a, b in zip(records, W_O.unflatten(1, (HEADS, -1)).unbind(1), V, strict=True):
        dense = torch.linalg.svdvals(a @ b)
        assert record.nuclear == pytest.approx(dense.sum().item(), rel=1e-9)
        assert record.ratio == pytest.approx((dense.sum() / dense.norm()).item(), rel=1e-9)


def values_of(name, module):
    """The value heads, taken out by hand."""
    if name == "gpt2":
        return module.c_attn.weight.detach().T[2 * D :].unflatten(0, (HEADS, -1))
    if name == "mistral":
        return module.v_proj.weight.detach().unflatten(0, (2, -1))
    if name == "phi3":
        return module.qkv_proj.weight.detach()[-12:].unflatten(0, (2, -1))
    weight = module.c_attn.weight if name == "gpt_bigcode" else module.query_key_value.weight
    groups = HEADS if name == "gpt_bigcode" else 2
    return weight.detach().unflatten(0, (groups, -1))[:, -D // HEADS :]


def test_values_are_left_out_unless_asked_for_and_their_absence_is_told():
    model, _ = build("llama")
    assert {p.kind for p in SpectralTracker(model).pairs} == {"attention"}
    assert {p.kind for p in SpectralTracker(model, values=True).pairs} == {
        "attention", "value-output",
    }  # fmt: skip
    lone = nn.ModuleDict({"q_proj": nn.Linear(6, 6), "k_proj": nn.Linear(6, 6)})
    tracker = SpectralTracker(lone, values=True)
    assert tracker.skipped == (("q_proj.weight", "its V is not known: no product W_O W_V"),)
    lone["v_proj"] = nn.Linear(6, 6)
    lone["o_proj"] = nn.Linear(5, 6)  # of another width
    (_, reason) = SpectralTracker(lone, values=True).skipped[0]
    assert "no output projection is known that fits V (6 rows)" in reason


class Timm(nn.Module):
    """timm's AttentionCl (maxxvit.py, MaxxViT and CoAtNet), which has both orders of the heads."""

    def __init__(self, head_first, dim=D, dim_head=6):
        super().__init__()
        self.num_heads, self.dim_head, self.head_first = dim // dim_head, dim_head, head_first
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, shape = x.shape[0], x.shape[:-1]
        if self.head_first:
            q, k, v = (
                self.qkv(x)
                .view(B, -1, self.num_heads, self.dim_head * 3)
                .transpose(1, 2)
                .chunk(3, 3)
            )
        else:
            q, k, v = (
                self.qkv(x)
                .reshape(B, -1, 3, self.num_heads, self.dim_head)
                .transpose(1, 3)
                .unbind(2)
            )
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(*shape, -1))


class Levit(nn.Module):
    """The split of timm's TinyViT (tiny_vit.py): key_dim, key_dim, val_dim of each head."""

    def __init__(self, val_dim):
        super().__init__()
        self.num_heads, self.key_dim, self.val_dim = HEADS, 5, val_dim
        self.qkv, self.proj = nn.Linear(D, HEADS * (val_dim + 10)), nn.Linear(HEADS * val_dim, D)

    def forward(self, x):
        B, N, _ = x.shape
        qkv = self.qkv(x).view(B, N, self.num_heads, -1)
        q, k, v = (
            part.permute(0, 2, 1, 3)
            for part in qkv.split([self.key_dim, self.key_dim, self.val_dim], 3)
        )
        attn = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, -1))


@pytest.mark.parametrize(
    "make", [lambda: Timm(True), lambda: Timm(False), lambda: Levit(5), lambda: Levit(8)]
)
def test_the_orders_of_heads_in_timm(make):
    torch.manual_seed(0)
    model = prepared(nn.Sequential(make()))
    q, k, out = forward(model, model[0], lambda m: m(torch.zeros(D, 1, D, dtype=torch.float64)))
    records = SpectralTracker(model, level="head").measure().records
    for record, a, b in zip(records, q.unbind(1), k.unbind(1), strict=True):
        values = torch.linalg.svdvals(a @ b.T)
        assert record.nuclear == pytest.approx(values.sum().item())
        assert record.ratio == pytest.approx((values.sum() / values.norm()).item())
    (whole,) = SpectralTracker(model, match="value", values=True).measure().records
    assert whole.frobenius == pytest.approx(out.norm().item())


def test_a_convolution_over_single_pixels_is_a_matrix():
    torch.manual_seed(0)
    flat = Timm(True)
    model = Timm(True)
    model.qkv = nn.Conv2d(D, 3 * D, 1)
    model.qkv.weight.data = flat.qkv.weight.data[..., None, None]
    found, expected = (SpectralTracker(m, level="head").measure() for m in (model, flat))
    assert [r.nuclear for r in found.records] == [r.nuclear for r in expected.records]
    model.qkv = nn.Conv2d(D, 3 * D, 3)
    with pytest.raises(ValueError, match="convolution over several pixels"):
        SpectralTracker(model)
