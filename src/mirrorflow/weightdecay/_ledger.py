r"""The account of what decay has absorbed: ``a_T = -sum of lr x decay`` over the steps taken.

Decay in the gradient of SGD reaches the weights through the momentum buffer. The step is linear
in the gradient, so the buffer holds its decay as ``sum_s k_s lambda_s w_s``; the ledger follows
the sum of these coefficients exactly, by the recursion of the buffer itself:
``c <- momentum c + (1 - dampening) decay``, of which a step takes ``lr c`` (with Nesterov
``lr (decay + momentum c)``).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

__all__ = ["TENSORS", "TOTALS", "Account", "Entry", "Piece", "with_all_groups"]

# The numbers of a ledger travel twice: with the record in the scheduler's state, and as plain
# numbers in the optimizer's parameter groups, whose checkpoint therefore knows its step.
# The key in a group of (steps, coupling, taken, absorbed, held, coupling, ...)
TOTALS = "weight_decay_ledger"
# Beside it, for each ledger, (place, taken, absorbed, held) of tensors with accounts of their own
TENSORS = "weight_decay_tensors"


_MOST_PIECES = 64
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
        """Return whether the decay has this value all along."""
        return self.decay == self.decay_end == decay


@dataclass
class Entry:
    """The account of one group, or of the tensors in it that share a schedule.

    Parameters
    ----------
    coupling : str
        How the decay acts, one of ``COUPLINGS``.
    taken : int
        The number of steps in which the optimizer updated the group.
    absorbed : float
        The sum of lr x decay so far, so that a_T = -absorbed; NaN where no such number exists.
    held : float or None
        For SGD with momentum: the coefficient of the decay in the buffer; None before it exists.
    asked, passed : float
        The sum of lr x decay, and of the part of each that rounding has let through: less, or more,
        where the weights are in half precision.
    kept : float
        The product of 1 - lr x decay over the steps since `take_kept`; NaN where a step of them has
        no such factor, or is not known.
    left : float
        The same product over all steps, of the entries that decay most: what decay alone has left
        of them.
    span : int
        The length below which pieces are joined, so that there are never more than a few.
    others : dict of int to Entry
        The accounts of tensors that missed a step which others of the set took, by their place in
        the set; `absorbed` is the sum over the steps in which any took part.
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

    coupling: str
    taken: int = 0
    absorbed: float = 0.0
    held: float | None = None
    asked: float = 0.0
    passed: float = 0.0
    kept: float = 1.0
    left: float = 1.0
    span: int = 1
    others: dict[int, Entry] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    _parted: tuple[tuple[int, int, float, float], ...] | None = field(default=None, repr=False)

    @property
    def accumulated(self) -> float:
        """a_T <= 0; NaN where decay acts in a way that no such number describes."""
        return 0.0 - self.absorbed

    def mean(self, sizes: Sequence[int]) -> float:
        """Return a_T, as a mean over the entries of the tensors that have taken a step.

        Parameters
        ----------
        sizes : sequence of int
            The number of entries of each tensor of the set.
        """
        if not self.others:
            return self.accumulated
        accounts = [(size, self.others.get(i, self)) for i, size in enumerate(sizes)]
        moved = [(size, own) for size, own in accounts if own.taken]
        total = sum(size for size, _ in moved)
        # Tensors that have never moved have no a: a mean over those that have.
        return sum(size * own.accumulated for size, own in moved) / total if total else 0.0

    def foremost(self, count: int) -> Entry:
        """Return the account that has absorbed most, of ``count`` tensors; one with NaN if any has.

        Each tensor has missed other steps: the set as a whole has absorbed what none of them has.
        """
        accounts = self._accounts(count)
        return max(accounts, key=lambda own: math.inf if math.isnan(own.absorbed) else own.absorbed)

    def smallest(self, count: int) -> Entry:
        """Return the account of the tensor, of ``count``, of whose entries decay has left least."""
        return min(self._accounts(count), key=Entry._remains)

    def _accounts(self, count: int) -> list[Entry]:
        """Return the different accounts of the tensors of the set, of which there are ``count``."""
        return [*self.others.values(), *([self] if len(self.others) < max(count, 1) else ())]

    def _remains(self) -> float:
        """Return what decay has left of an entry at least, ``e^a`` where only a is known."""
        if math.isnan(self.absorbed):
            return -math.inf
        return math.exp(-self.absorbed) if math.isnan(self.left) else abs(self.left)

    @property
    def acting_part(self) -> float:
        """The part of the decay that rounding let through; NaN before any, or if not known."""
        return self.passed / self.asked if self.asked else math.nan

    def record(
        self,
        step: int,
        decay: float,
        group: Mapping[str, Any],
        entered: float = 1.0,
        reached: float = 1.0,
        still: Sequence[int] = (),
        parts: Mapping[int, float] | None = None,
    ) -> None:
        """Enter a step that the optimizer has taken with this decay and these settings.

        The tensors at the places ``still`` of the set took no part in it; ``parts`` is what reached
        each of the others, where that differs.

        Of the decay the part ``entered`` gets into SGD's gradient, and the part ``reached`` of what
        is then subtracted changes the weights: 1 unless their precision swallows some of it.
        """
        if still or self.others or parts:
            shares = parts or {}
            self._record_others(set(still), step, decay, group, entered, reached, shares)
        lr = math.nan if group.get("lr") is None else float(group["lr"])
        share = reached * self._share(entered * decay, lr, group)
        self.taken += 1
        asked = decay if self.coupling == "fixed" else lr * decay
        self.asked += asked
        self.passed += entered * reached * asked
        self.absorbed += share
        self.kept *= 1 - share  # the sum alone would miss share^2 / 2 of each step
        if share != 0 or asked != 0:
            most = 1.0 if entered == reached == 1 else math.nan  # rounding differs by the entry
            self.left *= self._least(most * asked, share, group)
        self._append(Piece(step, step + 1, decay, decay, lr, lr, share))

    def _record_others(
        self,
        still: set[int],
        step: int,
        decay: float,
        group: Mapping[str, Any],
        entered: float,
        reached: float,
        parts: Mapping[int, float],
    ) -> None:
        """Enter a step into the accounts of the tensors that have missed this step or others."""
        for place in (still | parts.keys()) - self.others.keys():  # these part from the rest here
            # Up to here it took every step that the set has taken.
            self.others[place] = replace(self, others={}, pieces=[], _parted=None)
            self._parted = None
        if len(still) == len(self.others):
            return
        self._parted = None
        for place, own in self.others.items():
            if place not in still:
                own.record(step, decay, group, entered, parts.get(place, reached))
                own.pieces.clear()

    def empty(self) -> None:
        """Take note that SGD's buffers hold no decay any more."""
        self.held, self._parted = 0.0, None
        for own in self.others.values():
            own.held = 0.0

    def take_kept(self, count: int) -> list[float]:
        """Return how much the steps since the last call have left of each tensor, and begin anew.

        ``count`` is the number of tensors in the set.
        """
        kept = [self.others.get(place, self).kept for place in range(count)]
        for own in (self, *self.others.values()):
            own.kept = 1.0
        return kept

    def rest(self, group: Mapping[str, Any]) -> None:
        """Take note of a step with learning rate, decay and gradient 0, which is not counted."""
        if self.coupling == "sgd" and float(group["momentum"]) != 0 and self.held is None:
            self.held = 0.0

    def pending(self, group: Mapping[str, Any], removed: bool = False) -> float:
        """Return what the momentum would still absorb if the decay were 0 from now on.

        Nothing, if it were removed then.
        """
        if self.coupling in ("coupled", "averaged", "unknown"):
            return math.nan if math.isnan(self.absorbed) else 0.0
        if self.coupling != "sgd":
            return 0.0
        momentum = float(group["momentum"])
        if removed or not self.held or momentum == 0:
            return 0.0
        # c falls by momentum m in each step: lr c (m + m^2 + ...) = lr c m / (1 - m) is still due,
        # m times that with Nesterov, whose steps take m c.
        passed = momentum if group["nesterov"] else 1.0
        left = momentum / (1 - momentum) if momentum < 1 else math.inf
        return float(group["lr"]) * self.held * left * passed

    def _share(self, decay: float, lr: float, group: Mapping[str, Any]) -> float:
        """Return the part of the sum that acts on the weights in this step."""
        if self.coupling == "decoupled":
            return lr * decay
        if self.coupling == "fixed":
            return decay
        if self.coupling == "sgd":
            return lr * self._through_momentum(decay, group)  # lr c, c that of the buffer
        # No sum of lr x decay describes the others, once there was some.
        return math.nan if decay != 0 or math.isnan(self.absorbed) else 0.0

    def _least(self, most: float, share: float, group: Mapping[str, Any]) -> float:
        """Return the factor of a step that takes ``most`` of an entry; NaN if it has none."""
        carried = self.coupling == "sgd" and float(group["momentum"]) != 0
        return math.nan if carried or math.isnan(share) else 1 - most

    def _through_momentum(self, decay: float, group: Mapping[str, Any]) -> float:
        """Move the coefficient in SGD's buffer by a step, and return the one that acts."""
        momentum, dampening = float(group["momentum"]), float(group["dampening"])
        if momentum == 0:
            return decay
        fresh = self.held is None
        # c <- momentum c + (1 - dampening) decay; torch takes the first gradient in whole
        self.held = decay if fresh else momentum * (self.held or 0.0) + (1 - dampening) * decay
        # a step takes lr c, with Nesterov lr (decay + momentum c)
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
        """Return whether a short piece takes in the next: not across a switch."""
        return last.stop - last.start < self.span and (last.decay_end != 0) == (new.decay != 0)

    def _coarsen(self) -> None:
        """Double the length of the pieces; if it is all switches, forget some of them."""
        self.span *= 2
        self.pieces = _joined(self.pieces, self._joins)
        if len(self.pieces) > _MOST_PIECES:
            short = self.span
            self.pieces = _joined(self.pieces, lambda last, new: last.stop - last.start < short)

    def summary(self) -> dict[str, Any]:
        """Return the number of steps and a_T."""
        return {"steps": self.taken, "a": self.accumulated}

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the record as rows of a table, with the sum at the end of each."""
        total, rows = 0.0, []
        for piece in self.pieces:
            total += piece.absorbed
            rows.append({"group": name, "kind": self.coupling} | vars(piece) | {"a": 0.0 - total})
        return rows

    def state(self) -> dict[str, Any]:
        """Return everything, in plain numbers, strings and lists."""
        values = asdict(self)
        pieces = [list(piece.values()) for piece in values["pieces"]]
        others = {"others": [list(own._numbers(place)) for place, own in self.others.items()]}
        del values["_parted"]
        return {"kind": values.pop("coupling")} | values | others | {"pieces": pieces}

    def _numbers(self, place: int) -> tuple[float, ...]:
        """Return the place and the numbers of a tensor with an account of its own."""
        return (place, *self.totals()[1:], self.asked, self.passed, self.kept, self.left)

    def parted(self) -> tuple[tuple[int, int, float, float], ...]:
        """Return the place, steps, sum and buffer of each tensor with an account of its own."""
        if self._parted is None:
            pairs = self.others.items()
            self._parted = tuple((place, *own.totals()[1:]) for place, own in pairs)
        return self._parted

    def part(self, known: Sequence[Sequence[float]]) -> None:
        """Take over what `parted` gave, or the numbers of a state, which has more of them."""
        self.others, self._parted = {}, None
        for place, taken, absorbed, held, *more in known:
            own = Entry(self.coupling)
            own._take((self.coupling, int(taken), float(absorbed), float(held)))
            if more:
                own.asked, own.passed, own.kept, own.left = map(float, more)
            self.others[int(place)] = own

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave."""
        self.taken, self.absorbed = int(state["taken"]), float(state["absorbed"])
        self.held, self.span = state["held"], int(state["span"])
        self.asked = float(state.get("asked", math.nan))
        self.passed = float(state.get("passed", math.nan))
        self.kept = float(state.get("kept", math.nan))
        self.left = float(state.get("left", math.nan if self.absorbed else 1.0))
        self.part(state.get("others", ()))
        if self.kept == 1:  # no decay has acted since the last call, nor on the others
            for own in self.others.values():
                own.kept = 1.0
        self.pieces = [Piece(*piece) for piece in state["pieces"]]

    def totals(self) -> tuple[str, int, float, float]:
        """Return the coupling and the numbers, without the record, as they travel in the groups."""
        held = _NONE if self.held is None else self.held
        return self.coupling, self.taken, self.absorbed, held

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
        self.asked = self.passed = self.kept = math.nan
        self.left = math.nan if self.absorbed else 1.0

    def _cut(self, step: int) -> None:
        """Forget the record from a step on; the last piece takes up the difference."""
        self.pieces = [piece for piece in self.pieces if piece.start < step]
        if self.pieces and self.pieces[-1].stop > step:
            last = self.pieces[-1]
            last.stop = step
            last.decay_end = last.decay if last.constant(last.decay) else math.nan
            last.lr_end = last.lr if last.lr == last.lr_end else math.nan
            # The pieces have to sum to what is known of the whole.
            last.absorbed = self.absorbed - sum(p.absorbed for p in self.pieces[:-1])


