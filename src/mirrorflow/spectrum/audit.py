"""`audit`: the spectra of a checkpoint on disk, read pair by pair, without building its model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from ._checkpoint_files import adapters_below, files_of, reader, shards_left_out
from ._configuration import (
    HEADER,
    adapter_config,
    model_config,
    packed_configurations,
    scale_patterns,
    start_notes,
)
from ._discovery import find
from ._measurement import measure
from ._quantized import method
from ._shards import Rows
from .pairs import (
    Adapter,
    Factor,
    Found,
    Named,
    NothingToMeasure,
    Pair,
    checked,
    choose,
    clean,
    named,
)
from .records import Measurement

__all__ = ["audit", "heads", "part_of"]

READABLE = ("F64", "F32", "F16", "BF16")
PREFIX = "base_model.model."  # PEFT writes it before the names that its patterns are matched with
CORE = 1 << 15  # rows of the largest square matrix: LAPACK counts its entries in 32 bits
NAME = 1000  # characters that the name of a weight has at most


def audit(
    path: str | Path,
    *,
    level: str = "layer",
    pairs: Named | None = None,
    match: str | None = None,
    values: bool = False,
) -> Measurement:
    r"""Measure the spectra of the products in a checkpoint.

    The weights are read pair by pair, and the model is never built: whatever the shapes, memory
    stays below 128 bytes for each element of the largest pair, 16 copies of it in float64. A
    product that needs a square matrix of more than 32,768 rows is not measured, and listed with
    that reason. The number of heads comes from ``config.json``, LoRA's scale from
    ``adapter_config.json``, where they lie beside the weights, or in files of kohya's scripts
    (``lora_down``, ``lora_up``) from their ``alpha``. Files of ``torch.save`` and folders of
    ``torch.distributed.checkpoint`` are read without running anything in them, weight by weight,
    old files of torch (before 1.6) as a whole.

    Parameters
    ----------
    path : str or Path
        A safetensors file; a Hugging Face folder, sharded or not; a LoRA adapter; a file of
        ``torch.save`` (``.bin``, ``.pt``, ``.pth``, ``.ckpt``); a folder of
        ``torch.distributed.checkpoint.save``.
    level, pairs, match, values
        As for `SpectralTracker`; `pairs` takes the names in the file.

    Returns
    -------
    Measurement
        ``table`` prints it, ``to_json`` stores it.

    Raises
    ------
    FileNotFoundError
        If the path, or a shard that an index names, does not exist.
    ValueError
        If it is no checkpoint, a damaged one, or one without pairs; the message says which.
    ImportError
        Without the package safetensors.

    Examples
    --------
    >>> import tempfile, torch
    >>> from safetensors.torch import save_file
    >>> folder = Path(tempfile.mkdtemp())
    >>> weights = {"q_proj.weight": torch.eye(8), "k_proj.weight": torch.eye(8)}
    >>> save_file(weights, folder / "model.safetensors")
    >>> round(audit(folder).mean_ratio ** 2, 6)
    8.0
    """
    checked(level)
    checkpoint = Checkpoint(Path(path))
    shapes = checkpoint.shapes
    found = checkpoint.readable(choose(find(shapes, checkpoint, values), level, match))
    own = named(pairs, shapes)
    for pair in own:
        if large := _too_large(pair):
            raise ValueError(f"pair {pair.name!r}: {large}. Take a part of its rows by [a:b].")
    chosen = (*found.pairs, *own)
    if not chosen:
        reasons = (*found.skipped, *((str(path), note) for note in checkpoint.notes))
        raise NothingToMeasure(str(path), reasons, "audit")
    skipped = (*found.skipped, *adapters_below(Path(path)))
    records = measure(chosen, checkpoint.load, level, batch=0)
    return Measurement(records, skipped, checkpoint.notes)


def _too_large(pair: Pair) -> str:
    """Say why a product is not measured, if the matrices that takes are too large."""
    n, r, m = pair.shape
    core = max(min(n, m, r), min(r, n + m))  # the product, or a Gram matrix
    return f"it takes {core} x {core} numbers, and at most {CORE}^2 are taken" * (core > CORE)


class Checkpoint:
    """The weights of a checkpoint by their cleaned names, and the facts in its configuration."""

    def __init__(self, path: Path) -> None:
        folder = path if path.is_dir() else path.parent
        self._open = reader()
        self._header: dict[str, str] = {}
        self._files: dict[str, tuple[Path, str]] = {}
        self._types: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.doubled: set[str] = set()
        files = files_of(path)
        self.notes = shards_left_out(files)
        for file, names in files.items():
            self._list(file, names)
        self._config = model_config(folder / "config.json")
        self._adapter = adapter_config(file := folder / "adapter_config.json")
        self._alphas = scale_patterns(self._adapter, file)
        self._packed = packed_configurations(self._header)

    def _list(self, file: Path, names: set[str] | None) -> None:
        """List the weights of a file; ``names`` are those that an index expects there."""
        with self._open(file) as content:
            present = set(content.keys())
            self._header = {**self._header, **(content.metadata() or {})}
            if names and (missing := sorted(names - present)):
                raise ValueError(
                    f"{file} must hold {missing[0]}, which the index names. Save it again."
                )
            if long := next((name for name in present if len(name) > NAME), ""):
                raise ValueError(
                    f"{file} must name weights in at most {NAME} characters, got {long[:40]}..."
                )
            chosen = names or present
            counts = Counter(map(clean, chosen))
            for name in sorted(chosen, key=_natural):
                part = content.get_slice(name)
                key = clean(name)
                if counts[key] > 1:  # x and _orig_mod.x: the others keep their names
                    self.doubled |= {key, name}
                    key = key if key in chosen and name == key else name
                if (other := self._files.get(key, (file, ""))[0]) != file:
                    raise ValueError(
                        f"{name} must stand in one file of a set without an index, got "
                        f"{other} and {file.name}. Name one of them."
                    )
                self._files[key] = (file, name)
                self._types[key] = part.get_dtype()
                self.shapes[key] = tuple(part.get_shape())

    @property
    def names(self) -> dict[str, str]:
        """The names in the files, by the cleaned ones."""
        return {key: name for key, (_, name) in self._files.items()}

    def load(self, factor: Factor) -> Tensor | Rows:
        """Read the rows of a factor, and nothing else; the file is closed again."""
        file, name = self._files[factor.key]
        if (kind := self._types[factor.key]) not in READABLE:  # a user has named it
            raise ValueError(
                f"{file}: {name} must hold floating-point numbers, got {kind}. Dequantize it first."
            )
        span = slice(factor.start, factor.stop)
        with self._open(file) as content:
            part = content.get_slice(name)
            if factor.stop is None or factor.block or len(self.shapes[factor.key]) > 2:
                return factor.rows(part[:])
            return part[:, span].mT if factor.transposed else part[span]

    def readable(self, found: Found) -> Found:
        """Set aside what is stored in a type that needs more than the weight to be understood."""
        pairs, skipped = [], list(found.skipped)
        for pair in found.pairs:
            kinds = {self._types[factor.key] for factor in (pair.left, pair.right)}
            if not kinds <= set(READABLE):
                stored = f"stored as {', '.join(sorted(kinds))}: quantized"
                by = {method(factor.key, self.shapes) for factor in (pair.left, pair.right)}
                how = f" ({', '.join(sorted(by - {''}))})" if by - {""} else ""
                skipped.append((pair.label, f"{stored}{how}"))
            elif large := _too_large(pair):
                skipped.append((pair.label, large))
            else:
                pairs.append(pair)
        return Found(tuple(pairs), tuple(skipped))

    def heads(self, module: str) -> tuple[int | None, int | None]:
        """Read the number of heads and their width from config.json."""
        return heads(self._config, module)

    def architecture(self, module: str) -> str:
        """Read the model_type from config.json, or timm's name of the model."""
        found = str(
            part_of(self._config, module).get("model_type") or self._config.get("model_type") or ""
        )
        timm = self._config.get("architecture")
        return found or (f"timm/{timm}" if timm else "")

    def order(self, module: str) -> str:
        """Files do not tell."""
        return ""

    def normalized(self, module: str) -> bool:
        """Whether Llama 4 normalizes Q and K, in the layers that have rotary embeddings."""
        config = part_of(self._config, module)
        layer = re.search(r"layers\.([0-9]{1,9})\.", f"{module}.")
        rotary = config.get("no_rope_layers") or []  # 1 where there are some
        turned = layer is None or int(layer[1]) >= len(rotary) or rotary[int(layer[1])]
        is_llama = str(config.get("model_type", "")).startswith("llama4")
        return is_llama and bool(config.get("use_qk_norm")) and bool(turned)

    def adapter(self, module: str, name: str, rank: int, alphas: Sequence[str] = ()) -> Adapter:
        """Compute LoRA's scale from its alpha in the file, a configuration, or the header."""
        config, plain = self._adapter, clean(f"{module}.").removesuffix(".")
        for key in alphas:
            if key in self._files:
                return Adapter(self._number(key) / rank)
        for target in config.get("target_parameters") or ():
            if module.endswith(target.rpartition(".")[0]):
                return Adapter(1.0, skip="LoRA on stacked experts is not one product")
        if "lora_alpha" in config:
            alpha = self._alphas.value(plain.removeprefix(PREFIX), config["lora_alpha"])
            return Adapter(self._divided(alpha, rank, config), self._starts(config))
        if "scale" in (mlx := config.get("lora_parameters") or {}):
            return Adapter(float(mlx["scale"]) * float(mlx.get("alpha", rank)) / rank)
        return self._by_header(plain, rank) or Adapter(1.0, (self._unscaled(module),))

    @staticmethod
    def _divided(alpha: float, rank: int, config: Mapping[str, Any]) -> float:
        """Return alpha / r, or alpha / sqrt(r)."""
        return alpha / (sqrt(rank) if config.get("use_rslora") else rank)

    @staticmethod
    def _starts(config: Mapping[str, Any]) -> tuple[str, ...]:
        return start_notes([config.get("init_lora_weights")])

    def _by_header(self, module: str, rank: int) -> Adapter | None:
        """Return the scale by the safetensors header; None where it says nothing."""
        for part, config in self._packed.items():
            if "lora_alpha" in config and (not part or module.startswith(f"{part}.")):
                inside = module.removeprefix(f"{part}.") if part else module
                alphas = scale_patterns(config, HEADER)
                alpha = alphas.value(inside, config["lora_alpha"])
                return Adapter(self._divided(alpha, rank, config), self._starts(config))
        for key in ("network_alpha", "ss_network_alpha"):
            if (alpha := _float(self._header.get(key))) is not None:
                return Adapter(alpha / rank, (f"its alpha is {key} of the file's header",))
        return None

    def _unscaled(self, module: str) -> str:
        if f"{module}.lora_down.weight" in self._files:
            return "it has no alpha, which is then its rank: scale 1"
        return "its scale is unknown without adapter_config.json, taken as 1"

    def _number(self, key: str) -> float:
        """Read a single number."""
        file, name = self._files[key]
        if prod(self.shapes[key]) != 1:
            shape = " x ".join(map(str, self.shapes[key]))
            raise ValueError(f"{file}: {name} must hold one number, got {shape}. Save it again.")
        with self._open(file) as content:
            found = float(content.get_tensor(name))
        if not isfinite(found):
            raise ValueError(f"{file}: {name} must be a finite number, got {found}. Save it again.")
        return found


