"""Sphinx: myst for the guides, notebooks for the tutorials, one page a name for the reference."""

import sys
from pathlib import Path

import mirrorflow

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "mirrorflow"
copyright = "the mirrorflow authors"
version = release = mirrorflow.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "command_pages",
    "linked_names",
    "offline_math",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]  # pages write mathematics as $R_a$
myst_heading_anchors = 2  # a link to a section reads as on GitHub: page.md#its-title
exclude_patterns = ["_build"]
templates_path = ["_templates"]

# Tutorials are notebooks in text form; a cell that raises, or a tutorial of over 2 minutes, fails.
nb_execution_mode = "force"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_merge_streams = True

# By name: an environment of an earlier build does not know of new files.
autosummary_generate = [str(page) for page in (Path(__file__).parent / "reference").glob("*.md")]
default_role = "py:obj"  # `SwitchOff` in a docstring leads to its page
napoleon_use_ivar = True  # attributes that are properties, too, are described once
napoleon_google_docstring = False  # docstrings are numpydoc
autodoc_member_order = "groupwise"
autodoc_typehints = "description"
autodoc_mock_imports = ["transformers", "lightning"]  # the reference is made without the extras
# scikit-learn generates these; their text refers to its own pages.
autodoc_default_options = {
    "exclude-members": "set_fit_request, set_score_request, set_predict_request"
}

copybutton_exclude = ".linenos, .gp, .go"  # neither the prompt nor what a command prints
highlight_language = "none"  # of blocks without a language: outputs are not Python
html_theme = "furo"
html_title = "mirrorflow"
html_static_path = ["_static"]
html_css_files = ["tables.css", "pages.css"]
html_show_search_summary = False  # it fetches pages, which browsers refuse for files
html_copy_source = False  # the sources are in the repository