def _unknown(start: int, stop: int, absorbed: float) -> Piece:
    """Return a piece of which only the sum is known."""
    nan = math.nan
    return Piece(start, stop, nan, nan, nan, nan, absorbed)


def _joined(pieces: list[Piece], joins: Any) -> list[Piece]:
    """Return the pieces, with neighbours joined where ``joins`` allows it."""
    result: list[Piece] = []
    for piece in pieces:
        if result and joins(result[-1], piece):
            result[-1].extend(piece)
        else:
            result.append(piece)
    return result


class Account:
    """The number of steps that an optimizer has taken, and one entry for each set of tensors.

    Attributes
    ----------
    steps : int
        The optimizer's steps, skipped ones not counted.
    fresh : bool
        Whether a step has been taken since this was set to False, or since a state was loaded.
    alone : bool
        Whether a state was loaded whose step the optimizer has not heard of: it is new, or it will
        load its own yet.
    entries : list of Entry
        The ledgers.

    Examples
    --------
    >>> groups = [{"lr": 0.5}]
    >>> account = Account()
    >>> account.open(Entry("decoupled"), group=0)
    >>> account.entries[0].record(0, 0.1, groups[0])
    >>> account.close_step(groups)
    >>> groups[0]["weight_decay_ledger"]
    (1, 'decoupled', 1, 0.05, nan)
    """

    def __init__(self) -> None:
        self.steps, self.fresh, self.alone = 0, False, False
        self.entries: list[Entry] = []
        self.group_of: list[int] = []
        self.loaded: Mapping[str, Any] | None = None  # since the last step
        self._shared: list[tuple[Any, ...]] = []  # what the groups hold until a load
        self.missing: tuple[int, int] | None = None

    def open(self, entry: Entry, group: int) -> None:
        """Add a ledger for tensors of a group."""
        self.entries.append(entry)
        self.group_of.append(group)

    def close_step(self, groups: Sequence[dict[str, Any]]) -> None:
        """Count a step whose entries have been made."""
        self.steps += 1
        self.fresh, self.loaded = True, None
        self.share(groups)

    def share(self, groups: Sequence[dict[str, Any]]) -> None:
        """Write the totals to the optimizer's groups."""
        self._shared = self.totals(len(groups))
        for group, values in zip(groups, self._shared, strict=True):
            group[TOTALS] = values
        if any(entry.others for entry in self.entries):
            parted: list[list[Any]] = [[] for _ in groups]
            for entry, index in zip(self.entries, self.group_of, strict=True):
                parted[index].append(entry.parted())
            for group, values in zip(groups, parted, strict=True):
                group[TENSORS] = tuple(values)

    def totals(self, count: int) -> list[tuple[Any, ...]]:
        """Return what travels in each of the groups."""
        totals: list[list[Any]] = [[self.steps] for _ in range(count)]
        for entry, index in zip(self.entries, self.group_of, strict=True):
            totals[index].extend(entry.totals())
        return [tuple(values) for values in totals]

    def agrees(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Return whether the groups hold what was last shared with them, the same objects."""
        known = [group.get(TOTALS) for group in groups]
        return len(known) == len(self._shared) and all(map(operator.is_, known, self._shared))

    # The scheduler's own state

    def state(self) -> dict[str, Any]:
        """Return everything in plain numbers, strings and lists."""
        return {"steps": self.steps, "entries": [entry.state() for entry in self.entries]}

    def take(self, state: Mapping[str, Any]) -> None:
        """Take over a state that has been checked."""
        for entry, saved in zip(self.entries, state["entries"], strict=True):
            entry.load(saved)
        self._shared = []
        self.steps, self.fresh, self.missing = int(state["steps"]), False, None


def with_all_groups(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that sees all groups where the optimizer is lent some of them only.

    ZeRO 1 and 2 step one group after the other, each as the only one of the optimizer.
    """

    def method(self: Any, optimizer: Any, args: Any, kwargs: Any) -> Any:
        lent = self.optimizer.param_groups
        lacks = len(lent) < len(self.coverage.groups)
        if not lacks or (whole := self.coverage.whole(lent)) is None:
            return hook(self, optimizer, args, kwargs)
        known, self.optimizer.param_groups = self.coverage.groups, whole
        try:
            return hook(self, optimizer, args, kwargs)
        finally:
            self.optimizer.param_groups, self.coverage.groups = lent, known

    return method
