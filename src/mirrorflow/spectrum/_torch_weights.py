"""Weights in files of torch: of ``torch.save``, and folders of ``torch.distributed.checkpoint``.

Both look like an open safetensors file. Nothing in them is run: torch reads tensors by
``weights_only=True``, and the folder's ``.metadata``, a pickle, is read as plain data.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .._torch_file import DAMAGED, read_torch_file
from ._configuration import require_plain, shard_name
from ._plain_pickle import Made, Name, plain_pickle

__all__ = ["METADATA", "PICKLED", "DistributedFolder", "TorchFile", "TorchWeights"]

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
METADATA = ".metadata"  # of a folder that torch.distributed.checkpoint.save has written
LARGEST = 1 << 28  # bytes of it; 100,000 weights in 64 parts have less
KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
# Where training scripts, Lightning and DeepSpeed keep the weights beside other things.
PLACES = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "ema")
REMEDY = "load it where you trust it, and save model.state_dict() alone"
CONVERT = (
    "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt makes one "
    "file of it, if you trust it"
)


@dataclass(frozen=True)
class Weight:
    """A weight that is read when it is asked for, as a slice of a safetensors file is."""

    kind: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def get_dtype(self) -> str:
        """Return the type, as safetensors names it."""
        return self.kind

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        """Read a part."""
        return self.read()[index]


class TorchWeights:
    """Weights by name, with the methods of an open safetensors file."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self._weights = weights

    def keys(self) -> Iterator[str]:
        """Return the names."""
        return iter(self._weights)

    def get_slice(self, name: str) -> Weight:
        """Return a weight that is not read yet."""
        return self._weights[name]

    def get_tensor(self, name: str) -> Tensor:
        """Read a weight."""
        return self._weights[name].read()

    def metadata(self) -> dict[str, str]:
        """Return the header: these files have none."""
        return {}

    def __enter__(self) -> TorchWeights:
        """Return itself: what is open stays open."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave it open."""


class TorchFile(TorchWeights):
    """The weights in a file of ``torch.save``; those of the zip format stay on the disk.

    Raises
    ------
    ValueError
        If it is damaged, holds other classes than torch reads, or no weights.
    """

    def __init__(self, file: Path) -> None:
        loaded = read_torch_file(file, REMEDY)
        found = {
            name: Weight(_kind(tensor), tuple(tensor.shape), tensor.detach)
            for name, tensor in _weights_in(loaded, file).items()
        }
        super().__init__(found)


