r"""The part of a decay that acts on weights in bfloat16 or float16.

A multiplication ``w <- (1 - s) w``, s = lr x decay, is rounded to the nearest of the weights' own
numbers, which lie ``eps |w| / m`` apart, m in [1, 2) the mantissa. Where it is a step of its own
(AdamW's for-loop and foreach, decay from outside), nothing acts below ``s = eps / 4``, 2^-9 in
bfloat16, since half a gap is not reached; above it the effect depends on m. Where decay and update
are rounded together (fused kernels), the update puts the sum anywhere between two numbers, and the
decay moves it across a boundary with the right probability, unless the update is itself too small.
SGD's L2 is rounded twice: with the gradient, where nothing acts below half a gap of g, and with the
step.
"""

from __future__ import annotations

import bisect
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from .conventions import shrink
from .coupling import OptimizerProbe, known_coupling

__all__ = [
    "HALF",
    "STRAYED",
    "Passed",
    "RoundedSet",
    "RoundingWarning",
    "half",
    "in_memory_order",
    "rounded_fraction",
    "rounds_together",
    "too_weak",
    "warn_if_rounded",
]

HALF = (torch.bfloat16, torch.float16)
STRAYED = 1.1  # the ratio of what acts to what is asked for from which it deserves a word
_GOLDEN = (math.sqrt(5) - 1) / 2
_BLOCKS, _LENGTH = 8, 512  # of entries that are looked at in a step


class RoundingWarning(UserWarning):
    """A decay that the precision of the weights swallows, or changes."""


@dataclass(frozen=True)
class Passed:
    """What rounding lets through in a step.

    Parameters
    ----------
    entered : float
        The part of SGD's L2 that enters its gradient, >= 0; 1 for others.
    reached : float
        The part of what is subtracted from the weights for decay that changes them, >= 0.
    """

    entered: float = 1.0
    reached: float = 1.0

    @property
    def part(self) -> tuple[float, float, float]:
        """Both, and the largest part of an entry: NaN where rounding makes entries differ."""
        most = 1.0 if self.entered == self.reached == 1 else math.nan
        return self.entered, self.reached, most


def half(params: Sequence[torch.Tensor]) -> bool:
    """Return whether a tensor is in half precision.

    Examples
    --------
    >>> half([torch.ones(1)]), half([torch.ones(1), torch.ones(1, dtype=torch.bfloat16)])
    (False, True)
    """
    return any(p.dtype in HALF for p in params)


def too_weak(dtype: torch.dtype) -> float:
    """Return the lr x decay up to which a multiplication in this precision changes nothing.

    Examples
    --------
    >>> too_weak(torch.bfloat16) == 2**-9, too_weak(torch.float16) == 2**-12
    (True, True)
    """
    return torch.finfo(dtype).eps / 4  # half a gap, eps |w| / (2 m), with m below 2


def rounded_fraction(strength: float, dtype: torch.dtype) -> float:
    r"""Return the fraction that weights lose when they are multiplied by ``1 - strength``.

    The mean over all mantissas m, weighted with m^2: ``sum m (m - fl((1 - s) m)) / sum m^2``. It
    holds for weights whose mantissas are equally likely, as before training.

    Parameters
    ----------
    strength : float
        lr x decay, in [0, 1].
    dtype : torch.dtype
        Of the weights.

    Examples
    --------
    >>> [round(rounded_fraction(s, torch.bfloat16), 5) for s in (0.001, 0.003, 0.01)]
    [0.0, 0.00387, 0.00973]
    >>> rounded_fraction(0.001, torch.float32)
    0.001
    """
    if dtype not in HALF:
        return strength
    count = round(1 / torch.finfo(dtype).eps)
    m = (1 + torch.arange(count, dtype=torch.float64) / count).to(dtype)
    return _fraction(m, m * (1 - strength))  # all mantissas of one binade: the others are the same


