"""Files that are written in one step, and locks that say which process holds a folder.

A lock is a file beside what it guards; the system lets it go when its process ends, however it
ends. ``<lock>.holder`` beside it names the process and its machine, for people to read.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

__all__ = ["held", "hold", "remove_drafts", "replacing", "run_lock"]

_DRAFT = re.compile(r"\..+\.\d+")  # .result.json.4711, as `replacing` names them


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside ``path`` that replaces it when it is written and synced.

    What fails half way, on a full disk for example, is removed; `remove_drafts` removes what a
    kill has left.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def remove_drafts(*folders: Path) -> None:
    """Remove the temporary files that killed processes have left in folders; hold their lock."""
    for folder in folders:
        for path in folder.glob(".*"):
            if _DRAFT.fullmatch(path.name):
                path.unlink(missing_ok=True)


def run_lock(folder: Path) -> Path:
    """Return the path of the lock of a run's folder: beside it, so that the folder may go."""
    return folder.parent / ".locks" / folder.name


@contextmanager
def hold(lock: Path, busy: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock; where another process holds it, call ``busy`` with its name, then wait.

    Parameters
    ----------
    lock : path
        Its folder is made if need be.
    busy : callable
        Called with "process 4711 on the machine <name>"; what it raises ends the wait.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    guard, note = FileLock(str(lock)), _note(lock)
    try:
        guard.acquire(timeout=0)
    except Timeout:
        busy(_holder(lock))
        guard.acquire()
    try:
        with suppress(OSError):  # for people alone: a full disk is found by what matters
            note.write_text(f"process {os.getpid()} on the machine {platform.node()}")
        yield
    finally:
        with suppress(OSError):
            note.unlink(missing_ok=True)
        guard.release()


def held(lock: Path) -> bool:
    """Return whether a process holds a lock; where this one may not try, whether one says so."""
    if not lock.exists():
        return False
    try:
        with FileLock(str(lock)).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a read-only store
        return _note(lock).exists()


def _holder(lock: Path) -> str:
    """Return who holds a lock; who has just taken it writes its name in a moment."""
    for _ in range(10):
        with suppress(OSError):
            if name := _note(lock).read_text(encoding="utf-8", errors="replace").strip():
                return name
        time.sleep(0.02)
    return "another process"


def _note(lock: Path) -> Path:
    return lock.with_name(f"{lock.name}.holder")
