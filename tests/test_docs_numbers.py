"""Numbers in the prose of README and docs: each is what a file in results/ holds."""

import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmark_tables import TABLES
from mirrorflow.lab import framework
from mirrorflow.lab.experiments.networks._figures import ends as network_ends
from mirrorflow.lab.experiments.networks._study import compared, interval
from mirrorflow.lab.experiments.studies import bench_real as real

ROOT = Path(__file__).parents[1]
NUMBER = r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"


# Results that were made before their files were committed; a new one must not be. Run them again
# from a clean tree, and take them out of here.
def benchmark(name):
    """Return the rows of a benchmark by their case."""
    stored = json.loads((ROOT / "results" / f"{name}.json").read_text())
    return {row["case"]: row for row in stored["rows"]}


def records(name, **where):
    """Return the records of the result of an experiment, those that fit."""
    (path,) = (ROOT / "results" / name).glob("*/result.json")
    found = json.loads(path.read_text())["records"]
    return [r for r in found if all(r.get(key) == value for key, value in where.items())]


def real_counts():
    """Return on how many real data sets ours and the lasso are near the best, and of how many."""
    near, sets = real.near_best(records("bench_real"))
    return near[real.OURS], near["lasso"], sets


def networks_bench():
    """Return what stacked ViTs cost and gain (with 16 wide), and when compilation pays."""
    rows = benchmark("bench_networks")
    large, small = (
        rows[f"gradients of six ViTs {size}"]["times faster stacked"]
        for size in ("32/8, 64 wide, 6 layers, batch 128", "8/4, 16 wide, 2 layers, batch 16")
    )
    compiled = rows["forward and backward pass of the ViT under torch.compile"]
    return [1 / large, small, None, compiled["steps until it pays"]]


def ends(model):
    """Return the median errors of a model of Figure 2, without decay to switched off."""
    found = records("fig02_matrix_sensing", panel="end", model=model)
    names = dict.fromkeys(r["scenario"] for r in found)
    return [statistics.median(r["error"] for r in found if r["scenario"] == n) for n in names]


def limits(key):
    """Return a number of the three end points that were timed."""
    return [row[key] for case, row in benchmark("bench_limit").items() if case.startswith("end")]


def other_regressions():
    """Return the least and most of LassoCV's processor time, of wider and taller data."""
    rows = benchmark("bench_regression").values()
    ratios = [row["times LassoCV's processor time"] for row in rows if "error" in str(row)]
    return [min(ratios[1:-1]), max(ratios[1:-1])]  # but the first, and the spectra


def spectra(case):
    return benchmark("bench_spectrum")[case]


def near_best():
    """Return in how many designs a method is near the best: ours, of all, and some others."""
    counts, designs = framework.load("bench_sparse").near_best(records("bench_sparse"))
    names = "mirrorflow, refitted", "relaxed lasso", "abess"
    return [counts["mirrorflow"], designs, *(counts[name] for name in names)]


def kinds_of_design():
    """Return R^2 of each draw, by truth, whether n < d/2, and SNR, and by method."""
    found: dict[tuple, dict[str, dict]] = {}
    for r in records("bench_sparse", data="synthetic"):
        kind = found.setdefault((r["truth"], r["ratio"] < 0.5, r["snr"]), {})
        kind.setdefault(r["method"], {})[r["correlation"], r["ratio"], r["seed"]] = r["r2"]
    return found


def behind_the_elastic_net():
    """Return by how much R^2 is below the elastic net's, in the worst kind, and how many."""
    found = kinds_of_design().values()
    worst = [statistics.median(r2 - d["mirrorflow"][at] for at, r2 in d["elastic net"].items())
             for d in found]  # fmt: skip
    return [max(worst), len(found)]


def fewer_rows(truth="sparse", *snrs):
    """Return by how much the elastic net's medians are higher with few rows, at these SNRs."""
    return sorted(
        statistics.median(d["elastic net"].values()) - statistics.median(d["mirrorflow"].values())
        for (kind, few, snr), d in kinds_of_design().items()
        if kind == truth and few and snr in (snrs or (1, 3, 10))
    )


