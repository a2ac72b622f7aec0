"""The package as it is installed: what each part needs, and what type checkers see of it."""

import json
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = ("matplotlib", "altair", "vl_convert", "transformers", "peft", "lightning")
WITHOUT = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))
from mirrorflow.cli import main
main()
"""
# Makes an adapter and an optimizer state in the folder that it is given.
FILES = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
folder, name = Path(sys.argv[1]), "base_model.model.layers.0.q_proj.lora_{}.weight"
factors = {name.format("A"): torch.ones(2, 8), name.format("B"): torch.ones(8, 2)}
save_file(factors, folder / "adapter.safetensors")
layer = torch.nn.Linear(2, 2)
optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.1)
layer(torch.ones(2)).sum().backward()
optimizer.step()
torch.save(optimizer.state_dict(), folder / "optimizer.pt")
"""
PAIR = """
import torch, mirrorflow as mf
ones = torch.ones(2, dtype=torch.float64)
pair = mf.Hadamard(), mf.WeightDecay(), (0 * ones, ones)
"""
RIGHT = """
import torch
import mirrorflow as mf

layer = torch.nn.Linear(2, 2)
optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
scheduler = mf.WeightDecayScheduler(optimizer, mf.SwitchOff(0.1, at=5), decoupled=True)
"""
WRONG = {
    "keyword": "mf.WeightDecayScheduler(optimizer, mf.SwitchOff(0.1, at=5), decoupeld=True)\n",
    "rate": 'mf.SwitchOff("x", at=5)\n',
    "name": "mf.Hadamrd()\n",
}


def python(code, *arguments, **options):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.mark.slow
def test_audit_lint_and_check_need_the_core_alone(tmp_path):
    made = python(FILES, tmp_path)
    assert made.returncode == 0, made.stderr
    (tmp_path / "own.py").write_text(PAIR)
    audit = python(WITHOUT, "audit", tmp_path / "adapter.safetensors", "--json")
    assert audit.returncode == 0 and len(json.loads(audit.stdout)["records"]) == 1, audit.stderr
    lint = python(WITHOUT, "lint", tmp_path / "optimizer.pt")
    assert lint.returncode == 0, lint.stderr
    check = python(WITHOUT, "check", f"{tmp_path / 'own.py'}:pair")
    assert check.returncode == 0 and "Theorem 3.2" in check.stdout, check.stderr


def test_a_command_names_the_extra_that_it_lacks(tmp_path):
    page = tmp_path / "page.html"
    done = python(WITHOUT, "report", ROOT / "results", "--output", page)
    assert done.returncode == 2 and not page.exists()
    assert len(done.stderr.splitlines()) == 1 and "pip install '.[lab]'" in done.stderr


def test_a_public_name_names_the_extra_that_it_lacks():
    done = python(
        "import sys; sys.modules['lightning'] = None; import mirrorflow as mf; mf.DecayCallback"
    )
    assert "pip install '.[lightning]'" in done.stderr.splitlines()[-1]


def test_the_package_and_its_command_line_do_not_import_torch():
    done = python(
        "import sys, mirrorflow; assert len(mirrorflow.__all__) > 50\n"
        "import mirrorflow.cli; assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr


def test_pytest_has_one_lower_bound_which_imports_modules_once():
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = said["tool"]["pytest"]["ini_options"]["minversion"]  # an older one refuses to run
    assert f"pytest>={oldest}" in said["project"]["optional-dependencies"]["test-core"]
    assert tuple(map(int, oldest.split("."))) >= (8, 2)


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "mirrorflow", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "audit" in done.stdout


# mypy reads all of torch, which takes minutes: `make lint` runs both.
@pytest.mark.parametrize("tool", [pytest.param("mypy", marks=pytest.mark.slow), "pyright"])
def test_type_checkers_find_the_mistakes_of_a_script(tool, tmp_path):
    """A misspelt keyword, a string for a rate, a misspelt name; and nothing in a right script."""
    if not find_spec(tool):
        pytest.skip(f"{tool} is not installed: it comes with the extra dev")
    (tmp_path / "right.py").write_text(RIGHT)
    for name, line in WRONG.items():
        (tmp_path / f"wrong_{name}.py").write_text(RIGHT + line)
    options = ["--follow-imports=silent"] if tool == "mypy" else ["--pythonpath", sys.executable]
    files = sorted(path.name for path in tmp_path.glob("*.py"))
    command = [sys.executable, "-m", tool, *options, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    errors = [line for line in done.stdout.splitlines() if "error" in line and ".py" in line]
    assert {name for name in files if any(name in line for line in errors)} == set(files) - {
        "right.py"
    }, done.stdout
