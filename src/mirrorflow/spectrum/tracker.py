"""`SpectralTracker`: the spectra of a model's products while it trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module

from ._attention import normalizations
from ._configuration import start_notes
from ._discovery import find
from ._measurement import measure
from ._shards import Rows, is_sharded
from .account import ProductAccount, by_key_head
from .pairs import (
    APART,
    MERGED,
    Adapter,
    Factor,
    Named,
    NothingToMeasure,
    Pair,
    checked,
    choose,
    clean,
    named,
)
from .product import unreadable
from .records import Measurement

__all__ = ["SpectralTracker"]

COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
READABLE = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
WIDTHS = (
    *("head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "head_size", "key_dim"),
)


class SpectralTracker:
    r"""Find the products A B in a model and measure their spectra, as often as you like.

    It finds LoRA updates (PEFT, on Linear, Conv1D and Embedding layers, all adapters) and the
    products W_Q^T W_K of attention layers (GPT-2, Llama, Qwen, Mistral, BERT, ViT, T5, Phi-3,
    DistilBERT, ModernBERT, ``nn.MultiheadAttention``, timm), and says in ``pairs`` what it found.
    It never writes to the model and keeps no copy of it. What it has found stays the same: after
    adding an adapter, make a new one. On sharded weights (FSDP2, tensor parallel) ``measure`` has
    to be called on every rank.

    Where rotary embeddings turn Q and K, the scores are ``x_i^T W_Q^T R_{i-j} W_K x_j``. What is
    measured is their content part, R = 1: the scores of a token with itself. Biases are left out.

    Parameters
    ----------
    model : torch.nn.Module
        Compiled, wrapped and sharded ones too.
    level : {"layer", "head"}
        Attention as W_Q^T W_K over the whole width, as the paper measures it, or head by head,
        which is faster by far and is what the model computes with.
    pairs : mapping of str to (str, str) or (str, str, int), optional
        Further products by name: two weights A and B as they are stored, with ``.T`` appended to
        transpose one, as in ``{"mlp": ("mlp.fc2.weight", "mlp.fc1.weight")}``. ``[start:stop]``
        takes a part of the inner dimension, and a third entry divides it into heads: of a fused
        weight of [Q, K, V], ``{"a": ("qkv.weight[:64].T", "qkv.weight[64:128]", 4)}``.
    match : str, optional
        A regular expression that a found pair's name or kind has to contain.
    frozen : bool
        Also track pairs that do not train. By default only those with a weight that requires a
        gradient are: with LoRA, its updates and not the attention below them.
    values : bool
        Track W_O W_V of attention, too: what a head writes of what it reads. Kind "value-output".

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
        If there is nothing to measure, `match` is not a regular expression, or a named pair is
        none.
    TypeError
        If `model` is not a module, or `pairs` not a mapping.

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
        pairs: Named | None = None,
        match: str | None = None,
        frozen: bool = False,
        values: bool = False,
    ) -> None:
        self.level = checked(level)
        if not isinstance(model, Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {type(model).__name__}. Pass the model "
                "whose products train"
            )
        self._model, self._places = model, _places(model)
        self._modules = _Modules(model)
        shapes = {key: tuple(self.weight(key).shape) for key in self._places}
        found = choose(find(shapes, self._modules, values), level, match)
        chosen, skipped, still = [], list(found.skipped), []
        for pair in found.pairs:
            if self._quantized(pair):
                skipped.append((pair.label, "quantized"))
            else:
                (chosen if frozen or self._trains(pair) else still).append(pair)
        self.pairs: tuple[Pair, ...] = (*chosen, *named(pairs, shapes))
        self.frozen: tuple[Pair, ...] = tuple(still)
        self.skipped: tuple[tuple[str, str], ...] = tuple(skipped)
        self._links = self._linked()
        if not self.pairs:
            reasons = (*skipped, *((pair.label, "frozen: pass frozen=True") for pair in still))
            reasons += self._elsewhere()
            raise NothingToMeasure(type(model).__name__, reasons, "SpectralTracker")

    def _elsewhere(self) -> tuple[tuple[str, str], ...]:
        """Return a weight that ZeRO-3 has divided, with what to do."""
        weights = ((key, self.weight(key)) for key in self._places)
        away = [key for key, weight in weights if hasattr(weight, "ds_shape") and not len(weight)]
        what = (
            "ZeRO-3 has divided the weights between processes: make the tracker, and measure, "
            "within deepspeed.zero.GatheredParameters(list(model.parameters()))"
        )
        return tuple((key, what) for key in away[:1])

    def measure(self) -> Measurement:
        """Measure every pair now.

        Weights with NaN or infinite entries do not stop a run: their records have the status "not
        finite" and stay out of the means, as do products that are 0.

        Raises
        ------
        ValueError
            If a weight has no data: on the meta device, or put elsewhere by ZeRO-3 or FSDP1; or if
            it has left the model, as after PEFT's ``merge_and_unload`` and ``delete_adapter``.
        """
        if any(parent._modules.get(name) is not child for parent, name, child in self._links):
            self._links = self._linked()  # or it raises
        pairs = [self._now(pair) for pair in self.pairs]
        return Measurement(measure(pairs, self._load, self.level), self.skipped)

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """Return the factors A (..., n, r) and B (..., r, m) of each pair as they are now, views.

        Attention whose heads are known is divided into them, whatever the level: the loss depends
        on each head's product, so that D of a head has a law. Query heads that share a key head
        stand above each other in one A, of which that is true likewise. Sharded weights stay so,
        as DTensors, unless shards cut heads, or a factor is a part of its weight: these are
        gathered. Every process has to call then.

        Raises
        ------
        ValueError
            If a weight has no data here.
        """
        return [
            by_key_head(
                pair,
                self._load_whole(pair.left, pair.heads),
                self._load_whole(pair.right, pair.key_heads),
            )
            for pair in self.pairs
        ]

    def account(self, *, each_step: bool = True) -> ProductAccount:
        """Begin the exact account of D = A^T A - B B^T of each pair, from the weights as they are.

        Parameters
        ----------
        each_step : bool
            Keep a copy of the factors, which splits each step into decay, optimizer, and step and
            noise. Without it only r x r matrices are kept, and every call is an interval.

        Examples
        --------
        >>> attention = torch.nn.MultiheadAttention(8, 2)
        >>> account = SpectralTracker(attention).account()
        >>> with torch.no_grad():
        ...     _ = attention.in_proj_weight.mul_(0.9)  # a step that is all decay
        >>> account.step(0.9)
        >>> [round(x, 6) for x in account.report()["attention"].fraction_left.tolist()]
        [0.81, 0.81]
        """
        return ProductAccount(self, each_step)

    def __repr__(self) -> str:
        """List what was found."""
        count = f"{len(self.pairs)} pair" + "s" * (len(self.pairs) != 1)
        lines = [
            f"SpectralTracker: {count}",
            *(f"  {describe(self._now(pair))}" for pair in self.pairs),
        ]
        lines += [f"  not {name}: {reason}" for name, reason in self.skipped]
        if self.frozen:
            lines.append(f"  not {len(self.frozen)} frozen (frozen=True measures them)")
        return "\n".join(lines)

    def weight(self, key: str) -> Tensor:
        """Return a weight as it is now: training tools replace parameters."""
        module, attribute = self._places[key]
        return getattr(module, attribute)

    def _linked(self) -> list[tuple[Module, str, Module]]:
        """Return the ways from the model to the weights: parents, names and children.

        Raises
        ------
        ValueError
            If there is none to a weight any more.
        """
        paths = {id(module): path for path, module in self._model.named_modules()}
        links: dict[tuple[int, str], tuple[Module, str, Module]] = {}
        for key in (factor.key for pair in self.pairs for factor in (pair.left, pair.right)):
            path = paths.get(id(self._places[key][0]))
            if path is None:
                raise ValueError(
                    f"SpectralTracker: {key} must still be in the model, got a model without it "
                    "(merged, unloaded or deleted?). Make a new tracker"
                )
            parent = self._model
            for name in path.split(".") if path else ():
                child = parent._modules[name]
                assert child is not None
                links[id(parent), name] = parent, name, child
                parent = child
        return list(links.values())

    def _now(self, pair: Pair) -> Pair:
        """Read an adapter's scale again, whether it is active, and merged: all may have changed."""
        if APART in pair.notes and self._modules.merged(pair.holders):
            return replace(pair, notes=tuple(MERGED if n == APART else n for n in pair.notes))
        if pair.kind != "lora":
            return pair
        known = self._modules.adapter(pair.name, pair.adapter, pair.shape[1])
        if self._modules.active(pair.name, pair.adapter):
            return replace(pair, scale=known.scale)
        return replace(pair, scale=known.scale, notes=("not active", *pair.notes))

    def _trains(self, pair: Pair) -> bool:
        return any(self.weight(factor.key).requires_grad for factor in (pair.left, pair.right))

    def _quantized(self, pair: Pair) -> bool:
        types = {self.weight(factor.key).dtype for factor in (pair.left, pair.right)}
        return not types <= READABLE

    def _load(self, factor: Factor) -> Tensor | Rows:
        """Return the rows of a factor."""
        return factor.rows(self._readable(factor))

    def _load_whole(self, factor: Factor, heads: int | None) -> Tensor:
        """Return the rows of a factor as one tensor, of a sharded weight as a DTensor."""
        weight = self._readable(factor)
        if is_sharded(weight):
            return factor.sharded_rows(weight, heads or 1)
        return cast(Tensor, factor.rows(weight))

    def _readable(self, factor: Factor) -> Tensor:
        """Return the weight of a factor, if it has data here."""
        weight = self.weight(factor.key).detach()
        if trouble := unreadable(weight):
            raise ValueError(f"SpectralTracker: {factor.key} {trouble}")
        if weight.numel() == 0:
            raise ValueError(
                f"SpectralTracker: {factor.key} must have its entries here, got none. Gather it "
                "first (DeepSpeed ZeRO-3: deepspeed.zero.GatheredParameters)"
            )
        return weight


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

    def architecture(self, module: str) -> str:
        """Read the model_type of the nearest module around that has a configuration."""
        while True:
            for candidate in self._modules.get(module, ()):
                if kind := getattr(getattr(candidate, "config", None), "model_type", ""):
                    return kind
            if not module:
                return ""
            module = module.rpartition(".")[0]

    def order(self, module: str) -> str:
        """Read timm's head_first; key_dim and val_dim are those of TinyViT and EfficientFormer."""
        for candidate in self._modules.get(module, ()):
            if getattr(candidate, "head_first", False):
                return "heads"
            if hasattr(candidate, "key_dim") and hasattr(candidate, "val_dim"):
                return "heads"
        return "blocks"

    def normalized(self, module: str) -> bool:
        """Whether there is a normalization of Q: some have no weights."""
        norms = [
            getattr(m, n, None) for m in self._modules.get(module, ()) for n in normalizations()
        ]
        return any(isinstance(n, Module) and not isinstance(n, torch.nn.Identity) for n in norms)

    def adapter(self, module: str, name: str, rank: int, alphas: Sequence[str] = ()) -> Adapter:
        """Read the scale from PEFT's layer, or kohya's; others have none that is known."""
        for layer in self._modules.get(module, ()):
            scales = getattr(layer, "scaling", None)
            if isinstance(scales, dict) and name in scales:
                if type(layer).__name__ == "ParamWrapper" and getattr(layer, "num_experts", 1) > 1:
                    return Adapter(1.0, skip="LoRA on stacked experts is not one product")
                return Adapter(float(scales[name]), self._start(name))
            if hasattr(layer, "lora_down") and (alpha := getattr(layer, "alpha", None)) is not None:
                return Adapter(float(alpha) / rank)
        return Adapter(1.0, ("its scale is unknown, taken as 1",))

    def _start(self, name: str) -> tuple[str, ...]:
        """Note on an adapter that begins at a part of the base weights."""
        configs = (getattr(m, "peft_config", None) for m in self._modules.get("", ()))
        found = (c.get(name) for c in configs if isinstance(c, dict))
        return start_notes([getattr(config, "init_lora_weights", None) for config in found])

    def merged(self, modules: Iterable[str]) -> bool:
        """Whether PEFT has added updates to the weights of one of the modules."""
        layers = (layer for module in modules for layer in self._modules.get(module, ()))
        return any(getattr(layer, "merged", False) for layer in layers)

    def active(self, module: str, name: str) -> bool:
        """Whether PEFT adds an adapter's update."""
        layers: list[Any] = [
            m for m in self._modules.get(module, ()) if hasattr(m, "active_adapters")
        ]
        return all(
            name in layer.active_adapters and not getattr(layer, "disable_adapters", False)
            for layer in layers
        )


def _first(owners: Iterable[Any], attributes: Iterable[str]) -> int | None:
    """Return the first attribute that is a positive integer."""
    for owner in owners:
        for attribute in attributes:
            value = getattr(owner, attribute, None)
            if isinstance(value, int) and value > 0:
                return value
    return None
