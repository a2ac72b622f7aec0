"""Data that does not ship with a package: from the user's data folder, or downloaded into it."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from pathlib import Path

from .storage import hold

__all__ = ["data_file", "data_home"]


def data_home() -> Path:
    """Return the folder of data: $MIRRORFLOW_DATA, or ~/.cache/mirrorflow."""
    return Path(os.environ.get("MIRRORFLOW_DATA") or Path.home() / ".cache" / "mirrorflow")


def data_file(name: str, url: str, sha256: str | None = None) -> Path:
    """Find a file in the data folder, or download it there, and check what was downloaded.

    Raises
    ------
    OSError
        If it is not there and cannot be downloaded; the message says where to put it.
    ValueError
        If what was downloaded is another file than the one this experiment was made for.
    """
    path = data_home() / name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold(path.with_name(f".{path.name}.lock"), lambda holder: None):
        if not path.exists():  # another process may have downloaded it meanwhile
            _download(url, path, sha256)
    return path


def _download(url: str, path: Path, sha256: str | None) -> None:
    """Download a file, and check it."""
    draft = path.with_name(f".{path.name}.part")  # a killed download's is written over
    try:
        urllib.request.urlretrieve(url, draft)
        digest = hashlib.sha256(draft.read_bytes()).hexdigest()
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OSError(
            f"{path.name} is neither at {path} nor could it be downloaded from {url} ({error}): "
            "put it there, or set MIRRORFLOW_DATA to the folder that holds it"
        ) from error
    if sha256 is not None and digest != sha256:
        draft.unlink()
        raise ValueError(
            f"{url} has the checksum {digest}, expected {sha256}: the file has changed"
        )
    draft.replace(path)
