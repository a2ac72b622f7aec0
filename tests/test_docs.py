"""The documentation: its examples run as printed, its tables are what is stored."""

import re
import statistics
from pathlib import Path

import pytest

from mirrorflow.lab import framework
from mirrorflow.lab.experiments.networks._study import interval

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / "docs", ROOT / "docs/tutorials", ROOT / "docs/reference"]
PAGES = [ROOT / "README.md", *(page for folder in FOLDERS for page in sorted(folder.glob("*.md")))]


def blocks(path):
    """Return the Python of a page, block by block, with the output that is printed below it."""
    pattern = r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?"
    return re.findall(pattern, path.read_text(encoding="utf-8"), re.S)


def numbers(text):
    """Return the numbers of an output, and the rest."""
    number = r"-?\d+\.?\d*(?:e-?\d+)?"
    return [float(found) for found in re.findall(number, text)], re.sub(number, "0", text)


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_the_blocks_of_a_page_run_in_order(path, capsys):
    names = {}
    for block, output in blocks(path):
        exec(compile(block, str(path), "exec"), names)
        printed = capsys.readouterr().out
        if output:
            (found, rest), (expected, shown) = numbers(printed), numbers(output)
            assert rest == shown
            assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        if "://" not in link:
            target = path.parent / link
            assert target.exists() or target.with_suffix(".md").exists(), link


# --- The tables of the studies against results/ ---------------------------------------------------

NAMES = {  # a column or a row of a page -> as it is stored
    "refitted": "mirrorflow, refitted",
    "basis pursuit, stopped early": "early-stopped basis pursuit",
    "decay off": "mirrorflow (decay off)",
    "decay kept": "mirrorflow (decay kept)",
    "diabetes with interactions": "diabetes",
    "china, a photograph": "china",
    "flower, a photograph": "flower",
    "digits, one image a row": "digits",
    "Olivetti faces, one image a row": "faces",
}


def stored(name, key):
    """Return a column of the table of a stored study: (data, method) -> number."""
    (result,) = [
        r for r in framework.find_results(ROOT / "results") if r["experiment"] == name
    ]  # fmt: skip
    rows = framework.load(name).table(result["records"])
    return {(case(row), row["method"]): row[key] for row in rows}


def case(row):
    """Name the data of a row as the pages do."""
    if "noise" not in row or row["noise"] is None:
        return row["data"].replace(" truth", "")
    sizes = {"small": "30 x 24", "large": "150 x 120"}
    data = re.sub("small|large", lambda found: sizes[found.group()], row["data"])
    noise = f"noise {row['noise']:g}" if row["noise"] else "no noise"
    return f"{data.replace('measurements', 'measurements, 16 x 12')}, {noise}"


def printed(path, head):
    """Return the cells of the table of a page whose heading begins so: (row, column) -> text."""
    page = path.read_text(encoding="utf-8")
    lines = page[page.index(head) :].split("\n\n")[0].splitlines()
    cells = [[c.strip(" *") for c in line.split("|")[1:-1]] for line in lines]
    return {
        (NAMES.get(row[0], row[0]), NAMES.get(column, column)): cell
        for row in cells[2:] for column, cell in zip(cells[0][1:], row[1:], strict=True) if cell
    }  # fmt: skip


def check(text, number):
    """Compare a printed number with the stored one, to the last digit that is printed."""
    unit = 10.0 ** -len(text.partition(".")[2])
    assert abs(float(text) - number) <= 0.5001 * unit, (text, number)


@pytest.mark.parametrize(
    ("head", "study", "key", "least"),
    [
        ("| | mirrorflow | refitted | lasso", "bench_sparse", "test R²", 110),
        ("| | decay off | decay kept", "bench_lowrank", "relative error", 50),
        ("| test log-loss | L1 |", "bench_logistic", "test log-loss", 75),
        ("| F1 of the support | L1 |", "bench_logistic", "F1 of the support", 45),
    ],
)
def test_the_tables_of_the_estimators_are_what_is_stored(head, study, key, least):
    numbers = stored(study, key)
    cells = printed(ROOT / "docs" / "estimators.md", head)
    assert len(cells) >= least
    for place, text in cells.items():
        check(text, numbers[place])


def test_the_supports_and_the_table_of_the_readme_are_what_is_stored():
    r2, f1 = (stored("bench_sparse", key) for key in ("test R²", "F1 of the support"))
    page = ROOT / "docs" / "estimators.md"
    supports = printed(page, page.read_text().split("as F1 score:\n\n")[1][:200])
    for (data, method), text in supports.items():
        check(text, f1[f"sparse, {data}", method])
    cells = printed(ROOT / "README.md", "| n against d = 200")
    assert len(supports) == 60 and len(cells) == 25
    for (data, method), texts in cells.items():
        for snr, text in zip((1, 3, 10), texts.split(" / "), strict=True):
            kind = "sparse, n ≥ d/2" if data == "its support" else data.replace(" truth", "")
            numbers = f1 if data == "its support" else r2
            check(text, numbers[f"{kind}, SNR {snr}", method])


