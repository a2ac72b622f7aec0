"""`recommend` says what is stored, and nothing that is not: each number again from results/."""

import json
import math
import re
import statistics
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from scipy.stats import t as student
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

import mirrorflow as mf
from mirrorflow.optim import overparametrize
from optimizers import Plain, quiet

ROOT = Path(__file__).parents[1]
TABLES = tomllib.loads((ROOT / "src/mirrorflow/control/evidence.toml").read_text("utf-8"))


def records(result):
    return json.loads((ROOT / result / "result.json").read_text("utf-8"))


def interval(values):
    n = len(values)
    if n == 1:
        return math.nan
    return student.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n)


def close(value, rel=1e-2, floor=0.0):
    return pytest.approx(value, rel=rel, abs=floor, nan_ok=True)


@pytest.mark.parametrize("study", TABLES["study"], ids=lambda s: s["result"].split("/")[-1])
def test_the_numbers_of_a_study_are_those_of_its_results(study):
    stored = records(study["result"])
    runs = defaultdict(dict)
    for row in stored["records"]:
        if stored["experiment"] == "beyond_truncation":  # adapters before they were cut
            if row["way"] != "whole":
                continue
            off = stored["config"]["off"] if row["kind"] == "off" else None
            names = {"none": "0", "constant": "decay kept", "off": f"decay off at {off}"}
            row |= {"run": names[row["kind"]], "ratio": math.nan, "off": off}
        runs[row["run"]][row["seed"]] = row
    assert len(runs["0"]) == study["seeds"] and stored["config"]["steps"] == study["steps"]
    fixed = {run for run, by in runs.items() if by[0]["kind"] not in ("hold", "level")}
    assert {arm["run"] for arm in study["arms"]} == fixed  # none is left out
    for arm in study["arms"]:
        rows = runs[arm["run"]]
        gaps = [row["loss"] - runs["0"][seed]["loss"] for seed, row in rows.items()]
        for key in ("a", "ratio", "loss"):
            mean = statistics.mean(row[key] for row in rows.values())
            assert arm[key] == close(mean, rel=1e-4)
        assert arm["gap"] == close(statistics.mean(gaps), floor=1e-6)
        assert arm["interval"] == close(interval(gaps), rel=0.06)
        off = rows[0]["off"]
        assert arm["off"] == pytest.approx(1.0 if off is None else off / study["steps"])


def test_the_studies_are_of_the_optimizers_that_they_name():
    for study in TABLES["study"]:
        config = records(study["result"])["config"]
        assert study["optimizer"] == ("SGD" if "momentum" in config else "AdamW")


@pytest.mark.parametrize("curve", TABLES["curve"], ids=lambda s: s["result"].split("/")[-1])
def test_a_curve_of_truncation_is_that_of_its_results(curve):
    stored = records(curve["result"])
    runs = defaultdict(dict)
    for row in stored["records"]:
        runs[row["absorbed"], row["kind"]][row["seed"], row["kept"]] = row
    seeds, kept = stored["config"]["seeds"], curve["kept"]
    assert (kept, len(seeds)) == (stored["config"]["kept"], curve["seeds"])
    assert stored["config"]["steps"] == curve["steps"]
    assert not any(row["diverged"] for row in stored["records"])
    whole = {run: [by[seed, 1.0] for seed in seeds] for run, by in runs.items()}
    none = [row["loss"] for row in whole[0.0, "none"]]
    arms = {}
    for arm in curve["arms"]:
        run = arm["a"], "none" if arm["a"] == 0 else "constant" if arm["off"] == 1 else "off"
        arms[run] = arm
        for key in ("a", "ratio", "loss"):
            assert arm[key] == close(statistics.mean(r[key] for r in whole[run]), 1e-4, 1e-12)
        gaps = [row["loss"] - first for row, first in zip(whole[run], none, strict=True)]
        assert arm["gap"] == close(statistics.mean(gaps), floor=1e-6)
        assert arm["interval"] == close(interval(gaps), rel=0.06)
        off = whole[run][0]["off"]
        assert arm["off"] == pytest.approx(1.0 if off is None else off / curve["steps"])
        for name, key in (("cut", "loss"), ("after", "after")):
            means = [statistics.mean(runs[run][seed, k][key] for seed in seeds) for k in kept]
            assert arm[name] == close(means, rel=1e-4)
        for place, k in enumerate(kept):
            costs = [runs[run][s, k]["loss"] - runs[run][s, 1.0]["loss"] for s in seeds]
            assert arm["cost"][place] == close(statistics.mean(costs), floor=1e-6)
            assert arm["spread"][place] == close(interval(costs), rel=0.06)
    assert arms.keys() == runs.keys()  # none is left out


