"""Mistakes that the user can mend."""

from __future__ import annotations

import errno
from pathlib import Path

__all__ = ["INTERRUPTED", "UserError", "disk_error", "unreadable"]

INTERRUPTED = "interrupted; finished parts are kept: the same command goes on from them"


class UserError(Exception):
    """What the user can mend: one line, no traceback."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def unreadable(error: OSError, path: Path | None, remedy: str) -> UserError:
    """Say that a file of the user's could not be read, and what to give instead."""
    if error.errno is None or path is None:  # not of the system: its own sentence
        return UserError(str(error))
    return UserError(f"{path} must be a file that can be read, got: {error.strerror}. {remedy}")


def disk_error(error: OSError, out: Path, option: str = "--out") -> UserError:
    """Say which file could not be read or written, and what to do.

    ``option`` names another place. Of drafts, which are hidden, the user knows the folder.
    """
    if error.errno is None:  # not of the system: its own sentence
        return UserError(str(error))
    advice = {
        errno.ENOSPC: "Make room and give the same command again.",
        errno.EDQUOT: "Make room and give the same command again.",
        errno.ENOENT: "Give a file that exists.",
    }.get(error.errno, f"Give another place by {option}, or mend this one.")
    where = Path(error.filename) if isinstance(error.filename, str) else out
    where = where.parent if where.name.startswith(".") else where
    return UserError(f"{where} must be readable and writable, got: {error.strerror}. {advice}")