def _float(text: Any) -> float | None:
    """Return the finite number that a text of a header is; None where it is none."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if isfinite(value) else None


def _natural(name: str) -> list[Any]:
    """Sort layer 10 after layer 9."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)]


# What a checkpoint's config.json says about one of its modules.

COUNTS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
WIDTHS = ("head_dim", "d_kv", "dim_head", "d_head", "attention_head_dim")
MODEL_WIDTHS = ("embed_dim", "n_embd", "d_model", "dim", "emb_dim", "hidden_size")
OTHER_NAMES = {  # of the parts of config.json, in modules
    "vision": "vision|visual", "text": "text|language_model",
    "backbone": "backbone|pixel_level_module",
}  # fmt: skip
# Grounding DINO's layers of the text, GroupViT's assignment: another number than is stated.
UNSTATED = re.compile(r"(?:^|\.)(?:text_enhancer_layer\.|assign$)")
LARGEST = 1 << 31  # no number of heads is larger, nor a width
NO_PARTS = ("attn_config", "ffn_config")  # MPT, DBRX: options in a dictionary of their own


def heads(config: Mapping[str, Any], module: str) -> tuple[int | None, int | None]:
    """Read the number of heads and their width.

    Where no width is stated the heads divide the width of the model. That is given, too: where
    it contradicts the shapes, the number belongs to another part. Neither is known where the
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
    """Return the part that a module's name begins with or, of several in it, names first."""
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
    """Return a configuration as one layer has it: Gemma 4 has wider heads in some."""
    found = re.search(r"layers\.([0-9]{1,9})\.", f"{module}.")
    if found is None:
        return config
    kinds, wide = config.get("layer_types") or [], config.get("global_head_dim")
    full = kinds[int(found[1]) :][:1] == ["full_attention"]
    layers = config.get("per_layer_config")
    own = layers.get(found[1]) if isinstance(layers, dict) else None
    own = own if isinstance(own, dict) else {}
    return {**config, **({"head_dim": wide} if wide and full else {}), **own}


def _stage(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """Return a configuration as one stage of a pyramid has it: Swin's num_heads is a list."""
    found = re.search(r"\.([0-9]{1,9})\.(?:blocks\.|layers\.)?\d+\.", module)
    lists = [key for key in COUNTS if isinstance(config.get(key), list)]
    if found is None or not lists:
        return config
    own = {key: (config[key][int(found[1]) :] or [None])[0] for key in lists}
    return {**config, **dict.fromkeys(MODEL_WIDTHS), **own}  # the width grows with the stages


def _integer(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """Return the first entry that is a positive integer."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < LARGEST:
            return value
    return None
