"""What a checkpoint's config.json says about one of its modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["heads", "part_of"]

COUNTS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
WIDTHS = ("head_dim", "d_kv", "dim_head", "d_head", "attention_head_dim")
MODEL_WIDTHS = ("embed_dim", "n_embd", "d_model", "dim", "emb_dim", "hidden_size")
OTHER_NAMES = {  # of the parts of config.json, in modules
    "vision": "vision|visual", "text": "text|language_model",
    "backbone": "backbone|pixel_level_module",
}  # fmt: skip
# Grounding DINO's layers of the text, GroupViT's assignment: another number than is stated.
UNSTATED = re.compile(r"(?:^|\.)(?:text_enhancer_layer\.|assign$)")
NO_PARTS = ("attn_config", "ffn_config")  # MPT, DBRX: options in a dictionary of their own


def heads(config: Mapping[str, Any], module: str) -> tuple[int | None, int | None]:
    """Read the number of heads and their width.

    Where no width is stated the heads divide the width of the model. That is given, too: where
    it contradicts the shapes, the number is that of another part. Neither is known where the
    file does not state it.
    """
    if UNSTATED.search(module):
        return None, None
    own = _stage(_layer(part_of(config, module), module), module)
    side = "decoder" if "decoder" in module else "encoder"
    keys = ("attention_heads", "num_attention_heads")
    sides = (*(f"{side}_{key}" for key in keys), f"num_{side}_attention_heads")
    count, width = _integer(own, (*sides, *COUNTS)), _integer(own, WIDTHS)
    if count and (ratio := _integer(own, ("head_ratio",))):  # ConvBERT
        return max(count // ratio, 1), None
    whole = _integer(own, MODEL_WIDTHS)
    if count and whole and not width and whole % count == 0:
        width = whole // count
    return count, width


def part_of(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """Give the part that a module's name begins with or, of several in it, names first."""
    places = []
    for key, part in config.items():
        if isinstance(part, dict) and key not in NO_PARTS:
            stem = key.removesuffix("_config")
            names = OTHER_NAMES.get(stem, re.escape(stem))
            if found := re.search(rf"(?:^|[._])(?:{names})(?:[._]|$)", module):
                places.append((found.start(), key))
    if places:
        return part_of(config[min(places)[1]], module)
    if any(key in config for key in COUNTS):
        return config
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _layer(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """Give a configuration as one layer has it: Gemma 4 has wider heads in some."""
    found = re.search(r"layers\.(\d+)\.", f"{module}.")
    if found is None:
        return config
    kinds, wide = config.get("layer_types") or [], config.get("global_head_dim")
    full = kinds[int(found[1]) :][:1] == ["full_attention"]
    layers = config.get("per_layer_config")
    own = layers.get(found[1]) if isinstance(layers, dict) else None
    return {**config, **({"head_dim": wide} if wide and full else {}), **(own or {})}


def _stage(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """Give a configuration as one stage of a pyramid has it: Swin's num_heads is a list."""
    found = re.search(r"\.(\d+)\.(?:blocks\.|layers\.)?\d+\.", module)
    lists = [key for key in COUNTS if isinstance(config.get(key), list)]
    if found is None or not lists:
        return config
    own = {key: (config[key][int(found[1]) :] or [None])[0] for key in lists}
    return {**config, **dict.fromkeys(MODEL_WIDTHS), **own}  # the width grows with the stages


def _integer(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """Give the first entry that is a positive integer."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return None
