"""The report of a run: its numbers, its sentences, its forms, and what callbacks do with it."""

import html
import json
import logging
import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import mirrorflow as mf
from mirrorflow.control import ControlledDecay, RunReport
from mirrorflow.control.verdict import verdict
from mirrorflow.spectrum.reference import random_product
from mirrorflow.weightdecay import PerLayer
from test_weightdecay_layers import EVERY, LR, STEPS, Net, train


def run(schedule, decay=0.1, steps=STEPS, optimizer=torch.optim.AdamW, **options):
    net = Net()
    made = optimizer(net.parameters(), lr=LR, weight_decay=decay)
    control = ControlledDecay(net, made, schedule, **options)
    if control.track_every:
        control.measure(0)
    train(net, made, control, 0, steps)
    return control


def said(report):
    return " ".join((*report.shows, *report.cannot_show))


# The numbers


def test_the_decay_is_that_of_the_ledger():
    control = run(mf.SwitchOff(2.0, at=7))
    (row,) = control.report().decay
    assert row.asked == row.acted == pytest.approx(LR * 2.0 * 7)
    assert -row.acted == control.scheduler.accumulated[0]
    assert row.off_from == 7 and row.steps == STEPS
    assert row.left == pytest.approx((1 - LR * 2.0) ** 7)
    assert row.shrinkage == pytest.approx(1 - row.left**2)


def test_ratio_and_rank_are_those_of_the_first_and_the_last_measurement():
    control = run(mf.Constant(2.0), track_every=EVERY)
    report = control.report()
    (_, first), (_, last) = control.measurements[0], control.measurements[-1]
    assert report.measured == (0, STEPS)
    for row, before, after in zip(report.products, first.records, last.records, strict=True):
        assert (row.name, row.shape) == (after.label, after.shape)
        assert (row.ratio_before, row.ratio_after) == (before.ratio, after.ratio)
        assert (row.rank_before, row.rank_after) == (before.effective_rank, after.effective_rank)


@pytest.mark.parametrize("shape", [(60, 8, 40), (5, 20, 9), (40, 40, 40), (1, 3, 4), (30, 50, 70)])
def test_the_reference_is_the_mean_of_dense_random_products(shape):
    n, r, m = shape
    rng, ratios, ranks = np.random.default_rng(1), [], []
    for _ in range(300):
        s = np.linalg.svd(
            rng.standard_normal((n, r)) @ rng.standard_normal((r, m)), compute_uv=False
        )[: min(shape)]
        p = s / s.sum()
        ratios.append(s.sum() / np.linalg.norm(s))
        ranks.append(np.exp(-(p * np.log(p)).sum()))
    found = random_product(*shape)
    assert found.ratio == pytest.approx(np.mean(ratios), rel=0.015)
    assert found.effective_rank == pytest.approx(np.mean(ranks), rel=0.015)


def test_the_parts_of_D_add_up_and_decay_alone_is_the_product_of_its_steps():
    report = run(lambda step: 3.0 / (1 + step), balance_every=1).report()
    kept = np.prod([1 - LR * 3.0 / (1 + step) for step in range(STEPS)])
    assert report.accounted == (0, STEPS) and len(report.D) == 2
    for row in report.D:
        parts = (row.decay, row.optimizer, row.step_and_noise, row.unsplit, row.outside)
        assert sum(parts) == pytest.approx(1)
        assert row.decay_alone == pytest.approx(kept**2)
        assert row.n_steps == STEPS and row.unsplit == row.outside == 0


def test_a_resumed_run_reports_as_an_uninterrupted_one():
    options = {"track_every": EVERY, "balance_every": 1}
    whole = run(mf.SwitchOff(2.0, at=5), **options)
    first = run(mf.SwitchOff(2.0, at=5), steps=6, **options)
    net = Net()
    made = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.1)
    again = ControlledDecay(net, made, mf.SwitchOff(2.0, at=5), **options)
    net.load_state_dict(first.tracker._model.state_dict())
    made.load_state_dict(first.scheduler.optimizer.state_dict())
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    train(net, made, again, 6, STEPS)
    ours, theirs = again.report(), whole.report()
    assert (ours.decay, ours.products, ours.measured) == (
        theirs.decay, theirs.products, theirs.measured
    )  # fmt: skip
    assert ours.shows == theirs.shows and ours.cannot_show == theirs.cannot_show
    for a, b in zip(ours.D, theirs.D, strict=True):
        assert (a.fraction_left, a.optimizer) == pytest.approx((b.fraction_left, b.optimizer))


