"""The files of a checkpoint on disk: which there are, and how they are opened, or what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["adapter_config", "adapters_below", "files_of", "json_of", "reader"]

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
SAVE = "save it with save_pretrained(..., safe_serialization=True) or safetensors.torch"
GGUF = (
    "a GGUF file, whose weights are quantized in blocks: load it, as in transformers with "
    "from_pretrained(..., gguf_file=...), and measure it by SpectralTracker(model, frozen=True)"
)


def reader() -> Any:
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
        except FileNotFoundError:
            raise  # with its name
        except OSError as error:
            reason = "it is a folder" if file.is_dir() else str(error)
            raise OSError(f"{file} cannot be read: {reason}") from error

    return open_file


def files_of(path: Path) -> dict[Path, set[str] | None]:
    """Find the safetensors files of a checkpoint, each with the names an index expects in it."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file() and path.name.endswith(".index.json"):
        return _indexed(path)
    if path.is_file():
        if path.suffix in PICKLED:
            raise ValueError(f"{path} is a pickle, which can run code: {SAVE}")
        if path.suffix == ".gguf":
            raise ValueError(f"{path} is {GGUF}")
        return {path: None}
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        return _indexed(indices[0])
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} holds no safetensors file{_instead(path)}")
    return dict.fromkeys(files)


def _instead(folder: Path) -> str:
    """Say what a folder without safetensors files has, and what to do."""
    held = sorted(folder.iterdir())
    if pickles := [file.name for file in held if file.suffix in PICKLED]:
        return f", only {pickles[0]}: {SAVE}"
    if quantized := [file.name for file in held if file.suffix == ".gguf"]:
        return f", only {quantized[0]}, {GGUF}"
    if below := [file.name for file in held if file.is_dir() and any(file.glob("*.safetensors"))]:
        more = ", ..." if len(below) > 3 else ""
        return f", but there are some in {', '.join(below[:3])}{more}: name one of these folders"
    return ""


def _indexed(index: Path) -> dict[Path, set[str] | None]:
    """Read which shard holds which weight."""
    shards: dict[Path, set[str] | None] = {}
    weights = json_of(index).get("weight_map")
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


def adapters_below(path: Path) -> tuple[tuple[str, str], ...]:
    """List the folders of further adapters, as PEFT saves them below that of the first."""
    if not (path.is_dir() and (path / "adapter_config.json").exists()):
        return ()
    below = sorted(file.parent.name for file in path.glob("*/adapter_config.json"))
    return tuple(
        (name, "another adapter, in a folder of its own: audit that")
        for name in below
        if not re.fullmatch(r"checkpoint-\d+", name)  # the Trainer's, of the same adapter
    )


def adapter_config(file: Path) -> dict[str, Any]:
    """Read what PEFT knows of an adapter.

    Raises
    ------
    ValueError
        If it is no LoRA, or its scale cannot be computed from it.
    """
    config = json_of(file)
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise ValueError(
            f"{file.parent} holds a {kind} adapter: only LoRA's update is a product A B"
        )
    alpha, patterns = config.get("lora_alpha", 1), config.get("alpha_pattern") or {}
    if not _number(alpha):
        raise ValueError(f"{file} is damaged: lora_alpha is {alpha!r}, and no number")
    if not isinstance(patterns, Mapping) or not all(map(_number, patterns.values())):
        raise ValueError(f"{file} is damaged: alpha_pattern is {patterns!r}, and no map to numbers")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{file} is damaged: {pattern!r} in alpha_pattern is no regular expression: {error}"
            ) from error
    return config


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def json_of(file: Path) -> dict[str, Any]:
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
