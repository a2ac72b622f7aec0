r"""The account of what decay has absorbed: ``a_T = -sum of lr x decay`` over the steps taken.

Decay in the gradient of SGD reaches the weights through the momentum buffer. The step is linear
in the gradient, so the buffer holds its decay as ``sum_s k_s lambda_s w_s``; the ledger follows
the sum of these coefficients exactly, by the recursion of the buffer itself:
``c <- momentum c + (1 - dampening) decay``, of which a step takes ``lr c`` (with Nesterov
``lr (decay + momentum c)``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Entry", "Piece"]

_MOST_PIECES = 64
_ROUNDING = 1e-7  # of sums in another order, relative to the sum
_NONE = math.nan  # "no momentum buffer yet", where only floats can be kept


@dataclass
class Piece:
    """The steps from start to before stop: their first and last values, and what they absorbed."""

    start: int
    stop: int
    decay: float
    decay_end: float
    lr: float
    lr_end: float
    absorbed: float

    def extend(self, other: Piece) -> None:
        """Take in the piece that follows."""
        self.stop, self.decay_end, self.lr_end = other.stop, other.decay_end, other.lr_end
        self.absorbed += other.absorbed

    def constant(self, decay: float) -> bool:
        """Tell whether the decay has this value all along."""
        return self.decay == self.decay_end == decay


@dataclass
class Entry:
    """The account of one group, or of the tensors in it that share a schedule.

    Parameters
    ----------
    kind : str
        How the decay acts, one of ``coupling.KINDS``.
    taken : int
        The number of steps in which the optimizer updated the group.
    absorbed : float
        The sum of lr x decay so far, so that a_T = -absorbed; NaN where no such number exists.
    held : float or None
        For SGD with momentum: the coefficient of the decay in the buffer; None before it exists.
    span : int
        The length below which pieces are joined, so that there are never more than a few.
    pieces : list of Piece
        The record: runs of equal decay as one, changing decay more coarsely the longer it lasts;
        steps without decay are not joined to steps with it, so that a switch keeps its step.

    Examples
    --------
    >>> entry = Entry("decoupled")
    >>> for step in range(4):
    ...     entry.record(step, 0.5 if step < 3 else 0.0, {"lr": 0.25})
    >>> entry.accumulated, [(p.start, p.stop, p.decay) for p in entry.pieces]
    (-0.375, [(0, 3, 0.5), (3, 4, 0.0)])
    """

    kind: str
    taken: int = 0
    absorbed: float = 0.0
    held: float | None = None
    span: int = 1
    pieces: list[Piece] = field(default_factory=list)

    @property
    def accumulated(self) -> float:
        """a_T <= 0; NaN where decay acts in a way that no such number describes."""
        return 0.0 - self.absorbed

    def record(self, step: int, decay: float, group: Mapping[str, Any]) -> None:
        """Enter a step that the optimizer has taken with this decay and these settings."""
        lr = math.nan if group.get("lr") is None else float(group["lr"])
        share = self._share(decay, lr, group)
        self.taken += 1
        self.absorbed += share
        self._append(Piece(step, step + 1, decay, decay, lr, lr, share))

    def rest(self, group: Mapping[str, Any]) -> None:
        """Take note of a step with learning rate, decay and gradient 0, which is not counted."""
        if self.kind == "sgd" and float(group["momentum"]) != 0 and self.held is None:
            self.held = 0.0

    def pending(self, group: Mapping[str, Any], removed: bool = False) -> float:
        """Give what the momentum would still absorb if the decay were 0 from now on.

        Nothing, if it were removed then.
        """
        if self.kind in ("coupled", "averaged", "unknown"):
            return math.nan if math.isnan(self.absorbed) else 0.0
        if self.kind != "sgd":
            return 0.0
        momentum = float(group["momentum"])
        if removed or not self.held or momentum == 0:
            return 0.0
        passed = momentum if group["nesterov"] else 1.0
        left = momentum / (1 - momentum) if momentum < 1 else math.inf
        return float(group["lr"]) * self.held * left * passed

    def _share(self, decay: float, lr: float, group: Mapping[str, Any]) -> float:
        """Give the part of the sum that acts on the weights in this step."""
        if self.kind == "decoupled":
            return lr * decay
        if self.kind == "fixed":
            return decay
        if self.kind == "sgd":
            return lr * self._through_momentum(decay, group)
        return math.nan if decay != 0 or math.isnan(self.absorbed) else 0.0

    def _through_momentum(self, decay: float, group: Mapping[str, Any]) -> float:
        """Move the coefficient in SGD's buffer by a step, and give the one that acts."""
        momentum, dampening = float(group["momentum"]), float(group["dampening"])
        if momentum == 0:
            return decay
        fresh = self.held is None
        self.held = decay if fresh else momentum * (self.held or 0.0) + (1 - dampening) * decay
        return decay + momentum * self.held if group["nesterov"] else self.held

    def _append(self, new: Piece) -> None:
        """Put a step at the end of the record, in the last piece if it belongs there."""
        last = self.pieces[-1] if self.pieces else None
        if last and (last.constant(new.decay) or self._joins(last, new)):
            last.extend(new)
        else:
            self.pieces.append(new)
        if len(self.pieces) > _MOST_PIECES:
            self._coarsen()

    def _joins(self, last: Piece, new: Piece) -> bool:
        """Tell whether a short piece takes in the next: not across a switch."""
        return last.stop - last.start < self.span and (last.decay_end != 0) == (new.decay != 0)

    def _coarsen(self) -> None:
        """Double the length of the pieces; if it is all switches, forget some of them."""
        self.span *= 2
        self.pieces = _joined(self.pieces, self._joins)
        if len(self.pieces) > _MOST_PIECES:
            short = self.span
            self.pieces = _joined(self.pieces, lambda last, new: last.stop - last.start < short)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Give the record as rows of a table, with the sum at the end of each."""
        total, rows = 0.0, []
        for piece in self.pieces:
            total += piece.absorbed
            rows.append({"group": name, "kind": self.kind} | vars(piece) | {"a": 0.0 - total})
        return rows

    def state(self) -> dict[str, Any]:
        """Give everything, in plain numbers, strings and lists."""
        values = asdict(self)
        return values | {"pieces": [list(p.values()) for p in values["pieces"]]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave."""
        self.taken, self.absorbed = int(state["taken"]), float(state["absorbed"])
        self.held, self.span = state["held"], int(state["span"])
        self.pieces = [Piece(*piece) for piece in state["pieces"]]

    def totals(self) -> tuple[str, int, float, float]:
        """Give the kind and the numbers, without the record, as they travel in the groups."""
        held = _NONE if self.held is None else self.held
        return self.kind, self.taken, self.absorbed, held

    def fits(self, totals: tuple[str, int, float, float], ours: int, theirs: int) -> bool:
        """Tell whether the totals of step ``theirs`` can be those of this record's own run.

        What a step takes is >= 0, so that a later sum is not smaller; an earlier one has to be
        that of the record up to there, or lie within a piece of it.
        """
        _, taken, absorbed, _ = totals
        if theirs > ours:
            more = taken - self.taken
            return 0 <= more <= theirs - ours and _between(self.absorbed, absorbed, math.inf)
        if theirs == ours and taken != self.taken:
            return False
        low = sum(p.absorbed for p in self.pieces if p.stop <= theirs)
        parts = [self._part(p, theirs) for p in self.pieces if p.start < theirs < p.stop]
        least, most = (low + sum(ends) for ends in zip((0.0, 0.0), *parts, strict=True))
        return taken <= self.taken and _between(least, absorbed, most)

    def _part(self, piece: Piece, step: int) -> tuple[float, float]:
        """Bound what a piece had absorbed at a step within it."""
        even = piece.constant(piece.decay) and piece.lr == piece.lr_end
        if not even or self.kind == "sgd":  # whose buffer fills by and by
            return 0.0, piece.absorbed
        part = piece.absorbed * (step - piece.start) / (piece.stop - piece.start)
        return part, part

    def adopt(self, totals: tuple[str, int, float, float], ours: int, theirs: int) -> None:
        """Move from step ``ours`` to step ``theirs``, whose totals the optimizer knows."""
        before = self.absorbed
        self._take(totals)
        if theirs > ours:
            self.pieces.append(_unknown(ours, theirs, self.absorbed - before))
        else:
            self._cut(theirs)

    def replace(self, totals: tuple[str, int, float, float], steps: int) -> None:
        """Take the totals of another run; of its steps nothing but the sum is known."""
        self._take(totals)
        self.pieces = [_unknown(0, steps, self.absorbed)] if self.taken else []

    def _take(self, totals: tuple[str, int, float, float]) -> None:
        """Take over the numbers."""
        _, self.taken, self.absorbed, held = totals
        self.held = None if math.isnan(held) else held

    def _cut(self, step: int) -> None:
        """Forget the record from a step on; the last piece takes up the difference."""
        self.pieces = [piece for piece in self.pieces if piece.start < step]
        if self.pieces and self.pieces[-1].stop > step:
            last = self.pieces[-1]
            last.stop = step
            last.decay_end = last.decay if last.constant(last.decay) else math.nan
            last.lr_end = last.lr if last.lr == last.lr_end else math.nan
            last.absorbed = self.absorbed - sum(p.absorbed for p in self.pieces[:-1])


def _between(low: float, value: float, high: float) -> bool:
    """Tell whether a sum lies between two others, up to rounding; of NaN nothing is known."""
    if math.isnan(low) or math.isnan(value) or math.isnan(high):
        return True
    slack = _ROUNDING * max(abs(low), abs(value))
    return low - slack <= value <= high + slack


def _unknown(start: int, stop: int, absorbed: float) -> Piece:
    """Make a piece of which only the sum is known."""
    nan = math.nan
    return Piece(start, stop, nan, nan, nan, nan, absorbed)


def _joined(pieces: list[Piece], joins: Any) -> list[Piece]:
    """Join neighbours where ``joins`` says so."""
    result: list[Piece] = []
    for piece in pieces:
        if result and joins(result[-1], piece):
            result[-1].extend(piece)
        else:
            result.append(piece)
    return result