# The sentences


@pytest.mark.parametrize("options", [{}, {"decoupled": True}, {"convention": "fixed"}])
def test_a_product_shrinks_by_what_the_report_says_at_most(options):
    """In large steps, whose product is far below e^{2a}; half of them before a resumption."""
    rate = (2.0 if options else 0.2) if "convention" not in options else 0.1
    w = [torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64)) for _ in range(2)]
    net = torch.nn.ParameterDict(dict(zip("ab", w, strict=True)))

    def begun():
        made = torch.optim.AdamW(net.parameters(), lr=0.1 if options else 1.0, weight_decay=1.0)
        return made, ControlledDecay(net, made, mf.Constant(rate), **options)

    made, control = begun()
    for step in range(6):
        if step == 3:
            states = json.loads(json.dumps(control.state_dict())), made.state_dict()
            control.close()
            made, control = begun()
            made.load_state_dict(states[1])
            control.load_state_dict(states[0])
        for p in w:
            p.grad = torch.zeros_like(p)
        made.step()
        control.step()
    report = control.report()
    shrunk = 1 - (w[0][0, 0] * w[1][0, 0]).item()
    assert report.decay[0].shrinkage == pytest.approx(shrunk)
    assert f"{100 * shrunk:.3g}% of its size at most (a = " in report.shows[0]


def test_where_no_factor_is_known_the_report_says_about():
    momentum = partial(torch.optim.SGD, momentum=0.9)
    report = run(mf.Constant(2.0), optimizer=momentum).report()
    assert "by about" in report.shows[-1] and "1 - e^(2a)" in report.shows[-1]
    net = Net()
    made = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.1)
    control = ControlledDecay(net, made, mf.Constant(2.0))
    made.load_state_dict(run(mf.Constant(2.0)).scheduler.optimizer.state_dict())
    (said,) = control.report().shows
    assert "by about" in said and "at most" not in said


def test_decay_that_is_too_little_is_said_to_be():
    few = said(run(mf.Constant(1e-3)).report())
    assert "too little to matter" in few and "0.0" in few
    assert "too little" not in said(run(mf.Constant(2.0)).report())
    assert "No decay acted" in said(run(mf.Constant(0.0)).report())


def test_the_report_does_not_ask_for_what_was_given():
    late = said(run(mf.Constant(0.5), track_every=100).report())
    assert "track_every=100 exceeds the 12 steps" not in late  # it measured at step 0
    net = Net()
    made = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.1)
    control = ControlledDecay(net, made, mf.Constant(0.5), track_every=100)
    train(net, made, control, 0, STEPS)
    late = said(control.report())
    assert "track_every=100 exceeds the 12 steps" in late and "track_every=50" not in late


def test_a_ratio_that_has_not_moved_is_not_said_to_have_risen():
    report = run(mf.Constant(2.0), track_every=EVERY).report()
    (row, _), number = report.products, "The mean ratio of"
    for after, expected in ((3.091, "was 3.09 at step 0, and at step 12"), (3.2, "rose from 3.09")):
        one = replace(report, products=(replace(row, ratio_before=3.09, ratio_after=after),))
        assert f"{number} 1 product {expected}" in said(verdict(one))


