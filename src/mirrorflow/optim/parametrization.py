r"""Modules with weights x = m * w, and back to plain modules with exact zeros.

At the start ``m = sqrt(A + sqrt(A^2 + x^2))`` and ``w = x / m``: then x is what it was, and
``m^2 - w^2 = 2 A``, the scale at which R_a turns from L2 to L1. Weight decay multiplies it by
``e^{2a}``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

__all__ = ["Folded", "HadamardFactors", "Overparametrized", "fold", "overparametrize"]

Selector = str | type[nn.Module]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class HadamardFactors(nn.Module):
    """The parametrization x = m * w for ``torch.nn.utils.parametrize``.

    Parameters
    ----------
    scale : float
        ``A = |m^2 - w^2| / 2`` of the factors that an assigned x gets, > 0.

    Examples
    --------
    >>> m, w = HadamardFactors(0.5).right_inverse(torch.tensor([0.0, 1.2]))
    >>> m * w, (m**2 - w**2) / 2
    (tensor([0.0000, 1.2000]), tensor([0.5000, 0.5000]))
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be a finite number > 0, got {scale}.")
        self.scale = float(scale)

    def forward(self, m: Tensor, w: Tensor) -> Tensor:
        """Multiply the factors."""
        return m * w

    def right_inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return factors of x with ``m > |w|``, which also resets the geometry of the weight."""
        # m w = x and m^2 - w^2 = 2A: m^4 - 2A m^2 - x^2 = 0.
        m = torch.sqrt(self.scale + torch.hypot(x, x.new_tensor(self.scale)))
        return m, x / m

    def extra_repr(self) -> str:
        """Show the scale."""
        return f"scale={self.scale:g}"


@dataclass(frozen=True)
class Overparametrized:
    """The trainable parameters of a module after `overparametrize`.

    Attributes
    ----------
    names : tuple of str
        The qualified names of the weights that are products now.
    pairs : tuple of (Parameter, Parameter)
        Their factors (m, w), for `MirrorAdam`.
    others : tuple of Parameter
        All other trainable parameters, as biases, for another optimizer.
    """

    names: tuple[str, ...]
    pairs: tuple[tuple[nn.Parameter, nn.Parameter], ...]
    others: tuple[nn.Parameter, ...]


@dataclass(frozen=True)
class Folded:
    """What `fold` has left, by the names of the weights.

    Attributes
    ----------
    sizes, zeros : dict of str to int
        The numbers of weights, and of those that are exactly 0.
    threshold : float
        The largest ``|x|`` that was set to 0; NaN if none was.
    """

    sizes: dict[str, int]
    zeros: dict[str, int]
    threshold: float

    @property
    def sparsity(self) -> float:
        """The fraction of exact zeros in all folded weights."""
        return sum(self.zeros.values()) / sum(self.sizes.values())


def overparametrize(
    module: nn.Module, weights: Selector | Sequence[Selector] = _LAYERS, scale: float = 0.5
) -> Overparametrized:
    r"""Replace weights x of a module by products m * w, with x unchanged.

    The module is changed in place, by ``torch.nn.utils.parametrize``: its state_dict holds
    ``parametrizations.<name>.original0`` (m) and ``original1`` (w). Weights that need no gradient
    are left alone.

    Parameters
    ----------
    module : nn.Module
        Any module with float32 or float64 weights. An optimizer of the weights has to be made anew.
    weights : str, type, or sequence of them
        Which: a pattern of qualified parameter names (``"encoder.*.weight"``, as in `fnmatch`), or
        a type of modules, of which the parameter ``weight`` is meant. By default those of linear
        and convolutional layers.
    scale : float
        A of the start, > 0: x moves as fast as 2 sqrt(x^2 + A^2) times its gradient, and
        regularization acts like L1 on what is larger than A e^{2a}, like L2 on what is smaller. At
        1/2, x = 0 starts with m = 1 and w = 0, and moves as fast as a plain weight.

    Returns
    -------
    Overparametrized

    Raises
    ------
    ValueError, TypeError
        If a pattern, or all types together, match no trainable weight that is not parametrized
        yet, or a weight is tied, uninitialized or of another dtype; the module is unchanged then.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> before = net[0].weight.detach().clone()
    >>> made = overparametrize(net)
    >>> made.names, len(made.pairs), len(made.others)
    (('0.weight', '2.weight'), 2, 2)
    >>> torch.allclose(net[0].weight, before)
    True
    """
    factors = HadamardFactors(scale)
    chosen = _chosen(module, [weights] if isinstance(weights, (str, type)) else list(weights))
    pairs = []
    for owner, name in chosen.values():
        parametrize.register_parametrization(owner, name, HadamardFactors(factors.scale))
        made = owner.get_submodule(f"parametrizations.{name}")
        pairs.append((made.get_parameter("original0"), made.get_parameter("original1")))
    taken = {id(factor) for pair in pairs for factor in pair}
    others = (p for p in module.parameters() if p.requires_grad and id(p) not in taken)
    return Overparametrized(tuple(chosen), tuple(pairs), tuple(others))


def fold(
    module: nn.Module, threshold: float | None = None, sparsity: float | None = None
) -> Folded:
    """Replace the products m * w of a module by plain weights, and set small ones to exactly 0.

    The module is changed in place; all weights that `overparametrize` made products are folded.
    The weights are new parameters: an optimizer for further training has to be made anew.

    Parameters
    ----------
    module : nn.Module
        A module on which `overparametrize` was called.
    threshold : float, optional
        Set weights with ``|x| <= threshold`` to 0.
    sparsity : float, optional
        Set this fraction of all folded weights to 0, in [0, 1]: those of smallest ``|x|``, across
        layers. With neither of the two, weights keep their values.

    Returns
    -------
    Folded

    Raises
    ------
    ValueError
        If there is nothing to fold, both arguments are given or one is out of range, or another
        parametrization acts on the same weight; the module is unchanged then.

    Examples
    --------
    >>> net = nn.Linear(2, 2, bias=False)
    >>> with torch.no_grad():
    ...     _ = net.weight.copy_(torch.tensor([[1.0, 0.1], [-0.2, -3.0]]))
    >>> _ = overparametrize(net)
    >>> done = fold(net, sparsity=0.5)
    >>> net.weight.tolist(), done.zeros, round(done.threshold, 3)
    ([[1.0, 0.0], [0.0, -3.0]], {'weight': 2}, 0.2)
    """
    _check_cut(threshold, sparsity)
    products = _products(module)
    sizes = [getattr(owner, name).abs().detach().cpu() for owner, name in products.values()]
    cuts = _cuts(sizes, threshold, sparsity)
    for (owner, name), cut in zip(products.values(), cuts, strict=True):
        _plain(owner, name, cut)
    left = {key: getattr(owner, name) for key, (owner, name) in products.items()}
    gone = [float(x[cut].max()) for x, cut in zip(sizes, cuts, strict=True) if cut.any()]
    return Folded(
        {key: x.numel() for key, x in left.items()},
        {key: int((x == 0).sum()) for key, x in left.items()},
        max(gone, default=math.nan),
    )


def _chosen(module: nn.Module, selectors: Sequence[Selector]) -> dict[str, tuple[nn.Module, str]]:
    """Return the module and the local name of every chosen weight, by its qualified name."""
    found: dict[str, tuple[nn.Module, str]] = {}
    used: set[Selector] = set()
    for path, owner in module.named_modules():
        if isinstance(owner, parametrize.ParametrizationList):
            continue
        for name, p in owner.named_parameters(recurse=False):
            key = f"{path}.{name}" if path else name
            fits = [s for s in selectors if _fits(s, key, owner, name)]
            if fits and p.requires_grad:
                used.update(fits)
                found[key] = (owner, name)
    unused = [s for s in selectors if isinstance(s, str) and s not in used]
    if unused or not found:
        names = [s if isinstance(s, str) else s.__name__ for s in unused or selectors]
        shown = ", ".join(names)
        raise ValueError(
            f"weights must choose trainable parameters, got {shown!r}, which matches none. "
            "See module.named_parameters() for the names."
        )
    _check_weights(module, found)
    return found


def _fits(selector: Selector, key: str, owner: nn.Module, name: str) -> bool:
    """Return whether a selector means a parameter."""
    if isinstance(selector, str):
        return fnmatchcase(key, selector)
    return isinstance(owner, selector) and name == "weight"


def _check_weights(module: nn.Module, found: dict[str, tuple[nn.Module, str]]) -> None:
    """Raise for the first weight that cannot become a product."""
    owned = (m.named_parameters(recurse=False, remove_duplicate=False) for m in module.modules())
    uses = Counter(id(p) for parameters in owned for _, p in parameters)
    for key, (owner, name) in found.items():
        p = owner.get_parameter(name)
        if isinstance(p, UninitializedParameter):
            raise ValueError(f"{key} must have a shape, got a lazy one. Run the module once first.")
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{key} must be float32 or float64, got {p.dtype}.")
        if uses[id(p)] > 1:
            raise ValueError(f"{key} must not be tied, got {uses[id(p)]} names of it. Untie them.")


def _products(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the module and the local name of every weight that is a product."""
    found = dict(_parametrized(module))
    if not found:
        raise ValueError("module must have weights m * w, got none. Call overparametrize first.")
    return found


