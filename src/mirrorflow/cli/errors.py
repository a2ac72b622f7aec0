"""Mistakes that the user can mend."""

from __future__ import annotations

import errno
from pathlib import Path

__all__ = ["INTERRUPTED", "UserError", "disk_error"]

INTERRUPTED = "interrupted; finished parts are kept: the same command goes on from them"


class UserError(Exception):
    """What the user can mend: one line, no traceback."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def disk_error(error: OSError, out: Path) -> UserError:
    """Say which file could not be read or written, and what to do."""
    if error.errno is None:  # not of the system: its own sentence
        return UserError(str(error))
    advice = {
        errno.ENOSPC: "Make room and give the same command again.",
        errno.EDQUOT: "Make room and give the same command again.",
        errno.ENOENT: "Give a file that exists.",
    }.get(error.errno, "Give another folder by --out, or mend this one.")
    where = error.filename or f"the folder {out}"
    return UserError(f"{where} must be readable and writable, got: {error.strerror}. {advice}")
