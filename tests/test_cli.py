"""The command line: what it prints, where it leaves results, and how it fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from commands import call

NAME = "fig09_fig11_fig14_legendre"  # the fastest experiment
ROOT = Path(__file__).parents[1]

GOOD = """
import torch, mirrorflow as mf
w0 = (torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
pair = (mf.Hadamard(), mf.WeightDecay(), w0)
norm = mf.CustomRegularizer(lambda w: sum(f.abs().sum() for f in w))
bad = (mf.Depth(3), norm, (w0[1], 0.5 * w0[1], 0.3 * w0[1]))
number = 3
def make():
    return pair
def raises():
    1 / 0
def stops():
    raise SystemExit(0)
def missing(w):
    raise KeyError("w")
breaks = (mf.CustomReparam(missing), mf.WeightDecay(), w0)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(GOOD)
    return path


@pytest.fixture
def result(smoke, tmp_path):
    """Copy the result of a smoke run."""
    folder = smoke(NAME)[1]
    return shutil.copytree(folder, tmp_path / NAME / folder.name) / "result.json"


def test_list_names_every_experiment_and_counts_its_results(monkeypatch, capsys, tmp_path, result):
    assert call(monkeypatch, "list", "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert "fig02_matrix_sensing" in out
    told = " ".join(out.split())  # long paths have lines of their own
    assert f"results in {tmp_path}: 1" in told
    assert f"results in {tmp_path}: 0" in told


def test_a_stored_result_is_not_computed_again_unless_forced(monkeypatch, capsys, tmp_path, result):
    command = ("run", NAME, "--preset", "smoke", "--out", tmp_path)
    result.write_text(result.read_text().replace('"completed"', '"as it was"'))
    assert call(monkeypatch, *command) == 0
    assert f"result: {result}" in capsys.readouterr().out
    assert json.loads(result.read_text())["status"] == "as it was"
    call(monkeypatch, *command, "--force")
    assert json.loads(result.read_text())["status"] == "completed"


def test_seeds_and_toml_reach_the_configuration(monkeypatch, tmp_path):
    settings = tmp_path / "settings.toml"
    settings.write_text("steps = 40\nswitch = 20\ngrid_alphas = []\ncommuting_time = 10.0\n")
    command = ("run", "fig02_matrix_sensing", "--preset", "smoke", "--config", settings)
    assert call(monkeypatch, *command, "--seed", 3, "--seed", 4, "--out", tmp_path) == 0
    (path,) = tmp_path.glob("*/*/result.json")
    config = json.loads(path.read_text())["config"]
    assert config["seeds"] == [3, 4]
    assert config["steps"] == 40


@pytest.mark.parametrize(
    ("content", "said"),
    [("stepz = 3", "unknown key 'stepz'"), ("steps = 0", "steps"), ("steps =", "is not TOML")],
)
def test_a_bad_configuration_is_one_line(monkeypatch, capsys, tmp_path, content, said):
    settings = tmp_path / "settings.toml"
    settings.write_text(content)
    assert call(monkeypatch, "run", "fig02_matrix_sensing", "--config", settings) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_missing_configuration_file_is_named(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, "run", NAME, "--config", tmp_path / "none.toml") == 2
    assert "none.toml" in capsys.readouterr().err


def test_an_unknown_experiment_or_preset_names_those_that_there_are(monkeypatch, capsys):
    assert call(monkeypatch, "run", "fig99") == 2
    assert NAME in capsys.readouterr().err
    assert call(monkeypatch, "run", NAME, "--preset", "huge") == 2
    assert "smoke, cpu, full" in capsys.readouterr().err


def test_report_makes_one_page_with_the_command_of_each_run(monkeypatch, capsys, tmp_path, result):
    settings = tmp_path / "settings.toml"
    settings.write_text("window = 1.5\n")
    command = ("run", NAME, "--preset", "smoke", "--out", tmp_path, "--config", settings)
    assert call(monkeypatch, *command) == 0
    assert call(monkeypatch, "report", tmp_path) == 0
    page = (tmp_path / "index.html").read_text()
    assert f"page: {tmp_path / 'index.html'}" in capsys.readouterr().out
    assert f"<code>mirrorflow run {NAME} --preset smoke</code>" in page
    assert "--config changes.toml\n\n# changes.toml\nwindow = 1.5</code>" in page


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ("run", "bench_sparse", "--preset", "smoke", "--seed", "-1"),
            "seeds must be >= 0, got (-1,)",
        ),
        (("run", NAME, "--config", "none.toml"), "none.toml must be a file that can be read"),
        (("run", NAME, "--config", "."), ". must be a file that can be read, got: Is a directory"),
        (("lint", "none"), "none must be a file that can be read, got: No such file"),
    ],
)
def test_what_cannot_be_read_or_drawn_ends_with_one_sentence(
    monkeypatch, capsys, tmp_path, args, said
):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *args) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_report_of_nothing_says_what_to_do(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, "report", tmp_path) == 2
    assert "mirrorflow run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "code", "said"), [("pair", 0, ""), ("make", 0, ""), ("bad", 1, "WeightDecay()")]
)
def test_check_tells_a_good_pair_from_a_bad_one(monkeypatch, capsys, file, name, code, said):
    assert call(monkeypatch, "check", f"{file}:{name}") == code
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("{file}", "expected path/to/file.py:name"),
        ("none.py:pair", "none.py must be a file, got nothing there"),
        ("{folder}:pair", "must be a file, got a folder"),
        ("{file}:other", "defines no 'other'"),
        ("{file}:number", "must be (g, h, w0)"),
        ("{broken}:pair", "ZeroDivisionError"),
        ("{file}:raises", "raises failed: ZeroDivisionError"),
        ("{file}:stops", "stops failed: SystemExit"),
        ("{file}:breaks", "breaks failed: KeyError"),
        ("{wrong}:pair", "NaN"),
    ],
)
def test_check_names_what_is_wrong_with_its_argument(
    monkeypatch, capsys, file, tmp_path, target, said
):
    broken, wrong = tmp_path / "broken.py", tmp_path / "wrong.py"
    broken.write_text("1 / 0")
    wrong.write_text(GOOD.replace("torch.zeros(2,", "torch.full((2,), torch.nan,"))
    assert (
        call(
            monkeypatch,
            "check",
            target.format(file=file, broken=broken, wrong=wrong, folder=tmp_path),
        )
        == 2
    )
    assert said in capsys.readouterr().err


