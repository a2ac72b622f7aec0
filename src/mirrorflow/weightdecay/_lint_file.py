"""Lint of saved optimizers: their groups are read without running what a file holds."""

from __future__ import annotations

import io
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import (
    get_safe_globals,
    get_unsafe_globals_in_checkpoint,
    safe_globals,
)

from ._protocol import in_protocol_2
from .lint import Finding, decay_of, of_groups

__all__ = ["lint_file"]

# How torch, zip and pickle fail on bytes that are not a checkpoint.
_DAMAGED = (
    pickle.UnpicklingError,
    struct.error,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    OSError,  # a seek to before the beginning
    AssertionError,
    TypeError,
    RecursionError,
    OverflowError,
    MemoryError,
    zipfile.BadZipFile,
)
_FILES = ("optimizer*.pt", "optimizer*.bin")  # of the Trainer, and of accelerate
_NUMBERS = "?bhilqBHILQefdgFD"  # the codes of NumPy's types of numbers
_DEPTH = 4  # of the dicts and lists around an optimizer
_BLOCKED = re.compile(r"(?:Unsupported global: GLOBAL |but got <class ')([\w.]+)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

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
        optimizers = dict(_optimizers(_read(file)))
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


def _read(file: Path) -> Any:
    """Return what a file holds, without running it; tensors stay on the disk where they can."""
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise ValueError(f"{file} cannot be read: a plain file is needed")
    zipped = _is_zip(file)
    source: Any = file
    try:
        try:
            return _loaded(file, mmap=zipped)
        except pickle.UnpicklingError as error:
            if "Unsupported operand" not in str(error):
                raise
            with file.open("rb") as stream:  # another protocol than torch's
                source = in_protocol_2(stream, zipped)
            return _loaded(source)
    except _DAMAGED as error:
        if foreign := _foreign(source, error, zipped):
            raise ValueError(
                f"{file} cannot be read with weights_only=True, because it holds "
                f"{', '.join(foreign)}: save plain numbers and optimizer.state_dict() only, or the "
                "optimizer in a file of its own"
            ) from error
        # Torch's own text goes on for lines, to advise weights_only=False.
        reason = _COLOUR.sub("", str(error)).partition("WeightsUnpickler error:")
        line = (reason[2] or reason[0]).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} is damaged, or not a file of torch.save: {line}") from error


def _is_zip(file: Path) -> bool:
    """Return whether a file is a zip archive; an error that names it, if it cannot be opened."""
    with file.open("rb") as stream:
        try:
            return zipfile.is_zipfile(stream)
        except (zipfile.BadZipFile, ValueError, struct.error):
            return True  # with an end that makes no sense: torch says what is wrong with it


def _loaded(source: Any, mmap: bool = False) -> Any:
    """Return what torch reads without running anything."""
    with _numbers_of_numpy(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about what is not a file of it
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)


def _numbers_of_numpy() -> AbstractContextManager[Any]:
    """Allow NumPy's scalars and arrays: dtypes and bytes, which are a finding and no danger."""
    scalar: Any
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    modules = ("numpy._core.multiarray", "numpy.core.multiarray")  # of NumPy 2 and 1
    made = [(scalar, f"{m}.scalar") for m in modules]
    made += [(array, f"{m}._reconstruct") for m in modules]
    dtypes = {type(np.dtype(code)) for code in _NUMBERS}
    # torch takes back at the end what it is given here, also what the user had allowed before.
    known = set(get_safe_globals())
    return safe_globals([o for o in (*made, np.dtype, np.ndarray, *dtypes) if o not in known])


def _foreign(source: Any, error: Exception, zipped: bool) -> list[str]:
    """Return the classes in a file that torch refuses to load with weights_only=True."""
    names = set(_BLOCKED.findall(str(error)))
    if zipped and isinstance(error, pickle.UnpicklingError):
        with _numbers_of_numpy(), suppress(*_DAMAGED):
            if isinstance(source, io.BytesIO):
                source.seek(0)
            names |= set(get_unsafe_globals_in_checkpoint(source))
    plain = ("builtins.dict", "collections.defaultdict")  # what other objects are made with
    return sorted(names.difference(plain) or names)


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
