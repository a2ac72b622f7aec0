"""The package exports what it says, lazily, and without letting modules hide functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mirrorflow as mf

SOURCE = Path(mf.__file__).read_text()


def test_every_public_name_can_be_imported_and_is_not_a_module():
    for name in mf.__all__:
        assert not isinstance(getattr(mf, name), type(ast)), name


def test_the_lazy_table_and_the_type_checkers_imports_agree():
    imports = [n for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.ImportFrom) and n.level]
    declared = {(n.module, alias.name) for n in imports for alias in n.names}
    assert declared == {(module, name) for module, names in mf._HOMES.items() for name in names}


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
