"""`audit`: the spectra of a checkpoint on disk, read pair by pair, without building its model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from .configuration import heads, part_of
from .finding import find
from .measurement import measure
from .pairs import Adapter, Factor, Found, Named, checked, choose, clean, named, nothing_found
from .records import Measurement
from .shards import Rows

__all__ = ["audit"]

READABLE = ("F64", "F32", "F16", "BF16")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


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
    return Measurement(measure(chosen, checkpoint.load, level, batch=0), found.skipped)


class Checkpoint:
    """The weights of a checkpoint by their cleaned names, and the facts in its configuration."""

    def __init__(self, path: Path) -> None:
        folder = path if path.is_dir() else path.parent
        self._open = _reader()
        self._files: dict[str, tuple[Path, str]] = {}
        self._types: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file, names in _files(path).items():
            self._list(file, names)
        self._config = _json(folder / "config.json")
        self._adapter = _json(folder / "adapter_config.json")
        kind = self._adapter.get("peft_type", "LORA")
        if kind != "LORA":
            raise ValueError(
                f"{folder} holds a {kind} adapter: only LoRA's update is a product A B"
            )

    def _list(self, file: Path, names: set[str] | None) -> None:
        """List the weights of a file; ``names`` are those that an index expects there."""
        with self._open(file) as content:
            present = set(content.keys())
            if names and (missing := sorted(names - present)):
                raise ValueError(f"{file} lacks {missing[0]}, which the index names: save it again")
            for name in sorted(present, key=_natural):
                part = content.get_slice(name)
                key = clean(name)
                self._files[key] = (file, name)
                self._types[key] = part.get_dtype()
                self.shapes[key] = tuple(part.get_shape())

    def load(self, factor: Factor) -> Tensor | Rows:
        """Read the rows of a factor, and nothing else; the file is closed again."""
        file, name = self._files[factor.key]
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


def _reader() -> Any:
    """Give a function that opens a safetensors file, with errors that help."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("audit reads safetensors files: pip install safetensors") from error

    def open_file(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(
                f"{file} is damaged, or no safetensors file ({error}): save or download it again"
            ) from error

    return open_file


def _files(path: Path) -> dict[Path, set[str] | None]:
    """Find the safetensors files of a checkpoint, each with the names an index expects in it."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file() and path.name.endswith(".index.json"):
        return _indexed(path)
    if path.is_file():
        if path.suffix in PICKLED:
            raise ValueError(f"{path} is a pickle, which can run code: {_advice()}")
        return {path: None}
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        return _indexed(indices[0])
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in PICKLED]
        held = f", only {pickles[0]}: {_advice()}" if pickles else ""
        raise ValueError(f"{path} holds no safetensors file{held}")
    return dict.fromkeys(files)


def _indexed(index: Path) -> dict[Path, set[str] | None]:
    """Read which shard holds which weight."""
    shards: dict[Path, set[str] | None] = {}
    weights = _json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"{index} has no weight_map: it is no index of a sharded checkpoint")
    for name, shard in weights.items():
        names = shards.setdefault(index.parent / str(shard), set())
        assert names is not None
        names.add(name)
    for shard in shards:
        if not shard.exists():
            raise FileNotFoundError(f"{shard} is missing: {index.name} names it")
    return shards


def _advice() -> str:
    return "save it with save_pretrained(..., safe_serialization=True) or safetensors.torch"


def _json(file: Path) -> dict[str, Any]:
    """Read a JSON object; a missing file is an empty one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:  # of JSON, and of UTF-8
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: an object is needed")
    return content


def _pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """Give the value of the first pattern that ends a module's name, as PEFT does."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _natural(name: str) -> list[Any]:
    """Sort layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
