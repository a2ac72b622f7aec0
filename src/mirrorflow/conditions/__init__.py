r"""The conditions of the theory for a pair (g, h): regular, commuting, well posed, contracting."""

from ._homogeneity import homogeneity_degree
from .check import check
from .report import Condition, Report

__all__ = ["Condition", "Report", "check", "homogeneity_degree"]
