r"""Adapters and models whose products A B are replaced by truncated singular value decompositions.

Adapter files are planned first and written second: `plan_truncation` computes every new factor and
reports its error, `TruncationPlan.write` stores the result in the format of the input. `truncate`
does both, or truncates the products of a model in place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module

from ._adapter_file import CONFIG, UNCHANGED, AdapterFile
from ._checkpoint_files import adapters_below, reader
from ._truncated_model import truncate_model
from .pairs import choose
from .truncation import RankChoice, Truncation, TruncationReport

__all__ = ["TruncationPlan", "plan_truncation", "truncate"]

OPTIMIZERS = ("optimizer.pt", "optimizer.bin")  # their states have the shapes of the weights


def truncate(
    target: str | Path | Module,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    out: str | Path | None = None,
    match: str | None = None,
    frozen: bool = False,
) -> TruncationReport:
    r"""Return what truncating the products of an adapter, into ``out``, or of a model loses.

    Every product A B becomes its best approximation ``U_k S_k V_k^T`` of rank k. Of an adapter's
    file the factors shrink to the rank k, and the scale alpha / r of each module stays what it is.
    Of a model, in place, the weights keep their shapes, and the products are those that
    `SpectralTracker` finds: LoRA updates, and W_Q^T W_K and W_O W_V of each head of attention.

    Of LoRA, and of heads with keys of their own, the new factors are ``[U_k S_k^(1/2), 0]`` and
    ``[S_k^(1/2) V_k^T; 0]``: the dimensions that are 0 on both sides stay 0 in training, so that
    the rank does, under a new optimizer; the moments of an old one belong to the old weights. The
    biases of Q and V act as before, for which one dimension more is used; that of K, which
    softmax does not see, becomes 0. Where query heads share keys (and values), these are left as
    they are and ``W_Q`` (``W_O^T``) becomes ``W_Q U_k U_k^T``, head by head: each product is exact,
    and training may raise its rank again. Where anything else meets Q or K before the scores
    (rotary embeddings, normalizations, relative positions), no product of two weights gives the
    scores, and the head is skipped with the reason.

    Parameters
    ----------
    target : str, Path or torch.nn.Module
        An adapter's folder or file (PEFT, or kohya's scripts), or a model.
    rank, energy, error
        Exactly one, for each product: a rank >= 1, the share of the squared singular values that
        is kept, in (0, 1], or the largest relative Frobenius error, in [0, 1).
    out : str or Path, optional
        Where a truncated adapter is written: see `TruncationPlan.write`. A model needs none.
    match : str, optional
        A regular expression that a product's name or kind has to contain.
    frozen : bool
        Of a model, whether products that do not train are truncated as well. By default LoRA's
        updates are, and not the attention below them.

    Returns
    -------
    TruncationReport

    Raises
    ------
    ValueError
        If there is nothing to truncate, or the choice of ranks, or `out`, is none.
    TypeError
        If the target is neither a path nor a model.
    FileNotFoundError
        If the path does not exist.

    Notes
    -----
    Attention's scores are taken for ``(W_Q x + b_Q) . (W_K y + b_K)``, with what is added to them,
    under a softmax, and its output for ``W_O`` times the weighted mean of ``W_V y + b_V``. Parts
    that a module's parameters, and the code of its class, do not show are not seen.

    Examples
    --------
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> attention = torch.nn.MultiheadAttention(16, 2)
    >>> report = truncate(attention, rank=4)
    >>> [(found.label, found.old_rank, found.new_rank) for found in report.records][:2]
    [('attention head 0', 8, 4), ('attention head 1', 8, 4)]
    >>> from mirrorflow.spectrum import SpectralTracker
    >>> spectra = SpectralTracker(attention, level="head").measure()
    >>> max(record.effective_rank for record in spectra.records) < 4
    True
    """
    if isinstance(target, Module):
        if out is not None:
            raise ValueError(f"out must be None for a model, got {out}. Save the model yourself.")
        return truncate_model(target, RankChoice(rank, energy, error), match, frozen)
    if not isinstance(target, (str, Path)):
        kind = type(target).__name__
        raise TypeError(f"target must be a path or a torch.nn.Module, got {kind}. Pass a path.")
    if frozen:
        raise ValueError("frozen must be False for a file, got True. Leave it out.")
    if out is None:
        raise ValueError(
            "out must be given for a file, got None. Use plan_truncation(...).report to look only."
        )
    plan = plan_truncation(target, rank=rank, energy=energy, error=error, match=match)
    plan.write(out)
    return plan.report


@dataclass(frozen=True, eq=False)
class TruncationPlan:
    """A truncated adapter that is not written yet.

    Attributes
    ----------
    source : Path
        The folder or file that was given.
    file : Path
        The safetensors file.
    report : TruncationReport
        The ranks and errors of all products.
    tensors : dict of str to Tensor
        The weights that change, by their names in the file.
    config : dict or None
        The new adapter_config.json, where there is one.
    metadata : dict of str to str
        The new header of the file.
    """

    source: Path
    file: Path
    report: TruncationReport
    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    metadata: dict[str, str]

    def write(self, out: str | Path) -> Path:
        """Write the adapter in the format of the input, and return where it is.

        A folder, or a file with its adapter_config.json, becomes a folder; a file alone becomes a
        file of that name, or one of its own name in that folder. What does not change is copied as
        it is, byte by byte. The result appears whole or not at all.

        Raises
        ------
        ValueError
            If the output is the input, or there already.
        """
        out = Path(out)
        if self.config is None and self.source.is_file():
            target = out if out.suffix == ".safetensors" else out / self.file.name
            _refuse(target, self.file, target.exists())
            return self._finished(target, self._write_weights)
        _refuse(out, self.file.parent, out.exists() and not _is_empty(out))
        return self._finished(out, self._write_folder)

    def _finished(self, target: Path, write: Callable[[Path], None]) -> Path:
        """Write a draft beside the target, and put it in its place."""
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            write(draft)
            if target.is_dir():
                target.rmdir()  # it is empty; Windows replaces no folder
            os.replace(draft, target)
        finally:
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink(missing_ok=True)
        return target

    def _write_folder(self, folder: Path) -> None:
        """Write the weights, the configuration, and copies of the other files of a folder."""
        folder.mkdir()
        self._write_weights(folder / self.file.name)
        if self.config is not None:
            text = json.dumps(self.config, indent=2) + "\n"
            (folder / CONFIG).write_text(text, encoding="utf-8")
        for file in _others(self.source, self.file)[0]:
            shutil.copy2(file, folder / file.name)

    def _write_weights(self, file: Path) -> None:
        """Write the weights that change and those that do not."""
        from safetensors.torch import save_file

        with reader()(self.file) as content:
            names = content.keys()
            kept = {k: content.get_tensor(k) for k in names if k not in self.tensors}
        save_file({**kept, **self.tensors}, file, metadata=self.metadata or None)


def _refuse(target: Path, source: Path, taken: bool) -> None:
    """Refuse to write over the input, or over anything else."""
    if target.resolve() == source.resolve():
        raise ValueError(f"out must differ from the input, got {target}. Name another place.")
    if taken:
        raise ValueError(f"out must be new, or an empty folder, got {target}. Name another place.")


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _others(source: Path, file: Path) -> tuple[list[Path], list[Path]]:
    """Return the files beside an adapter's weights that are copied, and those that are left out."""
    if not source.is_dir():
        return [], []
    stale = {*OPTIMIZERS, *(f"{file.stem}{end}" for end in (".bin", ".pt", ".pth", ".ckpt"))}
    beside = sorted(
        f for f in source.iterdir() if f.is_file() and f.name not in (file.name, CONFIG)
    )
    return [f for f in beside if f.name not in stale], [f for f in beside if f.name in stale]


