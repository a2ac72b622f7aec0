"""Sphinx: myst for the pages, autodoc for the reference."""

import mirrorflow

project = "mirrorflow"
copyright = "the mirrorflow authors"
version = release = mirrorflow.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
myst_enable_extensions = ["dollarmath"]  # pages write mathematics as $R_a$
exclude_patterns = ["_build"]

napoleon_use_ivar = True  # attributes that are properties, too, are described once
napoleon_google_docstring = False  # docstrings are numpydoc
autodoc_member_order = "groupwise"
autodoc_typehints = "description"
autodoc_mock_imports = ["transformers", "lightning"]  # the reference is made without the extras
# scikit-learn generates these; their text refers to its own pages.
autodoc_default_options = {
    "exclude-members": "set_fit_request, set_score_request, set_predict_request"
}

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