def exact_fits():
    """Return the median error without noise with few rows, ours and the lasso's."""
    found = [r for r in records("bench_sparse", data="synthetic", truth="sparse", snr=1e6)
             if r["ratio"] < 0.5]  # fmt: skip
    return [statistics.median(r["error"] for r in found if r["method"] == m)
            for m in ("mirrorflow", "lasso")]  # fmt: skip


def sparse_designs(ratio):
    """Return in how many sparse designs with so many rows we lead the lasso, and of how many."""
    module = framework.load("bench_sparse")
    found = [r for r in records("bench_sparse", data="synthetic", truth="sparse")
             if r["ratio"] == ratio and r["snr"] in (1, 3, 10)]  # fmt: skip
    designs: dict[tuple, dict[str, list[float]]] = {}
    for r in found:
        key = (r["correlation"], r["ratio"], r["snr"])
        designs.setdefault(key, {}).setdefault(r["method"], []).append(r["r2"])
    ahead = sum(
        statistics.median(d[module.OURS]) > statistics.median(d["lasso"]) for d in designs.values()
    )
    return ahead, len(designs)


def supports():
    """Return the range over designs of the median F1 score where rows are many, ours and L1's."""
    found: dict[str, dict[tuple, list[float]]] = {real.OURS: {}, "lasso": {}}
    for r in records("bench_sparse", data="synthetic", truth="sparse"):
        design = r["ratio"], r["snr"], r["correlation"]
        if r["method"] in found and design[0] >= 0.5 and design[1] in (3, 10) and design[2] <= 0.5:
            found[r["method"]].setdefault(design, []).append(r["f1"])
    middles = [[statistics.median(f1) for f1 in of.values()] for of in found.values()]
    return [extreme(of) for of in middles for extreme in (min, max)]


def adapters(kind, rank):
    """Return the mean loss of adapters of rank 8, or cut to a lower rank at the end."""
    way = "whole" if rank == 8 else "at the end"
    same = records("beyond_truncation", kind=kind, way=way, rank=rank)
    return statistics.mean(r["loss"] for r in same)


def dearer(kind):
    """Return by how much decay raises the loss of adapters of rank 8."""
    return adapters(kind, 8) - adapters("none", 8)


def apart():
    """Return how near adapters with decay come to those without, cut to 4 and 2."""
    pairs = [(kind, rank) for kind in ("off", "constant") for rank in (4, 2)]
    assert all(adapters(kind, 6) > adapters("none", 6) for kind in ("off", "constant"))
    return max(abs(adapters(kind, rank) - adapters("none", rank)) for kind, rank in pairs)


def cut_weights(way, cut):
    """Return the median accuracy of networks whose smallest weights were cut."""
    found = records("beyond_pruning", way=way, cut=cut)
    return statistics.median(r["accuracy"] for r in found)


def lost(way, cut, of=statistics.median):
    """Return how many points of accuracy a cut costs, seed by seed."""
    whole = {r["seed"]: r["accuracy"] for r in records("beyond_pruning", way=way, cut=0)}
    after = records("beyond_pruning", way=way, cut=cut)
    return of(100 * (whole[r["seed"]] - r["accuracy"]) for r in after)


def paid_for_zeros():
    """Return what decay costs a whole network; check that cutting 98% costs none of its seeds."""
    ours = cut_weights("MirrorAdam on m * w", 0)
    others = "MirrorAdam on m * w, no decay", "AdamW on plain weights"
    assert lost("MirrorAdam on m * w", 0.98, max) <= 0
    return [100 * (cut_weights(way, 0) - ours) for way in others]


def classified(method, *ratios):
    """Return in how many designs a method has a lower log-loss than L1, of how many, and more."""
    found = framework.load("bench_logistic").compared(records("bench_logistic"), method, *ratios)
    return [found[key] for key in ("wins", "designs", "gain of F1", "worst", "all")]


VIT, SMOLLM = "tab02_fig03b_fig13_vit/a3636156c1b6", "tab03_fig03a_lora/969b6f087374"
LORA = "tab03_fig03a_lora/e5fe45c65044"
HELD = "8, ratio held"


