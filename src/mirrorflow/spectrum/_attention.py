"""How the weights of attention are laid out: where Q, K, V and the output are, family by family.

Names and shapes do not tell the order of the rows of a fused weight. It is known for the
architectures below, whose code was read; of others with such a name the reason is given why they
are not measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from .pairs import Factor, Facts, Shapes

__all__ = ["NORMS", "Projections", "caveats", "outputs", "projections"]

SEPARATE = (  # query, key and value side by side in one module
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Mistral, ViT, CLIP, OPT, BART
    ("query", "key", "value"),  # BERT, RoBERTa
    ("q", "k", "v"),  # T5
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT, XLM
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa
    ("to_q", "to_k", "to_v"),  # diffusers
    ("wq", "wk", "wv"),  # Llama as published
    ("Wq", "Wk", "Wv"),  # CTRL
    ("W_q", "W_k", "W_v"),  # Dive into Deep Learning
    ("c_q", "c_k", "c_v"),  # nanochat
    ("linear_q", "linear_k", "linear_v"),  # ESPnet, Conformers
    ("project_q", "project_k", "project_v"),  # CPM-Ant
    ("q_head", "k_head", "v_head"),  # Funnel
    ("projection_query", "projection_key", "projection_value"),  # CvT
)
OUTPUTS = (  # the projection of the heads' values, beside them
    *("o_proj", "out_proj", "dense", "o", "out_lin", "proj", "c_proj", "to_out.0", "to_out"),
    *("wo", "Wo", "W_o", "projection", "linear_out", "out", "attention_out"),
)
# Between K and the scores: Kimi, OLMo Hybrid, Bailing, Inkling, Zaya.
CONVOLUTIONS = (
    *("conv1d", "q_conv1d", "k_conv1d", "k_sconv.conv1d", "k_sconv", "conv_qk_depthwise"),
)

FUSED = ("c_attn", "att_proj", "qkv", "qkv_proj", "qkv_linear", "Wqkv", "to_qkv")
BLOCKS = {  # architectures whose fused weight is [Q, K, V]; see `_family`
    "gpt2", "imagegpt", "decision_transformer", "openai_gpt", "semantic", "coarse_acoustics",
    "fine_acoustics", "gte", "jina_embeddings_v3", "nomic_bert", "radio", "qianfan_ocr",
    "tipsv2", "unlimited_ocr", "blip", "blip_2", "instructblip", "instructblipvideo",
    "cohere_compass", "dbrx", "deepseek_ocr2_sam", "dots3_note", "ernie4_5_vl_moe", "exaone4_5",
    "florence", "florence2", "glm4v", "glm4v_moe", "glm5_next", "glm_image", "glm_ocr",
    "got_ocr2", "hiera", "layoutlmv2", "mgp_str", "modernbert", "mpt", "phi3",
    "phi4_multimodal", "pp_formulanet", "pp_ocrv5_mobile_rec", "pp_ocrv5_server_rec",
    "pp_ocrv6_small_rec", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5",
    "qwen3_5_moe", "qwen3_omni_moe", "qwen4_exp", "sam", "sam2", "sam2_hiera_det", "sam_hq",
    "seggpt", "slanext", "timesformer", "timm", "timm_backbone", "timm_wrapper",
    "unlimited_ocr_sam", "vitdet",
}  # fmt: skip
# Of these, with fewer key heads than query heads.
GROUPED = {"dbrx", "exaone4_5", "gpt_bigcode", "molmo2", "phi3", "phi4_multimodal"}
# For each key head: the query heads that share it, itself, its value head.
INTERLEAVED = {"bloom", "falcon", "gpt_neox", "gpt_neox_japanese", "persimmon"}
GATED = {"qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp"}  # each head: query, gate
REFUSED = {
    "codegen": "codegen stores its rows in an order of its own",
    "minimax": "minimax passes Q and K through an activation: the scores are no product with them",
}
APART = {  # by the ends of names: what is no pair, or none that can be found
    ".kv_b_proj.weight": "latent attention forms K through a norm: it is no product of two factors",
    ".rel_attn.q": (
        "XLNet's Q and K are no Linear modules: name the pair, as in "
        "pairs={'0': ('layer.0.rel_attn.q', 'layer.0.rel_attn.k.T', heads)}"
    ),
    ".query_key.weight": (
        "Q and K have one weight. In Reformer it is the same W for both, and K is normalized: "
        "W^T W has no norm that means something, its ratio is that of "
        "pairs={'0': ('query_key.weight.T', 'query_key.weight')}, with the whole name"
    ),
}
UNEVEN = ("maxvit", "maxxvit", "coatnet", "coatnext", "tiny_vit", "efficientformer")


@dataclass(frozen=True)
class Projections:
    """Where Q, K and V of an attention module are, each as rows (heads x width, in)."""

    prefix: str  # of the module, with its dot
    query: Factor
    key: Factor
    value: Factor | None
    notes: tuple[str, ...] = ()


def projections(key: str, shapes: Shapes, facts: Facts) -> Projections | str | None:
    """Find the projections that begin at a weight; a reason if it is one of an unknown order."""
    if key.endswith(".q_b_proj.weight") and key.replace(".q_b_", ".kv_b_") not in shapes:
        return "latent attention forms Q through a norm: it is no product of two factors"
    if reason := next((why for end, why in APART.items() if key.endswith(end)), None):
        return reason
    for family in (separate, fused, multihead, interleaved):
        if found := family(key, shapes, facts):
            return found
    return None


def separate(key: str, shapes: Shapes, facts: Facts) -> Projections | str | None:
    """Q, K and V as Linear modules side by side, stored as (heads x width, in)."""
    for query, other, third in SEPARATE:
        match = re.fullmatch(rf"((?:.*\.)?){query}((?:\.linear)?\.weight)", key)
        if not match or len(shapes[key]) < 2:
            continue
        prefix, end = match.groups()  # Gemma 4's encoders keep a Linear between two bounds
        if any(f"{prefix}{name}.weight" in shapes for name in CONVOLUTIONS):
            return "K passes a convolution over the tokens: the scores are no product with it"
        if (partner := f"{prefix}{other}{end}") in shapes:
            value = f"{prefix}{third}{end}"
            found = Factor(value) if value in shapes else None
            bounds = () if end == ".weight" else ("its clipping is left out",)
            parts = Projections(prefix, Factor(key), Factor(partner), found, bounds)
            return _ungated(parts, facts, shapes)
        return _alone(prefix, query, shapes)
    return None


def _alone(prefix: str, query: str, shapes: Shapes) -> str | None:
    """Say what became of K, where it has no weight of its own beside that of Q."""
    if query in ("q", "query") or f"{prefix}kv_b_proj.weight" in shapes:
        return None  # maybe no projection; latent attention, whose K says so
    return (
        "there is no K beside it: it is another layer's, in one weight with V, or called otherwise"
    )


def _ungated(found: Projections, facts: Facts, shapes: Shapes) -> Projections | str:
    """Take the queries out of a weight that holds a gate for each of them, too."""
    module = found.prefix.removesuffix(".")
    count, size = facts.heads(module)
    rows = found.query.size(shapes)[0]
    if not count or not size or rows != 2 * count * size:
        return found
    if _family(facts.architecture(module)) not in GATED:
        return f"Q has {rows} rows, twice those of {count} heads of width {size}"
    query = Factor(found.query.key, False, 0, size, 2 * size)
    note = "the gate on the values is left out"
    return Projections(found.prefix, query, found.key, found.value, (note,))


def fused(key: str, shapes: Shapes, facts: Facts) -> Projections | str | None:
    """Q, K and V in one weight, stored as (Q + K + V, in), or by GPT-2's Conv1D transposed."""
    match = re.fullmatch(rf"((?:.*\.)?)({'|'.join((*FUSED, 'wqkv', 'in_proj'))})\.weight", key)
    if not match or len(shapes[key]) < 2:
        return None
    module = match[1].removesuffix(".")
    kind, order = _family(facts.architecture(module)), facts.order(module)
    if match[2] == "in_proj" and kind != "deberta":
        return None  # Mamba has one, too
    if any(size != 1 for size in shapes[key][2:]):
        return "a convolution over several pixels is no matrix"
    if kind in REFUSED:
        return REFUSED[kind]
    if kind == "deberta" or order == "heads" or (kind == "gpt_bigcode" and _tripled(shapes[key])):
        return _by_heads(match[1], key, shapes, facts)
    if match[2] == "wqkv" or (kind and kind not in BLOCKS | GROUPED) or order == "unknown":
        return f"the order of the rows of {match[2]} is not known {_where(kind)}"
    return _blocks(match[1], key, match[2], shapes, facts)


