"""One pool of BLAS threads at a time.

The wheels of NumPy and SciPy bring an OpenBLAS each. The threads of one keep their cores busy for
some 25 ms after a call, in case of another; where products (NumPy) and factorizations (SciPy) take
turns, each waits for the other's, and two threads are slower than one by a factor of two to three.
The factorizations are the smaller part: they get one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import scipy.linalg
from threadpoolctl import ThreadpoolController

__all__ = ["one_pool"]

_lock, _inside = Lock(), 0
_held: Any = None


@cache
def _own_blas() -> Any:
    """Control the OpenBLAS that came with SciPy's wheel; nothing where NumPy shares one."""
    package = Path(scipy.__file__).parent
    homes = {str(package.with_name("scipy.libs")), str(package / ".dylibs")}
    controller = ThreadpoolController()
    paths = [lib["filepath"] for lib in controller.info()]
    return controller.select(filepath=[p for p in paths if str(Path(p).parent) in homes])


@contextmanager
def one_pool() -> Iterator[None]:
    """Let SciPy's own OpenBLAS compute with one thread meanwhile.

    The setting is the process's: the first who comes in makes it, the last who leaves undoes it.
    """
    global _inside, _held
    with _lock:
        _inside += 1
        if _inside == 1:
            _held = _own_blas().limit(limits=1)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _held.restore_original_limits()
