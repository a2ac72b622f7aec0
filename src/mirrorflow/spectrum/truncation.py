r"""Truncated singular value decompositions of products A B, and reports of them.

The product is never formed: with ``A = Q_A R_A`` and ``B^T = Q_B R_B`` the singular values of A B
are those of the r x r core ``R_A R_B^T``, and its singular vectors are Q_A and Q_B times those of
the core. What truncation loses follows from the singular values (Eckart, Young 1936).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ._grams import double
from ._text import aligned
from .pairs import Pair, label
from .product import ROUNDING, lost_of, smallest_rank

__all__ = [
    "RankChoice",
    "TruncatedProduct",
    "Truncation",
    "TruncationReport",
    "distance",
    "truncated_product",
]


@dataclass(frozen=True)
class RankChoice:
    r"""How much of a product to keep: exactly one of three.

    Attributes
    ----------
    rank : int or None
        The rank, >= 1; a product of a smaller rank keeps its own.
    energy : float or None
        The share of the squared singular values that is kept, in (0, 1].
    error : float or None
        The largest relative Frobenius error, in [0, 1). ``error=e`` is ``energy = 1 - e^2``.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is no choice."""
        given = {k: v for k, v in asdict(self).items() if v is not None}
        if len(given) != 1:
            raise ValueError(
                f"exactly one of rank, energy and error must be given, got {given or 'none'}. "
                "Name one, as in rank=8 or energy=0.99."
            )
        if self.rank is not None and not (type(self.rank) is int and self.rank >= 1):
            raise ValueError(f"rank must be a whole number >= 1, got {self.rank!r}. Use rank=1.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {self.energy}. Use energy=0.99.")
        if self.error is not None and not 0 <= self.error < 1:
            raise ValueError(f"error must be in [0, 1), got {self.error}. Use error=0.1.")

    def of(self, values: Tensor, rounding: Tensor) -> int:
        """Return the rank to keep, >= 1, of descending singular values (k,)."""
        if self.rank is not None:
            return min(self.rank, len(values))
        # The squares that are lost are error^2 of all: energy = 1 - error^2.
        lost = lost_of(self.energy) if self.energy is not None else (self.error or 0.0) ** 2
        return max(1, int(smallest_rank(values, lost, rounding)))


@dataclass(frozen=True, eq=False)
class TruncatedProduct:
    r"""The best approximation ``U_k S_k V_k^T`` of rank k of a product ``A B = U S V^T``.

    Attributes
    ----------
    left_vectors : Tensor of shape (n, k)
        U_k, orthonormal columns, float64.
    right_vectors : Tensor of shape (m, k)
        V_k, likewise.
    singular_values : Tensor of shape (min(n, r, m),)
        All of A B, descending, float64; 0 where A B is 0 up to rounding.
    """

    left_vectors: Tensor
    right_vectors: Tensor
    singular_values: Tensor

    @property
    def rank(self) -> int:
        """The rank k that is kept."""
        return self.left_vectors.shape[1]

    @property
    def left(self) -> Tensor:
        """The left factor ``U_k S_k^(1/2)`` (n, k), balanced: ``A^T A = B B^T = S_k``."""
        return self.left_vectors * self.singular_values[: self.rank].sqrt()  # S_k shared out evenly

    @property
    def right(self) -> Tensor:
        """The right factor ``S_k^(1/2) V_k^T`` (k, m)."""
        return (self.right_vectors * self.singular_values[: self.rank].sqrt()).mT

    @property
    def error(self) -> float:
        """The relative Frobenius error, ``sqrt(sum_{i > k} s_i^2 / sum_i s_i^2)``; 0 of A B = 0."""
        largest = self.singular_values[0]
        if not largest > 0:
            return 0.0
        shares = self.singular_values / largest  # their squares neither overflow nor underflow
        lost = torch.linalg.vector_norm(shares[self.rank :])
        return (lost / torch.linalg.vector_norm(shares)).item()

    @property
    def energy(self) -> float:
        """The share of the squared singular values that is kept, ``1 - error^2``."""
        return 1 - self.error**2  # Eckart and Young: what is lost is orthogonal to the rest

    @property
    def is_zero(self) -> bool:
        """Whether A B is 0 up to rounding, as at LoRA's start: nothing can be lost."""
        return not bool(self.singular_values[0] > 0)


def truncated_product(
    A: Tensor,
    B: Tensor,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
) -> TruncatedProduct:
    r"""Return the truncated singular value decomposition of A B from r x r work.

    It is exact, the error of the dense ``U S V^T`` up to rounding in float64, at the cost of two QR
    decompositions, r^2 (n + m), and an r x r SVD.

    Parameters
    ----------
    A : Tensor of shape (n, r)
        Any floating dtype; the work is in float64.
    B : Tensor of shape (r, m)
    rank, energy, error
        Exactly one, as `RankChoice` has them.

    Returns
    -------
    TruncatedProduct
        On the device of the factors.

    Raises
    ------
    ValueError
        If the factors have no product, are not finite, or the choice is none.

    Notes
    -----
    Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.

    Examples
    --------
    >>> A = torch.diag(torch.tensor([4.0, 3.0]))
    >>> kept = truncated_product(A, torch.eye(2), rank=1)
    >>> kept.error, round(kept.energy, 12)
    (0.6, 0.64)
    >>> (kept.left @ kept.right).round(decimals=6).tolist()
    [[4.0, 0.0], [0.0, 0.0]]
    >>> truncated_product(A, torch.eye(2), energy=0.64).rank
    1
    """
    choice = RankChoice(rank, energy, error)
    if A.ndim != 2 or B.ndim != 2 or A.shape[1] != B.shape[0] or 0 in (*A.shape, *B.shape):
        raise ValueError(
            f"A and B must be matrices (n, r) and (r, m), got {tuple(A.shape)} and "
            f"{tuple(B.shape)}. Transpose one of them?"
        )
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise ValueError("A and B must be finite, got NaN or infinite entries. Look at training.")
    A, B = double(A.detach()), double(B.detach())
    if not torch.isfinite(torch.linalg.norm(A) * torch.linalg.norm(B)):
        raise ValueError("A B must be finite, got entries beyond float64. Scale the factors.")
    return _truncated(A, B, choice)


