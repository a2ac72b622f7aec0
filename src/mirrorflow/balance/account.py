"""Account of D = A^T A - B B^T over a run: what decay left, what the optimizer and steps made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._grams import Layout, Number, accumulate, check_pair, gram, layout, norm, zeros

__all__ = ["BalanceAccount", "BalanceSplit"]

Pairs = Sequence[tuple[Tensor, Tensor]]
Shrink = float | Sequence[Number]

SAME = 1e-9  # relative difference up to which Gram matrices belong to the same weights
STACKED = 1 << 22  # elements of factors that are handled together
PARTS = ("optimizer", "second_order", "unsplit", "outside")


@dataclass(frozen=True, eq=False)
class BalanceSplit:
    r"""What D = A^T A - B B^T of one product consists of: all parts as they are left today.

    A contribution shrinks under the decay that follows it as everything else does. So each part is
    what is left of it, and they add up: ``D = left_by_decay + optimizer + second_order + unsplit +
    outside``, to rounding.

    Attributes
    ----------
    D_0 : Tensor of shape (..., r, r)
        At the beginning, float64.
    left_by_decay : Tensor of shape (..., r, r)
        What decay alone would have left of it: ``prod (1 - lr decay)^2 D_0``, or with factors that
        decay differently ``prod (s_A)^2 A_0^T A_0 - prod (s_B)^2 B_0 B_0^T``.
    optimizer, second_order : Tensor of shape (..., r, r)
        What is left of the optimizer's part, and of step and noise, of the steps that were seen.
    unsplit : Tensor of shape (..., r, r)
        Both together, of the intervals of which only the ends were seen.
    outside : Tensor of shape (..., r, r)
        Changes that were not training steps.
    shrink : (float, float)
        ``prod (1 - lr decay)`` for A and for B.
    n_steps, n_intervals : int
        How many steps were seen one by one, and how many intervals from their ends.
    """

    D_0: Tensor
    left_by_decay: Tensor
    optimizer: Tensor
    second_order: Tensor
    unsplit: Tensor
    outside: Tensor
    shrink: tuple[float, float]
    n_steps: int
    n_intervals: int

    @property
    def parts(self) -> dict[str, Tensor]:
        """The parts of D by name."""
        return {name: getattr(self, name) for name in ("left_by_decay", *PARTS)}

    @property
    def D(self) -> Tensor:
        """Today's: the sum of the parts."""
        return sum(self.parts.values(), torch.zeros_like(self.D_0))

    @property
    def fraction_left(self) -> Tensor:
        """``|D| / |D_0|``, of shape (...); NaN where D_0 = 0."""
        return norm(self.D) / _nan_for_zero(norm(self.D_0))

    @property
    def decay_alone(self) -> Tensor:
        """``|left_by_decay| / |D_0|``: ``prod (1 - lr decay)^2`` if both factors decay alike."""
        return norm(self.left_by_decay) / _nan_for_zero(norm(self.D_0))

    @property
    def shares(self) -> dict[str, Tensor]:
        """What each part makes of today's D, ``<part, D> / |D|^2``: they add up to 1."""
        today = self.D
        size = _nan_for_zero((today * today).sum((-2, -1)))
        return {name: (part * today).sum((-2, -1)) / size for name, part in self.parts.items()}

    @property
    def note(self) -> str:
        """Why the split is not complete; an empty string where it is."""
        if not self.n_intervals:
            return ""
        return (
            f"{self.n_intervals} interval(s) were seen from their ends only, which determine what "
            "decay did and the sum of what the optimizer, the steps and the noise did, not how it "
            "divides: that sum is in unsplit"
        )


