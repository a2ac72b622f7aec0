"""docs/compared.md: every row answers for every rival, and for us by tests that are there."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "compared.md").read_text(encoding="utf-8")
ANSWERS, BEHIND = PAGE.split("## The tests behind our column")
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE)))
ROWS = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in ANSWERS.splitlines()
    if re.match(r"\| [^|]", line)
]
OTHERS = {row[0]: row[2] for row in ROWS if len(row) == 3}
OURS = {row[0]: row[1] if len(row) == 3 else row[-1] for row in ROWS}
NAMES = re.findall(r"^- \*\*(\w+)\*\*", ANSWERS.split("## Schedules")[0], re.M)
LOOPS = ("CPR", "AlphaDecay")  # no schedulers: they are asked about closed loops alone


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_test_that_is_named_exists(file, name):
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_yes_of_ours_names_a_test():
    claims = [row for row, cell in OURS.items() if "**no**" not in cell]
    behind = dict(re.findall(r"^- (.*?): (`test_.*)$", BEHIND, re.M))
    assert len(claims) > 50 and list(behind) == claims


def test_the_page_names_the_others():
    assert len(NAMES) == 12 and set(LOOPS) < set(NAMES)


@pytest.mark.parametrize("row", OTHERS)
def test_every_row_has_one_answer_for_each_of_the_others(row):
    words = re.sub(r"`[^`]*`", "", OTHERS[row])
    counts = {name: len(re.findall(rf"\b{name}\b", words)) for name in NAMES}
    assert max(counts.values()) <= 1, counts
    loops = row in PAGE.split("## Closed loops")[1].split("## Spectra")[0]
    asked = {name for name in NAMES if loops or name not in LOOPS}
    found = {name for name, count in counts.items() if count}
    rest = len(re.findall(r": (?:.*, )?the others\b|: all$", words))
    assert found <= asked and (rest == 1) == (found != asked), asked - found
