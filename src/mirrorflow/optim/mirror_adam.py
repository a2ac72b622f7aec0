r"""An adaptive optimizer for x = m * w whose steps are mirror descent steps of R_a.

Per coordinate, with u = m + w and v = m - w, the gradient flow of m * w multiplies u by
e^{dmu + da} and v by e^{-dmu + da}. A step here does the same with finite amounts:

.. math:: u \leftarrow (1 - \eta\lambda) e^{-h} u, \qquad v \leftarrow (1 - \eta\lambda) e^{h} v

so that for every h, whatever minibatch, noise or momentum it comes from,

- :math:`a = \sum \log(1 - \eta\lambda)`, one number for the pair: steps and noise store nothing;
- :math:`\mu = -\sum h` and :math:`x = A_0 e^{2a} \sinh(2\mu + \rho)`, the law of the flow.

Where h is one number of the step times a mean of gradients of f(Zx), mu stays in the row space of
Z, and a run that fits Zx = y ends at argmin R_a, at every step size. A second moment for each
coordinate would leave the row space: the law would hold, and the end would be another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["MirrorAdam", "PairAccount"]

Pair = tuple[Tensor, Tensor]

_DTYPES = (torch.float32, torch.float64)  # in half precision no small decay or step acts
_CACHED = 1 << 16  # numbers of a tensor that are updated together on a CPU, to stay in its cache
_ops: Any = torch  # the _foreach_ functions have no public names


@dataclass(frozen=True)
class PairAccount:
    r"""What a pair has stored: ``x = primal(mu, a)`` of the R of its start.

    Attributes
    ----------
    steps : int
        The number of steps that have moved the pair.
    a : float
        :math:`\sum \log(1 - \eta\lambda) \le 0` over these steps, with the factors that acted:
        rounded to the dtype of the pair.
    mu : Tensor or None
        :math:`-\sum h` per coordinate, if the optimizer keeps it (``keep_mu=True``), else None.
        For the start w0 = (m, w), ``legendre(Hadamard(), WeightDecay(), w0).mirror(m * w, a)`` is
        the same up to rounding.
    """

    steps: int
    a: float
    mu: Tensor | None


class MirrorAdam(Optimizer):
    r"""Train models x = m * w by Adam in the dual variable mu, with one second moment for a pair.

    .. math::
        G &= (w\, g_m + m\, g_w) / (m^2 + w^2), \quad
        M = \beta_1 M + (1 - \beta_1) G, \quad
        s = \beta_2 s + (1 - \beta_2) \tfrac1d |G|^2 \\
        \Delta &= \eta\, \hat M / (\sqrt{\hat s} + \epsilon), \quad
        m + w \leftarrow (1 - \eta\lambda) e^{-\Delta} (m + w), \quad
        m - w \leftarrow (1 - \eta\lambda) e^{\Delta} (m - w)

    G is the gradient in x, recovered from those of the factors, which are w G and m G, and d the
    number of its entries; gradients may therefore be accumulated, averaged over processes, clipped
    by their global norm, or unscaled. After clipping by value the law holds, with another end. The
    hats are Adam's corrections of the bias. ``weight_decay`` is decoupled, as in AdamW, and read
    from the parameter group at each step, as is ``lr``.

    It is a tool of research for diagonal models, not a replacement of AdamW.

    Parameters
    ----------
    pairs : iterable of (Tensor, Tensor), or of dict
        The factors (m, w), leaf tensors of one shape, device and dtype (float32 or float64) for
        each pair. Or parameter groups ``{"params": pairs, "lr": ..., ...}``.
    lr : float
        :math:`\eta \ge 0`, the root mean square over a pair by which a step changes mu, where
        gradients are steady. It does not depend on the scales of the loss and of the weights.
    betas : (float, float)
        :math:`\beta_1, \beta_2` in [0, 1).
    eps : float
        > 0, beside the root mean square of G.
    weight_decay : float
        :math:`\lambda \ge 0`, with :math:`\eta\lambda < 1`.
    keep_mu : bool
        Keep mu, for `account`: one more tensor for each pair.

    Raises
    ------
    ValueError, TypeError
        If an argument or a pair is not as above; in `step`, before anything is changed, if
        :math:`\eta\lambda \ge 1` or only one factor of a pair has a gradient.

    Notes
    -----
    The state is one tensor (M) and one number (s) for a pair, against four tensors of AdamW.

    The end of training is argmin R_a where one pair carries the whole model f(Zx). With several
    pairs the law holds for each of them with its own a and mu, but each runs on a clock of its own.

    A coordinate with m = w = 0 stays there.

    Examples
    --------
    Three data points, twelve weights, one of which is not 0; the decay ends after half of the run.
    The end is the one that `limit` computes:

    >>> import mirrorflow as mf
    >>> Z = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> y = 2 * Z[:, 4]
    >>> w0 = torch.zeros(12, dtype=torch.float64), torch.ones(12, dtype=torch.float64)
    >>> m, w = (f.clone().requires_grad_() for f in w0)
    >>> optimizer = MirrorAdam([(m, w)], lr=0.05, weight_decay=0.2)
    >>> for step in range(800):
    ...     optimizer.param_groups[0].update(lr=0.05 * (1 - step / 800))
    ...     if step == 400:
    ...         optimizer.param_groups[0].update(weight_decay=0.0)
    ...     optimizer.zero_grad()
    ...     (Z @ (m * w) - y).square().mean().backward()
    ...     optimizer.step()
    >>> a = optimizer.account()[0].a
    >>> end = mf.limit(mf.legendre(mf.Hadamard(), mf.WeightDecay(), w0), Z, y, a).value
    >>> round(a, 2), bool((m * w - end).abs().max() < 1e-6)
    (-3.01, True)
    """

    def __init__(
        self,
        pairs: Iterable[Pair] | Iterable[dict[str, Any]],
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        keep_mu: bool = False,
    ) -> None:
        if isinstance(pairs, Tensor):
            raise TypeError("pairs must be a list of (m, w), got a Tensor. Give [(m, w)].")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "keep_mu": keep_mu,
        }
        super().__init__(pairs, defaults)  # pyright: ignore[reportArgumentType]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add pairs with settings of their own; ``params`` is a list of (m, w)."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(
                f"a parameter group must be a dict with 'params', got {param_group!r}. "
                "Write {'params': [(m, w)]}."
            )
        _check_settings({**self.defaults, **param_group})
        flat = [factor for pair in _checked(param_group["params"]) for factor in pair]
        super().add_param_group({**param_group, "params": flat})

    @property
    def pairs(self) -> list[Pair]:
        """The pairs (m, w) of all groups, in the order of `account`."""
        return [pair for group in self.param_groups for pair in _pairs(group)]

    def account(self) -> tuple[PairAccount, ...]:
        """Return what each pair has stored, in the order of `pairs`."""
        return tuple(self._account(m) for m, _ in self.pairs)

    def _account(self, m: Tensor) -> PairAccount:
        """Read the account of one pair from its state."""
        state = self.state.get(m) or {"step": 0, "a": 0.0}
        mu = state.get("mu")
        return PairAccount(state["step"], state["a"], None if mu is None else mu.clone())

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the loss again, with its gradients, and returns it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [_moving(number, group) for number, group in enumerate(self.param_groups)]
        for group, pairs in zip(self.param_groups, moving, strict=True):
            for m, _ in pairs:
                self._begin(m, group)
            for part in _parts(pairs):
                self._update(group, part)
        return loss

    def _begin(self, m: Tensor, group: dict[str, Any]) -> None:
        """Make the state of a pair, which is kept under its first factor."""
        state = self.state[m]
        if not state:
            state |= {"step": 0, "a": 0.0, "exp_avg": torch.zeros_like(m)}
            state["exp_avg_sq"] = m.new_zeros(())
        if group["keep_mu"] and "mu" not in state:
            if state["step"]:
                raise ValueError("keep_mu must be set before the first step, got a step after it.")
            state["mu"] = torch.zeros_like(m)

    def _update(self, group: dict[str, Any], pairs: list[Pair]) -> None:
        """Move some pairs of a group, and enter the step in their accounts."""
        states = [self.state[m] for m, _ in pairs]
        ms, ws = [m for m, _ in pairs], [w for _, w in pairs]
        h = _dual_step(_gradient(ms, ws), states, group)
        if group["keep_mu"]:
            _ops._foreach_sub_([state["mu"] for state in states], h)  # mu = -sum h
        acting = {m.dtype: _decay_factor(group, m.dtype) for m in ms}
        factors = [acting[m.dtype] for m in ms]
        _rotate(ms, ws, h, factors)
        for state, factor in zip(states, factors, strict=True):
            state["a"] += math.log(factor)  # log(1 - lr lambda), nothing for h


def _gradient(ms: list[Tensor], ws: list[Tensor]) -> list[Tensor]:
    r"""Return G = (w g_m + m g_w) / (m^2 + w^2): the terms have one sign, so nothing cancels."""
    # g_m = w G and g_w = m G: w g_m + m g_w = (m^2 + w^2) G.
    G = _ops._foreach_mul([m.grad for m in ms], ws)
    _ops._foreach_addcmul_(G, [w.grad for w in ws], ms)
    squares = _ops._foreach_mul(ms, ms)
    _ops._foreach_addcmul_(squares, ws, ws)
    # At m = w = 0 nothing tells G, and nothing moves: 0 / tiny.
    _ops._foreach_clamp_min_(squares, [torch.finfo(m.dtype).tiny for m in ms])
    _ops._foreach_div_(G, squares)
    return G


def _dual_step(
    G: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
) -> list[Tensor]:
    """Update the moments, and return h = lr M / (sqrt(s) + eps), both corrected for their bias."""
    beta1, beta2 = group["betas"]
    for state in states:
        state["step"] += 1
    M, s = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
    _ops._foreach_lerp_(M, G, 1 - beta1)  # beta1 M + (1 - beta1) G
    means = _ops._foreach_norm(G)
    _ops._foreach_mul_(means, means)
    _ops._foreach_div_(means, [float(max(g.numel(), 1)) for g in G])  # |G|^2 / d
    _ops._foreach_lerp_(s, means, 1 - beta2)  # one number for the whole pair
    # lr / (1 - beta1^t) / (sqrt(s / (1 - beta2^t)) + eps), one number for each pair: h stays in the
    # row space that M is in.
    rates = _ops._foreach_div(s, [1 - beta2 ** state["step"] for state in states])
    _ops._foreach_sqrt_(rates)
    _ops._foreach_add_(rates, group["eps"])
    _ops._foreach_reciprocal_(rates)
    lr = float(group["lr"])
    _ops._foreach_mul_(rates, [lr / (1 - beta1 ** state["step"]) for state in states])
    return _ops._foreach_mul(M, rates)


def _rotate(ms: list[Tensor], ws: list[Tensor], h: list[Tensor], factors: list[float]) -> None:
    """Multiply m + w by c e^{-h} and m - w by c e^h, in place; h is used up.

    In this form a sum or difference that is 0 stays 0, and u v keeps more digits than with
    cosh h and sinh h.
    """
    u, v = _ops._foreach_add(ms, ws), _ops._foreach_sub(ms, ws)
    _ops._foreach_exp_(h)
    _ops._foreach_div_(u, h)
    _ops._foreach_mul_(v, h)
    halves = [0.5 * factor for factor in factors]  # m = (u + v) / 2, w = (u - v) / 2
    _ops._foreach_mul_(u, halves)
    _ops._foreach_mul_(v, halves)
    for m, w, p, q in zip(ms, ws, u, v, strict=True):
        torch.add(p, q, out=m)
        torch.sub(p, q, out=w)


def _decay_factor(group: dict[str, Any], dtype: torch.dtype) -> float:
    """Return 1 - lr weight_decay as it acts, which is rounded to the dtype of the weights."""
    factor = 1 - float(group["lr"]) * float(group["weight_decay"])
    return factor if dtype == torch.float64 else torch.tensor(factor, dtype=dtype).item()


def _pairs(group: dict[str, Any]) -> Iterator[Pair]:
    """Pair the tensors of a group, which torch keeps in one list."""
    return zip(group["params"][::2], group["params"][1::2], strict=True)


def _moving(number: int, group: dict[str, Any]) -> list[Pair]:
    """Return the pairs of a group that have gradients, after a check of what a step needs."""
    shrinks = float(group["lr"]) * float(group["weight_decay"])
    if not shrinks < 1:
        raise ValueError(
            f"lr * weight_decay must be < 1, got {shrinks:g} for group {number}: the step would "
            "flip the signs of the weights. Use a smaller rate."
        )
    moving = []
    for i, (m, w) in enumerate(_pairs(group)):
        if (m.grad is None) != (w.grad is None):
            raise ValueError(
                f"both factors of a pair must have a gradient, got one for pair {i} of group "
                f"{number}. Compute the loss from m * w."
            )
        if m.grad is None or w.grad is None:
            continue
        if m.grad.is_sparse or w.grad.is_sparse:
            raise ValueError(
                f"gradients must be dense, got a sparse one for pair {i} of group {number}."
            )
        moving.append((m, w))
    return moving


def _parts(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """Split pairs so that the temporaries of a CPU stay in its cache."""
    part, size = [], 0
    for pair in pairs:
        part.append(pair)
        size += pair[0].numel() if pair[0].device.type == "cpu" else 0
        if size >= _CACHED:
            yield part
            part, size = [], 0
    if part:
        yield part


def _check_settings(group: dict[str, Any]) -> None:
    """Raise for the first setting of a group that is out of range."""
    for name, low in (("lr", 0.0), ("weight_decay", 0.0), ("eps", 5e-324)):
        value = group[name]
        if not low <= float(value) < math.inf:
            bound = "> 0" if low else ">= 0"
            raise ValueError(f"{name} must be a finite number {bound}, got {value}.")
    betas = tuple(group["betas"])
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}.")


def _checked(pairs: Any) -> list[Pair]:
    """Return the pairs of a group, or raise for the first one that is not a pair of factors."""
    pairs = list(pairs)
    for i, pair in enumerate(pairs):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise TypeError(f"pairs must hold (m, w), got a {type(pair).__name__} at {i}.")
        _check_factors(i, *pair)
    return [(m, w) for m, w in pairs]


def _check_factors(i: int, m: Any, w: Any) -> None:
    """Raise unless m and w are two tensors of the same kind."""
    for factor in (m, w):
        if not isinstance(factor, Tensor):
            raise TypeError(f"pair {i} must hold two tensors, got a {type(factor).__name__}.")
        if factor.dtype not in _DTYPES:
            raise TypeError(
                f"pair {i} must be float32 or float64, got {factor.dtype}. Keep the weights in "
                "float32, and compute in half precision under torch.autocast."
            )
    if m is w:
        raise ValueError(f"pair {i} must hold two tensors, got one of them twice.")
    if (m.shape, m.dtype, m.device) != (w.shape, w.dtype, w.device):
        kinds = " and ".join(f"{tuple(f.shape)} {f.dtype} on {f.device}" for f in (m, w))
        raise ValueError(f"pair {i} must have one shape, dtype and device, got {kinds}.")
