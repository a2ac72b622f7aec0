"""MathJax beside the pages, from a package, so that formulas need no network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.fileutil import copy_asset

# The program for TeX with its fonts, and what it loads on demand: 2 of the package's 24 MB.
PARTS = ("tex-chtml.js", "output/chtml/fonts/woff-v2", "input/tex/extensions")


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Copy MathJax to the static files of the built pages."""
    found = importlib.util.find_spec("sphinx-mathjax-offline")
    if error is None and found is not None and found.origin is not None:
        source = Path(found.origin).parent / "static" / "mathjax"
        for part in PARTS:
            target = Path(app.outdir, "_static", "mathjax", part)
            target.parent.mkdir(parents=True, exist_ok=True)
            folder = target if (source / part).is_dir() else target.parent
            copy_asset(source / part, folder)


def setup(app: Sphinx) -> dict[str, bool]:
    """Serve formulas by the copy."""
    app.setup_extension("sphinx.ext.mathjax")
    app.config.mathjax_path = "mathjax/tex-chtml.js"
    # The menu would load parts that are not copied.
    app.config.mathjax3_config = {"options": {"enableMenu": False}}
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
