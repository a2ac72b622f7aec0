"""Gradient descent as practitioners run it, and the exact account of what it stores in R_a."""

from ._account import Account
from .prediction import predicted_account
from .solve import DescentStats, descend

__all__ = ["Account", "DescentStats", "descend", "predicted_account"]
