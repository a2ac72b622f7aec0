"""The built documentation without a network: every page is opened from its file, in Chromium."""

import json
import os
import re
from pathlib import Path

import pytest

import browser

BUILT = Path(os.environ.get("MIRRORFLOW_DOCS", Path(__file__).parents[1] / "docs/_build/html"))
# Pages in one run of the browser: each is opened in a frame of a page that looks into it.
BATCH = 25
HARNESS = """<!doctype html><meta charset="utf-8"><pre id="found"></pre><script>
const pages = PAGES;
const found = [];
const until = async (ready) => { while (!ready()) await new Promise(r => setTimeout(r, 20)); };
async function look(page) {
  const frame = document.createElement("iframe");
  frame.style = "width: 1200px; height: 800px";
  const loaded = new Promise(resolve => frame.onload = resolve);
  frame.src = page;
  document.body.append(frame);
  await loaded;
  const view = frame.contentWindow, body = frame.contentDocument;
  if (page.includes("search.html?q="))
    await until(() => body.querySelector("#search-results li a"));
  const formulas = body.querySelectorAll(".math").length;
  if (formulas) {
    await until(() => view.MathJax && view.MathJax.startup && view.MathJax.startup.promise);
    await view.MathJax.startup.promise;
    await body.fonts.ready;
  }
  for (const hidden of body.querySelectorAll("script, style, code, pre, mjx-assistive-mml"))
    hidden.remove();
  found.push({
    page, formulas, results: body.querySelectorAll("#search-results li a").length,
    drawn: body.querySelectorAll("mjx-container").length,
    failed: body.querySelectorAll("mjx-merror, [data-mjx-error]").length,
    raw: (body.body.textContent.match(/\\\\[([\\[]|\\\\[a-zA-Z]+\\{|\\$[^$\\n]*\\\\/g) || []),
    broken: [...body.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
    asked: view.performance.getEntriesByType("resource").map(e => e.name)
      .filter(name => !/^(file|data|blob):/.test(name)),
  });
  frame.remove();
}
(async () => {
  for (const page of pages) await look(page);
  document.getElementById("found").textContent = "FOUND" + JSON.stringify(found) + "END";
})();
</script>"""


def opened(pages, folder):
    """Return what the frames of some addresses show, and the console."""
    harness = folder / "harness.html"
    harness.write_text(HARNESS.replace("PAGES", json.dumps(pages)))
    text, console = browser.dom(
        harness, "--allow-file-access-from-files", "--virtual-time-budget=600000",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    )  # fmt: skip
    return json.loads(re.search("FOUND(.*)END</pre>", text, re.S)[1].replace("&amp;", "&")), console


def built():
    """Return the addresses of all pages."""
    pages = [page.as_uri() for page in sorted(BUILT.rglob("*.html"))]
    if not pages:
        pytest.skip("the documentation is not built: make docs")
    return pages


@pytest.mark.slow
@pytest.mark.browser
def test_every_page_works_without_a_network(tmp_path):
    pages = built()
    formulas = 0
    for i in range(0, len(pages), BATCH):
        found, console = opened(pages[i : i + BATCH], tmp_path)
        assert not console, console
        assert len(found) == len(pages[i : i + BATCH])
        for page in found:
            assert not (page["failed"] or page["raw"] or page["broken"] or page["asked"]), page
            assert page["drawn"] == page["formulas"], page
            formulas += page["formulas"]
    assert formulas > 500


@pytest.mark.browser
def test_the_search_finds_pages_without_a_network(tmp_path):
    (search,) = [page for page in built() if page.endswith("html/search.html")]
    (page,), console = opened([f"{search}?q=SwitchOff"], tmp_path)
    assert not console and page["results"] > 0


@pytest.mark.browser
def test_the_look_sees_raw_formulas_requests_and_errors(tmp_path):
    (tmp_path / "bad.html").write_text(
        "<p>So \\(x^2\\) and $\\mu$</p><img src='missing.png'>"
        "<script src='https://example.org/x.js'></script><script>undefined.x</script>"
    )
    (page,), console = opened([(tmp_path / "bad.html").as_uri()], tmp_path)
    assert len(page["raw"]) == 2 and page["broken"]
    assert any("example.org" in name for name in page["asked"] + console)
    assert any("TypeError" in line for line in console)
