r"""Products of a live model, truncated in place: LoRA updates, and the heads of attention.

A head's scores are ``(W_Q x + b_Q) . (W_K y + b_K)``. Of these ``b_K`` adds what is the same for
every key y, which softmax does not see; left are ``x^T W_Q^T W_K y`` and ``b_Q^T W_K y``. With the
truncated ``U_k S_k V_k^T`` for ``W_Q^T W_K`` the second term ``c = W_K^T b_Q`` has to stay:

- heads with keys of their own get ``W_Q = [S_k^(1/2) U_k^T; 0; 0]``, ``W_K = [S_k^(1/2) V_k^T;
  c / |c|^(1/2); 0]``, ``b_Q = [0; |c|^(1/2); 0]``, ``b_K = 0``;
- heads that share keys get ``W_Q U_k U_k^T``: as ``U_k U_k^T W_Q^T W_K = U_k S_k V_k^T``, each head
  has its own truncation, better than one of the group, whose heads would share V_k; ``b_Q`` and
  ``W_K`` stay.

The output is ``sum_y p(y) W_O (W_V y + b_V)``, with the same two ways: there ``W_O b_V`` has to
stay. A change of basis as in the first way needs that nothing but ``q . k`` depends on Q and K.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ._grams import double
from ._shards import is_sharded
from .pairs import APART, MERGED, Factor, Pair, clean
from .product import unreadable
from .tracker import SpectralTracker
from .truncation import (
    RankChoice,
    TruncatedProduct,
    Truncation,
    TruncationReport,
    distance,
    truncated_product,
)

__all__ = ["truncate_model"]

# Between Q and K: not x^T W_Q^T W_K y, but x^T W_Q^T R W_K y with a rotation for each distance.
ROTARY = re.compile(r"(?i)rotary|(?<![a-z])rope(?![a-z])|rotate_half|freqs_cis|apply_rot")
# Added to the scores, whatever Q and K are: T5, Swin, BEiT, LeViT.
ADDED = re.compile(r"relative_(?:position|attention)_bias|position_bias_table|attention_biases")
# Beside V they change nothing.
QK_NORM = re.compile(
    r"(?:^|\.)(?:(?:q|k|qk|query|key)_(?:layer_?)?(?:norm|ln)|norm_(?:[qk]|query|key))\."
)
# Q or K meet positions by parameters outside the attention module.
POSITIONS = {"deberta", "deberta-v2", "sew-d", "speecht5", "bros"}
HARMLESS = ("share", "taken for", "after a convolution")  # notes that do not touch exactness
SHARED = "the heads' shared factor stays as it is, so that training may raise the rank again"
BIAS = "a bias acts as before, by one inner dimension more"
ZERO = "A B = 0, as at LoRA's start"
NOT_FINITE = "it holds NaN or infinite entries"


def truncate_model(
    model: Module, choice: RankChoice, match: str | None, frozen: bool
) -> TruncationReport:
    """Truncate the products of a model in place, and return what that loses."""
    inner = model.module if isinstance(model, (DataParallel, DistributedDataParallel)) else model
    tracker = SpectralTracker(inner, level="head", match=match, frozen=frozen, values=True)
    weights = _Weights(inner)
    records: list[Truncation] = []
    skipped = list(tracker.skipped)
    seen: dict[frozenset[int], str] = {}
    with torch.no_grad():
        for pair in tracker.pairs:
            reason = weights.obstacle(pair)
            if pair.kind == "lora" and not reason:
                first = seen.setdefault(weights.memory(pair), pair.label)
                reason = "" if first == pair.label else f"its factors are those of {first}"
            if reason:
                skipped.append((pair.label, reason))
                continue
            truncated = _lora if pair.kind == "lora" else _heads
            found, left_out = truncated(pair, weights, choice)
            records += found
            skipped += left_out
    return TruncationReport(tuple(records), tuple(skipped))


class _Weights:
    """The parameters of a model by their cleaned names, and what hinders their truncation."""

    def __init__(self, model: Module) -> None:
        self._modules: dict[str, list[Module]] = {}
        for name, module in model.named_modules():
            self._modules.setdefault(clean(f"{name}.").removesuffix("."), []).append(module)
        self._parameters = {clean(name): p for name, p in model.named_parameters()}
        every = SpectralTracker(model, level="head", frozen=True, values=True)
        self._attention: dict[str, list[Pair]] = {}
        for pair in every.pairs:
            self._attention.setdefault(pair.name, []).append(pair)
        self._architecture: Callable[[str], str] = every._modules.architecture

    def rows(self, factor: Factor) -> Tensor:
        """Return a factor as rows in float64; those of a bias have one entry each."""
        weight = self._parameters[factor.key].detach()
        rows = factor.rows(weight[:, None] if weight.ndim == 1 else weight)
        assert isinstance(rows, Tensor)
        return double(rows)

    def write(self, factor: Factor, rows: Tensor) -> None:
        """Write the rows of a factor into its weight."""
        weight = self._parameters[factor.key].detach()
        matrix = weight[:, None] if weight.ndim == 1 else weight.flatten(1)
        view = matrix.mT if factor.transposed else matrix
        if factor.block:
            view = view.unflatten(0, (-1, factor.block))[:, factor.start : factor.stop]
            view.copy_(rows.unflatten(0, (len(view), -1)))
        else:
            view[factor.start : factor.stop].copy_(rows)

    def bias(self, factor: Factor) -> Factor | None:
        """Return the bias of a projection, as a factor, if it has one."""
        key = re.sub("weight$", "bias", factor.key)
        found = Factor(key, False, factor.start, factor.stop, factor.block)
        if apart := re.fullmatch(r"(.*)([qkv])_proj_weight", factor.key):
            # torch's MultiheadAttention of several widths has three weights and one bias
            key, rows = f"{apart[1]}in_proj_bias", len(self._parameters[factor.key])
            start = "qkv".index(apart[2]) * rows
            found = Factor(key, False, start, start + rows)
        return found if key in self._parameters else None

    def memory(self, pair: Pair) -> frozenset[int]:
        """Return where the factors lie: tied adapters have theirs in common."""
        return frozenset(self._parameters[f.key].data_ptr() for f in (pair.left, pair.right))

    def obstacle(self, pair: Pair) -> str:
        """Say why a product cannot be truncated in place; empty if it can."""
        for factor in (pair.left, pair.right):
            weight = self._parameters[factor.key]
            if is_sharded(weight):
                return "its weights are sharded: gather them first"
            if trouble := unreadable(weight) or ("is empty here" if weight.numel() == 0 else ""):
                return f"{factor.key} {trouble}"
        if pair.kind == "lora":
            merged = any(getattr(m, "merged", False) for m in self._modules.get(pair.name, ()))
            return "its update is merged: unmerge_adapter() takes it out again" if merged else ""
        return self._between(pair)

    def _between(self, pair: Pair) -> str:
        """Say what stands between the two weights of attention beside q . k, or P V."""
        module = pair.name if pair.right.key.startswith(f"{pair.name}.") else ""  # the root's is ""
        for note in pair.notes:
            if note in (APART, MERGED):
                return "adapters belong to its weights: merge_and_unload() makes them one"
            if not any(word in note for word in HARMLESS):
                return note
        if pair.kind == "attention":
            if self._architecture(pair.name) in POSITIONS:
                return "Q or K also meet relative positions: the scores are not a product of them"
            if self._rotates(module):
                return (
                    "rotary embeddings turn Q and K: the scores at a distance t are those of "
                    "W_Q^T R_t W_K, which is another product at each t"
                )
        if foreign := self._foreign(pair, module):
            return f"{foreign} may meet its factors: what depends on them is not known"
        return ""

    def _rotates(self, module: str) -> bool:
        """Whether the code of an attention module names rotary embeddings; else, any module."""
        if source := "".join(_source(type(found)) for found in self._modules.get(module, ())):
            return ROTARY.search(source) is not None
        names = (f"{name} {type(ms[0]).__name__}" for name, ms in self._modules.items())
        return any(ROTARY.search(name) for name in names)

    def _foreign(self, pair: Pair, module: str) -> str:
        """Name a parameter of the attention module that belongs to none of its projections."""
        prefix = f"{module}." if module else ""
        keys = {f.key for p in self._attention[pair.name] for f in (p.left, p.right)}
        own = {f"{prefix}in_proj_bias", *keys}
        inner = tuple(f"{key.rpartition('.')[0]}." for key in keys if "." in key[len(prefix) :])
        passed = (ADDED, QK_NORM) if pair.kind == "value-output" else (ADDED,)
        for name in self._parameters:
            if not name.startswith(prefix) or name in own or name.startswith(inner):
                continue
            if not any(harmless.search(name) for harmless in passed):
                return name
        zeros = any(getattr(m, "add_zero_attn", False) for m in self._modules.get(module, ()))
        return "add_zero_attn" if zeros else ""


def _source(kind: type[Module]) -> str:
    """Return the code of a class and of those that it inherits from, where there are files."""
    found = ""
    for ancestor in kind.__mro__:
        if ancestor in (Module, object):
            break
        try:
            found += inspect.getsource(ancestor)
        except (OSError, TypeError):  # it was defined where there is no file
            continue
    return found


Truncated = tuple[list[Truncation], list[tuple[str, str]]]  # with what was skipped
Notes = tuple[str, ...]


def _lora(pair: Pair, weights: _Weights, choice: RankChoice) -> Truncated:
    """Truncate a LoRA update; its factors keep their shapes."""
    left, right = weights.rows(pair.left), weights.rows(pair.right)
    kept = _kept(left, right, choice)
    if isinstance(kept, str):
        return [], [(pair.label, kept)]
    stored = 0.0
    if kept.rank < len(left):
        weights.write(pair.left, _padded(kept.left.mT, left))
        weights.write(pair.right, _padded(kept.right, right))
        stored = distance(left.mT, right, weights.rows(pair.left).mT, weights.rows(pair.right))
    return [Truncation.of(pair, kept, stored)], []


def _kept(left: Tensor, right: Tensor, choice: RankChoice) -> TruncatedProduct | str:
    """Truncate A B from the rows A^T and B, or say why not."""
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        return NOT_FINITE
    kept = truncated_product(
        left.mT, right, rank=choice.rank, energy=choice.energy, error=choice.error
    )
    return ZERO if kept.is_zero else kept


def _padded(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows with zeros below."""
    padded = torch.zeros_like(like)
    padded[: len(rows)] = rows
    return padded


