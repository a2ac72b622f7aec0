"""The package exports what it says, lazily, and without letting modules hide functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mirrorflow as mf


def test_every_public_name_can_be_imported_and_is_not_a_module():
    for name in mf.__all__:
        assert not isinstance(getattr(mf, name), type(ast)), name


def test_the_list_of_public_names_is_that_which_type_checkers_read():
    tree = ast.parse(Path(mf.__file__).with_suffix(".pyi").read_text())
    imported = [n for n in tree.body if isinstance(n, ast.ImportFrom)]
    assert sorted(alias.name for n in imported for alias in n.names) == mf.__all__
    assert all(alias.asname == alias.name for n in imported for alias in n.names)  # a re-export


@pytest.mark.slow
def test_a_function_survives_the_import_of_its_module():
    code = "import mirrorflow.flow, mirrorflow as mf; mf.flow(1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "missing" in done.stderr and "TypeError: flow()" in done.stderr


def test_importing_the_package_does_not_import_torch():
    code = "import sys, mirrorflow; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Nonsense"):
        getattr(mf, "Nonsense" + "")
