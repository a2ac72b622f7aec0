"""The examples in the README and the documentation run as they are printed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path):
    """Give the Python of a page, block by block."""
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_the_blocks_of_a_page_run_in_order(path, capsys):
    names = {}
    for block in blocks(path):
        exec(compile(block, str(path), "exec"), names)
    capsys.readouterr()


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        if "://" not in link:
            target = path.parent / link
            assert target.exists() or target.with_suffix(".md").exists(), link