@dataclass(eq=False)
class _Heads:
    """The factors of an attention layer head by head, in float64, and their biases."""

    left: Tensor  # (heads, width, n)
    right: Tensor  # (key heads, width, m)
    left_bias: Tensor | None  # (heads, width), of Q; W_O has none on its inner dimension
    right_bias: Tensor | None  # (key heads, width), of K, or of V

    @classmethod
    def read(cls, pair: Pair, weights: _Weights) -> _Heads:
        """Read copies of the weights."""
        heads, key_heads = pair.heads or 1, pair.key_heads or 1
        left = weights.rows(pair.left).unflatten(0, (heads, -1)).clone()
        right = weights.rows(pair.right).unflatten(0, (key_heads, -1)).clone()
        ours = weights.bias(pair.left) if pair.kind == "attention" else None
        theirs = weights.bias(pair.right)
        left_bias = None if ours is None else weights.rows(ours).view(heads, -1).clone()
        right_bias = None if theirs is None else weights.rows(theirs).view(key_heads, -1).clone()
        return cls(left, right, left_bias, right_bias)

    def write(self, pair: Pair, weights: _Weights) -> None:
        """Write the weights and the biases."""
        weights.write(pair.left, self.left.flatten(0, 1))
        weights.write(pair.right, self.right.flatten(0, 1))
        for factor, bias in ((pair.left, self.left_bias), (pair.right, self.right_bias)):
            if bias is not None and (found := weights.bias(factor)):
                weights.write(found, bias.reshape(-1, 1))

    def of(self, i: int) -> tuple[Tensor, Tensor]:
        """Return the factors of a query head, of which others may share the second."""
        return self.left[i], self.right[i * len(self.right) // len(self.left)]

    def rebase(self, i: int, kept: TruncatedProduct, values: bool) -> bool:
        """Give a head balanced factors, and say whether a bias takes one dimension more.

        Of scores b_Q acts, by ``W_K^T b_Q``; of values b_V, by ``W_O b_V``.
        """
        acting, onto = (self.right_bias, self.left) if values else (self.left_bias, self.right)
        moved = None if acting is None else onto[i].mT @ acting[i]
        self.left[i] = _padded(kept.left.mT, self.left[i])
        self.right[i] = _padded(kept.right, self.right[i])
        for bias in (self.left_bias, self.right_bias):
            if bias is not None:
                bias[i] = 0.0
        if acting is None or moved is None or not bool(moved.any()):
            return False
        size = torch.linalg.norm(moved).sqrt()
        acting[i, kept.rank], onto[i, kept.rank] = size, moved / size
        return True

    def project(self, i: int, kept: TruncatedProduct) -> None:
        """Project the factor that is not shared: ``U_k U_k^T A B`` is the truncated product."""
        self.left[i] = self.left[i] @ kept.left_vectors @ kept.left_vectors.mT


def _heads(pair: Pair, weights: _Weights, choice: RankChoice) -> Truncated:
    """Truncate the heads of attention one by one."""
    old, new = _Heads.read(pair, weights), _Heads.read(pair, weights)
    values, shared = pair.kind == "value-output", len(old.left) > len(old.right)
    if values and shared and old.right_bias is not None and bool(old.right_bias.any()):
        return [], [(pair.label, "V has a bias that heads share: W_O b_V cannot stay")]
    found: dict[int, tuple[TruncatedProduct, Notes]] = {}
    skipped: list[tuple[str, str]] = []
    for i in range(len(old.left)):
        kept = _kept(*old.of(i), choice)
        if isinstance(kept, str):
            skipped.append((f"{pair.label} head {i}", kept))
            continue
        notes: Notes = ()
        if kept.rank < old.left.shape[1] and shared:
            new.project(i, kept)
            notes = (SHARED,)
        elif kept.rank < old.left.shape[1] and new.rebase(i, kept, values):
            notes = (BIAS,)
        found[i] = kept, notes
    new.write(pair, weights)
    return _head_records(pair, old, _Heads.read(pair, weights), found), skipped


def _head_records(
    pair: Pair, old: _Heads, new: _Heads, found: dict[int, tuple[TruncatedProduct, Notes]]
) -> list[Truncation]:
    """Return the records of heads, with the errors of their weights as they are now."""
    records = []
    for i, (kept, notes) in found.items():
        (left, right), (new_left, new_right) = old.of(i), new.of(i)
        same = kept.rank >= len(left)
        stored = 0.0 if same else distance(left.mT, right, new_left.mT, new_right)
        records.append(Truncation.of(pair, kept, stored, i, notes))
    return records