def test_the_table_of_the_optimizers_is_what_is_stored():
    module = framework.load("beyond_adam")
    (result,) = [
        r for r in framework.find_results(ROOT / "results") if r["experiment"] == module.NAME
    ]
    rows = {(row["optimizer"], row["a"]): row for row in module.table(result["records"])}
    keys = {
        "relative error": "relative error", "from argmin R_a": "from argmin R_a",
        "stored": "log of |w² − m²|, half", "by signs": "log of ||w| − |m||",
        "relative error without decay": "relative error",
    }  # fmt: skip
    cells = printed(ROOT / "docs" / "beyond.md", "| optimizer | relative error")
    for (way, column), text in cells.items():
        a = 0.0 if column.endswith("without decay") else -4.0
        stored = rows[way, a][keys[column]]
        if "e" in text:
            assert float(text) == pytest.approx(stored, rel=0.2)
        else:
            check(text, stored)
    assert len(cells) == 30


def test_the_table_of_the_depths_is_what_is_stored():
    module = framework.load("beyond_depth")
    (result,) = [
        r for r in framework.find_results(ROOT / "results") if r["experiment"] == module.NAME
    ]
    rows = {(str(r["factors"]), r["a"]): r for r in module.table(result["records"])}
    page = ROOT / "docs" / "beyond.md"
    cells = printed(page, "| factors | a = 0")
    for (factors, column), text in cells.items():
        check(text, rows[factors, float(column.removeprefix("a = "))]["relative error"])
    assert len(cells) == 15
    largest = [
        max(r[key] for r in result["records"])
        for key in ("from the scaled start", "from argmin R_a")
    ]
    words = " ".join(page.read_text(encoding="utf-8").split())
    assert f"by {largest[0]:.0e} at most, and from `limit` by {largest[1]:.0e}, over all" in words


def test_the_table_of_the_cut_weights_is_what_is_stored():
    module = framework.load("beyond_pruning")
    (result,) = [
        r for r in framework.find_results(ROOT / "results") if r["experiment"] == module.NAME
    ]
    rows = {row["training"]: row for row in module.table(result["records"])}
    cells = printed(ROOT / "docs" / "beyond.md", "| training | 0% cut")
    for (way, cut), text in cells.items():
        check(text, rows[way][cut])
    assert len(cells) == 20


def test_the_tables_of_the_networks_are_what_is_stored():
    module = framework.load("beyond_networks")
    (result,) = [
        r for r in framework.find_results(ROOT / "results") if r["experiment"] == module.NAME
    ]
    for network, head in (("cnn", "| CNN, accuracy"), ("gpt", "| GPT, loss")):
        cells = printed(ROOT / "docs" / "beyond.md", head)
        for (way, column), text in cells.items():
            cut = 0.0 if column == "whole" else float(column.split("%")[0]) / 100
            found = [
                r["value"] for r in result["records"]
                if (r["network"], r["way"]) == (network, way) and r["cut"] == pytest.approx(cut)
            ]  # fmt: skip
            check(text, statistics.median(found))
        assert len(cells) == 15


def test_the_table_of_truncated_adapters_is_what_is_stored():
    module = framework.load("beyond_truncation")
    (result,) = [
        r for r in framework.find_results(ROOT / "results") if r["experiment"] == module.NAME
    ]
    rows = {(r["adapter"], f"rank {r['rank']}"): r["loss"] for r in module.table(result["records"])}
    whole = {"from the start": "none", "truncated, no decay": "none"}
    whole |= {"truncated, decay kept": "constant", "truncated, decay off": "off"}
    for adapter, kind in whole.items():
        same = [r for r in result["records"] if r["way"] == "whole" and r["kind"] == kind]
        rows[adapter, "rank 8"] = statistics.mean(r["loss"] for r in same)
    cells = printed(ROOT / "docs" / "which-decay.md", "| adapter | rank 8")
    told = {place: text for place, text in cells.items() if text}
    for place, text in told.items():
        check(text, rows[place])
    assert len(told) == 19


def test_the_table_of_the_account_is_what_is_stored():
    module = framework.load("beyond_account")
    found = framework.find_results(ROOT / "results")
    (result,) = [r for r in found if r["experiment"] == module.NAME]
    rows = {row["training"]: row for row in module.table(result["records"])}
    cells = printed(ROOT / "docs" / "beyond.md", "| training | lr | decay alone")
    keys = {"decay alone": "decay alone", "whole account": "whole account"}
    keys["with the tilt"] = "account and tilt"
    for (way, column), text in cells.items():
        if column != "lr":
            assert float(text) == pytest.approx(
                rows[way][f"distance, {keys[column]}"],
                rel=0.06 if column != "with the tilt" else 0.5,
            )
    assert len(cells) == 28


