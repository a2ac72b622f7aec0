"""Imports go in one direction (docs: architecture): read with ast, asserted here."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "mirrorflow"

# Each module with what it may import; folders count as one module.
THEORY = ("solution", "schedule", "reparam", "regularizer", "conditions", "legendre", "loss")
ALLOWED = {
    "solution": (),
    "schedule": (),
    "loss": (),
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
    "experiments": (*THEORY, "flow", "descent", "limit", "estimator", "weightdecay", "spectrum"),
    "sweep": ("experiments",),
    "cli": ("experiments", "report", "sweep", "conditions", "reparam", "regularizer"),
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
            found |= {home} if node.module else {f"{home}.{a.name}" for a in node.names}
    return {name.split(".")[1] for name in found if name.startswith("mirrorflow.")}


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
        for other in ALLOWED[module]:
            reach(other, (*seen, module))

    for module in ALLOWED:
        reach(module)


def test_there_is_no_drawer():
    stems = {part for p in SOURCE.rglob("*.py") for part in p.with_suffix("").parts}
    assert not stems & FORBIDDEN


def test_the_command_line_starts_without_heavy_imports():
    tree = ast.parse((SOURCE / "cli.py").read_text())
    top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in top if isinstance(n, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & HEAVY


@pytest.mark.parametrize(
    ("file", "code", "message"),
    [
        ("flow.py", "from .limit import limit", "flow.py may not import limit"),
        ("limit.py", "def f():\n    from mirrorflow.flow import flow", "may not import flow"),
        ("legendre/power.py", "from ..flow import flow", "may not import flow"),
        ("reparam.py", "from . import experiments", "may not import experiments"),
        ("drawer.py", "", "drawer has no place"),
    ],
)
def test_a_violation_is_caught(tmp_path, file, code, message):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(code)
    assert any(message in found for found in violations(tmp_path))
