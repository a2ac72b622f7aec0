"""Lint of saved optimizers: their groups are read without running what a file holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._torch_file import read_torch_file
from .lint import Finding, decay_of, of_groups

__all__ = ["lint_file"]

PLAIN = "save plain numbers and optimizer.state_dict() only, or the optimizer in a file of its own"
_FILES = ("optimizer*.pt", "optimizer*.bin")  # of the Trainer, and of accelerate
_DEPTH = 4  # of the dicts and lists around an optimizer

# The keys of a group by which an optimizer of torch is known, and those that others have: what has
# the first and none of the others decays like this.
_BY_KEYS: tuple[tuple[set[str], set[str], str], ...] = (
    ({"dampening", "nesterov", "momentum"}, set(), "sgd"),
    ({"ns_coefficients", "ns_steps"}, set(), "decoupled"),  # Muon
    ({"beta2_decay", "d", "eps"}, set(), "decoupled"),  # Adafactor
    ({"clip_threshold", "scale_parameter", "relative_step"}, set(), "decoupled"),  # transformers'
    ({"alpha", "centered", "momentum"}, set(), "coupled"),  # RMSprop
    ({"lr_decay", "initial_accumulator_value"}, set(), "coupled"),  # Adagrad
    ({"rho", "eps", "maximize"}, {"betas", "adaptive"}, "coupled"),  # Adadelta
    ({"lambd", "alpha", "t0"}, set(), "coupled"),  # ASGD
    ({"betas", "eps", "foreach", "maximize"}, {"amsgrad", "momentum_decay"}, "coupled"),  # Adamax
    ({"train_mode", "weight_sum", "lr_max"}, set(), "averaged"),  # the schedule-free ones
)


def lint_file(path: str | Path) -> list[Finding]:
    """Return the mistakes in saved optimizers, in whatever dicts and lists they lie.

    Parameters
    ----------
    path : path
        A file of ``torch.save``: ``optimizer.pt``, a checkpoint of Lightning or of your own; or a
        folder with such a file, as the Trainer and accelerate write it. It is read with
        ``weights_only=True``, so that nothing in it is run.

    Returns
    -------
    list of Finding
        What the saved groups show. How a decay acts is known where the keys of a group tell whose
        it is; where they do not, a note says so.

    Raises
    ------
    FileNotFoundError
        If the file does not exist, or the folder holds none.
    ValueError
        If a file is damaged, holds no state of an optimizer, or objects of other classes.
    """
    files = _files(Path(path))
    found = []
    for file in files:
        optimizers = dict(_optimizers(read_torch_file(file, PLAIN)))
        if not optimizers:
            raise ValueError(f"{file} holds no state of an optimizer: it has no param_groups")
        for place, groups in optimizers.items():
            names = [file.name] if len(files) > 1 else []
            names += [place] if len(optimizers) > 1 else []
            found += [replace(f, source=" ".join(names)) for f in _of_saved(file, place, groups)]
    return found


def _files(path: Path) -> list[Path]:
    """Return the files of a folder that hold an optimizer."""
    if not path.is_dir():
        return [path]
    files = sorted({file for pattern in _FILES for file in path.glob(pattern) if file.is_file()})
    if not files:
        raise FileNotFoundError(
            f"{path} is a folder without {' or '.join(_FILES)}: name the file that holds the "
            "optimizer, or a checkpoint folder of the Trainer"
        )
    return files


def _optimizers(loaded: Any, place: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    """Find what has param_groups, with the place where it lies."""
    if isinstance(loaded, Mapping) and "param_groups" in loaded:
        yield place, loaded["param_groups"]
    elif isinstance(loaded, Mapping) and depth:
        for key, value in loaded.items():
            yield from _optimizers(value, f"{place}.{key}".lstrip("."), depth - 1)
    elif isinstance(loaded, (list, tuple)) and depth:
        for index, value in enumerate(loaded):
            yield from _optimizers(value, f"{place}[{index}]", depth - 1)


def _of_saved(file: Path, place: str, groups: Any) -> Iterable[Finding]:
    """Look at the groups of a saved optimizer."""
    where = f"{file}: {place}.param_groups" if place else f"{file}: param_groups"
    if not isinstance(groups, Sequence) or not all(isinstance(g, Mapping) for g in groups):
        raise ValueError(f"{where} must be a list of parameter groups, got {str(groups)[:60]}")
    try:
        couplings = {i: _saved_coupling(g) for i, g in enumerate(groups) if decay_of(g, i) > 0}
        return list(of_groups(groups, couplings, outside=False))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _saved_coupling(group: Mapping[str, Any]) -> str:
    """Return the coupling of a saved group, by its keys."""
    if "decoupled_weight_decay" in group and "betas" in group:
        return "decoupled" if group["decoupled_weight_decay"] else "coupled"
    keys = set(group)
    for present, absent, how in _BY_KEYS:
        if present <= keys and not absent & keys:
            return how
    return "unknown"
