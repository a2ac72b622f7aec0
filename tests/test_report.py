"""The page: made from stored results only, self-contained, and drawn by a real browser."""

import json
import math
import re
from importlib import resources
from pathlib import Path

import altair as alt
import numpy as np
import pytest
import torch

import browser
import mirrorflow as mf
from mirrorflow.cli.page import build_page, difference
from mirrorflow.lab import framework, report
from mirrorflow.lab.report import page as pages

NAMES = tuple(framework.experiments())


def section(**changes):
    """Return a small section of a page."""
    chart = alt.Chart(alt.Data(values=[{"x": 0, "y": 1}, {"x": 1, "y": 0}]))
    values = {
        "title": "A <title>",
        "paper": "Figure 1",
        "verdicts": [("It shows & says", "1.5 < 2"), ("More", "3")],
        "result": {
            "experiment": "fig00", "hash": "abc", "config": {"n": 3, "text": "</script>"},
            "status": "completed", "seconds": 1.5, "started": "2026-01-01T00:00:00+00:00",
            "meta": {"versions": {"torch": "2.13.0"}, "device": "cpu"},
        },
        "charts": [("A line </script>.", chart.mark_line().encode(x="x:Q", y="y:Q"))],
        "table": [{"name": "first", "error": 1.23456789e-5, "more": None}],
        "command": "mirrorflow run fig00 --preset cpu",
    }  # fmt: skip
    return report.Section(**{**values, **changes})


@pytest.fixture(scope="module")
def page(tmp_path_factory, smoke):
    """Make the page of all experiments by the command line's own function."""
    for name in NAMES:
        smoke(name)
    return build_page(smoke.out, tmp_path_factory.mktemp("page") / "index.html")


@pytest.fixture(scope="module")
def stored_page(tmp_path_factory):
    """Make the page of the results that the repository holds: their legends are the longest."""
    results = Path(__file__).parents[1] / "results"
    return build_page(results, tmp_path_factory.mktemp("stored") / "index.html")


def test_text_is_escaped_and_the_parts_are_there(tmp_path):
    html = report.build([section()], tmp_path / "deep" / "page.html", "9.9").read_text()
    for part in ("A &lt;title&gt;", "It shows &amp; says", "1.5 &lt; 2", "mirrorflow 9.9",
                 "1.23e-05", "--preset cpu", "versions: torch 2.13.0", "1.5 s"):  # fmt: skip
        assert part in html
    assert html.count("</script>") == html.count("<script")


def test_charts_and_figures_have_names_for_those_who_do_not_see_them(tmp_path):
    html = report.build([section()], tmp_path / "page.html", "1").read_text()
    specs = json.loads(re.search(r'id="charts">(.*?)</script>', html, re.S).group(1))
    assert [spec["description"] for spec in specs.values()] == ["A line </script>."]


def test_long_tables_are_closed_and_a_setting_takes_one_line(tmp_path):
    config = {"seeds": list(range(20)), "text": "a"}
    result = {**section().result, "config": config}
    for count, closed in ((pages.LONG, 0), (pages.LONG + 1, 1)):
        whole = section(table=[{"row": i} for i in range(count)], result=result)
        html = report.build([whole], tmp_path / "page.html", "1").read_text()
        assert html.count(f"<summary>The table: {count} rows</summary>") == closed
        assert html.count("<td class=number>") == count
    written = re.search(r"<pre>({.*?})</pre>", html, re.S).group(1)
    assert json.loads(written.replace("&quot;", '"')) == config and written.count("\n") == 3


def test_runs_of_one_experiment_have_headings_of_their_own():
    def run(hash_, **config):
        return {"experiment": "fig00", "hash": hash_, "config": {"seeds": [0], **config}}

    other = {"experiment": "fig01", "hash": "z", "config": {"seeds": [0]}}
    small, large = run("a", lr=0.1, model="small"), run("b", lr=0.1, model="large")
    again = run("c", lr=0.2, model="large")
    said = [difference(r, [small, large, again, other]) for r in (small, large, again, other)]
    assert said == [" (model small)", " (model large, lr 0.1)", " (model large, lr 0.2)", ""]
    twins = [run("a", lr=0.1), {**run("b", lr=0.1), "config": {"seeds": [1], "lr": 0.1}}]
    assert [difference(r, twins) for r in twins] == [" (result a)", " (result b)"]


def test_the_page_is_replaced_in_one_step_and_leaves_no_draft(tmp_path):
    target = tmp_path / "page.html"
    target.write_text("old")
    report.build([section()], target, "1")
    assert "old" not in target.read_text()[:10]
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_a_failing_figure_leaves_the_old_page(tmp_path):
    target = tmp_path / "page.html"
    target.write_text("old")
    with pytest.raises(ValueError, match="fig00-abc cannot be drawn: AttributeError"):
        report.build([section(charts=[("", None)])], target, "1")
    assert target.read_text() == "old"


