"""`mirrorflow plan` and the runs that settings describe, beside transformers' own schedules."""

import json
import math
import sys

import pytest
import torch

from mirrorflow import cli
from mirrorflow.schedule import SwitchOff
from mirrorflow.weightdecay import TrainingRun

OFF = '{"kind": "SwitchOff", "rate": 0.2, "at": 60}'


def called(monkeypatch, capsys, *args):
    """Run the command, and return its exit code, output and errors."""
    monkeypatch.setattr(sys, "argv", ["mirrorflow", "plan", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    return stopped.value.code or 0, printed.out, printed.err


def literal(lrs, decays):
    return -math.fsum(lr * decay for lr, decay in zip(lrs, decays, strict=True))


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 40), (7, 40), (40, 40), (60, 40)])
def test_learning_rates_are_those_of_transformers(name, warmup, steps):
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.3)
    scheduler = transformers.get_scheduler(name, optimizer, warmup, steps)
    theirs = []
    for _ in range(steps):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    run = TrainingRun(steps=steps, lr=0.3, decay=0.1, lr_schedule=name, warmup=warmup)
    assert run.learning_rates == pytest.approx(theirs, abs=1e-12)
    assert run.preview().outlooks[0].a == pytest.approx(-0.1 * math.fsum(theirs))


def test_arguments_are_read_as_an_object_and_as_a_file(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=200, learning_rate=2e-3, weight_decay=0.3,
        lr_scheduler_type="cosine", warmup_steps=20, optim="adamw_torch", report_to=[],
    )  # fmt: skip
    file = tmp_path / "training_args.json"
    file.write_text(arguments.to_json_string())
    run = TrainingRun.from_arguments(arguments)
    assert run == TrainingRun.from_arguments(json.loads(file.read_text()))
    code, out, _ = called(monkeypatch, capsys, "--from", file, "--json")
    (group,) = json.loads(out)["groups"]
    assert code == 0 and group["a"] == pytest.approx(literal(run.learning_rates, [0.3] * 200))
    assert group["law"]["name"] == "sign descent" and group["dtype"] == "float32"
    assert any("do not say the precision" in remark for remark in json.loads(out)["remarks"])
    _, out, _ = called(monkeypatch, capsys, "--from", file, "--decay", OFF, "--dtype", "float32")
    a = literal(run.learning_rates[:60], [0.2] * 60)
    assert f"a = {a:.3g} " in out and "do not say" not in out


def test_a_warmup_may_be_a_part_of_the_run():
    arguments = {"max_steps": 50, "learning_rate": 1.0, "weight_decay": 0.1}
    for key in ("warmup_steps", "warmup_ratio"):
        run = TrainingRun.from_arguments(arguments | {key: 0.11})
        assert run.warmup == 6 and run.learning_rates[:7] == [t / 6 for t in range(7)]


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"warmup_steps": "3"}, TypeError, "warmup_steps must be a number, got '3'"),
        ({"warmup_ratio": "0.1"}, TypeError, "warmup_ratio must be a number, got '0.1'"),
        ({"max_steps": "50"}, ValueError, "max_steps must be a whole number >= 1, got '50'"),
        ({"learning_rate": "1e-3"}, TypeError, "lr must be a number, got '1e-3'"),
        ({"weight_decay": "0.1"}, TypeError, "decay must be a number, got '0.1'"),
    ],
    ids=str,
)
def test_numbers_that_are_text_are_named(wrong, error, said):
    arguments = {"max_steps": 50, "learning_rate": 1.0, "weight_decay": 0.1}
    with pytest.raises(error, match=said):
        TrainingRun.from_arguments(arguments | wrong)
    with pytest.raises(ValueError, match=r"^steps must be a whole number >= 1, got '9'"):
        TrainingRun.from_arguments(arguments | {"warmup_ratio": 0.1}, steps="9")
    with pytest.raises(TypeError, match=r"momentum must be a number, got '0\.9'"):
        TrainingRun(steps=9, lr=0.1, decay=0.1, optimizer="sgd", momentum="0.9")  # pyright: ignore


def test_the_command_answers_in_three_sentences_and_a_table(monkeypatch, capsys):
    given = ["--steps", 3000, "--lr", 5e-6, "--decay", 0.1, "--lr-schedule", "constant"]
    code, out, _ = called(monkeypatch, capsys, *given, "--size", 0.1, "--start", 0.167)
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    text, table = out.split("\n\n")
    plain = " ".join(text.split())
    assert "a = -0.0015 " in plain and "0.3% at most" in plain and "does not move" in plain
    assert "a = -1.1 is needed" in plain and len(table.splitlines()) == 2


def test_the_geometry_of_lora_needs_the_a_of_its_law(monkeypatch, capsys):
    given = ["--steps", 3000, "--lr", 5e-6, "--decay", 0.1, "--size", 0.1, "--start", 1 / 6]
    _, out, _ = called(monkeypatch, capsys, *given, "--optimizer", "sgd")
    assert "a = -1.4 is needed" in " ".join(out.split())


