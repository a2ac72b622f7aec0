"""Pairs of factors: what they are, how a user names them, and how found ones are chosen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol

import torch
from torch import Tensor

from ._shards import Rows, is_sharded

__all__ = [
    "LEVELS",
    "Adapter",
    "Factor",
    "Facts",
    "Found",
    "Named",
    "NothingToMeasure",
    "Pair",
    "Shapes",
    "checked",
    "choose",
    "clean",
    "label",
    "named",
]

Shapes = Mapping[str, tuple[int, ...]]
Named = Mapping[str, tuple[str, str] | tuple[str, str, int]]

LEVELS = ("layer", "head")
WRAPPERS = re.compile(
    r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)(?=\.)"
)


@dataclass(frozen=True)
class Factor:
    """One factor: which weight, and which part of it, as rows of shape (r, long dimension)."""

    key: str
    transposed: bool = False  # stored as (long dimension, r)
    start: int = 0
    stop: int | None = None
    block: int = 0  # start and stop are within each block of so many rows; 0: within all rows

    def rows(self, tensor: Tensor) -> Tensor | Rows:
        """Take the factor out of its weight; of a sharded one `Rows`, so that nothing travels."""
        if not is_sharded(tensor):
            return self._taken_of(tensor)
        rows = self._all_of(tensor)
        return Rows(rows, None if self.stop is None else self._taken(torch.arange(len(rows))))

    def sharded_rows(self, tensor: Any, heads: int) -> Tensor:
        """Return the rows of a DTensor, gathered if shards cut its heads, or it is but a part."""
        part = self.stop is not None or self.start or self.block or tensor.ndim > 2
        rows = tensor if part or not self.transposed else tensor.mT
        cut = any(
            getattr(placement, "dim", None) == 0 and heads % rows.device_mesh.size(axis)
            for axis, placement in enumerate(rows.placements)
        )
        if part or (cut and heads > 1):
            return self._taken_of(tensor.full_tensor())
        return rows

    def _all_of(self, tensor: Tensor) -> Tensor:
        """Return all rows of a weight."""
        matrix = tensor.flatten(1) if tensor.ndim > 2 else tensor
        return matrix.mT if self.transposed else matrix

    def _taken_of(self, tensor: Tensor) -> Tensor:
        """Return the rows of the factor from a whole weight."""
        return self._taken(self._all_of(tensor))

    def _taken(self, rows: Tensor) -> Tensor:
        """Take rows from start to stop, of each block."""
        if not self.block:
            return rows[self.start : self.stop]
        return rows.unflatten(0, (-1, self.block))[:, self.start : self.stop].flatten(0, 1)

    def size(self, shapes: Shapes) -> tuple[int, int]:
        """Return (r, long dimension)."""
        first, *rest = shapes[self.key]
        second = 1
        for size in rest:
            second *= size
        r, long = (second, first) if self.transposed else (first, second)
        block = self.block or max(r, 1)
        return r // block * len(range(block)[self.start : self.stop]), long


@dataclass(frozen=True)
class Pair:
    """Two factors whose product A B is measured.

    Attributes
    ----------
    name : str
        The module, or what the user called it.
    kind : str
        "lora", "attention" (W_Q^T W_K), "value-output" (W_O W_V) or "named".
    left, right : Factor
        A^T and B, both as rows over the inner dimension r.
    shape : tuple of int
        (n, r, m): A is n x r and B is r x m.
    heads, key_heads : int or None
        Of attention, where they are known.
    adapter : str
        Of LoRA.
    scale : float
        The model adds scale A B (alpha / r).
    notes : tuple of str
        What a reader of the numbers has to know.
    """

    name: str
    kind: str
    left: Factor
    right: Factor
    shape: tuple[int, int, int]
    heads: int | None = None
    key_heads: int | None = None
    adapter: str = ""
    scale: float = 1.0
    notes: tuple[str, ...] = ()

    @property
    def holders(self) -> set[str]:
        """The modules that have the two weights."""
        return {factor.key.rpartition(".")[0] for factor in (self.left, self.right)}

    @property
    def label(self) -> str:
        """The name, with the adapter, or that it is the product of V and the output."""
        return label(self.name, self.kind, self.adapter)


# Of attention whose weights have adapters: what is measured, while they are apart, and merged.
APART = "base weights, without the adapters' updates"
MERGED = "the adapters' updates are merged into these weights"


def label(name: str, kind: str, adapter: str) -> str:
    """Name a product: a module may have several."""
    if kind == "value-output":
        return f"{name} V-O"
    return f"{name} [{adapter}]" if adapter else name


@dataclass(frozen=True)
class Found:
    """What a search found: pairs, and (name, reason) for what looks like one and is none."""

    pairs: tuple[Pair, ...]
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Adapter:
    """What is known about a LoRA adapter on one module; a reason to skip it, if there is one."""

    scale: float
    notes: tuple[str, ...] = ()
    skip: str = ""


class Facts(Protocol):
    """What the names and shapes of weights do not tell."""

    def heads(self, module: str) -> tuple[int | None, int | None]:
        """Return the number of query heads and the width of one; None where unknown."""
        ...

    def adapter(self, module: str, name: str, rank: int, alphas: Sequence[str]) -> Adapter:
        """Return the scale of a LoRA update; ``alphas`` are names of weights that may hold it."""
        ...

    def architecture(self, module: str) -> str:
        """Return the model_type of the configuration nearest to a module; empty where unknown.

        A timm model's is "timm/" and its own name.
        """
        ...

    def order(self, module: str) -> str:
        """Return the order of a fused weight: "heads", "blocks", or empty where unknown.

        "heads" is q, k, v of the first head, q, k, v of the second; "blocks" is Q, K, V.
        """
        ...

    def normalized(self, module: str) -> bool:
        """Whether Q and K pass a normalization that has no weights."""
        ...


def clean(key: str) -> str:
    """Drop what torch.compile, FSDP, checkpointing and PEFT insert into names.

    Examples
    --------
    >>> clean("_orig_mod.layers.0.q_proj.base_layer.weight")
    'layers.0.q_proj.weight'
    """
    return WRAPPERS.sub("", key).removeprefix(".")


def named(pairs: Named | None, shapes: Shapes) -> tuple[Pair, ...]:
    """Make pairs of the weights that a user names, as in ``{"mlp": ("fc2.weight", "fc1.weight")}``.

    The product is that of the weights as they are stored, or transposed where the name ends in
    ``.T``. ``[start:stop]`` before that takes a part of the rows of a weight, or of its columns
    where they are the inner dimension. A third entry is the number of heads that divide that.
    """
    if not isinstance(pairs or {}, Mapping):
        raise TypeError(
            f"pairs must be a mapping, got {type(pairs).__name__}. Write "
            '{"mlp": ("fc2.weight", "fc1.weight")}'
        )
    return tuple(_named(name, entry, shapes) for name, entry in (pairs or {}).items())


def _named(name: str, entry: Sequence[Any], shapes: Shapes) -> Pair:
    """Make a pair of (A, B), or of (A, B, heads)."""
    if isinstance(entry, str) or len(entry) not in (2, 3):
        raise ValueError(
            f"pair {name!r} must hold two names, and at most the number of heads, got {entry!r}"
        )
    (a, b), heads = entry[:2], entry[2] if len(entry) > 2 else None
    left, right = _factor(name, a, shapes, True), _factor(name, b, shapes, False)
    (r, n), (inner, m) = left.size(shapes), right.size(shapes)
    if r != inner:
        raise ValueError(
            f"pair {name!r} must have one inner dimension, got {n} x {r} and {inner} x {m}. Append "
            ".T to a name to transpose its weight"
        )
    if 0 in (n, r, m):
        raise ValueError(f"pair {name!r} must not be empty, got {n} x {r} x {m}")
    if heads is not None and (not isinstance(heads, int) or heads < 1 or r % heads):
        raise ValueError(
            f"pair {name!r}: heads must be a whole number that divides {r}, got {heads!r}"
        )
    return Pair(name, "named", left, right, (n, r, m), heads, heads)


def _factor(pair: str, name: str, shapes: Shapes, left: bool) -> Factor:
    """Find the weight that a user named; its rows are over the inner dimension."""
    match = re.fullmatch(r"(.*?)(?:\[(\d*):(\d*)\])?(\.T)?", name)
    assert match  # the first part takes anything
    key = clean(match[1])
    if key not in shapes:
        near = get_close_matches(key, shapes, 3, 0.3)
        hint = f". Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"pair {pair!r} must name weights of the model, got {key!r}{hint}")
    if len(shapes[key]) < 2:
        raise ValueError(f"pair {pair!r}: {key} must be a matrix, got shape {shapes[key]}")
    transposed = bool(match[4]) != left  # A is taken as the rows of A^T
    if match[2] is None:
        return Factor(key, transposed)
    rows = Factor(key, transposed).size(shapes)[0]
    start, stop = int(match[2] or 0), int(match[3] or rows)
    if not start < stop <= rows:
        raise ValueError(f"pair {pair!r}: rows must lie within 0:{rows}, got {name}")
    return Factor(key, transposed, start, stop)


def checked(level: str) -> str:
    """Refuse a level that does not exist."""
    if level not in LEVELS:
        raise ValueError(f"level must be {' or '.join(map(repr, LEVELS))}, got {level!r}")
    return level


def choose(found: Found, level: str, match: str | None) -> Found:
    """Keep the pairs that match and that the level applies to."""
    try:
        pattern = re.compile(match or "")
    except re.error as error:
        raise ValueError(f"match must be a regular expression, got {match!r}: {error}") from error
    kept, skipped = [], list(found.skipped)
    for pair in found.pairs:
        if not (pattern.search(pair.label) or pattern.search(pair.kind)):
            continue
        if level == "head" and pair.kind != "lora" and pair.heads is None:
            skipped.append((pair.label, "the number of heads is unknown; level='layer' needs none"))
        else:
            kept.append(pair)
    if match and found.pairs and not kept:
        skipped.append((f"match={match!r}", f"leaves none of {len(found.pairs)} pairs"))
    return Found(tuple(kept), tuple(skipped))


class NothingToMeasure(ValueError):
    """There is no pair to measure; the message says why, and how to go on.

    Parameters
    ----------
    where : str
        The file or the model.
    skipped : iterable of (str, str)
        Names that were looked at, and why they are no pairs.
    caller : str
        The function that takes ``pairs``.

    Attributes
    ----------
    call : str
        The part of the message that names pairs in Python.
    """

    def __init__(self, where: str, skipped: Iterable[tuple[str, str]], caller: str) -> None:
        self.call = f'{caller}(..., pairs={{"mlp": ("fc2.weight", "fc1.weight")}})'
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in skipped)
        super().__init__(
            f"no LoRA or attention pairs to measure in {where}{reasons}\nName them: "
            f"{self.call}, the product fc2 fc1; append .T to a name to transpose its weight"
        )