def test_groups_of_one_name_stay_apart():
    net = Net()
    params = list(net.parameters())
    groups = [{"params": params[:2], "name": "w"}, {"params": params[2:], "name": "w"}]
    made = torch.optim.AdamW(groups, lr=LR, weight_decay=0.1)
    rules = [(0, mf.SwitchOff(2.0, at=3)), (1, mf.SwitchOff(1.0, at=7))]
    control = ControlledDecay(net, made, None, groups=rules)
    train(net, made, control, 0, STEPS)
    rows = control.report().decay
    assert [(row.group, row.off_from) for row in rows] == [("w (group 0)", 3), ("w (group 1)", 7)]
    assert {row["group"] for row in control.scheduler.audit()} == {"w (group 0)", "w (group 1)"}


def test_a_loop_that_did_not_fire_says_so_in_the_report():
    report = run(mf.OffBelow(0.1, target=1.01), track_every=EVERY).report()
    (row,) = report.loops
    assert row.fired_at is None and row.outcome.startswith("did not fire in 7 measurements")
    assert f"OffBelow: {row.outcome}" in str(report)
    spent = run(mf.OffAtBudget(1.0, budget=3.0)).report().loops[0]
    assert spent.outcome.endswith(f"({LR * 1.0 * STEPS:.3g} was)")
    fired = run(mf.OffAtBudget(1.0, budget=0.05)).report().loops[0]
    assert fired.fired_at == 5 and "switched off at step 5" in fired.outcome


def test_each_layer_has_its_loop():
    held = PerLayer(lambda layer: mf.HoldRatio(1.01, 0.1, gain=0.01))
    report = run(held, track_every=EVERY).report()
    assert [row.name for row in report.loops] == ["HoldRatio blocks.0", "HoldRatio blocks.1"]
    assert all(row.outcome.startswith("not held") for row in report.loops)


def test_what_was_not_kept_cannot_be_shown_and_says_how():
    bare, tracked = run(mf.Constant(0.5)).report(), run(mf.Constant(0.5), track_every=4).report()
    whole = run(mf.Constant(0.5), track_every=4, balance_every=1).report()
    assert "track_every=50" in said(bare) and "balance_every=1" in said(tracked)
    assert "track_every" not in said(whole) and "balance_every" not in said(whole)
    assert "takes a second run" in said(whole)
    coarse = said(run(mf.Constant(0.5), balance_every=3).report())
    assert "balance_every=1 splits each step" in coarse


def test_decay_without_a_number_is_said_to_have_none():
    with pytest.warns(UserWarning, match="Adam"):
        report = run(mf.Constant(0.5), optimizer=torch.optim.Adam, balance_every=1).report()
    assert math.isnan(report.decay[0].acted)
    assert "no number describes it" in said(report)
    assert all(row.decay_alone == pytest.approx(1) for row in report.D)
    json.loads(report.to_json())


# The forms


def test_the_report_is_data_json_and_text():
    report = run(mf.SwitchOff(2.0, at=7), track_every=EVERY, balance_every=1).report()
    assert isinstance(report, RunReport)
    with pytest.raises(AttributeError):
        report.steps = 3
    read = json.loads(report.to_json())
    assert read == json.loads(json.dumps(report.to_dict()))
    assert read["decay"][0]["off_from"] == 7 and len(read["products"]) == len(read["D"]) == 2
    text = str(report)
    for part in ("12 steps of AdamW", "blocks.0", "what this run shows", "what it cannot show"):
        assert part in text


def test_before_training_there_is_little_to_report():
    net = Net()
    made = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.1)
    control = ControlledDecay(net, made, mf.Constant(0.1), track_every=5, balance_every=1)
    report = control.report()
    assert report.steps == 0 and report.D == report.products == () and report.accounted is None
    assert json.loads(report.to_json())["measured"] is None and str(report)


# What callbacks do with it


