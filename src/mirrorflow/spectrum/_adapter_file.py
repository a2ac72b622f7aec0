"""The file of a LoRA adapter: its products, and how it says which ranks and scales they have.

PEFT says it in adapter_config.json, kohya's scripts in a tensor alpha beside each pair, diffusers
in the header of the file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from math import inf, nextafter, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._adapters import alpha_keys, lora, names_a_configuration
from ._checkpoint_files import files_of, reader
from ._configuration import CHANGES_BASE, HEADER, adapter_config, object_of, require_adapter
from ._patterns import Patterns
from ._torch_weights import METADATA, PICKLED
from .audit import PREFIX, Checkpoint
from .pairs import Factor, Found, Pair
from .truncation import RankChoice, TruncatedProduct, Truncation, distance, truncated_product

__all__ = ["CONFIG", "AdapterFile", "reranked"]

CONFIG = "adapter_config.json"
DEFAULT = 8  # PEFT's r and lora_alpha where the configuration has none
FACTORS = re.compile(r"\.(?:lora|hada|lokr|vera)_|_lora\d?\.|\.lora\.|\.dora_scale$")
KNOWN = {
    *("A", "B", "a", "b", "embedding_A", "embedding_B", "down", "up", "mid", "magnitude_vector"),
    "linear_layer",
}
FIRST = re.compile(  # its rows are the rank
    r"\.lora_(?:A|embedding_A|down)(?:\.|$)|(?:_lora\d?|\.lora|\.lora_linear_layer)\.down(?:\.|$)"
)
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")  # of the old weights
UNCHANGED = "it is copied as it is"

Ranks = Mapping[str, tuple[int, int]]  # the old and the new rank of each module


class AdapterFile:
    """The weights and the configuration of an adapter's file.

    Raises
    ------
    ValueError
        If there is not exactly one file, or the adapter's update is not scale A B.
    """

    def __init__(self, path: Path) -> None:
        files = list(files_of(path))
        if len(files) != 1:
            names = ", ".join(file.name for file in files[:3])
            raise ValueError(f"{path} must hold one adapter, got {names}. Name one of the files.")
        self.source, self.file = path, files[0]
        if self.file.suffix in PICKLED or self.file.name == METADATA:
            raise ValueError(
                f"{self.file} must be a safetensors file to be truncated. Save the adapter with "
                "save_pretrained, or with safetensors.torch.save_file(state_dict, file)."
            )
        self._checkpoint = Checkpoint(path)
        self._shapes = self._checkpoint.shapes
        self._config = adapter_config(self.file.parent / CONFIG)
        with reader()(self.file) as content:
            self._metadata: dict[str, str] = dict(content.metadata() or {})
        self._names = self._checkpoint.names
        _check(self._config, self.file.parent / CONFIG)

    def pairs(self) -> Found:
        """Find the products; what else looks like an adapter is listed with the reason."""
        pairs: list[Pair] = []
        skipped: list[tuple[str, str]] = []
        for key in self._shapes:
            found = lora(key, self._shapes, self._checkpoint)
            reason = self._reason(found) if isinstance(found, Pair) else found
            if reason:
                skipped.append((found.label if isinstance(found, Pair) else key, reason))
            elif isinstance(found, Pair):
                pairs.append(found)
        known = {pair.name for pair in pairs} | {_module(name) for name, _ in skipped}
        for key in self._shapes:
            if FACTORS.search(key) and _module(key) not in known:
                skipped.append((key, f"its form is not known: {UNCHANGED}"))
        return self._checkpoint.readable(Found(tuple(pairs), tuple(skipped)))

    def _reason(self, pair: Pair) -> str:
        """Say why a pair is not a plain product, or its scale not known; empty if it is."""
        if {pair.left.key, pair.right.key} & self._checkpoint.doubled:
            return f"two modules have this name, as of LoRA on parameters: {UNCHANGED}"
        start = f"{pair.name}.lora_"
        parts = {k[len(start) :].split(".")[0] for k in self._shapes if k.startswith(start)}
        if more := sorted(parts - KNOWN):
            return f"lora_{more[0]} stands beside the two factors: {UNCHANGED}"
        if names_a_configuration(pair.right.key):
            return f"its tool keeps the rank in a configuration of its own: {UNCHANGED}"
        if self._config or HEADER in self._metadata or self._alpha_key(pair):
            return ""
        if pair.right.key.startswith(PREFIX):
            return (
                f"{CONFIG} must be beside the file, since the scale depends on the rank by it, got "
                f"none: {UNCHANGED}"
            )
        for key in ("network_alpha", "ss_network_alpha"):
            if key in self._metadata:
                return f"its scale depends on the rank, by {key} in the header: {UNCHANGED}"
        return ""

    def _alpha_key(self, pair: Pair) -> str:
        """Return the name of the alpha beside a pair; empty where there is none."""
        found = alpha_keys(pair.name, pair.right.key)
        return next((key for key in found if key in self._shapes), "")

    def truncated(
        self, pair: Pair, choice: RankChoice
    ) -> tuple[Truncation, dict[str, Tensor]] | str:
        """Return the record of a product and its new weights, or why it stays as it is."""
        old = self._rows(pair.left), self._rows(pair.right)
        if not all(bool(torch.isfinite(rows).all()) for rows in old):
            return f"it holds NaN or infinite entries: {UNCHANGED}"
        if not torch.isfinite(
            torch.linalg.norm(old[0].double()) * torch.linalg.norm(old[1].double())
        ):
            return f"its entries are beyond float64: {UNCHANGED}"
        kept = truncated_product(
            old[0].mT, old[1], rank=choice.rank, energy=choice.energy, error=choice.error
        )
        if kept.is_zero:
            return f"A B = 0, as at LoRA's start: {UNCHANGED}"
        smaller = kept.rank < pair.shape[1]
        changed, stored = self._smaller(pair, kept, old) if smaller else ({}, 0.0)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in changed.values()):
            return f"{old[0].dtype} cannot hold the new factors: {UNCHANGED}"
        return Truncation.of(pair, kept, stored), changed

    def _smaller(
        self, pair: Pair, kept: TruncatedProduct, old: tuple[Tensor, Tensor]
    ) -> tuple[dict[str, Tensor], float]:
        """Return the weights of a truncated product, and their error as they are stored."""
        changed, factor = self._new_alpha(pair, kept.rank)
        left = (kept.left.mT * sqrt(factor)).to(old[0].dtype)
        right = (kept.right * sqrt(factor)).to(old[1].dtype)
        for side, rows in ((pair.left, left), (pair.right, right)):
            changed[self._names[side.key]] = self._shaped(side, rows)
        return changed, distance(old[0].mT, old[1], left.double().mT / factor, right)

    def _rows(self, factor: Factor) -> Tensor:
        """Read a factor as rows (r, long dimension)."""
        rows = self._checkpoint.load(factor)
        assert isinstance(rows, Tensor)  # of a file nothing is sharded
        return rows

    def _shaped(self, factor: Factor, rows: Tensor) -> Tensor:
        """Return rows (k, long dimension) as a weight: transposed, or a convolution's."""
        inner = int(factor.transposed)
        matrix = rows.mT if factor.transposed else rows
        old = self._shapes[factor.key]
        return matrix.reshape(*old[:inner], len(rows), *old[inner + 1 :]).contiguous()

    def _new_alpha(self, pair: Pair, k: int) -> tuple[dict[str, Tensor], float]:
        """Return kohya's alpha for the rank k, and the factor that makes up for its rounding.

        The model adds (alpha / r) A B: alpha k / r keeps the scale, where its dtype can hold it.
        """
        if not (key := self._alpha_key(pair)):
            return {}, 1.0
        with reader()(self.file) as content:
            old = content.get_tensor(self._names[key])
        exact = old.double() * k / pair.shape[1]
        new = (exact if old.is_floating_point() else exact.ceil()).to(old.dtype)
        factor = (exact / new.double()).flatten()[0].item() if new.all() else 1.0
        return {self._names[key]: new}, factor

    def new_config(self, records: Sequence[Truncation]) -> tuple[dict[str, Any] | None, list[str]]:
        """Return the adapter_config.json of the new ranks, if there is one, and notes."""
        if not self._config:
            return None, []
        config, notes = reranked(self._config, self._ranks(records)), []
        if config.get("init_lora_weights") == "orthogonal":
            config["init_lora_weights"] = True
            notes.append("init_lora_weights is true now: orthogonal refuses odd ranks on loading")
        if config["rank_pattern"] and not self._config.get("rank_pattern"):
            notes.append(
                "ranks differ between modules: what reads the adapter has to know rank_pattern and "
                "alpha_pattern, as PEFT does"
            )
        return config, notes

    def new_header(self, records: Sequence[Truncation]) -> tuple[dict[str, str], list[str]]:
        """Return the file's header with the new ranks, and notes."""
        header, notes = dict(self._metadata), []
        if HEADER in header:
            header[HEADER] = _repacked(header[HEADER], self._ranks(records))
        if "ss_network_dim" in header:
            ranks = {new for _, new in self._ranks(records).values()}
            _write_dim(header, ranks.pop() if len(ranks) == 1 else None)
        if stale := [name for name in HASHES if header.pop(name, None) is not None]:
            notes.append(f"{', '.join(stale)} in the header are left out: they are of old weights")
        return header, notes

    def _ranks(self, records: Sequence[Truncation]) -> dict[str, tuple[int, int]]:
        """Return the ranks of every module, those that stay as they are as well."""
        skipped = [t.rpartition(".")[0] for t in self._config.get("target_parameters") or ()]
        ranks = {
            _module(key): (shape[0], shape[0])
            for key, shape in self._shapes.items()
            if FIRST.search(key) and len(shape) > 1 and not _module(key).endswith(tuple(skipped))
        }
        new = {record.name: (record.old_rank, record.new_rank) for record in records}
        return {name.removeprefix(PREFIX): found for name, found in (ranks | new).items()}