def run_of(folder):
    """Return the study and the records of a stored run of networks."""
    found = json.loads((ROOT / "results" / folder / "result.json").read_text())
    return framework.load(found["experiment"]).STUDY, found["records"]


def gains(folder, family):
    """Return by how much switching off is better: than kept, half, equal budget, none."""
    return [c["gain"] for c in compared(*run_of(folder)) if c["family"] == family]


def metrics(folder):
    """Return the means of all runs that have not diverged, in ascending order."""
    return sorted(end["mean"] for end in network_ends(*run_of(folder)) if not end["diverged"])


def none_of(folder):
    (end,) = [end for end in network_ends(*run_of(folder)) if end["kind"] == "none"]
    return end["mean"]


def family(folder, decay):
    """Return the means of a family: off, kept, half, equal budget."""
    means = {e["kind"]: e["mean"] for e in network_ends(*run_of(folder)) if e["family"] == decay}
    return [means[kind] for kind in ("off", "constant", "half", "budget")]


def lora(run, key):
    """Return the mean over seeds of a number of the LoRA runs."""
    return statistics.mean(r[key] for r in run_of(LORA)[1] if r["run"] == run)


def vit(run, key):
    """Return the mean over seeds of a number of the ViT's runs."""
    return statistics.mean(r[key] for r in run_of(VIT)[1] if r["run"] == run)


def differ(other, key, sign=1, run=None):
    """Return by how much a run of the ViT is above another one, and the 95% interval.

    By default that of the other's family which is switched off in the middle.
    """
    run = run or ("0.8, off at 750" if float(other) < 1 else "8, off at 750")
    ours, theirs = (
        {r["seed"]: r[key] for r in run_of(VIT)[1] if r["run"] == name} for name in (run, other)
    )
    return interval([sign * (value - theirs[seed]) for seed, value in ours.items()])


def early(off):
    """Return the ratio of LoRA runs with decay 0.01 switched off at a step, and what it cost."""
    run = f"0.01, off at {off}"
    return [lora(run, "ratio"), lora(run, "loss") - lora("0", "loss")]


def brought_back():
    """Return which part of the cosine's difference holding lr x decay brings back, by optimizer."""
    rows = framework.load("fig15_fig16_lr_schedule").verdicts(records("fig15_fig16_lr_schedule"))
    said = [outcome for what, outcome in rows if "lr·decay held" in what]
    return [float(re.findall(r"brings (\d+)%", outcome)[0]) for outcome in said]