def plan_truncation(
    path: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    match: str | None = None,
) -> TruncationPlan:
    r"""Return the truncation of an adapter file, with its errors, before anything is written.

    Read are PEFT's folders (``adapter_config.json`` beside ``lora_A``, ``lora_B``; embeddings,
    Conv1D and convolutions as well) and the files of kohya's scripts (``lora_down``, ``lora_up``,
    ``alpha``). A module of rank r and scale s = alpha / r (alpha / sqrt(r) of rsLoRA) gets the rank
    k and ``alpha = s k``: its scale stays. Of PEFT the ranks stand in ``r`` and ``rank_pattern``,
    the scales in ``lora_alpha`` and ``alpha_pattern``, of kohya in the tensor ``alpha``. Dtypes
    stay.

    Of DoRA, A B is truncated before its normalization. What is not a product of two factors (LoCon
    with ``lora_mid``, LoHa, stacked experts), 0 or not finite stays as it is, with the reason.

    Parameters
    ----------
    path, rank, energy, error, match
        As for `truncate`.

    Returns
    -------
    TruncationPlan

    Raises
    ------
    ValueError, FileNotFoundError
        As for `truncate`.

    Examples
    --------
    >>> import tempfile, torch
    >>> from safetensors.torch import load_file, save_file
    >>> file = Path(tempfile.mkdtemp()) / "adapter.safetensors"
    >>> up, down = torch.diag(torch.tensor([4.0, 3.0])), torch.eye(2)
    >>> alpha = torch.tensor(2.0)
    >>> save_file({"m.lora_up.weight": up, "m.lora_down.weight": down, "m.alpha": alpha}, file)
    >>> plan = plan_truncation(file, rank=1)
    >>> plan.report.records[0].error
    0.6
    >>> load_file(plan.write(file.with_name("small.safetensors")))["m.alpha"].item()
    1.0
    """
    choice = RankChoice(rank, energy, error)
    adapter = AdapterFile(Path(path))
    found = choose(adapter.pairs(), "layer", match)
    records, skipped, tensors = [], list(found.skipped), {}
    for pair in found.pairs:
        product = adapter.truncated(pair, choice)
        if isinstance(product, str):
            skipped.append((pair.label, product))
        else:
            records.append(product[0])
            tensors |= product[1]
    if not records:
        # Nothing is copied where nothing is truncated.
        each = ((name, reason.removesuffix(f": {UNCHANGED}")) for name, reason in skipped)
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in each)
        raise ValueError(f"{path} must hold a product A B to truncate, got none.{reasons}")
    return _planned(adapter, records, [*skipped, *adapters_below(adapter.source)], tensors)


def _planned(
    adapter: AdapterFile,
    records: list[Truncation],
    skipped: list[tuple[str, str]],
    tensors: dict[str, Tensor],
) -> TruncationPlan:
    """Return the plan, with the configuration and the header of the new ranks."""
    config, about_config = adapter.new_config(records)
    metadata, about_header = adapter.new_header(records)
    stale = _others(adapter.source, adapter.file)[1]
    left_out = [f"{file.name} is left out: it has the old shapes" for file in stale]
    notes = (*about_config, *about_header, *left_out)
    report = TruncationReport(tuple(records), tuple(skipped), notes)
    return TruncationPlan(adapter.source, adapter.file, report, tensors, config, metadata)
