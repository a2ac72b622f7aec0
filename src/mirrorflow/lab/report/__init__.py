"""One self-contained HTML page from stored results: it renders and computes nothing.

The page holds everything it needs: the style, the charts with their data, the libraries that draw
them (once), and the explorer of R_a. This package imports nothing of the theory: what an experiment
makes of its stored records (charts, table, verdicts) is handed over as a `Section` by the command
line.
"""

from .page import Section, build

__all__ = ["Section", "build"]
