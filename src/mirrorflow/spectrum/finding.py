"""The factor pairs of a model, found by the names and shapes of its weights.

Names and shapes are all that a checkpoint on disk has, so that one finder serves models and files.
What names do not tell (the number of heads, LoRA's scale) comes from `Facts`: `tracker` reads them
from the modules, `audit` from the configuration files. One function per family of architectures.
"""

from __future__ import annotations

import re
from dataclasses import replace

from .pairs import Factor, Facts, Found, Pair, Shapes

__all__ = ["find"]

SEPARATE = (  # the query's and the key's projection side by side in one module
    ("q_proj", "k_proj"),  # Llama, Qwen, Mistral, ViT, CLIP, OPT, BART
    ("query", "key"),  # BERT, RoBERTa
    ("q", "k"),  # T5
    ("q_lin", "k_lin"),  # DistilBERT
    ("query_proj", "key_proj"),  # DeBERTa
    ("to_q", "to_k"),  # diffusers
    ("wq", "wk"),  # Llama as published
)
FUSED = ("c_attn", "qkv", "qkv_proj", "Wqkv")  # GPT-2, timm, Phi-3, ModernBERT: [Q, K, V]
# Their query_key_value holds for each key head: its query heads, itself, its value head.
INTERLEAVED = ("gpt_neox", "gpt_neox_japanese", "bloom", "falcon")
SHUFFLED = ("codegen",)  # its qkv_proj is divided by the TPU cores that it was trained on
NORMS = ("q_norm", "q_layernorm", "query_norm", "norm_q")


def find(shapes: Shapes, facts: Facts) -> Found:
    """Find the LoRA updates and the attention layers among weights."""
    pairs: list[Pair] = []
    skipped: list[tuple[str, str]] = []
    for key in shapes:
        for family in (lora, lora_embedding, adalora, separate, fused, multihead, interleaved):
            found = family(key, shapes, facts)
            if isinstance(found, Pair):
                pairs.append(found)
            elif found:
                skipped.append((key, found))
    adapted = {pair.name for pair in pairs if pair.kind == "lora"}
    return Found(tuple(_marked(pair, adapted) for pair in pairs), tuple(skipped))


def _marked(pair: Pair, adapted: set[str]) -> Pair:
    """Note on attention whose projections have adapters that only the base is measured."""
    holders = {factor.key.rpartition(".")[0] for factor in (pair.left, pair.right)}
    if pair.kind != "attention" or not holders & adapted:
        return pair
    return replace(pair, notes=(*pair.notes, "base weights, without the adapters' updates"))


def lora(key: str, shapes: Shapes, facts: Facts) -> Pair | str | None:
    """PEFT's LoRA on Linear, Conv1D and convolutions: scale B A, B (out, r) and A (r, in)."""
    match = re.fullmatch(r"(.*)\.lora_A(?:\.([^.]+))?\.weight", key)
    if not match:
        return None
    other = key.replace(".lora_A.", ".lora_B.")
    return _lora(match[1], match[2] or "", Factor(other, transposed=True), key, shapes, facts)


def lora_embedding(key: str, shapes: Shapes, facts: Facts) -> Pair | str | None:
    """PEFT's LoRA on Embedding: scale B A, B (width, r) and A (r, tokens)."""
    match = re.fullmatch(r"(.*)\.lora_embedding_A(?:\.([^.]+))?", key)
    if not match:
        return None
    other = key.replace(".lora_embedding_A", ".lora_embedding_B")
    return _lora(match[1], match[2] or "", Factor(other, transposed=True), key, shapes, facts)


def _lora(
    module: str, adapter: str, left: Factor, key: str, shapes: Shapes, facts: Facts
) -> Pair | str:
    """Pair the two weights of an adapter."""
    if left.key not in shapes:
        return f"{left.key} is missing"
    if any(size != 1 for size in shapes[left.key][2:]):
        return "the product of these convolutions is no matrix product"
    right = Factor(key)
    rank, m = right.size(shapes)
    if left.size(shapes)[0] != rank:
        return f"the ranks {rank} and {left.size(shapes)[0]} differ"
    known = facts.adapter(module, adapter, rank)
    if known.skip:
        return known.skip
    suffix = f".{adapter}" if adapter else ""
    dora = any(f"{module}.lora_magnitude_vector{suffix}{end}" in shapes for end in ("", ".weight"))
    notes = (*known.notes, *(("DoRA: A B before its normalization",) if dora else ()))
    shape = (left.size(shapes)[1], rank, m)
    return Pair(module, "lora", left, right, shape, adapter=adapter, scale=known.scale, notes=notes)


def adalora(key: str, shapes: Shapes, facts: Facts) -> str | None:
    """Refuse AdaLoRA: its product has a third factor."""
    return "AdaLoRA's product has a third factor, lora_E" if ".lora_E" in key else None


