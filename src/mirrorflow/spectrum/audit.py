"""`audit`: the spectra of a checkpoint on disk, read pair by pair, without building its model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from .configuration import heads, part_of
from .files import adapter_config, adapters_below, files_of, json_of, reader
from .finding import find
from .measurement import measure
from .pairs import Adapter, Factor, Found, Named, checked, choose, clean, named, nothing_found
from .records import Measurement
from .shards import Rows

__all__ = ["audit"]

READABLE = ("F64", "F32", "F16", "BF16")


def audit(
    path: str | Path,
    *,
    level: str = "layer",
    pairs: Named | None = None,
    match: str | None = None,
    values: bool = False,
) -> Measurement:
    r"""Measure the spectra of the products in a checkpoint.

    The weights are read pair by pair, so that memory stays near the largest pair, and the model is
    never built. The number of heads comes from ``config.json``, LoRA's scale from
    ``adapter_config.json``, where they lie beside the weights, or in files of kohya's scripts
    (``lora_down``, ``lora_up``) from their ``alpha``.

    Parameters
    ----------
    path : str or Path
        A safetensors file; a Hugging Face folder, sharded or not; a LoRA adapter.
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
    chosen = (*found.pairs, *named(pairs, shapes))
    if not chosen:
        raise ValueError(nothing_found(str(path), found.skipped, "audit"))
    skipped = (*found.skipped, *adapters_below(Path(path)))
    return Measurement(measure(chosen, checkpoint.load, level, batch=0), skipped)


class Checkpoint:
    """The weights of a checkpoint by their cleaned names, and the facts in its configuration."""

    def __init__(self, path: Path) -> None:
        folder = path if path.is_dir() else path.parent
        self._open = reader()
        self._files: dict[str, tuple[Path, str]] = {}
        self._types: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file, names in files_of(path).items():
            self._list(file, names)
        self._config = json_of(folder / "config.json")
        self._adapter = adapter_config(folder / "adapter_config.json")

    def _list(self, file: Path, names: set[str] | None) -> None:
        """List the weights of a file; ``names`` are those that an index expects there."""
        with self._open(file) as content:
            present = set(content.keys())
            if names and (missing := sorted(names - present)):
                raise ValueError(f"{file} lacks {missing[0]}, which the index names: save it again")
            for name in sorted(names or present, key=_natural):
                part = content.get_slice(name)
                key = clean(name)
                if (other := self._files.get(key, (file, ""))[0]) != file:
                    raise ValueError(
                        f"{other} and {file.name} both hold {name}, and no index tells which is "
                        "meant: name one of the files"
                    )
                self._files[key] = (file, name)
                self._types[key] = part.get_dtype()
                self.shapes[key] = tuple(part.get_shape())

    def load(self, factor: Factor) -> Tensor | Rows:
        """Read the rows of a factor, and nothing else; the file is closed again."""
        file, name = self._files[factor.key]
        if (kind := self._types[factor.key]) not in READABLE:  # a user has named it
            raise ValueError(
                f"{file}: {name} is stored as {kind}, not floating: dequantize it first"
            )
        span = slice(factor.start, factor.stop)
        with self._open(file) as content:
            part = content.get_slice(name)
            if factor.stop is None or factor.block:
                return factor.rows(part[:])
            return part[:, span].mT if factor.transposed else part[span]

    def readable(self, found: Found) -> Found:
        """Set aside what is stored in a type that needs more than the weight to be understood."""
        pairs, skipped = [], list(found.skipped)
        for pair in found.pairs:
            kinds = {self._types[factor.key] for factor in (pair.left, pair.right)}
            if kinds <= set(READABLE):
                pairs.append(pair)
            else:
                skipped.append((pair.label, f"stored as {', '.join(sorted(kinds))}: quantized"))
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
        layer = re.search(r"layers\.(\d+)\.", f"{module}.")
        rotary = config.get("no_rope_layers") or []  # 1 where there are some
        turned = layer is None or int(layer[1]) >= len(rotary) or rotary[int(layer[1])]
        is_llama = str(config.get("model_type", "")).startswith("llama4")
        return is_llama and bool(config.get("use_qk_norm")) and bool(turned)

    def adapter(self, module: str, name: str, rank: int) -> Adapter:
        """Compute LoRA's scale from adapter_config.json, or kohya's alpha in the file."""
        config = self._adapter
        if f"{module}.alpha" in self._files:
            return Adapter(self._number(f"{module}.alpha") / rank)
        if "lora_alpha" not in config:
            return Adapter(1.0, (self._unscaled(module),))
        for target in config.get("target_parameters") or ():
            if module.endswith(target.rpartition(".")[0]):
                return Adapter(1.0, skip="LoRA on stacked experts is not one product")
        alpha = _pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        return Adapter(alpha / (sqrt(rank) if config.get("use_rslora") else rank))

    def _unscaled(self, module: str) -> str:
        if f"{module}.lora_down.weight" in self._files:
            return "it has no alpha, which is then its rank: scale 1"
        return "its scale is unknown without adapter_config.json, taken as 1"

    def _number(self, key: str) -> float:
        """Read a single number."""
        file, name = self._files[key]
        with self._open(file) as content:
            return float(content.get_tensor(name).reshape(-1)[0])


def _pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """Give the value of the first pattern that ends a module's name, as PEFT does."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _natural(name: str) -> list[Any]:
    """Sort layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