# A phrase of a page, and the numbers that stand in it: from results/, or by a formula. None is a
# number that is given: a setting, a size. Spaces and line ends are alike.
QUOTES: list[tuple[str, str, Callable[[], list[float | None]]]] = [
    ("README.md", "decay 0.02, switched off half way, ends 56 times closer",
     lambda: [None, ends("factor")[0] / ends("factor")[-1]]),
    ("README.md", "and 18 times closer than a constant decay of the same total",
     lambda: [ends("factor")[1] / ends("factor")[-1]]),
    ("README.md", "the same switch ends 4.4 times closer",
     lambda: [ends("linear")[0] / ends("linear")[-1]]),
    ("README.md", "5e-7 at each of 3,000 steps shrinks a product of two weights by 0.3% at most",
     lambda: [None, None, 100 * (1 - math.exp(-2 * 5e-7 * 3000))]),
    ("README.md", "this schedule shrinks a product of two weights by 11% at most",
     lambda: [100 * (1 - math.exp(-2 * 0.1 * 1e-3 * 600))]),
    ("docs/beyond.md", "costs 0.8 points of accuracy against MirrorAdam without decay, 2.0 against "
     "AdamW. Cutting 98% of the weights", lambda: [*paid_for_zeros(), None]),
    ("docs/beyond.md", "AdamW on $m \\odot w$ with the same decay 19 points",
     lambda: [lost("AdamW on m * w", 0.98)]),
    ("README.md", "| 99% of a small perceptron's weights cut at once | as m · w by `MirrorAdam`: "
     "accuracy 0.966 | by AdamW: 0.488 as m · w, 0.112 as they are | uncut, AdamW has 0.986",
     lambda: [None, cut_weights("MirrorAdam on m * w", 0.99), cut_weights("AdamW on m * w", 0.99),
              cut_weights("AdamW on plain weights", 0.99), cut_weights("AdamW on m * w", 0)]),
    ("README.md", "in our LoRA runs a = -0.08 lowered the ratio from 1.79 to 1.75",
     lambda: [lora("0.002, off at 200", "a"), lora("0", "ratio"),
              lora("0.002, off at 200", "ratio")]),
    ("README.md", "AdamW at a = -1.5, five seeds, by 0.044 switched off and by 0.056 kept",
     lambda: [None, dearer("off"), dearer("constant")]),
    ("README.md", "than truncated adapters without decay, or within 0.013 of them",
     lambda: [apart()]),
    ("README.md", "an SNR of 3 or 10 and columns that are correlated by 0.5 at most, the F1 score "
     "of its support is 0.82 to 1.00, the lasso's 0.42 to 0.58",
     lambda: [None, None, None, *supports()]),
    ("README.md", "the relaxed lasso is near the best method in 11 of 18 noisy designs, ours in 7",
     lambda: [near_best()[3], near_best()[1], near_best()[0]]),
    ("docs/which-decay.md", "(from rank 8 to 4 0.042 of loss switched off and 0.039 kept, instead "
     "of 0.088)",
     lambda: [None, None, *(adapters(kind, 4) - adapters(kind, 8)
                            for kind in ("off", "constant", "none"))]),
    ("docs/which-decay.md", "in 0.24% of the time of a LoRA step",
     lambda: [100 * next(r["part of a step"] for case, r in benchmark("bench_overhead").items()
                         if "account of D" in case)]),
    ("docs/which-decay.md", "to ranks 4 and 2 within 0.013 of those without",
     lambda: [None, None, apart()]),
    ("docs/tutorials/fine-tune-lora.md", "of 0.2 to 0.6 in total cost 0.005 to 0.019 of loss",
     lambda: [-lora("0.01, off at 100", "a"), -lora("0.01, off at 300", "a"), early(100)[1],
              early(300)[1]]),
    ("README.md", "than the lasso in 7 of 9 noisy designs, with half as many rows in 4 of 9",
     lambda: [*sparse_designs(1.0), *sparse_designs(0.5)]),
    ("README.md", "real data sets ours is within 0.01 of the best R² on four, the lasso on five",
     lambda: [real.NEAR if real_counts() == (4, 5, 8) else math.nan]),
    ("docs/experiments.md", "take 1.4 times as long as in turn on two cores (stacking pays only "
     "for toys: 1.8 times as fast at 16 wide), and torch.compile pays after 10,600 steps",
     lambda: networks_bench()),
    ("docs/estimators.md", "lasso in 7 of 9 designs with noise, with n = d/2 in 4 of 9",
     lambda: [*sparse_designs(1.0), None, *sparse_designs(0.5)]),
    ("docs/estimators.md", "in 7 of these 18 designs (refitted in 9; the relaxed lasso in 11, "
     "abess in 8)", near_best),
    ("docs/estimators.md", "draw by draw, is 0.015 in the median of the worst of the 16 kinds of "
     "design", behind_the_elastic_net),
    ("docs/estimators.md", "elastic net's medians are higher by 0.03 to 0.07",
     lambda: [fewer_rows()[0], fewer_rows()[-1]]),
    ("docs/estimators.md", "few rows, a dense truth and no noise they are higher by 0.08",
     lambda: [fewer_rows("dense", 1e6)[0]]),
    ("docs/estimators.md", "(relative error 0.65 with few rows, the lasso's 0.45)", exact_fits),
    ("README.md", "| end of training of m · w | 0.7 ms | 200,000 gradient steps in Numba: 190 to "
     "340 times as long |",
     lambda: [1e3 * min(limits("seconds")), None, min(limits("ratio to Numba")),
              max(limits("ratio to Numba"))]),
    ("README.md", "| spectra of 24 LoRA products of width 768 | 0.22 ms | dense SVDs in float64: "
     "5,500 times as long |",
     lambda: [None, None, 1e3 * spectra("LoRA r = 8, 24 pairs of width 768")["seconds"],
              spectra("LoRA r = 8, 24 pairs of width 768")["ratio, at equal accuracy"]]),
    ("README.md", "| cross-validated sparse regression, 100 x 500 | `MirrorFlowRegressorCV` | "
     "`LassoCV` | ours takes 1.3 times its processor time",
     lambda: [None, None, benchmark("bench_regression")[
         "cross-validation, 100 x 500, 10 non-zeros, SNR 10"]["times LassoCV's processor time"]]),
    ("README.md", "0.5 to 1.1 times for wider and taller data", other_regressions),
    ("docs/experiments.md", "Decay 0.01 switched off at 2/5 ends 0.040 below the same decay kept, "
     "0.014 below half of it, and 0.009 below the constant one of equal budget",
     lambda: [None, None, None, *gains("tab03_fig03a_lora/e5fe45c65044", 0.01)[:3]]),
    ("docs/experiments.md", "a = -0.98 where it is kept and -0.40 where it is switched off",
     lambda: [lora("0.01", "a"), lora("0.01, off at 200", "a")]),
    ("docs/faq.md", "$a = -0.2$ in the first fifth of the run lowered the ratio from 1.79 to 1.70 "
     "for 0.005 of loss", lambda: [lora("0.01, off at 100", "a"), lora("0", "ratio"), *early(100)]),
    ("docs/faq.md", "$a = -0.4$ in the first two fifths to 1.62 for 0.011",
     lambda: [lora("0.01, off at 200", "a"), *early(200)]),
    ("docs/experiments.md", "(2.309 against 2.311 to 2.36)",
     lambda: [metrics("tab03_fig03a_lora/e5fe45c65044")[0], None, None]),
    ("docs/experiments.md", "Decay 0.1 switched off ends at 3.851, kept 3.877, half 3.858, "
     "equal budget 3.855; decay 0.02 at 3.8389, 3.8445, 3.8400, 3.8395, the last too near the "
     "first for one seed. Training without decay is best again (3.836)",
     lambda: [None, *family(SMOLLM, 0.1), None, *family(SMOLLM, 0.02), metrics(SMOLLM)[0]]),
    ("docs/experiments.md", "neither from kept (+1.0 ± 2.7 points) nor from the constant one of "
     "equal budget (-0.1 ± 4.1) nor from half of it (-2.4 ± 2.6)",
     lambda: [*differ("8", "accuracy"), *differ("6.36", "accuracy"), *differ("4", "accuracy")]),
    ("docs/experiments.md", "is below kept, by 0.074 ± 0.008 and 0.004 ± 0.002",
     lambda: [*differ("8", "loss", -1), *differ("0.8", "loss", -1)]),
    ("docs/experiments.md", "from 2.49 to 1.37 at a = -6.0",
     lambda: [vit("0", "ratio"), vit("8", "ratio"), vit("8", "a")]),
    ("docs/experiments.md", "(48.45%; the best is 48.48%)",
     lambda: [none_of(VIT), metrics(VIT)[-1]]),
    ("docs/experiments.md", "1.78 for 2.0 with the ViT", lambda: [vit(HELD, "ratio"), None]),
    ("docs/experiments.md", "it absorbs 45% less than the decay that is kept, and ends level with "
     "it (+0.3 ± 0.5 points)",
     lambda: [100 * (1 - vit(HELD, "a") / vit("8", "a")), *differ("8", "accuracy", run=HELD)]),
    ("docs/experiments.md", "decay soon acts no more (43.0%, as at step 1,125)",
     lambda: [vit("8, off when level", "accuracy"), None]),
    ("docs/experiments.md", "brings 40% and 35% of the difference back", lambda: brought_back()),
    ("docs/estimators.md", "It is below in 7 of 18, with an F1 higher by 0.12 in the median, and "
     "worse by 0.17 in the worst of all 45",
     lambda: classified("flow")),
    ("docs/estimators.md", "wherever cross-validation does not clearly prefer the flow, in 8 of 18",
     lambda: classified("flow, or L1 or ridge")[:2]),
    ("docs/estimators.md", "the flow is ahead of L1 in 7 of 9 designs",
     lambda: classified("flow", (1.5,))[:2]),
]  # fmt: skip
# What else stands in the README as a number: versions, settings, names, the study's size.
GIVEN = (
    r"Python 3\.11 or newer", r"older than 2\.13", r"a study of 96 designs", r"by 0\.5 or 0\.9",
    r"correlated by 0\.9", r"SNR 1 / 3 / 10", r"d = 200", r"d/2", r"arXiv 2504\.12883",
    r"Apache-2\.0", r"fig02_matrix_sensing",
)  # fmt: skip