class BalanceAccount:
    r"""Keep the exact account of D = A^T A - B B^T over a run, for many products at once.

    After each step, ``step`` is given the factors as they are and by how much they shrank. What it
    costs is one copy of the factors and two r x r products of float64 per factor; factors of one
    shape are handled together, nothing waits for the device, and nothing is written to the model.
    The copy is the state before the next step: whatever happens to the factors between two calls
    is in the account.

    **Intervals.** If only every n-th state is seen, D_n and D_0 and the product of the n shrink
    factors are known, and so is the sum of what optimizer, steps and noise did, as it is left at
    the end: ``D_n - prod(s)^2 D_0``. How it divides is not known: of the path between them the ends
    say nothing, and ``P^T P`` of one step over the whole interval is not the sum of those of its
    steps. ``interval`` puts it into ``unsplit``. What decay has left of the start, and the sum of
    the other parts, are the same however often the account is fed.

    **Several processes.** Of factors that are DTensors each process accounts for its part, and
    ``report`` adds up; only factors divided along r are exchanged at each step. Every rank has to
    make every call.

    Parameters
    ----------
    pairs : sequence of (Tensor, Tensor)
        The factors A (..., n, r) and B (..., r, m) of each product, as for `product_step`. The
        account keeps no reference to them: pass views, or parameters that have been replaced.
    each_step : bool
        Keep the copy that ``step`` needs. Without it every call counts as an interval, and only
        r x r matrices are kept.

    Raises
    ------
    ValueError
        If there are no pairs, shapes do not fit, or a factor has no floating-point data.

    Examples
    --------
    >>> A, B = torch.eye(3)[:, :1], torch.zeros(1, 2)
    >>> account = BalanceAccount([(A, B)])
    >>> for _ in range(3):
    ...     A, B = 0.9 * A, 0.9 * B + 0.1
    ...     account.step([(A, B)], shrink=0.9)
    >>> (split,) = account.report()
    >>> round(split.decay_alone.item(), 6), round(split.fraction_left.item(), 6)
    (0.531441, 0.384559)
    >>> {name: round(part.item(), 6) for name, part in split.parts.items() if part}
    {'left_by_decay': 0.531441, 'optimizer': -0.09756, 'second_order': -0.049322}
    """

    def __init__(self, pairs: Pairs, *, each_step: bool = True) -> None:
        if not len(pairs):
            raise ValueError("pairs must not be empty, got none. Pass [(A, B), ...].")
        self._each_step = each_step
        self._shapes = [check_pair(A, B, f"pairs[{i}]") for i, (A, B) in enumerate(pairs)]
        self._shrink = [1.0] * (2 * len(pairs))
        self._steps = self._intervals = 0
        self._stacks = self._stacked(pairs)

    def step(self, pairs: Pairs, shrink: Shrink = 1.0) -> None:
        """Account for one step, which has been taken since the last call.

        A step that ``GradScaler`` skipped has shrunk nothing: leave the call out.

        Parameters
        ----------
        pairs : sequence of (Tensor, Tensor)
            The factors as they are now.
        shrink : float, or a sequence of float or (float, float)
            ``1 - lr decay`` as it acted in this step: one for all, or for each pair one for both
            factors or one for A and one for B.
        """
        self._feed(pairs, shrink, split=True)

    def interval(self, pairs: Pairs, shrink: Shrink = 1.0) -> None:
        """Account for all steps since the last call; ``shrink`` is the product of their factors."""
        self._feed(pairs, shrink, split=False)

    @torch.no_grad()
    def moved(self, pairs: Pairs) -> None:
        """Count all change since the last call as ``outside``, not as training.

        For weights that were loaded, merged or projected (`gauge_projection`), and for steps whose
        decay is not known.
        """
        factors = self._read(pairs)
        for stack in self._stacks:
            stack.merge(stack.take(factors), 1.0, "outside")

    @torch.no_grad()
    def _feed(self, pairs: Pairs, shrink: Shrink, split: bool) -> None:
        """Account for a step or an interval."""
        shrinks = _shrinks(shrink, len(self._shapes))
        factors, seen = self._read(pairs), True
        for stack in self._stacks:
            after, s = stack.take(factors), stack.numbers(shrinks)
            if split and stack.before is not None:
                stack.split(after, s)
            else:
                stack.merge(after, s, "unsplit")
                seen = False
        # The product, not exp(-sum): they differ by the squares of lr decay.
        self._shrink = [old * new for old, new in zip(self._shrink, shrinks, strict=True)]
        self._steps, self._intervals = self._steps + seen, self._intervals + (not seen)

    def report(self) -> tuple[BalanceSplit, ...]:
        """Return what D of each pair consists of."""
        kept = self._by_factor()
        return tuple(
            _difference(kept[i], kept[i + 1], self._shrink[i : i + 2], self._steps, self._intervals)
            for i in range(0, len(kept), 2)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the account as tensors and numbers; the copy of the factors is not in it."""
        factors = [{name: t.clone() for name, t in kept.items()} for kept in self._by_factor()]
        return {
            "factors": factors,
            "shrink": list(self._shrink),
            "steps": self._steps,
            "intervals": self._intervals,
        }

    def load_state_dict(self, state: dict[str, Any], pairs: Pairs) -> None:
        """Go on from a saved account.

        Parameters
        ----------
        state : dict
            From ``state_dict``.
        pairs : sequence of (Tensor, Tensor)
            The factors as they were when it was saved: load the weights first. If they have moved
            since the last call before the saving (an account that is fed every n steps), the next
            call counts as an interval.

        Raises
        ------
        ValueError
            If the account belongs to other pairs.
        """
        shapes = [tuple(kept["first"].shape) for kept in state["factors"]]
        mine = [tuple(kept["first"].shape) for kept in self._by_factor()]
        if shapes != mine:
            raise ValueError(
                f"the saved account must belong to these pairs, whose Gram matrices are {mine}, "
                f"got {shapes}. Pass the pairs in the order in which it was made."
            )
        self._stacks = self._stacked(pairs)
        self._shrink = [float(s) for s in state["shrink"]]
        self._steps, self._intervals = int(state["steps"]), int(state["intervals"])
        for stack in self._stacks:
            stack.load([state["factors"][i] for i in stack.places], self._shrink)

    def _read(self, pairs: Pairs) -> list[Tensor]:
        """Return all factors, A and B in turn, if they are those of the account."""
        if len(pairs) != len(self._shapes):
            raise ValueError(
                f"pairs must be the {len(self._shapes)} of the account, got {len(pairs)}. "
                "Make a new account for other products."
            )
        for i, ((A, B), shapes) in enumerate(zip(pairs, self._shapes, strict=True)):
            if (A.shape, B.shape) != shapes:
                raise ValueError(
                    f"pairs[{i}] must keep the shapes {tuple(map(tuple, shapes))}, got "
                    f"{tuple(A.shape)} and {tuple(B.shape)}. Gather the weights first, or make a "
                    "new account."
                )
        return [factor for pair in pairs for factor in pair]

    @torch.no_grad()
    def _stacked(self, pairs: Pairs) -> list[_Stack]:
        """Put factors of one layout together, A's and B's alike, up to a size."""
        groups: dict[Any, list[int]] = {}
        factors = self._read(pairs)
        for i, factor in enumerate(factors):
            key = (layout(factor, -1 if i % 2 else -2), factor.dtype, factor.device)
            groups.setdefault(key, []).append(i)
        return [
            _Stack(where, places[i : i + most], factors, self._each_step)
            for (where, _, _), places in groups.items()
            for most in [max(1, STACKED // max(1, math.prod(where.shape)))]
            for i in range(0, len(places), most)
        ]

    def _by_factor(self) -> list[dict[str, Tensor]]:
        """Return the first Gram matrix and the parts of each factor, A and B in turn."""
        found: list[dict[str, Tensor]] = [{} for _ in self._shrink]
        for stack in self._stacks:
            stack.settle()
            for name, kept in (("first", stack.first), *stack.parts.items()):
                for place, entry in zip(stack.places, kept, strict=True):
                    found[place][name] = entry
        return found


def _difference(
    a: dict[str, Tensor], b: dict[str, Tensor], shrink: list[float], steps: int, intervals: int
) -> BalanceSplit:
    """Return the account of D from those of A^T A and B B^T."""
    (s_a, s_b), none = shrink, torch.zeros_like(a["first"])
    D_0 = a["first"] - b["first"]
    parts = {name: (a.get(name, none) - b.get(name, none)).expand_as(D_0).clone() for name in PARTS}
    left = s_a**2 * a["first"] - s_b**2 * b["first"]  # prod s_A^2 A_0^T A_0 - prod s_B^2 B_0 B_0^T
    return BalanceSplit(D_0, left, **parts, shrink=(s_a, s_b), n_steps=steps, n_intervals=intervals)


def _shrinks(shrink: Shrink, count: int) -> list[float]:
    """Return the shrink factors of all factors, A and B in turn."""
    each: Sequence[Number] = [shrink] * count if isinstance(shrink, int | float) else shrink
    if len(each) != count:
        raise ValueError(
            f"shrink must be one number or one entry for each of {count} pairs, got {len(each)}. "
            "Of one pair, pass [(s_A, s_B)]."
        )
    both = [entry if isinstance(entry, tuple) else (entry, entry) for entry in each]
    found = [float(s) for pair in both for s in pair]
    if not all(map(math.isfinite, found)):
        raise ValueError(
            f"shrink must be finite, got {shrink}. Where the decay that acted is not known, count "
            "the change with moved()."
        )
    return found


def _nan_for_zero(sizes: Tensor) -> Tensor:
    """Return sizes with NaN for 0, by which nothing can be divided."""
    return torch.where(sizes == 0, math.nan, sizes)


class _Stack:
    """Factors of one layout: their rows before a step, and what they have stored.

    The Gram matrix of each is ``kept first + sum of parts``, once `settle` has let the parts shrink
    and has added to them what the steps since the last time have made, over all processes.
    """

    def __init__(
        self, layout: Layout, places: list[int], factors: list[Tensor], each_step: bool
    ) -> None:
        self.layout, self.places, self.each_step = layout, places, each_step
        self.axes = [-1 if place % 2 else -2 for place in places]
        self.parts: dict[str, Tensor] = {}
        self.sums: Tensor | None = None  # s A^T C and C^T C of the steps since, of this process
        self.kept: float | Tensor = 1.0  # prod s^2 since the beginning
        self.since: float | Tensor = 1.0  # prod s^2 that the parts do not have yet
        now = self.take(factors)
        self.first = self.gram(now)
        self.before = now if each_step else None

    def take(self, factors: list[Tensor]) -> Tensor:
        """Copy those of all factors that are in this stack."""
        return self.layout.take([factors[place] for place in self.places], self.axes)

    def gram(self, rows: Tensor) -> Tensor:
        """Return the Gram matrices of rows, those of all processes together."""
        return self.layout.whole(gram(rows))

    def total(self) -> Tensor:
        """Return the Gram matrices as the settled account has them."""
        return sum(self.parts.values(), self.kept * self.first)

    def split(self, after: Tensor, s: float | Tensor) -> None:
        """Account for a step."""
        assert self.before is not None
        if self.sums is None:
            self.sums = zeros((2,), after)
        accumulate(self.sums, self.before, after, s)
        self._decay(s)
        self.before = after

    def merge(self, after: Tensor, s: float | Tensor, part: str) -> None:
        """Account for what is known by its ends only."""
        self.settle()
        self._decay(s)
        self.settle()
        # What decay alone would have left is in the total: the rest belongs to this part.
        self._add(part, self.gram(after) - self.total())
        self.before = after if self.each_step else None

    def settle(self) -> None:
        """Let the parts shrink, and add to them what the steps have made."""
        for part in self.parts.values():
            part.mul_(self.since)  # a part decays like everything else
        self.since = 1.0
        if self.sums is not None:
            cross, square = self.layout.whole(self.sums)
            # Already as they are left today: `accumulate` lets its sums shrink at each step.
            self._add("optimizer", cross + cross.mT)
            self._add("second_order", square)
            self.sums = None

    def load(self, saved: list[dict[str, Tensor]], shrink: list[float]) -> None:
        """Take a saved account over; the rows serve the next step if they are what was saved."""
        now, zero = self.first, torch.zeros_like(self.first[0])
        names = dict.fromkeys(name for kept in saved for name in kept)
        self.parts = {
            name: torch.stack([kept.get(name, zero).to(zero) for kept in saved]) for name in names
        }
        self.first = self.parts.pop("first")
        self.kept = self.numbers([s * s for s in shrink])  # A^T A falls as s^2
        trace = now.diagonal(dim1=-2, dim2=-1).sum(-1)
        # Other weights than those of the account: no step can be split from them.
        if not bool((norm(now - self.total()) <= SAME * trace).all()):
            self.before = None

    def numbers(self, of_all: list[float]) -> float | Tensor:
        """Return the numbers of these factors, one that broadcasts for each, or one for all."""
        chosen = [of_all[place] for place in self.places]
        if len(set(chosen)) == 1:
            return chosen[0]
        found = torch.tensor(chosen, dtype=torch.float64, device=self.first.device)
        return found.view(-1, *[1] * (self.first.ndim - 1))

    def _decay(self, s: float | Tensor) -> None:
        """Count how much everything has shrunk."""
        # (s A)^T (s A) = s^2 A^T A
        self.kept, self.since = self.kept * (s * s), self.since * (s * s)

    def _add(self, name: str, change: Tensor) -> None:
        """Add to a part."""
        if name in self.parts:
            self.parts[name].add_(change)
        else:
            self.parts[name] = change