def _module(key: str) -> str:
    """Return the module of a weight of an adapter."""
    found = FACTORS.search(key)
    if found is None:
        return key
    return key[: found.end() - 1] if found[0].startswith("_lora") else key[: found.start()]


def _check(config: Mapping[str, Any], file: Path) -> None:
    """Refuse adapters whose update depends on the rank otherwise than as scale A B."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        raise ValueError(
            f"{file}: init_lora_weights must leave the base weights as they are, got {start!r}, "
            "which subtracts a product of rank r from them on loading. Save the adapter with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) first."
        )
    for key in ("use_bdlora", "monteclora_config"):
        if config.get(key):
            raise ValueError(
                f"{file}: {key} must be unset, got {config[key]!r}. Its update is not scale A B."
            )


def reranked(config: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Return PEFT's configuration in which modules have new ranks and their old scales.

    Most modules have the rank r and lora_alpha, the others patterns that match nothing else. LoRA
    on parameters is matched by names that the file does not hold: with it the old entries stay.
    """
    alphas, default = config.get("alpha_pattern") or {}, config.get("lora_alpha", DEFAULT)
    known = Patterns(alphas, "alpha_pattern")
    rooted = bool(config.get("use_rslora"))
    wanted = {
        module: (new, _alpha(known.value(module, default), old, new, rooted))
        for module, (old, new) in ranks.items()
    }
    kept = {"rank_pattern": config.get("rank_pattern") or {}, "alpha_pattern": alphas}
    if config.get("target_parameters"):
        r, alpha = config.get("r", DEFAULT), default
    else:
        r, alpha = _most_common(wanted.values())
        kept = {"rank_pattern": {}, "alpha_pattern": {}}
    exact = dict(zip(wanted, _patterns(wanted), strict=True))
    new = {
        "rank_pattern": {exact[m]: found[0] for m, found in wanted.items() if found[0] != r},
        "alpha_pattern": {exact[m]: found[1] for m, found in wanted.items() if found[1] != alpha},
    }
    both = {name: _before(first, kept[name]) for name, first in new.items()}
    return {**config, "r": r, "lora_alpha": alpha, **both}