def prose(page):
    """Return a page without its code, its links' targets and line ends."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", " ", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return " ".join(text.split())


def check(text, number):
    """Compare a printed number with the stored one, to the last digit that is printed."""
    plain = text.replace(",", "")
    if "." in plain:
        unit = 10.0 ** -len(plain.partition(".")[2])
    else:  # 21,100 has three digits
        unit = 10.0 ** (len(plain) - len(plain.rstrip("0")))
    assert abs(float(plain) - number) <= 0.501 * unit, (text, number)


@pytest.mark.parametrize(("page", "phrase", "source"), QUOTES, ids=[q[1][:40] for q in QUOTES])
def test_a_quoted_number_is_the_stored_one(page, phrase, source):
    assert phrase in prose(page), "the phrase has changed: change it here, with its source"
    printed, stored = re.findall(NUMBER, phrase), source()
    assert len(printed) == len(stored), (printed, stored)
    for text, number in zip(printed, stored, strict=True):
        if number is not None:
            check(text, number)


def test_no_number_of_the_readme_is_without_a_source():
    text = prose("README.md")
    for _, phrase, _ in (quote for quote in QUOTES if quote[0] == "README.md"):
        text = text.replace(phrase, " ")
    for given in GIVEN:
        text = re.sub(given, " ", text)
    tables = re.sub(r"\|[^|]*(?:-?\d\.\d+ / ?)+[^|]*\|", "|", text)  # checked by test_docs.py
    left = re.sub(r"-?\d\.\d+ / -?\d\.\d+ / -?\d\.\d+", "", tables)
    assert re.findall(NUMBER, left) == []


# --- docs/benchmarks.md ---------------------------------------------------------------------------


def printed_table(columns):
    """Return the table of the page with these columns: case -> cells."""
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    head = f"| case | {' | '.join(columns)} |"
    lines = page[page.index(head) :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {case: cells for case, *cells in rows}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_benchmarks_is_what_is_stored(name):
    columns, stored = TABLES[name], benchmark(name)
    shown = printed_table(columns)
    for case, row in stored.items():
        cells = shown.pop(case, [""] * len(columns))
        for cell, (key, factor) in zip(cells, columns.values(), strict=True):
            assert bool(cell) == isinstance(row.get(key), (int, float)), (case, key)
            if cell:
                check(cell, factor * row[key])
    assert shown == {}


# What a row times beside the baselines: parts of ours, and what no program can be faster than.
OWN = re.compile(r"limit|from memory|from cache|arithmetic|reading|plain step")


@pytest.mark.parametrize("name", TABLES)
def test_every_baseline_of_a_result_file_stands_in_its_table(name):
    heads = " ".join(TABLES[name]).lower()
    for row in benchmark(name).values():
        for key in row:
            if key.endswith(", seconds") and not OWN.match(key):
                words = re.findall(r"[a-z]{4,}", key.removesuffix(", seconds").lower())
                assert any(word in heads for word in words), key


def test_every_benchmark_has_a_table():
    stored = {path.stem for path in (ROOT / "results").glob("bench_*.json")}
    assert stored == set(TABLES)


# --- Where results come from ----------------------------------------------------------------------


def commits():
    """Return the commit of each stored result, by the name of its file or folder."""
    for path in (ROOT / "results").glob("*.json"):
        yield path.stem, json.loads(path.read_text())["machine"]["commit"]
    for path in (ROOT / "results").glob("*/*/result.json"):
        yield path.parent.name, json.loads(path.read_text())["meta"]["commit"]


def test_no_result_is_made_from_a_tree_with_uncommitted_changes():
    for name, commit in commits():
        assert re.fullmatch(r"[0-9a-f]{40}", commit), (name, commit)
