"""Mistakes that the user can mend."""

__all__ = ["INTERRUPTED", "UserError"]

INTERRUPTED = "interrupted; finished parts are kept: the same command goes on from them"


class UserError(Exception):
    """What the user can mend: one line, no traceback."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code
