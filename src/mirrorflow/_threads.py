"""Threads of BLAS and torch: one for small problems, and one pool of BLAS at a time.

Two threads that share a small product wait for each other longer than they compute: at best they
gain nothing, and where another process keeps a core busy each product waits until the thread there
gets its turn. Measured on two cores, two threads gain nothing on products with a matrix of up to
some 10^5 numbers, and take two to seven times as long beside a busy process.

The wheels of NumPy and SciPy bring an OpenBLAS each. The threads of one keep their cores busy for
some 25 ms after a call, in case of another; where products (NumPy) and factorizations (SciPy) take
turns, each waits for the other's, and two threads are slower than one by a factor of two to three.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any

import scipy.linalg  # so that its BLAS is loaded
from threadpoolctl import ThreadpoolController

__all__ = ["SMALL", "few_threads", "one_pool", "one_thread", "small_on_one_thread"]

SMALL = 2**17  # numbers of a matrix; products with it take less than about 0.2 ms
_ALL, _SCIPY = "all", "scipy"


@cache
def _pools() -> list[tuple[Any, bool]]:
    """Return the BLAS of this process, each with whether it came with SciPy's wheel.

    To find them takes milliseconds, to set one microseconds.
    """
    package = Path(scipy.__file__).parent
    homes = {str(package.with_name("scipy.libs")), str(package / ".dylibs")}
    found = ThreadpoolController().select(user_api="blas").lib_controllers
    return [(pool, str(Path(pool.filepath).parent) in homes) for pool in found]


_lock = RLock()
_inside = {_ALL: 0, _SCIPY: 0}
_before: list[int] = []


@contextmanager
def _limited(kind: str) -> Iterator[None]:
    """Limit pools to one thread; the setting is the process's, the last who leaves undoes it."""
    with _lock:
        if not any(_inside.values()):
            _before[:] = [pool.get_num_threads() for pool, _ in _pools()]
        _inside[kind] += 1
        _set()
    try:
        yield
    finally:
        with _lock:
            _inside[kind] -= 1
            _set()


def _set() -> None:
    """Set each pool to one thread while a block asks for it, and to its own number otherwise."""
    for (pool, scipys), own in zip(_pools(), _before, strict=True):
        one = _inside[_ALL] or (scipys and _inside[_SCIPY])
        pool.set_num_threads(1 if one else own)
        if hasattr(pool, "clear_controlling_thread"):  # of threadpoolctl 3.8: whoever sets an
            pool.clear_controlling_thread()  # OpenBLAS keeps other threads from it until it ends


def one_thread() -> AbstractContextManager[None]:
    """Let BLAS compute with one thread meanwhile: several may add up in another order."""
    return _limited(_ALL)


def one_pool() -> AbstractContextManager[None]:
    """Let SciPy's own OpenBLAS compute with one thread meanwhile; NumPy's keeps its number.

    Where NumPy and SciPy share one nothing changes.
    """
    return _limited(_SCIPY)


def small_on_one_thread(size: int, small: int = SMALL) -> AbstractContextManager[None]:
    """Let BLAS compute with one thread meanwhile where matrices have at most ``small`` numbers."""
    return one_thread() if size <= small else nullcontext()


@contextmanager
def few_threads(size: int, small: int = SMALL) -> Iterator[None]:
    """Let torch compute with one thread meanwhile where matrices have at most ``small`` numbers.

    The number holds for the calling thread; to set it takes less than a microsecond.
    """
    import torch  # here: estimators that need none come without it

    before = torch.get_num_threads()
    if size > small or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
