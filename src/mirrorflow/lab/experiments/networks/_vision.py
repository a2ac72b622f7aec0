"""Images, vision transformers, and what trains them: for the experiments on attention."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ...framework.contract import Config
from ...framework.download import data_file
from ._training import autocast, device

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

__all__ = ["ImageConfig", "Images", "accuracy", "images", "loss_of", "parameter_groups", "vit"]

Pixels = NDArray[np.uint8]
CIFAR10 = "https://huggingface.co/datasets/uoft-cs/cifar10/resolve/main/plain_text/{}-00000-of-00001.parquet"


class ImageConfig(Config):
    """Which images, and which model reads them.

    Attributes
    ----------
    data : str
        "cifar10", "digits", or a folder with train/<class>/ and val/<class>/ (ImageNet).
    size : int
        Pixels of an image's side.
    model : str
        "own", untrained; or whatever transformers loads for image classification.
    patch, width, layers, heads : int
        Of the own model; its MLPs are 2 x width.
    batch, validation : int
        Images in a step; images that are validated, 0 for all.
    """

    data: str = "cifar10"
    size: int = Field(default=32, ge=1)
    model: str = "own"
    patch: int = Field(default=4, ge=1)
    width: int = Field(default=192, ge=1)
    layers: int = Field(default=12, ge=1)
    heads: int = Field(default=3, ge=1)
    batch: int = Field(default=128, ge=1)
    validation: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _divided(self) -> Self:
        """Refuse patches and heads that do not fit."""
        if self.model == "own" and (self.size % self.patch or self.width % self.heads):
            raise ValueError("patch must divide size, and heads must divide width")
        return self


PAD = 4  # pixels that an augmented image may be moved by


@dataclass(frozen=True, eq=False)
class Images:
    """Images with labels: decoded in memory, or read from files batch by batch.

    Attributes
    ----------
    pixels : array, (count, size, size, 3), or sequence of paths
    labels : array, (count,)
    classes, size : int
    """

    pixels: Pixels | Sequence[Path]
    labels: NDArray[np.int64]
    classes: int
    size: int

    def batch(self, seed: int, step: int, size: int, augment: bool) -> tuple[Tensor, Tensor]:
        """Return the images of a step, each once in an epoch: a function of seed and step."""
        steps = len(self.labels) // size
        if steps == 0:
            raise ValueError(f"a batch of {size} is larger than the {len(self.labels)} images")
        order = _order(len(self.labels), seed, step // steps)
        chosen = order[step % steps * size : (step % steps + 1) * size]
        found = self._load(chosen)
        if augment:
            found = _moved(found, np.random.default_rng((seed, step)))
        return _scaled(found), _labels(self.labels[chosen])

    def parts(self, count: int, size: int) -> list[tuple[Tensor, Tensor]]:
        """Return ``count`` images (0 for all), evenly spread, in batches."""
        total = len(self.labels)
        chosen = np.linspace(0, total - 1, min(count or total, total)).astype(np.int64)
        split = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        return [(_scaled(self._load(part)), _labels(self.labels[part])) for part in split]

    def _load(self, chosen: NDArray[np.int64]) -> Pixels:
        if isinstance(self.pixels, np.ndarray):
            return self.pixels[chosen]
        paths = [self.pixels[i] for i in chosen]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return np.stack(list(pool.map(lambda path: _decoded(path, self.size), paths)))


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def _moved(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Move each image by up to 4 pixels, black at the border, and mirror half of them."""
    count, size = len(pixels), pixels.shape[1]
    wide = np.pad(pixels, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))
    down, right = rng.integers(0, 2 * PAD + 1, (2, count))
    rows = down[:, None] + np.arange(size)
    columns = right[:, None] + np.arange(size)
    mirrored = rng.random(count) < 0.5
    columns[mirrored] = columns[mirrored, ::-1]
    return wide[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _scaled(pixels: Pixels) -> Tensor:
    """Return (count, 3, size, size) in [-1, 1]."""
    import torch

    moved = torch.from_numpy(pixels).to(device()).permute(0, 3, 1, 2).contiguous()
    return moved.float().div_(127.5).sub_(1)


def _labels(labels: NDArray[np.int64]) -> Tensor:
    import torch

    return torch.from_numpy(labels).to(device())


# --- Sources --------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def images(source: str, size: int) -> tuple[Images, Images]:
    """Return the images for training and for validation.

    Parameters
    ----------
    source : str
        "cifar10", "digits" (scikit-learn's, 8 x 8), or a folder with train/<class>/ and
        val/<class>/, as ImageNet has it.
    size : int
        Images of a folder are cut to a square and scaled to size x size pixels.
    """
    if source == "cifar10":
        return _cifar10("train", size), _cifar10("test", size)
    if source == "digits":
        return _digits(size)
    return _folder(Path(source) / "train", size), _folder(Path(source) / "val", size)


def _cifar10(part: str, size: int) -> Images:
    """Decode CIFAR-10 from its parquet file."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ImportError("CIFAR-10 comes as a parquet file: pip install '.[networks]'") from None
    table = parquet.read_table(data_file(f"cifar10/{part}.parquet", CIFAR10.format(part)))
    encoded = [cell["bytes"] for cell in table["img"].to_pylist()]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        pixels = np.stack(list(pool.map(lambda code: _decoded(io.BytesIO(code), size), encoded)))
    return Images(pixels, table["label"].to_numpy().astype(np.int64), 10, size)


def _digits(size: int) -> tuple[Images, Images]:
    """Return scikit-learn's digits, the last 300 for validation."""
    from sklearn.datasets import load_digits

    if size != 8:
        raise ValueError(f"the digits are 8 x 8 pixels, not {size} x {size}")
    digits: Any = load_digits()
    grey = (digits.images * (255 / 16)).astype(np.uint8)
    pixels, labels = np.repeat(grey[..., None], 3, axis=-1), digits.target.astype(np.int64)
    return (
        Images(pixels[:-300], labels[:-300], 10, 8),
        Images(pixels[-300:], labels[-300:], 10, 8),
    )


def _folder(folder: Path, size: int) -> Images:
    """List the images of a folder, a subfolder for each class."""
    classes = sorted(path.name for path in folder.glob("*/"))
    kinds = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in kinds
    ]
    if not found:
        raise ValueError(f"{folder} holds no images: expected {folder}/<class>/<image>.jpg or .png")
    paths, labels = zip(*found, strict=True)
    return Images(paths, np.array(labels, dtype=np.int64), len(classes), size)