@pytest.mark.parametrize("changes", [{}, {"logging_strategy": "no"}, {"log_level": "error"}])
@pytest.mark.sample(2)
def test_the_trainer_prints_the_report_unless_it_logs_nothing(tmp_path, capsys, changes):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    import test_huggingface as hf
    from mirrorflow.integrations.huggingface import control_decay

    made = hf.trainer(tmp_path, lora=True, **changes)
    control = control_decay(made, mf.OffBelow(0.5, 1.0), track_every=4, balance_every=1)
    with pytest.raises(ValueError, match="once training has begun"):
        control.report()
    hf.train(made)
    text = str(control.report())
    assert (text in capsys.readouterr().out) == (not changes)
    saved = json.loads((tmp_path / "mirrorflow-report.json").read_text())
    assert saved == json.loads(control.report().to_json())
    assert saved["steps"] == hf.STEPS and saved["loops"][0]["outcome"].startswith("did not fire")
    assert saved["products"][0]["ratio_before"] is None  # LoRA begins at 0
    assert saved["D"][0]["n_steps"] == hf.STEPS


def test_a_resumed_trainer_goes_on_with_the_account(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    import test_huggingface as hf
    from mirrorflow.integrations.huggingface import control_decay

    def made(folder):
        trainer = hf.trainer(folder, lora=True)
        return trainer, control_decay(trainer, mf.Constant(0.5), track_every=4, balance_every=1)

    whole, control = made(tmp_path / "whole")
    expected = hf.train(whole)
    first, _ = made(tmp_path / "parts")
    first.add_callback(hf._StopAt(hf.STOP))
    hf.train(first)
    second, resumed = made(tmp_path / "parts")
    found = hf.train(second, resume=str(tmp_path / "parts" / f"checkpoint-{hf.STOP}"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    ours, theirs = resumed.report(), control.report()
    assert ours.to_dict()["products"] == theirs.to_dict()["products"]
    for a, b in zip(ours.D, theirs.D, strict=True):
        assert a.n_steps == b.n_steps == hf.STEPS and a.unsplit == 0
        for name in ("fraction_left", "decay_alone", "decay", "optimizer", "step_and_noise"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-9, abs=1e-12)


def test_lightning_says_and_saves_the_report_where_it_has_a_logger(tmp_path, caplog, monkeypatch):
    lightning = pytest.importorskip("lightning")
    import test_lightning as pl
    from mirrorflow.integrations.lightning import DecayCallback

    control = DecayCallback(mf.SwitchOff(0.5, at=pl.OFF), track_every=6, balance_every=1)
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    with caplog.at_level(logging.INFO):
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        pl.fit(pl.Net(), [control], logger=logger)
    text = str(control.report())
    assert any(text in record.getMessage() for record in caplog.records)
    saved = json.loads((tmp_path / "lightning_logs/version_0/mirrorflow-report.json").read_text())
    assert saved == json.loads(control.report().to_json()) and saved["steps"] == pl.STEPS


def test_the_page_of_a_report_holds_its_numbers_and_runs_nothing(tmp_path):
    from mirrorflow.control.report import save_report

    report = run(mf.OffAtBudget(0.1, budget=0.5), steps=4, track_every=2, balance_every=1).report()
    (row, *_) = report.decay
    report = replace(report, decay=(replace(row, group="<script>x</script>&"),))
    save_report(report, tmp_path / "deep" / "report.json")
    page = (tmp_path / "deep" / "report.html").read_text()
    assert page == report.to_html() and "<script" not in page
    assert "&lt;script&gt;x&lt;/script&gt;&amp;" in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src &#x27;none&#x27;;") and "script-src" not in policy
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    for sentence in (*report.shows, *report.cannot_show, report.loops[0].outcome):
        assert html.escape(sentence) in page
    for product in report.products:
        assert f"<td>{product.name}</td>" in page
        assert f"<td class=number>{product.ratio_after:.3g}</td>" in page
    assert f"{report.D[0].optimizer:.1%}" in page


def test_a_page_leaves_out_what_a_run_has_not(tmp_path):
    page = run(mf.Constant(0.1), steps=1).report().to_html()
    assert "What it cannot show" in page and "Closed loops" not in page and "Products" not in page


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path):
    from mirrorflow.control.report import save_report

    (tmp_path / "file").write_text("")
    report = run(mf.Constant(0.1), steps=1).report()
    with pytest.warns(UserWarning, match="could not be written"):
        save_report(report, tmp_path / "file" / "report.json")
