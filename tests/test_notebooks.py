"""What notebooks show of results: short, with the numbers, and escaped."""

import re
from html.parser import HTMLParser

import pytest
import torch

import mirrorflow as mf
from mirrorflow._html import MOST, html_table
from mirrorflow.spectrum import SpectralTracker

EVIL = "<script>alert(1)</script>"


class Tags(HTMLParser):
    """Collect the tags of HTML, and check that they close in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open = set(), []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert all(name == "style" for name, _ in attrs)
        self.tags.add(tag)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


class Evil(torch.nn.Module):
    """Attention under a name that is a script."""

    def __init__(self):
        super().__init__()
        self.add_module(EVIL.replace(".", ""), torch.nn.MultiheadAttention(8, 2))


def scheduled(schedule=None):
    """Return a scheduler after two steps of a model."""
    model = Evil()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    scheduler = mf.WeightDecayScheduler(optimizer, schedule or mf.SwitchOff(0.1, at=1), model=model)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    return scheduler


def pair():
    w0 = (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    return mf.Hadamard(), mf.WeightDecay(), w0


def solved():
    R = mf.legendre(*pair())
    return mf.limit(R, torch.ones(1, 3, dtype=torch.float64), torch.ones(1).double(), -1.0)


def preview():
    scheduler = scheduled()
    return mf.preview(scheduler, 20)


SHOWN = {
    "schedule": (lambda: mf.SwitchOff(0.1, at=30), r"SwitchOff\(0.1, at=30", ["30", "0.1", "-3"]),
    "solution": (solved, r"^Solution\(vertex, value: 3\)$", ["reached the L1 vertex", "residual"]),
    "report": (lambda: mf.check(*pair()), "Theorem 3.2 applies", ["commuting", "regular"]),
    "measurement": (lambda: SpectralTracker(Evil()).measure(),
                    "^Measurement.1 products, mean ratio", ["random", "99%", "Random factors"]),
    "scheduler": (scheduled, r"SwitchOff\(0.1, at=1.0\), step 2, ", ["a absorbed", "-0.01"]),
    "preview": (preview, r"^Preview\(\d groups?, a = ", ["decay", "lr"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_shows_a_table_and_a_terminal_one_line(name):
    make, short, wanted = SHOWN[name]
    found = make()
    assert re.search(short, repr(found)) and "\n" not in repr(found) and len(repr(found)) < 160
    html = found._repr_html_()
    assert {"div", "table", "tr", "td"} <= Tags(html).tags
    assert all(word in html for word in wanted)


def test_the_report_of_a_run_is_shown_by_its_parts():
    from mirrorflow import ControlledDecay

    model = Evil()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    control = ControlledDecay(model, optimizer, mf.Constant(0.1), track_every=1)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        control.step()
    report = control.report()
    assert repr(report).startswith("RunReport(3 steps of AdamW, ")
    html = report._repr_html_()
    assert Tags(html).tags == {"div", "p", "b", "table", "tr", "th", "td"}
    assert "&lt;script&gt;" in html and "What it cannot show" in html


def test_names_of_a_model_are_escaped():
    for found in (SpectralTracker(Evil()).measure(), scheduled(), preview()):
        html = found._repr_html_()
        assert "<script" not in html and "script" not in Tags(html).tags
    assert "&lt;script&gt;" in SpectralTracker(Evil()).measure()._repr_html_()


def test_every_text_of_a_table_is_escaped_and_long_tables_end():
    html = html_table(EVIL, [EVIL], [[EVIL]] * (MOST + 2), [EVIL])
    assert Tags(html).tags == {"div", "p", "b", "table", "tr", "th", "td"}
    assert html.count("&lt;script&gt;") == MOST + 3 and "2 more rows" in html