def _fraction(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return <w, w - w'> / <w, w>."""
    w = before.double()
    # The s for which (1 - s) w is nearest to w'.
    return float((w * (w - after.double())).sum() / (w * w).sum())


def rounds_together(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Return whether decay and update reach the weights with one rounding, as in fused kernels.

    Examples
    --------
    >>> w = [torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
    >>> for fused in (False, True):
    ...     optimizer = torch.optim.AdamW(w, fused=fused)
    ...     print(rounds_together(optimizer, optimizer.param_groups[0]))
    False
    True
    """
    if known_coupling(optimizer, group) is not None:
        return bool(group.get("fused"))
    return OptimizerProbe(optimizer, group).rounds_together()


_ROUNDED = (
    "weights of parameter group {} are in {}: rounding let {:.3g} times the decay that was asked "
    "act in {} steps, and accumulated counts that. Keep the weights that the optimizer steps in "
    'float32, or use decoupled=True, rounding="stochastic", or a larger lr x decay'
)
_LOOKS = (3, 30, 300, 3000)  # steps after which the ledger is compared with what was asked


def warn_if_rounded(params: Sequence[torch.Tensor], part: float, steps: int, index: int) -> bool:
    """Warn where rounding swallows decay, or adds to it, and return whether it does.

    Parameters
    ----------
    params : sequence of Tensor
        Those of a set.
    part : float
        The part of the decay that acted; NaN where it is not known.
    steps : int
        The number of steps taken; few of them are looked at.
    index : int
        The place of their group.
    """
    if steps not in _LOOKS or math.isnan(part) or 1 / STRAYED <= part <= STRAYED:
        return False
    dtypes = {str(p.dtype).removeprefix("torch.") for p in params if p.dtype in HALF}
    text = _ROUNDED.format(index, ", ".join(sorted(dtypes)), part, steps)
    warnings.warn(text, RoundingWarning, stacklevel=5)
    return True


class RoundedSet:
    """The tensors in half precision of one set, of which a few entries are tried before each step.

    Blocks of neighbours are taken at places that wander through all tensors from step to step, a
    tensor as often as it has entries, so that a run resumed at a step looks where the first did.

    Parameters
    ----------
    coupling : str
        How the decay acts, one of ``coupling.COUNTED``.
    outside : bool
        Whether it comes from outside, with a rounding of its own.
    optimizer : torch.optim.Optimizer
        Whose step is tried on the blocks where decay and update are rounded together.
    index : int
        The place of the group in the optimizer.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.full((64,), 1.5, dtype=torch.bfloat16))
    >>> w.grad = torch.zeros_like(w)
    >>> optimizer = torch.optim.AdamW([w], lr=0.5)
    >>> tried = RoundedSet("decoupled", False, optimizer, index=0)
    >>> tried.passed([w], decay=0.005, lr=0.5, step=0).reached  # 1.5 x 0.9975 is rounded to 1.5
    0.0
    """

    def __init__(self, coupling: str, outside: bool, optimizer: Optimizer, index: int) -> None:
        self._coupling, self._outside = coupling, outside
        self._optimizer, self._index = optimizer, index
        self._together = not outside and rounds_together(optimizer, self._group)

    @property
    def _group(self) -> Mapping[str, Any]:
        """The live group, which a load replaces."""
        return self._optimizer.param_groups[self._index]

    @torch.no_grad()
    def passed(
        self,
        params: Sequence[torch.Tensor],
        decay: float,
        lr: float,
        step: int,
        held: float | None = None,
    ) -> Passed:
        """Return what rounding will let through in a step.

        Parameters
        ----------
        params : sequence of Tensor
            Those that the step moves.
        decay, lr : float
            The number of the decay, and the learning rate.
        step : int
            By which the blocks are placed.
        held : float, optional
            The coefficient of decay in SGD's buffer, before the step.
        """
        strength = decay if self._coupling == "fixed" else lr * decay
        rounded = [p for p in params if p.dtype in HALF]
        if not rounded or not (strength or lr * (held or 0.0)):
            return Passed()
        if any(map(_elsewhere, rounded)):
            return self._expected(rounded, strength)
        found = self._tried(_blocks(self._optimizer, rounded, step), decay, lr, held)
        if len(rounded) == len(params):
            return found
        # What is not in half precision decays in full: 1 + share (part - 1) in the mean.
        share = sum(p.numel() for p in rounded) / sum(p.numel() for p in params)
        entered, reached = (1 + share * (part - 1) for part in (found.entered, found.reached))
        return Passed(entered, reached)

    def _expected(self, params: Sequence[torch.Tensor], strength: float) -> Passed:
        """Return what is known in advance: of sharded weights each process sees other entries."""
        if self._together or self._coupling == "sgd":
            return Passed()
        # For mantissas that are equally likely, in all processes alike.
        return Passed(reached=rounded_fraction(strength, params[0].dtype) / strength)

    def _tried(
        self, blocks: Sequence[Block], decay: float, lr: float, held: float | None
    ) -> Passed:
        """Return what rounding will do to the decay of the blocks."""
        if not blocks:
            return Passed()
        if self._together:
            return self._of_step(blocks, decay, lr)
        if self._coupling == "sgd":
            return self._of_gradient(blocks, decay, lr, held)
        strength = decay if self._coupling == "fixed" else lr * decay
        return Passed(reached=self._of_product(blocks, strength))

    def _of_product(self, blocks: Sequence[Block], strength: float) -> float:
        """Return the part that acts of a multiplication, tried as the optimizer does it."""
        before = [block.weights for block in blocks]
        after = [w.clone() for w in before]
        if self._outside:
            shrink(after, 1 - strength)
        elif self._group.get("foreach"):  # on a CPU it rounds the factor as well
            torch._foreach_mul_(after, 1 - strength)  # pyright: ignore[reportPrivateImportUsage]
        else:
            for w in after:
                w.mul_(1 - strength)
        return _or_whole(_mean_fraction(blocks, _changes(before, after)) / strength)

    # SGD: L2 is rounded with the gradient, and once more with the step

    def _of_gradient(
        self, blocks: Sequence[Block], decay: float, lr: float, held: float | None
    ) -> Passed:
        """Return the parts that enter the gradient, and reach the weights."""
        sign = -1 if self._group.get("maximize") else 1
        momentum = float(self._group["momentum"])
        passes, nesterov = 1.0 - float(self._group["dampening"]), self._group["nesterov"]
        entering, steps, pulls = [], [], []
        for block in blocks:
            w, plain = block.weights, sign * block.gradient
            step = plain.add(w, alpha=decay)
            # fl(g + decay w) - g: the step subtracts lr times it, and times what the buffer holds
            pull = entered = step.float() - plain.float()
            buffer = block.state.get("momentum_buffer") if momentum else None
            if buffer is not None:
                moved = block.cut(buffer).mul(momentum).add_(step, alpha=passes)
                # m c w is what the buffer holds of decay, w having hardly moved since.
                pull = momentum * (held or 0.0) * w.float() + passes * entered
            else:
                moved = step
            if nesterov:
                moved, pull = step.add(moved, alpha=momentum), entered + momentum * pull
            entering.append(entered)
            steps.append(moved)
            pulls.append(pull)
        part = _mean_fraction(blocks, entering) / decay if decay else 1.0
        whole = momentum * (held or 0.0) + decay  # the coefficient that the step subtracts lr times
        return Passed(_or_whole(part), _or_whole(_reached(blocks, steps, pulls, lr, whole)))

    # Fused kernels: decay and update are rounded together

    def _of_step(self, blocks: Sequence[Block], decay: float, lr: float) -> Passed:
        """Return the part that acts in a step of a twin on the blocks, with decay and without.

        A weak decay moves few entries across a boundary, in proportion to its strength: a
        stronger one is tried in its place, still far below a gap.
        """
        rate = 1.0 if self._coupling == "fixed" else lr
        tried = max(decay, _least(blocks) / rate)  # a gap / 32: still in proportion
        try:
            free, pulled = (self._stepped(blocks, number) for number in (0.0, tried))
        except Exception:
            # Any class may be tried on a part of its state; what acts is not known then.
            return Passed(reached=math.nan)
        part = _mean_fraction(blocks, _changes(free, pulled)) / (rate * tried)
        return Passed(reached=_or_whole(part) / self._at_once(blocks))

    def _at_once(self, blocks: Sequence[Block]) -> float:
        """Return the part of SGD's L2 that reaches the weights in its own step."""
        momentum = float(self._group.get("momentum", 0)) if self._coupling == "sgd" else 0.0
        if not momentum:
            return 1.0
        fresh = blocks[0].state.get("momentum_buffer") is None
        passes = 1.0 if fresh else 1.0 - float(self._group["dampening"])
        # Of c <- m c + passes decay a step takes c, with Nesterov decay + m c.
        return (1 + momentum * passes) if self._group["nesterov"] else passes or math.nan

    def _stepped(self, blocks: Sequence[Block], decay: float) -> list[torch.Tensor]:
        """Return the weights of the blocks after a step with a decay."""
        scale = getattr(self._optimizer, "grad_scale", None)
        twin = OptimizerProbe(self._optimizer, self._group).twin_of(
            [block.copy(scale) for block in blocks], decay
        )
        twin.step()
        return [p.detach() for p in twin.param_groups[0]["params"]]


@dataclass(frozen=True)
class Block:
    """Neighbouring entries of a tensor, with their gradient and the optimizer's state of them.

    Parameters
    ----------
    param : Tensor
        The tensor.
    state : mapping
        The optimizer's state of it.
    start, length : int
        Where the entries lie, in the order of the weights' memory.
    share : float
        The weight of the block in a mean.
    """

    param: torch.Tensor
    state: Mapping[str, Any]
    start: int
    length: int
    share: float

    @property
    def weights(self) -> torch.Tensor:
        """The entries, a view."""
        return self.cut(self.param.detach())

    @property
    def gradient(self) -> torch.Tensor:
        """Their gradient, a view."""
        assert self.param.grad is not None
        return self.cut(self.param.grad)

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the entries of a tensor in the shape of the weights."""
        flat = in_memory_order(tensor, self.param).reshape(-1)
        return flat[self.start : self.start + self.length]

    def copy(self, scale: Any) -> tuple[torch.nn.Parameter, dict[str, Any]]:
        """Return a parameter of the entries, with their gradient, and a copy of their state."""
        param = torch.nn.Parameter(self.weights.clone(), requires_grad=False)
        if self.param.grad is not None:
            grad = self.gradient if scale is None else self.gradient / scale
            param.grad = grad.to(param.dtype, copy=True)
        return param, {key: self._part(value) for key, value in self.state.items()}

    def _part(self, value: Any) -> Any:
        """Return the part of a state that belongs to the entries."""
        if not isinstance(value, torch.Tensor):
            return value
        if value.shape == self.param.shape and value.dim():
            return self.cut(value).clone()
        if value.numel() > 1:
            raise ValueError("the state must be a number or one for each entry")
        return value.clone()


def in_memory_order(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a view whose axes are in the order in which those of ``like`` lie in memory."""
    if like.is_contiguous():
        return tensor
    strides = like.stride()
    return tensor.permute(sorted(range(like.dim()), key=lambda axis: -strides[axis]))


def _elsewhere(p: torch.Tensor) -> bool:
    """Return whether entries of a tensor lie in other processes, or nowhere."""
    return p.is_meta or hasattr(p, "to_local") or getattr(p, "_is_flat_param", False)


def _blocks(optimizer: Optimizer, params: Sequence[torch.Tensor], step: int) -> list[Block]:
    """Return blocks at places that depend on the step, or all of what is small."""
    sizes = [p.numel() for p in params]
    total = sum(sizes)
    if total <= _BLOCKS * _LENGTH and len(params) <= 2 * _BLOCKS:
        return [
            Block(p, optimizer.state.get(p, {}), 0, n, float(n))
            for p, n in zip(params, sizes, strict=True)
            if n
        ]
    ends, found = list(itertools.accumulate(sizes)), []
    for i in range(_BLOCKS):
        # Multiples of the golden ratio modulo 1 leave no place out for long, whatever the step.
        place = int((i + step * _GOLDEN % 1) / _BLOCKS * total)
        index = bisect.bisect_right(ends, place)
        p, size = params[index], sizes[index]
        start = max(0, min(place - (ends[index] - size), size - _LENGTH))
        found.append(Block(p, optimizer.state.get(p, {}), start, min(size, _LENGTH), 1.0))
    return found


def _mean_fraction(blocks: Sequence[Block], changes: Sequence[torch.Tensor]) -> float:
    """Return the mean over blocks of <w, change> / <w, w>; NaN where all w are 0."""
    parts = []
    for block, change in zip(blocks, changes, strict=True):
        w = block.weights.float()
        parts += [w @ change, w @ w]
    numbers = torch.stack(parts).tolist()  # waits for the device
    pairs = zip(blocks, numbers[::2], numbers[1::2], strict=True)
    known = [(b.share, taken / square) for b, taken, square in pairs if square > 0]
    share = sum(share for share, _ in known)
    return sum(share * part for share, part in known) / share if share else math.nan


def _changes(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return what is taken from each block."""
    return [one.float() - other.float() for one, other in zip(before, after, strict=True)]


def _least(blocks: Sequence[Block]) -> float:
    """Return the strength of a decay that is tried in the place of weaker ones."""
    return max(torch.finfo(block.param.dtype).eps for block in blocks) / 32


def _reached(
    blocks: Sequence[Block],
    steps: Sequence[torch.Tensor],
    pulls: Sequence[torch.Tensor],
    lr: float,
    whole: float,
) -> float:
    """Return the part of the decay in SGD's steps that is left when lr x step is rounded.

    Few entries are so near a boundary that a weak decay moves them across it: a stronger one is
    tried in its place, since their number grows in proportion.
    """
    strength = lr * _mean_fraction(blocks, pulls)
    if not strength > 0:
        return math.nan
    # lr c at least a gap / 32, as in `_of_step`.
    times = max(1.0, _least(blocks) / (lr * whole))
    free, pulled = [], []
    for block, step, pull in zip(blocks, steps, pulls, strict=True):
        end = block.weights.float() - lr * step.float() + lr * pull  # of a step without decay
        free.append(end.to(block.param.dtype))
        pulled.append((end - times * lr * pull).to(block.param.dtype))
    return _mean_fraction(blocks, _changes(free, pulled)) / (times * strength)


def _or_whole(part: float) -> float:
    """Return the part, or 1 where weights of 0, or not finite, have none."""
    return part if math.isfinite(part) else 1.0