def test_the_errors_of_recoveries_are_those_of_their_results():
    for table in TABLES["recovery"]:
        product = {"m*w": "m·w", "factor": "factor"}[table["product"]]
        rows = [
            r
            for r in records(table["result"])["records"]
            if r.get("panel", "end") == "end" and r["model"] == product
        ]
        for arm in table["arms"]:
            off = arm["off"] < 1
            same = [r for r in rows if r["a"] == arm["a"]]
            if table["product"] == "factor":
                same = [r for r in same if r["scenario"].endswith("off") == off]
            errors = [r["error"] for r in same]
            assert len(errors) == table["seeds"]
            assert arm["error"] == close(statistics.median(errors))


@pytest.mark.parametrize("table", TABLES["fall"], ids=lambda s: s["optimizer"])
def test_the_fall_of_the_ratio_in_fine_tuning_is_that_of_its_results(table):
    name = table["optimizer"].lower()
    rows = [
        r
        for r in records(table["result"])["records"]
        if r["optimizer"] == name and r["rate"] == "constant"
    ]
    decays = sorted({r["decay"] for r in rows})
    ends = [{r["seed"]: r for r in rows if r["decay"] == d} for d in (decays[0], decays[-1])]
    falls = [ends[0][seed]["ratio"] - ends[1][seed]["ratio"] for seed in ends[0]]
    assert len(falls) == table["seeds"]
    assert table["fall"] == close(statistics.mean(falls), rel=0.03)
    assert table["interval"] == close(interval(falls), rel=0.3)
    assert -table["a"] == close(statistics.mean(r["budget"] for r in ends[1].values()))


# What is recommended


def lora():
    peft = pytest.importorskip("peft")
    net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    return peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["0", "1"]))


def attention():
    return torch.nn.MultiheadAttention(16, 4)


def products():
    net = torch.nn.Linear(6, 6)
    overparametrize(net)
    return net


def arms_of(found) -> list:
    """Return the stored runs, whatever their kind."""
    return list(found.numbers)


def switch(found) -> mf.SwitchOff:
    """Return the schedule, which is a switch-off here."""
    assert isinstance(found.schedule, mf.SwitchOff)
    return found.schedule


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


MODELS = [lora, attention, products, lambda: torch.nn.Linear(3, 3)]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("cls", [SGD, AdamW, Adam])
def test_for_the_loss_no_decay_is_recommended(make, cls):
    model = make()
    found = mf.recommend(model, cls(trained(model), lr=0.1), None, 100, "loss")
    assert found.schedule is None and found.a == 0 and found.unknown
    for result in found.evidence:
        assert (ROOT / result / "result.json").is_file()
    if make in (lora, attention):  # in what is stored no run with decay is clearly better
        for study in TABLES["study"]:
            assert all(not arm["gap"] < -arm["interval"] for arm in study["arms"])
        assert "No decay ended at a loss of" in found.reason and found.evidence


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("goal", ["loss", "rank", "sparsity"])
@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_whatever_is_named_is_stored(make, goal, cls):
    model = make()
    found = mf.recommend(model, cls(trained(model), lr=0.1), None, 1000, goal)
    assert all((ROOT / result / "result.json").is_file() for result in found.evidence)
    if found.schedule is not None:
        assert found.evidence and found.numbers and found.unknown
    if goal == "rank":
        rests = found.evidence if make is attention else found.unknown
        assert any("beyond_compression" in what for what in rests)
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80 and text.startswith(f"For {goal}: ")
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["goal"] == goal


def acted(optimizer, lr, schedule, steps):
    """Return a of a literal run on a weight of 1 whose gradient is 0."""
    scheduler = mf.WeightDecayScheduler(optimizer, schedule)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        lr.step()
    return scheduler.accumulated[0]


