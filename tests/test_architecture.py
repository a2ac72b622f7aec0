"""Imports go in one direction (docs: architecture): read with ast, asserted here."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "mirrorflow"

# Each room with the rooms that it may import; a folder counts as one, the lab's folders as theirs.
THEORY = (
    "_html",
    "_solution",
    "_loss",
    "schedule",
    "reparam",
    "regularizer",
    "conditions",
    "legendre",
)
ALLOWED = {
    "_html": (),
    "_solution": ("_html",),
    "_loss": (),
    "_devices": ("_loss",),
    "_threads": (),
    "_pickle_protocol": (),
    "_torch_file": ("_pickle_protocol",),
    "schedule": ("_html",),
    "optim": (),
    "spectrum": ("_html", "_threads", "_torch_file", "balance"),
    "balance": (),
    "reparam": (),
    "regularizer": ("reparam",),
    "conditions": ("_html", "_devices", "reparam", "regularizer"),
    "legendre": ("_devices", "reparam", "regularizer", "conditions"),
    "flow": (*THEORY, "_devices", "_threads", "descent"),
    "limit": (*THEORY, "_devices", "_threads"),
    "descent": THEORY,
    "estimator": (*THEORY, "_threads", "flow", "limit"),
    "weightdecay": ("_html", "_torch_file", "schedule"),
    "control": ("_html", "schedule", "weightdecay", "spectrum", "balance", "optim"),
    "integrations": ("schedule", "weightdecay", "spectrum", "control"),
    "lab.framework": (),
    "lab.experiments": (
        *THEORY,
        "flow",
        "limit",
        "descent",
        "estimator",
        "optim",
        "weightdecay",
        "spectrum",
        "control",
        "integrations",
        "lab.framework",
        "the package",
    ),
    "lab.sweep": ("lab.framework",),
    "lab.report": ("_html",),
    "cli": (
        "lab.framework",
        "lab.report",
        "lab.sweep",
        "conditions",
        "reparam",
        "regularizer",
        "spectrum",
        "weightdecay",
    ),
}
NAMESPACES = {"lab"}  # folders whose folders are rooms
FORBIDDEN = {"utils", "core", "common", "helpers", "misc"}
HEAVY = {"torch", "matplotlib", "altair", "sklearn", "scipy", "numpy", "pydantic"}


def imports(path: Path, root: Path) -> set[str]:
    """Return the dotted names that a file imports from mirrorflow, wherever in it they stand."""
    package = ("mirrorflow", *path.relative_to(root).with_suffix("").parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else ()
            home = ".".join((*stem, *(node.module.split(".") if node.module else ())))
            found |= {f"{home}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "mirrorflow"}


def room(name: str) -> str | None:
    """Return the room of a dotted name; a public name of the package itself reaches them all."""
    parts = name.split(".")[1:]
    if parts == ["__version__"]:
        return None
    if parts and parts[0] in NAMESPACES:
        return ".".join(parts[:2])
    return parts[0] if parts and (parts[0] in ALLOWED or len(parts) > 1) else "the package"


def rooms_imported(path: Path, root: Path) -> set[str]:
    return {room(name) for name in imports(path, root)} - {None}


def room_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:2]) if parts[0] in NAMESPACES and len(parts) > 2 else parts[0]


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*.py")):
        here = room_of(path, root)
        if here in ("__init__", "__main__", *NAMESPACES):
            continue
        if here not in ALLOWED:
            found.append(f"{here} has no place in tests/test_architecture.py: give it one")
            continue
        wrong = rooms_imported(path, root) - set(ALLOWED[here]) - {here}
        found += [f"{path.relative_to(root)} may not import {name}" for name in sorted(wrong)]
    return found


def file_graph(root: Path) -> dict[Path, set[Path]]:
    """Return which file imports which, imports in functions and under TYPE_CHECKING included."""
    return {
        path: {file for name in imports(path, root) if (file := file_of(name, root)) != path}
        - {None}
        for path in sorted(root.rglob("*.py"))
    }


def file_of(name: str, root: Path) -> Path | None:
    """Return the file behind a dotted name: that of its longest prefix which is a module."""
    parts = name.split(".")[1:]
    for count in range(len(parts), 0, -1):
        stem = root.joinpath(*parts[:count])
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if file.is_file():
                return file
    return None


def cycles(graph: dict[Path, set[Path]]) -> list[list[str]]:
    """Return the cycles that a depth-first walk meets."""
    found, done, way = [], set(), []

    def visit(file):
        if file in way:
            found.append([str(f) for f in (*way[way.index(file) :], file)])
        elif file not in done:
            way.append(file)
            for other in sorted(graph.get(file, ())):
                visit(other)
            done.add(way.pop())

    for file in graph:
        visit(file)
    return found


def test_imports_go_in_one_direction():
    assert violations(SOURCE) == []


def test_no_file_reaches_itself_by_its_imports():
    assert cycles(file_graph(SOURCE)) == []


@pytest.mark.parametrize(
    "files",
    [
        {"a/x.py": "from .y import f", "a/y.py": "def g():\n    from .x import h"},
        {"a/x.py": "from . import y", "a/y.py": "if TYPE_CHECKING:\n    from .x import h"},
        {
            "a/__init__.py": "from .x import f",
            "a/x.py": "from ..b import g",
            "b.py": "from .a import f",
        },
    ],
)
def test_a_cycle_of_files_is_found(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cycles(file_graph(tmp_path))


def test_packages_only_export_again():
    """An __init__ holds a docstring, imports and __all__; that of the package its version, too."""
    for path in sorted(SOURCE.rglob("__init__.py")):
        _, *rest = ast.parse(path.read_text()).body
        for node in rest:
            exports = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in (
                "__all__",
                "__version__",
                "(__getattr__, __dir__, __all__)",
            )
            assert exports or isinstance(node, (ast.Import, ast.ImportFrom)), path


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
        ("reparam.py", "from .lab import sweep", "may not import lab.sweep"),
        ("lab/sweep/x.py", "from ..report import build", "may not import lab.report"),
        ("lab/drawer/x.py", "", "lab.drawer has no place"),
        ("drawer.py", "", "drawer has no place"),
    ],
)
def test_a_violation_is_caught(tmp_path, file, code, message):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(code)
    assert any(message in found for found in violations(tmp_path))


@pytest.mark.parametrize(
    ("file", "code"),
    [
        (
            "flow.py",
            "import torch\nfrom .legendre import legendre\nfrom ._loss import LeastSquares",
        ),
        ("legendre/power.py", "from .base import checked\nfrom ..reparam import factors"),
        (
            "lab/experiments/x/fig02_x.py",
            "from .... import __version__\nimport mirrorflow as mf\n"
            "from ...framework import contract",
        ),
    ],
)
def test_what_is_allowed_is_not_reported(tmp_path, file, code):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(code)
    assert violations(tmp_path) == []
