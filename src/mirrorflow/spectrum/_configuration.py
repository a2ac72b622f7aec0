"""The JSON files beside a checkpoint's weights: read as a stranger's, types and sizes checked."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ._patterns import Patterns

__all__ = [
    "CHANGES_BASE",
    "HEADER",
    "adapter_config",
    "is_number",
    "json_of",
    "model_config",
    "object_of",
    "packed_configurations",
    "require_adapter",
    "require_plain",
    "scale_patterns",
    "shard_name",
    "start_notes",
]

SIZE = 1 << 26  # bytes; the index of a model with 100,000 weights has a tenth
DEPTH = 64  # of dicts and lists in each other
KINDS: dict[str, tuple[type, ...]] = {  # what config.json may say, wherever in it
    "model_type": (str,), "layer_types": (list,), "no_rope_layers": (list,),
    "per_layer_config": (dict,), "architecture": (str,),
}  # fmt: skip
HEADER = "lora_adapter_metadata"  # diffusers keeps the configurations of a pipeline's parts there
# On loading, these subtract the product at the start from the base weights.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
ADAPTER: dict[str, tuple[type, ...]] = {
    "lora_parameters": (dict,), "peft_type": (str,), "alpha_pattern": (dict,),
    "rank_pattern": (dict,), "target_parameters": (list,),
}  # fmt: skip


def require_plain(file: Path) -> None:
    """Refuse what is not a plain file: a pipe would be waited for, a device read for ever.

    Symbolic links to plain files are plain files: the Hub's cache is made of them.

    Raises
    ------
    ValueError
        If it is a pipe, a device, a socket or a folder.
    FileNotFoundError
        If it does not exist.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        what = "a folder" if file.is_dir() else "a pipe or a device"
        raise ValueError(f"{file} must be a plain file, got {what}. Name another.")


def json_of(file: Path) -> dict[str, Any]:
    """Read a JSON object; a missing file is an empty one.

    Raises
    ------
    ValueError
        If it is not a plain file of at most 64 MB with one object in it, or nested too deeply.
    """
    try:
        require_plain(file)
        size = file.stat().st_size
        text = file.read_text(encoding="utf-8") if size <= SIZE else ""
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if size > SIZE:
        raise ValueError(f"{file} must have at most {SIZE} bytes, got {size}. Name another.")
    return object_of(text, file)


def object_of(text: str, source: Path | str) -> dict[str, Any]:
    """Return the JSON object that a text holds.

    Raises
    ------
    ValueError
        If it holds none, or one that is nested too deeply; ``source`` is named.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"{source} is damaged: it is nested more than {DEPTH} deep") from None
    except ValueError as error:
        raise ValueError(f"{source} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source} must hold a JSON object, got {_short(content)}")
    if _is_deeper(content, DEPTH):
        raise ValueError(f"{source} is damaged: it is nested more than {DEPTH} deep")
    return content


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether dicts and lists are nested more than so many levels."""
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def model_config(file: Path) -> dict[str, Any]:
    """Read the configuration of a model.

    Raises
    ------
    ValueError
        If a field that is read has another type.
    """
    config = json_of(file)
    _require_kinds(config, KINDS, file)
    return config


def _require_kinds(
    config: Mapping[str, Any],
    kinds: Mapping[str, tuple[type, ...]],
    file: Path | str,
    place: str = "",
) -> None:
    """Refuse fields of another type, in the parts of a configuration as well."""
    for key, value in config.items():
        if key in kinds and value is not None and not isinstance(value, kinds[key]):
            what = " or ".join(kind.__name__ for kind in kinds[key])
            raise ValueError(
                f"{file}: {place}{key} must be of type {what}, got {value!r:.60}. Correct it."
            )
        if isinstance(value, dict) and kinds is KINDS:
            _require_kinds(value, kinds, file, f"{place}{key}.")


def adapter_config(file: Path) -> dict[str, Any]:
    """Read what PEFT knows of an adapter.

    Raises
    ------
    ValueError
        If it is no LoRA, or its scale cannot be computed from it.
    """
    config = json_of(file)
    if config:
        require_adapter(config, file)
    return config


def require_adapter(config: Mapping[str, Any], file: Path | str) -> None:
    """Refuse what PEFT could not have written of a LoRA adapter."""
    _require_kinds(config, ADAPTER, file)
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise ValueError(
            f"{file}: peft_type must be LORA, whose update is a product A B, got {str(kind)[:60]}"
        )
    for key, value in (config.get("lora_parameters") or {}).items():  # MLX
        if key in ("rank", "scale", "alpha") and not is_number(value):
            raise ValueError(
                f"{file}: {key} must be a number, got {_short(value)}. Save the adapter again."
            )
    for key in ("lora_alpha", "r"):
        if key in config and not is_number(config[key]):
            raise ValueError(
                f"{file}: {key} must be a number, got {_short(config[key])}. Save it again."
            )
    for key in ("alpha_pattern", "rank_pattern"):
        patterns = config.get(key) or {}
        if not all(map(is_number, patterns.values())):
            raise ValueError(
                f"{file}: {key} must map patterns to numbers, got {_short(patterns)}. Correct it."
            )
    if not all(isinstance(name, str) for name in config.get("target_parameters") or ()):
        raise ValueError(
            f"{file}: target_parameters must be a list of names. Save the adapter again."
        )
    scale_patterns(config, file)  # or an error that names the pattern


def scale_patterns(config: Mapping[str, Any], file: Path | str) -> Patterns:
    """Return the alphas of an adapter's modules."""
    return Patterns(config.get("alpha_pattern") or {}, f"{file}: alpha_pattern")


def packed_configurations(header: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the configurations in diffusers' header, by the part that their keys begin with."""
    if HEADER not in header:
        return {}
    content = object_of(header[HEADER], HEADER)
    found = {}
    for part in [key.removesuffix("lora_alpha") for key in content if key.endswith("lora_alpha")]:
        if part and not part.endswith("."):
            continue
        config = {k.removeprefix(part): v for k, v in content.items() if k.startswith(part)}
        require_adapter(config, f"{HEADER}: {part.removesuffix('.')}")
        found[part.removesuffix(".")] = config
    return found


def start_notes(starts: Iterable[Any]) -> tuple[str, ...]:
    """Note on adapters whose init_lora_weights takes their start out of the base weights."""
    return tuple(
        f"init_lora_weights={start!r}: A B is not the update, but what it was at the start is in it"
        for start in starts
        if isinstance(start, str) and start.startswith(CHANGES_BASE)
    )


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return isfinite(float(value))
    except OverflowError:
        return False


def _short(value: Any) -> str:
    """Write a value of a file, or its beginning: numbers may have thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of too many digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


def shard_name(index: Path, name: Any) -> str:
    """Return the name of a file beside an index, or refuse it.

    Raises
    ------
    ValueError
        If it is no name, or leads out of the folder.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    inside = parts and not {"..", "/"} & set(parts) and len(name) <= 1000
    if not inside or "\\" in name or PureWindowsPath(name).drive or "\0" in name:
        raise ValueError(
            f"{index}: weight_map must name files inside its folder, got {_short(name)}"
        )
    return name