@pytest.mark.filterwarnings("ignore::mirrorflow.weightdecay.CoupledDecayWarning")
@pytest.mark.parametrize(
    ("make", "cls", "settings"),
    [
        (lora, AdamW, {}),
        (lora, SGD, {"momentum": 0.9}),
        (lora, SGD, {"momentum": 0.9, "dampening": 0.5}),
        (attention, SGD, {"momentum": 0.8, "nesterov": True}),
        (attention, AdamW, {}),
        (attention, SGD, {}),
    ],
)
def test_the_schedule_for_rank_comes_to_the_a_of_the_stored_run(make, cls, settings):
    model = make()
    optimizer = cls(trained(model), lr=0.02, weight_decay=1.0, **settings)
    lr = CosineAnnealingLR(optimizer, T_max=400)
    found = mf.recommend(model, optimizer, lr, 400, "rank")
    offs = {round(400 * arm.off) for arm in arms_of(found) if arm.a}
    assert getattr(found.schedule, "at", 400) in offs
    real = acted(optimizer, lr, found.schedule, 400)
    assert real == pytest.approx(found.a, rel=1e-6)
    assert any(found.a == pytest.approx(arm.a, rel=1e-3) for arm in arms_of(found))
    differs = cls is not {lora: SGD, attention: AdamW}[make]
    assert differs == any("the stored runs are of" in what for what in found.unknown)


OPTIMIZERS = {
    "adamw": (AdamW, {}),
    "adam, decoupled": (Adam, {"decoupled_weight_decay": True}),
    "adam, from outside": (Adam, {}),
    "sgd": (SGD, {}),
    "sgd momentum": (SGD, {"momentum": 0.9}),
    "sgd dampening": (SGD, {"momentum": 0.9, "dampening": 0.5}),
    "sgd nesterov": (SGD, {"momentum": 0.8, "nesterov": True}),
    "fixed": (Plain, {}),
}
LRS = {
    "none": lambda optimizer, steps: None,
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, T_max=steps),
    "warm-up": lambda optimizer, steps: LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 50)),
    "cycle": lambda optimizer, steps: OneCycleLR(
        optimizer,
        max_lr=[3 * group["lr"] for group in optimizer.param_groups],
        total_steps=steps,
        cycle_momentum="momentum" in optimizer.defaults and optimizer.defaults["momentum"] > 0,
    ),
    "list": lambda optimizer, steps: [0.02 * (1 - t / steps) for t in range(steps)],
}


@quiet
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("lrs", LRS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_preview_of_a_recommended_schedule_comes_to_the_recommended_a(name, lrs, place):
    (cls, settings), model, steps = OPTIMIZERS[name], attention(), 300
    others = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(others, (1e-5, 0.5), strict=True)]
    groups.insert(place, {"params": list(model.parameters()), "lr": 0.02})
    optimizer = cls(groups, weight_decay=0.1, **settings)
    lr = LRS[lrs](optimizer, steps)
    found = mf.recommend(model, optimizer, lr, steps, "rank")
    assert any(found.a == pytest.approx(arm.a, rel=1e-3) for arm in arms_of(found) if arm.a)
    outside = name == "adam, from outside"
    with mf.WeightDecayScheduler(optimizer, found.schedule, decoupled=outside) as scheduler:
        seen = mf.preview(scheduler, steps, lr)
    assert seen.outlooks[place].a == pytest.approx(found.a, rel=1e-9)


@quiet
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_group_without_decay_needs_a_rule(decay):
    model, other = attention(), torch.nn.Parameter(torch.ones(4))
    groups = [{"params": [other], "weight_decay": 0.1}, {"params": list(model.parameters())}]
    optimizer = SGD(groups, lr=0.02, weight_decay=decay)
    found = mf.recommend(model, optimizer, None, 300, "rank")
    assert ("groups=[(1, schedule)]" in found.reason) == (decay == 0)
    rules = [(1, found.schedule)] if decay == 0 else []
    with mf.WeightDecayScheduler(optimizer, found.schedule, groups=rules) as scheduler:
        assert mf.preview(scheduler, 300).outlooks[1].a == pytest.approx(found.a, rel=1e-9)


def test_of_a_buffer_that_is_there_already_no_step_is_the_first():
    model = attention()
    optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9, dampening=0.9, weight_decay=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    found = mf.recommend(model, optimizer, None, 300, "rank")
    with pytest.warns(mf.weightdecay.CoupledDecayWarning):
        scheduler = mf.WeightDecayScheduler(optimizer, found.schedule)
    with scheduler:
        assert mf.preview(scheduler, 300).outlooks[0].a == pytest.approx(found.a, rel=1e-9)


def test_the_group_counts_that_has_most_weights_of_the_model_that_train():
    net, model = torch.nn.Linear(90, 90), attention()
    frozen = torch.nn.Parameter(torch.ones(99, 99), requires_grad=False)
    model.register_parameter("frozen", frozen)
    groups = [
        {"params": net.parameters(), "lr": 1e-5},
        {"params": trained(model), "lr": 0.02},
        {"params": [frozen], "lr": 0.5},
    ]
    optimizer = AdamW(groups, weight_decay=0.1)
    found = mf.recommend(model, optimizer, None, 300, "rank")
    alone = AdamW(trained(model), lr=0.02, weight_decay=0.1)
    assert found.schedule is not None
    assert found.schedule == mf.recommend(model, alone, None, 300, "rank").schedule


