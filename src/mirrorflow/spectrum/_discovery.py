"""The factor pairs of a model, found by the names and shapes of its weights.

Names and shapes are all that a checkpoint on disk has, so that one finder serves models and files.
What names do not tell (the number of heads, LoRA's scale) comes from `Facts`: `tracker` reads them
from the modules, `audit` from the configuration files. Where attention has its factors is written
in `_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ._adapters import lora, unmeasured
from ._attention import Projections, forward_notes, outputs, projections
from ._quantized import quantized, scaled
from .pairs import APART, Factor, Facts, Found, Pair, Shapes

__all__ = ["find"]


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
    strange = unmeasured(shapes, pairs, [key for key, _ in skipped])
    skipped += [(key, "it looks like a part of an adapter of no known form") for key in strange]
    adapted = {pair.name for pair in pairs if pair.kind == "lora"}
    empty = [(pair.label, "it is empty") for pair in pairs if 0 in pair.shape]
    kept = tuple(scaled(_marked(pair, adapted), shapes) for pair in pairs if 0 not in pair.shape)
    return Found(kept, (*skipped, *empty))


def _marked(pair: Pair, adapted: set[str]) -> Pair:
    """Note on attention whose projections have adapters that only the base is measured."""
    if pair.kind == "lora" or not pair.holders & adapted:
        return pair
    return replace(pair, notes=(*pair.notes, APART))


def attention(key: str, shapes: Shapes, facts: Facts, values: bool) -> Iterator[Pair | str]:
    """W_Q^T W_K of the attention module whose first weight this is, and W_O W_V."""
    if reason := quantized(key, shapes):
        yield reason
        return
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