def test_the_page_asks_for_nothing_from_the_network(page):
    html = page.read_text()
    html = re.sub(r"<script(.*?)>.*?</script>", r"<script\1>", html, flags=re.S)
    outside = re.findall(r"(?:src|href)=\"([^\"]+)\"", html)
    assert [link for link in outside if not link.startswith(("data:", "#"))] == []
    assert "@import" not in html
    assert page.stat().st_size < 3e6


def test_every_run_has_figure_table_configuration_versions_and_command(page):
    sections = page.read_text().split('<section id="')[1:]
    for name in NAMES:
        (body,) = [s for s in sections if s.startswith(name)]
        assert f"mirrorflow run {name} --preset smoke" in body
        assert 'class="chart"' in body and "<table>" in body and 'class="verdicts"' in body
        assert "torch" in body and "commit:" in body and "&quot;" in body


ALL = '<script>addEventListener("load", () => dispatchEvent(new Event("beforeprint")))</script>'


def whole(page, folder):
    """Copy a page that draws all its charts, as it does before it is printed."""
    own = re.sub('<meta http-equiv="Content-Security-Policy".*?>', "", page.read_text())
    (folder / "whole.html").write_text(own + ALL)
    return folder / "whole.html"


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 500])
@pytest.mark.sample(1)
def test_a_browser_draws_data_in_every_chart_without_complaint(page, width, tmp_path):
    drawn, console = browser.dom(whole(page, tmp_path), f"--window-size={width},2000")
    assert console == []
    charts = re.split(r'<div class="chart[^>]* id="', drawn)[1:]
    specs = json.loads(re.search(r'id="charts">(.*?)</script>', drawn, re.S).group(1))
    assert len(charts) == len(specs) >= 8
    for chart in charts:
        marks = re.findall(r'<g class="mark-(?:line|symbol|area)[^>]*>(.*?)</g>', chart, re.S)
        points = sum(path.count("L") + path.count("A") for mark in marks
                     for path in re.findall(r' d="([^"]*)"', mark))  # fmt: skip
        pictures = chart.count("<image ")
        # The smallest chart of a smoke run has 10 points, or the six pictures of a completion.
        assert points > 5 or pictures > 5, chart[:200]


MEASURE = """<style>body { max-width: 400px !important; margin: 0 !important }</style>
<script>addEventListener("load", () => dispatchEvent(new Event("beforeprint")));
setTimeout(() => {
  document.body.dataset.charts = document.querySelectorAll(".chart svg").length;
  document.body.dataset.cut = JSON.stringify(
  [...document.querySelectorAll(".chart svg")].flatMap((svg) => {
    const room = svg.closest(".chart").getBoundingClientRect().right + 1;
    const cut = [...svg.querySelectorAll(".role-legend, .role-axis-title")]
      .filter((part) => part.getBoundingClientRect().right > room
        || part.getBoundingClientRect().left < -1)
      .map((part) => part.textContent.slice(0, 60));
    const plot = svg.querySelector(".background").getBoundingClientRect().width;
    const found = plot < 200 ? [...cut, `the plot is ${plot} wide`] : cut;
    return svg.querySelector("image") ? [] : found.map((f) => `${svg.closest(".chart").id} ${f}`);
  })); }, 3000);
</script>"""


@pytest.mark.slow
@pytest.mark.browser
def test_on_a_telephone_every_legend_and_title_is_inside_its_chart(stored_page, tmp_path):
    narrow = tmp_path / "narrow.html"
    own = re.sub('<meta http-equiv="Content-Security-Policy".*?>', "", stored_page.read_text())
    narrow.write_text(own + MEASURE)  # parsers add it to the body; the policy would not run it
    drawn, _ = browser.dom(narrow, "--window-size=500,2000")
    said = dict(re.findall(r' data-(charts|cut)="([^"]*)"', drawn))
    assert int(said["charts"]) > 30 and json.loads(said["cut"].replace("&quot;", '"')) == []


@pytest.mark.browser
@pytest.mark.slow
def test_a_chart_has_one_legend_for_each_thing_and_every_line_a_colour(stored_page, tmp_path):
    drawn, _ = browser.dom(whole(stored_page, tmp_path))
    for chart in re.split(r'<div class="chart[^>]* id="', drawn)[1:]:
        titles = re.findall(r'aria-label="Symbol legend titled \'(.*?)\'', chart)
        assert len(titles) == len(set(titles)), (chart[:60], titles)
        for rule in re.findall(r'<line aria-label[^>]*"rule mark"[^>]*>', chart):
            assert ' stroke="' in rule, rule


@pytest.mark.browser
def test_the_browser_test_sees_errors(tmp_path):
    broken = alt.Chart(alt.Data(values=[{"x": 1}])).mark_line().encode(x="x:Q")
    html = report.build([section(charts=[("", broken)])], tmp_path / "page.html", "1").read_text()
    html = html.replace('"mark":{"type":"line"}', '"mark":{"type":"no such mark"}')
    (tmp_path / "broken.html").write_text(html)
    assert browser.dom(tmp_path / "broken.html")[1]