def _blocks(prefix: str, key: str, name: str, shapes: Shapes, facts: Facts) -> Projections | str:
    """Divide [Q, K, V]."""
    module = prefix.removesuffix(".")
    rows, columns = shapes[key][0], prod(shapes[key][1:])
    kind = _family(facts.architecture(module))
    apart = f"{prefix}q_attn.weight"  # GPT-2's cross-attention: Q apart, [K, V] fused
    if name == "c_attn" and apart in shapes:
        if kind == "gpt_bigcode":
            return "cross-attention of gpt_bigcode is not known"
        half, last = (Factor(key, True, i * columns // 2, (i + 1) * columns // 2) for i in (0, 1))
        return Projections(prefix, Factor(apart, True), half, last)
    transposed = columns == 3 * rows
    total, width = (columns, rows) if transposed else (rows, columns)
    count, size = facts.heads(module)
    if kind in GROUPED:
        queries = count * size if count and size else width  # else Q keeps the width
        known = bool(count or total == 3 * width)
    else:
        queries, known = total // 3, total == 3 * width
        if count and total % (3 * count) == 0:
            known = not size or total == 3 * count * size
    if not known or queries >= total or (total - queries) % 2:
        return f"how {rows} x {columns} divides into Q, K and V is unknown without the heads"
    parts = _parts(key, (0, queries, (queries + total) // 2, total), transposed)
    note = "its rows are taken for [Q, K, V]: no configuration says so"
    return Projections(prefix, *parts, () if kind or facts.order(module) == "blocks" else (note,))


def _by_heads(prefix: str, key: str, shapes: Shapes, facts: Facts) -> Projections | str:
    """Divide [q, k, v] of the first head, [q, k, v] of the second, and so on."""
    rows = shapes[key][0]
    count, size = facts.heads(prefix.removesuffix("."))
    if not count or rows % count:
        return f"how {rows} rows divide into heads is unknown without their number"
    block = rows // count
    size = size or block // 3
    if 2 * size >= block:
        return f"{rows} rows do not hold q, k and v of {count} heads of width {size}"
    return Projections(prefix, *_parts(key, (0, size, 2 * size, block), block=block))


def multihead(key: str, shapes: Shapes, facts: Facts) -> Projections | str | None:
    """`torch.nn.MultiheadAttention`: in_proj_weight (3 d, d), or q_, k_ and v_proj_weight."""
    match = re.fullmatch(r"((?:.*\.)?)(in|q)_proj_weight", key)
    if not match:
        return None
    if match[2] == "q":
        query, other, value = (Factor(f"{match[1]}{part}_proj_weight") for part in "qkv")
        return Projections(match[1], query, other, value)
    third = shapes[key][0] // 3
    return Projections(match[1], *_parts(key, (0, third, 2 * third, 3 * third)))


def interleaved(key: str, shapes: Shapes, facts: Facts) -> Projections | str | None:
    """Q, K and V head by head in one weight: GPT-NeoX, BLOOM, Falcon.

    With G key heads the weight is G blocks, each of the query heads that share a key head, the key
    head and the value head. H query heads of width d make (H + 2 G) d rows, which gives G.
    """
    match = re.fullmatch(r"((?:.*\.)?)query_key_value\.weight", key)
    if not match or len(shapes[key]) != 2:
        return None
    module = match[1].removesuffix(".")
    if _family(facts.architecture(module)) not in INTERLEAVED:
        return "the order of its rows differs from model to model: name the pair yourself"
    rows, width = shapes[key]
    heads, size = facts.heads(module)
    size = size or (width // heads if heads else None)
    if not heads or not size or (rows - heads * size) % (2 * size):
        return f"how {rows} rows divide into Q, K and V is unknown without the heads"
    groups = (rows - heads * size) // (2 * size)
    if groups == 0 or heads % groups:
        return f"{rows} rows do not hold {heads} query heads of width {size} and their keys"
    queries = heads // groups * size
    block = queries + 2 * size
    return Projections(match[1], *_parts(key, (0, queries, queries + size, block), block=block))


def outputs(prefix: str, shapes: Shapes) -> Iterator[str]:
    """Return the weights that may project the heads' values: beside them, or as in BERT above."""
    above = prefix.removesuffix(".").rpartition(".")[0]
    beside = (f"{prefix}{name}{end}" for name in OUTPUTS for end in ("", ".linear"))
    names = (*beside, f"{above}.output.dense".lstrip("."))
    return (f"{name}.weight" for name in names if f"{name}.weight" in shapes)


def _family(architecture: str) -> str:
    """Return the family of a model_type: without its part, as in qwen2_vl_vision.

    Examples
    --------
    >>> _family("blip_2_vision_model"), _family("mgp-str"), _family("timm/vit_base_patch16_224")
    ('blip_2', 'mgp_str', 'timm')
    """
    name = architecture.replace("-", "_")
    if name.startswith("timm/"):
        return "timm_uneven" if name.removeprefix("timm/").startswith(UNEVEN) else "timm"
    return re.sub(r"_(?:vision|text|audio|thinker)(?:_model|_encoder)?$|_model$", "", name)


def _parts(
    key: str, edges: tuple[int, int, int, int], transposed: bool = False, block: int = 0
) -> tuple[Factor, Factor, Factor]:
    """Take Q, K and V out of a weight, or out of each block of it."""
    a, b, c, d = edges
    return (
        Factor(key, transposed, a, b, block),
        Factor(key, transposed, b, c, block),
        Factor(key, transposed, c, d, block),
    )


def _tripled(shape: tuple[int, ...]) -> bool:
    return shape[0] == 3 * prod(shape[1:])


def _where(kind: str) -> str:
    where = f"for {kind}" if kind else "without the model"
    return f"{where}: name the pair, as in pairs={{'x': ('w[:64].T', 'w[64:128]')}}"


# What attention does to Q, K and V beside projecting them, which a product does not show.

NORMS = (
    *("q_norm", "q_layernorm", "q_layer_norm", "q_ln", "norm_q", "qk_norm"),
    *("query_norm", "query_layernorm", "norm_query"),
)
# By model_type, normalized without a weight: Q and K (Swin V2 has a logit_scale instead), and V.
COSINE = {"yoso", "dory", "muse_glimmer_text", "muse_spark_text", "nanochat", "neomme"}
V_NORMS = {
    "diffusion_gemma_text", "embedding_gemma2_text", "gemma3n_text", "gemma4_text",
    "gemma4_vision", "gemma4_unified_text",
}  # fmt: skip
CONVOLVED = "convolution_projection_key.convolution_projection.convolution.weight"  # CvT
SCALES = ("per_dim_scale", "scaling", "sqk")  # factors for the dimensions of Q, where they learn


def caveats(prefix: str, shapes: Shapes, facts: Facts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Say what the forward does to Q, K and V beside projecting: of the scores, and of W_O W_V."""
    module = prefix.removesuffix(".")
    kind = facts.architecture(module)
    scores = [
        f"{name} scales the dimensions of Q: it is left out"
        for name in SCALES
        if f"{prefix}{name}" in shapes
    ]
    if kind in COSINE or _has_norm(prefix, shapes) or facts.normalized(module):
        scores.append("Q and K are normalized: their scale is inert, the norms mean nothing")
    values = []
    if kind in V_NORMS:
        values.append("V is normalized: its scale is inert, the norms mean nothing")
    if f"{prefix}{CONVOLVED}" in shapes:
        for notes in (scores, values):
            notes.append("Q, K and V are projections of tokens after a convolution")
    return tuple(scores), tuple(values)


def _has_norm(prefix: str, shapes: Shapes) -> bool:
    """Whether a normalization of Q has a weight."""
    ends = (".weight", ".norms.0.weight")
    names = ("logit_scale", *(f"{norm}{end}" for norm in NORMS for end in ends))
    return any(f"{prefix}{name}" in shapes for name in names)