@pytest.mark.filterwarnings("ignore::mirrorflow.weightdecay.CoupledDecayWarning")
def test_a_higher_price_buys_a_lower_ratio_of_adapters():
    model = lora()
    optimizer = SGD(trained(model), lr=0.01, momentum=0.9)
    ratios = []
    for price in (0.0, 0.001, 0.01, 0.1, 0.2):
        found = mf.recommend(model, optimizer, None, 1500, "rank", price=price)
        none = next(arm for arm in arms_of(found) if arm.a == 0)
        by_a = {round(arm.a, 2): arm.ratio for arm in arms_of(found)}
        ratios.append(none.ratio if found.schedule is None else by_a[round(found.a, 2)])
    assert ratios == sorted(ratios, reverse=True) and len(set(ratios)) >= 3
    assert mf.recommend(model, optimizer, None, 1500, "rank", price=0.0).schedule is None


def least(curve, near, price):
    """Return the a of least decay after which a cut costs at most the price, or None."""
    place = curve["kept"].index(near)
    limit = price * next(arm["loss"] for arm in curve["arms"] if arm["a"] == 0)
    able = [
        arm["a"]
        for arm in curve["arms"]
        if arm["cost"][place] + arm["spread"][place] <= limit
        if arm["gap"] - arm["interval"] <= limit
    ]
    return max(able, default=None)


@pytest.mark.parametrize(("kept", "near"), [(0.8, 0.75), (0.55, 0.5), (0.2, 0.25), (0.05, 0.25)])
@pytest.mark.parametrize("price", [0.0, 0.001, 0.01, 0.1])
def test_the_least_decay_is_recommended_after_which_a_cut_costs_the_price(kept, near, price):
    model, curves = attention(), TABLES["curve"]
    optimizer = AdamW(model.parameters(), lr=0.01)
    found = mf.recommend(model, optimizer, None, 1500, "rank", price=price, kept=kept)
    each = [least(curve, near, price) for curve in curves]
    most = min((a for a in each if a is not None), default=0.0)  # the curve that asks for most
    assert found.a == pytest.approx(most, rel=1e-3) and (found.schedule is None) == (most == 0)
    assert found.reason.count("in no stored run") == each.count(None)
    for curve in curves:
        assert curve["title"] in found.reason and curve["result"] in found.evidence
        assert any(curve["title"] in what for what in found.unknown)
    assert f"truncation to {near:g} of each" in found.reason
    far = any("of the ranks costs" in what for what in found.unknown)
    assert far == (abs(kept - near) > 0.125)


def test_sparsity_is_recommended_for_products_under_gradient_descent_alone():
    model = products()
    found = mf.recommend(model, SGD(model.parameters(), lr=0.1), None, 1000, "sparsity")
    assert switch(found).at == 500 and found.a == pytest.approx(-10)
    adaptive = mf.recommend(model, AdamW(model.parameters(), lr=0.1), None, 1000, "sparsity")
    assert adaptive.schedule is None and not adaptive.evidence and "never L1" in adaptive.reason
    plain = mf.recommend(attention(), SGD(attention().parameters(), lr=0.1), None, 9, "sparsity")
    assert plain.schedule is None and not plain.evidence


def test_a_run_that_is_too_short_for_the_stored_a_gets_no_schedule():
    model = products()
    found = mf.recommend(model, SGD(model.parameters(), lr=0.1), None, 10, "sparsity")
    assert found.schedule is None and "cannot come to it" in found.reason


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": None}, "steps must be a whole number"),
        ({"steps": 0}, "steps must be"),
        ({"steps": 10, "goal": "speed"}, "goal must be one of loss, rank, sparsity"),
        ({"steps": 10, "goal": "rank", "price": -1}, "price must be"),
        ({"steps": 10, "goal": "rank", "kept": 1.0}, r"kept must lie in \(0, 1\), got 1.0"),
    ],
)
def test_what_cannot_be_answered_is_refused(given, said):
    model = attention()
    with pytest.raises(ValueError, match=said):
        mf.recommend(model, AdamW(model.parameters()), **given)


