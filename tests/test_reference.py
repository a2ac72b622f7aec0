"""Every public name is in the reference."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import mirrorflow as mf

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"auto(?:function|class):: (?:[\w.]+\.)?(\w+)", PAGE))
INTERNAL = {"check_settings"}  # of the callbacks, not for users


@pytest.mark.parametrize("module", ["weightdecay", "spectrum"])
def test_the_names_of_a_package_are_there(module):
    names = set(importlib.import_module(f"mirrorflow.{module}").__all__)
    assert len(names) > 5 and names - set(mf.__all__) <= NAMED


@pytest.mark.parametrize("module", ["loop", "huggingface", "lightning"])
def test_what_plugs_into_training_is_there(module):
    path = ROOT / "src/mirrorflow/integrations" / f"{module}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))  # not imported: the extras are optional
    (names,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert set(names) - INTERNAL - set(mf.__all__) <= NAMED