def _weights_in(loaded: Any, file: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict, or of the one that lies beside an optimizer's."""
    for _ in range(3):
        held = loaded if isinstance(loaded, Mapping) else {}
        tensors = {k: v for k, v in held.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if tensors:
            return tensors
        loaded = next((held[place] for place in PLACES if place in held), None)
    raise ValueError(f"{file} holds no weights by their names. Save model.state_dict() in it.")


def _kind(tensor: Tensor) -> str:
    """Return the type of a tensor as safetensors names it; other words for what is not plain.

    A tensor of strides 0 is as large as it likes in a file of a few bytes.
    """
    if type(tensor) not in (Tensor, Parameter) or tensor.layout != torch.strided:
        return f"a {str(tensor.layout).removeprefix('torch.')} {type(tensor).__name__}"
    if tensor.device.type != "cpu" or tensor.is_quantized:
        return "quantized" if tensor.is_quantized else f"without data ({tensor.device})"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "entries that share their memory"
    name = str(tensor.dtype).removeprefix("torch.")
    return KINDS.get(name, name)


class DistributedFolder(TorchWeights):
    """The weights in a folder of ``torch.distributed.checkpoint``, from whichever ranks.

    Raises
    ------
    ValueError
        If ``.metadata`` is damaged, or leads out of the folder.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            root = _state(plain_pickle(_read(file)), "Metadata")
            parts = self._parts(root["storage_data"])
            found = {
                str(name): self._weight(str(name), _state(entry, "TensorStorageMetadata"), parts)
                for name, entry in root["state_dict_metadata"].items()
                if getattr(entry, "kind", "") == "TensorStorageMetadata"
            }
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{file} is damaged, or of a version of torch that is not known ({error}). "
                f"{CONVERT}"
            ) from error
        super().__init__(found)

    def _parts(self, storage: Any) -> dict[tuple[str, tuple[int, ...]], dict[str, Any]]:
        """Return where each part of each weight lies, by its name and offsets."""
        found = {}
        for key, entry in storage.items():
            index = _state(key, "MetadataIndex")
            offset = () if index.get("offset") is None else _size(index["offset"])
            found[index["fqn"], offset] = _state(entry, "_StorageInfo")
        return found

    def _weight(self, name: str, entry: Mapping[str, Any], parts: Any) -> Weight:
        """Return a weight, if its parts are stored and cover it."""
        shape, kind = _size(entry["size"]), entry["properties"].state[0]
        dtype = kind.name if isinstance(kind, Name) and kind.module == "torch" else str(kind)[:60]
        if dtype not in KINDS:
            return Weight(dtype, shape, lambda: _refused(name))
        chunks = []
        for chunk in entry["chunks"]:
            place = _state(chunk, "ChunkStorageMetadata")
            offsets, sizes = _size(place["offsets"]), _size(place["sizes"])
            stored = parts[name, offsets]
            if len(sizes) != len(shape) or prod(sizes) * SIZES[dtype] > int(stored["length"]):
                raise ValueError(f"a part of {name} is smaller than its shape")
            if any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
                raise ValueError(f"a part of {name} lies outside of it")
            chunks.append((offsets, sizes, stored))
        if sum(prod(sizes) for _, sizes, _ in chunks) != prod(shape):
            raise ValueError(f"parts of {name} are missing")
        return Weight(KINDS[dtype], shape, lambda: self._assembled(shape, dtype, chunks))

    def _assembled(self, shape: tuple[int, ...], dtype: str, chunks: Any) -> Tensor:
        """Return a weight, put together of its parts."""
        if len(chunks) == 1:
            _, sizes, stored = chunks[0]
            return self._chunk(sizes, stored, dtype)
        whole = torch.zeros(shape, dtype=getattr(torch, dtype))
        for offsets, sizes, stored in chunks:
            place = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            whole[place] = self._chunk(sizes, stored, dtype)
        return whole

    def _chunk(self, sizes: tuple[int, ...], stored: Mapping[str, Any], dtype: str) -> Tensor:
        """Read one part: a file of ``torch.save`` within a file."""
        file = self._file.parent / shard_name(self._file, stored["relative_path"])
        if stored.get("transform_descriptors"):
            raise ValueError(f"{file} holds compressed weights, which are not read. {CONVERT}")
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: {self._file.name} names it")
        require_plain(file)
        with file.open("rb") as stream:
            stream.seek(int(stored["offset"]))
            content = io.BytesIO(stream.read(int(stored["length"])))
        try:
            _require_stored(content)
            tensor = torch.load(content, map_location="cpu", weights_only=True)
        except DAMAGED as error:
            line = str(error).partition("\n")[0]
            raise ValueError(f"{file} is damaged, or holds no tensor there: {line}") from error
        fits = isinstance(tensor, Tensor) and tuple(tensor.shape) == sizes
        if not fits or _kind(tensor) != KINDS[dtype]:
            raise ValueError(f"{file} holds another tensor than {self._file.name} says")
        return tensor.detach()


def _read(file: Path) -> bytes:
    """Return the bytes of a file of a sensible size."""
    with file.open("rb") as stream:
        data = stream.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"it has more than {LARGEST} bytes")
    return data


def _require_stored(content: io.BytesIO) -> None:
    """Refuse compressed entries, which may be a thousand times as large as the file."""
    with zipfile.ZipFile(content) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("its entries are compressed, which torch does not write")
    content.seek(0)


def _state(value: Any, kind: str) -> Mapping[str, Any]:
    """Return the fields of a dataclass."""
    if not isinstance(value, Made) or value.kind != kind or not isinstance(value.state, dict):
        raise ValueError(f"it has no {kind} where one is expected")
    return value.state


def _size(value: Any) -> tuple[int, ...]:
    """Return a torch.Size."""
    (entries,) = value.arguments
    if not all(type(entry) is int and 0 <= entry < 1 << 40 for entry in entries):
        raise ValueError("it has sizes that are none")
    return tuple(entries)


def _refused(name: str) -> Tensor:
    raise ValueError(f"{name} is not floating: dequantize it first")
