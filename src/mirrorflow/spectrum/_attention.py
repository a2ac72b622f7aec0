"""Layouts of attention weights: where Q, K, V and the output are, family by family.

Names and shapes do not tell the order of the rows of a fused weight. `architectures.toml` has it
for models whose code was read; other such weights get a reason why they are not measured.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import prod
from typing import Any

from .pairs import Factor, Facts, Shapes

__all__ = [
    "Projections",
    "first_names",
    "forward_notes",
    "normalizations",
    "outputs",
    "projections",
]


@cache
def _architectures() -> dict[str, Any]:
    """Return the tables of architectures.toml."""
    text = resources.files(__package__ or "").joinpath("architectures.toml")
    return tomllib.loads(text.read_text(encoding="utf-8"))


def _names(table: str) -> tuple[str, ...]:
    """Return a list of names."""
    return tuple(_architectures()[table])


def _model(name: str) -> dict[str, Any]:
    """Return what is known of a model; nothing for one that has no line."""
    return _architectures()["models"].get(name, {})


@dataclass(frozen=True)
class Projections:
    """Where Q, K and V of an attention module are, each as rows (heads x width, in)."""

    prefix: str  # of the module, with its dot
    query: Factor
    key: Factor
    value: Factor | None
    notes: tuple[str, ...] = ()


def normalizations() -> tuple[str, ...]:
    """Return the names of normalizations of Q."""
    return _names("norms")


@cache
def first_names() -> frozenset[str]:
    """Return the names of the modules at which attention is found: Q's, or a fused one's."""
    fused = (*_names("fused"), "wqkv", "query_key_value")
    return frozenset((*(names[0] for names in _architectures()["separate"]), *fused))


def _refused_names() -> Iterator[tuple[str, str]]:
    """Return the ends of names that belong to no pair, with the reasons."""
    return iter(_architectures()["refused_names"].items())


def projections(key: str, shapes: Shapes, facts: Facts) -> Projections | str | None:
    """Find the projections that begin at a weight; a reason if it is one of an unknown order."""
    if key.endswith(".q_b_proj.weight") and key.replace(".q_b_", ".kv_b_") not in shapes:
        return "latent attention forms Q through a norm: it is not a product of two factors"
    if reason := next((why for end, why in _refused_names() if key.endswith(end)), None):
        return reason
    for family in (separate, fused, multihead, interleaved):
        if found := family(key, shapes, facts):
            return found
    return None


def separate(key: str, shapes: Shapes, facts: Facts) -> Projections | str | None:
    """Q, K and V as Linear modules side by side, stored as (heads x width, in)."""
    for query, other, third in _architectures()["separate"]:
        match = re.fullmatch(rf"((?:.*\.)?){query}((?:\.linear)?\.weight)", key)
        if not match or len(shapes[key]) < 2:
            continue
        prefix, end = match.groups()  # Gemma 4's encoders keep a Linear between two bounds
        if any(f"{prefix}{name}.weight" in shapes for name in _names("convolutions")):
            return "K passes a convolution over the tokens: the scores are not a product with it"
        if (partner := f"{prefix}{other}{end}") in shapes:
            value = f"{prefix}{third}{end}"
            found = Factor(value) if value in shapes else None
            bounds = () if end == ".weight" else ("its clipping is left out",)
            parts = Projections(prefix, Factor(key), Factor(partner), found, bounds)
            return _ungated(parts, facts, shapes)
        return _alone(prefix, query, shapes)
    return None


def _alone(prefix: str, query: str, shapes: Shapes) -> str | None:
    """Return why K has no weight of its own beside Q's, or None where another rule says it."""
    if query in ("q", "query") or f"{prefix}kv_b_proj.weight" in shapes:
        return None  # maybe no projection; latent attention, whose K says so
    return (
        "there is no K beside it: it is another layer's, in one weight with V, or called otherwise"
    )


def _ungated(found: Projections, facts: Facts, shapes: Shapes) -> Projections | str:
    """Take the queries out of a weight that also holds a gate for each of them."""
    module = found.prefix.removesuffix(".")
    count, size = facts.heads(module)
    rows = found.query.size(shapes)[0]
    if not count or not size or rows != 2 * count * size:
        return found
    if not _model(_family(facts.architecture(module))).get("gated"):
        return f"Q has {rows} rows, twice those of {count} heads of width {size}"
    query = Factor(found.query.key, False, 0, size, 2 * size)
    note = "the gate on the values is left out"
    return Projections(found.prefix, query, found.key, found.value, (note,))


