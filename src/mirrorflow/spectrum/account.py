"""The exact account of D = A^T A - B B^T of the products in a model, by their names."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .._threads import few_threads
from ..balance import BalanceAccount, BalanceSplit
from .pairs import Pair

__all__ = ["ProductAccount", "by_key_head"]

Shrink = float | Mapping[str, float]


class Tracked(Protocol):
    """What finds the factors: a `SpectralTracker`."""

    pairs: tuple[Pair, ...]

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """Return the factors of each pair as they are now."""
        ...


class ProductAccount:
    r"""What decay, the optimizer, and steps and noise have made of D of each product in a model.

    It is `mirrorflow.balance.BalanceAccount` for what a `SpectralTracker` has found, whose
    ``account`` begins one. `mirrorflow.ControlledDecay` keeps it by itself (``balance_every=``):
    it knows the shrink factors.

    Parameters
    ----------
    tracker : SpectralTracker
    each_step : bool
        As for `SpectralTracker.account`.

    Attributes
    ----------
    keys : tuple of (str, str)
        The names of the weights of each pair, which ``shrink`` may go by.

    Notes
    -----
    Each call takes the factors as they are: what acts between two calls is in the account, whatever
    it was. A step that shrinks the weights by ``s = 1 - lr decay`` is given as ``s``, n steps as
    the product of theirs. The sum of lr x decay does not determine that product: ``exp(-sum)`` is
    too large by a factor ``exp(sum (lr decay)^2 / 2)``, to leading order.
    """

    def __init__(self, tracker: Tracked, each_step: bool = True) -> None:
        self._tracker = tracker
        self.keys = tuple((pair.left.key, pair.right.key) for pair in tracker.pairs)
        factors = tracker.factors()
        self._size = sum(a.numel() + b.numel() for a, b in factors)
        with few_threads(self._size):
            self._account = BalanceAccount(factors, each_step=each_step)

    def step(self, shrink: Shrink = 1.0) -> None:
        """Account for one step, which has been taken since the last call.

        Parameters
        ----------
        shrink : float, or mapping of str to float
            ``1 - lr decay`` as it acted: one for all weights, or by their names; 1 for what is not
            in the mapping.
        """
        with few_threads(self._size):
            self._account.step(self._tracker.factors(), self._shrinks(shrink))

    def interval(self, shrink: Shrink = 1.0) -> None:
        """Account for all steps since the last call; ``shrink`` is the product of their factors."""
        with few_threads(self._size):
            self._account.interval(self._tracker.factors(), self._shrinks(shrink))

    def moved(self) -> None:
        """Count all change since the last call as ``outside``, not as training."""
        self._account.moved(self._tracker.factors())

    def report(self) -> dict[str, BalanceSplit]:
        """Return what D of each product consists of, by its label; one batch entry a key head."""
        labels = [pair.label for pair in self._tracker.pairs]
        return dict(zip(labels, self._account.report(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain numbers and strings; under FSDP2 every rank has to call.

        Matrices are r x r in float64, three or more for each factor: 4 kB for LoRA of rank 8, 3 MB
        for 12 heads of width 64.
        """
        state = self._account.state_dict()
        factors = [
            {name: [list(t.shape), _packed(t)] for name, t in kept.items()}
            for kept in state["factors"]
        ]
        return state | {"factors": factors, "products": [p.label for p in self._tracker.pairs]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved account; the model has to have its saved weights already.

        Raises
        ------
        ValueError
            If it is the account of other products.
        """
        check_products(state, self._tracker)
        factors = [
            {name: _unpacked(*kept) for name, kept in saved.items()} for saved in state["factors"]
        ]
        self._account.load_state_dict({**state, "factors": factors}, self._tracker.factors())

    def _shrinks(self, shrink: Shrink) -> float | list[tuple[float, float]]:
        """Return the factors of the pairs."""
        if not isinstance(shrink, Mapping):
            return shrink
        return [(shrink.get(a, 1.0), shrink.get(b, 1.0)) for a, b in self.keys]


def check_products(state: Mapping[str, Any], tracker: Tracked) -> None:
    """Raise unless an account is of the products of a tracker."""
    labels = [pair.label for pair in tracker.pairs]
    if state["products"] != labels:
        raise ValueError(
            f"the saved account must be of the products {labels}, got {state['products']}. Track "
            "what the run that saved it has tracked."
        )


def by_key_head(pair: Pair, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B of a pair from rows (r, n) and (r, m), one batch entry for each key head.

    The loss depends on each ``Q_h^T K``, with K of the key head that Q_h shares with others: under
    the flow ``sum_h Q_h Q_h^T - K K^T`` obeys the law, and no single ``Q_h Q_h^T - K K^T`` does.
    """
    if pair.heads is None:
        return left.mT, right
    heads, key_heads = pair.heads, pair.key_heads or pair.heads
    keys = right.unflatten(0, (key_heads, -1))
    if heads == key_heads:
        return left.unflatten(0, (heads, -1)).mT, keys
    # K's gradient is the sum over the Q_h that share it: stacked, they are one factor A of it.
    queries = left.unflatten(0, (key_heads, heads // key_heads, -1))
    return queries.mT.flatten(1, 2), keys  # (key heads, query heads of each x n, width)


def _packed(matrices: Tensor) -> str:
    """Return the numbers of a tensor as text, to the bit."""
    plain = matrices.detach().to("cpu", torch.float64).contiguous()
    return base64.b64encode(plain.numpy().astype("<f8").tobytes()).decode("ascii")


def _unpacked(shape: list[int], text: str) -> Tensor:
    """Return the tensor of which `_packed` made text."""
    data = bytearray(base64.b64decode(text, validate=True))
    return torch.frombuffer(data, dtype=torch.float64).reshape(shape)