def test_the_help_of_check_says_that_the_file_is_run(monkeypatch, capsys):
    assert call(monkeypatch, "check", "--help") == 0
    assert "is run as a Python program" in " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
def test_output_that_cannot_be_written_is_one_line(tmp_path):
    command = [sys.executable, "-m", "mirrorflow", "list", "--out", str(tmp_path)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "mirrorflow: the output cannot be written: No space left on device\n"


def test_what_a_file_holds_does_not_move_the_cursor(monkeypatch, capsys, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    evil = "a\x1b[2J\x9b1m\u202eb"
    weights = {f"{evil}.{name}_proj.weight": torch.eye(4) for name in "qk"}
    save_file(weights, tmp_path / "model.safetensors")
    assert call(monkeypatch, "audit", tmp_path) == 0
    assert call(monkeypatch, "audit", tmp_path, "--pair", f"x={evil},{evil}") == 2
    text = "".join(capsys.readouterr())
    assert r"a\x1b[2J\x9b1m\u202eb" in text and not set("\x1b\x9b\u202e") & set(text)


@pytest.mark.parametrize("content", [b"a = '\xff'", b"a = " + b"[" * 100_000])
def test_a_configuration_of_any_bytes_is_an_error_of_its_file(
    monkeypatch, capsys, tmp_path, content
):
    (tmp_path / "odd.toml").write_bytes(content)
    assert call(monkeypatch, "run", NAME, "--config", tmp_path / "odd.toml") == 2
    assert "odd.toml is not TOML" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_keeps_finished_parts_and_the_same_command_goes_on(tmp_path):
    """Stop after the first part for real, with a signal; then look, and go on."""
    settings = tmp_path / "settings.toml"
    settings.write_text(
        "steps = 1500\nswitch = 750\nseeds = [0, 1]\ngrid_alphas = []\ncommuting_time = 10.0\n"
    )
    command = [sys.executable, "-m", "mirrorflow", "run", "fig02_matrix_sensing"]
    command += ["--preset", "smoke", "--config", settings, "--out", tmp_path / "out"]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # A job in the background of a script inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if "seed1" in line:
                process.send_signal(signal.SIGINT)
                break
        err = process.stderr.read()
        assert process.wait(600) == 130, err
    assert "the same command goes on" in err
    (part,) = (tmp_path / "out").glob("*/*/parts/seed0.json")
    first = part.read_text()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    (result,) = (tmp_path / "out").glob("*/*/result.json")
    records = json.loads(result.read_text())["records"]
    assert all(record in records for record in json.loads(first)["records"])
    assert f"result: {result}" in done.stdout


def test_version_and_help(monkeypatch, capsys):
    from mirrorflow import __version__

    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == __version__
    assert call(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    for command in ("list", "run", "report", "check", "audit", "lint", "demo"):
        assert f"  {command} " in out


def test_the_documented_pair_passes(monkeypatch, capsys):
    path = ROOT / "docs" / "examples" / "own_pair.py"
    assert call(monkeypatch, "check", f"{path}:pair") == 0
    assert textwrap.dedent(capsys.readouterr().out).strip()


def test_audit_measures_a_checkpoint_and_names_what_it_cannot_read(monkeypatch, capsys, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"layer.{name}_proj.lora_{side}.weight": torch.randn(shape, generator=generator)
        for name in "qv"
        for side, shape in (("A", (2, 6)), ("B", (8, 2)))
    }
    path = tmp_path / "adapter_model.safetensors"
    save_file(weights, path)
    assert call(monkeypatch, "audit", path, "--json") == 0
    records = json.loads(capsys.readouterr().out)["records"]
    A, B = (weights[f"layer.q_proj.lora_{side}.weight"] for side in "AB")
    s = torch.linalg.svdvals(B.double() @ A.double())
    assert records[0]["ratio"] == pytest.approx((s.sum() / s.norm()).item())
    assert call(monkeypatch, "audit", path, "--match", "v_proj") == 0
    out = capsys.readouterr().out
    assert "v_proj" in out and "q_proj" not in out
    assert call(monkeypatch, "audit", tmp_path / "none") == 2
    assert "does not exist" in capsys.readouterr().err


def test_audit_measures_values_and_outputs_if_asked(monkeypatch, capsys, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    generator = torch.Generator().manual_seed(0)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    weights = {f"self_attn.{n}.weight": torch.randn(8, 8, generator=generator) for n in names}
    save_file(weights, tmp_path / "model.safetensors")
    assert call(monkeypatch, "audit", tmp_path / "model.safetensors", "--json", "--values") == 0
    records = json.loads(capsys.readouterr().out)["records"]
    assert [r["kind"] for r in records] == ["attention", "value-output"]
    product = weights["self_attn.o_proj.weight"] @ weights["self_attn.v_proj.weight"]
    s = torch.linalg.svdvals(product.double())
    assert records[1]["ratio"] == pytest.approx((s.sum() / s.norm()).item())


def test_audit_takes_pairs_that_the_user_names(monkeypatch, capsys, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(6, 4, generator=generator), torch.randn(4, 6, generator=generator)
    path = tmp_path / "model.safetensors"
    save_file({"fc1.weight": up, "fc2.weight": down}, path)
    assert call(monkeypatch, "audit", path) == 2
    said = capsys.readouterr().err
    assert "Name them: --pair mlp=fc2.weight,fc1.weight" in said and "audit(" not in said
    named = ("--pair", "mlp=fc2.weight,fc1.weight", "--pair", "own=fc2.weight, fc2.weight.T")
    assert call(monkeypatch, "audit", path, *named, "--json") == 0
    records = json.loads(capsys.readouterr().out)["records"]
    assert [record["name"] for record in records] == ["mlp", "own"]
    for record, product in zip(records, (down @ up, down @ down.T), strict=True):
        s = torch.linalg.svdvals(product.double())
        assert record["ratio"] == pytest.approx((s.sum() / s.norm()).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--match", "["), "--match '[' must be a regular expression"),
        (("--page", "{folder}"), "is a folder: name a file"),
        (("--page", "{file}/page.html"), "must be readable and writable"),
        (("--pair", "mlp"), "NAME=A,B is needed"),
        (("--pair", "mlp=fc1.weight"), "NAME=A,B is needed"),
        (("--pair", "=q_proj.weight,k_proj.weight"), "NAME=A,B is needed"),
        (
            ("--pair", "mlp=q_proj.weight,no.weight"),
            "must name weights of the model, got 'no.weight'",
        ),
        (2 * ("--pair", "a=q_proj.weight,k_proj.weight"), "there is a pair 'a' already"),
        (("--level", "expert"), "level"),
    ],
)
def test_audit_names_what_is_wrong_with_its_options(monkeypatch, capsys, tmp_path, options, said):
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "model.safetensors"
    save_file({f"{name}_proj.weight": torch.eye(4) for name in "qk"}, path)
    options = [option.format(folder=tmp_path, file=path) for option in options]
    assert call(monkeypatch, "audit", path, *options) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_lint_tells_mistakes_notes_and_what_cannot_be_read_apart(monkeypatch, capsys, tmp_path):
    saved = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1).state_dict()
    torch.save(saved, tmp_path / "optimizer.pt")
    assert call(monkeypatch, "lint", tmp_path) == 0  # the folder of a Trainer's checkpoint
    assert capsys.readouterr().out == "nothing found\n"
    del saved["param_groups"][0]["decoupled_weight_decay"]
    torch.save(saved, tmp_path / "optimizer.pt")
    assert call(monkeypatch, "lint", tmp_path / "optimizer.pt") == 0
    assert capsys.readouterr().out.startswith("note: unknown-coupling (group 0)")
    for content in ({"param_groups": [1, 2]}, {"args": Path()}, {"weights": torch.ones(2)}):
        torch.save(content, tmp_path / "optimizer.pt")
        assert call(monkeypatch, "lint", tmp_path / "optimizer.pt") == 2
        err = capsys.readouterr().err
        assert "optimizer.pt" in err and len(err.splitlines()) == 1


def test_lint_looks_at_a_saved_optimizer(monkeypatch, capsys, tmp_path):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    for make, code in ((torch.optim.AdamW, 0), (torch.optim.Adam, 1)):
        torch.save(make([weight], weight_decay=0.1).state_dict(), tmp_path / "optimizer.pt")
        assert call(monkeypatch, "lint", tmp_path / "optimizer.pt") == code
        assert ("coupled" in capsys.readouterr().out) == bool(code)
    assert call(monkeypatch, "lint", tmp_path / "none.pt") == 2
    assert "none.pt" in capsys.readouterr().err
