"""Files of ``torch.save``, read by ``weights_only=True``: nothing in them is run."""

from __future__ import annotations

import io
import pickle
import re
import struct
import warnings
import zipfile
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import (
    get_safe_globals,
    get_unsafe_globals_in_checkpoint,
    safe_globals,
)

from ._pickle_protocol import in_protocol_2

__all__ = ["DAMAGED", "read_torch_file"]

# How torch, zip and pickle fail on bytes that are not a checkpoint.
DAMAGED = (
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
_NUMBERS = "?bhilqBHILQefdgFD"  # the codes of NumPy's types of numbers
_BLOCKED = re.compile(r"(?:Unsupported global: GLOBAL |but got <class ')([\w.]+)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def read_torch_file(file: Path, remedy: str) -> Any:
    """Return what a file of ``torch.save`` holds, and run nothing in it.

    Tensors stay on the disk where they can: in a zip archive, the format since torch 1.6.

    Parameters
    ----------
    file : Path
    remedy : str
        What to do where it holds objects of other classes, for the message.

    Raises
    ------
    ValueError
        If it is damaged, or holds what torch does not read with ``weights_only=True``.
    FileNotFoundError
        If it does not exist.
    """
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
    except DAMAGED as error:
        if foreign := _foreign(source, error, zipped):
            raise ValueError(
                f"{file} cannot be read with weights_only=True, because it holds "
                f"{', '.join(foreign)}: {remedy}"
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
        with _numbers_of_numpy(), suppress(*DAMAGED):
            if isinstance(source, io.BytesIO):
                source.seek(0)
            names |= set(get_unsafe_globals_in_checkpoint(source))
    plain = ("builtins.dict", "collections.defaultdict")  # what other objects are made with
    return sorted(names.difference(plain) or names)
