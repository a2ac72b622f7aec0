"""The command line's output: 80 columns, JSON, prefixes, completion, colours and exit codes."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from mirrorflow.cli import terminal
from mirrorflow.cli.app import _progress
from mirrorflow.lab import framework
from mirrorflow.lab import sweep as package
from mirrorflow.spectrum._text import aligned
from test_cli import GOOD, NAME, ROOT, call

STUDY = """
experiment = "fig02_matrix_sensing"
preset = "smoke"
[set]
steps = 40
switch = 20
grid_alphas = []
commuting_time = 10.0
[grid]
start = [0.1, 0.2]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory, smoke):
    """Make one file of each kind that a command reads."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    folder = tmp_path_factory.mktemp("files")
    (folder / "own.py").write_text(GOOD + "total = (mf.Hadamard(), norm, (w0[1], 0.5 * w0[1]))")
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"base_model.model.model.layers.{i}.self_attn.{n}_proj.lora_{side}.weight": torch.randn(
            shape, generator=generator
        )
        for i in range(2) for n in "qv" for side, shape in (("A", (4, 6)), ("B", (8, 4)))
    }  # fmt: skip
    (folder / "adapter").mkdir()
    save_file(weights, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    for name, make in (("right", torch.optim.AdamW), ("wrong", torch.optim.Adam)):
        (folder / name).mkdir()
        parameter = torch.nn.Parameter(torch.ones(2, 2))
        torch.save(make([parameter], weight_decay=0.1).state_dict(), folder / name / "optimizer.pt")
    smoke(NAME)
    return folder


# --- Width ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "list --out {results}", "run fig09 --preset smoke --out {results}", "--help",
        "check {files}/own.py:pair", "check {files}/own.py:total", "lint {files}/wrong",
        "audit {files}/adapter", "audit {files}/adapter --level head",
        "truncate {files}/adapter --rank 2", "plan --steps 3000 --lr 1e-4 --decay 0.01",
        "run --help", "sweep --help", "sweep run --help", "sweep status --help", "audit --help",
        "truncate --help", "plan --help", "check --help", "lint --help", "report --help",
    ],
)  # fmt: skip
@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.sample(14)
def test_every_command_fits_the_terminal(monkeypatch, capsys, files, smoke, command, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    call(monkeypatch, *command.format(files=files, results=smoke.out).split())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1
    for line in lines:  # a path is one word, and stays whole
        assert len(line) <= columns or max(map(len, line.split())) > columns - 12, line


def test_a_wide_table_is_cut_into_blocks_that_hold_every_cell():
    names = [f"model.layers.{i}.{'attention.' * (i + 1)}q" for i in range(3)]
    rows = [["product", *(f"head{j}" for j in range(12))]]
    rows += [[name, *(f"{i}.{j}" for j in range(12))] for i, name in enumerate(names)]
    lines = aligned(rows, 50)
    assert all(len(line) <= 50 for line in lines)
    assert lines[0] == "names begin with: model.layers."
    cells = " ".join(lines).split()
    assert all(cells.count(cell) == 1 for row in rows[1:] for cell in row[1:])
    assert [line for line in aligned(rows) if len(line) > 50] == aligned(rows)  # cut only if asked


def test_a_long_last_column_is_folded_within_itself(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = terminal.columns([("0123", "failed", "word " * 30), ("0124", "waiting", "")])
    first, *more, last = text.splitlines()
    assert first.startswith("0123  failed   word") and last == "0124  waiting"
    assert all(len(line) <= 60 and line.startswith(15 * " " + "word") for line in more)


# --- JSON -----------------------------------------------------------------------------------------


def test_list_prints_json_of_every_experiment(monkeypatch, capsys, smoke, files):
    assert call(monkeypatch, "list", "--out", smoke.out, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(framework.experiments())
    assert {row["results"] for row in rows if row["name"] == NAME} != {0}


@pytest.mark.parametrize(("name", "code"), [("pair", 0), ("total", 1)])
def test_check_prints_json_and_its_exit_code_stays(monkeypatch, capsys, files, name, code):
    assert call(monkeypatch, "check", f"{files}/own.py:{name}", "--json") == code
    found = json.loads(capsys.readouterr().out)
    assert found["applies"] == (code == 0)
    kinds = {c["name"]: c["ok"] for c in found["conditions"]}
    assert kinds["regular"] is True and kinds["commuting"] is (code == 0)
    assert ("WeightDecay()" in found["advice"]) == bool(code)


def test_lint_prints_json_of_its_findings(monkeypatch, capsys, files):
    assert call(monkeypatch, "lint", files / "wrong", "--json") == 1
    (finding,) = json.loads(capsys.readouterr().out)
    assert finding["code"] == "coupled" and finding["group"] == 0 and finding["remedy"]
    assert call(monkeypatch, "lint", files / "right", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []


# --- Names, verdicts, completion, colours ---------------------------------------------------------


@pytest.mark.parametrize("name", ["fig09", "fig09_fig11_fig14_legendre", "legendre"])
def test_a_part_of_a_name_runs_the_only_match_and_says_what_it_shows(
    monkeypatch, capsys, smoke, files, name
):
    assert call(monkeypatch, "run", name, "--preset", "smoke", "--out", smoke.out) == 0
    *said, result, following = capsys.readouterr().out.splitlines()
    assert result == f"result: {smoke(NAME)[1] / 'result.json'}"
    assert following == f"next: mirrorflow report {smoke.out}"
    outcomes = " ".join(b for _, b in framework.load(NAME).verdicts(smoke(NAME)[2]["records"]))
    words = " ".join(said).split()
    assert all(word in words for word in outcomes.split())


def test_names_that_several_experiments_have_are_listed(monkeypatch, capsys):
    assert call(monkeypatch, "run", "fig1") == 2
    err = capsys.readouterr().err
    assert "fig10_coding_power, fig12_coding_log, fig15_fig16_lr_schedule" in err
    assert len(err.splitlines()) == 1 and "fig02" not in err


@pytest.mark.parametrize(
    ("words", "wanted"),
    [("mirrorflow tru", "truncate"), ("mirrorflow run fig02", "fig02_matrix_sensing")],
)
def test_a_shell_completes_commands_and_experiments(words, wanted):
    env = {"_MIRRORFLOW_COMPLETE": "complete_bash", "COMP_WORDS": words,
           "COMP_CWORD": str(len(words.split()) - 1)}  # fmt: skip
    code = "import sys; sys.argv[0] = 'mirrorflow'; from mirrorflow.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True
    )
    assert done.stdout.split() == [wanted]


class Terminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("wanted", [True, False])
def test_the_progress_bar_has_no_colours_where_none_are_wanted(monkeypatch, wanted):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not wanted:
        monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with _progress("fig00") as advance:
        advance(1, 3, "seed0")
    codes = re.findall(r"\x1b\[([\d;]*)m", screen.getvalue())
    assert any(re.match(r"[349]\d|[34]8;", part) for part in codes) == wanted
    assert "fig00" in screen.getvalue()


# --- Exit codes -----------------------------------------------------------------------------------


@pytest.fixture
def sweeps_end(monkeypatch):
    """Return a function that sets how every sweep ends."""

    def ends(failed=None, interrupted=False):
        def sweep(study, out, **options):
            if interrupted:
                raise KeyboardInterrupt
            return package.Outcome(package.plan(study, out), failed or {})

        monkeypatch.setattr(package, "sweep", sweep)

    return ends


def test_the_exit_codes_are_those_of_the_documentation(monkeypatch, files, tmp_path, sweeps_end):
    study = tmp_path / "study.toml"
    study.write_text(STUDY)
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \| (.*) \|$", page, re.M))
    commands = {
        0: [("check", f"{files}/own.py:pair"), ("lint", files / "right")],
        1: [("check", f"{files}/own.py:total"), ("lint", files / "wrong")],
        2: [("check", f"{files}/own.py:raises"), ("lint", files / "none"), ("run", "fig99"),
            ("sweep", tmp_path / "none.toml"), ("run", NAME, "--no-such-option")],
    }  # fmt: skip
    for code, calls in commands.items():
        assert [call(monkeypatch, *given) for given in calls] == [code] * len(calls)
    ends = ({}, {"failed": {"start=0.1": "RuntimeError: it diverged"}}, {"interrupted": True})
    for code, end in zip((0, 1, 130), ends, strict=True):
        sweeps_end(**end)
        assert call(monkeypatch, "sweep", study, "--out", tmp_path) == code
    assert set(rows) == {"0", "1", "2", "130"}
    assert all(f"`{name}`" in rows["1"] for name in ("check", "lint", "sweep"))
