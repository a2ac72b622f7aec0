"""Pairs of factors: what they are, how a user names them, and how found ones are chosen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol

import torch
from torch import Tensor

from .shards import Rows, is_sharded

__all__ = [
    "LEVELS",
    "Adapter",
    "Factor",
    "Facts",
    "Found",
    "Pair",
    "Shapes",
    "checked",
    "choose",
    "clean",
    "named",
    "nothing_found",
]

Shapes = Mapping[str, tuple[int, ...]]

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
        matrix = tensor.flatten(1) if tensor.ndim > 2 else tensor
        rows = matrix.mT if self.transposed else matrix
        if not is_sharded(rows):
            return self._taken(rows)
        return Rows(rows, None if self.stop is None else self._taken(torch.arange(len(rows))))

    def _taken(self, rows: Tensor) -> Tensor:
        """Take rows from start to stop, of each block."""
        if not self.block:
            return rows[self.start : self.stop]
        return rows.unflatten(0, (-1, self.block))[:, self.start : self.stop].flatten(0, 1)

    def size(self, shapes: Shapes) -> tuple[int, int]:
        """Give (r, long dimension)."""
        first, *rest = shapes[self.key]
        second = 1
        for size in rest:
            second *= size
        r, long = (second, first) if self.transposed else (first, second)
        block = self.block or r
        return r // block * len(range(block)[self.start : self.stop]), long


@dataclass(frozen=True)
class Pair:
    """Two factors whose product A B is measured.

    Attributes
    ----------
    name : str
        The module, or what the user called it.
    kind : str
        "lora", "attention" or "named".
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
    def label(self) -> str:
        """The name, with the adapter."""
        return f"{self.name} [{self.adapter}]" if self.adapter else self.name


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
        """Give the number of query heads and the width of one; None where unknown."""
        ...

    def adapter(self, module: str, name: str, rank: int) -> Adapter:
        """Give the scale of a LoRA update."""
        ...

    def architecture(self) -> str:
        """Give the model_type of Hugging Face's configuration; empty where unknown."""
        ...


def clean(key: str) -> str:
    """Drop what torch.compile, FSDP, checkpointing and PEFT insert into names.

    Examples
    --------
    >>> clean("_orig_mod.layers.0.q_proj.base_layer.weight")
    'layers.0.q_proj.weight'
    """
    return WRAPPERS.sub("", key).removeprefix(".")


def named(pairs: Mapping[str, tuple[str, str]], shapes: Shapes) -> tuple[Pair, ...]:
    """Make pairs of the weights that a user names, as in ``{"mlp": ("fc2.weight", "fc1.weight")}``.

    The product is that of the weights as they are stored, or transposed where the name ends in
    ``.T``.
    """
    made = []
    for name, (a, b) in pairs.items():
        left, right = _factor(name, a, shapes), _factor(name, b, shapes)
        left = Factor(left.key, not left.transposed)
        (r, n), (inner, m) = left.size(shapes), right.size(shapes)
        if r != inner:
            raise ValueError(
                f"pair {name!r}: {a} is {n} x {r} and {b} is {inner} x {m}, so that they have no "
                "product; append .T to a name to transpose its weight"
            )
        made.append(Pair(name, "named", left, right, (n, r, m)))
    return tuple(made)


def _factor(pair: str, name: str, shapes: Shapes) -> Factor:
    """Find the weight that a user named."""
    key = clean(name.removesuffix(".T"))
    if key not in shapes:
        near = get_close_matches(key, shapes, 3, 0.3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"pair {pair!r}: there is no weight {key!r}{hint}")
    if len(shapes[key]) < 2:
        raise ValueError(f"pair {pair!r}: {key} has the shape {shapes[key]}, a matrix is needed")
    return Factor(key, transposed=name.endswith(".T"))


def checked(level: str) -> str:
    """Refuse a level that does not exist."""
    if level not in LEVELS:
        raise ValueError(f"level: {' or '.join(map(repr, LEVELS))} is needed, got {level!r}")
    return level


def choose(found: Found, level: str, match: str | None) -> Found:
    """Keep the pairs that match and that the level applies to."""
    kept, skipped = [], list(found.skipped)
    for pair in found.pairs:
        if match and not (re.search(match, pair.label) or re.search(match, pair.kind)):
            continue
        if level == "head" and pair.kind == "attention" and pair.heads is None:
            skipped.append((pair.label, "the number of heads is unknown; level='layer' needs none"))
        else:
            kept.append(pair)
    if match and found.pairs and not kept:
        skipped.append((f"match={match!r}", f"leaves none of {len(found.pairs)} pairs"))
    return Found(tuple(kept), tuple(skipped))


def nothing_found(where: str, skipped: Iterable[tuple[str, str]], caller: str) -> str:
    """Say how to go on when there is nothing to measure."""
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in skipped)
    return (
        f"no LoRA or attention pairs to measure in {where}{reasons}\nName them: "
        f'{caller}(..., pairs={{"mlp": ("fc2.weight", "fc1.weight")}}), the product fc2 fc1; '
        "append .T to a name to transpose its weight"
    )