def _parametrized(module: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Walk through the weights that are products of two factors."""
    for path, owner in module.named_modules():
        if not parametrize.is_parametrized(owner):
            continue
        for name, maps in owner.get_submodule("parametrizations").named_children():
            key = f"{path}.{name}" if path else name
            kinds = [type(one) for one in maps.children()]
            if kinds == [HadamardFactors]:
                yield key, (owner, name)
            elif HadamardFactors in kinds:
                listed = ", ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"{key} must have one parametrization, got {listed}.")


def _check_cut(threshold: float | None, sparsity: float | None) -> None:
    """Raise unless at most one of the two is given, and in range."""
    if threshold is not None and sparsity is not None:
        raise ValueError(
            f"threshold and sparsity must not both be given, got {threshold} and {sparsity}."
        )
    if threshold is not None and not 0 <= threshold < math.inf:
        raise ValueError(f"threshold must be a finite number >= 0, got {threshold}.")
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be in [0, 1], got {sparsity}.")


def _cuts(sizes: list[Tensor], threshold: float | None, sparsity: float | None) -> list[Tensor]:
    """Return which weights to set to 0, from their absolute values."""
    if sparsity is None:
        return [x <= (-1.0 if threshold is None else threshold) for x in sizes]
    flat = torch.cat([x.flatten() for x in sizes])
    cut = torch.zeros(len(flat), dtype=torch.bool)
    cut[flat.argsort(stable=True)[: round(sparsity * len(flat))]] = True  # ties: the first ones
    parts = cut.split([x.numel() for x in sizes])
    return [part.view(x.shape) for part, x in zip(parts, sizes, strict=True)]


def _plain(owner: nn.Module, name: str, cut: Tensor) -> None:
    """Make a product a plain parameter, trainable if its factors were, with zeros where cut."""
    factors = list(owner.get_submodule(f"parametrizations.{name}").parameters())
    trainable = any(factor.requires_grad for factor in factors)
    factors[0].requires_grad_(True)  # else torch makes a buffer of the weight
    _unshare_class(owner)
    with torch.enable_grad():
        parametrize.remove_parametrizations(owner, name)
    weight = owner.get_parameter(name).requires_grad_(trainable)
    with torch.no_grad():
        weight.masked_fill_(cut.to(weight.device), 0.0)


def _unshare_class(owner: nn.Module) -> None:
    """Give a parametrized module a class of its own, which torch's deepcopy shares with copies.

    The removal of a parametrization deletes a property of the class, and so from every copy.
    """
    cls = type(owner)
    kept = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    owner.__class__ = type(cls.__name__, cls.__bases__, kept)  # pyright: ignore[reportAttributeAccessIssue]
