"""Imports go in one direction (docs: architecture): read with ast, asserted here."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "mirrorflow"

# Each module with what it may import; folders count as one module.
THEORY = ("solution", "schedule", "reparam", "regularizer", "conditions", "legendre", "loss")
TOP = (*THEORY, "flow", "descent", "limit", "estimator", "weightdecay", "spectrum", "the package")
ALLOWED = {
    "solution": (),
    "schedule": (),
    "loss": (),
    "optim": (),
    "spectrum": (),
    "report": (),
    "reparam": (),
    "regularizer": ("reparam",),
    "conditions": ("reparam", "regularizer"),
    "legendre": ("reparam", "regularizer", "conditions"),
    "flow": THEORY,
    "descent": THEORY,
    "limit": THEORY,
    "estimator": (*THEORY, "flow", "limit"),
    "weightdecay": ("schedule",),
    "integrations": ("schedule", "weightdecay", "spectrum"),
    "experiments": TOP,
    "sweep": ("experiments",),
    "cli": (
        "experiments",
        "report",
        "sweep",
        "conditions",
        "reparam",
        "regularizer",
        "spectrum",
        "weightdecay",
    ),
}
FORBIDDEN = {"utils", "core", "common", "base", "helpers", "misc"}
HEAVY = {"torch", "matplotlib", "altair", "sklearn", "scipy", "numpy", "pydantic"}


def imports(path: Path, root: Path) -> set[str]:
    """Name the mirrorflow modules that a file imports, function-local imports included."""
    package = ("mirrorflow", *path.relative_to(root).with_suffix("").parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else ()
            home = ".".join((*stem, *(node.module.split(".") if node.module else ())))
            found |= {f"{home}.{alias.name}" for alias in node.names}
    return {reached(name) for name in found if name.split(".")[0] == "mirrorflow"} - {None}


def reached(name: str) -> str | None:
    """Name the module behind `mirrorflow.flow.x`; a name of the package itself reaches them all."""
    module = name.split(".")[1] if "." in name else ""
    if module == "__version__":
        return None
    return module if module in ALLOWED or name.count(".") > 1 else "the package"


def module_of(path: Path, root: Path) -> str:
    return path.relative_to(root).with_suffix("").parts[0]


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*.py")):
        module = module_of(path, root)
        if module in ("__init__", "__main__"):
            continue
        if module not in ALLOWED:
            found.append(f"{module} has no place in tests/test_architecture.py: give it one")
            continue
        wrong = imports(path, root) - set(ALLOWED[module]) - {module}
        found += [f"{path.relative_to(root)} may not import {name}" for name in sorted(wrong)]
    return found


def test_imports_go_in_one_direction():
    assert violations(SOURCE) == []


def test_the_table_itself_has_no_cycle():
    def reach(module, seen=()):
        assert module not in seen, f"cycle through {module}"
        for other in set(ALLOWED[module]) - {"the package"}:
            reach(other, (*seen, module))

    for module in ALLOWED:
        reach(module)


def test_there_is_no_drawer():
    files = [p.relative_to(SOURCE).with_suffix("") for p in SOURCE.rglob("*.py")]
    assert not {part.strip("_") for file in files for part in file.parts} & FORBIDDEN


def test_the_command_line_starts_without_heavy_imports():
    code = "import sys, mirrorflow.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & HEAVY


@pytest.mark.parametrize(
    ("file", "code", "message"),
    [
        ("flow.py", "from .limit import limit", "flow.py may not import limit"),
        ("limit.py", "def f():\n    from mirrorflow.flow import flow", "may not import flow"),
        ("legendre/power.py", "from ..flow import flow", "may not import flow"),
        ("flow.py", "from mirrorflow import limit", "flow.py may not import limit"),
        ("flow.py", "import mirrorflow as mf", "may not import the package"),
        ("legendre/power.py", "from mirrorflow import Hadamard", "may not import the package"),
        ("reparam.py", "from . import experiments", "may not import experiments"),
        ("drawer.py", "", "drawer has no place"),
    ],
)
def test_a_violation_is_caught(tmp_path, file, code, message):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(code)
    assert any(message in found for found in violations(tmp_path))


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("flow.py", "import torch\nfrom .legendre import legendre\nfrom .loss import LeastSquares"),
        ("legendre/power.py", "from .function import checked\nfrom ..reparam import factors"),
        (
            "experiments/fig02_matrix_sensing.py",
            "from .. import __version__\nimport mirrorflow as mf\nfrom . import _contract",
        ),
    ],
)
def test_what_is_allowed_is_not_reported(tmp_path, file, code):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(code)
    assert violations(tmp_path) == []
