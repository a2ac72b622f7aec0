"""Where results are kept: a folder, or an object store that fsspec knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["Store"]


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
                f"a store at {url} needs fsspec and its driver: pip install 'mirrorflow[store]'"
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
                draft = here.with_name(f".{here.name}.fetched")
                self._files.get_file(path, str(draft))
                draft.replace(here)

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