@pytest.mark.browser
def test_the_explorer_draws_its_three_curves(page):
    drawn, _ = browser.dom(page)
    body = drawn[drawn.index('<section id="explorer"') :]
    for name in ("value", "mirror", "metric"):
        svg = re.search(rf'data-explorer="{name}"[^>]*>(.*?)</svg>', body, re.S).group(1)
        (curve,) = re.findall(r'<path class="curve" d="([^"]+)"', svg)
        assert curve.count("L") > 100
        assert "NaN" not in svg
    assert "centre" in body and "range of μ" in body


# --- The explorer's formulas against the Python ones, on a grid -----------------------------------

STARTS = [(1.0, 0.6), (0.05, 2.0), (0.7, 0.71)]
X = [-6.0, -1.5, -0.3, -1e-3, 1e-3, 0.3, 1.5, 6.0]  # beyond, mu of the log ratio saturates
CASES = {
    "hadamard": (mf.Hadamard(), mf.WeightDecay(), (0.0, -0.4, -5.0)),
    "balanced": (mf.Hadamard(), mf.WeightDecay(), (0.0, -0.4, -5.0)),
    "quadratic": (
        mf.CommutingQuadratic(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))[None]),
        mf.WeightDecay(),
        (0.0, -0.4, -5.0),
    ),
    "eigenvalue": (mf.SymmetricFactor(), mf.WeightDecay(), (0.0, -0.4, -5.0)),
    "square": (mf.PowerDifference(1), mf.Separable(), (0.0, -0.4, -3.0)),
    "fourth": (mf.PowerDifference(2), mf.Separable(), (0.0, -0.4, -5.0)),
    "sixth": (mf.PowerDifference(3), mf.Separable(), (0.0, -0.4, -5.0)),
    "ratio": (mf.LogRatio(), mf.Separable(), (0.0, -0.1, -0.15)),
}


def start_of(name, p, q):
    """Translate the explorer's two starting values into w0."""
    match name:
        case "hadamard":
            w0 = ((p + q) / math.sqrt(2), (p - q) / math.sqrt(2))
        case "balanced":
            w0 = (math.sqrt(p), math.sqrt(p))
        case "quadratic":
            return torch.tensor([p, q], dtype=torch.float64)
        case "eigenvalue":
            return torch.tensor([[p]], dtype=torch.float64)
        case _:
            w0 = (p, q)
    return tuple(torch.tensor(w, dtype=torch.float64) for w in w0)


def test_the_grid_covers_every_case_of_the_explorer():
    source = resources.files("mirrorflow.lab.report").joinpath("explorer.js").read_text()
    table = source[source.index("const CASES") : source.index("// What the page shows")]
    assert set(re.findall(r"^  (\w+): \{", table, re.M)) == set(CASES)


@pytest.mark.browser
@pytest.mark.slow
def test_the_explorers_formulas_equal_the_python_ones(tmp_path):
    grid = [
        (name, p, q, a, [x for x in X if name not in ("balanced", "eigenvalue") or x > 0])
        for name, (_, _, rates) in CASES.items() for p, q in STARTS for a in rates
        if name != "ratio" or min(p, q) ** 2 + 2 * a > 0
    ]  # fmt: skip
    computed = in_browser(tmp_path, grid)
    for (name, p, q, a, xs), found in zip(grid, computed, strict=True):
        g, h, _ = CASES[name]
        R = mf.legendre(g, h, start_of(name, p, q))
        laws = {
            "mirror": R.mirror,
            "value": lambda x, a, R=R: R.value(x, a) - R.value(R.centre(a), a),
            "metric": R.metric,
            "back": lambda x, a: x,
        }
        for key, law in laws.items():
            points = [torch.full(R.shape, t, dtype=torch.float64) for t in xs]
            expected = torch.stack([law(x, a).reshape(()) for x in points])
            scale = np.abs(expected.numpy()).max()
            np.testing.assert_allclose(
                found[key], expected.numpy(), rtol=1e-8, atol=1e-11 * scale,
                err_msg=f"{name} {key} at start {p}, {q} and a = {a}",
            )  # fmt: skip
        assert found["centre"] == pytest.approx(R.centre(a).item(), rel=1e-10)


def in_browser(folder: Path, grid):
    """Evaluate the explorer's formulas in a browser."""
    source = resources.files("mirrorflow.lab.report").joinpath("explorer.js").read_text()
    body = """
    const results = GRID.map(([name, p, q, a, xs]) => {
      const R = CASES[name].make(p, q, a), centre = R.primal(0), mirror = xs.map(R.mirror);
      return { mirror, centre, back: mirror.map(R.primal), metric: xs.map(R.metric),
        value: xs.map((x) => R.value(x) - R.value(centre)) };
    });
    document.body.textContent = JSON.stringify(results);
    """
    page = folder / "grid.html"
    page.write_text(
        f"<meta charset=utf-8><link rel=icon href='data:,'><body></body>"
        f"<script>{source}\nconst GRID = {json.dumps(grid)};{body}</script>"
    )
    drawn, console = browser.dom(page)
    assert console == []
    return json.loads(re.search(r"<body>(.*)</body>", drawn, re.S).group(1))
