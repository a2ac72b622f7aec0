"""Quantized weights of attention, by the names of what is stored beside or instead of them."""

from __future__ import annotations

import re
from dataclasses import replace

from ._attention import first_names
from .pairs import Pair, Shapes

__all__ = ["method", "quantized", "scaled"]

# Ends of names that stand for a weight, with the method; GPTQ's has g_idx beside it, AWQ's not.
INSTEAD = {
    ".qweight": "packed integers of GPTQ or AWQ", ".weight_packed": "packed by compressed-tensors",
    ".W_q": "HQQ", ".codes": "AQLM", ".weight._data": "quanto", ".weight_qdata": "torchao",
    "_blocks": "MXFP4 blocks",
}  # fmt: skip
# Ends of names beside a weight of the same name.
BESIDE = {
    ".weight.absmax": "bitsandbytes, 4 bits", ".weight.quant_map": "bitsandbytes, 4 bits",
    ".SCB": "bitsandbytes, 8 bits", ".biases": "MLX",
}  # fmt: skip
SCALES = (".weight_scale_inv", ".weight_scale", ".scale_weight", ".weight_scales")
REMEDY = "dequantize it, or load it and measure the model"


def method(weight: str, shapes: Shapes) -> str:
    """Name what quantizes a weight, by what is stored beside it; empty where nothing is."""
    stem = weight.removesuffix(".weight")
    beside = next((name for end, name in BESIDE.items() if f"{stem}{end}" in shapes), "")
    return beside or next((end[1:] for end in SCALES if f"{stem}{end}" in shapes), "")


def quantized(key: str, shapes: Shapes) -> str:
    """Say that a weight with which attention begins is quantized; empty of any other weight."""
    for end, name in INSTEAD.items():
        if key.endswith(end) and _begins(key.removesuffix(end)):
            named = "GPTQ" if f"{key.removesuffix('.qweight')}.g_idx" in shapes else name
            return f"quantized ({named}): {REMEDY}"
    if not key.endswith(".weight") or not _begins(key.removesuffix(".weight")):
        return ""
    name = method(key, shapes)
    return f"quantized ({name}): {REMEDY}" if name in BESIDE.values() else ""


def _begins(module: str) -> bool:
    """Whether a module is the first of those that attention's Q and K are looked for in."""
    return re.split(r"[.]", module)[-1] in first_names()


def scaled(pair: Pair, shapes: Shapes) -> Pair:
    """Note on a pair whose weights have scales beside them that were not multiplied in."""
    found = {
        end[1:]
        for factor in (pair.left, pair.right)
        for end in SCALES
        if f"{factor.key.removesuffix('.weight')}{end}" in shapes
    }
    notes = tuple(f"{name} stands beside its weights: it is left out" for name in sorted(found))
    return replace(pair, notes=(*pair.notes, *notes)) if notes else pair