def test_bfloat16_is_said_to_act_not_at_all(monkeypatch, capsys):
    given = ["--steps", 300, "--lr", 1e-3, "--decay", 1, "--dtype", "bfloat16", "--json"]
    _, out, _ = called(monkeypatch, capsys, *given)
    (group,) = json.loads(out)["groups"]
    assert group["a"] == 0 and group["part"] == 0 and "bfloat16 swallows" in group["notes"][0]
    _, out, _ = called(monkeypatch, capsys, *given, "--optimizer", "adamw_torch_fused")
    assert json.loads(out)["groups"][0]["a"] is None  # only its gradients can tell


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_spends_what_a_literal_buffer_does(momentum):
    run = TrainingRun(
        steps=120, lr=0.01, decay=SwitchOff(0.3, at=60), optimizer="sgd", momentum=momentum
    )
    seen, held, a = run.preview(), 0.0, 0.0
    for t, lr in enumerate(run.learning_rates):
        held = momentum * held + (0.3 if t < 60 else 0.0)
        a -= lr * held
    assert seen.outlooks[0].a == pytest.approx(a)
    assert any("momentum" in remark for remark in seen.remarks) == bool(momentum)


@pytest.mark.parametrize("name", ["adam", "rmsprop", "adagrad", "adamax"])
def test_l2_in_a_rescaled_gradient_is_said_to_have_no_sum(name):
    run = TrainingRun(steps=5, lr=0.1, decay=0.1, optimizer=name)
    assert math.isnan(run.preview().outlooks[0].a)
    outside = TrainingRun(steps=5, lr=0.1, decay=0.1, optimizer=name, outside=True)
    assert outside.preview().outlooks[0].a == pytest.approx(
        literal(outside.learning_rates, 5 * [0.1])
    )


@pytest.mark.parametrize("name", ["lion", "lion_32bit", "adafactor", "nadam", "radam", "sgd_fused"])
def test_every_optimizer_that_is_named_can_be_planned(name):
    found = TrainingRun(steps=5, lr=0.1, decay=0.1, optimizer=name).preview().outlooks[0]
    assert found.optimizer.lower() == name.split("_")[0]
    law = {"lion": "sign descent", "adafactor": "not known", "sgd": "gradient flow"}
    assert found.law.name == law.get(name.split("_")[0], "sign descent")


def test_a_decay_is_read_as_other_numbers_are(monkeypatch, capsys):
    rest = "--steps", 5, "--lr", ".1", "--json"
    plans = {called(monkeypatch, capsys, *rest, "--decay", d) for d in (".1", "0.1", "1e-1")}
    assert len(plans) == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "plan must have --steps, --lr, --decay"),
        (("--steps", 5, "--lr", 0.1), "--decay"),
        (("--steps", 5, "--lr", 0.1, "--decay", "much"), "--decay must be a number or a schedule"),
        (("--steps", 5, "--lr", 0.1, "--decay", "{}"), "kind"),
        (("--steps", 5, "--lr", 0.1, "--decay", 0), "decay must be > 0"),
        (("--steps", 5, "--lr", 0.1, "--decay", -1), "decay must be"),
        (("--steps", 0, "--lr", 0.1, "--decay", 1), "steps must be"),
        (("--steps", 5, "--lr", "inf", "--decay", 1), "lr must be"),
        (("--steps", 5, "--lr", 1, "--decay", 1, "--optimizer", "galore_adamw"), "mf.preview"),
        (("--steps", 5, "--lr", 1, "--decay", 1, "--lr-schedule", "step"), "lr_schedule must be"),
        (("--steps", 5, "--lr", 1, "--decay", 1, "--dtype", "int8"), "dtype must be one of"),
        (("--steps", 5, "--lr", 1, "--decay", 1, "--target", 1), "target must be"),
        (("--steps", 5, "--lr", 1, "--decay", 1, "--momentum", 1), "momentum must be"),
        (("--from", "absent.json"), "--from must be a file"),
    ],
)
def test_what_cannot_be_planned_ends_with_a_sentence(args, said, monkeypatch, capsys):
    code, out, err = called(monkeypatch, capsys, *args)
    assert code == 2 and out == "" and said in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "must hold TrainingArguments as JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "must hold learning_rate"),
        (100_000 * "[", "must hold TrainingArguments as JSON"),
        ('{"learning_rate": "fast", "max_steps": 5, "weight_decay": 0.1}', "lr must be"),
        ('{"learning_rate": 0.1, "max_steps": -1, "weight_decay": 0.1}', "steps must be given"),
        ('{"learning_rate": 0.1, "max_steps": 5}', "decay must be > 0"),
        ('{"learning_rate": 0.1, "max_steps": 5, "optim": ["x"]}', "optimizer must be"),
        ('{"learning_rate": 0.1, "max_steps": 5, "warmup_steps": "x"}', "warmup_steps must be"),
        ('{"learning_rate": 0.1, "max_steps": 5, "lr_scheduler_kwargs": {"a": 1}}', "mf.preview"),
    ],
)
def test_files_that_are_not_arguments_end_with_a_sentence(
    content, said, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "args.json"
    file.write_text(content)
    code, out, err = called(monkeypatch, capsys, "--from", file)
    assert code == 2 and out == "" and said in err and err.count("\n") == 1