def _decoded(source: Any, size: int) -> Pixels:
    """Decode an image, cut to a square, at size x size."""
    from PIL import Image, ImageOps

    with Image.open(source) as image:
        found = image.convert("RGB")
    return np.asarray(found if found.size == (size, size) else ImageOps.fit(found, (size, size)))


# --- Models ---------------------------------------------------------------------------------------


def vit(
    name: str, size: int, patch: int, width: int, layers: int, heads: int, classes: int, seed: int
) -> Any:
    """Make a vision transformer: "own", untrained, or one that transformers loads by name."""
    import torch
    from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

    own: Any = {
        "image_size": size,
        "patch_size": patch,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 2 * width,
        "num_labels": classes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name == "own":
            model: Any = ViTForImageClassification(ViTConfig(**own))
        else:
            model = AutoModelForImageClassification.from_pretrained(
                name, num_labels=classes, ignore_mismatched_sizes=True
            )
    return model.to(device())


def loss_of(model: Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross entropy of a batch."""
    import torch

    with autocast():
        logits = model(batch[0]).logits
    return torch.nn.functional.cross_entropy(logits.float(), batch[1])


def accuracy(model: Module, parts: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return the accuracy in percent, and the mean loss, without gradients."""
    import torch

    right, loss, count = 0, 0.0, 0
    with torch.inference_mode(), autocast():
        for pixels, labels in parts:
            logits = model(pixels).logits.float()
            right += int((logits.argmax(-1) == labels).sum())
            loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
    return {"accuracy": 100 * right / count, "loss": loss / count}


def parameter_groups(model: Module, decay: float) -> list[dict[str, Any]]:
    """Return the matrices, with decay, and all else (biases, norms, positions), without."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 or name.endswith("projection.weight")]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    return [
        {"params": matrices, "weight_decay": decay},
        {"params": rest, "weight_decay": 0.0},
    ]
