"""One self-contained HTML page from stored results: it renders and computes nothing.

The page holds everything it needs: the style, the charts with their data, the libraries that draw
them (once), the figures as SVG for print, and the explorer of R_a. This module imports nothing of
the theory: what an experiment makes of its stored records (figure, charts, table, summary) is
handed over as a `Section` by the command line.
"""

from .page import Section, build

__all__ = ["Section", "build"]
