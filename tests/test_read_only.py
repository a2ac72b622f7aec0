"""Folders that may be read and not written: one sentence, exit code 2, and nothing is changed."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

# Root may write everywhere; without this capability permissions hold for it as well.
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
WITHOUT = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if ROOT else []

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX"),
    pytest.mark.skipif(ROOT and shutil.which("setpriv") is None, reason="root without setpriv"),
]

SMALL = "steps = 20\nswitch = 10\ngrid_alphas = []\ncommuting_time = 2.0\n"
# A command, and what it says; one process runs them all, because each would import torch.
COMMANDS = {
    "run fig02 --preset smoke --out {none}": "{none}/fig02_matrix_sensing must be readable",
    "run fig02 --preset smoke --seed 7 --out {results}": "{results}",
    "run fig02 --preset smoke --config {file} --out {results}": "result: {results}",
    "demo --out {none}": "{none}",
    "report {results}": "{results} must be readable and writable.*by --output",
    "sweep {study} --out {results}": "{results}",
    "audit {adapter} --page {none}/page.html": "{none}.*by --page",
    "truncate {adapter} --rank 1 --out {none}/small": "{none} must be readable",
    "list --out {results}": "results in {results}: 1",
    "audit {adapter}": "ratio",
}
GOOD = ("result: {results}", "results in {results}: 1", "ratio")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Return folders that take nothing, by name, and files to read."""
    root = tmp_path_factory.mktemp("places")
    found = {name: root / name for name in ("none", "results", "adapter")}
    for folder in found.values():
        folder.mkdir()
    found |= {"file": root / "small.toml", "study": root / "study.toml"}
    found["file"].write_text(SMALL)
    found["study"].write_text('experiment = "fig02_matrix_sensing"\npreset = "smoke"\n')
    factors = {"A": torch.ones(2, 3), "B": torch.ones(4, 2)}
    save_file(
        {f"q_proj.lora_{name}.weight": value for name, value in factors.items()},
        found["adapter"] / "adapter_model.safetensors",
    )
    [(code, text)] = run(list(COMMANDS)[2:3], found, [])
    assert code == "0", text
    for folder in (*root.rglob("*/"), root):
        folder.chmod(0o555)
    yield found
    for folder in (root, *root.rglob("*/")):
        folder.chmod(0o755)


def run(commands, places, wrapper):
    """Run commands in one process; return the exit code and the output of each."""
    code = """
        import sys
        from mirrorflow.cli import main
        for words in sys.argv[1:]:
            sys.argv = ["mirrorflow", *words.split()]
            try:
                main()
                code = 0
            except SystemExit as error:
                code = error.code
            print(f"\\n=== {code}", flush=True)
    """
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", textwrap.dedent(code),
         *(command.format(**places) for command in commands)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
    *texts, rest = done.stdout.split("\n=== ")
    codes = [text.split("\n", 1)[0] for text in [*texts[1:], rest]]
    return list(zip(codes, texts, strict=True))


def content(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_folders_that_take_nothing_are_named_and_left_as_they_are(places):
    before = content(places["none"].parent)
    said = run(list(COMMANDS), places, WITHOUT)
    assert content(places["none"].parent) == before
    for (code, text), (command, expected) in zip(said, COMMANDS.items(), strict=True):
        flat = " ".join(text.split())
        assert code == ("0" if expected in GOOD else "2"), (command, text)
        for part in expected.format(**places).split(".*"):
            assert part in flat, (command, text)