@pytest.mark.parametrize("wrong", ["a", "0.5", None, [0.5]])
@pytest.mark.parametrize("name", ["kept", "price"])
def test_parts_are_numbers(name, wrong):
    model = attention()
    with pytest.raises(TypeError, match=f"{name} must be a number, got {re.escape(repr(wrong))}"):
        mf.recommend(model, AdamW(model.parameters()), None, 9, "rank", **{name: wrong})


@pytest.mark.parametrize("wrong", [torch.nn.Linear, None, "model"])
def test_a_model_is_a_module(wrong):
    optimizer = AdamW(attention().parameters())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got .*Give the model"):
        mf.recommend(wrong, optimizer, None, 9)


def adafactor(params, **settings):
    optimization = pytest.importorskip("transformers.optimization")
    return optimization.Adafactor(params, **settings)


class OwnSize(SGD):
    """An optimizer that makes its own step size."""

    def __init__(self, params):
        super().__init__(params, lr=0.1, momentum=0.9)
        for group in self.param_groups:
            group["lr"] = None


@pytest.mark.parametrize("cls", [adafactor, OwnSize])
def test_without_a_learning_rate_there_is_an_answer_but_no_schedule(cls):
    for make in (*MODELS, attention):
        model = make()
        optimizer = cls(trained(model))
        assert mf.recommend(model, optimizer, steps=100, goal="loss").schedule is None
    with pytest.raises(ValueError, match=r"learning rate must be.*got lr=None: \w+ makes.*one"):
        mf.recommend(model, optimizer, steps=100, goal="rank")
    for price in (0.0, 9.0):  # no stored decay is enough, or none is needed
        found = mf.recommend(model, optimizer, steps=100, goal="rank", price=price)
        assert found.schedule is None
    plain = torch.nn.Linear(3, 3)
    for goal in ("rank", "sparsity"):
        assert mf.recommend(plain, cls(plain.parameters()), steps=9, goal=goal).schedule is None


def test_the_remedy_for_a_step_size_of_its_own_is_one():
    model = attention()
    settings = {"lr": 0.02, "relative_step": False, "weight_decay": 0.1}
    scaled = adafactor(model.parameters(), **settings)
    with pytest.raises(ValueError, match="got Adafactor: the weights shrink by the decay times a"):
        mf.recommend(model, scaled, steps=300, goal="rank")
    assert mf.recommend(model, scaled, steps=300, goal="loss").schedule is None
    optimizer = adafactor(model.parameters(), scale_parameter=False, **settings)
    found = mf.recommend(model, optimizer, steps=300, goal="rank")
    with mf.WeightDecayScheduler(optimizer, found.schedule) as scheduler:
        assert mf.preview(scheduler, 300).outlooks[0].a == pytest.approx(found.a, rel=1e-9)


@pytest.mark.parametrize("goal", ["loss", "rank", "sparsity"])
@pytest.mark.parametrize(
    ("lr", "error", "said"),
    [
        (
            CosineAnnealingLR(AdamW([torch.nn.Parameter(torch.ones(2))]), T_max=10),
            ValueError,
            "this CosineAnnealingLR belongs to another optimizer. Give the scheduler of this one",
        ),
        (0.1, TypeError, "lr_scheduler must be a learning-rate scheduler or the learning rate of"),
        ([0.1] * 9, ValueError, "9 learning rates for 10 steps"),
        ([-0.1] * 10, ValueError, "a learning rate must be a finite number >= 0, got -0.1"),
    ],
    ids=["of another", "number", "too few", "negative"],
)
def test_learning_rates_are_refused_as_a_preview_refuses_them(lr, error, said, goal):
    model = attention()
    optimizer = AdamW(model.parameters(), weight_decay=0.1)
    with pytest.raises(error, match=said):
        mf.recommend(model, optimizer, lr, 10, goal)
    scheduler = mf.WeightDecayScheduler(optimizer, mf.Constant(0.1))
    with pytest.raises(error, match=said.replace("lr_scheduler", "lr")):
        mf.preview(scheduler, 10, lr)


def test_the_guide_says_what_decay_costs_before_any_cut():
    text = " ".join((ROOT / "docs" / "which-decay.md").read_text("utf-8").split())
    for curve, strengths in zip(TABLES["curve"], [(-5,), (-5, -1.5)], strict=True):
        for a in strengths:
            kept = next(arm for arm in curve["arms"] if arm["a"] == a and arm["off"] == 1)
            gap = f"{kept['gap']:.2f} ± {kept['interval']:.2f}"
            assert f"a = {a:g} cost {gap} before a cut" in text or f"a = {a:g} {gap}." in text