def test_the_table_of_the_gains_is_what_is_stored():
    from mirrorflow.weightdecay.controllers import GAIN

    module = framework.load("beyond_gain")
    found = framework.find_results(ROOT / "results")
    (result,) = [r for r in found if r["experiment"] == module.NAME]
    keys = {"off the target": "off", "at a bound": "at a bound", "change": "swing"}
    keys["within 5% at measurement"] = "first within 5%"
    stored = {
        column: {f"{gain:g}": value for gain, value in module._over_optimizers(
            result["records"], key).items()}
        for column, key in keys.items()
    }  # fmt: skip
    cells = printed(ROOT / "docs" / "beyond.md", "| gain | off the target")
    for (gain, column), text in cells.items():
        value = stored[column][gain]
        if text.endswith("%"):
            assert float(text[:-1]) == pytest.approx(100 * value, abs=0.06 if "." in text else 0.5)
        else:
            assert float(text) == pytest.approx(value, rel=0.12)
    off = stored["off the target"]
    assert len(cells) == 24 and float(min(off, key=off.__getitem__)) == GAIN  # it is the default


def assert_told(cell, numbers):
    """Compare "a ± b" with two numbers, to the digits that are told; "0" with zeros."""
    if cell == "0":
        assert not any(numbers)
        return
    for told, number in zip(cell.split(" ± "), numbers, strict=True):
        digits = len(told.split(".")[1])
        assert float(told) == pytest.approx(number, abs=0.51 * 10**-digits)


def paid_before_a_cut(records, a):
    """Return by how much decay that is switched off raises the loss, and its 95% interval."""
    whole = [r for r in records if r["kept"] == 1]
    none = {r["seed"]: r["loss"] for r in whole if r["kind"] == "none"}
    off = [r for r in whole if r["absorbed"] == a and r["kind"] == ("off" if a else "none")]
    gains = [r["loss"] - none[r["seed"]] for r in off]
    return interval(gains) if a else (0.0, 0.0)


@pytest.mark.parametrize(
    ("network", "head"),
    [("gpt", "| a (switched off at 60%) |"), ("vit", "| a (the ViT, switched off at 60%) |")],
)
def test_the_costs_of_truncation_are_those_of_the_stored_curve(network, head):
    module = framework.load("beyond_compression")
    (result,) = (
        r
        for r in framework.find_results(ROOT / "results")
        if r["experiment"] == module.NAME and r["config"]["network"] == network
    )
    stored = {row["a"]: row for row in module.table(result["records"]) if row["decay"] != "kept"}
    text = (ROOT / "docs" / "which-decay.md").read_text(encoding="utf-8")
    part = text.split(head)[1].split("\n\n")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in part.splitlines()[2:]]
    assert {float(row[0]) for row in rows} == set(stored)
    for a, paid, *cells, ratio in rows:
        row = stored[float(a)]
        assert_told(paid, paid_before_a_cut(result["records"], float(a)))
        assert float(ratio) == pytest.approx(row["ratio"], abs=0.006)
        for cell, name in zip(cells, ("3/4", "1/2", "1/4"), strict=True):
            found = row[f"cost of {name}"], row[f"cost of {name} ± 95%"]
            if cell == "< 0.001":
                assert sum(found) < 0.001
            else:
                assert_told(cell, found)


def test_the_table_of_real_data_sets_is_that_of_its_result():
    module = framework.load("bench_real")
    (result,) = (
        r for r in framework.find_results(ROOT / "results") if r["experiment"] == module.NAME
    )
    found = module.summary(result["records"])
    names = {"refitted": "mirrorflow, refitted"}
    names["basis pursuit, stopped early"] = "early-stopped basis pursuit"
    text = (ROOT / "docs" / "estimators.md").read_text(encoding="utf-8")
    part = text.split("(`results/bench_real/`):\n\n")[1].split("\n\n")[0].splitlines()
    head, _, *rows = [[c.strip() for c in line.strip("|").split("|")] for line in part]
    assert len(rows) == len(found) == len(module.SETS) and len(head) == 11
    for name, *cells in rows:
        key, size = name.rsplit(", ", 1)
        methods = {method: found[key][names.get(method, method)] for method in head[1:]}
        best = max(round(m["r2"], 3) for m in methods.values())
        assert size == f"{methods['mirrorflow']['n']} x {methods['mirrorflow']['d']}"
        for m, cell in zip(methods.values(), cells, strict=True):
            bold = "**" if round(m["r2"], 3) == best else ""
            assert cell == f"{bold}{m['r2']:.3f}{bold} ({m['nonzero']:g})"
    near, sets = module.near_best(result["records"])
    assert (near["mirrorflow"], near["elastic net"], sets) == (4, 4, 8)
    assert near["lasso"] == near["relaxed lasso"] == 5
    fewest = [min(m, key=lambda k: m[k]["nonzero"]) for m in found.values()]
    assert sum(name in ("OMP", "abess") for name in fewest) == 7
    for other, better, worse in (("lasso", 1, 3), ("relaxed lasso", 1, 2)):
        gains = module.gains(result["records"], module.OURS, other).values()
        assert sum(g > 0.01 for g in gains) == better and sum(g < -0.01 for g in gains) == worse
    columns = [(m["relaxed lasso"]["nonzero"], m["mirrorflow"]["nonzero"]) for m in found.values()]
    assert sum(one < other for one, other in columns) == 8
    ours, theirs = (
        ", ".join(f"{m[k]['r2']:.3f}" for m in found.values() if k in m) for k in module.GROUPED
    )
    assert f"({ours} beside {theirs})" in " ".join(text.split())