def _before(first: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """Return two maps as one, in which the first takes effect: PEFT takes the first match."""
    return {**first, **{key: value for key, value in then.items() if key not in first}}


def _most_common(values: Iterable[Hashable]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _alpha(alpha: float, old: int, new: int, rooted: bool) -> float:
    """Return the alpha whose scale, alpha / r or alpha / sqrt(r), is that of the old rank."""
    if old == new:
        return alpha
    before, after = (sqrt(old), sqrt(new)) if rooted else (old, new)
    scale = alpha / before
    near = scale * after
    candidates = (near, nextafter(near, inf), nextafter(near, -inf))
    found = next((a for a in candidates if a / after == scale), near)
    return int(found) if found == int(found) else found


def _patterns(modules: Iterable[str]) -> list[str]:
    r"""Return for each module a pattern that matches it, and no other, as PEFT matches.

    PEFT takes ``(.*\.)?(pattern)$`` from the start of a name: a name that ends another one needs
    a start of its own.
    """
    modules = list(modules)
    ends = {name[i + 1 :] for name in modules for i, letter in enumerate(name) if letter == "."}
    return [("^" if name in ends else "") + re.escape(name) for name in modules]


def _repacked(packed: str, ranks: Ranks) -> str:
    """Return diffusers' header: configurations whose keys begin with a part of the pipeline."""
    content = object_of(packed, HEADER)
    for part in [key.removesuffix(".r") for key in content if key.endswith(".r")]:
        start = f"{part}."
        config = {k.removeprefix(start): v for k, v in content.items() if k.startswith(start)}
        inside = {k.removeprefix(start): v for k, v in ranks.items() if k.startswith(start)}
        if inside:
            require_adapter(config, f"{HEADER}: {part}")
            content |= {f"{start}{key}": value for key, value in reranked(config, inside).items()}
    return json.dumps(content, indent=2)


def _write_dim(header: dict[str, str], rank: int | None) -> None:
    """Write the rank into kohya's header; "Dynamic" where there are several, as kohya does."""
    try:
        alpha = float(header["ss_network_alpha"]) * (rank or 0) / float(header["ss_network_dim"])
    except (KeyError, ValueError, ZeroDivisionError):
        rank, alpha = None, 0.0
    header["ss_network_dim"] = str(rank) if rank else "Dynamic"
    if "ss_network_alpha" in header:
        header["ss_network_alpha"] = str(alpha) if rank else "Dynamic"
