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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["TENSORS", "TOTALS", "Account", "Entry", "Piece", "with_all_groups"]

# The numbers of a ledger travel twice: with the record in the scheduler's state, and as plain
# numbers in the optimizer's parameter groups, whose checkpoint therefore knows its step.
# The key in a group of (steps, coupling, taken, absorbed, held, coupling, ...)
TOTALS = "weight_decay_ledger"
# Beside it, for each ledger, (places, taken, absorbed, held) of tensors with accounts of their own
TENSORS = "weight_decay_tensors"


Part = tuple[float, float, float]  # what entered, what reached, and the most of an entry
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
        The accounts of tensors that differ, by their place in the set: they missed a step which
        others took, or another part of it acted on them. Those with one history share an entry.
        `absorbed` is the sum over the steps in which any took part, in the mean over entries.
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
    # What `parted` returns; and the entries in `others`, each once, as the last step divided them.
    _parted: tuple[tuple[Any, ...], ...] | None = field(default=None, repr=False)
    _ways: tuple[Any, list[Way]] | None = field(default=None, repr=False)

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
        own = [own for own, *_ in self._members()] if self.others else []
        return [*own, self] if len(self.others) < max(count, 1) else own

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
        most: float | None = None,
        still: Sequence[int] = (),
        parts: Mapping[tuple[int, ...], Part] | None = None,
    ) -> None:
        """Enter a step that the optimizer has taken with this decay and these settings.

        Of the decay the part ``entered`` gets into SGD's gradient, and the part ``reached`` of what
        is then subtracted changes the weights: 1 unless their precision swallows some of it. Of
        single entries ``most`` is the largest part, NaN if that is not known.

        The tensors at the places ``still`` of the set took no part in it; ``parts`` has these three
        numbers of others, where they differ, by their places.
        """
        if most is None:
            most = 1.0 if entered == reached == 1 else math.nan  # rounding differs by the entry
        if still or self.others or parts:
            own = (entered, reached, most)
            self._record_others(still, step, decay, group, own, parts or {})
        lr = math.nan if group.get("lr") is None else float(group["lr"])
        share = reached * self._share(entered * decay, lr, group)
        self.taken += 1
        asked = decay if self.coupling == "fixed" else lr * decay
        self.asked += asked
        self.passed += entered * reached * asked
        self.absorbed += share
        self.kept *= 1 - share  # the sum alone would miss share^2 / 2 of each step
        if share != 0 or asked != 0:
            self.left *= self._least(most * asked, share, group)
        self._append(Piece(step, step + 1, decay, decay, lr, lr, share))

    def _record_others(
        self,
        still: Sequence[int],
        step: int,
        decay: float,
        group: Mapping[str, Any],
        part: Part,
        parts: Mapping[tuple[int, ...], Part],
    ) -> None:
        """Enter a step into the accounts of the tensors that differ, in this step or another."""
        key = tuple(still), tuple(parts)
        if self._ways is None or key != self._ways[0]:
            self._ways, self._parted = (key, self._divided(still, parts)), None
        acted = {(): part, **parts}
        moved = [(own, acted[how]) for own, _, how in self._ways[1] if how is not None]
        for own, numbers in moved:
            own.record(step, decay, group, *numbers)
            own.pieces.clear()
        if moved:
            self._parted = None

    def _divided(self, still: Sequence[int], parts: Iterable[tuple[int, ...]]) -> list[Way]:
        """Divide the tensors by their history and by what acts on them in this step."""
        which: dict[int, Any] = {place: places for places in parts for place in places}
        which |= dict.fromkeys(still)
        members = self._members()
        if fresh := which.keys() - self.others.keys():  # these part from the rest here
            # Up to here they took every step that the set has taken.
            own, places = self._copied(), tuple(sorted(fresh))
            self.others |= dict.fromkeys(places, own)
            members = [*members, (own, places, ())]
        found: list[Way] = []
        for own, places, _ in members:
            ways: dict[tuple[int, ...] | None, list[int]] = {}
            for place in places:
                ways.setdefault(which.get(place, ()), []).append(place)
            for how, some in [*ways.items()][1:]:
                found.append((own._copied(), tuple(some), how))
                self.others |= dict.fromkeys(some, found[-1][0])
            how, some = next(iter(ways.items()))
            found.append((own, tuple(some), how))
        return found

    def _members(self) -> list[Way]:
        """Return the entries of tensors that differ, each once, as the last step divided them."""
        if self._ways is None:
            places: dict[int, list[int]] = {}
            for place, own in self.others.items():
                places.setdefault(id(own), []).append(place)
            some: list[Way] = [(self.others[p[0]], tuple(p), ()) for p in places.values()]
            self._ways = None, some
            return some
        return self._ways[1]

    def _copied(self) -> Entry:
        """Return the account of tensors that part from the others here."""
        return replace(self, others={}, pieces=[], _parted=None, _ways=None)

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

    def parted(self) -> tuple[tuple[Any, ...], ...]:
        """Return the places, steps, sum and buffer of tensors with accounts of their own."""
        if self._parted is None:
            members = self._members()
            self._parted = tuple((places, *own.totals()[1:]) for own, places, _ in members)
        return self._parted

    def set_others(self, others: dict[int, Entry]) -> None:
        """Take these for the accounts of tensors that differ, by their place in the set."""
        self.others, self._parted, self._ways = others, None, None

    def totals(self) -> tuple[str, int, float, float]:
        """Return the coupling and the numbers, without the record, as they travel in the groups."""
        held = _NONE if self.held is None else self.held
        return self.coupling, self.taken, self.absorbed, held


def _joined(pieces: list[Piece], joins: Any) -> list[Piece]:
    """Return the pieces, with neighbours joined where ``joins`` allows it."""
    result: list[Piece] = []
    for piece in pieces:
        if result and joins(result[-1], piece):
            result[-1].extend(piece)
        else:
            result.append(piece)
    return result


# An entry, the places of its tensors, and which of the parts of a step acted on them: that of these
# places, the one of the set, (), or None, because they were still
Way = tuple[Entry, tuple[int, ...], tuple[int, ...] | None]


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
        self.shared: list[tuple[Any, ...]] = []  # what the groups hold until a load
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
        self.shared = self.totals(len(groups))
        for group, values in zip(groups, self.shared, strict=True):
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
        return len(known) == len(self.shared) and all(map(operator.is_, known, self.shared))


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
