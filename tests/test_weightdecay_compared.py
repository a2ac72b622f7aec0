"""The tests that docs/compared.md names are there."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "compared.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_test_that_is_named_exists(file, name):
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_yes_of_ours_names_a_test():
    rows = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("|")]
    ours = [row[-1] for row in rows if len(row) in (4, 10) and set(row[-1]) - set("- ")]
    claims = [cell for cell in ours if cell.strip() not in ("mirrorflow",) and "**no**" not in cell]
    assert len(claims) > 35 and all("::test_" in cell for cell in claims)
