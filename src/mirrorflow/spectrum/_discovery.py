"""The factor pairs of a model, found by the names and shapes of its weights.

Names and shapes are all that a checkpoint on disk has, so that one finder serves models and files.
What names do not tell (the number of heads, LoRA's scale) comes from `Facts`: `tracker` reads them
from the modules, `audit` from the configuration files. Where attention has its factors is written
in `layouts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from ._attention import Projections, forward_notes, outputs, projections
from .pairs import Factor, Facts, Found, Pair, Shapes

__all__ = ["find"]

# The names of LoRA's two factors: PEFT, kohya's scripts, diffusers before PEFT.
LORA = (
    (r"(.*)\.lora_A(?:\.([^.]+))?\.weight", ".lora_A.", ".lora_B."),
    (r"(.*)\.lora_embedding_A(?:\.([^.]+))?", ".lora_embedding_A", ".lora_embedding_B"),
    (r"(.*)\.lora_down()\.weight", ".lora_down.", ".lora_up."),
    (r"(.*_lora)\.down()\.weight", "_lora.down.", "_lora.up."),
)
NO_PRODUCT = {  # what other updates are made of
    ".lora_E": "AdaLoRA's product has a third factor, lora_E",
    ".vera_lambda_b": "VeRA's factors are frozen, between two scales that train",
    ".lora_mid.weight": "LoRA with lora_mid has three factors",
    ".hada_w1_a": "LoHa's update is not a product of two factors",
    ".lokr_w1": "LoKr's update is a Kronecker product",
    ".lokr_w1_a": "LoKr's update is a Kronecker product",
}


def find(shapes: Shapes, facts: Facts, values: bool = False) -> Found:
    """Find the LoRA updates and the attention layers among weights; W_O W_V too with ``values``."""
    pairs: list[Pair] = []
    skipped: list[tuple[str, str]] = []
    for key in shapes:
        for found in (lora(key, shapes, facts), *attention(key, shapes, facts, values)):
            if isinstance(found, Pair):
                pairs.append(found)
            elif found:
                skipped.append((key, found))
    adapted = {pair.name for pair in pairs if pair.kind == "lora"}
    empty = [(pair.label, "it is empty") for pair in pairs if 0 in pair.shape]
    kept = tuple(_marked(pair, adapted) for pair in pairs if 0 not in pair.shape)
    return Found(kept, (*skipped, *empty))


def _marked(pair: Pair, adapted: set[str]) -> Pair:
    """Note on attention whose projections have adapters that only the base is measured."""
    holders = {factor.key.rpartition(".")[0] for factor in (pair.left, pair.right)}
    if pair.kind == "lora" or not holders & adapted:
        return pair
    return replace(pair, notes=(*pair.notes, "base weights, without the adapters' updates"))


def lora(key: str, shapes: Shapes, facts: Facts) -> Pair | str | None:
    """LoRA on Linear, Conv1D, convolutions and Embedding: scale B A, B (out, r) and A (r, in)."""
    for pattern, down, up in LORA:
        if match := re.fullmatch(pattern, key):
            left = Factor(key.replace(down, up), transposed=True)
            return _lora(match[1], match[2] or "", left, key, shapes, facts)
    return next((reason for end, reason in NO_PRODUCT.items() if _ends(key, end)), None)


def _ends(key: str, end: str) -> bool:
    return key.endswith(end) or f"{end}." in key


def _lora(
    module: str, adapter: str, left: Factor, key: str, shapes: Shapes, facts: Facts
) -> Pair | str | None:
    """Pair the two weights of an adapter."""
    if f"{module}.lora_mid.weight" in shapes:
        return None  # its third factor says why
    if left.key not in shapes:
        return f"{left.key} is missing"
    if min(len(shapes[key]), len(shapes[left.key])) < 2:
        return "not a matrix (is it quantized?)"
    if any(size != 1 for size in shapes[left.key][2:]):
        return "the product of these convolutions is not a matrix product"
    right = Factor(key)
    rank, m = right.size(shapes)
    inner, n = left.size(shapes)
    if 0 in (rank, m, inner, n):
        return "it is empty"
    if inner != rank:
        grouped = len(shapes[key]) > 2 and rank % inner == 0
        return (
            f"a convolution in {rank // inner} groups has a product for each"
            if grouped
            else f"A and B have no product: A has {rank} rows, B {inner} columns"
        )
    known = facts.adapter(module, adapter, rank)
    if known.skip:
        return known.skip
    suffix = f".{adapter}" if adapter else ""
    dora = (
        f".lora_magnitude_vector{suffix}",
        f".lora_magnitude_vector{suffix}.weight",
        ".dora_scale",
    )
    notes = known.notes
    if any(f"{module}{end}" in shapes for end in dora):
        notes = (*notes, "DoRA: A B before its normalization")
    return Pair(
        module, "lora", left, right, (n, rank, m), adapter=adapter, scale=known.scale, notes=notes
    )


def attention(key: str, shapes: Shapes, facts: Facts, values: bool) -> Iterator[Pair | str]:
    """W_Q^T W_K of the attention module whose first weight this is, and W_O W_V."""
    found = projections(key, shapes, facts)
    if found is None:
        return
    scores = found if isinstance(found, str) else _scores(found, shapes, facts)
    yield scores
    if values and isinstance(found, Projections) and isinstance(scores, Pair):
        yield _values(found, scores, shapes, facts)


def _scores(found: Projections, shapes: Shapes, facts: Facts) -> Pair | str:
    """Pair W_Q and W_K: the product W_Q^T W_K of the stored (out, in) weights."""
    left, right = found.query, found.key
    if not all(_matrix(factor, shapes) for factor in (left, right)):
        return "not a matrix (is it quantized?)"
    module = found.prefix.removesuffix(".")
    (queries, n), (keys, m) = left.size(shapes), right.size(shapes)
    heads, key_heads = _divide(queries, keys, *facts.heads(module))
    if queries != keys and heads is None:
        return (
            f"Q has {queries} rows, K has {keys}, and the number of heads is unknown: it is read "
            "from the module, or from the config.json beside a file"
        )
    acted, _ = forward_notes(found.prefix, shapes, facts)
    notes = (*found.notes, *_shared(heads, key_heads), *acted)
    name, shape = module or "attention", (n, queries, m)
    return Pair(name, "attention", left, right, shape, heads, key_heads, notes=notes)


def _values(found: Projections, scores: Pair, shapes: Shapes, facts: Facts) -> Pair | str:
    """Pair W_O and W_V: the product W_O W_V of the stored (out, in) weights, as heads apply it."""
    value = found.value
    if value is None or not _matrix(value, shapes):
        return "its V is not known: no product W_O W_V"
    rows, m = value.size(shapes)
    for key in outputs(found.prefix, shapes):
        left = Factor(key, transposed=not found.query.transposed)
        if not _matrix(left, shapes):
            continue
        r, n = left.size(shapes)
        heads, key_heads = scores.heads, scores.key_heads
        if not heads or not key_heads or r % heads or rows * heads != r * key_heads:
            heads = key_heads = None
        if heads or r == rows:
            _, acted = forward_notes(found.prefix, shapes, facts)
            notes = (*found.notes, *_shared(heads, key_heads), *acted)
            shape = (n, r, m)
            return Pair(
                scores.name, "value-output", left, value, shape, heads, key_heads, notes=notes
            )
    return f"no output projection is known that fits V ({rows} rows): no product W_O W_V"


def _matrix(factor: Factor, shapes: Shapes) -> bool:
    """Whether a weight is there, and a matrix or a convolution over single pixels."""
    shape = shapes.get(factor.key, ())
    return len(shape) > 1 and all(size == 1 for size in shape[2:])


def _shared(heads: int | None, key_heads: int | None) -> tuple[str, ...]:
    return () if heads == key_heads else (f"{heads} query heads share {key_heads} key heads",)


def _divide(
    queries: int, keys: int, count: int | None, width: int | None
) -> tuple[int | None, int | None]:
    """Return the numbers of query and key heads, if both follow and nothing contradicts them."""
    if count and width and count * width != queries:
        return None, None  # the facts are another layer's, or another part's
    if not width:
        width = queries // count if count and queries % count == 0 else None
    if not width or not keys or queries % width or keys % width or queries % keys:
        return None, None
    return queries // width, keys // width