def fused(key: str, shapes: Shapes, facts: Facts) -> Projections | str | None:
    """Q, K and V in one weight, stored as (Q + K + V, in), or by GPT-2's Conv1D transposed."""
    match = re.fullmatch(
        rf"((?:.*\.)?)({'|'.join((*_names('fused'), 'wqkv', 'in_proj'))})\.weight", key
    )
    if not match or len(shapes[key]) < 2:
        return None
    module = match[1].removesuffix(".")
    kind, order = _family(facts.architecture(module)), facts.order(module)
    known = _model(kind)
    if match[2] == "in_proj" and known.get("order") != "heads":
        return None  # Mamba has one as well
    if any(size != 1 for size in shapes[key][2:]):
        return "a convolution over several pixels is no matrix"
    if "refused" in known:
        return known["refused"]
    by_model = known.get("full" if _tripled(shapes[key]) and "full" in known else "order")
    if "heads" in (by_model, order):
        return _by_heads(match[1], key, shapes, facts)
    divided = by_model in ("blocks", "grouped") or not kind
    if match[2] == "wqkv" or not divided or order == "unknown":
        return f"the order of the rows of {match[2]} is not known {_where(kind)}"
    return _blocks(match[1], key, match[2], shapes, facts)


def _blocks(prefix: str, key: str, name: str, shapes: Shapes, facts: Facts) -> Projections | str:
    """Divide [Q, K, V]."""
    module = prefix.removesuffix(".")
    rows, columns = shapes[key][0], prod(shapes[key][1:])
    kind = _family(facts.architecture(module))
    apart = f"{prefix}q_attn.weight"  # GPT-2's cross-attention: Q apart, [K, V] fused
    if name == "c_attn" and apart in shapes:
        if not _model(kind).get("cross", True):
            return f"cross-attention of {kind} is not known"
        half, last = (Factor(key, True, i * columns // 2, (i + 1) * columns // 2) for i in (0, 1))
        return Projections(prefix, Factor(apart, True), half, last)
    transposed = columns == 3 * rows
    total, width = (columns, rows) if transposed else (rows, columns)
    count, size = facts.heads(module)
    if _model(kind).get("order") == "grouped":
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
    if not match or len(shapes[key]) < 2:
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
    if _model(_family(facts.architecture(module))).get("order") != "interleaved":
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
    beside = (f"{prefix}{name}{end}" for name in _names("outputs") for end in ("", ".linear"))
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
        return "timm_uneven" if name.removeprefix("timm/").startswith(_names("uneven")) else "timm"
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


# Notes on what attention does beside projecting, which a product does not show.

CONVOLVED = "convolution_projection_key.convolution_projection.convolution.weight"  # CvT


def forward_notes(
    prefix: str, shapes: Shapes, facts: Facts
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return notes on Q K^T, and on W_O W_V: what attention does beside projecting."""
    module = prefix.removesuffix(".")
    kind = facts.architecture(module)
    scores = [
        f"{name} scales the dimensions of Q: it is left out"
        for name in _names("scales")
        if f"{prefix}{name}" in shapes
    ]
    if (
        _model(kind).get("normalized") == "scores"
        or _has_norm(prefix, shapes)
        or facts.normalized(module)
    ):
        scores.append("Q and K are normalized: their scale is inert, the norms mean nothing")
    values = []
    if _model(kind).get("normalized") == "values":
        values.append("V is normalized: its scale is inert, the norms mean nothing")
    if f"{prefix}{CONVOLVED}" in shapes:
        for found in (scores, values):
            found.append("Q, K and V are projections of tokens after a convolution")
    return tuple(scores), tuple(values)


def _has_norm(prefix: str, shapes: Shapes) -> bool:
    """Return whether a normalization of Q has a weight."""
    ends = (".weight", ".norms.0.weight", ".scale")
    names = ("logit_scale", *(f"{norm}{end}" for norm in normalizations() for end in ends))
    return any(f"{prefix}{name}" in shapes for name in names)
