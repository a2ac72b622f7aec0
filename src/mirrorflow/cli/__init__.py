"""The command line: parse, call, print. Nothing heavy is imported before a command needs it."""

from .app import app, main
from .errors import UserError

__all__ = ["UserError", "app", "main"]
