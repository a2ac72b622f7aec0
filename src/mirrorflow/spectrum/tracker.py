"""`SpectralTracker`: the spectra of a model's products while it trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .finding import find
from .measurement import measure
from .pairs import Adapter, Factor, Pair, checked, choose, clean, named, nothing_found
from .product import unreadable
from .records import Measurement

__all__ = ["SpectralTracker"]

COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
READABLE = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "head_size")


class SpectralTracker:
    r"""Find the products A B in a model and measure their spectra, as often as you like.

    It finds LoRA updates (PEFT, on Linear, Conv1D and Embedding layers, all adapters) and the
    products W_Q^T W_K of attention layers (GPT-2, Llama, Qwen, Mistral, BERT, ViT, T5, Phi-3,
    DistilBERT, ModernBERT, ``nn.MultiheadAttention``, timm), and says in ``pairs`` what it found.
    It never writes to the model and keeps no copy of it. On sharded weights (FSDP2, tensor
    parallel) ``measure`` has to be called on every rank.

    Parameters
    ----------
    model : torch.nn.Module
        Compiled, wrapped and sharded ones too.
    level : {"layer", "head"}
        Attention as W_Q^T W_K over the whole width, as the paper measures it, or head by head,
        which is faster by far and is what the model computes with.
    pairs : mapping of str to (str, str), optional
        Further products by name: two weights A and B as they are stored, with ``.T`` appended to
        transpose one, as in ``{"mlp": ("mlp.fc2.weight", "mlp.fc1.weight")}``.
    match : str, optional
        A regular expression that a found pair's name or kind has to contain.
    frozen : bool
        Track pairs that do not train, too. By default only those with a weight that requires a
        gradient are: with LoRA, its updates and not the attention below them.

    Attributes
    ----------
    pairs : tuple of Pair
        What is measured.
    frozen : tuple of Pair
        What is not, because it does not train.
    skipped : tuple of (str, str)
        What looks like a factor and is not measured, with the reason.

    Raises
    ------
    ValueError
        If there is nothing to measure.

    Examples
    --------
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> tracker = SpectralTracker(torch.nn.TransformerEncoderLayer(16, 4), level="head")
    >>> print(tracker)
    SpectralTracker: 1 pair
      self_attn: attention, 16 x 16 x 16, 4 heads
    >>> measured = tracker.measure()
    >>> len(measured.records), 1 < measured.mean_ratio < 2
    (4, True)
    """

    def __init__(
        self,
        model: Module,
        *,
        level: str = "layer",
        pairs: Mapping[str, tuple[str, str]] | None = None,
        match: str | None = None,
        frozen: bool = False,
    ) -> None:
        self.level = checked(level)
        self._places = _places(model)
        shapes = {key: tuple(self._weight(key).shape) for key in self._places}
        found = choose(find(shapes, _Modules(model)), level, match)
        chosen, skipped, still = [], list(found.skipped), []
        for pair in found.pairs:
            if self._quantized(pair):
                skipped.append((pair.label, "quantized"))
            else:
                (chosen if frozen or self._trains(pair) else still).append(pair)
        self.pairs: tuple[Pair, ...] = (*chosen, *named(pairs or {}, shapes))
        self.frozen: tuple[Pair, ...] = tuple(still)
        self.skipped: tuple[tuple[str, str], ...] = tuple(skipped)
        if not self.pairs:
            reasons = (*skipped, *((pair.label, "frozen: pass frozen=True") for pair in still))
            raise ValueError(nothing_found(type(model).__name__, reasons, "SpectralTracker"))

    def measure(self) -> Measurement:
        """Measure every pair now.

        Weights with NaN or infinite entries do not stop a run: their records have the status "not
        finite" and stay out of the means, as do products that are 0.

        Raises
        ------
        ValueError
            If a weight has no data: on the meta device, or put elsewhere by ZeRO-3 or FSDP1.
        """
        return Measurement(measure(self.pairs, self._load, self.level), self.skipped)

    def __repr__(self) -> str:
        """List what was found."""
        count = f"{len(self.pairs)} pair" + "s" * (len(self.pairs) != 1)
        lines = [f"SpectralTracker: {count}", *(f"  {describe(pair)}" for pair in self.pairs)]
        lines += [f"  not {name}: {reason}" for name, reason in self.skipped]
        if self.frozen:
            lines.append(f"  not {len(self.frozen)} frozen (frozen=True measures them)")
        return "\n".join(lines)

    def _weight(self, key: str) -> Tensor:
        """Give a weight as it is now: training tools replace parameters."""
        module, attribute = self._places[key]
        return getattr(module, attribute)

    def _trains(self, pair: Pair) -> bool:
        return any(self._weight(factor.key).requires_grad for factor in (pair.left, pair.right))

    def _quantized(self, pair: Pair) -> bool:
        types = {self._weight(factor.key).dtype for factor in (pair.left, pair.right)}
        return not types <= READABLE

    def _load(self, factor: Factor) -> Tensor:
        """Give the rows of a factor."""
        weight = self._weight(factor.key).detach()
        if trouble := unreadable(weight):
            raise ValueError(f"SpectralTracker: {factor.key} {trouble}")
        if weight.numel() == 0:
            raise ValueError(
                f"SpectralTracker: {factor.key} is empty here: gather it first (DeepSpeed ZeRO-3: "
                "deepspeed.zero.GatheredParameters)"
            )
        return factor.rows(weight)


def describe(pair: Pair) -> str:
    """Describe a pair in a line."""
    parts = [pair.kind, " x ".join(map(str, pair.shape))]
    if pair.heads:
        parts.append(f"{pair.heads} heads")
    if pair.scale != 1:
        parts.append(f"scale {pair.scale:.4g}")
    return f"{pair.label}: {', '.join((*parts, *pair.notes))}"


def _places(model: Module) -> dict[str, tuple[Module, str]]:
    """Find the module and attribute of each weight, by its cleaned name."""
    places = {}
    for name, _ in model.named_parameters():
        path, _, attribute = name.rpartition(".")
        places[_name(name, model)] = (model.get_submodule(path), attribute)
    return places


def _name(name: str, model: Module) -> str:
    """Clean a name, of the prefix of DistributedDataParallel too."""
    wrapped = type(model).__name__ in ("DataParallel", "DistributedDataParallel")
    return clean(name.removeprefix("module.") if wrapped else name)


class _Modules:
    """The facts that modules know. Wrappers share the cleaned name of what they wrap."""

    def __init__(self, model: Module) -> None:
        self._modules: dict[str, list[Module]] = {}
        for name, module in model.named_modules():
            key = _name(f"{name}.", model).removesuffix(".")
            self._modules.setdefault(key, []).append(module)

    def heads(self, module: str) -> tuple[int | None, int | None]:
        """Read the number of heads and their width from the attention module, or its config."""
        modules = self._modules.get(module, [])
        owners = (*modules, *(getattr(module, "config", None) for module in modules))
        return _first(owners, COUNTS), _first(owners, WIDTHS)

    def architecture(self) -> str:
        """Read the model_type of the outermost module that has a configuration."""
        every = (module for modules in self._modules.values() for module in modules)
        kinds = (getattr(getattr(module, "config", None), "model_type", "") for module in every)
        return next((kind for kind in kinds if kind), "")

    def adapter(self, module: str, name: str, rank: int) -> Adapter:
        """Read the scale from PEFT's layer; a LoRA of another make has no scale that is known."""
        layers = [m for m in self._modules[module] if isinstance(getattr(m, "scaling", None), dict)]
        scales: dict[str, Any] = getattr(layers[0], "scaling", {}) if layers else {}
        if name not in scales:
            return Adapter(1.0, ("its scale is unknown, taken as 1",))
        layer = layers[0]
        if type(layer).__name__ == "ParamWrapper" and getattr(layer, "num_experts", 1) > 1:
            return Adapter(1.0, skip="LoRA on stacked experts is not one product")
        active = getattr(layer, "active_adapters", [name])
        notes = () if name in active else ("not active",)
        return Adapter(float(scales[name]), notes)


def _first(owners: Iterable[Any], attributes: Iterable[str]) -> int | None:
    """Give the first attribute that is a positive integer."""
    for owner in owners:
        for attribute in attributes:
            value = getattr(owner, attribute, None)
            if isinstance(value, int) and value > 0:
                return value
    return None
