"""The reference: every public name has a page, in one group."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import mirrorflow as mf

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
INTERNAL = {"check_settings"}  # of the callbacks, not for users


def listed():
    """Return what the tables of the groups name: the full names, in order."""
    found = []
    for page in PAGES:
        blocks = re.findall(
            r"currentmodule:: ([\w.]+)\n.*?\n\n((?:   \w+\n)+)", page.read_text(), re.S
        )
        found += [f"{module}.{name}" for module, names in blocks for name in names.split()]
    return found


NAMES = listed()
SHORT = {name.rpartition(".")[2] for name in NAMES}


def test_every_name_of_the_package_has_one_page():
    assert {f"mirrorflow.{name}" for name in mf.__all__} <= set(NAMES)
    assert len(NAMES) == len(set(NAMES)) > 100


def test_every_name_that_has_a_page_is_there():
    for name in NAMES:
        module, _, short = name.rpartition(".")
        if module != "mirrorflow.integrations.huggingface":  # an optional extra
            assert hasattr(importlib.import_module(module), short), name


@pytest.mark.parametrize(
    "package", ["weightdecay", "spectrum", "balance", "optim", "descent", "lab.sweep"]
)
def test_the_names_of_a_package_have_a_page(package):
    names = set(importlib.import_module(f"mirrorflow.{package}").__all__)
    assert len(names) > 3
    assert {f"mirrorflow.{package}.{name}" for name in names - set(mf.__all__)} <= set(NAMES)


@pytest.mark.parametrize("module", ["loop", "huggingface", "lightning"])
def test_what_plugs_into_training_is_there(module):
    path = ROOT / "src/mirrorflow/integrations" / f"{module}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))  # not imported: the extras are optional
    (names,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert set(names) - INTERNAL <= SHORT