def separate(key: str, shapes: Shapes, facts: Facts) -> Pair | str | None:
    """Q and K as two Linear modules side by side, stored as (heads x width, in)."""
    for query, other in SEPARATE:
        match = re.fullmatch(rf"((?:.*\.)?){query}\.weight", key)
        if match and (partner := f"{match[1]}{other}.weight") in shapes:
            return _attention(match[1], Factor(key), Factor(partner), shapes, facts)
    return None


def fused(key: str, shapes: Shapes, facts: Facts) -> Pair | str | None:
    """Q, K and V in one weight, stored as (Q + K + V, in), or by GPT-2's Conv1D transposed."""
    match = re.fullmatch(rf"((?:.*\.)?)({'|'.join(FUSED)})\.weight", key)
    if not match or len(shapes[key]) != 2:
        return None
    if facts.architecture() in SHUFFLED:
        return f"{facts.architecture()} stores its rows in an order of its own"
    rows, columns = shapes[key]
    apart = f"{match[1]}q_attn.weight"  # GPT-2's cross-attention: Q apart, [K, V] fused
    if match[2] == "c_attn" and apart in shapes:
        half = Factor(key, True, 0, columns // 2)
        return _attention(match[1], Factor(apart, True), half, shapes, facts)
    transposed = columns == 3 * rows
    total, width = (columns, rows) if transposed else (rows, columns)
    count, size = facts.heads(match[1].removesuffix("."))
    queries = count * size if count and size else width  # else Q keeps the width
    if not (count or total == 3 * width) or queries >= total or (total - queries) % 2:
        return f"how {rows} x {columns} divides into Q, K and V is unknown without the heads"
    left = Factor(key, transposed, 0, queries)
    right = Factor(key, transposed, queries, (queries + total) // 2)
    return _attention(match[1], left, right, shapes, facts)


def multihead(key: str, shapes: Shapes, facts: Facts) -> Pair | str | None:
    """`torch.nn.MultiheadAttention`: in_proj_weight (3 d, d), or q_ and k_proj_weight."""
    match = re.fullmatch(r"((?:.*\.)?)(in|q)_proj_weight", key)
    if not match:
        return None
    if match[2] == "q":
        other = Factor(f"{match[1]}k_proj_weight")
        return _attention(match[1], Factor(key), other, shapes, facts)
    third = shapes[key][0] // 3
    left, right = Factor(key, False, 0, third), Factor(key, False, third, 2 * third)
    return _attention(match[1], left, right, shapes, facts)


def interleaved(key: str, shapes: Shapes, facts: Facts) -> Pair | str | None:
    """Q, K and V head by head in one weight: GPT-NeoX, BLOOM, Falcon.

    With G key heads the weight is G blocks, each of the query heads that share a key head, the key
    head and the value head. H query heads of width d make (H + 2 G) d rows, which gives G.
    """
    match = re.fullmatch(r"((?:.*\.)?)query_key_value\.weight", key)
    if not match or len(shapes[key]) != 2:
        return None
    if facts.architecture() not in INTERLEAVED:
        return "the order of its rows differs from model to model: name the pair yourself"
    rows, width = shapes[key]
    heads, size = facts.heads(match[1].removesuffix("."))
    size = size or (width // heads if heads else None)
    if not heads or not size or (rows - heads * size) % (2 * size):
        return f"how {rows} rows divide into Q, K and V is unknown without the heads"
    groups = (rows - heads * size) // (2 * size)
    if groups == 0 or heads % groups:
        return f"{rows} rows do not hold {heads} query heads of width {size} and their keys"
    queries = heads // groups * size
    block = queries + 2 * size
    left, right = (Factor(key, False, a, b, block) for a, b in
                   ((0, queries), (queries, queries + size)))  # fmt: skip
    return _attention(match[1], left, right, shapes, facts)


def _attention(
    prefix: str, left: Factor, right: Factor, shapes: Shapes, facts: Facts
) -> Pair | str:
    """Pair W_Q and W_K: the product W_Q^T W_K of the stored (out, in) weights."""
    if any(key not in shapes or len(shapes[key]) != 2 for key in (left.key, right.key)):
        return "not a matrix (is it quantized?)"
    module = prefix.removesuffix(".")
    (queries, n), (keys, m) = left.size(shapes), right.size(shapes)
    heads, key_heads = _divide(queries, keys, *facts.heads(module))
    if queries != keys and heads is None:
        return f"Q has {queries} rows, K has {keys}, and the number of heads is unknown"
    notes = []
    if heads != key_heads:
        notes.append(f"{heads} query heads share {key_heads} key heads")
    if any(f"{prefix}{norm}.weight" in shapes for norm in NORMS):
        notes.append("Q and K are normalized: their scale is inert, the norms mean nothing")
    shape = (n, queries, m)
    return Pair(
        module or "attention", "attention", left, right, shape, heads, key_heads, notes=tuple(notes)
    )


def _divide(
    queries: int, keys: int, count: int | None, width: int | None
) -> tuple[int | None, int | None]:
    """Give the numbers of query and key heads, if both follow."""
    if not width:
        width = queries // count if count and queries % count == 0 else None
    if not width or queries % width or keys % width or queries % keys:
        return None, None
    return queries // width, keys // width
