"""The files of a checkpoint on disk: which there are, and how they are opened, or what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ._configuration import json_of, require_plain, shard_name
from ._torch_weights import METADATA, PICKLED, DistributedFolder, TorchFile, TorchWeights

__all__ = ["adapters_below", "files_of", "reader", "shards_left_out"]

# Files of torch that hold a model's or an adapter's weights, beside those of optimizers and loops.
WEIGHTS = (
    "pytorch_model*.bin", "model*.bin", "adapter_model.bin", "diffusion_pytorch_model*.bin",
    "pytorch_lora_weights.bin", "consolidated*.pth",
)  # fmt: skip
SHARD = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})(\.\w+)")
GGUF = (
    "a GGUF file, whose weights are quantized in blocks: load it, as in transformers with "
    "from_pretrained(..., gguf_file=...), and measure it by SpectralTracker(model, frozen=True)"
)


def reader() -> Any:
    """Return a function that opens a file of weights, with errors that help.

    What torch has written is read once: its names and places, or all of it in the old format.
    """
    from safetensors import SafetensorError, safe_open

    opened: dict[Path, TorchWeights] = {}

    def open_file(file: Path) -> Any:
        try:
            require_plain(file)
            if file.name == METADATA or file.suffix in PICKLED:
                kind = DistributedFolder if file.name == METADATA else TorchFile
                if file not in opened:
                    opened[file] = kind(file)
                return opened[file]
            return safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(
                f"{file} must be a whole safetensors file ({error}). Save or download it again."
            ) from error
        except FileNotFoundError:
            raise  # with its name
        except OSError as error:
            raise OSError(f"{file} cannot be read: {error}") from error

    return open_file


def files_of(path: Path) -> dict[Path, set[str] | None]:
    """Find the files of a checkpoint's weights, each with the names an index expects in it."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file() and path.name.endswith(".index.json"):
        return _indexed(path)
    if path.is_file():
        if path.suffix == ".gguf":
            raise ValueError(f"{path} is {GGUF}")
        return {path.parent / METADATA if path.suffix == ".distcp" else path: None}
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json"):
        if files := sorted(path.glob(pattern)):
            return _indexed(files[0]) if pattern.endswith("json") else dict.fromkeys(files)
    if (path / METADATA).exists():
        return {path / METADATA: None}
    return dict.fromkeys(_pickled(path))


def _pickled(folder: Path) -> list[Path]:
    """Find the weights that ``torch.save`` has written: by their names, or the only such file."""
    files = sorted({file for pattern in WEIGHTS for file in folder.glob(pattern)})
    if not files:
        files = sorted(file for file in folder.iterdir() if file.suffix in PICKLED)
        if len(files) > 1:
            names = ", ".join(file.name for file in files[:3])
            raise ValueError(
                f"{folder} must hold one set of weights, got {names}. Name one of the files."
            )
    if not files:
        raise ValueError(f"{folder} must hold a safetensors file{_instead(folder)}")
    return files


def _instead(folder: Path) -> str:
    """Say what a folder without weights has, and what to do."""
    held = sorted(folder.iterdir())
    if quantized := [file.name for file in held if file.suffix == ".gguf"]:
        return f", only {quantized[0]}, {GGUF}"
    kinds = ("*.safetensors", METADATA, *WEIGHTS)
    if below := [f.name for f in held if f.is_dir() and any(any(f.glob(kind)) for kind in kinds)]:
        more = ", ..." if len(below) > 3 else ""
        return f", but there are some in {', '.join(below[:3])}{more}: name one of these folders"
    return ""


def shards_left_out(files: Iterable[Path]) -> tuple[str, ...]:
    """Say of which sets of shards files are a part, by their names.

    Examples
    --------
    >>> shards_left_out([Path("model-00002-of-00005.safetensors")])[0][:42]
    'model-00002-of-00005.safetensors is 1 of 5'
    """
    sets: dict[tuple[str, int, str], list[str]] = {}
    for file in files:
        if match := SHARD.fullmatch(file.name):
            sets.setdefault((match[1], int(match[3]), match[4]), []).append(file.name)
    return tuple(
        f"{names[0] if len(names) == 1 else stem} is {len(names)} of {count} shards: products "
        "whose weights are in the others are not measured, and the means are over what is here"
        for (stem, count, _), names in sets.items()
        if len(names) < count
    )


def _indexed(index: Path) -> dict[Path, set[str] | None]:
    """Read which shard holds which weight."""
    shards: dict[Path, set[str] | None] = {}
    weights = json_of(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise ValueError(
            f"{index} must have a weight_map, as the index of a sharded checkpoint has"
        )
    for name, shard in weights.items():
        names = shards.setdefault(index.parent / shard_name(index, shard), set())
        assert names is not None
        names.add(name)
    for shard in shards:
        if not shard.exists():
            raise FileNotFoundError(
                f"{shard} must exist, as {index.name} names it. Download it again."
            )
    return shards


def adapters_below(path: Path) -> tuple[tuple[str, str], ...]:
    """List the folders of further adapters, as PEFT saves them below the first's."""
    if not (path.is_dir() and (path / "adapter_config.json").exists()):
        return ()
    below = sorted(file.parent.name for file in path.glob("*/adapter_config.json"))
    return tuple(
        (name, "another adapter, in a folder of its own: audit that")
        for name in below
        if not re.fullmatch(r"checkpoint-\d+", name)  # the Trainer's, of the same adapter
    )
