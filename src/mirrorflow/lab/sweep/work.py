"""One job in a process of its own: carried out, told about, and ended with its driver."""

from __future__ import annotations

import errno
import importlib
import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import framework
from ..framework import Checkpoints
from .jobs import Job, trunk_folder

__all__ = ["Result", "Store", "carry_out", "in_process"]

Tell = Callable[[int, int, str], None]
Result = tuple[str, str]  # ("done", "") or ("failed", the reason)


def in_process(
    job: Job, out: str, store: str, hooks: Sequence[str], threads: int, line: Any
) -> None:
    """Carry a job out in a process that the driver has started, and send what comes of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which ends its workers
    threading.Thread(target=_end_with_driver, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    last = 0.0

    def tell(done: int, total: int, label: str) -> None:
        nonlocal last
        if time.monotonic() - last > 0.2:
            last = time.monotonic()
            line.send(("progress", (done, total, label)))

    line.send(carry_out(job, out, store, hooks, tell))


def _end_with_driver() -> None:
    """End this process when the driver is gone, which the server of forks outlives a moment."""
    if (driver := mp.parent_process()) is not None:
        driver.join()
        os._exit(1)


def carry_out(job: Job, out: str, store: str, hooks: Sequence[str], tell: Tell) -> Result:
    """Train a beginning or execute a run; a failure is a result as well."""
    try:
        _carry_out(job, Path(out), Store(store or out, out), hooks, tell)
    except Exception as error:  # whatever an experiment raises is its reason, and no other's
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        advice = " (make room and give the same command again)" if full else ""
        return "failed", f"{type(error).__name__}: {error}{advice}"
    return "done", ""


def _carry_out(job: Job, out: Path, store: Store, hooks: Sequence[str], tell: Tell) -> None:
    module = framework.load(job.experiment)
    config = module.Config(**job.config)
    trunks = trunk_folder(out, job.experiment)
    store.fetch(trunks)
    if job.line:
        training: Any = module
        checkpoints = Checkpoints(trunks)
        training.advance(
            config, job.line, job.until, checkpoints,
            lambda step, found: tell(step, job.until, job.label),
        )  # fmt: skip
        store.publish(trunks)
        return
    folder = framework.result_folder(module, config, out)
    store.fetch(folder)
    observers = [_hook(name)(folder, job) for name in hooks]
    framework.execute(module, config, out, progress=tell, trunks=trunks, observers=observers)
    store.publish(folder, last="result.json")


def _hook(name: str) -> Callable[[Path, Job], Callable[..., None]]:
    """Import what makes an observer: "module:function" called with the folder and the job."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


# Where results are kept: a folder, or an object store that fsspec knows.


class Store:
    """A mirror of the results' folder at a URL; nothing to do where it is the folder itself.

    Parameters
    ----------
    url : str
        A folder, or s3://bucket/path, gs://..., memory://...: whatever fsspec opens.
    out : str or path
        The folder of results on this machine.
    """

    def __init__(self, url: str | Path, out: str | Path) -> None:
        self.out, self._files, self._root = Path(out), None, ""
        if "://" not in str(url):
            return
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise ImportError(
                f"a store at {url} needs fsspec and its driver: pip install '.[store]'"
            ) from None
        files, self._root = url_to_fs(str(url))
        self._files: Any = files

    def fetch(self, folder: Path) -> None:
        """Copy the files below a folder that are in the store and not here."""
        if self._files is None:
            return
        there = f"{self._root}/{folder.relative_to(self.out)}"
        self._files.invalidate_cache()
        for path in self._files.find(there):
            here = folder / path[len(self._files._strip_protocol(there)) :].lstrip("/")
            if not here.exists():
                here.parent.mkdir(parents=True, exist_ok=True)
                draft = here.with_name(f".{here.name}.fetched-{os.getpid()}")
                try:
                    self._files.get_file(path, str(draft))
                    draft.replace(here)
                except BaseException:
                    with suppress(OSError):
                        draft.unlink(missing_ok=True)
                    raise

    def publish(self, folder: Path, last: str = "") -> None:
        """Copy the files below a folder into the store; ``last`` after all others."""
        if self._files is None or not folder.exists():
            return
        paths = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
        for path in sorted(paths, key=lambda p: p.name == last):
            there = f"{self._root}/{path.relative_to(self.out)}"
            if path.name == last or not self._files.exists(there):
                self._files.makedirs(there.rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(path), there)
