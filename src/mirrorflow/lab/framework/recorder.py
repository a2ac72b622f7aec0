"""Recorder of a run: numbers on the way, and each part when it is finished."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from .storage import replacing
from .trunks import Checkpoints

__all__ = [
    "Observer",
    "Part",
    "Progress",
    "Record",
    "Recorder",
    "checksum",
    "read_arrays",
    "require_finite",
    "write_arrays",
    "write_json",
]

Record = dict[str, Any]
Progress = Callable[[int, int, str], None]
Observer = Callable[[Record], None]


@dataclass(frozen=True)
class Part:
    """A piece of a run that is stored as soon as it is finished.

    Attributes
    ----------
    records : list of dict
        Its share of the records.
    arrays : dict of arrays
        Its curves.
    data : str
        The `checksum` of the data that it was computed from, if any.
    """

    records: list[Record] = field(default_factory=list)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    data: str = ""


class Recorder:
    """What ``run`` is given: it logs numbers, keeps finished parts, and tells the progress."""

    def __init__(
        self,
        folder: Path,
        progress: Progress | None = None,
        trunks: Path | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.folder, self._progress, self._observers = folder, progress, observers
        self.checkpoints = Checkpoints(trunks or folder / "trunks")
        self.parts: dict[str, Part] = {}
        self.device = "cpu"  # what the run computes on, for its provenance
        self.earlier = 0.0  # seconds that interrupted runs took for the parts they have finished
        self._current: str | None = None
        self._stream: IO[str] | None = None

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Open the log, with the lines of finished parts that an earlier run has left in it."""
        path = self.folder / "metrics.partial.jsonl"
        keys = [part.stem for part in self.folder.glob("parts/*.json")]
        done = {key for key in keys if self._stored(key) is not None}
        with replacing(path) as stream:
            stream.writelines(line for line, part in _lines(path) if part in done)
        with path.open("a", encoding="utf-8") as self._stream:
            yield
            os.fsync(self._stream.fileno())
        path.replace(self.folder / "metrics.jsonl")

    def log(self, **numbers: Any) -> None:
        """Write a line of metrics.jsonl; inside a part it names the part."""
        assert self._stream is not None
        part = {"part": self._current} if self._current else {}
        self._stream.write(json.dumps(part | numbers) + "\n")
        self._stream.flush()
        for observe in self._observers:
            observe(part | numbers)

    def part(self, key: str, compute: Callable[[], Part]) -> Part:
        """Compute a part, or read it where an interrupted run has stored it.

        Raises
        ------
        ArithmeticError
            If it holds NaN or infinite numbers; it is not stored then.
        """
        if (stored := self._stored(key)) is not None:
            self.parts[key], seconds = stored
            self.earlier += seconds
            return self.parts[key]
        self._current, begun = key, time.perf_counter()
        part = compute()
        self._current = None
        require_finite(key, part)
        self._store(key, part, time.perf_counter() - begun)
        self.parts[key] = self._read(key)  # as an interrupted run would find it
        return self.parts[key]

    def records(self, jobs: Sequence[tuple[str, str, Callable[[], Part]]]) -> list[Record]:
        """Compute the parts of a run one by one, with progress, and return all their records.

        Parameters
        ----------
        jobs : sequence of (str, str, callable)
            For each part its key, what the progress calls it, and what computes it.
        """
        found: list[Record] = []
        for number, (key, label, compute) in enumerate(jobs):
            found += self.part(key, compute).records
            self.progress(number + 1, len(jobs), label)
        return found

    def progress(self, done: int, total: int, label: str) -> None:
        """Tell how much of the run is done."""
        if self._progress is not None:
            self._progress(done, total, label)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the curves of all parts, under <part>/<name>."""
        return {f"{key}/{name}": v for key, p in self.parts.items() for name, v in p.arrays.items()}

    def _stored(self, key: str) -> tuple[Part, float] | None:
        """Return a part and the seconds that it took; None if it is not stored, or is broken."""
        try:
            return self._read(key), float(self._content(key)["seconds"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
            return None  # it is computed again

    def _store(self, key: str, part: Part, seconds: float) -> None:
        (self.folder / "parts").mkdir(exist_ok=True)
        write_arrays(self.folder / "parts" / f"{key}.npz", part.arrays)
        content = {"records": part.records, "data": part.data, "seconds": seconds}
        write_json(self.folder / "parts" / f"{key}.json", content)

    def _content(self, key: str) -> dict[str, Any]:
        return json.loads((self.folder / "parts" / f"{key}.json").read_text())

    def _read(self, key: str) -> Part:
        content = self._content(key)
        return Part(
            content["records"], read_arrays(self.folder / "parts" / f"{key}.npz"), content["data"]
        )


def checksum(*arrays: NDArray[Any]) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 of arrays: the data of a part."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]


def require_finite(name: str, part: Part) -> None:
    """Raise ArithmeticError if records or curves hold NaN or infinite numbers."""
    for record in part.records:
        for key, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ArithmeticError(f"{name}: {key} = {value} in {record}")
    for key, array in part.arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ArithmeticError(f"{name}: {key} holds NaN or infinite numbers")


def _lines(path: Path) -> Iterator[tuple[bytes, Any]]:
    """Read the whole lines of a log, one at a time, each with its part.

    A kill may have cut the last line, and a full disk one within.
    """
    if not path.exists():
        return
    with path.open("rb") as stream:
        for line in stream:
            with suppress(ValueError, AttributeError):
                if line.endswith(b"\n"):
                    yield line, json.loads(line).get("part")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one step; NaN is refused."""
    with replacing(path) as stream:
        stream.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write an npz file in one step."""
    with replacing(path) as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read an npz file."""
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