def _truncated(A: Tensor, B: Tensor, choice: RankChoice) -> TruncatedProduct:
    """Truncate finite matrices in float64."""
    basis_a, core_a = torch.linalg.qr(A)
    basis_b, core_b = torch.linalg.qr(B.mT)
    # A B = Q_A (R_A R_B^T) Q_B^T
    U, values, Vh = torch.linalg.svd(core_a @ core_b.mT, full_matrices=False)
    rounding = ROUNDING * A.shape[1] * torch.linalg.norm(A) * torch.linalg.norm(B)
    if not values[0] > rounding:
        values = torch.zeros_like(values)
    k = choice.of(values, rounding)
    return TruncatedProduct(basis_a @ U[:, :k], basis_b @ Vh[:k].mT, values)


def distance(A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> float:
    """Return the relative Frobenius distance ``|A B - C D| / |A B|``; 0 where both are 0.

    ``A B - C D`` is the product of ``[A, C]`` and ``[B; -D]``, whose core has its norm: what is
    measured is what is stored, with the rounding of its dtype, and no difference of large norms.
    """
    A, B, C, D = map(double, (A, B, C, D))
    core = torch.linalg.qr(torch.cat([A, C], 1), mode="r").R
    other = torch.linalg.qr(torch.cat([B, -D]).mT, mode="r").R
    r = A.shape[1]
    lost = torch.linalg.norm(core @ other.mT).item()
    # The first r columns of the triangles are those of A and B^T, in the same bases.
    whole = torch.linalg.norm(core[:, :r] @ other[:, :r].mT).item()
    return lost / whole if whole else 0.0


@dataclass(frozen=True)
class Truncation:
    r"""What truncation does to one product.

    Attributes
    ----------
    name, kind, adapter
        Of the `Pair`.
    head : int or None
        Which query head of attention.
    shape : tuple of int
        (n, r, m): A is n x r and B is r x m.
    old_rank, new_rank : int
        The inner dimension r, and the rank that is kept; equal where nothing changes.
    error : float
        The relative Frobenius error of the truncation, exact from the singular values.
    stored_error : float
        That of the factors as they are stored, with the rounding to their dtype.
    energy : float
        The share of the squared singular values that is kept.
    notes : tuple of str
        What a reader of the numbers has to know.
    """

    name: str
    kind: str
    adapter: str
    head: int | None
    shape: tuple[int, int, int]
    old_rank: int
    new_rank: int
    error: float
    stored_error: float
    energy: float
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        pair: Pair,
        kept: TruncatedProduct,
        stored_error: float,
        head: int | None = None,
        notes: tuple[str, ...] = (),
    ) -> Truncation:
        """Return the record of a pair, or of one of its heads, with notes beside its own."""
        n, r, m = pair.shape
        inner = r if head is None else r // (pair.heads or 1)
        return cls(
            pair.name, pair.kind, pair.adapter, head, (n, inner, m), inner, min(inner, kept.rank),
            kept.error, stored_error, kept.energy, (*pair.notes, *notes),
        )  # fmt: skip

    @property
    def label(self) -> str:
        """The name, with the adapter and the head."""
        name = label(self.name, self.kind, self.adapter)
        return name if self.head is None else f"{name} head {self.head}"


@dataclass(frozen=True)
class TruncationReport:
    """What truncation does to all products of an adapter or a model.

    Attributes
    ----------
    records : tuple of Truncation
    skipped : tuple of (str, str)
        What is not truncated, each with the reason.
    notes : tuple of str
        What else is changed or left out.
    """

    records: tuple[Truncation, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        skipped = [{"name": name, "reason": reason} for name, reason in self.skipped]
        records = [asdict(record) for record in self.records]
        return {"records": records, "skipped": skipped, "notes": list(self.notes)}

    def to_json(self, indent: int | None = 1) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def table(self, width: int | None = None) -> str:
        """Return lines of text: a row for each product, and what has to be known beside them.

        A table of more than ``width`` columns is cut into blocks.
        """
        rows = [["product", "rank", "kept", "error", "as stored", "energy"]]
        for found in self.records:
            numbers = (found.error, found.stored_error, found.energy)
            cells = (found.old_rank, found.new_rank, *(f"{number:.4g}" for number in numbers))
            rows.append([found.label, *map(str, cells)])
        return "\n".join([*aligned(rows, width), *self._remarks()])

    def _remarks(self) -> list[str]:
        """Return the notes, and what was skipped."""
        noted: dict[str, int] = {}
        for note in (note for record in self.records for note in record.notes):
            noted[note] = noted.get(note, 0) + 1
        lines = [f"note on {count}: {note}" for note, count in noted.items()]
        lines += [f"note: {note}" for note in self.notes]
        return [*lines, *(f"not truncated: {name}: {reason}" for name, reason in self.skipped)]
